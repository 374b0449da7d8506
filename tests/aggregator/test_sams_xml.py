"""SAMS XML records: shares, cut, text, and the schema written from the format's facts."""

from __future__ import annotations

from decimal import Decimal

import golden_sams
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from sams_aggregator import report, sams_xml, tables
from sams_aggregator.rules import Software
from sams_aggregator.sams_xml import Entry, Record, document, fill, make_record, record_id

SCHEMA = etree.XMLSchema(etree.parse(sams_xml.SCHEMA))
SECOND = 10**9
CONNECTION = tables.connect(threads=1)
CONNECTION.execute(f"CREATE MACRO filled(name, u, p) AS {report._FILLED}")
NAMES = {name: Software(name, "1", "local") for name in "ABCDEFGH"}


def usages(*pairs: tuple[str, float], threshold: str = "1") -> dict[str, str] | None:
    record = make_record(
        "c:1:20260102030405",
        "u",
        "p",
        [(NAMES[name], round(seconds * SECOND)) for name, seconds in pairs],
        remove_less_then=Decimal(threshold),
    )
    return None if record is None else {entry.name: entry.usage for entry in record.entries}


def test_percent_with_two_decimals_each_rounded_by_itself() -> None:
    assert usages(("A", 1), ("B", 1), ("C", 1)) == {"A": "33.33", "B": "33.33", "C": "33.33"}
    assert usages(("A", 2), ("B", 1)) == {"A": "66.67", "B": "33.33"}
    assert usages(("A", 0.001)) == {"A": "100.00"}


def test_what_is_below_one_percent_is_cut_and_the_rest_scaled() -> None:
    assert usages(("A", 98), ("B", 1.5), ("C", 0.5)) == {"A": "98.49", "B": "1.51"}
    assert usages(("A", 99), ("B", 1)) == {"A": "99.00", "B": "1.00"}


def test_a_share_just_below_the_cut_may_come_back() -> None:
    """As with SAMS: its cut is made of a whole that has already lost what is small.

    A has 0.995 percent of the CPU, but 1.005 of what is left without A and the Bs; so A is
    named, and the others have 100 percent without it.
    """
    small = [(name, 0.5) for name in "BC"]
    assert usages(("A", 0.995), ("D", 98.005), *small) == {"A": "1.02", "D": "100.00"}


def test_other_thresholds() -> None:
    pairs = (("A", 90), ("B", 6), ("C", 3), ("D", 1))
    assert usages(*pairs, threshold="5") == {"A": "93.75", "B": "6.25"}
    assert usages(*pairs, threshold="0.5") == {"A": "90.00", "B": "6.00", "C": "3.00", "D": "1.00"}
    assert usages(("A", 999), ("B", 1), threshold="0") == {"A": "99.90", "B": "0.10"}
    assert usages(("A", 50), ("B", 50), threshold="60") is None


def test_nothing_is_said_of_jobs_without_cpu_in_known_software() -> None:
    assert usages() is None
    assert usages(("A", 0), ("B", 0)) is None
    ignored = Software("A", "1", "l", ignore=True)
    assert make_record("c:1", None, None, [(ignored, SECOND), (None, SECOND)]) is None
    many = [(Software(f"s{n}", "", ""), SECOND) for n in range(101)]
    assert make_record("c:1", None, None, many) is None
    assert make_record("c:1", None, None, many[:100]) is not None


def test_ignored_and_undetermined_take_no_share() -> None:
    ignored = Software("B", "1", "l", ignore=True)
    record = make_record(
        "c:1", None, None, [(NAMES["A"], 1), (ignored, 10**12), (None, 10**12), (NAMES["A"], 2)]
    )
    assert record is not None
    assert [(entry.name, entry.usage) for entry in record.entries] == [("A", "100.00")]


def test_entries_are_one_for_each_software_version_local_version_and_origin() -> None:
    different = [
        Software("A", "1", "x"),
        Software("A", "1", "y"),
        Software("A", "2", "x"),
        Software("A", "1", "x", user_provided=True),
        Software("B", "1", "x"),
    ]
    record = make_record("c:1", None, None, [(one, SECOND) for one in [*different, *different]])
    assert record is not None
    assert [entry.usage for entry in record.entries] == ["20.00"] * 5
    assert sorted(
        (e.name, e.version, e.local_version, e.user_provided) for e in record.entries
    ) == (sorted(one[:4] for one in different))


def test_a_name_that_is_empty_is_never_sent() -> None:
    record = make_record(
        "c:1", None, None, [(Software("", "1", "x"), SECOND), (NAMES["A"], SECOND)]
    )
    assert record is not None
    assert [(entry.name, entry.usage) for entry in record.entries] == [("A", "100.00")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%(user)s@%(project)s", "al@p1"),
        ("plain", "plain"),
        ("", ""),
        ("100%", "100%"),
        ("100%%", "100%"),
        ("%%(user)s", "%(user)s"),
        ("%%%(user)s", "%al"),
        ("50% of %(user)s", "50% of al"),
        ("%s %d %(other)s %(user)d", "%s %d %(other)s %(user)d"),
        ("%(user)", "%(user)"),
        ("%", "%"),
    ],
)
def test_user_and_project_are_filled_in(text: str, expected: str) -> None:
    assert fill(text, "al", "p1") == expected


def test_what_is_filled_in_is_not_looked_at_again() -> None:
    assert fill("%(user)s", "%(project)s", "p") == "%(project)s"
    assert fill("%(user)s-%(project)s", None, None) == "None-None"


TOKENS = ["%%", "%(user)s", "%(project)s", "a", "s", "(user)s", " ", "é"]


@given(st.lists(st.sampled_from(TOKENS), max_size=8).map("".join))
def test_filling_is_that_of_python_where_every_sign_is_meant(text: str) -> None:
    assert fill(text, "U", "P") == text % {"user": "U", "project": "P"}


@given(
    st.text("%()sé\n日", max_size=6) | st.lists(st.sampled_from(TOKENS), max_size=8).map("".join)
)
def test_reports_fill_in_as_records_do(text: str) -> None:
    for user in ("%(project)s", None):
        found = CONNECTION.execute("SELECT filled(?, ?, 'P')", [text, user]).fetchone()
        assert found == (fill(text, user, "P"),)


def test_record_ids() -> None:
    assert record_id("c.example", 12, "20260102030405") == "c.example:12:20260102030405"
    assert record_id("c.example", 12, None) == "c.example:12"


def test_document_is_laid_out_like_those_of_sams() -> None:
    record = Record("c:1:2", (Entry("A&B", "", "x<y>", user_provided=True, usage="100.00"),))
    assert document([record], 1_700_000_000).decode() == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<sa:SoftwareAccountingRecords xmlns:sa="http://sams.snic.se/namespaces/2019/01/'
        'softwareaccountingrecords">\n'
        "  <sa:SoftwareAccountingRecord>\n"
        '    <sa:RecordIdentity sa:createTime="2023-11-14T22:13:20Z" sa:recordId="c:1:2"/>\n'
        "    <sa:JobRecordID>c:1:2</sa:JobRecordID>\n"
        "    <sa:Software>\n"
        "      <sa:Name>A&amp;B</sa:Name>\n"
        "      <sa:Version/>\n"
        "      <sa:LocalVersion>x&lt;y&gt;</sa:LocalVersion>\n"
        "      <sa:UserProvided>true</sa:UserProvided>\n"
        "      <sa:Usage>100.00</sa:Usage>\n"
        "    </sa:Software>\n"
        "  </sa:SoftwareAccountingRecord>\n"
        "</sa:SoftwareAccountingRecords>\n"
    )
    SCHEMA.assertValid(etree.fromstring(document([], 0)))


def test_characters_that_xml_cannot_hold_are_spelled_out() -> None:
    name = "a\0b\x1b[31m\ud800\ufffe\t\r\n\"' é\U0001f600"
    record = make_record("c:1", None, None, [(Software(name, "", ""), 1)])
    assert record is not None
    tree = etree.fromstring(document([record], 0))
    SCHEMA.assertValid(tree)
    ((entry,),) = golden_sams.records(document([record], 0)).values()
    assert entry[0] == "a\\x00b\\x1b[31m\\ud800\\ufffe\t\r\n\"' é\U0001f600"


softwares = st.builds(
    Software, st.text(max_size=8), st.text(max_size=4), st.text(max_size=8), st.booleans(),
    st.booleans(),
)  # fmt: skip
cpu = st.lists(st.tuples(st.none() | softwares, st.integers(0, 2**62)), max_size=12)


@given(cpu, st.none() | st.text(max_size=6), st.randoms())
def test_every_record_is_valid_and_the_order_of_the_facts_is_of_no_matter(
    pairs: list[tuple[Software | None, int]], user: str | None, chance: object
) -> None:
    record = make_record("c:1:20260102030405", user, user, pairs)
    chance.shuffle(pairs)  # type: ignore[attr-defined]
    assert make_record("c:1:20260102030405", user, user, pairs) == record
    if record is None:
        return
    SCHEMA.assertValid(etree.fromstring(document([record], 1)))
    total = sum(Decimal(entry.usage) for entry in record.entries)
    assert 99 < total < 102
    assert all(entry.name for entry in record.entries)


@given(cpu, st.integers(1, 5))
def test_nodes_and_repeated_executables_add_up(
    pairs: list[tuple[Software | None, int]], parts: int
) -> None:
    """A sum may be cut into any parts, as over the nodes of a job."""
    cut = [
        (software, used // parts + (1 if part < used % parts else 0))
        for software, used in pairs
        for part in range(parts)
    ]
    assert make_record("c:1", "u", "p", cut) == make_record("c:1", "u", "p", pairs)


def test_the_digest_is_that_of_the_content() -> None:
    def one(name: str, usage: str = "100.00") -> str:
        return Record("c:1", (Entry(name, "", "", user_provided=False, usage=usage),)).digest

    assert one("A") == one("A")
    assert len({one("A"), one("B"), one("A", "99.99"), Record("c:2", ()).digest}) == 4


@pytest.mark.parametrize(
    "change",
    [
        ("<sa:Name>A</sa:Name>", "<sa:Name/>"),
        ("<sa:Usage>100.00</sa:Usage>", "<sa:Usage>100</sa:Usage>"),
        ("<sa:Usage>100.00</sa:Usage>", "<sa:Usage>101.00</sa:Usage>"),
        (">false<", ">0<"),
        ("sa:recordId", "recordId"),
        ('Z"', '"'),
        ("2019/01", "2019/02"),
        ("<sa:Version>1</sa:Version>", ""),
    ],
)  # fmt: skip
def test_the_schema_refuses_what_is_wrong(change: tuple[str, str]) -> None:
    record = make_record("c:1", None, None, [(NAMES["A"], 1)])
    assert record is not None
    good = document([record], 0).decode()
    bad = good.replace(*change)
    assert bad != good
    assert SCHEMA.validate(etree.fromstring(good.encode()))
    assert not SCHEMA.validate(etree.fromstring(bad.encode()))
