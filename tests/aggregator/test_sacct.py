"""sacct's rows and node lists: read as Slurm writes them, refused line by line."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import facts
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from sams_aggregator import nodelist, sacct, tables
from sams_aggregator.work import Options, work

ROW = synthetic.Row(7, 1_760_000_000, 1_760_000_100, 100, 4, "n[1-2]", 2)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ("n1",)),
        ("n[1-3,07],x", ("n1", "n2", "n3", "n07", "x")),
        ("n[08-11]", ("n08", "n09", "n10", "n11")),
        ("r[1-2]c[0-1]", ("r1c0", "r1c1", "r2c0", "r2c1")),
        ("gpu-[1]-ib", ("gpu-1-ib",)),
        ("n1,n1", ("n1",)),
        ("None assigned", ()),
        ("", ()),
    ],
)
def test_node_lists(text: str, names: tuple[str, ...]) -> None:
    assert nodelist.expand(text) == names


@pytest.mark.parametrize("text", ["n[1", "n1]", "n[3-1]", "n[]", "n[a-b]", "n[1-999999999]", "a,,b",
                                  "n[1-400]x[1-400]", "n[[1]]"])  # fmt: skip
def test_bad_node_lists_are_refused(text: str) -> None:
    with pytest.raises(nodelist.NodeListError):
        nodelist.expand(text)


@given(st.text(alphabet="n[]0123-,ab", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert len(nodelist.expand(text)) <= nodelist.MAX_NODES
    except nodelist.NodeListError as error:
        assert "\n" not in str(error)


def parse(output: bytes) -> tuple[list[sacct.Job], list[sacct.Problem]]:
    jobs: list[sacct.Job] = []
    problems: list[sacct.Problem] = []
    for payload in sacct.payloads(output, "site", 5):
        found, bad = sacct.parse(payload)
        jobs += found
        problems += bad
    return jobs, problems


def test_a_row_with_the_delimiter_in_its_name() -> None:
    jobs, problems = parse(synthetic.output([ROW]))
    assert problems == []
    (job,) = jobs
    assert (job.job_id, job.cpus, job.cpu_time_s, job.job_name) == (7, 4, 400, "a|b")
    assert (job.start_ns, job.end_ns, job.read_ns) == (ROW.start * 10**9, 1_760_000_100 * 10**9, 5)


def test_bad_lines_are_named_and_the_rest_is_read() -> None:
    good = synthetic.output([ROW]).decode().splitlines()
    lines = [good[0], "nonsense", good[1], good[1].replace("|7|", "|x|").replace("7|c1", "x|c1"),
             good[1].replace("n[1-2]", "n[1-"), good[1].replace("2025-", "20-")]  # fmt: skip
    jobs, problems = parse("\n".join(lines).encode())
    assert len(jobs) == 1
    assert [problem.line for problem in problems] == [1, 3, 4, 5]
    assert "JobIDRaw is not a number" in problems[1].reason
    assert "node list" in problems[2].reason
    assert "not a time" in problems[3].reason


def test_a_row_beyond_all_measure_is_passed_over() -> None:
    # As a job without an end had in the past: 2^32 - start.
    bad = dataclasses.replace(ROW, elapsed=2**32 - 1, cpus=100_000)
    jobs, problems = parse(synthetic.output([bad, ROW]))
    assert [job.cpu_time_s for job in jobs] == [ROW.cpu_time]
    assert [problem.reason for problem in problems] == [
        f"CPUTimeRAW is beyond all measure: {(2**32 - 1) * 100_000}"
    ]


def test_jobs_that_have_not_begun_are_no_runs() -> None:
    line = ROW.line().replace(synthetic.stamp(ROW.start), "Unknown")
    jobs, problems = parse(f"{synthetic.HEAD}\n{line}\n".encode())
    assert (jobs, problems) == ([], [])


def test_other_columns_are_refused_in_one_line() -> None:
    with pytest.raises(sacct.SacctError, match="no AllocCPUS"):
        sacct.check_head(b"JobID|Start|End\n1|2|3\n")


def test_large_output_is_cut_between_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sacct, "CHUNK_BYTES", 1000)
    rows = [synthetic.Row(n, 1_760_000_000 + n, None, 5, 1, "n1", 1) for n in range(50)]
    assert len(list(sacct.payloads(synthetic.output(rows), None, 1))) > 5
    jobs, problems = parse(synthetic.output(rows))
    assert [job.job_id for job in jobs] == list(range(50))
    assert problems == []
    assert all(job.end_ns is None for job in jobs)


def test_rows_of_many_payloads_stand_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a column says the same in all rows of one payload and not in the next."""
    monkeypatch.setattr(sacct, "CHUNK_BYTES", 1000)
    rows = [
        synthetic.Row(n, 1_760_000_000 + n, None if n < 20 else 1_760_000_900, 5, 1, "n1", 1,
                      user=f"u{n // 15}", cluster="" if n > 30 else "c2")
        for n in range(50)
    ]  # fmt: skip
    found = facts.sacct_payloads(synthetic.output(rows), 1)
    result = work(found, Options("UTC", 600, "c1"), tmp_path)
    assert (result.low_job, result.high_job) == (0, 49)
    assert (result.begin_ns, result.end_ns) == (rows[0].start * 10**9, rows[-1].start * 10**9)
    table = tables.scan("jobs", [tmp_path / str(result.name) / "jobs.parquet"])
    told = tables.connect().execute(f"FROM {table}").fetchall()
    assert told == [tuple(job) for one in found for job in sacct.parse(one.data)[0]]
    assert len(told) == 50


def fake(folder: Path, fields: str, body: str) -> list[str]:
    script = folder / "sacct"
    script.write_text(f"""#!/bin/sh
[ "$TZ" = UTC ] || exit 3
case "$*" in *helpformat*) echo '{fields}';; *) echo "$*" >&2; {body};; esac
""")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return [str(script)]


def test_sacct_is_asked_for_the_fields_it_has(tmp_path: Path) -> None:
    fields = " ".join(field for field in sacct.FIELDS if field not in {"Restarts", "SLUID"})
    command = fake(tmp_path, fields, 'echo "$*"')
    said = sacct.ask(command, since=0, until=86400, timeout_s=20).decode()
    assert "Restarts" not in said
    assert "-S 1970-01-01T00:00:00 -E 1970-01-02T00:00:00" in said
    assert said.rstrip().startswith("-a -P -D -X --format=JobIDRaw,")


@pytest.mark.parametrize(
    ("fields", "body", "reason"),
    [
        ("JobIDRaw", "true", "has no AllocCPUS"),
        (" ".join(sacct.FIELDS), "exit 1", "ended with status 1"),
        (" ".join(sacct.FIELDS), "sleep 20", "no answer in 1 s"),
    ],
)
def test_a_sacct_that_fails_is_told_in_one_line(
    tmp_path: Path, fields: str, body: str, reason: str
) -> None:
    with pytest.raises(sacct.SacctError, match=reason) as caught:
        sacct.ask(fake(tmp_path, fields, body), since=0, until=1, timeout_s=1)
    assert os.linesep not in str(caught.value)
