"""`sams-receiver credential`: secrets are made here, so that nobody makes weak ones."""

from __future__ import annotations

import argparse
import getpass
import re
import secrets
import sys
from datetime import datetime

from sams_ebpf.errors import UsageError
from sams_receiver import auth

_MIN_PASSWORD = 12


def command(arguments: argparse.Namespace) -> int:
    """Print one line for the file; the secret itself is stored nowhere."""
    name: str = arguments.name
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,254}", name) is None:
        raise UsageError(f"{name!r}: only letters, digits, '.', '_', '@', '-'")
    if arguments.expires is not None:
        try:
            datetime.fromisoformat(arguments.expires)
        except ValueError as error:
            raise UsageError(f"--expires {arguments.expires}: not a time") from error
    if arguments.kind == "token":
        token = secrets.token_urlsafe(32)
        print(f"token for {name}: {token}", file=sys.stderr)
        hashed = auth.hash_token(token)
    else:
        password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
        if len(password) < _MIN_PASSWORD:
            raise UsageError(f"a password of fewer than {_MIN_PASSWORD} characters")
        hashed = auth.hash_password(password)
    print(" ".join(filter(None, (name, hashed, arguments.expires))))
    return 0
