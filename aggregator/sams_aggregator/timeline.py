"""`sams-aggregator timeline`: one job's CPU over its time."""

from __future__ import annotations

import argparse

from sams_aggregator import config as cfg
from sams_aggregator import job, manifest, report, show
from sams_aggregator import state as st
from sams_aggregator.manifest import Store
from sams_ebpf.errors import SamsError


def command(arguments: argparse.Namespace) -> int:
    """`timeline`."""
    config = cfg.load(arguments)
    state = st.open_existing(config.aggregator)
    try:
        view = manifest.read(Store(state, config.aggregator.data))
        found = job.timeline(view, report.site_of(config), arguments.job, arguments.cluster)
    finally:
        state.close()
    if not found.rows:
        raise SamsError(f"job {arguments.job}: no points of it in the facts")
    show.write(found, arguments.format, arguments.output)
    return 0
