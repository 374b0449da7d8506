"""The benchmarks' document: what was written is taken apart again, section by section."""

from __future__ import annotations

from bench.section import Section, Table, join, split

SECTION = Section(
    title="A | B",
    method="Ten runs.",
    tables=[Table(("what", "ns"), [("x | y", 1234), ("z", None), ("w", 0.5)])],
    remarks=["noisy"],
)


def test_a_section_is_replaced_and_the_others_stay() -> None:
    first = join("# Head\n", {"one": "## One\n\ntext", "two": SECTION.render()})
    assert first.startswith("# Head\n")
    again = split(first) | {"one": "## New"}
    assert split(join("# Head", again)) == {"one": "## New", "two": SECTION.render()}


def test_what_was_not_measured_is_a_dash_and_bars_do_not_break_a_table() -> None:
    rows = SECTION.render().splitlines()
    assert "| x \\| y | 1,234 |" in rows
    assert "| z | - |" in rows
    assert "| w | 0.5 |" in rows
