"""The rules that come with the package, on paths as they are found on clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from sams_aggregator import rules
from sams_aggregator.rules import Rules, RulesError, Software

# Tried in this order, as the documentation tells sites to do.
ORDER = ["eessi", "easybuild", "spack", "conda", "containers", "system"]

CASES = (Path(__file__).parent / "ready_made_cases.txt").read_text().splitlines()
PARSED = [line.split("; ") for line in CASES if not line.startswith("#")]


@pytest.fixture(scope="module")
def made() -> Rules:
    return Rules.from_config({}, "none", ready_made=ORDER)


@pytest.mark.parametrize("case", PARSED, ids=lambda case: str(case[0]))
def test_realistic_paths(made: Rules, case: list[str]) -> None:
    path, *rest = case
    if rest == ["-"]:
        assert made.map(path.encode()) is None
        return
    software, version, local, flags = [part.strip().rstrip(";") for part in [*rest, ""][:4]]
    expected = Software(software, version, local, "u" in flags, "i" in flags)
    assert made.map(path.encode()) == expected


def test_every_rule_is_of_use(made: Rules) -> None:
    assert made.audit(case[0].encode() for case in PARSED) == []


def test_every_rule_goes_through_the_filter(made: Rules) -> None:
    assert made._filter is not None
    assert made._unfiltered == ()


def test_all_sets_are_known() -> None:
    assert sorted(ORDER) == rules.ready_made_names()
    with pytest.raises(RulesError, match="'spak': there are none of that name; known: conda, "):
        Rules.from_config({}, "x", ready_made=["spak"])


def test_own_rules_come_first_and_numbers_go_on() -> None:
    own = {"rules": [{"match": "^/usr/", "software": "mine", "version": "", "versionstr": ""}]}
    made = Rules.from_config(own, "x", ready_made=["system"])
    assert made.map(b"/usr/bin/x") == Software("mine", "", "")
    assert [rule.number for rule in made.rules] == list(range(1, len(made.rules) + 1))
    found = made.explain(b"/bin/x")
    assert found is not None
    assert found.rule == 3


def test_no_set_rewrites_what_the_site_says() -> None:
    for name in rules.ready_made_names():
        text, _ = rules.ready_made_text(name)
        assert b"rewrite" not in text
