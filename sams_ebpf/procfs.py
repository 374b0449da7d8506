"""Mode `proc`: the job's own processes, read from `/proc` and their CPU clocks.

What lives at a sample is counted to the nanosecond, on each process's own CPU clock.
The kernel's counter of the cgroup is read after the clocks and bounds them. How samples
become counters is in `sampling`; this module reads, and keeps the baselines on disk.
"""

# Thousands of these short-lived paths are read in one harvest: strings, no Path objects.
# ruff: noqa: PTH115, PTH116

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from sams_ebpf import cgroups, durable, taskstats, wire
from sams_ebpf.cgroups import Cgroup, Hierarchy
from sams_ebpf.errors import NotPossibleError, UsageError
from sams_ebpf.meter import Snapshot
from sams_ebpf.sampling import (
    UNKNOWN,
    Account,
    Death,
    Executable,
    Image,
    Place,
    Sampler,
    Seen,
)

STATE_VERSION: Final = 1
QUOTA: Final = 10_000

_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_TICK_NS: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_DELETED: Final = b" (deleted)"
_MEMFD: Final = b"/memfd:"
_SECOND: Final = 1_000_000_000
_USUAL_FOLDERS: Final = (b"/usr/bin", b"/bin", b"/usr/local/bin", b"/usr/sbin", b"/sbin")
_MAX_FILES: Final = 65536
_log = logging.getLogger(__name__)


class Status(NamedTuple):
    """What `/proc/PID/stat` says; user and system in ticks, start in ns since boot.

    start_ns: rounded down to a tick of 10 ms. dead: it and all its threads are.
    """

    comm: bytes
    parent: int
    start_ns: int
    user: int
    system: int
    dead: bool


class State(msgspec.Struct):
    """What is kept on disk after every sample."""

    version: int
    boot_id: str
    epoch: bytes
    generation: int
    begin_ns: int
    account: Account
    run: str = ""


class ProcMeter:
    """The fallback meter: see `sams_ebpf.meter.Meter`.

    where: the job's cgroups, one per place (the same job's folders in other v1 trees are
    not other places). state: a file that outlives this process but need not outlive the
    boot; None for a job that ends with this process. run: the state of another run is not
    continued, `superseded` is its epoch; "": not known. quota: executables that get a row of
    their own. listen: have the kernel tell of deaths between samples where it does (see
    `taskstats`); `not_listening` says why it does not. Raises UsageError if the state
    cannot be kept.
    """

    mode: Literal["bpf", "proc"] = "proc"
    loader: Literal["libbpf", "bcc"] | None = None

    def __init__(
        self,
        where: Sequence[Cgroup],
        state: Path | None = None,
        *,
        run: str = "",
        quota: int = QUOTA,
        listen: bool = True,
        hierarchies: Iterable[Hierarchy] | None = None,
    ) -> None:
        self._hierarchies = list(cgroups.mounted() if hierarchies is None else hierarchies)
        self._file = state
        self._where: list[Cgroup] = []
        self._counters: list[Cgroup | None] = []
        self._counter_read_ns = 0
        self._host_mounts = _namespace(1) or _namespace(os.getpid())
        self._listener: taskstats.Listener | None = None
        self.not_listening = "not asked for"
        if listen:
            try:
                self._listener = taskstats.Listener()
                self.not_listening = ""
            except NotPossibleError as error:
                self.not_listening = str(error)
        self._files: dict[tuple[int, int], bytes] = {}
        self._state, self._take_up_now = _load(state)
        self.superseded: bytes | None = None
        if run and self._state.run and run != self._state.run:
            self.superseded = self._state.epoch
            self._state, self._take_up_now = _load(None)
        self._state.run = run or self._state.run
        self._forget_the_dead()
        self._state.generation += 1
        self._sampler = Sampler(self._state.account, quota)
        for cgroup in where:
            self.add(cgroup)
        try:
            self._save()
        except OSError as error:
            reason = f"{state}: baselines cannot be kept: {error.strerror}"
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UsageError(reason) from error
            self._lose("baselines_not_written", reason)
        # What is used from here on is the sampler's to find; before, it is `before_attach`.
        self._sample()

    @property
    def epoch(self) -> bytes:
        """Identity of this uninterrupted life of the counters."""
        return self._state.epoch

    @property
    def generation(self) -> int:
        """Which writer of the epoch this is."""
        return self._state.generation

    @property
    def begin_ns(self) -> int:
        """Wall clock at which the epoch began, ns since 1970."""
        return self._state.begin_ns

    def add(self, cgroup: Cgroup) -> None:
        """Take one more cgroup to the job's; one that it has already changes nothing."""
        if any(cgroup.folder == known.folder for known in self._where):
            return
        self._where.append(cgroup)
        self._counters.append(None)
        places = self._state.account.places
        # Places of the state and of `where` have the same order.
        at = len(self._where) - 1
        for found, place in enumerate(places):
            if place.folder == cgroup.folder:
                places[at], places[found] = places[found], places[at]
                return
        places.insert(at, Place(cgroup.folder))

    def look(self, found: Sequence[Cgroup]) -> None:
        """Take to the job's what it has now; sample once more if its last process has left.

        Who made the cgroup removes it then, and the kernel's counter with it.
        """
        for cgroup in found:
            self.add(cgroup)
        if not self.live() and self._has_grown():
            self._sample()

    def live(self) -> int:
        """Count the processes in the job's cgroups; zombies are not among them."""
        return len(set().union(*map(cgroups.processes, self._where)))

    def harvest(self) -> Snapshot:
        """Take a sample, keep it on disk, and give all counters."""
        return self._snapshot(self._sample())

    def _sample(self) -> int:
        """Take a sample and keep it on disk; gives the number of live processes."""
        began_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        account = self._state.account
        for at, cgroup in enumerate(self._where):
            self._find(account.places[at], at, cgroup)
        members: dict[int, int] = {}
        for at, cgroup in enumerate(self._where):
            members.update(dict.fromkeys(cgroups.processes(cgroup), at))
        seen = []
        gone = []
        for pid in members.keys() | account.images.keys():
            clock_ns = clock(pid)
            image = account.images.get(pid)
            if clock_ns is None:
                gone.append(pid)
            elif image is None or image.seen_ns != clock_ns or pid not in members:
                # One whose clock stands still has not run since: no exec, no other process.
                one = self._look(pid, image, clock_ns, members)
                if one is not None:
                    seen.append(one)
                elif image is not None:
                    gone.append(pid)
        deaths = self._deaths()
        for at in range(len(self._where)):
            self._count(account.places[at], at)
        self._take_up_now = False
        self._sampler.take(began_ns, seen, members=members, gone=gone, deaths=deaths)
        try:
            self._save()
        except OSError as error:
            where = f"{self._file}: baselines cannot be kept: {error.strerror}"
            self._lose("baselines_not_written", where)
        return len(members)

    def _has_grown(self) -> bool:
        """Tell whether the kernel charged anything since the last sample."""
        places = self._state.account.places
        return any((self._read(at) or 0) > places[at].last_ns for at in range(len(self._where)))

    def close(self) -> None:
        """Remove the baselines: the job has ended, and its last counters have been told."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _forget_the_dead(self) -> None:
        """Drop those who died while no collector ran: their PIDs may be others' by now."""
        images = self._state.account.images
        for pid, image in list(images.items()):
            status = read_status(pid)
            if status is None or status.start_ns != image.start_ns:
                del images[pid]

    def _deaths(self) -> list[Death]:
        """Fetch what the kernel told of the dead, with the paths of their executables."""
        if self._listener is None:
            return []
        exits, lost = self._listener.drain()
        account = self._state.account
        if lost:
            account.lost["deaths_not_told"] = account.lost.get("deaths_not_told", 0) + lost
        if not exits:
            return []
        for image in account.images.values():
            if image.flags == 0 and image.file != (0, 0):
                self._files[image.file] = image.path
        if len(self._files) > _MAX_FILES:
            self._files.clear()
        wall_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        # By name too: one that leads nowhere says nothing about the same file's other names.
        found: dict[tuple[tuple[int, int], bytes], tuple[bytes, int] | None] = {}
        deaths = []
        for one in exits:
            named = one.file, one.comm
            if named not in found:
                found[named] = self._path_of(one)
            path_and_change = found[named]
            # A file that changed after the process began may be another one by now.
            is_it = path_and_change is not None and path_and_change[1] <= one.begin_s * _SECOND
            deaths.append(
                Death(
                    pid=one.pid,
                    start_ns=one.begin_s * _SECOND - wall_ns,
                    parent=one.parent,
                    cpu_ns=one.cpu_ns,
                    user_us=one.user_us,
                    system_us=one.system_us,
                    file=one.file,
                    key=(path_and_change[0], 0) if path_and_change and is_it else None,
                    peak_bytes=one.peak_bytes or None,
                )
            )
        return deaths

    def _path_of(self, one: taskstats.Exit) -> tuple[bytes, int] | None:
        """Find a path for a dead process's file, and when that file last changed (ns).

        Paths seen in samples, and those a command of this name usually has; taken only if
        device and inode are those of the file.
        """
        paths = [self._files[one.file]] if one.file in self._files else []
        if one.comm and b"/" not in one.comm:
            paths += [b"%s/%s" % (folder, one.comm) for folder in _USUAL_FOLDERS]
        for path in paths:
            try:
                status = os.stat(path)
            except OSError:
                continue
            if (status.st_dev, status.st_ino) == one.file:
                real = os.path.realpath(path)
                self._files[one.file] = real
                return real, status.st_ctime_ns
        return None

    def _find(self, place: Place, at: int, cgroup: Cgroup) -> None:
        """See whether a place's cgroup is there, and whether it is the one that was."""
        try:
            number = cgroups.identify(cgroup)
            if number == place.id:
                if self._counters[at] is None and place.counted:
                    self._counters[at] = cgroups.counter(cgroup, self._hierarchies)
                return
            born_ns = cgroups.birth_ns(cgroup)
        except FileNotFoundError:
            place.id = None
            return
        # Removed since the last look, and perhaps made again: its counter began anew.
        place.done_ns += place.last_ns
        place.last_ns = 0
        place.sampled_ns = 0
        place.id = number
        place.birth_ns = born_ns - (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        self._counters[at] = cgroups.counter(cgroup, self._hierarchies)
        place.counted = self._counters[at] is not None
        if self._take_up_now:
            place.base_ns = self._read(at) or 0
            place.sampled_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def _count(self, place: Place, at: int) -> None:
        value = self._read(at)
        if value is not None:
            place.last_ns = max(value, place.last_ns)
            self._counter_read_ns = time.monotonic_ns()

    def _read(self, at: int) -> int | None:
        counter = self._counters[at]
        try:
            return None if counter is None else cgroups.cpu_ns(counter)
        except FileNotFoundError:
            return None

    def _look(
        self, pid: int, image: Image | None, clock_ns: int, members: dict[int, int]
    ) -> Seen | None:
        """Read all that one sample needs of a process; None if it died meanwhile."""
        status = read_status(pid)
        if status is None:
            return None
        if image is not None and image.start_ns != status.start_ns:
            image = None
        if image is None and pid not in members:
            return None
        where: Literal["inside", "outside"] = "inside"
        if pid not in members and not self._still_inside(pid, dead=status.dead):
            where = "outside"
        # Reading the peak costs as much as all the rest: not for who did next to nothing.
        idle = image is not None and clock_ns - image.seen_ns < _TICK_NS
        return Seen(
            pid=pid,
            start_ns=status.start_ns,
            parent=status.parent,
            clock_ns=clock_ns,
            user=status.user,
            system=status.system,
            comm=status.comm,
            executable=None if status.dead else read_executable(pid, image, self._host_mounts),
            where=where,
            peak_bytes=None if status.dead or idle else read_peak(pid),
            place=members.get(pid, 0),
        )

    def _still_inside(self, pid: int, *, dead: bool) -> bool:
        """Tell by its own word whether a process is in the job that no list showed there.

        No list shows zombies; v2 tells where they died, v1 does not (cgroups(7): they
        appear at the root), and then it was where it was last seen.
        """
        for cgroup in self._where:
            if dead and cgroup.version == 1:
                return True
            try:
                mine = cgroups.own(cgroup.hierarchy, pid)
            except (FileNotFoundError, ProcessLookupError):
                return False
            if mine is not None and f"{mine.folder}/".startswith(f"{cgroup.folder}/"):
                return True
        return False

    def _snapshot(self, live: int) -> Snapshot:
        account = self._state.account
        counter_ns = account.counter_ns
        age_ns = 0
        if counter_ns is not None and any(place.id is None for place in account.places):
            age_ns = time.monotonic_ns() - self._counter_read_ns if self._counter_read_ns else 0
        return Snapshot(
            records=[
                wire.Record(
                    total.path,
                    total.flags,
                    None,
                    total.cpu_ns,
                    total.user_ns,
                    total.cpu_ns - total.user_ns,
                    max_rss_bytes=total.max_rss_bytes,
                )
                for total in account.totals
            ],
            cgroup_cpu_ns=counter_ns,
            age_ns=age_ns,
            unattributed_by=account.unattributed_by,
            lost=dict(account.lost),
            processes=wire.Processes(live=live),
        )

    def _save(self) -> None:
        if self._file is not None:
            durable.write(self._file, msgspec.json.encode(self._state), mode=0o600)

    def _lose(self, what: str, reason: str) -> None:
        lost = self._state.account.lost
        lost[what] = lost.get(what, 0) + 1
        if lost[what] == 1:
            _log.warning("%s", reason)


def clock(pid: int) -> int | None:
    """CPU time of a process in ns, its dead threads and the running slice included.

    clock_getcpuclockid(3) without the library: works for any process and for zombies,
    needs no right; None once the process is no more.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None


def read_status(pid: int) -> Status | None:
    """Read `/proc/PID/stat` (proc(5)); None once the process is no more."""
    data = _read(f"/proc/{pid}/stat")
    if data is None:
        return None
    # The name may hold spaces and parentheses.
    end = data.rindex(b")")
    fields = data[end + 2 :].split()
    return Status(
        comm=data[data.index(b"(") + 1 : end],
        parent=int(fields[1]),
        start_ns=int(fields[19]) * _TICK_NS,
        user=int(fields[11]),
        system=int(fields[12]),
        # A leader may have left before its threads: a zombie whose process lives.
        dead=fields[0] in (b"Z", b"X") and int(fields[17]) <= 1,
    )


def read_peak(pid: int) -> int | None:
    """Peak resident memory of a process since its last exec, in bytes."""
    head, found, tail = (_read(f"/proc/{pid}/status") or b"").partition(b"\nVmHWM:")
    del head
    return int(tail.split(None, 1)[0]) * 1024 if found else None


def read_executable(pid: int, known: Image | None, host_mounts: bytes | None) -> Executable:
    """Read what a process executes; a key of `UNKNOWN` if that cannot be told."""
    folder = f"/proc/{pid}"
    link = _link(f"{folder}/exe")
    if link is None:
        # The leader has left: its threads still know.
        with contextlib.suppress(OSError):
            for thread in os.scandir(f"{folder}/task"):
                link = _link(f"{thread.path}/exe")
                if link is not None:
                    folder = thread.path
                    break
    if link is None:
        return Executable(b"", (0, 0), UNKNOWN)
    if known is not None and known.link == link:
        return Executable(link, known.file, (known.path, known.flags))
    flags = 0
    file = 0, 0
    path = link
    with contextlib.suppress(OSError):
        status = os.stat(f"{folder}/exe")
        file = status.st_dev, status.st_ino
    if link.endswith(_DELETED) and not _is_file(link, file):
        path = link.removesuffix(_DELETED)
        flags |= wire.MEMFD if path.startswith(_MEMFD) else wire.DELETED
    if host_mounts is not None and _link(f"{folder}/ns/mnt") not in (host_mounts, None):
        flags |= wire.FOREIGN
    return Executable(link, file, (path, flags))


def _is_file(path: bytes, file: tuple[int, int]) -> bool:
    """Tell whether a path is a name of that very file."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == file


def _link(path: str) -> bytes | None:
    # Gone, a kernel thread, a path longer than a page, or not ours to see.
    try:
        return os.readlink(path.encode())
    except OSError:
        return None


def _namespace(pid: int) -> bytes | None:
    return _link(f"/proc/{pid}/ns/mnt")


def _read(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 8192) or None
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return None


def _load(file: Path | None) -> tuple[State, bool]:
    """Take up the state of this boot, or begin an epoch; True: count from now on only.

    With an unreadable state nobody knows what was counted before, so nothing that was
    used until now is counted again.
    """
    with open(_BOOT_ID, encoding="ascii") as opened:  # noqa: PTH123 - /proc, as above
        boot_id = opened.read().strip()
    new = State(STATE_VERSION, boot_id, os.urandom(16), 0, time.time_ns(), Account())
    if file is None:
        return new, False
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return new, False
    except OSError as error:
        raise UsageError(f"{file}: baselines cannot be read: {error.strerror}") from error
    try:
        state = msgspec.json.decode(data, type=State)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        _log.warning("%s: not usable (%s): counting begins anew from here", file, error)
    else:
        if state.boot_id != boot_id:
            return new, False
        if state.version == STATE_VERSION:
            return state, False
        _log.warning("%s: of another version: counting begins anew from here", file)
    new.account.lost["baselines_lost"] = 1
    return new, True
