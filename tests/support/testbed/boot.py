"""Runs inside fresh namespaces: makes a root file system and becomes a command in it.

`python boot.py PLAN`, a JSON map: `work` (folder for mount points), `lower` and `upper`
(folders of the overlay), `layout` (v1 or v2), `hostname`, `command`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

# What a node of a site has mounted; those the kernel lacks are left out.
V1_CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "pids", "blkio")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def mount(kind: str, target: Path, source: str = "none", options: str = "") -> None:
    target.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", kind]
    if options:
        command += ["-o", options]
    subprocess.run([*command, source, str(target)], check=True)


def bind(source: Path, target: Path) -> None:
    target.touch()
    subprocess.run(["mount", "--bind", str(source), str(target)], check=True)


def root_tree(root: Path, lower: str, upper: Path) -> None:
    scratch = upper.with_name(f"{upper.name}.scratch")
    for folder in (upper, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    mount("overlay", root, "overlay", f"lowerdir={lower},upperdir={upper},workdir={scratch}")


def kernel_trees(root: Path) -> None:
    mount("proc", root / "proc", "proc")
    mount("sysfs", root / "sys", "sysfs")
    mount("bpf", root / "sys/fs/bpf", "bpf", "mode=700")
    mount("tracefs", root / "sys/kernel/tracing", "tracefs")


def cgroup_trees(root: Path, layout: str) -> None:
    top = root / "sys/fs/cgroup"
    if layout == "v2":
        mount("cgroup2", top, "cgroup2")
        return
    mount("tmpfs", top, "tmpfs", "mode=755")
    for controller in V1_CONTROLLERS:
        mount("cgroup", top / controller, "cgroup", controller)
    mount("cgroup", top / "systemd", "cgroup", "none,name=systemd")
    mount("cgroup2", top / "unified", "cgroup2")


def devices(root: Path, work: Path) -> None:
    mount("tmpfs", root / "dev", "tmpfs", "mode=755")
    for name in DEVICES:
        bind(Path("/dev") / name, root / "dev" / name)
    mount("devpts", root / "dev/pts", "devpts", "newinstance,ptmxmode=666")
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    mount("tmpfs", root / "dev/shm", "tmpfs")
    console = work / "console"
    console.touch()
    bind(console, root / "dev/console")


def network(hostname: str, root: Path) -> None:
    socket.sethostname(hostname)
    (root / "etc/hostname").write_text(f"{hostname}\n")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n10.99.0.1 {hostname}\n")
    # With lo alone the resolver finds no address to use.
    for words in (
        "link set lo up",
        "link add sams0 type veth peer name sams1",
        "address add 10.99.0.1/24 dev sams0",
        "link set sams0 up",
        "link set sams1 up",
    ):
        subprocess.run(["ip", *words.split()], check=True)


def main() -> None:
    plan = json.loads(sys.argv[1])
    work = Path(plan["work"])
    root = work / "root"
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    root_tree(root, plan["lower"], Path(plan["upper"]))
    kernel_trees(root)
    cgroup_trees(root, plan["layout"])
    devices(root, work)
    mount("tmpfs", root / "run", "tmpfs", "mode=755")
    mount("tmpfs", root / "tmp", "tmpfs", "mode=1777")
    network(plan["hostname"], root)
    os.chdir(root)
    # pivot_root(2): with the same folder twice the old root comes to lie on the new one.
    subprocess.run(["pivot_root", ".", "."], check=True)
    subprocess.run(["umount", "-l", "."], check=True)
    os.chdir("/")
    environment = {"container": "testbed", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    command = plan["command"]
    os.execve(command[0], command, environment)  # noqa: S606 - PID 1 of the namespace


if __name__ == "__main__":
    main()
