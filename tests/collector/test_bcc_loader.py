"""What the BCC loader reads from headers, and how it says what went wrong."""

from __future__ import annotations

import pytest

from sams_ebpf import bcc_loader
from sams_ebpf.bpf import BpfError

OLD = {
    "include/linux/sched.h": "struct task_struct {\n\tvolatile long state;\n};",
    "include/linux/ns_common.h": "struct ns_common {\n\tunsigned int inum;\n};",
}
NEW = {
    "include/linux/sched.h": "struct task_struct {\n\tunsigned int __state;\n};",
    "include/linux/ns_common.h": "struct ns_common {\n\trefcount_t count;\n};",
}


@pytest.mark.parametrize(
    ("headers", "flags"),
    [
        (OLD, ["-DTASK_STATE=state", "-DMOUNT_NAMESPACE_COUNTED"]),
        (NEW, ["-DTASK_STATE=__state"]),
    ],
)
def test_names_of_fields_come_from_the_headers(
    headers: dict[str, str], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bcc_loader, "_header", headers.__getitem__)
    assert bcc_loader._features() == flags


def test_missing_headers_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bcc_loader.platform, "release", lambda: "0.0-none")
    with pytest.raises(BpfError, match=r"headers of kernel 0\.0-none: not installed"):
        bcc_loader._header("include/linux/sched.h")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("a.c:1: warning: x\na.c:2:1: error: no member named y\n1 error generated.", "no member"),
        ("Traceback\nException: Failed to load BPF program", "Failed to load"),
        ("", "without a word"),
    ],
)
def test_of_many_words_the_cause_is_kept(words: str, reason: str) -> None:
    assert reason in bcc_loader._reason(words)
