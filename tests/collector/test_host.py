from __future__ import annotations

from typing import Literal

import pytest

from sams_ebpf import host
from sams_ebpf.errors import NotPossibleError
from sams_ebpf.host import Attempt, Facts, Tree

V2 = Tree(name="v2", version=2, mount="/sys/fs/cgroup", cpu_counter=True)
WORKING = {
    host.LOCKDOWN: True,
    host.BPF_SYSCALL: True,
    host.BTF: True,
    host.OBJECT: True,
    host.LIBBPF: True,
    host.LOAD_LIBBPF: True,
    host.BCC: True,
    host.HEADERS: True,
    host.LOAD_BCC: True,
    host.CGROUPS: True,
    host.CLOCKS: True,
    host.EXECUTABLES: True,
}


def facts(*, without: tuple[str, ...] = (), **other: object) -> Facts:
    attempts = tuple(
        Attempt(name, name not in without, f"why {name} failed" if name in without else "")
        for name in WORKING
    )
    fields: dict[str, object] = {"trees": (V2,)} | other
    return Facts(attempts=attempts, **fields)  # type: ignore[arg-type]


NO_BTF = (host.BTF, host.LOAD_LIBBPF)
NO_BPF = (host.BPF_SYSCALL, host.LOAD_LIBBPF, host.LOAD_BCC)


@pytest.mark.parametrize(
    ("without", "mode", "loader"),
    [
        ((), "bpf", "libbpf"),
        # What looks missing does not matter when the real thing was loaded.
        ((host.BTF, host.HEADERS), "bpf", "libbpf"),
        (NO_BTF, "bpf", "bcc"),
        ((*NO_BTF, host.HEADERS, host.LOAD_BCC), "proc", None),
        (NO_BPF, "proc", None),
        ((*NO_BPF, host.EXECUTABLES), "proc", None),
    ],
)
def test_auto_takes_the_first_way_that_works(
    without: tuple[str, ...], mode: str, loader: str | None
) -> None:
    choice = host.choose(facts(without=without))
    assert (choice.mode, choice.loader) == (mode, loader)


def test_lockdown_is_the_reason_before_all_else() -> None:
    choice = host.choose(facts(without=(host.LOCKDOWN, host.HEADERS, *NO_BPF)))
    why = f"{host.LOCKDOWN}: why {host.LOCKDOWN} failed"
    assert choice.reason == f"bpf (libbpf) and bpf (bcc) not used: {why}"


def test_the_reason_is_the_cause_and_not_what_came_of_it() -> None:
    choice = host.choose(facts(without=(*NO_BTF, host.BCC, host.LOAD_BCC)))
    assert choice.reason == (
        "bpf (libbpf) not used: kernel BTF: why kernel BTF failed; "
        "bpf (bcc) not used: BCC for Python: why BCC for Python failed"
    )


def test_one_reason_for_two_ways_is_said_once() -> None:
    without = facts(without=NO_BPF)
    why = f"{host.BPF_SYSCALL}: why {host.BPF_SYSCALL} failed"
    assert host.choose(without).reason == f"bpf (libbpf) and bpf (bcc) not used: {why}"
    with pytest.raises(NotPossibleError) as raised:
        host.choose(without, mode="bpf")
    assert str(raised.value).endswith(f"libbpf, bcc: {why}")


def test_a_failure_without_a_known_cause_speaks_for_itself() -> None:
    choice = host.choose(facts(without=(host.LOAD_LIBBPF,)))
    assert choice.reason == ("bpf (libbpf) not used: load with libbpf: why load with libbpf failed")


@pytest.mark.parametrize(
    ("mode", "loader", "without"),
    [
        ("bpf", "auto", NO_BPF),
        ("bpf", "libbpf", NO_BTF),
        ("bpf", "bcc", (host.BCC, host.LOAD_BCC)),
        ("proc", "auto", (host.CLOCKS,)),
        ("auto", "auto", (host.CGROUPS,)),
    ],
)
def test_what_was_asked_for_is_never_replaced(
    mode: Literal["auto", "bpf", "proc"],
    loader: Literal["auto", "libbpf", "bcc"],
    without: tuple[str, ...],
) -> None:
    with pytest.raises(NotPossibleError) as raised:
        host.choose(facts(without=without), mode=mode, loader=loader)
    message = str(raised.value)
    assert raised.value.exit_status == 3
    assert "\n" not in message
    assert f"why {without[0]} failed" in message


def test_a_loader_that_was_asked_for_still_lets_auto_fall_back() -> None:
    choice = host.choose(facts(without=NO_BTF), loader="libbpf")
    assert (choice.mode, [v.way.loader for v in choice.passed_over]) == ("proc", ["libbpf"])


def test_ways_after_the_chosen_one_are_not_tried() -> None:
    tried = []

    def verdicts() -> object:
        for way in host.WAYS:
            tried.append(way.name)
            yield host.judge(way, facts())

    host.first(verdicts())  # type: ignore[arg-type]
    assert tried == ["bpf (libbpf)"]


def test_warnings() -> None:
    assert host.warnings(facts()) == []
    uncounted = Tree(name="freezer", version=1, mount="/f", cpu_counter=False)
    found = host.warnings(
        facts(without=(host.EXECUTABLES,), trees=(uncounted,), proxy_execution=True)
    )
    assert len(found) == 3
    assert any("sched_proxy_exec=0" in text for text in found)
