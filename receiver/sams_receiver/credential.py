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
    expires = None
    if arguments.expires is not None:
        try:
            # As one word: "2027-01-31 00:00" would be two in the file.
            expires = datetime.fromisoformat(arguments.expires).isoformat()
        except ValueError as error:
            raise UsageError(f"--expires {arguments.expires}: not a time") from error
    if arguments.kind == "token":
        token = secrets.token_urlsafe(32)
        print(f"token for {name}: {token}", file=sys.stderr)
        hashed = auth.hash_token(token)
    else:
        password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
        if not _MIN_PASSWORD <= len(password) <= auth.MAX_PASSWORD:
            most = auth.MAX_PASSWORD
            raise UsageError(f"a password has {_MIN_PASSWORD} to {most} characters")
        try:
            hashed = auth.hash_password(password)
        except UnicodeEncodeError as error:
            raise UsageError("the password is not UTF-8 text") from error
    print(" ".join(filter(None, (name, hashed, expires))))
    return 0
