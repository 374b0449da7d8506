"""Two network namespaces with a link between them that can be cut and made lossy."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWNET = 0x40000000


class Link:
    """`node` and `server`: names of the namespaces. 10.99.0.1 is the node, 10.99.0.2 the server."""

    server_address = "10.99.0.2"

    def __init__(self) -> None:
        self.node = f"sams-ship-n{os.getpid()}"
        self.server = f"sams-ship-s{os.getpid()}"

    def make(self) -> None:
        run("ip", "netns", "add", self.node)
        run("ip", "netns", "add", self.server)
        run("ip", "-n", self.node, "link", "add", "veth0", "type", "veth",
            "peer", "name", "veth0", "netns", self.server)  # fmt: skip
        for namespace, address in ((self.node, "10.99.0.1"), (self.server, self.server_address)):
            run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "veth0")
        self.restore()

    def restore(self) -> None:
        """Bring the link up. TCP repeats after 10 ms rather than 200: less to wait for."""
        for namespace in (self.node, self.server):
            run("ip", "-n", namespace, "link", "set", "veth0", "up")
            run("ip", "-n", namespace, "route", "replace", "10.99.0.0/24", "dev", "veth0",
                "rto_min", "10ms")  # fmt: skip

    def cut(self) -> None:
        """Take the link down."""
        run("ip", "-n", self.server, "link", "set", "veth0", "down")

    def lose(self, share: float) -> None:
        """Lose this share of what comes in on either side, at random."""
        for namespace in (self.node, self.server):
            inside = ("ip", "netns", "exec", namespace, "iptables", "-w", "10")
            run(*inside, "-F", "INPUT")
            if share:
                run(*inside, "-A", "INPUT", "-m", "statistic", "--mode", "random",
                    "--probability", str(share), "-j", "DROP")  # fmt: skip

    def lost(self) -> int:
        """Packets lost so far on the server's side."""
        inside = ("ip", "netns", "exec", self.server, "iptables", "-w", "10")
        listing = run(*inside, "-L", "INPUT", "-v", "-x", "-n").splitlines()
        return int(listing[2].split()[0]) if len(listing) > 2 else 0

    def remove(self) -> None:
        for namespace in (self.node, self.server):
            subprocess.run(["ip", "netns", "del", namespace], check=False, timeout=30)


def inside(namespace: Path, work: Callable[[], None]) -> None:
    """Do something in a thread that has moved to a network namespace; what it opens stays there."""
    failed: list[OSError] = []

    def moved() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with namespace.open("rb") as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                failed.append(OSError(ctypes.get_errno(), "setns"))
                return
        work()

    thread = threading.Thread(target=moved)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@contextmanager
def link() -> Iterator[Link]:
    """Make both namespaces, and remove them in the end."""
    made = Link()
    try:
        made.make()
        yield made
    finally:
        made.remove()


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
