"""A partition for a while, and a link that loses 30 % each way: all batches get there."""

from __future__ import annotations

import time
from pathlib import Path

import netns
import pytest
from shipping import Receiver, configure, fill, service, until, waiting

pytestmark = pytest.mark.system

SPOOL_BYTES = 4 << 20


@pytest.mark.timeout(600)
def test_partition_and_loss(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    with netns.link() as link:
        receiver = Receiver(address=link.server_address)
        link.inside_server(receiver.start)
        config = configure(
            tmp_path / "c.yaml",
            folder,
            {"main": {"url": receiver.url, "allow_plain": True}},
            spool={"max_bytes": SPOOL_BYTES},
        )
        sent = []
        with service(config, "ip", "netns", "exec", link.node, log=tmp_path / "log"):
            link.lose(0.3)
            sent += fill(folder, 80)
            until(lambda: len(receiver.stored) >= 60, 200)
            assert link.lost() > 0
            link.cut()
            sent += fill(folder, 60, first=80)
            stored = len(receiver.stored)
            # Longer than every time-out of the shipper.
            time.sleep(5)
            assert len(receiver.stored) <= stored + 1
            assert 60 <= len(waiting(folder)) <= 140
            link.restore()
            sent += fill(folder, 60, first=140)
            assert 4096 * len(waiting(folder)) <= SPOOL_BYTES
            until(lambda: not waiting(folder), 300)
        receiver.stop()
    assert sorted(receiver.stored) == sorted(sent)
    assert len(sent) == 200
    assert receiver.conflicts == 0
    assert not list((folder / "rejected").iterdir())
