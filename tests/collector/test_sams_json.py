"""Upstream's file: what its aggregator needs is there, and nothing is invented."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sams_ebpf import config, sams_json, wire

CLAIMS = wire.Claims(
    cluster="c1",
    node="n1",
    job_id=123456,
    start_text="20260102030405",
    user="ada",
    uid=1000,
    account="p1",
    partition="x",
    job_name="j",
    cpus=8,
    nodes=1,
)
RECORDS = [
    wire.Record(b"/bin/a", 0, None, 1_750_000_000, 1_500_000_000, 250_000_000),
    wire.Record(b"/bin/a", wire.DELETED, None, 1_000_000_000, 1_000_000_000, 0),
    wire.Record(b"/bin/\xff\xc3\xa9", 0, None, 5, None, None),
    wire.Record(b"/bin/left", wire.OUTSIDE, None, 10**9, 10**9, 0),
    wire.Record(b"", wire.OVERFLOW, None, 2_000_000_000, 1_000_000_000, 1_000_000_000),
]


def batch(**changes: object) -> wire.Batch:
    values: dict[str, object] = {
        "v": 1,
        "kind": "counters",
        "epoch": bytes(16),
        "generation": 1,
        "writer": bytes(8),
        "sequence": 1,
        "claims": CLAIMS,
        "begin_ns": 1_700_000_000_900_000_000,
        "end_ns": 1_700_000_100_100_000_000,
        "full": True,
        "final": wire.Closing(reason="signal", live=0),
        "ledger": wire.Ledger(cgroup_cpu_ns=1, attributed_cpu_ns=1, unattributed_cpu_ns=0),
        "fields": wire.FIELDS,
        "records": RECORDS,
    }
    return wire.Batch(**(values | changes))  # type: ignore[arg-type]


def test_the_document() -> None:
    assert sams_json.document(batch()) == {
        "sams.sampler.Core": {"jobid": 123456, "node": "n1"},
        "sams.sampler.SlurmInfo": {
            "account": "p1",
            "username": "ada",
            "uid": "1000",
            "cpus": "8",
            "nodes": "1",
            "partition": "x",
            "starttime": "2026-01-02T03:04:05",
            "jobname": "j",
        },
        "sams.sampler.Software": {
            "execs": {
                "/bin/a": {"user": 2.5, "system": 0.25},
                "/bin/\\xffé": {"user": 5e-9, "system": 0.0},
                "(overflow)": {"user": 1.0, "system": 1.0},
            },
            "start_time": 1_700_000_000,
            "end_time": 1_700_000_100,
        },
    }


@pytest.mark.parametrize("missing", ["account", "user", "cpus", "start_text"])
def test_without_what_a_record_needs_sacct_is_left_to_tell(missing: str) -> None:
    claims = msgspec.structs.replace(CLAIMS, **{missing: None})
    assert "sams.sampler.SlurmInfo" not in sams_json.document(batch(claims=claims))


def test_what_is_not_known_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    claims = msgspec.structs.replace(
        CLAIMS, job_name=None, start_text=None, start_ns=1_700_000_000_000_000_000
    )
    slurm = sams_json.document(batch(claims=claims))["sams.sampler.SlurmInfo"]
    assert "jobname" not in slurm
    assert str(slurm["starttime"]).startswith("2023-11-1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"claims": wire.Claims(node="n1")}, "job id"),
        ({"claims": wire.Claims(job_id=1)}, "node"),
        ({"full": False}, "all records"),
        ({"end_ns": None}, "begin and end"),
        ({"records": []}, "has run nothing"),
        ({"records": [RECORDS[3]]}, "has run nothing"),
    ],
)
def test_what_the_format_cannot_say_is_an_error(change: dict[str, object], reason: str) -> None:
    with pytest.raises(sams_json.SamsJsonError, match=reason):
        sams_json.document(batch(**change))


def test_writes_where_upstream_does(tmp_path: Path) -> None:
    plain = sams_json.write(batch(), config.SamsJson(base_path=tmp_path))
    assert plain == tmp_path / "123456.n1.json"
    hashed = sams_json.write(
        batch(),
        config.SamsJson(
            base_path=tmp_path, jobid_hash_size=1000, file_pattern="%(node)s-%(jobid)s.json"
        ),
    )
    assert hashed == tmp_path / "123" / "n1-123456.json"
    assert json.loads(hashed.read_text()) == sams_json.document(batch())
    assert sorted(os.listdir(tmp_path)) == ["123", "123456.n1.json"]  # noqa: PTH208


@pytest.mark.parametrize("node", ["a/b", "../../etc/x"])
def test_a_node_s_name_leads_nowhere_else(tmp_path: Path, node: str) -> None:
    claims = msgspec.structs.replace(CLAIMS, node=node)
    with pytest.raises(sams_json.SamsJsonError, match="no name for a file"):
        sams_json.write(
            batch(claims=claims),
            config.SamsJson(base_path=tmp_path, file_pattern="%(jobid)s%(node)s"),
        )


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(sams_json.SamsJsonError, match="No such file") as caught:
        sams_json.write(batch(), config.SamsJson(base_path=tmp_path / "absent"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def squashed() -> Iterator[Path]:
    """A folder in which only user 65534 may write, as on a root-squashing file system."""
    base = Path(tempfile.mkdtemp(prefix="sams-json-"))
    base.chmod(0o755)
    folder = base / "out"
    folder.mkdir(mode=0o755)
    os.chown(folder, 65534, 65534)
    yield folder
    shutil.rmtree(base)


@pytest.mark.system
def test_writes_as_another_user_and_is_itself_again(squashed: Path, tmp_path: Path) -> None:
    settings = config.SamsJson(base_path=squashed, jobid_hash_size=1000, write_as_uid=65534)
    written = sams_json.write(batch(), settings)
    assert (written.stat().st_uid, written.parent.stat().st_uid) == (65534, 65534)
    (tmp_path / "mine").touch()
    assert (tmp_path / "mine").stat().st_uid == 0
    guarded = tmp_path / "guarded"
    guarded.mkdir(mode=0o755)
    with pytest.raises(sams_json.SamsJsonError, match="Permission denied"):
        sams_json.write(batch(), config.SamsJson(base_path=guarded, write_as_uid=65534))
    (tmp_path / "mine-too").touch()
    assert (tmp_path / "mine-too").stat().st_uid == 0


@pytest.mark.system
def test_without_the_right_to_become_another_user_it_says_so(squashed: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from sams_ebpf import config, sams_json, wire\n"
        "import sys\n"
        "b = wire.decode(sys.stdin.buffer.read())\n"
        "try: sams_json.write(b, config.SamsJson(base_path=Path(sys.argv[1]), write_as_uid=1))\n"
        "except sams_json.SamsJsonError as error: print(error)\n"
    )
    drop = ["setpriv", "--bounding-set", "-setuid", "--inh-caps", "-setuid"]
    ran = subprocess.run(
        [*drop, sys.executable, "-c", code, str(squashed)],
        input=wire.encode(batch()),
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert b"cannot become user 1: CAP_SETUID is needed" in ran.stdout
