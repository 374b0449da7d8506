from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sams_ebpf import paths


@given(st.binary())
def test_every_path_is_shown_printable_and_read_back(path: bytes) -> None:
    shown = paths.show(path)
    assert shown.isprintable()
    assert paths.parse(shown) == path


def test_refuses_a_stray_backslash() -> None:
    with pytest.raises(ValueError, match="backslash"):
        paths.parse("a\\b")
