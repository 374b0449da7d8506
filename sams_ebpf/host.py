"""What this host can do, and which way of measuring follows from it. Pure.

The facts come as arguments (`probe` gathers them), so that every kind of host can be
decided on without having one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from sams_ebpf.errors import NotPossibleError

Mode = Literal["bpf", "proc"]
Loader = Literal["libbpf", "bcc"]


class Attempt(msgspec.Struct, frozen=True):
    """One feature that was tried: what came of it, in words for a person.

    ok: None when it could not be tried or changes nothing by itself.
    """

    name: str
    ok: bool | None
    detail: str


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """A mounted cgroup hierarchy, and whether it counts the CPU time of its cgroups."""

    name: str
    version: Literal[1, 2]
    mount: str
    cpu_counter: bool


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that was tried on a host, by the names below."""

    attempts: tuple[Attempt, ...]
    trees: tuple[Tree, ...] = ()
    proxy_execution: bool = False

    def of(self, name: str) -> Attempt:
        """Give one attempt; one that was not made has come to nothing."""
        for attempt in self.attempts:
            if attempt.name == name:
                return attempt
        return Attempt(name, None, "not tried")


# Names of attempts.
PRIVILEGES: Final = "privileges"
BPF_SYSCALL: Final = "bpf() answers"
LOCKDOWN: Final = "kernel lockdown"
BTF: Final = "kernel BTF"
BPFFS: Final = "bpffs"
OBJECT: Final = "BPF object"
LIBBPF: Final = "libbpf"
LOAD_LIBBPF: Final = "load with libbpf"
BCC: Final = "BCC for Python"
HEADERS: Final = "kernel headers"
LOAD_BCC: Final = "load with BCC"
CGROUPS: Final = "cgroups"
CLOCKS: Final = "process clocks"
EXECUTABLES: Final = "/proc/PID/exe"


class Way(msgspec.Struct, frozen=True):
    """One way of measuring.

    decides: the attempts that say whether it works. before: those that tell a person why,
    when one of the others came to nothing.
    """

    mode: Mode
    loader: Loader | None
    decides: tuple[str, ...]
    before: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How it is called in tables."""
        return f"{self.mode} ({self.loader})" if self.loader else self.mode


# Best first: the order in which `auto` tries.
WAYS: Final = (
    Way("bpf", "libbpf", (CGROUPS, LOAD_LIBBPF), (LOCKDOWN, BPF_SYSCALL, OBJECT, LIBBPF, BTF)),
    Way("bpf", "bcc", (CGROUPS, LOAD_BCC), (LOCKDOWN, BPF_SYSCALL, BCC, HEADERS)),
    Way("proc", None, (CGROUPS, CLOCKS)),
)


class Verdict(msgspec.Struct, frozen=True):
    """Whether a way works here, and in words why not."""

    way: Way
    possible: bool
    reason: str


class Choice(msgspec.Struct, frozen=True):
    """The way that is used, and the better ones that were not, with their reasons."""

    mode: Mode
    loader: Loader | None
    passed_over: tuple[Verdict, ...]

    @property
    def reason(self) -> str:
        """One line for the log; empty when the best way is used."""
        by_reason = _by_reason(self.passed_over)
        return "; ".join(
            f"{' and '.join(v.way.name for v in same)} not used: {reason}"
            for reason, same in by_reason.items()
        )


def judge(way: Way, facts: Facts) -> Verdict:
    """Tell whether a way works on a host with these facts."""
    failed = [facts.of(name) for name in way.decides if not facts.of(name).ok]
    if not failed:
        return Verdict(way, True, "")
    # What was missing before it says more than the failure that came of it.
    causes = [facts.of(name) for name in way.before if facts.of(name).ok is False]
    cause = (causes or failed)[0]
    return Verdict(way, False, f"{cause.name}: {cause.detail}")


def judge_all(facts: Facts) -> tuple[Verdict, ...]:
    """Judge every way, best first."""
    return tuple(judge(way, facts) for way in WAYS)


def choose(
    facts: Facts,
    *,
    mode: Literal["auto", "bpf", "proc"] = "auto",
    loader: Literal["auto", "libbpf", "bcc"] = "auto",
) -> Choice:
    """Choose the best way of those asked for. Raises NotPossibleError with the reasons.

    A mode or loader that was asked for is never replaced by another.
    """
    return first(judge(way, facts) for way in asked(mode, loader))


def asked(
    mode: Literal["auto", "bpf", "proc"], loader: Literal["auto", "libbpf", "bcc"]
) -> tuple[Way, ...]:
    """List the ways that fit what was asked for, best first."""
    return tuple(
        way
        for way in WAYS
        if mode in ("auto", way.mode) and (loader in ("auto", way.loader) or way.loader is None)
    )


def first(verdicts: Iterable[Verdict]) -> Choice:
    """Choose the first that is possible; those after it are not looked at.

    Raises NotPossibleError with all reasons in one line.
    """
    passed_over: list[Verdict] = []
    for verdict in verdicts:
        if verdict.possible:
            return Choice(verdict.way.mode, verdict.way.loader, tuple(passed_over))
        passed_over.append(verdict)
    modes = " or ".join(dict.fromkeys(v.way.mode for v in passed_over))
    reasons = "; ".join(
        f"{', '.join(v.way.loader or v.way.mode for v in same)}: {reason}"
        for reason, same in _by_reason(passed_over).items()
    )
    raise NotPossibleError(f"mode {modes} is not possible on this host: {reasons}")


def _by_reason(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.reason, []).append(verdict)
    return found


def warnings(facts: Facts) -> list[str]:
    """Tell what works here but with less than a reader would expect."""
    found = []
    if facts.proxy_execution:
        found.append(
            "proxy execution is built into this kernel: it charges one task's run to another's "
            "cgroup; boot with sched_proxy_exec=0 to have ledgers close"
        )
    if facts.of(EXECUTABLES).ok is False:
        found.append(f"mode proc: {facts.of(EXECUTABLES).detail}; their CPU is of `unknown`")
    if facts.trees and not any(tree.cpu_counter for tree in facts.trees):
        found.append(
            "no cgroup hierarchy counts CPU time: ledgers will say null; mount cgroup2 or cpuacct"
        )
    return found
