"""Accounting by samples, pure: what was seen of processes goes in, counters come out.

One rule stands above all: what is attributed is CPU that a process was seen to have
used, as the executable it was seen to be, while it was in the job; and never more than
the kernel charged to the job's cgroups. The rest has a cause, not an executable.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from sams_ebpf import wire

# Causes in `unattributed_by`.
BEFORE_ATTACH: Final = "before_attach"
DIED: Final = "died_between_samples"
EXEC_AMBIGUOUS: Final = "exec_ambiguous"
MOVED: Final = "moved"
UNIDENTIFIED: Final = "unidentified_executable"

# A cgroup's birth is told by a file time, which may be this much off from the boot clock.
_BIRTH_TOLERANCE_NS: Final = 1_000_000_000
_TICK_NS: Final = 10_000_000
_TICK_US: Final = _TICK_NS // 1000
# The kernel tells when the dead were born in whole seconds of the wall clock.
_DEATH_ERROR_NS: Final = 2_000_000_000

Key = tuple[bytes, int]
UNKNOWN: Final[Key] = (b"", wire.UNKNOWN)
OVERFLOW: Final[Key] = (b"", wire.OVERFLOW)


class Executable(NamedTuple):
    """What a process executes.

    link: as the kernel shows it now. file: device and inode, (0, 0) when not known.
    key: path as it was at exec, and flags of the wire format.
    """

    link: bytes
    file: tuple[int, int]
    key: Key


class Seen(NamedTuple):
    """One process at one sample.

    start_ns: since boot, rounded down to a tick of 10 ms. clock_ns: its CPU clock; user,
    system: the kernel's tick-sampled split of it, in ticks. executable: None when it
    is dead. where: `inside` the job, or `outside` when it has left it. place: which of
    the job's cgroups. peak_bytes: peak memory of the process so far. comm: the kernel's
    name of it, which every exec sets.
    """

    pid: int
    start_ns: int
    parent: int
    clock_ns: int
    user: int
    system: int
    comm: bytes
    executable: Executable | None
    where: Literal["inside", "outside"] = "inside"
    peak_bytes: int | None = None
    place: int = 0


class Death(NamedTuple):
    """A process that died since the last sample, as the kernel told it (`taskstats`).

    start_ns: since boot, right to 2 s. cpu_ns: of all its threads. user_us, system_us: the
    kernel's tick-sampled split, 0 where it gives none. key: of its executable, None when
    no path could be found for its file.
    """

    pid: int
    start_ns: int
    parent: int
    cpu_ns: int
    user_us: int
    system_us: int
    file: tuple[int, int]
    key: Key | None
    peak_bytes: int | None = None


class Image(msgspec.Struct):
    """One process since the last exec of it that a sample noticed.

    seen_ns: its clock up to which it is accounted for. base_*: clock and split where this
    image began; user_ns: what of it is counted as user time. outside: it left the job.
    """

    pid: int
    start_ns: int
    link: bytes
    file: tuple[int, int]
    path: bytes
    flags: int
    comm: bytes
    seen_ns: int = 0
    base_ns: int = 0
    base_user: int = 0
    base_system: int = 0
    user_ns: int = 0
    outside: bool = False


class Total(msgspec.Struct):
    """Counters of one executable, cumulative since the epoch began.

    unseen_*: of the above what the kernel told of the dead that no sample saw, with the
    sums of its tick-sampled split: meaningless for one short process, right for many.
    """

    path: bytes
    flags: int
    cpu_ns: int = 0
    user_ns: int = 0
    max_rss_bytes: int | None = None
    unseen_ns: int = 0
    unseen_user_ns: int = 0
    unseen_user_us: int = 0
    unseen_system_us: int = 0


class Place(msgspec.Struct):
    """One cgroup of the job, which may be removed and made again.

    id: the kernel's id of it, None while it is not there. birth_ns: when it was made,
    sampled_ns: when it was last sampled, ns since boot, 0 for never. last_ns: its counter
    at the last sample, done_ns: the counters of those that stood here before, base_ns:
    where the epoch begins; counted: the kernel keeps a counter.
    """

    folder: str
    id: int | None = None
    birth_ns: int = 0
    sampled_ns: int = 0
    last_ns: int = 0
    done_ns: int = 0
    base_ns: int = 0
    counted: bool = True

    @property
    def counter_ns(self) -> int:
        """What the kernel charged here since the epoch began."""
        return self.done_ns + self.last_ns - self.base_ns


class Account(msgspec.Struct):
    """The counters of one job, and all that is needed to go on after a restart."""

    images: dict[int, Image] = {}
    totals: list[Total] = []
    places: list[Place] = []
    samples: int = 0
    attributed_ns: int = 0
    outside_ns: int = 0
    exec_ambiguous_ns: int = 0
    moved_ns: int = 0
    unidentified_ns: int = 0
    before_ns: int = 0
    counter_before_ns: int = 0
    lost: dict[str, int] = {}

    @property
    def counter_ns(self) -> int | None:
        """What the kernel charged to all places; None if one of them keeps no counter."""
        if not self.places or not all(place.counted for place in self.places):
            return None
        return sum(place.counter_ns for place in self.places)

    @property
    def explained_ns(self) -> int:
        """What of the kernel's counter is accounted for, by executable or by cause."""
        known = self.exec_ambiguous_ns + self.moved_ns + self.unidentified_ns
        return self.attributed_ns + known

    @property
    def unattributed_by(self) -> dict[str, int]:
        """Give the whole difference to the kernel's counter, by cause."""
        counter = self.counter_ns
        if counter is None:
            return {}
        rest = counter - self.attributed_ns
        causes = {}
        for cause, value in (
            (EXEC_AMBIGUOUS, self.exec_ambiguous_ns),
            (MOVED, self.moved_ns),
            (UNIDENTIFIED, self.unidentified_ns),
            (BEFORE_ATTACH, self.before_ns),
        ):
            causes[cause] = min(value, rest)
            rest -= causes[cause]
        causes[DIED] = rest
        return {cause: value for cause, value in causes.items() if value}


class _Charge(NamedTuple):
    """CPU of an image up to its clock now; replaced: what the process is from now on."""

    image: Image
    seen: Seen
    replaced: Image | None = None

    @property
    def delta_ns(self) -> int:
        return max(0, self.seen.clock_ns - self.image.seen_ns)


class _Budget:
    """What may still be charged in one sample.

    Two bounds: the counter as a whole for what surely belongs to the job (clocks are read
    one after the other and the counter last, so that a part of one interval's counter can
    be the next one's clock), and the counter's growth since the last sample for what
    perhaps does.
    """

    def __init__(self, account: Account) -> None:
        counter = account.counter_ns
        self._left = self._interval = wire.INT64_MAX
        if counter is not None:
            self._left = counter - account.explained_ns
            self._interval = counter - account.counter_before_ns

    def sure(self, wanted_ns: int) -> int:
        """Give what of CPU that surely is the job's may be charged."""
        used = min(wanted_ns, self._left)
        self._left -= used
        self._interval -= wanted_ns
        return used

    def perhaps(self, wanted_ns: int) -> int:
        """Give what of CPU that perhaps is the job's may be charged."""
        used = max(0, min(wanted_ns, self._left, self._interval))
        self._left -= used
        self._interval -= used
        return used


class Sampler:
    """Takes samples into an account. quota: executables that get a row of their own."""

    def __init__(self, account: Account, quota: int) -> None:
        self.account = account
        self._quota = quota
        self._totals = {(total.path, total.flags): total for total in account.totals}

    def take(
        self,
        began_ns: int,
        seen: Sequence[Seen],
        *,
        members: Collection[int] = (),
        gone: Iterable[int] = (),
        deaths: Sequence[Death] = (),
    ) -> None:
        """Account for one sample; the counters of the places were read after the clocks.

        began_ns: when the members were listed, ns since boot. seen: processes that ran
        since the last sample. members: PIDs of the job. gone: PIDs that are no more.
        deaths: all of the host since the last sample, fetched after the clocks were read.
        """
        account = self.account
        budget = _Budget(account)
        # Whose PID was another's at the last sample: a death of that PID is nobody's.
        reused = {
            one.pid
            for one in seen
            if one.pid in account.images and account.images[one.pid].start_ns != one.start_ns
        }
        certain: list[_Charge] = []
        doubtful: list[_Charge] = []
        ambiguous: list[_Charge] = []
        moved: list[_Charge] = []
        for one in seen:
            image = account.images.get(one.pid)
            if image is None or image.start_ns != one.start_ns:
                self._meet(one, members, certain, doubtful)
            elif image.outside:
                self._meet_outside(image, one)
            elif one.where == "outside":
                moved.append(_Charge(image, one))
            elif one.executable is None:
                (certain if one.comm == image.comm else ambiguous).append(_Charge(image, one))
            elif _is_still(image, one.executable):
                image.comm = one.comm
                certain.append(_Charge(image, one))
            else:
                ambiguous.append(_Charge(image, one, _image(one)))
        self._charge(budget, certain, ambiguous, moved, doubtful)
        self._bury(budget, [d for d in deaths if d.pid not in reused], members)
        for pid in gone:
            account.images.pop(pid, None)
        if account.samples == 0:
            account.before_ns = max(0, (account.counter_ns or 0) - account.explained_ns)
        account.counter_before_ns = account.counter_ns or 0
        account.samples += 1
        for place in account.places:
            if place.id is not None:
                place.sampled_ns = began_ns

    def _meet(
        self,
        one: Seen,
        members: Collection[int],
        certain: list[_Charge],
        doubtful: list[_Charge],
    ) -> None:
        """Take up a process that was not known."""
        account = self.account
        account.images.pop(one.pid, None)
        if one.where != "inside" or one.executable is None:
            return
        image = _image(one)
        if image.flags & wire.UNKNOWN:
            self._lose("executable_unreadable")
        account.images[one.pid] = image
        place = account.places[one.place]
        started_by = one.start_ns + _TICK_NS
        if started_by <= max(place.sampled_ns, place.birth_ns - _BIRTH_TOLERANCE_NS):
            # It was there before the cgroup, or at the last sample outside it: it was
            # moved in, and what it used until now was used elsewhere, or nobody knows.
            _begin(image, one)
        elif one.parent in members or one.parent in account.images:
            certain.append(_Charge(image, one))
        else:
            doubtful.append(_Charge(image, one))

    def _meet_outside(self, image: Image, one: Seen) -> None:
        if one.where == "inside":
            if one.executable is not None:
                self.account.images[one.pid] = image = _image(one)
            _begin(image, one)
            return
        delta = max(0, one.clock_ns - image.seen_ns)
        if one.executable is None or _is_still(image, one.executable):
            self._add(image, one, delta)
        else:
            self.account.images[one.pid] = image = _image(one)
            image.outside = True
            _begin(image, one)

    def _charge(
        self,
        budget: _Budget,
        certain: list[_Charge],
        ambiguous: list[_Charge],
        moved: list[_Charge],
        doubtful: list[_Charge],
    ) -> None:
        account = self.account
        for charge in certain:
            self._add(charge.image, charge.seen, budget.sure(charge.delta_ns))
        for charge in ambiguous:
            account.exec_ambiguous_ns += budget.sure(charge.delta_ns)
            if charge.replaced is not None:
                _begin(charge.replaced, charge.seen)
                account.images[charge.image.pid] = charge.replaced
                self._note_peak(self._total_of(charge.replaced), charge.seen.peak_bytes)
        # Nobody knows which of them brought CPU in from elsewhere: what is too much is
        # taken from all alike.
        claimed = sum(charge.delta_ns for charge in doubtful)
        granted = budget.perhaps(claimed)
        for charge in doubtful:
            used = charge.delta_ns * granted // claimed if claimed else 0
            self._add(charge.image, charge.seen, used)
            charge.image.seen_ns = charge.seen.clock_ns
        for charge in moved:
            account.moved_ns += budget.perhaps(charge.delta_ns)
            charge.image.outside = True
            _begin(charge.image, charge.seen)

    def _bury(self, budget: _Budget, deaths: Sequence[Death], members: Collection[int]) -> None:
        """Charge what the job's dead used after the last sample that saw them, if one did."""
        account = self.account
        ours = _of_job(deaths, account.images, members)
        buried: set[int] = set()
        for death in deaths:
            image = account.images.get(death.pid)
            known = image is not None and abs(image.start_ns - death.start_ns) <= _DEATH_ERROR_NS
            if image is None or not known or death.pid in buried:
                if death.pid in ours:
                    self._bury_unseen(budget, death)
                continue
            buried.add(death.pid)
            delta = max(0, death.cpu_ns - image.seen_ns)
            last = _last_words(death)
            if image.outside:
                if image.file == death.file:
                    self._add(image, last, delta)
            elif image.file == death.file:
                self._add(image, last, budget.sure(delta))
            else:
                used = budget.sure(delta)
                account.exec_ambiguous_ns += used
                image.seen_ns += used

    def _bury_unseen(self, budget: _Budget, death: Death) -> None:
        used = budget.perhaps(death.cpu_ns)
        if death.key is None:
            self.account.unidentified_ns += used
            return
        total = self._total(*death.key)
        total.unseen_user_us += death.user_us
        total.unseen_system_us += death.system_us
        total.unseen_ns += used
        said = total.unseen_user_us + total.unseen_system_us
        target = total.unseen_ns * total.unseen_user_us // said if said else total.unseen_ns
        user_ns = min(max(target - total.unseen_user_ns, 0), used)
        total.unseen_user_ns += user_ns
        total.cpu_ns += used
        total.user_ns += user_ns
        self.account.attributed_ns += used
        self._note_peak(total, death.peak_bytes)

    def _add(self, image: Image, seen: Seen, used_ns: int) -> None:
        image.seen_ns += used_ns
        user_ns = _user(image, seen, used_ns)
        image.user_ns += user_ns
        total = self._total_of(image)
        total.cpu_ns += used_ns
        total.user_ns += user_ns
        if image.outside:
            self.account.outside_ns += used_ns
        else:
            self.account.attributed_ns += used_ns
        self._note_peak(total, seen.peak_bytes)

    def _note_peak(self, total: Total, peak_bytes: int | None) -> None:
        if peak_bytes is not None:
            total.max_rss_bytes = max(total.max_rss_bytes or 0, peak_bytes)

    def _total_of(self, image: Image) -> Total:
        return self._total(image.path, image.flags | (wire.OUTSIDE if image.outside else 0))

    def _total(self, path: bytes, flags: int) -> Total:
        key = path, flags
        total = self._totals.get(key)
        if total is None and len(self._totals) >= self._quota:
            self._lose("executables_over_quota")
            key = OVERFLOW[0], OVERFLOW[1] | flags & wire.OUTSIDE
            total = self._totals.get(key)
        if total is None:
            total = Total(*key)
            self._totals[key] = total
            self.account.totals.append(total)
        return total

    def _lose(self, what: str) -> None:
        self.account.lost[what] = self.account.lost.get(what, 0) + 1


def _image(one: Seen) -> Image:
    link, file, (path, flags) = one.executable or Executable(b"", (0, 0), UNKNOWN)
    return Image(one.pid, one.start_ns, link, file, path, flags, one.comm)


def _last_words(death: Death) -> Seen:
    return Seen(
        pid=death.pid,
        start_ns=death.start_ns,
        parent=death.parent,
        clock_ns=death.cpu_ns,
        user=death.user_us // _TICK_US,
        system=death.system_us // _TICK_US,
        comm=b"",
        executable=None,
        peak_bytes=death.peak_bytes,
    )


def _of_job(
    deaths: Sequence[Death], images: dict[int, Image], members: Collection[int]
) -> set[int]:
    """Tell which of the dead were the job's: those whose forebears were.

    A child is born in its parent's cgroup. A parent is known by a sample, or has died
    itself since the last one. Orphans cannot be told, and are left out.
    """
    parents = {death.pid: death.parent for death in deaths}
    known = {pid for pid, image in images.items() if not image.outside} | set(members)
    ours: set[int] = set()
    for death in deaths:
        line = [death.pid]
        parent = death.parent
        while parent not in known and parent not in ours and parent in parents:
            if parent in line:
                break
            line.append(parent)
            parent = parents[parent]
        if parent in known or parent in ours:
            ours.update(line)
    return ours


def _begin(image: Image, one: Seen) -> None:
    """Let the image begin here: nothing of its clock until now is counted for it."""
    image.seen_ns = image.base_ns = one.clock_ns
    image.base_user, image.base_system = one.user, one.system
    image.user_ns = 0
    image.comm = one.comm


def _is_still(image: Image, now: Executable) -> bool:
    """Tell whether a process runs the image it ran; a renamed or deleted file is the same.

    The inode of a file that runs cannot be reused, so another one is another file.
    """
    if now.link == image.link:
        return True
    if now.file == image.file != (0, 0):
        image.link = now.link
        return True
    return False


def _user(image: Image, seen: Seen, used_ns: int) -> int:
    """Give the user part of CPU just counted: the kernel's ratio, scaled to exact runtime.

    As the kernel's cputime_adjust() does, and as monotonic: neither part ever shrinks.
    """
    user, system = seen.user - image.base_user, seen.system - image.base_system
    if user <= 0 and system <= 0:
        user, system = seen.user, seen.system
    runtime = image.seen_ns - image.base_ns
    if user + system <= 0:
        # Nothing said: as it was until now.
        user, system = image.user_ns, runtime - used_ns - image.user_ns
    target = runtime * user // (user + system) if user + system > 0 else runtime
    return min(max(target - image.user_ns, 0), used_ns)
