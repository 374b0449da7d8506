"""What `probe` tries: the parts that no kernel of today shows by itself."""

from __future__ import annotations

import ctypes
import errno
import os
import resource

import pytest

from sams_ebpf import probe


class Kernel:
    """bpf(2) as before 5.11: refused while locked memory is limited."""

    def __init__(self, patch: pytest.MonkeyPatch, *, capable: bool) -> None:
        self.limit = (8 << 20, 8 << 20)
        self._capable = capable
        patch.setattr(resource, "getrlimit", lambda _: self.limit)
        patch.setattr(resource, "setrlimit", self._set_limit)
        patch.setattr(probe, "_libc", self)

    def syscall(self, *_: object) -> int:
        """Make a map, or refuse."""
        if self.limit[0] != resource.RLIM_INFINITY:
            ctypes.set_errno(errno.EPERM)
            return -1
        return os.open("/dev/null", os.O_RDONLY)

    def _set_limit(self, _: int, limit: tuple[int, int]) -> None:
        if not self._capable:
            raise ValueError("not allowed to raise maximum limit")
        self.limit = limit


def test_a_limit_of_locked_memory_is_lifted_where_it_matters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels before 5.11 charge it with every map of the user, whoever made it."""
    Kernel(monkeypatch, capable=True)
    assert probe.try_bpf().ok is True


def test_a_limit_that_cannot_be_lifted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CAP_SYS_RESOURCE."""
    kernel = Kernel(monkeypatch, capable=False)
    attempt = probe.try_bpf()
    assert attempt.ok is False
    assert "RLIMIT_MEMLOCK" in attempt.detail
    assert kernel.limit == (8 << 20, 8 << 20)
