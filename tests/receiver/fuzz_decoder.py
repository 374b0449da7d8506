"""Coverage-guided fuzzing (Atheris, libFuzzer) of all that stands between a body and the store.

Any exception but a refusal ends it with the input that caused it. Started by a test.
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["sams_ebpf", "sams_receiver.archive"]):
    from sams_ebpf import wire
    from sams_receiver.archive import format as fmt


def one(data: bytes) -> None:
    """A batch, a frame's tag, compressed bytes, a segment."""
    try:
        header = wire.check(data)
    except wire.WireError as error:
        assert "\n" not in str(error)
    else:
        assert fmt.tag_of(fmt.Kind.COUNTERS, data) == fmt.batch_tag(header, data)
        # What is looked at before, and what a reader of the archive takes, agree with it.
        found = wire.outline(data)
        assert found.header.identity == header.identity
        assert found.records == len(wire.decode_rows(data))
        # Unknown keys are skipped over by a check and read here: they may be text in name only.
        with contextlib.suppress(wire.WireError):
            wire.to_plain(data)
    # Anything else is refused at its first bytes, and costs most of the time there is.
    if data[:4] == b"\x28\xb5\x2f\xfd":
        out, _ = fmt.salvage(data, 1 << 16)
        assert len(out) <= 1 << 16
    marker = data[:8].ljust(8, b"m")
    covered = 0
    for item in fmt.scan(lambda at, n: data[at : at + n], 0, len(data), marker):
        covered += item.end - item.offset if isinstance(item, fmt.Frame) else item.length
    assert covered == len(data)
    with contextlib.suppress(fmt.FormatError):
        fmt.Index(data)


atheris.Setup(sys.argv, one)
atheris.Fuzz()
