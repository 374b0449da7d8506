"""The door by itself: what was good once is not good for ever."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from receiving import private

from sams_receiver import auth, config

GOOD, OTHER = "g" * 40, "o" * 40


def door(folder: Path, **settings: str) -> auth.Door:
    """A door with the files named."""
    file = folder / "config.yaml"
    section = {
        "archive": str(folder / "archive"),
        "listen": [{"address": "127.0.0.1:0"}],
        **settings,
    }
    file.write_text(yaml.safe_dump({"receiver": section}))
    return auth.Door(config.load(file), lambda *_: None)


def tokens(path: Path, *lines: str) -> Path:
    """Replace a tokens file as an editor does."""
    new = private(path.with_suffix(".new"), "".join(f"{line}\n" for line in lines))
    return new.replace(path)


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_RELOAD_SECONDS", 0.0)


@pytest.mark.usefixtures("_at_once")
def test_a_file_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a token revoked in that moment would stay good until the next change."""
    path = tokens(tmp_path / "tokens", f"n1 {auth.hash_token(GOOD)}")
    read = auth.read_credentials

    def slow(*arguments: object) -> list[auth.Credential]:
        found = read(*arguments)  # type: ignore[arg-type]
        tokens(path, f"n2 {auth.hash_token(OTHER)}")
        return found

    monkeypatch.setattr(auth, "read_credentials", slow)
    one = door(tmp_path, tokens_file=str(path))
    monkeypatch.setattr(auth, "read_credentials", read)
    with pytest.raises(auth.DeniedError):
        one.by_token(f"Bearer {GOOD}")
    assert one.by_token(f"Bearer {OTHER}").client.node == "n2"


@pytest.mark.usefixtures("_at_once")
def test_what_a_connection_was_let_in_by_has_to_hold(tmp_path: Path) -> None:
    """The same header again, the same line of the file, and not expired."""
    path = tokens(tmp_path / "tokens", f"n1 {auth.hash_token(GOOD)}")
    one = door(tmp_path, tokens_file=str(path))
    held = one.by_token(f"Bearer {GOOD}")
    assert one.again(held, f"Bearer {GOOD}")
    assert not one.again(held, f"Bearer {OTHER}")
    assert not one.again(held, "")
    tokens(path, f"n1 {auth.hash_token(OTHER)}")
    assert not one.again(held, f"Bearer {GOOD}")
    soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    tokens(path, f"n1 {auth.hash_token(GOOD)} {soon}")
    held = one.by_token(f"Bearer {GOOD}")
    assert one.again(held, f"Bearer {GOOD}")
    time.sleep(1.1)
    assert not one.again(held, f"Bearer {GOOD}")


def test_a_certificate_may_expire_while_its_connection_lasts(tmp_path: Path) -> None:
    """It was good in the handshake."""
    file = tokens(tmp_path / "tokens", f"n2 {auth.hash_token(OTHER)}")
    one = door(tmp_path, tokens_file=str(file))
    subject = ((("commonName", "n1"),),)
    good = {"subject": subject, "notAfter": "Jan  1 00:00:00 2999 GMT"}
    client = one.by_certificate(good)
    assert client is not None
    assert client.node == "n1"
    with pytest.raises(auth.DeniedError, match="expired"):
        one.by_certificate({**good, "notAfter": "Jan  1 00:00:00 2020 GMT"})


def test_an_expired_line_hides_no_other(tmp_path: Path) -> None:
    """The same password on two lines, of which one is over."""
    lines = f"u {auth.hash_password('pw')} 2020-01-01\nu {auth.hash_password('pw')}\n"
    one = door(tmp_path, passwords_file=str(private(tmp_path / "passwords", lines)))
    assert one.check_password("u", "pw").name == "u"
    private(tmp_path / "over", f"u {auth.hash_password('pw')} 2020-01-01\n")
    two = door(tmp_path, passwords_file=str(tmp_path / "over"))
    with pytest.raises(auth.DeniedError, match="expired"):
        two.check_password("u", "pw")
