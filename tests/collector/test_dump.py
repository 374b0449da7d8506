"""`sams-ebpf dump`: what is readable is shown, what is not costs one line, never the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sams_ebpf import dump, wire

BATCH = wire.Batch(
    v=1,
    kind="counters",
    epoch=bytes(range(16)),
    generation=1,
    writer=b"writer!!",
    sequence=7,
    claims=wire.Claims(node="n1", job_id=5, cgroup=b"/slurm/\xff"),
    mode="bpf",
    full=True,
    ledger=wire.Ledger(cgroup_cpu_ns=6, attributed_cpu_ns=5, unattributed_cpu_ns=1),
    executables=1,
    fields=wire.FIELDS,
    sums=[5, 3, 2, *[None] * (len(wire.COUNTERS) - 3)],
    records=[wire.Record(b"/bin/x\xff\n", wire.DELETED | wire.CUT, None, 5, 3, 2)],
)


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "sams_ebpf", "dump", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60, check=False)


def test_shows_one_line_per_batch(tmp_path: Path) -> None:
    file = tmp_path / "a.msgpack"
    file.write_bytes(wire.encode(BATCH))
    ran = run(str(file), str(file))
    first, second = ran.stdout.splitlines()
    assert (ran.returncode, ran.stderr, first) == (0, b"", second)
    shown = json.loads(first)
    assert shown["epoch"] == "000102030405060708090a0b0c0d0e0f"
    assert shown["writer"] == b"writer!!".hex()
    assert shown["claims"]["cgroup"] == "/slurm/\\xff"
    (record,) = shown["records"]
    assert record["path"] == "/bin/x\\xff\\x0a"
    assert record["flags"] == ["deleted", "cut"]
    assert (record["cpu_ns"], record["execs"]) == (5, None)
    assert (shown["sums"]["cpu_ns"], shown["sums"]["execs"]) == (5, None)


def test_reads_standard_input() -> None:
    ran = run("-", stdin=wire.encode(BATCH))
    assert (ran.returncode, json.loads(ran.stdout)["sequence"]) == (0, 7)


def test_a_bad_file_costs_one_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    good, cut, empty = tmp_path / "good", tmp_path / "cut", tmp_path / "empty"
    good.write_bytes(wire.encode(BATCH))
    cut.write_bytes(wire.encode(BATCH)[:-9])
    empty.touch()
    ran = run(str(cut), str(tmp_path / "absent"), str(empty), str(tmp_path), str(good))
    lines = ran.stderr.decode().splitlines()
    assert ran.returncode == 4
    assert json.loads(ran.stdout)["sequence"] == 7
    assert [word in line for word, line in zip(("cut", "absent", "empty"), lines, strict=False)]
    assert "not a batch" in lines[0]
    assert "No such file" in lines[1]
    assert "Is a directory" in lines[3]
    assert len(lines) == 5, lines
    assert "4 of 5 files" in lines[4]


def test_a_tombstone_and_keys_of_a_later_version() -> None:
    tombstone = wire.Batch(
        v=1,
        kind="tombstone",
        epoch=bytes(16),
        generation=1,
        writer=bytes(8),
        sequence=0,
        claims=wire.Claims(),
        dropped=wire.Dropped(
            generation=1,
            writer=b"\xaa" * 8,
            first_sequence=3,
            last_sequence=9,
            batches=7,
            bytes=4000,
            reason="size",
        ),
    )
    document = wire.to_plain(wire.encode(tombstone))
    document["joules"] = {"when": 1.5, b"\xff": [b"\xfe", float("inf")]}
    shown = dump.plain(msgspec.msgpack.encode(document))
    assert shown["dropped"]["writer"] == "aa" * 8  # type: ignore[index]
    assert shown["joules"] == {"when": 1.5, "\\xff": ["\\xfe", "inf"]}
    json.dumps(shown, allow_nan=False)


def test_unnamed_bits_are_shown_by_number() -> None:
    assert dump.flag_names(0) == []
    assert dump.flag_names(1 << 40 | wire.MEMFD) == ["memfd", "bit-40"]


def test_deep_nesting_is_an_error_like_any_other() -> None:
    document = wire.to_plain(wire.encode(BATCH))
    raw = msgspec.msgpack.encode(document)
    deep = (
        raw[:1].replace(raw[:1], bytes([raw[0] + 1])) + raw[1:] + b"\xa1x" + b"\x91" * 400 + b"\xc0"
    )
    try:
        json.dumps(dump.plain(deep))
    except wire.WireError as error:
        assert "not a batch" in str(error)


@given(st.data())
def test_whatever_decodes_can_be_shown(data: st.DataObject) -> None:
    raw = bytearray(wire.encode(BATCH))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        wire.decode(bytes(raw))
    except wire.WireError:
        with pytest.raises(wire.WireError):
            dump.plain(bytes(raw))
    else:
        try:
            assert json.dumps(dump.plain(bytes(raw)))
        except wire.WireError as error:
            assert "not a batch" in str(error)
