"""The node's configuration: what is documented is what there is; what is wrong is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from sams_ebpf import config
from sams_ebpf.errors import UsageError

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
SECTIONS: dict[str, type[msgspec.Struct]] = {
    "site": config.Site,
    "collector": config.Collector,
    "collector.sams_json": config.SamsJson,
    "spool": config.Spool,
    "ship": config.Ship,
    "ship.receivers": config.Receiver,
}


def documented() -> dict[str, dict[str, str]]:
    """Section → key → default, as the page's tables have them."""
    found: dict[str, dict[str, str]] = {}
    rows: dict[str, str] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            rows = found[line.removeprefix("## ")] = {}
        elif match := re.fullmatch(r"\| `(\w+)` \| (`.*?`|required) \| (.+) \|", line):
            rows[match[1]] = match[2].strip("`")
    return found


def actual(model: type[msgspec.Struct]) -> dict[str, str]:
    defaults = {}
    for field in msgspec.structs.fields(model):
        if field.required:
            defaults[field.encode_name] = "required"
            continue
        value = (
            field.default_factory()
            if field.default_factory is not msgspec.NODEFAULT
            else field.default
        )
        defaults[field.encode_name] = json.dumps(msgspec.to_builtins(value, enc_hook=str))
    return defaults


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_has_every_key_with_its_default(section: str) -> None:
    assert documented()[section] == actual(SECTIONS[section])


def test_the_page_s_example_is_valid(tmp_path: Path) -> None:
    lines = PAGE.read_text().splitlines()
    example = [line[4:] for line in lines if line.startswith("    ")]
    file = tmp_path / "c.yaml"
    file.write_text("\n".join(example))
    assert config.load(file).ship.receivers["main"].required


def test_no_file_means_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "absent.yaml")
    assert config.load(None) == config.Config()
    config.DEFAULT_FILE.write_text("collector: {interval_s: 5}")
    assert config.load(None).collector.interval_s == 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("collectr: {}", "collectr: unknown section; did you mean 'collector'?"),
        ("collector: {intervall_s: 1}", "did you mean 'interval_s'?"),
        ("collector: {interval_s: often}", "collector.interval_s: Expected `float`, got `str`"),
        ("collector: {interval_s: 0}", "collector.interval_s"),
        ("collector: {state: here}", "collector: state: 'here' has to be an absolute path"),
        ("collector: {sams_json: {}}", "base_path"),
        ("collector: {sams_json: {base_path: /x, file_pattern: '%(job)s'}}", "file_pattern"),
        ("collector: {sams_json: {base_path: /x, file_pattern: 'a/%(jobid)s'}}", "no slash"),
        ("spool: {folder: ../x}", "absolute"),
        ("ship: {receivers: {a: {url: 'http://h/'}}}", "not encrypted"),
        ("ship: {receivers: {a: {url: 'http://127.evil.org/'}}}", "not encrypted"),
        ("ship: {receivers: {a: {url: 'ftp://h/'}}}", "has to be https://"),
        ("ship: {receivers: {a: {url: 'https://u:p@h/'}}}", "no user"),
        ("ship: {receivers: {a: {url: 'https://h:x/'}}}", "url"),
        ("ship: {receivers: {a: {url: 'https://h', requird: 1}}}", "did you mean 'required'?"),
        ("ship: {receivers: {A: {url: 'https://h'}}}", "ship"),
        ("ship: {receivers: {a: {url: 'https://h', required: false}}}", "at least one"),
        ("ship: {receivers: {a: {url: 'https://h', proxy: nonsense}}}", "proxy: has to be"),
        ("ship: {receivers: {a: {url: 'https://h', proxy: 'socks5://p:1'}}}", "proxy: has to be"),
        ("ship: {receivers: {a: {url: 'https://h', proxy: 'http://p:x'}}}", "proxy: Port"),
        ("ship: {receivers: {a: {url: 'https://h', client_key: /k}}}", "go together"),
        ("ship: {receivers: {a: {url: 'https://h', token_file: /t, basic_file: /b}}}", "exclude"),
        ("site: {cluster: my cluster}", "site: cluster: 'my cluster': only letters"),
        ("site: {node: ../n1}", "site: node: '../n1': only letters"),
        ("site: [1", "not valid YAML"),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        config.load(file)
    assert reason in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]"])
def test_plain_http_to_this_machine_is_allowed(host: str) -> None:
    assert config.Receiver(url=f"http://{host}:8080").url


def test_names_the_member_of_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for bad, reason in (
        ("x: {url: 'ftp://h/'}", r"c.yaml: ship\.receivers\.x: url: has to be https://"),
        ("x: {urll: 'https://h/'}", r"c.yaml: ship\.receivers\.x\.urll: unknown key; did you"),
        ("../x: {url: 'https://h/'}", r"c.yaml: ship\.receivers: a name in it does not fit: "),
    ):
        file.write_text(f"ship: {{receivers: {{good: {{url: 'https://h/'}}, {bad}}}}}")
        with pytest.raises(UsageError, match=reason):
            config.load(file)


def test_the_node_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert "." not in config.Site().node_name()
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert config.Site().node_name() == "n7"
    assert config.Site(node="n8").node_name() == "n8"
