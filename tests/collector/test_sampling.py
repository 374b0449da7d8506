from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sams_ebpf import sampling, wire
from sams_ebpf.sampling import Account, Death, Executable, Place, Sampler, Seen

SECOND = 1_000_000_000
A = Executable(b"/bin/a", (1, 10), (b"/bin/a", 0))
B = Executable(b"/bin/b", (1, 11), (b"/bin/b", 0))


class Bench:
    """One job with one counted cgroup, made at 100 s since boot."""

    def __init__(self, quota: int = 100) -> None:
        place = Place("/cg", id=1, birth_ns=100 * SECOND)
        self.account = Account(places=[place])
        self.sampler = Sampler(self.account, quota)
        self.now_ns = 100 * SECOND

    def sample(self, counter_ns: int | None, *seen: Seen, **options: Any) -> None:
        self.now_ns += SECOND
        place = self.account.places[0]
        place.counted = counter_ns is not None
        place.last_ns = counter_ns or 0
        self.sampler.take(self.now_ns, seen, **options)

    def restart(self) -> None:
        """Keep only what is written down, as a killed collector does."""
        self.account = msgspec.json.decode(msgspec.json.encode(self.account), type=Account)
        self.sampler = Sampler(self.account, 100)

    def cpu(self, path: bytes, flags: int = 0) -> int:
        return sum(t.cpu_ns for t in self.account.totals if (t.path, t.flags) == (path, flags))

    def seen(
        self, pid: int, clock_ns: int, executable: Executable | None = A, **other: Any
    ) -> Seen:
        fields: dict[str, Any] = {
            "start_ns": self.now_ns,
            "parent": 1,
            "user": clock_ns // 10_000_000,
            "system": 0,
            "comm": b"a",
        }
        return Seen(pid=pid, clock_ns=clock_ns, executable=executable, **(fields | other))


def test_steady_process_loses_only_its_last_interval() -> None:
    bench = Bench()
    start = bench.now_ns
    for second in range(1, 10):
        bench.sample(second * SECOND, bench.seen(5, second * SECOND, start_ns=start))
    bench.sample(9 * SECOND + SECOND // 2, gone=[5])
    assert bench.cpu(b"/bin/a") == 9 * SECOND
    assert bench.account.unattributed_by == {sampling.DIED: SECOND // 2}


def test_what_the_counter_does_not_show_yet_is_counted_later() -> None:
    """v2 counts whole µs, a process's clock ns."""
    bench = Bench()
    start = bench.now_ns
    bench.sample(1000, bench.seen(5, 1999, start_ns=start))
    bench.sample(3000, bench.seen(5, 2999, start_ns=start, parent=4), members=[4, 5])
    assert bench.cpu(b"/bin/a") == 1000 + 1000
    bench = Bench()
    bench.sample(1000, bench.seen(5, 1999, start_ns=start, parent=4), members=[4, 5])
    bench.sample(3000, bench.seen(5, 2999, start_ns=start), members=[4, 5])
    assert bench.cpu(b"/bin/a") == 2999


def test_an_exec_is_noticed_and_its_interval_is_nobodys() -> None:
    bench = Bench()
    start = bench.now_ns
    bench.sample(100, bench.seen(5, 100, start_ns=start))
    bench.sample(5300, bench.seen(5, 300, B, start_ns=start))
    bench.sample(5700, bench.seen(5, 700, B, start_ns=start))
    assert (bench.cpu(b"/bin/a"), bench.cpu(b"/bin/b")) == (100, 400)
    assert bench.account.unattributed_by == {sampling.EXEC_AMBIGUOUS: 200, sampling.DIED: 5000}


def test_a_renamed_or_deleted_file_is_no_exec() -> None:
    bench = Bench()
    start = bench.now_ns
    renamed = Executable(b"/bin/c", A.file, (b"/bin/c", 0))
    deleted = Executable(b"/bin/c (deleted)", A.file, (b"/bin/c", wire.DELETED))
    bench.sample(100, bench.seen(5, 100, start_ns=start))
    bench.sample(200, bench.seen(5, 200, renamed, start_ns=start))
    bench.sample(300, bench.seen(5, 300, deleted, start_ns=start))
    assert bench.cpu(b"/bin/a") == 300


def test_a_reused_pid_is_another_process() -> None:
    bench = Bench()
    bench.sample(1000, bench.seen(5, 1000))
    bench.sample(1500, bench.seen(5, 400, B), members=[5])
    assert (bench.cpu(b"/bin/a"), bench.cpu(b"/bin/b")) == (1000, 400)
    assert bench.account.unattributed_by == {sampling.DIED: 100}


def test_zombie_counts_for_the_image_it_had_unless_it_executed_another() -> None:
    bench = Bench()
    start = bench.now_ns
    bench.sample(200, bench.seen(5, 100, start_ns=start), bench.seen(6, 100, start_ns=start))
    bench.sample(
        600,
        bench.seen(5, 300, None, start_ns=start),
        bench.seen(6, 300, None, start_ns=start, comm=b"other"),
    )
    assert bench.cpu(b"/bin/a") == 400
    assert bench.account.unattributed_by == {sampling.EXEC_AMBIGUOUS: 200}


def test_who_was_there_before_the_cgroup_was_moved_in() -> None:
    bench = Bench()
    old = bench.now_ns - 50 * SECOND
    bench.sample(10, bench.seen(5, 7 * SECOND, start_ns=old))
    bench.sample(SECOND + 10, bench.seen(5, 8 * SECOND, start_ns=old))
    assert bench.cpu(b"/bin/a") == SECOND


def test_who_was_elsewhere_at_the_last_sample_was_moved_in() -> None:
    bench = Bench()
    start = bench.now_ns
    bench.sample(0)
    bench.sample(500, bench.seen(5, 2000, start_ns=start))
    assert bench.cpu(b"/bin/a") == 0
    bench.sample(800, bench.seen(5, 2300, start_ns=start))
    assert bench.cpu(b"/bin/a") == 300


def test_a_stranger_gets_only_what_the_counter_leaves() -> None:
    bench = Bench()
    start = bench.now_ns
    bench.sample(0)
    start = bench.now_ns + SECOND // 2
    mine = bench.seen(5, 400, start_ns=start, parent=4)
    stranger = bench.seen(6, 9000, B, start_ns=start, parent=1)
    bench.sample(1000, stranger, mine, members=[4, 5, 6])
    assert (bench.cpu(b"/bin/a"), bench.cpu(b"/bin/b")) == (400, 600)
    bench.sample(1100, bench.seen(6, 9100, B, start_ns=start), members=[4, 5, 6])
    assert bench.cpu(b"/bin/b") == 700


def test_who_left_is_counted_outside_and_who_comes_back_begins_anew() -> None:
    bench = Bench()
    start = bench.now_ns
    bench.sample(1000, bench.seen(5, 1000, start_ns=start))
    bench.sample(1200, bench.seen(5, 2000, start_ns=start, where="outside"))
    bench.sample(1200, bench.seen(5, 2500, start_ns=start, where="outside"))
    bench.sample(1300, bench.seen(5, 2900, start_ns=start))
    bench.sample(1400, bench.seen(5, 3000, start_ns=start))
    assert bench.cpu(b"/bin/a") == 1100
    assert bench.cpu(b"/bin/a", wire.OUTSIDE) == 500
    assert bench.account.outside_ns == 500
    assert bench.account.attributed_ns == 1100
    assert bench.account.unattributed_by == {sampling.MOVED: 200, sampling.DIED: 100}


def test_before_attach_is_a_cause_of_its_own() -> None:
    bench = Bench()
    bench.sample(5000, bench.seen(5, 1000, start_ns=bench.now_ns))
    bench.sample(6000, gone=[5])
    assert bench.account.unattributed_by == {sampling.BEFORE_ATTACH: 4000, sampling.DIED: 1000}


def test_without_a_counter_there_is_no_difference() -> None:
    bench = Bench()
    bench.sample(None, bench.seen(5, 1000, start_ns=bench.now_ns))
    assert bench.account.counter_ns is None
    assert bench.account.unattributed_by == {}
    assert bench.cpu(b"/bin/a") == 1000


def test_split_follows_the_kernels_ratio_and_never_shrinks() -> None:
    bench = Bench()
    start = bench.now_ns
    for clock, user, system, expected in ((100, 0, 0, 100), (400, 1, 3, 100), (800, 2, 6, 200)):
        seen = bench.seen(5, clock, start_ns=start, user=user, system=system)
        bench.sample(clock, seen)
        (total,) = bench.account.totals
        assert (total.cpu_ns, total.user_ns) == (clock, expected)


def test_beyond_the_quota_there_is_one_row() -> None:
    bench = Bench(quota=1)
    start = bench.now_ns
    seen = [bench.seen(pid, 10, exe, start_ns=start) for pid, exe in ((5, A), (6, B), (7, B))]
    bench.sample(30, *seen, members=[5, 6, 7])
    assert bench.cpu(b"/bin/a") == 10
    assert bench.cpu(b"", wire.OVERFLOW) == 20
    assert bench.account.lost["executables_over_quota"] > 0


def test_peak_memory_is_the_highest_seen() -> None:
    bench = Bench()
    start = bench.now_ns
    for clock, peak in ((100, 5000), (200, 9000), (300, None), (400, 7000)):
        bench.sample(clock, bench.seen(5, clock, start_ns=start, peak_bytes=peak))
    assert bench.account.totals[0].max_rss_bytes == 9000


def death(bench: Bench, pid: int, cpu_ns: int, exe: Executable = A, **other: Any) -> Death:
    fields: dict[str, Any] = {
        "start_ns": bench.now_ns + 1_500_000_000,
        "parent": 1,
        "user_us": 0,
        "system_us": 0,
        "key": exe.key,
    }
    return Death(pid=pid, cpu_ns=cpu_ns, file=exe.file, **(fields | other))


def test_the_dead_are_counted_if_their_forebears_were_the_jobs() -> None:
    bench = Bench()
    bench.sample(10, bench.seen(5, 10, start_ns=bench.now_ns))
    deaths = [
        death(bench, 30, 100, parent=20),
        death(bench, 20, 200, parent=5, exe=B),
        death(bench, 40, 400, parent=1),
        death(bench, 50, 800, parent=51),
        death(bench, 51, 800, parent=50),
        death(bench, 60, 1600, parent=20, key=None),
    ]
    bench.sample(5000, deaths=deaths, members=[5])
    assert (bench.cpu(b"/bin/a"), bench.cpu(b"/bin/b")) == (110, 200)
    assert bench.account.unattributed_by == {
        sampling.UNIDENTIFIED: 1600,
        sampling.DIED: 5000 - 310 - 1600,
    }


def test_the_dead_get_no_more_than_the_counter_grew() -> None:
    bench = Bench()
    start = bench.now_ns
    bench.sample(1000, bench.seen(5, 10, start_ns=start))
    dead = death(bench, 30, 900, B, parent=5)
    bench.sample(1300, bench.seen(5, 110, start_ns=start), deaths=[dead], members=[5])
    assert (bench.cpu(b"/bin/a"), bench.cpu(b"/bin/b")) == (110, 200)


def test_a_known_process_is_counted_to_its_death() -> None:
    bench = Bench()
    start = bench.now_ns
    bench.sample(3000, *[bench.seen(pid, 100, start_ns=start) for pid in (5, 6, 7)])
    deaths = [
        death(bench, 5, 350, start_ns=start),
        death(bench, 6, 350, B, start_ns=start),
        # Another process than the one of this PID that was seen.
        death(bench, 7, 350, start_ns=start - 10 * SECOND),
        # And one that took the PID of the first after it.
        death(bench, 5, 900, start_ns=start + SECOND),
    ]
    bench.sample(3000, deaths=deaths, gone=[5, 6, 7])
    bench.sample(3000, deaths=deaths)
    assert bench.cpu(b"/bin/a") == 3 * 100 + 250
    assert bench.account.exec_ambiguous_ns == 250


def test_a_death_of_a_reused_pid_is_nobodys() -> None:
    bench = Bench()
    start = bench.now_ns
    bench.sample(3000, bench.seen(5, 100, start_ns=start))
    again = bench.seen(5, 50, B, start_ns=bench.now_ns + 1)
    bench.sample(3999, again, deaths=[death(bench, 5, 900, start_ns=start)], members=[5])
    assert (bench.cpu(b"/bin/a"), bench.cpu(b"/bin/b")) == (100, 50)
    assert bench.account.exec_ambiguous_ns == 0


def test_split_of_the_unseen_dead_is_right_for_many() -> None:
    bench = Bench()
    bench.sample(0, bench.seen(5, 0, start_ns=bench.now_ns))
    said = [(4000, 0), (0, 0), (0, 4000), (0, 4000), (0, 0), (0, 4000)]
    deaths = [
        death(bench, 10 + n, 1000, parent=5, user_us=user, system_us=system)
        for n, (user, system) in enumerate(said)
    ]
    bench.sample(6000, deaths=deaths, members=[5])
    (total,) = bench.account.totals
    assert total.cpu_ns == 6000
    # A quarter by what was said at the end; two were user time before that was known.
    assert total.user_ns == 2000


class Job(RuleBasedStateMachine):
    """A made-up kernel: processes burn, fork, exec, move and die between samples."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.counter = 0
        self.pid = 10
        self.alive: dict[int, dict[str, Any]] = {}
        self.last: dict[tuple[bytes, int], tuple[int, int, int]] = {}
        self.deaths: list[Death] = []

    @initialize()
    def first(self) -> None:
        self.spawn(parent=1, inside=True)

    def spawn(self, parent: int, *, inside: bool, executable: Executable = A) -> None:
        self.pid += 1
        start = self.bench.now_ns + 20_000_000
        self.alive[self.pid] = {
            "start": start,
            "parent": parent,
            "clock": 0,
            "exe": executable,
            "inside": inside,
        }

    @rule(inside=st.booleans(), parent=st.integers(0, 30))
    def start(self, inside: bool, parent: int) -> None:
        parents = [pid for pid, one in self.alive.items() if one["inside"] == inside]
        self.spawn(parents[parent % len(parents)] if parents and parent else 1, inside=inside)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 30), ns=st.integers(0, 3 * SECOND))
    def burn(self, which: int, ns: int) -> None:
        one = self.pick(which)
        one["clock"] += ns
        if one["inside"]:
            self.counter += ns

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 30), executable=st.sampled_from([A, B]))
    def execute(self, which: int, executable: Executable) -> None:
        self.pick(which)["exe"] = executable

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 30))
    def move(self, which: int) -> None:
        one = self.pick(which)
        one["inside"] = not one["inside"]

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 30), told=st.booleans(), stale=st.integers(0, 4_000_000))
    def die(self, which: int, told: bool, stale: int) -> None:
        pid = list(self.alive)[which % len(self.alive)]
        one = self.alive.pop(pid)
        if told:
            clock = max(0, one["clock"] - stale)
            file, key = one["exe"].file, one["exe"].key if stale % 2 else None
            start = one["start"] - stale * 100
            self.deaths.append(Death(pid, start, one["parent"], clock, stale, 7, file, key))

    @rule()
    def restart(self) -> None:
        self.bench.restart()

    @rule(fraction=st.integers(0, 999))
    def sample(self, fraction: int) -> None:
        images = self.bench.account.images
        seen = [
            Seen(
                pid=pid,
                start_ns=one["start"],
                parent=one["parent"],
                clock_ns=one["clock"],
                user=one["clock"] // 10_000_000,
                system=one["clock"] // 30_000_000,
                comm=b"",
                executable=one["exe"],
                where="inside" if one["inside"] else "outside",
            )
            for pid, one in self.alive.items()
            if one["inside"] or pid in images
        ]
        gone = [pid for pid in images if pid not in self.alive]
        members = [pid for pid, one in self.alive.items() if one["inside"]]
        # A counter in µs, as v2 has it: up to 999 ns behind the clocks.
        counter = max(self.bench.account.places[0].last_ns, self.counter - fraction)
        deaths, self.deaths = self.deaths, []
        self.bench.sample(counter, *seen, members=members, gone=gone, deaths=deaths)

    def pick(self, which: int) -> dict[str, Any]:
        return self.alive[list(self.alive)[which % len(self.alive)]]

    @invariant()
    def never_more_than_the_kernel_charged(self) -> None:
        account = self.bench.account
        counter = account.counter_ns
        assert counter is not None
        inside = [t for t in account.totals if not t.flags & wire.OUTSIDE]
        assert sum(t.cpu_ns for t in inside) == account.attributed_ns <= counter
        causes = account.unattributed_by
        assert sum(causes.values()) == counter - account.attributed_ns
        assert all(value >= 0 for value in causes.values())

    @invariant()
    def nothing_shrinks(self) -> None:
        now = {
            (t.path, t.flags): (t.cpu_ns, t.user_ns, t.cpu_ns - t.user_ns)
            for t in self.bench.account.totals
        }
        for key, values in self.last.items():
            assert all(new >= old for new, old in zip(now[key], values, strict=True))
        self.last = now


TestJob = Job.TestCase
TestJob.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 10**9), st.booleans()), min_size=1, max_size=40
    )
)
@settings(deadline=None)
def test_who_only_forks_and_burns_is_counted_to_the_last_sample(
    steps: list[tuple[int, int, bool]],
) -> None:
    """Without moves and execs each executable has exactly what its processes showed."""
    bench = Bench()
    clocks = [0, 0, 0, 0]
    shown = [0, 0, 0, 0]
    start = bench.now_ns
    for process, ns, sample in steps:
        clocks[process] += ns
        if sample:
            shown = list(clocks)
            seen = [
                bench.seen(5 + i, c, (A, B)[i % 2], start_ns=start) for i, c in enumerate(clocks)
            ]
            bench.sample(sum(clocks), *seen, members=range(5, 9))
            bench.restart()
    assert bench.cpu(b"/bin/a") == shown[0] + shown[2]
    assert bench.cpu(b"/bin/b") == shown[1] + shown[3]
