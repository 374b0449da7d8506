"""Rules: against cases worked out by hand, against the plain loop, and under attack."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rules_reference import Reference

from sams_aggregator import regexps, rules
from sams_aggregator.globs import compile_glob
from sams_aggregator.rules import Rules, RulesError, Software
from sams_ebpf.errors import UsageError

BLOCKS = yaml.safe_load((Path(__file__).parent / "rules_cases.yaml").read_text())


def as_bytes(path: str) -> bytes:
    if path.startswith("<"):
        return bytes.fromhex(re.sub(r"[<>\\x]", "", path))
    return path.encode()


def as_software(expected: list[str] | None) -> Software | None:
    if expected is None:
        return None
    software, version, local, flags = expected
    return Software(software, version, local, "u" in flags, "i" in flags)


CASES = [
    pytest.param(block["config"], path, expected, id=f"{block['name']}: {path!a}")
    for block in BLOCKS
    for path, expected in block["cases"].items()
]


@pytest.mark.parametrize(("config", "path", "expected"), CASES)
def test_by_hand(config: dict[str, Any], path: str, expected: list[str] | None) -> None:
    made = Rules.from_config(config, "rules")
    assert made.map(as_bytes(path)) == as_software(expected)
    explained = made.explain(as_bytes(path))
    assert (explained and explained.result) == as_software(expected)


def test_by_hand_all_at_once() -> None:
    """The same through what is remembered from one path to the next."""
    assert len(CASES) >= 300
    for block in BLOCKS:
        made = Rules.from_config(block["config"], block["name"])
        expected = {as_bytes(p): as_software(e) for p, e in block["cases"].items()}
        twice = [*expected, *reversed(expected)]
        assert made.map_many(twice) == [expected[path] for path in twice]


GLOBS = """
    *           |                         y
    *           | /usr/bin/gcc            y
    /usr/*      | /usr/bin/gcc            y
    /usr/*      | /usr/                   y
    /usr/*      | /usr                    n
    /usr/?      | /usr/b                  y
    /usr/?      | /usr//                  y
    /usr/?      | /usr/bi                 n
    */gcc       | /usr/bin/gcc            y
    */gcc       | /usr/bin/gcc-12         n
    */gcc*      | /usr/bin/gcc-12         y
    *gcc*bin*   | /usr/bin/gcc            n
    *bin*gcc*   | /usr/bin/gcc            y
    [ab]x       | ax                      y
    [ab]x       | cx                      n
    [^ab]x      | cx                      y
    [^ab]x      | ax                      n
    [!ab]x      | !x                      y
    [!ab]x      | cx                      n
    [a-c]       | b                       y
    [a-c]       | d                       n
    [c-a]       | b                       n
    [a-]        | -                       y
    [-a]        | -                       y
    []a]        | ]                       y
    []a]        | a                       y
    [^]a]       | b                       y
    [^]a]       | ]                       n
    [a          | a                       n
    [a          | [a                      n
    a]          | a]                      y
    a[*]b       | a*b                     y
    a[*]b       | axb                     n
    a[?]b       | a?b                     y
    GROMACS     | GROMACS                 y
    GROMACS     | gromacs                 n
    GROMACS     | GROMACS2                n
    GRO*        | GROMACS                 y
    a.c         | abc                     n
    a.c         | a.c                     y
    a+          | aa                      n
    (a|b)       | a                       n
    ^a$         | a                       n
    **          | x                       y
    *?          |                         n
    ?*          | x                       y
    é?          | éà                      y
"""
GLOB_CASES = [
    (match[1].strip(), match[2].strip(), match[3] == "y")
    for line in GLOBS.strip().splitlines()
    if (match := re.fullmatch(r"(.*?)\|(.*)([yn])", line))
]


@pytest.mark.parametrize(("pattern", "text", "expected"), GLOB_CASES)
def test_globs_by_hand(pattern: str, text: str, expected: bool) -> None:
    assert (compile_glob(pattern).fullmatch(text) is not None) is expected


@settings(max_examples=500, deadline=None)
@given(st.text("ab*?[]^-!.\\\n", max_size=10), st.text("ab[]^-!.\\\n", max_size=8))
def test_globs_are_those_of_sqlite(pattern: str, text: str) -> None:
    with sqlite3.connect(":memory:") as database:
        theirs = database.execute("SELECT ? GLOB ?", (text, pattern)).fetchone()[0]
    assert (compile_glob(pattern).fullmatch(text) is not None) == bool(theirs)


def test_a_glob_cannot_be_made_to_take_for_ever() -> None:
    pattern = compile_glob("*a" * 40 + "b")
    assert pattern.fullmatch("a" * 20_000) is None


# ------------------------------------------------------------------ against the plain loop

PIECES = [
    "/", "a", "b", "1", "2", ".", r"\.", "[^/]+", "[^/]*", r"\d+", r"\w", r"\w+", r"\s", r"\S+",
    r"\D", r"\W", "(?P<x>[^/]+)", r"(?P<y>\d+)?", "(?:a|ab)", "(?:b|)", "a{2}", "b{,2}", "[ab]?",
    "$", r"\Z", r"\b", ".*", ".+?", "(?i:AB)", "[a-c1]", "[^a]", "é", r"[\d.]+", "(?=a)", "(?!b)",
    "(?:a1)*", "(?:[ab]/)+",
]  # fmt: skip
patterns = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
texts = st.text("/ab12. \nAé٣_-%", max_size=14)


def templates(pattern: str) -> st.SearchStrategy[str]:
    names = list(re.compile(pattern).groupindex)
    return st.sampled_from(["", "s", "%%(user)s", *(f"%({name})s-" for name in names)])


@st.composite
def rule(draw: st.DrawFn) -> dict[str, Any]:
    pattern = draw(patterns.filter(compiles))
    return {
        "match": draw(st.sampled_from(["", "^", "(?i)^"])) + pattern,
        **{name: draw(templates(pattern)) for name in ("software", "version", "versionstr")},
        "user_provided": draw(st.booleans()),
        "ignore": draw(st.booleans()),
    }


def compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


REWRITES: list[dict[str, Any]] = [
    {"match": {"software": "s"}, "update": {"version": "%(software)s%(version)s"}},
    {"match": {"version": r"(?P<v>\d+)(?P<w>x)?"}, "update": {"versionstr": "%(v)s %(w)s"}},
    {"match": {"software": "", "versionstr": "[^/]*"}, "update": {"software": "q%(versionstr)s"}},
]
documents = st.fixed_dictionaries(
    {
        "rules": st.lists(rule(), max_size=6),
        "rewrite": st.lists(st.sampled_from(REWRITES), max_size=3),
        "stop_on_rewrite_match": st.booleans(),
    }
)


@settings(max_examples=400, deadline=None)
@given(documents, st.lists(texts, min_size=1, max_size=12))
def test_same_as_the_loop(document: dict[str, Any], names: list[str]) -> None:
    made = Rules.from_config(document, "rules")
    reference = Reference(document)
    paths = [name.encode() for name in names]
    assert made.map_many(paths) == [reference.map(path) for path in paths]


@settings(max_examples=400, deadline=None)
@given(patterns.filter(compiles), st.lists(texts.filter(str.isprintable), max_size=10))
def test_the_filter_never_hides_a_match(pattern: str, names: list[str]) -> None:
    """Not through the rules, which would look again: the RE2 pattern by itself."""
    translated = regexps.to_re2(pattern)
    if translated is None:
        return
    import re2  # noqa: PLC0415

    compiled = re2.compile(translated)
    for name in names:
        if name.isascii() and re.match(pattern, name):
            assert compiled.match(name), (pattern, translated, name)


def test_usual_patterns_are_filtered() -> None:
    """Else the comparisons above would compare the loop with itself."""
    for block in BLOCKS:
        if block["name"] == "the rules that SAMS shows as its example":
            made = Rules.from_config(block["config"], "rules")
            assert all(regexps.to_re2(rule.pattern) for rule in made.rules)
            assert not any(rule.risky for rule in made.rules)
            return
    pytest.fail("the block has another name now")


@pytest.mark.parametrize(
    "pattern", ["(?=a)b", r"a\B", "(?P<a>b)(?P=a)", "(?>a)", "a++", "é", "[à-é]", "(a|b){1001}"]
)
def test_what_is_not_sure_is_not_filtered(pattern: str) -> None:
    assert regexps.to_re2(pattern) is None


def test_an_automaton_that_gives_up_hides_nothing() -> None:
    """RE2 says no match at all when it runs out of memory."""

    class GaveUp:
        def Match(self, _text: bytes | str) -> None:  # noqa: N802
            return None

    made = Rules.from_config(BLOCKS[0]["config"], "rules")
    made._filter = GaveUp()  # type: ignore[assignment]
    assert made.map(b"/usr/bin/gcc") == Software("A", "1", "a")
    assert made.map(b"/none") is None


# ------------------------------------------------------------------ hostile paths

CATASTROPHIC = [
    ("^/e/(?:a+)+$", b"/e/" + b"a" * 40 + b"b"),
    ("^/e/(?:a|a)*$", b"/e/" + b"a" * 40 + b"b"),
    ("^/e/(?:a|aa)+$", b"/e/" + b"a" * 60 + b"b"),
    (r"^/e/(?:[^/]+)*/x$", b"/e/" + b"a" * 40 + b"b"),
    (r"^/e/(?:\w+\s?)*$", b"/e/" + b"a" * 40 + b"!"),
    (r"^/e/(?:a?){40}a{40}$", b"/e/" + b"a" * 39),
    (r"^/e/.*x.*x.*x.*x.*x.*y$", b"/e/" + b"x" * 400),
    ("^/e/(?P<a>(?:a+)+)(?=b)$", b"/e/" + b"a" * 40),
    ("(?i)^/e/(?:a+)+$", b"/e/" + b"aA" * 20 + b"b"),
]


@pytest.mark.parametrize(("pattern", "path"), CATASTROPHIC)
@pytest.mark.parametrize("beyond", [b"", "é".encode()], ids=["plain", "unicode"])
def test_a_catastrophic_pattern_ends(pattern: str, path: bytes, beyond: bytes) -> None:
    """Either RE2 tells beforehand that nothing matches, or the time is up; later paths go on."""
    document = {
        "rules": [
            {"match": pattern, "software": "e", "version": "", "versionstr": ""},
            {"match": "^/", "software": "rest", "version": "", "versionstr": ""},
        ]
    }
    made = Rules.from_config(document, "rules")
    made._limit_s = 0.02
    late: list[tuple[bytes, int]] = []
    hostile = path[:-1] + beyond + path[-1:]
    first, second = made.map_many([hostile, b"/x"], lambda p, rule: late.append((p, rule)))
    assert second == Software("rest", "", "")
    if late:
        assert late == [(hostile, 1)]
        assert first is None
    else:
        assert first == Software("rest", "", "")
    if beyond and "(?=b)" not in pattern:
        assert not regexps.is_linear(pattern)


def test_time_is_limited_in_rewrites_too() -> None:
    document = {
        "rules": [{"match": "^/(?P<s>.*)", "software": "%(s)s", "version": "", "versionstr": ""}],
        "rewrite": [{"match": {"software": "(?:a+)+$"}, "update": {"version": "1"}}],
    }
    made = Rules.from_config(document, "rules")
    made._limit_s = 0.02
    late: list[int] = []
    result = made.map_many([b"/" + b"a" * 50 + b"b", b"/aa"], lambda _, n: late.append(n))
    assert result == [None, Software("aa", "1", "")]
    assert late == [1]


def test_explain_says_which_rule_is_too_slow() -> None:
    document = {"rules": [{"match": "^(?:é+)+$", "software": "", "version": "", "versionstr": ""}]}
    made = Rules.from_config(document, "rules")
    made._limit_s = 0.02
    with pytest.raises(RulesError, match="rule 1: takes longer"):
        made.explain(("é" * 40 + "b").encode())


LINEAR = [
    "^/usr/", "", "^/(?P<p>s?bin)/", r"^/sw/(?P<s>[^/]+)/(?P<v>\d+)(?P<r>\.\d+)?(?P<m>\.\d+)?/",
    "^/home/./(?P<u>[^/]+)/", "^.*$", r"^(?P<n>\d+\.\d+)[^\d]", r"(?:[^/]+/)*", r"\d+(?:\.\d+)*$",
    "(?:ab|cd)*e", "a?b?c?", r"\w+\W+\w+",
]  # fmt: skip
NOT_LINEAR = [
    "(?:[^/]+/)*x",
    "(?:a+)+", "(?:a|a)*b", ".*a.*b", "[^/]*[^/]*x", "(?:a*)*", r"\w+\d+x", "a*ab", "(?:.|b)*c",
    "(?:a?b?)*c", "(?:ab|a)*bc", r"(?i)[k]+\u212a", "(?=a*)b", r"(a)\1", r"\S+[^/]+x", "(?:é|è)+é",
]  # fmt: skip


@pytest.mark.parametrize("pattern", LINEAR)
def test_linear(pattern: str) -> None:
    assert regexps.is_linear(pattern)


@pytest.mark.parametrize("pattern", NOT_LINEAR)
def test_not_known_to_be_linear(pattern: str) -> None:
    assert not regexps.is_linear(pattern)


@settings(max_examples=150, deadline=None)
@given(patterns.filter(compiles), st.sampled_from(["a", "1", "ab/", "a1", "/", "a."]))
def test_linear_means_linear(pattern: str, unit: str) -> None:
    """No figures of time: a pattern that is called linear ends at all on a long, near match."""
    if regexps.is_linear(pattern):
        re.match(pattern + "#", unit * 30_000)


def test_another_thread_has_no_limit_and_says_so() -> None:
    document = {
        "rules": [
            {"match": "^/a", "software": "a", "version": "", "versionstr": ""},
            {"match": "^(?:é+)+$", "software": "", "version": "", "versionstr": ""},
        ]
    }
    made = Rules.from_config(document, "rules")
    seen: list[object] = []

    def work() -> None:
        seen.append(made.map(b"/a"))
        try:
            made.map("é".encode())
        except RuntimeError as error:
            seen.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0] == Software("a", "", "")
    assert "main thread" in str(seen[1])


# ------------------------------------------------------------------ what is refused

GOOD = {"match": "^/a/(?P<g>.)", "software": "s", "version": "", "versionstr": ""}
REFUSED = [
    ([], "has to be a mapping"),
    ({"rule": []}, "rule: unknown key"),
    ({"rules": {}}, "rules: has to be a list"),
    ({"rules": ["x"]}, "rule 1: has to be a mapping"),
    ({"rules": [GOOD, GOOD | {"match": "(a"}]}, "rule 2: match: broken regexp '(a'"),
    ({"rules": [GOOD | {"match": "a{2,1}"}]}, "rule 1: match: broken regexp"),
    ({"rules": [GOOD | {"match": "(?P<a>x)(?P<a>y)"}]}, "rule 1: match: broken regexp"),
    ({"rules": [GOOD | {"match": None}]}, "rule 1: match: has to be text"),
    ({"rules": [GOOD | {"version": 3.12}]}, "rule 1: version: has to be text; put 3.12 in quotes"),
    ({"rules": [GOOD | {"version": None}]}, "rule 1: version: has to be text"),
    ({"rules": [GOOD | {"software": "a\ud800"}]}, r"rule 1: software: 'a\ud800' is no text"),
    ({"rules": [{"match": "^/"}]}, "rule 1: has no 'software'"),
    ({"rules": [GOOD | {"ignroe": True}]}, "rule 1: ignroe: unknown key"),
    ({"rules": [GOOD | {"ignore": "maybe"}]}, "rule 1: ignore: has to be true or false"),
    ({"rules": [GOOD | {"software": "%(h)s"}]}, "rule 1: software: no group 'h'"),
    ({"rules": [GOOD | {"software": "100%"}]}, "rule 1: software: a '%' in '100%'"),
    ({"rules": [GOOD | {"software": "%s"}]}, "rule 1: software: a '%' in '%s'"),
    ({"rules": [GOOD | {"software": "%(g)d"}]}, "rule 1: software: a '%' in '%(g)d'"),
    ({"rewrite": [3]}, "rewrite 1: has to be a mapping"),
    ({"rewrite": [{"match": [], "update": {}}]}, "rewrite 1: match: has to be a mapping"),
    ({"rewrite": [{"match": {"name": "a"}}]}, "rewrite 1: match: name: unknown key"),
    (
        {"rewrite": [{"match": {"version": "["}, "update": {"version": "a"}}]},
        "rewrite 1: match: version: broken regexp '['",
    ),
    (
        {"rewrite": [{"match": {"version": "a"}, "update": {"version": "%(b)s"}}]},
        "rewrite 1: update: version: no group 'b'",
    ),
    ({"stop_on_rewrite_match": "often"}, "stop_on_rewrite_match: has to be true or false"),
]


@pytest.mark.parametrize(("document", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refused_in_one_line(document: object, text: str) -> None:
    with pytest.raises(RulesError) as caught:
        Rules.from_config(document, "site.yaml")
    assert str(caught.value).startswith(f"site.yaml: {text}")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_file_is_named_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "sams.software.Regexp:\n"
        "  rules:\n"
        "    - match: ^/a\n"
        "      software: a\n"
        "      version: ''\n"
        "      versionstr: ''\n"
        "    - match: ^/b\n"
        "      software: b\n"
        "      version: 1.0\n"
        "      versionstr: ''\n"
        "    - software: c\n"
        "      version: ''\n"
        "      versionstr: ''\n"
        "      match: '^/(c'\n"
    )
    with pytest.raises(RulesError, match=re.escape(f"{file}:9: rule 2: version: has to be text")):
        Rules.from_file(file)
    file.write_text(file.read_text().replace("1.0", "'1.0'"))
    with pytest.raises(RulesError, match=re.escape(f"{file}:14: rule 3: match: broken regexp")):
        Rules.from_file(file)
    file.write_text("rules: [\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        Rules.from_file(file)
    with pytest.raises(UsageError, match="cannot be read"):
        Rules.from_file(tmp_path / "none.yaml")


def test_useless_rewrites_are_pointed_out() -> None:
    made = Rules.from_config({"rewrite": [{"update": {"software": "b"}}]}, "site.yaml")
    assert made.warnings == ("site.yaml: rewrite 1: no match: it does nothing",)


# ------------------------------------------------------------------ version and findings


def test_version_is_that_of_the_content() -> None:
    text = yaml.safe_dump({"rules": [GOOD], "stop_on_rewrite_match": False})
    made = Rules.from_config({"rules": [GOOD]}, "a")
    assert made.version == Rules.from_config(yaml.safe_load(text), "b").version
    assert made.version == "0a1fc575a69597fbd60b381cd55e25f0"
    others: list[dict[str, Any]] = [
        {"rules": [GOOD | {"software": "t"}]},
        {"rules": [GOOD | {"ignore": True}]},
        {"rules": [GOOD, GOOD]},
        {"rules": [GOOD], "stop_on_rewrite_match": True},
        {"rules": [GOOD], "rewrite": REWRITES[:1]},
        {"rules": [GOOD], "rewrite": REWRITES[1:]},
    ]
    versions = {made.version} | {Rules.from_config(other, "a").version for other in others}
    assert len(versions) == 1 + len(others)


@settings(max_examples=200, deadline=None)
@given(documents)
def test_the_archived_document_makes_the_same_rules(document: dict[str, Any]) -> None:
    made = Rules.from_config(document, "a")
    kept = json.loads(json.dumps(made.document()))
    assert Rules.from_config(kept, "b").version == made.version


def test_findings() -> None:
    document = {
        "rules": [
            GOOD | {"match": "^/usr/bin/"},
            GOOD | {"match": "^/usr/"},
            GOOD | {"match": "^/usr/lib"},
            GOOD | {"match": "^/opt/"},
            GOOD | {"match": "^/usr/bin/gcc$"},
        ]
    }
    made = Rules.from_config(document, "a")
    found = made.audit([b"/usr/bin/gcc", b"/usr/bin/ld", b"/usr/lib/x", b"/usr/lib/y", b"/etc"])
    assert [finding.rule for finding in found] == [3, 4, 5]
    assert "all 2 paths it matches go to earlier rules, most to rule 2" in found[0].text
    assert "rule 4 matches no path" in found[1].text
    assert "most to rule 1" in found[2].text


def test_results_are_shared() -> None:
    made = Rules.from_config({"rules": [GOOD]}, "a")
    first, second = made.map_many([b"/a/x1", b"/a/y2"])
    assert first is second
    assert rules.TIME_LIMIT_S > 0


# ------------------------------------------------------------------ beginnings that settle

REACH = [
    ("^/usr/", 2, 2),
    ("^/usr", 2, 1),
    ("", 1, 0),
    ("^/home/./(?P<u>[^/]+)/", 5, 2),
    ("^/home/[a-z]/(?P<u>[^/]+)/", 4, 4),
    ("^/sw/(?P<t>[^/]+/[^/]+)/(?P<v>[^/]+)", 5, 4),
    ("^/sw/x(?:/y)?/", 4, 2),
    ("^/a/(?:b/|c)", 4, 2),
    ("^/a/[^x]{2}/", 5, 2),
    ("^/a/.*", 2, 2),
    ("^/a/b$", 3, 2),
    ("^/a/$", 3, 2),
    ("^/a/.*/b/", None, 2),
    ("^/a/.*$", None, 2),
    ("^/a/(?P<r>.*)", None, 2),
    ("^/a/(?:[^/]+/)*b", None, 2),
    ("^/a/(?=b)", None, 0),
    ("(?i)^/A/b/", 3, 3),
]


@pytest.mark.parametrize(("pattern", "needs", "fixed"), REACH)
def test_reach(pattern: str, needs: int | None, fixed: int) -> None:
    found = regexps.reach(pattern)
    assert found.needs == needs
    # A dot takes a slash too: the parts behind it are not where they stand.
    assert len(found.fixed) == fixed


folders = st.lists(st.sampled_from(["a", "b", "ab", "1", "", "A", "a1"]), max_size=5)
endings = st.text("ab1/ .\né\udcff$", max_size=6)


@settings(max_examples=400, deadline=None)
@given(patterns.filter(compiles), folders, st.lists(endings, min_size=1, max_size=6))
def test_nothing_behind_its_reach_matters_to_a_pattern(
    pattern: str, parts: list[str], rests: list[str]
) -> None:
    found = regexps.reach(pattern)
    if found.needs is None:
        return
    beginning = "".join(f"/{part}" for part in parts) + "/"
    if beginning.count("/") < found.needs:
        return
    expected = re.match(pattern, beginning)
    for rest in rests:
        other = re.match(pattern, beginning + rest)
        assert (other and other.groupdict()) == (expected and expected.groupdict())


@settings(max_examples=250, deadline=None)
@given(documents, st.lists(folders, min_size=1, max_size=4), st.lists(endings, max_size=6))
def test_same_as_the_loop_where_paths_begin_alike(
    document: dict[str, Any], beginnings: list[list[str]], rests: list[str]
) -> None:
    made = Rules.from_config(document, "rules")
    reference = Reference(document)
    paths = [
        ("".join(f"/{part}" for part in parts) + rest).encode("utf-8", "surrogateescape")
        for rest in ["/", *rests, "/a/b/1"]
        for parts in beginnings
    ]
    expected = [reference.map(path) for path in paths]
    assert made.map_many(paths) == expected
    assert made.map_many(reversed(paths)) == expected[::-1]


def test_usual_paths_are_settled_by_their_beginning() -> None:
    (block,) = (one for one in BLOCKS if one["name"].startswith("the rules that SAMS shows"))
    made = Rules.from_config(block["config"], "rules")
    paths = [
        f"{folder}/x{n}".encode()
        for n in range(50)
        for folder in (
            "/usr/bin",
            "/home/a/al/b",
            "/cvmfs/ebsw/a/software/Core/R/4.4/bin",
            "/none/a",
        )
    ]
    reference = Reference(block["config"])
    assert made.map_many(paths) == [reference.map(path) for path in paths]
    assert made._beginnings.paths == 200
    assert made._beginnings.misses < 20


def test_beginnings_that_never_come_again_are_given_up() -> None:
    (block,) = (one for one in BLOCKS if one["name"].startswith("the rules that SAMS shows"))
    made = Rules.from_config(block["config"], "rules")
    paths = [f"/home/a/u{n}/x/y".encode() for n in range(60_000)]
    found = made.map_many(paths)
    assert not made._beginnings.useful
    assert [one and one.local_version for one in found] == [f"u{n}" for n in range(60_000)]
