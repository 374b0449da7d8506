"""What is sent and what is not, and that a kill at any point changes nothing of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import golden_sams
import pytest
import sqlalchemy as sa

from sams_aggregator import config as cfg
from sams_aggregator import outbox
from sams_aggregator import state as st
from sams_aggregator.outbox import ExtractError, Proposal, Run, Survey
from sams_aggregator.rules import Software
from sams_ebpf import durable
from sams_ebpf.errors import UsageError

NS = 10**9
NAMES = {
    b"/a": Software("A", "1", "%(user)s"),
    b"/b": Software("B", "1", "b"),
    b"/i": Software("I", "1", "i", ignore=True),
}
RUN = Run(
    cluster="c", job_id=1, start_text="20260102030405", user="al", account="p", end_ns=100 * NS,
    settled=True, partial=False, cpu_ns=[(b"/a", 3 * NS), (b"/b", NS), (b"/x", NS)],
)  # fmt: skip


@dataclass
class Given:
    """Runs as they are listed."""

    listed: list[Run]

    def runs(self) -> Iterable[Run]:
        return self.listed


@pytest.fixture
def state(tmp_path: Path) -> Iterator[st.State]:
    opened = st.open_state(cfg.Aggregator(data=tmp_path / "data"))
    yield opened
    opened.close()


def look(
    state: st.State,
    runs: list[Run],
    names: dict[bytes, Software] | None = None,
    since_ns: int | None = None,
) -> tuple[Survey, list[Proposal]]:
    found: list[Proposal] = []
    survey = outbox.survey(
        Given(runs), NAMES if names is None else names, outbox.sent_digests(state), found.append,
        since_ns=since_ns,
    )  # fmt: skip
    return survey, found


def send(
    state: st.State, folder: Path, runs: list[Run], names: dict[bytes, Software] | None = None
) -> list[Proposal]:
    outbox.flush(state, folder)
    _, found = look(state, runs, names)
    if found:
        outbox.put(state, found, 1_700_000_000 * NS)
    outbox.flush(state, folder)
    return found


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_sent_once(state: st.State, tmp_path: Path) -> None:
    assert len(send(state, tmp_path / "out", [RUN])) == 1
    (body,) = written(tmp_path / "out").values()
    assert golden_sams.records(body) == {
        "c:1:20260102030405": [
            ("A", "1", "al", "false", "75.00"),
            ("B", "1", "b", "false", "25.00"),
        ]
    }
    survey, again = look(state, [RUN])
    assert again == []
    assert survey == Survey(unchanged=1)
    assert len(written(tmp_path / "out")) == 1


def test_sent_again_exactly_when_the_content_changes(state: st.State, tmp_path: Path) -> None:
    out = tmp_path / "out"
    send(state, out, [RUN])
    same = replace(RUN, cpu_ns=[(b"/b", NS), (b"/a", NS), (b"/a", 2 * NS)], partial=True)
    assert send(state, out, [same]) == []
    (late,) = send(state, out, [replace(RUN, cpu_ns=[*RUN.cpu_ns, (b"/b", NS)])])
    assert not late.new
    rules = NAMES | {b"/b": Software("B", "2", "b")}
    (renamed,) = send(state, out, [RUN], rules)
    assert renamed.record.record_id == "c:1:20260102030405"
    assert look(state, [RUN], rules)[0] == Survey(unchanged=1)
    (back,) = send(state, out, [RUN])
    assert not back.new


def test_left_out(state: st.State) -> None:
    runs = [
        replace(RUN, job_id=2, end_ns=None),
        replace(RUN, job_id=3, settled=False),
        replace(RUN, job_id=4, cpu_ns=[]),
        replace(RUN, job_id=5, cpu_ns=[(b"/i", NS), (b"/x", NS)]),
        replace(RUN, job_id=6, end_ns=5 * NS),
        replace(RUN, job_id=7, end_ns=50 * NS, partial=True),
    ]
    survey, found = look(state, runs, since_ns=50 * NS)
    assert [one.record.record_id for one in found] == ["c:7:20260102030405"]
    assert survey == Survey(new=1, partial=1, running=1, unsettled=1, empty=2, older=1)


def test_what_can_no_longer_be_withdrawn_is_listed(state: st.State, tmp_path: Path) -> None:
    runs = [replace(RUN, job_id=number) for number in range(1, 6)]
    send(state, tmp_path / "out", runs)
    ignored = {path: one._replace(ignore=True) for path, one in NAMES.items()}
    assert look(state, runs, ignored)[0] == Survey(
        empty=5, unsendable=[f"c:{number}:20260102030405" for number in range(1, 6)]
    )
    changed = [
        runs[0],
        replace(runs[1], start_text="20260102030406"),
        replace(runs[2], settled=False),
        replace(runs[3], end_ns=None),
    ]
    survey, found = look(state, changed)
    assert survey.unsendable == ["c:2:20260102030405", "c:5:20260102030405"]
    assert [one.record.record_id for one in found] == ["c:2:20260102030406"]


def test_requeues_are_records_of_their_own_unless_nothing_tells_them_apart(
    state: st.State,
) -> None:
    second = replace(RUN, start_text="20260102040000")
    assert len(look(state, [RUN, second])[1]) == 2
    blind = replace(RUN, start_text=None)
    survey, found = look(state, [blind, blind])
    assert [one.record.record_id for one in found] == ["c:1"]
    survey, found = look(state, [blind, replace(blind, settled=False)])
    assert (survey.unsettled, found) == (1, [])


class KilledError(Exception):
    """Stands for a kill: nothing of the code under test catches it."""


@pytest.mark.parametrize("point", ["before writing", "after writing", "in journal", "marking"])
def test_killed_and_called_again(
    state: st.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    out = tmp_path / "out"
    journal: list[bytes] = []
    real_write, real_mark = durable.write, outbox._mark

    def write(path: Path, data: bytes) -> None:
        if point == "before writing":
            raise KilledError
        real_write(path, data)
        if point == "after writing":
            raise KilledError

    def note(entry: bytes) -> None:
        journal.append(entry)
        if point == "in journal":
            raise KilledError

    def mark(*arguments: object) -> None:
        if point == "marking":
            raise KilledError
        real_mark(*arguments)  # type: ignore[arg-type]

    _, found = look(state, [RUN, replace(RUN, job_id=2)])
    name = outbox.put(state, found, 1_700_000_000 * NS)
    monkeypatch.setattr(durable, "write", write)
    monkeypatch.setattr(outbox, "_mark", mark)
    with pytest.raises(KilledError):
        outbox.flush(state, out, note)
    before = written(out) if out.exists() else {}
    assert outbox.sent_digests(state) == {}
    monkeypatch.undo()

    if before:
        (out / name).unlink()  # the site's client has taken it already
    assert outbox.flush(state, out, journal.append) == 1
    after = written(out)
    assert list(after) == [name]
    assert before in ({}, after)
    assert len(set(journal)) == 1
    assert look(state, [RUN, replace(RUN, job_id=2)])[0] == Survey(unchanged=2)
    assert outbox.flush(state, out, journal.append) == 0


def test_a_folder_that_cannot_be_written_keeps_all_for_later(
    state: st.State, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    _, found = look(state, [RUN])
    outbox.put(state, found, NS)
    with pytest.raises(ExtractError, match="stay in the outbox"):
        outbox.flush(state, tmp_path / "file")
    assert outbox.flush(state, tmp_path / "out") == 1


def test_what_was_sent_can_be_restored_from_the_journal(state: st.State, tmp_path: Path) -> None:
    journal: list[bytes] = []
    for number, names in enumerate([NAMES, NAMES | {b"/b": Software("B", "2", "b")}]):
        _, found = look(state, [RUN], names)
        outbox.put(state, found, (1_700_000_000 + number) * NS)
        outbox.flush(state, tmp_path / "out", journal.append)
    assert len(journal) == 2
    for order in (journal, journal[::-1], journal * 2):
        other = st.open_state(cfg.Aggregator(data=tmp_path / f"other{len(order)}{order[0][-9:]!r}"))
        assert outbox.restore(other, order) == len(order)
        assert outbox.sent_digests(other) == outbox.sent_digests(state)
        with other.read() as connection:
            files = list(connection.scalars(sa.select(st.sent.c.file)))
        with state.read() as connection:
            assert files == list(connection.scalars(sa.select(st.sent.c.file)))
        other.close()


def test_old_files_are_forgotten_what_was_sent_is_not(state: st.State, tmp_path: Path) -> None:
    send(state, tmp_path / "out", [RUN])
    outbox.forget_old(state, (1_700_000_000 + 89 * 86400) * NS)
    assert count(state) == 1
    outbox.forget_old(state, (1_700_000_000 + 91 * 86400) * NS)
    assert count(state) == 0
    assert look(state, [RUN])[0] == Survey(unchanged=1)


def count(state: st.State) -> int | None:
    with state.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(st.outbox))


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        outbox.only_one(tmp_path),
        pytest.raises(UsageError, match="another extract is at work"),
        outbox.only_one(tmp_path),
    ):
        pytest.fail("got in")
    with outbox.only_one(tmp_path):
        pass
