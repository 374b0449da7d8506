"""Control groups: where they are mounted, which one is a job's, what they say of CPU time.

Both versions and their mixture are meant: v1 has one tree per controller (or several
controllers joined in one tree, `cpu,cpuacct`), v2 has one tree for all; a hybrid host
mounts both. Nothing here is told from a kernel's version number.
"""

# Thousands of these short-lived paths are read in one harvest: strings, no Path objects.
# ruff: noqa: PTH102, PTH106, PTH112, PTH116, PTH120, PTH123

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import select
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, Self

import msgspec

from sams_ebpf.errors import NotPossibleError, UsageError

MOUNTINFO: Final = "/proc/self/mountinfo"
SLURM_SLICES: Final = ("system.slice",)
# And the PID of the `run` that has made it.
OF_RUN: Final = "sams-ebpf-run-"
# Slurm 26.05 and later name a job's folder after its SLUID.
SLUID: Final = re.compile(r"s[0-9A-HJKMNP-TV-Z]{13}")

# cgroup_subsys names of v1; every other word among a mount's options is an option.
_CONTROLLERS: Final = {
    *("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "net_cls", "net_prio", "blkio"),
    *("perf_event", "hugetlb", "pids", "rdma", "misc", "debug"),
}
# Which v1 tree is best to tell a job by: the one with a CPU counter, then those in which a
# new cgroup needs no setting before a process may enter it.
_PREFERENCE: Final = ("cpuacct", "freezer", "pids", "memory", "devices", "perf_event", "net_cls")
_UNIT: Final = re.compile(r"[^/]+\.(service|scope|slice|mount|socket)")
_MAX_FOLDERS: Final = 100_000


class Hierarchy(msgspec.Struct, frozen=True, kw_only=True):
    """One mounted tree of cgroups.

    mount: folder where it is mounted. root: the cgroup that this folder shows ("/" but in
        containers). controllers: of v1, with `name=systemd` for a tree without one; empty
        for v2, where they are no property of the tree.
    """

    version: Literal[1, 2]
    mount: str
    root: str = "/"
    controllers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How people call it: `v2`, or the v1 controllers."""
        return "v2" if self.version == 2 else ",".join(self.controllers)

    def folder(self, path: str) -> str:
        """Folder of the cgroup at `path`, counted from the folder of the mount."""
        return os.path.normpath(f"{self.mount}/{path.lstrip('/')}")


class Cgroup(msgspec.Struct, frozen=True, kw_only=True):
    """One cgroup, which need not exist any more.

    folder: absolute. path: the same, counted from the mount's folder; starts with "/".
    """

    folder: str
    path: str
    hierarchy: Hierarchy

    @property
    def version(self) -> Literal[1, 2]:
        """1 or 2."""
        return self.hierarchy.version

    def exists(self) -> bool:
        """Tell whether it is there now."""
        return os.path.isdir(self.folder)


class Times(msgspec.Struct, frozen=True):
    """CPU time the kernel charged to a cgroup and all below it, ns; None: not kept."""

    cpu_ns: int | None = None
    user_ns: int | None = None
    system_ns: int | None = None


def mounted(mountinfo: str | None = None) -> list[Hierarchy]:
    """List the mounted hierarchies, v2 first, then v1 by what suits best to tell a job.

    mountinfo: the text of `/proc/self/mountinfo` (proc(5)), read when not given.
    """
    if mountinfo is None:
        with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
            mountinfo = file.read()
    found: dict[tuple[int, tuple[str, ...]], Hierarchy] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(tail) < 3 or tail[0] not in ("cgroup", "cgroup2"):
            continue
        controllers: tuple[str, ...] = ()
        if tail[0] == "cgroup":
            controllers = tuple(
                word
                for word in tail[2].split(",")
                if word in _CONTROLLERS or word.startswith("name=")
            )
        hierarchy = Hierarchy(
            version=2 if tail[0] == "cgroup2" else 1,
            mount=_unescape(fields[4]),
            root=_unescape(fields[3]),
            controllers=controllers,
        )
        key = (hierarchy.version, controllers)
        # One tree can be mounted at several places: the one that shows most of it, then
        # the first.
        if key not in found or len(hierarchy.root) < len(found[key].root):
            found[key] = hierarchy
    return sorted(found.values(), key=_rank)


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _rank(hierarchy: Hierarchy) -> tuple[int, str]:
    if hierarchy.version == 2:
        return 0, ""
    ranks = [_PREFERENCE.index(c) for c in hierarchy.controllers if c in _PREFERENCE]
    return 1 + min(ranks, default=len(_PREFERENCE)), hierarchy.name


def at(folder: str, hierarchies: Iterable[Hierarchy]) -> Cgroup | None:
    """Give the cgroup of a folder below one of the mounts; None for any other folder."""
    folder = os.path.normpath(folder)
    best: Cgroup | None = None
    for hierarchy in hierarchies:
        mount = hierarchy.mount.rstrip("/")
        if folder == mount or folder.startswith(f"{mount}/"):
            path = folder[len(mount) :] or "/"
            # Mounts below mounts (/sys/fs/cgroup/unified): the innermost is meant.
            if best is None or len(mount) > len(best.hierarchy.mount):
                best = Cgroup(folder=folder, path=path, hierarchy=hierarchy)
    return best


def resolve(text: str, hierarchies: list[Hierarchy] | None = None) -> Cgroup:
    """Find the cgroup a person means: a folder, a path within a hierarchy, or a unit.

    Raises UsageError when there is none, or when a unit's name stands for several.
    """
    hierarchies = mounted() if hierarchies is None else hierarchies
    if not hierarchies:
        raise NotPossibleError("no cgroup hierarchy is mounted: mount cgroup2 on /sys/fs/cgroup")
    if not text.strip("/") and not text.startswith("/"):
        raise UsageError("--cgroup is empty: give a folder, a path or a systemd unit")
    if text.startswith("/") and os.path.isdir(text):
        cgroup = at(os.path.realpath(text), hierarchies)
        if cgroup is None:
            mounts = ", ".join(hierarchy.mount for hierarchy in hierarchies)
            raise UsageError(f"{text}: a folder, but no cgroup; cgroups are below {mounts}")
        return cgroup
    relative = os.path.normpath(text.lstrip("/"))
    if relative.startswith(".."):
        raise UsageError(f"{text}: leads out of the cgroup hierarchy")
    for hierarchy in hierarchies:
        folder = hierarchy.folder(relative)
        if os.path.isdir(folder):
            return Cgroup(folder=folder, path=f"/{relative}", hierarchy=hierarchy)
    if _UNIT.fullmatch(text):
        return _unit(text, hierarchies)
    names = ", ".join(hierarchy.name for hierarchy in hierarchies)
    raise UsageError(f"{text}: no such cgroup, neither as a folder nor in a hierarchy ({names})")


def _unit(name: str, hierarchies: list[Hierarchy]) -> Cgroup:
    for hierarchy in hierarchies:
        found = [folder for folder in subtree(hierarchy.mount) if folder.rpartition("/")[2] == name]
        if len(found) > 1:
            raise UsageError(f"{name}: stands for {len(found)} cgroups, {found[0]} is one of them")
        for folder in found:
            cgroup = at(folder, [hierarchy])
            if cgroup is not None:
                return cgroup
    raise UsageError(f"{name}: no cgroup of a unit of this name: is it running?")


def subtree(folder: str) -> Iterator[str]:
    """Yield the folder and every cgroup below it, parents first; what goes is left out."""
    pending = [folder]
    for _ in range(_MAX_FOLDERS):
        if not pending:
            return
        current = pending.pop()
        yield current
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(current) as it:
            pending.extend(
                sorted(entry.path for entry in it if entry.is_dir(follow_symlinks=False))
            )


def identify(cgroup: Cgroup) -> int:
    """Give the kernel's 64-bit id, the one BPF programs see. Raises FileNotFoundError.

    The file handle holds it on every kernel; the inode number is the same from 5.5 on
    (commit 40430452fd5d ("kernfs: use 64bit inos if ino_t is 64bit")), before only its
    lower half.
    """
    handle = ctypes.create_string_buffer(struct.pack("Ii", 8, 0) + bytes(8))
    mount_id = ctypes.c_int()
    path = os.fsencode(cgroup.folder)
    if _libc.name_to_handle_at(-100, path, handle, ctypes.byref(mount_id), 0) == 0:
        length, kind, number = struct.unpack("IiQ", handle.raw[:16])
        if (length, kind) == (8, 0xFE):
            return int(number)
    return os.stat(cgroup.folder).st_ino


def birth_ns(cgroup: Cgroup) -> int:
    """Give the wall clock at which it was made, ns since 1970. Raises FileNotFoundError.

    cgroupfs keeps no birth time. The folder's times are set when its inode is first
    looked up, which is at mkdir; memory pressure may drop the inode and set them anew,
    so ask early and keep the answer.
    """
    status = os.stat(cgroup.folder)
    return min(status.st_ctime_ns, status.st_mtime_ns)


def counter(cgroup: Cgroup, hierarchies: Iterable[Hierarchy]) -> Cgroup | None:
    """Give the cgroup whose CPU counter covers this one, None where the kernel keeps none.

    A v1 tree other than cpuacct has no counter, but the same path below cpuacct is the
    same set of processes where one program (Slurm, systemd) manages both.
    """
    if _times(cgroup).cpu_ns is not None:
        return cgroup
    if cgroup.version == 1:
        for hierarchy in hierarchies:
            if "cpuacct" in hierarchy.controllers:
                other = Cgroup(
                    folder=hierarchy.folder(cgroup.path), path=cgroup.path, hierarchy=hierarchy
                )
                if _times(other).cpu_ns is not None:
                    return other
    return None


def cpu_ns(cgroup: Cgroup) -> int | None:
    """CPU time of the cgroup and all below it, ns; None where the tree keeps no counter.

    v2 counts in steps of a microsecond (`cpu.stat`), v1 in ns (`cpuacct.usage`).
    Raises FileNotFoundError when the cgroup is gone.
    """
    return times(cgroup).cpu_ns


def times(cgroup: Cgroup) -> Times:
    """CPU time with its user and system parts. Raises FileNotFoundError when it is gone."""
    found = _times(cgroup)
    if found.cpu_ns is None and not cgroup.exists():
        raise FileNotFoundError(errno.ENOENT, "the cgroup is gone", cgroup.folder)
    return found


def _times(cgroup: Cgroup) -> Times:
    if cgroup.version == 1:
        return Times(
            _number(f"{cgroup.folder}/cpuacct.usage"),
            _number(f"{cgroup.folder}/cpuacct.usage_user"),
            _number(f"{cgroup.folder}/cpuacct.usage_sys"),
        )
    text = _text(f"{cgroup.folder}/cpu.stat") or ""
    fields = dict(line.partition(" ")[::2] for line in text.splitlines())

    def nanoseconds(name: str) -> int | None:
        return int(fields[name]) * 1000 if name in fields else None

    return Times(nanoseconds("usage_usec"), nanoseconds("user_usec"), nanoseconds("system_usec"))


def _number(path: str) -> int | None:
    text = _text(path)
    return None if text is None else int(text)


def _text(path: str) -> str | None:
    # ENODEV: removed between open and read.
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode("ascii")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP, errno.ENOTDIR):
            return None
        raise


def processes(cgroup: Cgroup) -> set[int]:
    """PIDs (thread group leaders) in the cgroup and all below it; zombies are not listed."""
    return _members(cgroup, "cgroup.procs")


def threads(cgroup: Cgroup) -> set[int]:
    """Thread ids in the cgroup and all below it."""
    return _members(cgroup, "tasks" if cgroup.version == 1 else "cgroup.threads")


def _members(cgroup: Cgroup, file: str) -> set[int]:
    # A threaded v2 cgroup refuses cgroup.procs: its domain above lists the processes.
    # 0 stands for a process outside the reader's PID namespace.
    found: set[int] = set()
    for folder in subtree(cgroup.folder):
        found.update(map(int, (_text(f"{folder}/{file}") or "").split()))
    found.discard(0)
    return found


def own(hierarchy: Hierarchy, pid: int | str = "self") -> Cgroup | None:
    """Give the cgroup of a process in a hierarchy; None if this mount does not show it."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == ",".join(hierarchy.controllers):
                if path.startswith("/.."):
                    return None
                if hierarchy.root != "/":
                    if path != hierarchy.root and not path.startswith(f"{hierarchy.root}/"):
                        return None
                    path = path[len(hierarchy.root) :] or "/"
                return Cgroup(folder=hierarchy.folder(path), path=path, hierarchy=hierarchy)
    return None


def create(name: str, hierarchies: list[Hierarchy] | None = None) -> Cgroup:
    """Make a cgroup of its own for a command, below the caller's own one.

    In v2 where it is mounted and counts CPU time, else in v1: cpuacct, or without it any
    tree that tells processes apart. Below the caller's cgroup, so that its limits hold;
    at the top of the tree where that is refused. Raises NotPossibleError with the reason.
    """
    hierarchies = mounted() if hierarchies is None else hierarchies
    reason = "no cgroup hierarchy is mounted"
    fallback: Cgroup | None = None
    for hierarchy in hierarchies:
        if "cpuset" in hierarchy.controllers:
            continue  # takes no process before its CPUs and nodes are set
        try:
            cgroup = _make(name, hierarchy)
        except OSError as error:
            reason = f"{error.filename}: cannot be made: {error.strerror}"
            continue
        if _times(cgroup).cpu_ns is not None:
            if fallback is not None:
                remove(fallback)
            return cgroup
        if fallback is None:
            fallback = cgroup
        else:
            remove(cgroup)
    if fallback is None:
        raise NotPossibleError(f"{reason}; a cgroup of its own needs root (try sudo)")
    return fallback


def remove_abandoned(hierarchies: list[Hierarchy] | None = None) -> list[str]:
    """Remove what a `run` that was killed has left: its cgroup, once nothing is in it.

    Named after the PID of its `run`; one that lives still needs it.
    """
    gone = []
    for hierarchy in mounted() if hierarchies is None else hierarchies:
        for folder in subtree(hierarchy.mount):
            pid = os.path.basename(folder).removeprefix(OF_RUN)  # noqa: PTH119 (as above)
            if f"{OF_RUN}{pid}" != os.path.basename(folder) or not pid.isdecimal():  # noqa: PTH119
                continue
            if os.path.exists(f"/proc/{pid}"):  # noqa: PTH110
                continue
            left = Cgroup(folder=folder, path=folder, hierarchy=hierarchy)
            if not processes(left) and remove(left, attempts=1):
                gone.append(folder)
    return gone


def _make(name: str, hierarchy: Hierarchy) -> Cgroup:
    """Make a cgroup below the caller's own, or at the top of the tree. Raises OSError."""
    mine = own(hierarchy)
    path = f"{mine.path.rstrip('/')}/{name}" if mine is not None else f"/{name}"
    try:
        folder = hierarchy.folder(path)
        os.mkdir(folder, 0o755)
    except OSError:
        if path == f"/{name}":
            raise
        path = f"/{name}"
        folder = hierarchy.folder(path)
        os.mkdir(folder, 0o755)
    return Cgroup(folder=folder, path=path, hierarchy=hierarchy)


def enter(cgroup: Cgroup, pid: int = 0) -> None:
    """Move a process with all its threads into the cgroup; 0 is the caller. Raises OSError."""
    fd = os.open(f"{cgroup.folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(pid).encode())
    finally:
        os.close(fd)


def remove(cgroup: Cgroup, *, attempts: int = 20, pause_s: float = 0.01) -> bool:
    """Remove it and all below it; False if processes are still in it after all attempts.

    Nothing is killed. Dying processes leave a cgroup some time after they are waited for,
    hence the attempts.
    """
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause_s)
        busy = False
        for folder in reversed(list(subtree(cgroup.folder))):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise
                busy = True
        if not busy:
            return True
    return False


def populated(cgroup: Cgroup) -> bool:
    """Tell whether a process is in it or below; zombies count where the kernel knows them."""
    text = _text(f"{cgroup.folder}/cgroup.events")
    if text is not None:
        return "populated 1" in text
    return bool(processes(cgroup))


def find_slurm_job(
    job_id: int,
    *,
    sluid: str | None = None,
    node: str | None = None,
    hierarchies: list[Hierarchy] | None = None,
    slices: Iterable[str] = SLURM_SLICES,
    title: Callable[[int], bytes] | None = None,
) -> list[Cgroup]:
    """Find the folders of a Slurm job, the one best to account by first; [] if none is there.

    v2: `<slice>/[<node>_]slurmstepd.scope/{job_N|SLUID}`; v1, in each tree:
    `slurm[_<node>]/uid_*/job_N`. node: take that node's folders only, where several
    slurmd share the host. title: command line of a PID; a SLUID folder that nobody named
    is told by its `slurmstepd: [N.step]`.
    """
    hierarchies = mounted() if hierarchies is None else hierarchies
    names = {f"job_{job_id}"} | ({sluid} if sluid else set())
    found = []
    for hierarchy in hierarchies:
        for parent in slurm_parents(hierarchy, node=node, slices=slices):
            for name in _folders(parent):
                if name in names or (
                    sluid is None
                    and SLUID.fullmatch(name)
                    and _runs_job(f"{parent}/{name}", job_id, title or _title)
                ):
                    cgroup = at(f"{parent}/{name}", [hierarchy])
                    if cgroup is not None:
                        found.append(cgroup)
    return found


def slurm_parents(
    hierarchy: Hierarchy, *, node: str | None = None, slices: Iterable[str] = SLURM_SLICES
) -> list[str]:
    """List the folders in which Slurm makes folders of jobs, those there are now."""
    if hierarchy.version == 2:
        scopes = [
            f"{hierarchy.folder(slice_)}/{name}"
            for slice_ in slices
            for name in _folders(hierarchy.folder(slice_))
            if name == "slurmstepd.scope" or name.endswith("_slurmstepd.scope")
        ]
        return _of_node(scopes, f"{node}_slurmstepd.scope", node)
    tops = [
        hierarchy.folder(name)
        for name in _folders(hierarchy.mount)
        if name == "slurm" or name.startswith("slurm_")
    ]
    return [
        f"{top}/{name}"
        for top in _of_node(tops, f"slurm_{node}", node)
        for name in _folders(top)
        if name.startswith("uid_")
    ]


def slurm_watch_folders(
    hierarchies: Iterable[Hierarchy], slices: Iterable[str] = SLURM_SLICES
) -> list[str]:
    """List the folders in which something has to appear before a new job's folder can.

    Watch all of them, list them anew and search again whenever one of them changes.
    """
    folders: list[str] = []
    for hierarchy in hierarchies:
        if hierarchy.version == 1:
            folders.append(hierarchy.mount)
            folders += [
                hierarchy.folder(name)
                for name in _folders(hierarchy.mount)
                if name == "slurm" or name.startswith("slurm_")
            ]
        else:
            for slice_ in slices:
                folders += [f for f in subpaths(hierarchy, slice_) if os.path.isdir(f)]
        folders += slurm_parents(hierarchy, slices=slices)
    return list(dict.fromkeys(folders))


def subpaths(hierarchy: Hierarchy, path: str) -> list[str]:
    """List the folders from the mount's own down to the one at `path`."""
    parts = [part for part in path.split("/") if part]
    return [hierarchy.folder("/".join(parts[:n])) for n in range(len(parts) + 1)]


def ancestors(folder: str) -> list[str]:
    """List the folders above that are there, the nearest first, without "/"."""
    found = []
    while (folder := os.path.dirname(folder)) != "/":
        if os.path.isdir(folder):
            found.append(folder)
    return found


def _of_node(folders: list[str], name: str, node: str | None) -> list[str]:
    """Keep the folders named after the node; if none is, those named after no node."""
    if node is None:
        return folders
    mine = [folder for folder in folders if folder.rpartition("/")[2] == name]
    plain = ("slurmstepd.scope", "slurm")
    return mine or [folder for folder in folders if folder.rpartition("/")[2] in plain]


def _runs_job(folder: str, job_id: int, title: Callable[[int], bytes]) -> bool:
    head = b"slurmstepd: [%d." % job_id
    for step in _folders(folder):
        text = _text(f"{folder}/{step}/slurm/cgroup.procs") or ""
        if any(title(int(pid)).startswith(head) for pid in text.split()):
            return True
    return False


def _title(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(4096)
    except OSError:
        return b""  # it has died: it names no job


def _folders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


_libc = ctypes.CDLL(None, use_errno=True)

_IN_MODIFY = 0x2
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_IGNORED = 0x8000
_IN_Q_OVERFLOW = 0x4000
_IN_CLOEXEC = os.O_CLOEXEC
_IN_NONBLOCK = os.O_NONBLOCK


class Watch:
    """Sleeps until cgroups appear, go or become empty, without waking in between.

    cgroupfs tells inotify(7) of mkdir and rmdir in a watched folder, on v1 and v2, and v2
    of a change of `cgroup.events` (populated or not). It does not tell of the removal of
    the watched folder itself (6.18: no IN_DELETE_SELF), so the folder above is watched
    too. On v1 nothing tells that the last process left: there the caller looks when it
    wakes for another reason. Put `fileno()` into a poll set, and call `drain()` when it
    is readable.
    """

    def __init__(self) -> None:
        self._fd = _libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1", "inotify")
        self._watched: dict[int, str] = {}

    def fileno(self) -> int:
        """Descriptor that is readable when something changed."""
        return int(self._fd)

    def add(self, folder: str) -> bool:
        """Watch for cgroups made in or removed from a folder.

        False if the folder is not there (any more). Watching it again changes nothing.
        """
        return self._add(folder, _IN_CREATE | _IN_DELETE)

    def add_populated(self, cgroup: Cgroup) -> bool:
        """Watch for the moment it becomes empty or is entered; False where nobody tells."""
        return cgroup.version == 2 and self._add(f"{cgroup.folder}/cgroup.events", _IN_MODIFY)

    def _add(self, path: str, mask: int) -> bool:
        watch = _libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
        if watch < 0:
            error = ctypes.get_errno()
            if error in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise OSError(error, f"cannot be watched: {os.strerror(error)}", path)
        self._watched[watch] = path
        return True

    def drain(self) -> set[str]:
        """Take what has happened: the watched paths that changed; never blocks."""
        changed: set[str] = set()
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return changed
            at_ = 0
            while at_ < len(data):
                watch, mask, _, length = struct.unpack_from("iIII", data, at_)
                at_ += 16 + length
                if mask & _IN_Q_OVERFLOW:
                    changed.update(self._watched.values())
                elif mask & _IN_IGNORED:
                    changed.add(self._watched.pop(watch, ""))
                else:
                    changed.add(self._watched.get(watch, ""))
            changed.discard("")

    def wait(self, timeout_s: float | None = None) -> set[str]:
        """Sleep until something changed, then `drain()`; empty after the time-out."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.poll(None if timeout_s is None else timeout_s * 1000)
        return self.drain()

    def clear(self) -> None:
        """Watch nothing any more, under the same descriptor."""
        for watch in self._watched:
            _libc.inotify_rm_watch(self._fd, watch)
        self._watched.clear()

    def close(self) -> None:
        """Let go of all watches."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_until_made(folder: str, timeout_s: float | None = None) -> bool:
    """Sleep until the cgroup folder is there; False after the time-out."""
    with Watch() as watch:
        return _wait(watch, folder, timeout_s, made=True)


def wait_until_removed(folder: str, timeout_s: float | None = None) -> bool:
    """Sleep until the cgroup folder is gone; False after the time-out."""
    with Watch() as watch:
        return _wait(watch, folder, timeout_s, made=False)


def _wait(watch: Watch, folder: str, timeout_s: float | None, *, made: bool) -> bool:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        # Watch first, look then: what happens in between is seen by one of the two. All
        # folders above are watched, for the nearest may itself go and come back.
        above = ancestors(folder)
        for parent in above:
            watch.add(parent)
        if os.path.isdir(folder) is made:
            return True
        if ancestors(folder) != above:
            continue
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return False
        watch.wait(left)
