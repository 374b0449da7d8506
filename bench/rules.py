"""Mapping of paths to software: the rules as they are applied, against a loop over `re`."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.section import Section, Table
from sams_aggregator.rules import Rules

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from rules_reference import Reference

PATHS = 1_000_000
RULES = 200
LOOP_PATHS = 20_000  # the loop's rate does not depend on their number
ROUNDS = 5
VERSIONS = ("1.2.3", "2.0.1", "2023.1", "2024.1.2", "6.4.2", "10.0")


def run() -> Section:
    """Measure both in turn, on the same paths."""
    chance = random.Random(7)
    rows: list[tuple[str, float, float, str, str]] = []
    for name, ascii_only in (("plain paths", True), ("1 % with other letters", False)):
        document = site_rules(chance)
        paths = site_paths(chance, ascii_only=ascii_only)
        sample = chance.sample(paths, LOOP_PATHS)
        reference = Reference(document)
        expected = [reference.map(path) for path in sample]
        loop, fast = [], []
        for _ in range(ROUNDS):
            began = time.process_time()
            for path in sample:
                reference.map(path)
            loop.append(LOOP_PATHS / (time.process_time() - began))
            rules = Rules.from_config(document, "bench")
            began = time.process_time()
            found = rules.map_many(paths)
            fast.append(PATHS / (time.process_time() - began))
        same = dict(zip(paths, found, strict=True))
        wrong = sum(same[p] != e for p, e in zip(sample, expected, strict=True))
        share = sum(one is not None for one in found) / PATHS
        ratios = [ours / theirs for ours, theirs in zip(fast, loop, strict=True)]
        rows.append(
            (name, median(loop), median(fast), f"{median(ratios):.1f}", f"{wrong}, {share:.0%}")
        )
    return Section(
        title="Rules: paths to software",
        method=f"{PATHS:,} distinct paths, {RULES} rules and 3 rewrites, new `Rules` each time so"
        f" that nothing is remembered; the plain loop over compiled regexps on {LOOP_PATHS:,} of"
        f" them. In turn, {ROUNDS} rounds, medians by CPU time; the ratio is the median of the"
        " rounds' ratios. Every result of the loop is compared.",
        tables=[
            Table(["", "loop, paths/s", "rules, paths/s", "ratio", "differences, mapped"], rows)
        ],
    )


def site_rules(chance: random.Random) -> dict[str, Any]:
    """Rules as sites have them: a few layouts, and many for one piece of software each."""
    rules = [
        rule(r"^/(?P<path>s?bin)/", "system", "/%(path)s/", ignore=True),
        rule(r"^/usr/", "system", "/usr/", ignore=True),
        rule(r"^/tmp/", "user", "/tmp/", "%%(user)s@%%(project)s", user_provided=True),
        rule(r"^/home/./(?P<u>[^/]+)/", "unclassified", "", "%(u)s", user_provided=True),
        rule(
            r"^/cvmfs/ebsw/[^/]+/software/Core/(?P<s>[^/]+)/(?P<v>[^/]+)/",
            "%(s)s", "%(v)s", "Core/%(s)s/%(v)s",
        ),
        rule(
            r"^/cvmfs/ebsw/[^/]+/software/MPI/(?P<t>[^/]+/[^/]+/[^/]+/[^/]+)/(?P<s>[^/]+)/(?P<v>[^/]+)",
            "%(s)s", "%(v)s", "MPI/%(t)s/%(s)s/%(v)s",
        ),
    ]  # fmt: skip
    while len(rules) < RULES:
        name = f"soft{len(rules)}"
        head = chance.choice([rf"^/sw/apps/{name}/", rf"^/opt/{name}-", rf"^/proj/[^/]+/{name}/"])
        rules.append(rule(head + r"(?P<v>\d+(?:\.\d+)*)/", name, "%(v)s", f"{name} %(v)s"))
    return {
        "rules": rules,
        "rewrite": [
            {
                "match": {"software": "^.*$", "version": r"^(?P<new>\d+\.\d+)[^\d]"},
                "update": {"version": "%(new)s"},
            },
            {"match": {"software": "^VASP$"}, "update": {"software": "Vasp"}},
            {"match": {"software": "^soft1$"}, "update": {"software": "Soft One"}},
        ],
    }


def rule(match: str, software: str, version: str, local: str = "", **flags: bool) -> dict[str, Any]:
    return {"match": match, "software": software, "version": version, "versionstr": local, **flags}


def site_paths(chance: random.Random, *, ascii_only: bool) -> list[bytes]:
    paths = []
    for number in range(PATHS):
        user = f"user{chance.randrange(800)}"
        version = chance.choice(VERSIONS)
        name = f"soft{chance.randrange(6, RULES)}"
        project = chance.randrange(300)
        # Of a project's own installations there are a few.
        own = f"soft{6 + (7 * project + chance.randrange(3)) % (RULES - 6)}"
        folder = chance.choices(
            (
                f"/home/{user[4]}/{user}/build/{number % 977}",
                f"/sw/apps/{name}/{version}/bin",
                f"/opt/{name}-{version}/bin",
                f"/proj/p{project}/{own}/{version}",
                f"/cvmfs/ebsw/amd/software/Core/S{chance.randrange(300)}/{version}/bin",
                f"/cvmfs/ebsw/amd/software/MPI/GCC/13/OpenMPI/5/S{number % 300}/{version}/bin",
                "/usr/lib/x",
                f"/pfs/nobackup/{user}/run",
            ),
            (30, 12, 6, 6, 14, 14, 8, 10),
        )[0]
        odd = "" if ascii_only or number % 100 else "é"
        paths.append(f"{folder}/x{odd}{number}".encode())
    return paths
