"""The wire format: what is written is read back, what is wrong is refused with a reason."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sams_ebpf import wire

RECORD = wire.Record(b"/bin/x\xff", 0, None, 5, 3, 2)


def batch(**changes: object) -> wire.Batch:
    values: dict[str, object] = {
        "v": 1,
        "kind": "counters",
        "epoch": bytes(range(16)),
        "generation": 1,
        "writer": bytes(8),
        "sequence": 7,
        "claims": wire.Claims(node="n1", job_id=5),
        "mode": "bpf",
        "full": True,
        "ledger": wire.Ledger(cgroup_cpu_ns=6, attributed_cpu_ns=5, unattributed_cpu_ns=1),
        "executables": 1,
        "fields": wire.FIELDS,
        "sums": [5, 3, 2, *[None] * (len(wire.COUNTERS) - 3)],
        "records": [RECORD],
    }
    return wire.Batch(**(values | changes))  # type: ignore[arg-type]


def test_reads_back_what_was_written() -> None:
    assert wire.decode(wire.encode(batch())) == batch()
    assert wire.decode_header(wire.encode(batch())).identity == batch().identity


def test_a_tombstone_has_no_columns() -> None:
    dropped = wire.Dropped(
        generation=1,
        writer=bytes(8),
        first_sequence=1,
        last_sequence=2,
        batches=2,
        bytes=9,
        reason="size",
    )
    tombstone = batch(
        kind="tombstone", dropped=dropped, ledger=None, fields=[], sums=[], records=[]
    )
    assert wire.decode(wire.encode(tombstone)) == tombstone


def test_columns_of_another_version_are_read_by_name() -> None:
    document = wire.to_plain(wire.encode(batch()))
    document["fields"] = ["path", "flags", "script", "joules", "cpu_ns"]
    document["sums"] = [9, 5]
    document["records"] = [[b"/bin/x", 0, None, 9, 5]]
    (record,) = wire.decode(msgspec.msgpack.encode(document)).records
    assert (record.path, record.cpu_ns, record.execs) == (b"/bin/x", 5, None)


@pytest.mark.parametrize("fields", [wire.FIELDS, wire.FIELDS[:4], ["path", "flags", "script", "x"]])
def test_rows_are_the_records_as_tuples(fields: list[str]) -> None:
    document = wire.to_plain(wire.encode(batch()))
    document["fields"] = fields
    document["sums"] = []
    document["records"] = [
        [b"/bin/x", 0, None, 9, *[None] * (len(fields) - 4)],
        [b"/y", 1, b"s", 2],
    ]
    data = msgspec.msgpack.encode(document)
    if "cpu_ns" in fields:
        expected = [msgspec.structs.astuple(record) for record in wire.decode(data).records]
        assert wire.decode_rows(data) == expected
        assert expected[1][:4] == (b"/y", 1, b"s", 2)
    else:
        with pytest.raises(wire.WireError):
            wire.decode_rows(data)


def test_unknown_keys_are_ignored_unless_critical() -> None:
    document = wire.to_plain(wire.encode(batch()))
    document["joules"] = 3
    assert wire.decode(msgspec.msgpack.encode(document)) == batch()
    document["critical"] = ["joules"]
    with pytest.raises(wire.WireError, match="knows joules"):
        wire.decode(msgspec.msgpack.encode(document))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"v": 2}, "wire version 2"),
        ({"epoch": b"short"}, "epoch"),
        ({"sequence": 2**63}, "sequence"),
        ({"ledger": None}, "without a ledger"),
        ({"kind": "tombstone"}, "does not say"),
        ({"sums": [1]}, "sums"),
        ({"fields": ["cpu_ns"], "sums": []}, "fields do not start"),
        ({"records": [[b"/x"]]}, "not a batch"),
    ],
)
def test_refuses(change: dict[str, object], reason: str) -> None:
    document = wire.to_plain(wire.encode(batch())) | change
    with pytest.raises(wire.WireError, match=reason):
        wire.decode(msgspec.msgpack.encode(document))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(data)


@given(st.data())
def test_a_mutated_batch_is_read_or_refused_but_never_crashes(data: st.DataObject) -> None:
    raw = bytearray(wire.encode(batch()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        wire.decode(bytes(raw))
    except wire.WireError as error:
        assert "\n" not in str(error)
