"""The bytes of version 1 are for ever: golden files, and a page that knows every key."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from sams_ebpf import layout, leftovers, sampling, tracing, wire

GOLDEN = Path(__file__).parent / "golden"
PAGE = Path(__file__).parents[2] / "docs" / "wire.md"

EPOCH = bytes.fromhex("00112233445566778899aabbccddeeff")
WRITER = bytes.fromhex("0123456789abcdef")

FULL = wire.Batch(
    v=1,
    kind="counters",
    epoch=EPOCH,
    generation=2,
    writer=WRITER,
    sequence=11,
    claims=wire.Claims(
        cluster="alpha",
        node="n1",
        job_id=4711,
        restart_count=1,
        sluid="s0123456789ABC",
        submit_ns=1_700_000_000_000_000_000,
        start_ns=1_700_000_100_000_000_000,
        start_text="20231114231500",
        boot_id="6f1c1f6e-0c1b-4d7e-9a3b-000000000000",
        cgroup=b"/slurm/uid_1000/job_4711",
        cgroup_birth_ns=1_700_000_100_500_000_000,
        user="ada",
        uid=1000,
        account="p1",
        partition="batch",
        job_name="Größe",
        cpus=8,
        nodes=2,
        het_job_id=4710,
    ),
    software="sams-ebpf 0.1.0",
    mode="bpf",
    loader="libbpf",
    begin_ns=1_700_000_100_500_000_000,
    end_ns=1_700_000_700_500_000_000,
    full=True,
    final=wire.Closing(reason="signal", live=0),
    ledger=wire.Ledger(
        cgroup_cpu_ns=600_000_001_000,
        attributed_cpu_ns=600_000_000_000,
        unattributed_cpu_ns=1000,
        outside_cpu_ns=5,
        age_ns=30_000_000,
        unattributed_by={"before-attach": 900},
        lost={"missed-deaths": 1},
    ),
    processes=wire.Processes(forks=3, adopted=1, moved_in=0, exits=3, live=0, moved_out=1),
    executables=3,
    sums=[600_000_000_005, 500_000_000_000, 100_000_000_000, 4, 3, 3, 1 << 30, 1, 2, 3, 4, 5, 6],
    fields=wire.FIELDS,
    records=[
        wire.Record(
            b"/usr/bin/python3.11",
            0,
            b"/home/ada/\xff.py",
            599_000_000_000,
            500_000_000_000,
            99_000_000_000,
            *(3, 2, 2, 1 << 30, 1, 2, 3, 4, 5, 6),
        ),
        wire.Record(
            b"/tmp/a.out", wire.DELETED | wire.FOREIGN, None, 1_000_000_000, None, 1_000_000_000
        ),
        wire.Record(b"/usr/bin/conmon", wire.OUTSIDE, None, 5, None, None, 1, 1, 1),
    ],
)
DELTA = wire.Batch(
    v=1,
    kind="counters",
    epoch=EPOCH,
    generation=0,
    writer=WRITER,
    sequence=0,
    claims=wire.Claims(),
    mode="proc",
    ledger=wire.Ledger(cgroup_cpu_ns=None, attributed_cpu_ns=7, unattributed_cpu_ns=None),
    executables=1,
    sums=[7, *[None] * (len(wire.COUNTERS) - 1)],
    fields=wire.FIELDS,
    records=[wire.Record(b"/bin/sh", 0, None, 7)],
)
TOMBSTONE = wire.Batch(
    v=1,
    kind="tombstone",
    epoch=EPOCH,
    generation=2,
    writer=bytes(8),
    sequence=0,
    claims=wire.Claims(cluster="alpha", node="n1", job_id=4711),
    dropped=wire.Dropped(
        generation=2,
        writer=WRITER,
        first_sequence=3,
        last_sequence=9,
        batches=6,
        bytes=24_576,
        reason="size",
    ),
)
BATCHES = {"full": FULL, "delta": DELTA, "tombstone": TOMBSTONE}


@pytest.mark.parametrize("name", BATCHES)
def test_today_s_writer_gives_these_bytes(name: str) -> None:
    golden = (GOLDEN / f"v1-{name}.msgpack").read_bytes()
    assert wire.encode(BATCHES[name]) == golden
    assert wire.decode(golden) == BATCHES[name]


def test_a_document_of_the_first_days_stays_readable() -> None:
    """Fewer keys and columns than today's writer has."""
    old = wire.decode((GOLDEN / "v1-early.msgpack").read_bytes())
    assert old.identity == wire.Identity(EPOCH, 1, WRITER, 3)
    assert old.claims == wire.Claims(node="n1", job_id=4711)
    assert old.ledger is not None
    assert (old.ledger.cgroup_cpu_ns, old.ledger.lost) == (10, {})
    assert [(r.path, r.cpu_ns, r.execs, r.read_bytes) for r in old.records] == [
        (b"/bin/true", 9, 2, None)
    ]


def test_a_document_of_days_to_come_stays_readable() -> None:
    """Keys and columns nobody knows yet, in batch, claims, ledger and records."""
    later = wire.decode((GOLDEN / "v1-later.msgpack").read_bytes())
    assert later.claims.node == "n1"
    assert [(r.path, r.cpu_ns, r.user_ns) for r in later.records] == [(b"/bin/true", 9, 8)]


def test_an_unknown_critical_key_is_refused() -> None:
    with pytest.raises(wire.WireError, match="knows gpu_records: upgrade"):
        wire.decode((GOLDEN / "v1-critical.msgpack").read_bytes())


def tables() -> dict[str, list[str]]:
    """Section of the page → the keys of its tables."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif match := re.match(r"\| `?(\w+)`? \| ", line):
            found.setdefault(section, []).append(match[1])
    return found


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("Batch", wire.Batch),
        ("Claims", wire.Claims),
        ("Ledger", wire.Ledger),
        ("Processes", wire.Processes),
        ("Final", wire.Closing),
        ("Dropped", wire.Dropped),
    ],
)
def test_the_page_knows_every_key_and_no_other(section: str, model: type[msgspec.Struct]) -> None:
    keys = [key for key in tables()[section] if key != "key"]
    assert sorted(keys) == sorted(model.__struct_fields__)


def test_the_page_knows_every_column_and_bit() -> None:
    keys = tables()["Records"]
    bits = {int(key) for key in keys if key.isdigit()}
    assert [
        key for key in keys if not key.isdigit() and key not in ("column", "bit")
    ] == wire.FIELDS
    assert bits == set(wire.FLAG_NAMES)
    text = PAGE.read_text()
    assert [name for name in wire.FLAG_NAMES.values() if f"`{name}`" not in text] == []


SAMPLED = ("BEFORE_ATTACH", "DIED", "EXEC_AMBIGUOUS", "MOVED", "UNIDENTIFIED")


def test_the_page_knows_every_cause() -> None:
    """Those in the kernel's table, and those the collector's sources count by name."""
    text = PAGE.read_text()
    told = set(re.findall(r"^\| `(?:lost|unattributed_by)` \| `(\w+)` \|", text, re.MULTILINE))
    known = {*layout.LOST, leftovers.WINDOW, leftovers.LOST_WINDOW, tracing.LATER_RUN}
    known |= {getattr(sampling, name) for name in SAMPLED}
    for source in Path(wire.__file__).parent.glob("*.py"):
        if source.name == "pressure.py":  # its reasons are those of tombstones
            continue
        known |= set(re.findall(r'(?:_lose\(|\blost\[)"(\w+)"', source.read_text()))
    assert told == known
