"""A configuration that is wrong is refused with one line that names the key and the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pki
import pytest
import yaml
from receiving import private

from sams_ebpf.errors import UsageError
from sams_receiver import auth, config, listening
from sams_receiver.metrics import Metrics

GOOD: dict[str, Any] = {
    "archive": "/a",
    "tokens_file": "/t",
    "listen": [{"address": "127.0.0.1:8080"}],
}


def load(tmp_path: Path, **changes: Any) -> config.Receiver:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"receiver": GOOD | changes}))
    return config.load(path)


def test_defaults(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert loaded.node_binding
    assert loaded.listen[0].tcp == ("127.0.0.1", 8080)
    assert load(tmp_path, listen=[{"address": "[::1]:1"}]).listen[0].tcp == ("::1", 1)
    assert load(tmp_path, listen=[{"address": "unix:/x"}]).listen[0].unix == Path("/x")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"archiv": "/b"}, "unknown key; did you mean 'archive'"),
        ({"archive": "archive"}, "receiver.archive: archive: has to start with a slash"),
        ({"cluster": "a/b"}, "receiver.cluster: 'a/b': only letters"),
        (
            {"names": [{"match": "(?P<node>.*)", "cluster": "a b"}]},
            r"receiver\.names\[0\]\.cluster: 'a b': only letters",
        ),
        ({"listen": []}, "listen"),
        ({"listen": [{"address": "8080"}]}, "write host:port"),
        ({"listen": [{"address": "127.0.0.1:99999"}]}, "write host:port"),
        ({"listen": [{"address": "0.0.0.0:8080"}]}, "in the clear"),
        ({"listen": [{"address": "sams.example.org:80"}]}, "in the clear"),
        ({"listen": [{"address": "127.0.0.1:1", "proxy": {}}]}, "any local user"),
        ({"listen": [{"address": "unix:/x", "mode": "rw"}]}, "write it as '0660'"),
        ({"listen": [{"address": "unix:x"}]}, "unix:x: has to be unix:/path"),
        ({"listen": [{"address": f"unix:/{'x' * 107}"}]}, "at most 107 bytes"),
        ({"tokens_file": None}, "nobody could get in"),
        (
            {"listen": [{"address": "h:1", "tls": {"certificate": "c", "key": "k", "crl": "l"}}]},
            r"listen\[0\]\.tls\.crl: without client_ca",
        ),
        ({"names": [{"match": "(x"}]}, "not a regular expression"),
        ({"names": [{"match": "(?P<node>a{99999999999})"}]}, "not a regular expression"),
        ({"names": [{"match": "x"}]}, "has no group"),
        ({"limits": {"batch_bytes": 1 << 40}}, "batch_bytes"),
        ({"partitions": 0}, "partitions"),
    ],
)
def test_refuses(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        load(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "receiver" in str(caught.value)


def test_a_file_without_the_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("site: {}\n")
    with pytest.raises(UsageError, match="no section 'receiver'"):
        config.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("n1\n", ":1: not NAME SECRET"),
        ("# c\nn1 tooshort\n", ":2: not NAME SECRET"),
        (f"n1 {'a' * 64} tomorrow\n", "not a time"),
        (f"n1 {'a' * 64} 2027-01-01 x\n", "not NAME SECRET"),
    ],
)
def test_refuses_credentials(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        auth.read_credentials(private(tmp_path / "t", text), auth.TOKEN)


def test_refuses_secrets_that_others_can_read(tmp_path: Path) -> None:
    path = private(tmp_path / "s", "x" * 64)
    assert auth.read_proxy_secret(path) == b"x" * 64
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod"):
        auth.read_proxy_secret(path)
    with pytest.raises(UsageError, match="fewer than 32"):
        auth.read_proxy_secret(private(tmp_path / "short", "abc"))


def test_refuses_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    ca = pki.authority(tmp_path, "ca")
    key = tmp_path / "ca.key"
    listening.tls_context(config.Tls(certificate=ca, key=key, client_ca=ca))
    key.chmod(0o644)
    with pytest.raises(UsageError, match="chmod"):
        listening.tls_context(config.Tls(certificate=ca, key=key))
    key.chmod(0o600)
    with pytest.raises(UsageError, match="cannot be used"):
        listening.tls_context(config.Tls(certificate=key, key=key))
    with pytest.raises(UsageError, match="cannot be used"):
        listening.tls_context(config.Tls(certificate=ca, key=key, client_ca=tmp_path / "none"))


def test_names_must_fit_as_a_whole() -> None:
    rules = [config.NameRule(match=r"(?P<node>n\d+)\.x\.org", cluster="c1")]
    names = auth.Names(rules, binding=True)
    assert names.client(["n1.x.org"], "token").node == "n1"
    assert names.client(["www", "n2.x.org"], "certificate").cluster == "c1"
    for wrong in ("n1.x.org.evil.com", "evil-n1.x.org", "n1xxorg\n", ""):
        with pytest.raises(auth.DeniedError):
            names.client([wrong], "token")


def test_every_key_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "receiver.md").read_text()
    structs = (
        config.Receiver,
        config.Listener,
        config.Tls,
        config.Proxy,
        config.NameRule,
        config.Limits,
        config.Quotas,
        config.Segments,
    )
    for struct in structs:
        for name in struct.__struct_fields__:
            assert re.search(rf"[`.]{name}[`.]", text), f"{struct.__name__}.{name}"


def test_the_metrics_to_watch_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "receiver.md").read_text()
    table = text[text.index("| metric (") : text.index("## When something is wrong")]
    shown = Metrics().text().decode()
    named = re.findall(r"`([a-z_]+)(?:\{[^`]*)?`", table)
    assert len(named) >= 8
    for name in named:
        if name != "up":
            assert f"sams_receiver_{name}" in shown
