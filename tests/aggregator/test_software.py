"""The commands `software …` and `extract` on a small site."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import golden_sams
import msgspec
import pytest
import sqlalchemy as sa
import synthetic
from lxml import etree
from sams_site import Site

from sams_aggregator import config as cfg
from sams_aggregator import sams_json, sams_xml, software
from sams_aggregator import state as st
from sams_aggregator.rules import Rules, Software
from sams_aggregator.sams_json import Exec, NodeReport
from sams_ebpf import wire

RULES: dict[str, Any] = {
    "rules": [
        {"match": "^/usr/", "software": "system", "version": "", "versionstr": "", "ignore": True},
        {
            "match": "^/sw/(?P<n>[^/]+)/(?P<v>[^/]+)/",
            "software": "%(n)s",
            "version": "%(v)s",
            "versionstr": "%(n)s/%(v)s",
        },
        {"match": "^/opt/", "software": "opt", "version": "", "versionstr": "%%(user)s"},
    ],
    "rewrite": [
        {"match": {"version": r"(?P<new>\d+\.\d+)\."}, "update": {"version": "%(new)s"}},
    ],
}
BEGIN = 1_767_323_045  # 2026-01-02T03:04:05 UTC, when the jobs below begin
PATHS = [b"/usr/bin/sh", b"/sw/R/4.4.1/bin/R", b"/sw/50%/1/x", b"/opt/y", b"/home/a\xff\x1b/z"]


def report(job_id: int, **changes: Any) -> NodeReport:
    values: dict[str, Any] = {
        "job_id": job_id,
        "node": "n1",
        "begin_s": 1_767_323_045 + job_id,
        "end_s": 1_767_323_645 + job_id,
        "execs": tuple(Exec(path, (n + 1) * 10**9, 0) for n, path in enumerate(PATHS[:4])),
        "start_text": "20260102030405",
        "user": "al",
        "account": "p1",
        "cpus": 4,
        "nodes": 1,
    }
    return NodeReport(**(values | changes))


def put(site: Site, *reports: NodeReport) -> None:
    folder = site.folder / "json/in"
    folder.mkdir(parents=True, exist_ok=True)
    for one in reports:
        name = sams_json.file_name(one.job_id, one.node)
        (folder / name).write_bytes(sams_json.render(one))
    site.run("ingest")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path / "site", copy.deepcopy(RULES), sams_json=[str(tmp_path / "site/json")])
    state = st.open_state(cfg.Aggregator(data=made.folder / "data"))
    with state.begin() as connection:
        connection.execute(st.paths.insert(), [{"path": path} for path in PATHS])
    state.close()
    return made


def test_update_shows_what_changes_and_what_is_of_no_use(site: Site) -> None:
    tried = site.run("software", "update", "--dry-run")
    assert "1 paths: undetermined -> R 4.4 R/4.4.1\n" in tried.out
    assert "  /opt/y: undetermined -> opt %(user)s\n" in tried.out
    assert "4 paths would change; nothing was written (--dry-run)" in tried.out
    assert site.run("software", "show").out == ""
    done = site.run("software", "update")
    assert "5 paths mapped, 1 of them undetermined" in done.out
    assert "would" not in done.out
    again = site.run("software", "update")
    assert "->" not in again.out
    assert ": 0 paths mapped" in again.out

    site.document["software"]["rules"].insert(
        0, {"match": "^/opt/", "software": "opt2", "version": "", "versionstr": ""}
    )
    site.document["software"]["rules"].append(
        {"match": "^/nowhere/", "software": "n", "version": "", "versionstr": ""}
    )
    site.save()
    changed = site.run("software", "update", "--dry-run").out
    assert "1 paths: opt %(user)s -> opt2\n" in changed
    assert "note: rule 4 is shadowed: all 1 paths it matches go to earlier rules" in changed
    assert "note: rule 5 matches no path: ^/nowhere/" in changed
    assert "1 paths would change" in changed


def test_show_and_undetermined(site: Site) -> None:
    site.run("software", "update")
    out = site.run("software", "show", "--path", "/sw/*").out
    assert out == (
        "Path: /sw/50%/1/x\n\tSoftware     : 50%\n\tVersion      : 1\n\tLocal Version: 50%/1\n"
        "\tUser Provided: false\n\tIgnore       : false\n"
        "\tCore-hours   : 0.000\n\tCPU-hours    : 0.000\n\tJob runs     : 0\n"
        "Path: /sw/R/4.4.1/bin/R\n\tSoftware     : R\n\tVersion      : 4.4\n"
        "\tLocal Version: R/4.4.1\n\tUser Provided: false\n\tIgnore       : false\n"
        "\tCore-hours   : 0.000\n\tCPU-hours    : 0.000\n\tJob runs     : 0\n"
    )
    shown = json.loads(site.run("software", "show", "--software", "[sR]*", "--json").out)
    assert [(row["path"], row["ignore"]) for row in shown] == [
        ("/sw/R/4.4.1/bin/R", False),
        ("/usr/bin/sh", True),
    ]
    assert site.run("software", "show", "--path", "*/z").out.startswith(
        "Path: /home/a\\xff\\x1b/z\n\tSoftware is not determined\n\tCore-hours   : 0.000\n"
    )
    assert site.run("software", "undetermined").out == "/home/a\\xff\\x1b/z\n"


def test_show_tells_what_paths_weigh_the_heaviest_first(site: Site) -> None:
    put(site, report(1), report(2, execs=report(1).execs[1:2]), report(3, node="n2"))
    accounting = site.folder / "sacct"
    accounting.write_bytes(synthetic.output([
        synthetic.Row(1, BEGIN, BEGIN + 3600, 3600, 8, "n1", 1, cluster=golden_sams.CLUSTER),
    ]))  # fmt: skip
    site.run("ingest", "--sacct", accounting)
    noted = site.run("software", "show")
    assert (noted.out, noted.err.count("5 paths are not mapped")) == ("", 1)
    site.run("software", "update")
    shown = json.loads(site.run("software", "show", "--json").out)
    # Of 8 core-hours 4/10 went to the last, 3/10 to the next, …
    assert [(row["path"], row["core_us"], row["cpu_ns"], row["runs"]) for row in shown] == [
        ("/opt/y", 8 * 3600 * 10**6 * 4 // 10, 8 * 10**9, 2),
        ("/sw/50%/1/x", 8 * 3600 * 10**6 * 3 // 10, 6 * 10**9, 2),
        ("/sw/R/4.4.1/bin/R", 8 * 3600 * 10**6 * 2 // 10, 6 * 10**9, 3),
        ("/usr/bin/sh", 8 * 3600 * 10**6 // 10, 2 * 10**9, 2),
        ("/home/a\\xff\\x1b/z", 0, 0, 0),
    ]
    assert (
        "\tIgnore       : false\n\tCore-hours   : 3.200\n\tCPU-hours    : 0.002\n"
        "\tJob runs     : 2\n"
    ) in site.run("software", "show", "--path", "/opt/*").out


def test_reports_fill_in_user_and_project(site: Site) -> None:
    site.document["software"]["rules"][2] |= {"version": "%%(project)s 100%%%%"}
    site.save()
    put(site, report(1), report(2, user="bo", account=None))
    said = json.loads(site.run("report", "--by", "software,version,local_version", "--json").out)
    rows = {tuple(row[key] for key in said["by"]): row["cpu_ns"] for row in said["rows"]}
    assert rows["opt", "p1 100%", "al"] == rows["opt", "None 100%", "bo"] == 4 * 10**9
    assert rows["50%", "1", "50%/1"] == 6 * 10**9


def test_no_rule_names_what_has_no_path(site: Site) -> None:
    """The overflow row is no executable, though an empty regexp matches it."""
    site.document["software"]["rules"].append(
        {"match": "", "software": "rest", "version": "", "versionstr": ""}
    )
    site.save()
    row = synthetic.Row(1, BEGIN, BEGIN + 60, 60, 4, "n1", 1, cluster=golden_sams.CLUSTER)
    one = synthetic.epoch(random.Random(1), synthetic.claims(row, "n1"), BEGIN, [BEGIN + 60],
                          paths=[b"/x"], unattributed=False).last  # fmt: skip
    used = one.records[0].cpu_ns
    overflow = wire.Record(b"", wire.OVERFLOW, None, 5 * 10**9)
    total = used + overflow.cpu_ns
    ledger = wire.Ledger(cgroup_cpu_ns=total, attributed_cpu_ns=total, unattributed_cpu_ns=0)
    batch = msgspec.structs.replace(
        one, records=[overflow, *one.records], executables=2, ledger=ledger
    )
    folder = site.folder / "batches/in"
    folder.mkdir(parents=True)
    (folder / "1.msgpack").write_bytes(wire.encode(batch))
    site.run("ingest", "--batches", folder.parent)
    said = json.loads(site.run("report", "--json").out)["rows"]
    found = {row["kind"]: row["cpu_ns"] for row in said if row["cpu_ns"]}
    assert found == {"software": used, "undetermined": 5 * 10**9}
    assert "rest" in site.run("software", "show", "--path", "/x").out
    assert (
        json.loads(site.run("software", "show", "--path", "", "--json").out)[0]["software"] is None
    )
    assert site.run("software", "undetermined").out == ""
    site.run("extract", "--since", "2020-01-01")
    assert [name for ((name, *_),) in site.records().values()] == ["rest"]
    site.run("export-sams-json", site.folder / "json")
    (file,) = (site.folder / "json").iterdir()
    assert [one.path for one in sams_json.parse(file.read_bytes()).execs] == [b"(overflow)", b"/x"]


def test_every_version_of_the_rules_is_archived(site: Site, tmp_path: Path) -> None:
    assert site.run("software", "versions").out == ""
    site.run("software", "update")
    site.run("report")
    first = site.document["software"]["rules"]
    site.document["software"] = {"rules": first[:1], "ready_made": ["system"]}
    site.save()
    site.run("software", "update", "--dry-run")
    site.run("report")
    site.run("extract")
    lines = site.run("software", "versions").out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("  3 rules")
    # What was in force can be had again, though the state is lost.
    for name in ("state.sqlite", "state.sqlite-wal", "state.sqlite-shm"):
        (site.folder / "data" / name).unlink(missing_ok=True)
    site.run("report")
    assert site.run("software", "versions").out.splitlines() == lines
    version = lines[0].split("  ")[1]
    again = tmp_path / "again.yaml"
    again.write_text(site.run("software", "versions", version[:8]).out)
    assert Rules.from_file(again).version == version
    assert Rules.from_config(RULES, "x").version == version
    assert "such version" in site.run("software", "versions", "zz", status=2).err


def test_reset(site: Site) -> None:
    site.run("software", "update")
    state = st.open_state(cfg.Aggregator(data=site.folder / "data"))
    with state.begin() as connection:
        known = st.mapping.c.software.is_not(None)
        connection.execute(st.mapping.update().where(known).values(software="wrong"))
    refused = site.run("software", "reset", status=2)
    assert "give --path GLOB or --software GLOB" in refused.err
    tried = site.run("software", "reset", "--path", "/sw/*", "--dry-run").out
    assert "2 paths would be mapped anew; nothing was written" in tried
    assert site.run("software", "show", "--software", "R").out == ""
    assert "2 paths mapped" in site.run("software", "reset", "--path", "/sw/*").out
    for action in ("reset", "show"):
        assert "is like this" in site.run("software", action, "--path", "/nowhere/*").err
    version = software.current(state)
    names = {path: one and one.software for path, one in software.mapping(state, version)}
    assert names == {
        PATHS[0]: "wrong",
        PATHS[1]: "R",
        PATHS[2]: "50%",
        PATHS[3]: "wrong",
        PATHS[4]: None,
    }
    site.run("software", "reset", "--software", "wron?")
    names = {path: one and one.software for path, one in software.mapping(state, version)}
    assert list(names.values()).count("wrong") == 0
    state.close()


def test_test(site: Site) -> None:
    out = site.run("software", "test", "/sw/R/4.4.1/bin/R", "/none", r"/opt/\xff").out
    assert out == (
        "Path: /sw/R/4.4.1/bin/R\n"
        "\tRule         : 2: ^/sw/(?P<n>[^/]+)/(?P<v>[^/]+)/\n"
        "\t  n          : R\n\t  v          : 4.4.1\n"
        "\tRewrites     : 1\n"
        "\tSoftware     : R\n\tVersion      : 4.4\n\tLocal Version: R/4.4.1\n"
        "\tUser Provided: false\n\tIgnore       : false\n"
        "Path: /none\n\tno rule matches\n"
        "Path: /opt/\\xff\n\tRule         : 3: ^/opt/\n"
        "\tSoftware     : opt\n\tVersion      : \n\tLocal Version: %(user)s\n"
        "\tUser Provided: false\n\tIgnore       : false\n"
    )


def test_rules_from_other_places(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(json.dumps({"sams.software.Regexp": RULES, "sams.software-updater": {}}))
    for section in (
        {"file": str(file)},
        {"sams.software.Regexp": RULES},
        {"sams.software.Regexp": RULES, "ready_made": []},
    ):
        site.document["software"] = section
        site.save()
        assert "Rule         : 2:" in site.run("software", "test", "/sw/R/4/x").out
    site.document["software"] = {"ready_made": ["spack", "system"]}
    site.save()
    assert "system" in site.run("software", "test", "/usr/bin/x").out
    assert "Rule         : 2:" in site.run("software", "test", "--rules", file, "/sw/R/4/x").out


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ([], "software: has to be a mapping"),
        ({"rulse": []}, "software: rulse: unknown key; did you mean 'rules'?"),
        ({"file": "/none.yaml"}, "/none.yaml: cannot be read"),
        ({"file": "/none.yaml", "rules": []}, "software: either file or rules, not both"),
        ({"ready_made": ["no"]}, "ready-made rules 'no': there are none of that name"),
        (
            {"rules": [{"match": "(", "software": "", "version": "", "versionstr": ""}]},
            ": rule 1: match: broken regexp '('",
        ),
        (
            {"sams.software.Regexp": {"rules": [{"match": "^/"}]}},
            ": rule 1: has no 'software'",
        ),
    ],
)
def test_bad_rules_are_one_line(site: Site, section: object, text: str) -> None:
    site.document["software"] = section
    site.save()
    refused = site.run("software", "test", "/x", status=2)
    assert text in refused.err
    assert refused.err.count("\n") == 1


def test_the_line_of_a_rule_in_the_configuration(site: Site) -> None:
    site.document["software"]["rules"][1]["match"] = "["
    site.save()
    lines = site.config.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "match: '['" in text)
    refused = site.run("software", "update", status=2)
    assert f"{site.config}:{line}: rule 2: match: broken regexp '['" in refused.err


def test_a_path_that_takes_too_long_is_told_and_stays_undetermined(site: Site) -> None:
    hostile = ("/opt/é" + "a" * 60 + "b").encode()
    state = st.open_state(cfg.Aggregator(data=site.folder / "data"))
    with state.begin() as connection:
        connection.execute(st.paths.insert(), [{"path": hostile}])
    site.document["software"]["rules"].insert(
        0, {"match": "^/opt/.(?:a+)+$", "software": "x", "version": "", "versionstr": ""}
    )
    site.save()
    told = site.run("software", "update", status=4)
    assert "1 paths stay undetermined: a regexp took too long, the first time rule 1" in told.err
    assert dict(software.mapping(state, software.current(state)))[hostile] is None
    state.close()


def test_old_mappings_are_dropped_the_last_ones_are_kept(site: Site) -> None:
    state = st.open_state(cfg.Aggregator(data=site.folder / "data"))
    made = [
        Rules.from_config({"rules": [RULES["rules"][0] | {"software": f"s{n}"}]}, "x")
        for n in range(software.KEPT_VERSIONS + 2)
    ]
    for one in made:
        assert software.update(state, one).mapped == len(PATHS)
    assert software.update(state, made[-2]).mapped == 0
    assert software.current(state) == made[-2].version
    assert software.update(state, made[0]).mapped == len(PATHS)
    with state.read() as connection:
        kept = set(connection.scalars(sa.select(st.mapping.c.rules).distinct()))
    assert len(kept) == software.KEPT_VERSIONS
    assert dict(software.mapping(state, made[0].version))[PATHS[0]] == Software(
        "s0", "", "", ignore=True
    )
    state.close()


# ------------------------------------------------------------------ extract


def test_extract_from_first_to_last(site: Site) -> None:
    put(
        site,
        report(1),
        report(2, user=None, account=None),
        report(3, execs=report(3).execs[:1]),
        report(4, execs=(Exec(PATHS[1], 0, 0),)),
    )
    tried = site.run("extract", "--dry-run")
    assert tried.out == "cl.example.org:1:20260102030405 new\ncl.example.org:2:20260102030405 new\n"
    assert not site.out.exists()
    done = site.run("extract")
    assert "1 files written: 2 new records, 0 changed" in done.err
    assert "2 without CPU in known software" in done.err
    assert site.records()["cl.example.org:1:20260102030405"] == [
        ("50%", "1", "50%/1", "false", "33.33"),
        ("R", "4.4", "R/4.4.1", "false", "22.22"),
        ("opt", "", "al", "false", "44.44"),
    ]
    assert ("opt", "", "None", "false", "44.44") in site.records()[
        "cl.example.org:2:20260102030405"
    ]
    for path in site.out.iterdir():
        etree.XMLSchema(etree.parse(sams_xml.SCHEMA)).assertValid(etree.parse(path))

    site.document["software"]["rules"][2]["ignore"] = True
    site.save()
    assert "0 new records, 2 changed" in site.run("extract").err
    assert site.records()["cl.example.org:1:20260102030405"] == [
        ("50%", "1", "50%/1", "false", "60.00"),
        ("R", "4.4", "R/4.4.1", "false", "40.00"),
    ]
    site.document["software"]["rules"][1]["ignore"] = True
    site.save()
    assert "2 records were sent and are no longer true" in site.run("extract").err
    assert site.run("extract", "--unsendable").out == (
        "cl.example.org:1:20260102030405\ncl.example.org:2:20260102030405\n"
    )


def test_a_new_state_knows_from_the_archive_what_was_sent(site: Site) -> None:
    put(site, report(1), report(2))
    site.run("extract")
    for name in ("state.sqlite", "state.sqlite-wal", "state.sqlite-shm"):
        (site.folder / "data" / name).unlink(missing_ok=True)
    for path in (site.folder / "json/archive").iterdir():
        path.rename(site.folder / "json/in" / path.name)
    (site.folder / "json/in/1.n1.json").write_bytes(sams_json.render(report(1, user="bo")))
    site.run("ingest")
    assert "0 new records, 1 changed (0 of them partial), 1 unchanged" in site.run("extract").err


def test_nodes_add_up_and_a_second_node_corrects_the_record(site: Site) -> None:
    put(site, report(1, nodes=2))
    done = site.run("extract", "--dry-run")
    assert done.out == "cl.example.org:1:20260102030405 new partial\n"
    site.run("extract")
    put(site, report(1, node="n2", nodes=2, execs=(Exec(PATHS[3], 5 * 10**9, 0),)))
    assert "0 new records, 1 changed (0 of them partial)" in site.run("extract").err
    assert ("opt", "", "al", "false", "64.29") in site.records()["cl.example.org:1:20260102030405"]


def test_requeues_are_two_records(site: Site) -> None:
    put(site, report(1))
    put(site, report(1, start_text="20260102040000", begin_s=1_767_326_400, end_s=1_767_326_500))
    site.run("extract")
    assert set(site.records()) == {
        "cl.example.org:1:20260102030405",
        "cl.example.org:1:20260102040000",
    }
    left_out = site.run("export-sams-json", site.folder / "export").err
    assert "1 files written" in left_out
    assert "1 earlier runs of jobs that were run again are left out" in left_out


def test_since_and_files_of_few_jobs(site: Site) -> None:
    site.document["aggregator"]["extract"]["jobs_per_file"] = 2
    site.save()
    put(site, *(report(n * 86400) for n in range(1, 8)))
    out = site.run("extract", "--since", "2026-01-05").err
    assert "3 files written: 5 new records" in out
    assert "2 before --since" in out
    assert sorted(path.read_bytes().count(b"<sa:JobRecordID>") for path in site.out.iterdir()) == [
        1, 2, 2,
    ]  # fmt: skip
    assert "has to be YYYY-MM-DD" in site.run("extract", "--since", "soon", status=2).err
    site.document["aggregator"]["extract"] = {}
    site.save()
    assert "aggregator.extract.output: not set" in site.run("extract", status=2).err


def test_runs_that_may_still_change_wait(site: Site) -> None:
    now = int(time.time())
    put(
        site,
        report(1, nodes=2, begin_s=now - 600, end_s=now),
        report(2, nodes=1, begin_s=now - 600, end_s=now),
        report(3, nodes=2, begin_s=now - 600, end_s=now - 49 * 3600),
    )
    assert site.run("extract", "--dry-run").out == (
        "cl.example.org:2:20260102030405 new\ncl.example.org:3:20260102030405 new partial\n"
    )


def test_killed_at_any_moment_the_same_comes_out(site: Site) -> None:
    extract_with_kills(site, kills=4, jobs=30, seed=4)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_extract_killed_thirty_times(site: Site) -> None:
    extract_with_kills(site, kills=30, jobs=30, seed=5)


def extract_with_kills(site: Site, kills: int, jobs: int, seed: int) -> None:
    """Kill extracts at random points: every file stays as it was first seen, none comes twice."""
    site.document["aggregator"]["extract"]["jobs_per_file"] = 3
    site.save()
    put(site, *(report(n) for n in range(1, jobs + 1)))
    chance = random.Random(seed)
    seen: dict[str, bytes] = {}
    hit = 0
    while hit < kills:
        worker = subprocess.Popen(
            site.command("extract"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        with worker:
            until = time.monotonic() + 60
            if hit % 3 == 2:
                # At any time, before the first file of this call too.
                until = time.monotonic() + chance.uniform(0, 2)
            count = len(seen) + chance.randint(1, 4)
            while worker.poll() is None and time.monotonic() < until:
                if site.out.exists() and len(list(site.out.glob("*.xml"))) >= count:
                    break
                time.sleep(0.001)
            if worker.poll() is None:
                worker.send_signal(signal.SIGKILL)
                hit += 1
            else:
                # All was written before it could be killed.
                put(site, *(report(n) for n in range(jobs + 1, jobs + 31)))
                jobs += 30
        found = {path.name: path.read_bytes() for path in site.out.glob("*.xml")}
        assert {name: found[name] for name in seen} == seen
        seen = found
    site.run("extract")
    found = {path.name: path.read_bytes() for path in site.out.glob("*.xml")}
    assert {name: found[name] for name in seen} == seen
    records = b"".join(found.values())
    assert records.count(b"<sa:JobRecordID>") == jobs
    assert len(site.records()) == jobs
    assert "0 files written: 0 new records, 0 changed" in site.run("extract").err
