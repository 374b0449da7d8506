"""The state: migrations, refusals, and the same behaviour on SQLite and PostgreSQL 15."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import facts
import postgres
import pytest
import sqlalchemy as sa
import synthetic
from crashes import SITE, ingest_with_kills

from sams_aggregator import compact, manifest
from sams_aggregator import config as cfg
from sams_aggregator import state as st
from sams_aggregator.manifest import Store
from sams_aggregator.work import Options, Payload, Result, work
from sams_ebpf.errors import SamsError, UsageError

OPTIONS = Options("UTC", 600, "c1", "UTC")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres.server() as url:
        yield url


def emptied(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
    engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.system)])
def part(request: pytest.FixtureRequest, tmp_path: Path) -> cfg.Aggregator:
    if request.param == "sqlite":
        return cfg.Aggregator(data=tmp_path)
    url = request.getfixturevalue("server")
    emptied(url)
    return cfg.Aggregator(data=tmp_path, state=url)


@pytest.fixture
def store(part: cfg.Aggregator) -> Iterator[Store]:
    state = st.open_state(part)
    yield Store(state, part.data)
    state.close()


def payloads(seed: int) -> list[Payload]:
    chance = random.Random(seed)
    row = synthetic.Row(seed, 1_760_000_000, None, 0, 4, "n1", 1)
    one = synthetic.epoch(chance, synthetic.claims(row, "n1"), row.start,
                          synthetic.harvests(row.start, row.start + 1200))  # fmt: skip
    return facts.payloads(one.encoded())


def made(found: list[Payload], folder: Path) -> Result:
    return work(found, OPTIONS, folder)


def test_opening_again_changes_nothing(part: cfg.Aggregator) -> None:
    for _ in range(2):
        state = st.open_state(part)
        with state.read() as connection:
            done = list(connection.scalars(sa.select(st.migrations.c.version)))
        state.close()
        assert done == [version for version, _, _ in st.MIGRATIONS]


def test_a_migration_that_fails_leaves_nothing(
    part: cfg.Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    st.open_state(part).close()

    def half(connection: sa.Connection) -> None:
        connection.execute(sa.text("CREATE TABLE half_done (a INTEGER)"))
        raise SamsError("the power went")

    latest = st.MIGRATIONS[-1][0]
    monkeypatch.setattr(st, "MIGRATIONS", [*st.MIGRATIONS, (latest + 1, "half", half)])
    with pytest.raises(SamsError, match="power"):
        st.open_state(part)
    monkeypatch.undo()
    state = st.open_state(part)
    assert "half_done" not in sa.inspect(state.engine).get_table_names()
    state.close()


def test_a_newer_state_is_refused_in_one_line(part: cfg.Aggregator) -> None:
    state = st.open_state(part)
    with state.begin() as connection:
        connection.execute(st.migrations.insert().values(version=999, name="later", applied_ns=0))
    state.close()
    with pytest.raises(st.StateError, match=r"newer version .* 999.*: upgrade") as caught:
        st.open_state(part)
    assert "\n" not in str(caught.value)


def test_the_reader_that_read_further_stays(store: Store) -> None:
    folder = manifest.facts_folder(store.data)
    short, long = (made(payloads(1)[:n], folder) for n in (4, 12))
    assert manifest.record(store, "unit", "test", 12, long)
    assert not manifest.record(store, "unit", "test", 4, short)
    assert not manifest.record(store, "unit", "test", 12, long)
    assert [one.name for one in manifest.read(store).sets] == [long.name]


def test_a_set_that_has_gone_is_not_recorded(store: Store) -> None:
    folder = manifest.facts_folder(store.data)
    result = made(payloads(1), folder)
    (folder / str(result.name)).rename(folder / "elsewhere")
    with pytest.raises(SamsError, match="has gone"):
        manifest.record(store, "unit", "test", 1, result)
    assert manifest.extents(store.state) == {}


def test_compaction_keeps_units_and_facts(store: Store) -> None:
    for seed in range(1, 10):
        facts.add(store, f"unit {seed}", payloads(seed), OPTIONS)
    before = facts.everything(store, SITE)
    old = manifest.read(store).sets
    assert compact.compact(store) == 1
    assert len(manifest.read(store).sets) == 1
    assert len(manifest.extents(store.state)) == 9
    assert facts.everything(store, SITE) == before
    # Somebody else has merged them: a second merge of the same sets does not count.
    again = compact.merge(old[:2], manifest.facts_folder(store.data))
    assert not manifest.replace(store.state, old[:2], again, level=1)
    assert facts.everything(store, SITE) == before


def test_both_databases_say_the_same(store: Store, tmp_path: Path) -> None:
    for seed in range(1, 5):
        facts.add(store, f"unit {seed}", payloads(seed), OPTIONS)
    with facts.opened(tmp_path / "other") as other:
        for seed in range(4, 0, -1):
            facts.add(other, f"unit {seed}", payloads(seed), OPTIONS)
        assert facts.everything(store, SITE) == facts.everything(other, SITE)


@pytest.mark.system
@pytest.mark.timeout(300)
def test_killed_ingests_on_postgresql(server: str, tmp_path: Path) -> None:
    emptied(server)
    ingest_with_kills(tmp_path, 4, 40, seed=4, state=server)


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.timeout(1800)
def test_thirty_killed_ingests_on_postgresql(server: str, tmp_path: Path) -> None:
    emptied(server)
    ingest_with_kills(tmp_path, 30, 400, seed=6, state=server)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "mysql://x/y"}, "postgresql"),
        ({"state": "no url"}, "no database URL"),
        ({"state": "postgresql://u:secret@h/d"}, "no password here"),
    ],
)
def test_bad_urls_are_refused(tmp_path: Path, change: dict[str, str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        st.open_state(cfg.Aggregator(data=tmp_path, **change))
    assert "secret@" not in str(caught.value)


def test_a_password_file_has_to_be_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("secret\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        cfg.password(file)
    file.chmod(0o600)
    assert cfg.password(file) == "secret"
