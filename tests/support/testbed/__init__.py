"""A node of a site on this machine: systemd as PID 1, Slurm, and the product installed.

`boot()` gives private pid, mount, cgroup, network, ipc and uts namespaces over an
overlay of the host's own root; nothing of what happens inside is left after `stop()`.
What cannot be private is the kernel: BPF programs, and the cgroup trees, in which the
testbed owns one folder per hierarchy.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

Layout = Literal["v1", "v2"]

USER = "hpcu"
UID = 60001
HOST_CGROUPS = Path("/sys/fs/cgroup")
# Overlays need an upper folder outside of the file system they cover.
SCRATCH = Path("/dev/shm")
PREFIX = "sams-testbed-"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class TestbedError(Exception):
    """The testbed itself did not do what a test needs; not a finding about the product."""


def wait_for(what: str, probe: Callable[[], object], *, seconds: float = 20) -> None:
    """Poll `probe` until it gives something true; `what` names it when time is up."""
    end = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > end:
            raise TestbedError(f"waited {seconds} s for {what}")
        time.sleep(0.02)


class Machine:
    """One booted node. Use `boot`."""

    def __init__(self, layout: Layout, *, layer: Path | None, hostname: str = "n1") -> None:
        self.layout = layout
        self.hostname = hostname
        self.name = f"{PREFIX}{os.getpid()}-{time.monotonic_ns() // 1000}"
        self.work = SCRATCH / self.name
        self.work.mkdir(mode=0o755)
        self._cgroups = [folder / self.name for folder in _hierarchies()]
        plan = {
            "work": str(self.work),
            "lower": f"{layer}:/" if layer else "/",
            "upper": str(self.work / "upper"),
            "layout": layout,
            "hostname": hostname,
            "command": ["/lib/systemd/systemd", "--unit=testbed.target", "--show-status=0"],
        }
        try:
            self._make_cgroups()
            self._process = _unshare(plan, self._cgroups)
            self.pid = self._find_init()
            self.root = Path(f"/proc/{self.pid}/root")
            wait_for("systemd", self._is_up)
        except BaseException:
            self.stop()
            raise

    def _make_cgroups(self) -> None:
        for folder in self._cgroups:
            folder.mkdir()
            for knob in ("cpuset.cpus", "cpuset.mems"):
                if (folder / knob).exists():
                    (folder / knob).write_text((folder.parent / knob).read_text())
            if (folder / "cgroup.clone_children").exists() and (folder / "cpuset.cpus").exists():
                (folder / "cgroup.clone_children").write_text("1")
            if (folder / "memory.use_hierarchy").exists():
                with contextlib.suppress(OSError):
                    (folder / "memory.use_hierarchy").write_text("1")

    def _find_init(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        found: list[int] = []

        def look() -> bool:
            if self._process.poll() is not None:
                raise TestbedError(f"no namespaces: exit {self._process.returncode}")
            found[:] = [int(word) for word in children.read_text().split()]
            return bool(found)

        wait_for("PID 1 of the namespace", look)
        return found[0]

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            raise TestbedError(f"boot failed: {self.console()}")
        if Path(f"/proc/{self.pid}/comm").read_text().strip() != "systemd":
            return False
        if not (self.root / "run/systemd/private").exists():
            return False
        state = self.run(["systemctl", "is-active", "testbed.target"], check=False)
        return state.stdout.strip() == "active"

    def console(self) -> str:
        """Last of what PID 1 printed before there was a journal."""
        with contextlib.suppress(FileNotFoundError):
            return (self.work / "console").read_text()[-2000:]
        return ""

    def command(self, command: Sequence[str], *, user: str | None = None) -> list[str]:
        """Give the host's command line that runs `command` inside."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-n", "-C", "-r"]
        enter += ["-w", "--", "/usr/bin/env", "-i", f"PATH={PATH}", "LC_ALL=C.UTF-8"]
        if user is not None:
            enter += ["/usr/sbin/runuser", "-u", user, "--"]
        return [*enter, *command]

    def run(
        self,
        command: Sequence[str],
        *,
        user: str | None = None,
        check: bool = True,
        timeout: float = 60,
        text: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` inside, `text` on its stdin; its output is in the result."""
        done = subprocess.run(
            self.command(command, user=user),
            check=False,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout,
            input=text,
        )
        if check and done.returncode != 0:
            raise TestbedError(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def spawn(self, command: Sequence[str], *, user: str | None = None) -> subprocess.Popen[str]:
        """Start `command` inside with pipes for its stdin, stdout and stderr."""
        return subprocess.Popen(
            self.command(command, user=user),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def path(self, inside: str) -> Path:
        """Where a path of the inside is seen from outside (no symbolic links on the way)."""
        return self.root / inside.lstrip("/")

    def write(self, inside: str, text: str, *, mode: int = 0o644) -> None:
        """Make a file inside, folders included."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def systemctl(self, *words: str, check: bool = True) -> str:
        """Run systemctl inside."""
        return self.run(["systemctl", *words], check=check).stdout.strip()

    def journal(self, *words: str) -> list[str]:
        """Lines of the journal, texts only, for example `journal("-u", unit)`."""
        self.run(["journalctl", "--sync"], check=False)
        shown = self.run(["journalctl", "--no-pager", "-q", "-o", "cat", *words])
        return shown.stdout.splitlines()

    def host_cgroup(self, hierarchy: str) -> Path:
        """Give the folder that is the root of a hierarchy inside, as the host sees it."""
        return HOST_CGROUPS / hierarchy / self.name

    def processes(self) -> dict[int, str]:
        """Host PIDs and command lines of all processes inside."""
        namespace = (Path(f"/proc/{self.pid}/ns/pid")).readlink()
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if (folder / "ns/pid").readlink() == namespace:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = line.decode(errors="replace")
        return found

    def stop(self) -> None:
        """End everything inside and remove what it had: processes, mounts, cgroups, files."""
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()  # unshare --kill-child takes PID 1 along, PID 1 takes all others
            process.wait(timeout=20)
        for folder in self._cgroups:
            _remove_cgroup(folder)
        shutil.rmtree(self.work, ignore_errors=True)


def _hierarchies() -> list[Path]:
    """Mount points of all cgroup hierarchies of the host."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] in ("cgroup", "cgroup2"):
            found.append(Path(before.split()[4]))
    return found


def _unshare(plan: Mapping[str, object], cgroups: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start boot.py as PID 1 of fresh namespaces rooted in `cgroups`."""

    def enter() -> None:
        for folder in cgroups:
            (folder / "cgroup.procs").write_text("0")

    kinds = ["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net"]
    # A test run that is killed takes its testbeds along.
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "--fork", "--kill-child", "--"]
    command += [sys.executable, str(Path(__file__).with_name("boot.py")), json.dumps(plan)]
    return subprocess.Popen(
        command,
        preexec_fn=enter,  # noqa: PLW1509 - before the cgroup namespace is made, or its root is off
        stdin=subprocess.DEVNULL,
    )


def _remove_cgroup(top: Path) -> None:
    """Remove a cgroup and all below it, waiting for the last of its processes to go."""

    def empty() -> bool:
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        return not top.exists()

    wait_for(f"the removal of {top}", empty)


def sweep() -> None:
    """Remove what testbeds of test runs that were killed left behind."""
    for place in (SCRATCH, *_hierarchies()):
        for folder in place.glob(f"{PREFIX}*"):
            owner = folder.name.removeprefix(PREFIX).partition("-")[0]
            if Path(f"/proc/{owner}").exists():
                continue
            if place == SCRATCH:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                _remove_cgroup(folder)


@contextlib.contextmanager
def layer(script: str, *, timeout: float = 300) -> Iterator[Path]:
    """Run a shell script on an overlay of the host's root; give the folder of its changes."""
    name = f"{PREFIX}{os.getpid()}-layer-{time.monotonic_ns() // 1000}"
    work = SCRATCH / name
    work.mkdir()
    cgroups = [folder / name for folder in _hierarchies() if "unified" in folder.name]
    for folder in cgroups:
        folder.mkdir()
    plan = {
        "work": str(work),
        "lower": "/",
        "upper": str(work / "upper"),
        "layout": "v2",
        "hostname": "build",
        "command": ["/bin/sh", "-euc", script],
    }
    try:
        process = _unshare(plan, cgroups)
        try:
            status = process.wait(timeout=timeout)
        finally:
            process.kill()
            process.wait()
        if status != 0:
            raise TestbedError(f"the installation failed with exit status {status}")
        yield work / "upper"
    finally:
        for folder in cgroups:
            _remove_cgroup(folder)
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def boot(layout: Layout, *, layer: Path | None = None, hostname: str = "n1") -> Iterator[Machine]:
    """Boot a node, give it to the caller, and clean up after it."""
    machine = Machine(layout, layer=layer, hostname=hostname)
    try:
        yield machine
    finally:
        machine.stop()
