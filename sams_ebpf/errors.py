"""Errors with an exit status; each message is one line: what, where, what to do."""

from __future__ import annotations


class SamsError(Exception):
    """Anything a program of this product reports to its user in one line."""

    exit_status = 1


class UsageError(SamsError):
    """A command line or a configuration that cannot be followed."""

    exit_status = 2


class NotPossibleError(SamsError):
    """This host cannot do it in the mode that was asked for."""

    exit_status = 3


class PartialError(SamsError):
    """Done, but something was lost or set aside; the message says what."""

    exit_status = 4
