"""`sams-ebpf check-config`: tells whether a configuration is good for this node."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

from sams_ebpf import config, post
from sams_ebpf.errors import UsageError

log = logging.getLogger(__name__)


def command(arguments: argparse.Namespace) -> int:
    """Read the configuration as the programs of a node do; complain in one line per fault."""
    path: Path | None = arguments.config
    found = config.load(path)
    faults = list(_files(found.ship))
    for fault in faults:
        log.error("%s", fault)
    shown = path or config.DEFAULT_FILE
    if faults:
        raise UsageError(f"{shown}: {len(faults)} of the files it names cannot be used")
    print(f"{shown if path or shown.exists() else 'no file, defaults'}: good")
    return 0


def _files(ship: config.Ship) -> Iterator[str]:
    """Tell which of the files that receivers need are not what they have to be."""
    for name, receiver in ship.receivers.items():
        fault = post.unusable(receiver)
        if fault is not None:
            yield f"ship.receivers.{name}: {fault}"
        try:
            post.credentials(receiver)
        except UsageError as error:
            yield f"ship.receivers.{name}: {error}"
