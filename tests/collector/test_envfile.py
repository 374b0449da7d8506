"""The job's identity as the Prolog wrote it: hostile values never become someone else's."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sams_ebpf import envfile, wire
from sams_ebpf.errors import UsageError

PROLOG = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_SLUID": "s0123456789ABC",
    "SLURM_JOB_RESTART_COUNT": "2",
    "SLURM_JOB_START_TIME": "1767321845",
    "SLURM_JOB_UID": "1000",
    "SLURM_JOB_USER": "ada",
    "SLURM_JOB_ACCOUNT": "p1",
    "SLURM_JOB_PARTITION": "main",
    "SLURM_JOB_NAME": "",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_CPUS_PER_NODE": "64(x3)",
    "SLURM_HET_JOB_ID": "",
    "SLURM_CLUSTER_NAME": "alpha",
    "SLURMD_NODENAME": "n1",
}


def encoded(**changes: str) -> bytes:
    return b"".join(f"{key}={value}\0".encode() for key, value in (PROLOG | changes).items())


def test_reads_what_the_prolog_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    assert envfile.parse(encoded(), "env") == wire.Claims(
        cluster="alpha",
        node="n1",
        job_id=123,
        restart_count=2,
        sluid="s0123456789ABC",
        start_ns=1767321845 * 10**9,
        start_text="20260102044405",
        user="ada",
        uid=1000,
        account="p1",
        partition="main",
        cpus=64,
        nodes=3,
    )


def test_reads_lines_written_by_hand() -> None:
    claims = envfile.parse(b"# mine\nSLURM_JOB_ID=7\nSLURM_JOB_USER=ada\n\nOTHER=1\n", "env")
    assert claims == wire.Claims(job_id=7, user="ada")


def test_a_newline_in_a_value_is_no_new_line() -> None:
    claims = envfile.parse(encoded(SLURM_JOB_NAME="x\nSLURM_JOB_ACCOUNT=rich"), "env")
    assert claims.account == "p1"
    assert claims.job_name == "x\N{REPLACEMENT CHARACTER}SLURM_JOB_ACCOUNT=rich"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SLURM_JOB_ID", "12x"),
        ("SLURM_JOB_ID", "-1"),
        ("SLURM_JOB_ID", "1" * 19),
        ("SLURM_JOB_ID", "\N{SUPERSCRIPT TWO}"),
        ("SLURM_JOB_USER", "a\x1b[31m"),
        ("SLURM_JOB_USER", "a" * 257),
        ("SLURM_JOB_SLUID", "../../etc"),
        ("SLURM_JOB_CPUS_PER_NODE", "lots"),
        ("SLURM_JOB_START_TIME", "99999999999"),
    ],
)
def test_a_value_not_to_believe_is_left_out_and_said(
    key: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        claims = envfile.parse(encoded(**{key: value}), "env")
    assert [record.getMessage().startswith(f"env: {key}: ") for record in caplog.records] == [True]
    assert "\x1b" not in caplog.text
    field = {"SLURM_JOB_ID": "job_id", "SLURM_JOB_USER": "user", "SLURM_JOB_SLUID": "sluid"}
    field |= {"SLURM_JOB_CPUS_PER_NODE": "cpus", "SLURM_JOB_START_TIME": "start_ns"}
    assert getattr(claims, field[key]) is None
    assert claims.account == "p1"


def test_a_run_has_what_was_made_between_its_prolog_and_its_epilog(tmp_path: Path) -> None:
    env = tmp_path / "env"
    assert envfile.run_of(None) == envfile.run_of(env) == envfile.UNKNOWN
    assert envfile.UNKNOWN.has(0)
    env.write_bytes(b"SAMS_EBPF_UPTIME=100.25\0" + encoded())
    run = envfile.run_of(env)
    assert run == envfile.Run(100_250_000_000, None)
    assert [run.has(at) for at in (100_249_999_999, 100_250_000_000, 10**15)] == [False, True, True]
    (tmp_path / envfile.ENDED).write_text("160.00\n")
    run = envfile.run_of(env)
    assert run.ended_ns == 160_010_000_000
    assert [run.has(at) for at in (159 * 10**9, 161 * 10**9)] == [True, False]
    # Not from the Prolog, or from one that could not tell.
    (tmp_path / envfile.ENDED).write_text("")
    env.write_bytes(b"SAMS_EBPF_UPTIME=\0" + encoded())
    assert envfile.run_of(env) == envfile.UNKNOWN
    assert envfile.ended(env)


def test_cpus_of_unequal_nodes_are_not_guessed() -> None:
    assert envfile.parse(encoded(SLURM_JOB_CPUS_PER_NODE="4,2(x2)"), "env").cpus is None


@pytest.mark.parametrize(("text", "job"), [("1", 1), ("67043328", 67043328), ("12.3", 12)])
def test_job_of_an_instance(text: str, job: int) -> None:
    assert envfile.job_of(text) == job


@pytest.mark.parametrize("text", ["", "x", "1.", "1.x", "-1", "1 ", "1\n", "1.2.3", "9" * 11])
def test_no_job_of_an_instance(text: str) -> None:
    with pytest.raises(UsageError, match="--jobid"):
        envfile.job_of(text)


def test_a_missing_file_and_a_huge_one_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"env: cannot be read: No such file"):
        envfile.read(tmp_path / "env")
    (tmp_path / "env").write_bytes(b"A=" + b"x" * envfile.MAX_BYTES)
    with pytest.raises(UsageError, match="larger than"):
        envfile.read(tmp_path / "env")


@given(st.binary(max_size=300))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    claims = envfile.parse(b"SLURM_JOB_NAME=" + data + b"\0SLURM_JOB_ID=" + data, "env")
    assert msgspec.convert(msgspec.to_builtins(claims), wire.Claims) == claims


@given(st.text(st.characters(exclude_characters="\0"), max_size=2000))
def test_whatever_a_job_is_called_fits_the_wire(name: str) -> None:
    data = b"SLURM_JOB_ID=1\0SLURM_JOB_NAME=" + os.fsencode(name.encode("utf-8", "replace")) + b"\0"
    claims = envfile.parse(data, "env")
    assert claims.job_id == 1
    assert claims.job_name is None or len(claims.job_name) <= 1024
