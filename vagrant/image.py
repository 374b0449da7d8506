"""Disk, kernels and initial RAM disks of the test machines, built once and kept below a cache.

The user space is one Debian bookworm for all rows: what differs between rows is the
kernel, and that is what is being tested. Kernels come from the Debian suite a row names,
unpacked and never installed; each boots with an initial RAM disk of its own that holds
the few modules a virtual disk needs.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sams_ebpf.errors import SamsError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
USERLAND = "bookworm"
# What a site's node has, what the tests compile with, and BCC as the distribution ships it.
PACKAGES = (
    "systemd-sysv,dbus,udev,kmod,procps,iproute2,busybox-static,"
    "python3,python3-venv,python3-bpfcc,libbpf1,gcc,libc6-dev"
)
MODULES = (
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "crc32c_generic",
    "crc32c_intel",
    "9pnet_virtio",
    "9p",
    "overlay",
)
REQUIREMENTS = (
    *("msgspec>=0.20", "PyYAML", "requests", "backports.zstd", "aiohttp", "uvloop"),
    *("prometheus-client", "pytest", "pytest-timeout", "pytest-asyncio", "hypothesis"),
)
DISK_BYTES = 4 << 30


class ImageError(SamsError):
    """A machine's disk or kernel could not be made; the message says which step failed."""


class Kernel(NamedTuple):
    """An unpacked kernel: its image, its initial RAM disk, its release."""

    image: Path
    initrd: Path
    release: str


def run(*command: str | Path, timeout: float = 900, **environment: str) -> str:
    """Run one build step quietly; ImageError with the end of its output if it fails."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment},
        )
    except subprocess.CalledProcessError as error:
        tail = " / ".join(error.output.strip().splitlines()[-3:])
        raise ImageError(f"{command[0]} failed ({error.returncode}): {tail}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{command[0]} is not installed: `make test-vm` installs it") from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{command[0]}: no end after {timeout:.0f} s") from error
    return done.stdout


def mirror() -> str:
    """Give the Debian mirror that this host's own apt uses."""
    targets = run("apt-get", "indextargets", "--format", "$(REPO_URI)|$(ORIGIN)|$(LABEL)")
    for line in targets.splitlines():
        uri, origin, label = line.split("|")
        if origin == label == "Debian":
            return uri
    raise ImageError("apt knows no Debian mirror: run `apt-get update` on a Debian host first")


class Cache:
    """Where built parts are kept; each is built once, under a temporary name, then renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def kernel(self, suite: str) -> Kernel:
        """Fetch and unpack the kernel of a Debian suite, headers and modules beside it."""
        tree = self.folder / f"kernel-{suite}"
        if not tree.is_dir():
            temporary = _fresh(tree)
            for package in self._download(suite):
                run("dpkg", "-x", package, temporary)
            _merge_usr(temporary)
            temporary.rename(tree)
        release = next((tree / "usr/lib/modules").iterdir()).name
        inside = tree / "usr/lib/modules" / release / "vmlinuz"
        image = inside if inside.exists() else tree / "boot" / f"vmlinuz-{release}"
        initrd = self.folder / f"initrd-{suite}.gz"
        if not initrd.exists():
            temporary = _fresh(initrd)
            temporary.write_bytes(_initrd(tree / "usr/lib/modules" / release))
            temporary.rename(initrd)
        return Kernel(image, initrd, release)

    def disk(self, suites: list[str]) -> Path:
        """Make the disk with the user space and every kernel's modules and headers."""
        disk = self.folder / f"disk-{'-'.join(suites)}.ext4"
        if disk.exists():
            return disk
        root = self._userland()
        for suite in suites:
            self.kernel(suite)
            for part in ("usr/lib/modules", "usr/src", "usr/lib/linux-kbuild-*"):
                for source in sorted((self.folder / f"kernel-{suite}").glob(f"{part}/*")):
                    target = root / source.relative_to(self.folder / f"kernel-{suite}")
                    if not target.exists():
                        _copy(source, target)
            release = self.kernel(suite).release
            run("chroot", root, "depmod", release)
        temporary = _fresh(disk)
        with temporary.open("wb") as file:
            file.truncate(DISK_BYTES)
        run("nice", "-n", "10", "mkfs.ext4", "-q", "-F", "-L", "root", "-d", root, temporary)
        temporary.rename(disk)
        return disk

    def _userland(self) -> Path:
        root = self.folder / "root"
        if root.is_dir():
            return root
        temporary = _fresh(root)
        run(
            *("nice", "-n", "10", "debootstrap", "--variant=minbase", f"--include={PACKAGES}"),
            *(USERLAND, temporary, mirror()),
            timeout=1800,
        )
        _configure(temporary)
        self._virtual_environment(temporary)
        temporary.rename(root)
        return root

    def wheels(self) -> Path:
        """Fetch the wheels of what the product and its tests need."""
        wheels = self.folder / "wheels"
        if not wheels.is_dir():
            temporary = _fresh(wheels)
            pip = (sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:")
            run(*pip, "-d", temporary, *REQUIREMENTS)
            temporary.rename(wheels)
        return wheels

    def _virtual_environment(self, root: Path) -> None:
        """Make the product's virtual environment, so that machines need no network.

        The product's own wheel is what a machine installs itself.
        """
        shutil.copytree(self.wheels(), root / "opt/wheels", dirs_exist_ok=True)
        run("chroot", root, "python3", "-m", "venv", "/opt/sams-ebpf")
        pip = ("/opt/sams-ebpf/bin/python", "-m", "pip", "install", "-q", "--no-index")
        run("chroot", root, *pip, "--find-links", "/opt/wheels", *REQUIREMENTS)
        shutil.rmtree(root / "opt/wheels")

    def _download(self, suite: str) -> list[Path]:
        """Fetch the packages of a suite's default kernel with an apt of their own."""
        home = self.folder / f"apt-{suite}"
        for part in ("state/lists/partial", "cache/archives/partial", "packages"):
            (home / part).mkdir(parents=True, exist_ok=True)
        (home / "status").touch()
        (home / "sources").write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
        options = [
            f"-o{key}={value}"
            for key, value in {
                "Dir::State": home / "state",
                "Dir::State::status": home / "status",
                "Dir::Cache": home / "cache",
                "Dir::Etc::sourcelist": home / "sources",
                "Dir::Etc::sourceparts": "-",
                "Dir::Etc::preferencesparts": "-",
                "APT::Sandbox::User": "root",
            }.items()
        ]
        run("apt-get", *options, "-qq", "update")

        wanted: set[str] = set()
        open_ends = ["linux-image-amd64", "linux-headers-amd64"]
        while open_ends:
            listed = run("apt-cache", *options, "depends", "--important", open_ends.pop())
            # With a version in their names: no compiler, no tools.
            found = set(re.findall(r"Depends: (linux-(?!compiler|kbuild)\S*\d\.\d\S*)", listed))
            open_ends += found - wanted
            wanted |= found
        command = ["apt-get", *options, "-qq", "download", *sorted(wanted)]
        subprocess.run(command, check=True, cwd=home / "packages", timeout=900)
        return sorted((home / "packages").glob("*.deb"))


def _fresh(final: Path) -> Path:
    temporary = final.with_name(f"{final.name}.tmp")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)
    return temporary


def _merge_usr(tree: Path) -> None:
    """Move lib into usr/lib: older packages ship their modules in /lib."""
    for old in (tree / "lib").glob("*"):
        target = tree / "usr/lib" / old.name
        target.parent.mkdir(parents=True, exist_ok=True)
        old.rename(target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        skip = shutil.ignore_patterns("vmlinuz", "gpu", "media", "wireless", "sound", "infiniband")
        shutil.copytree(source, target, symlinks=True, ignore=skip)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _configure(root: Path) -> None:
    """Make a bare tree a node that boots on its own: nothing waits for a network or a login."""
    (root / "etc/hostname").write_text("node1\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost node1\n")
    (root / "etc/fstab").write_text("LABEL=root / ext4 rw,noatime 0 0\n")
    units = root / "etc/systemd/system"
    masked = ("serial-getty@ttyS0", "getty@tty1", "systemd-timesyncd", "e2scrub_reap")
    for unit in masked:
        (units / f"{unit}.service").symlink_to("/dev/null")
    (units / "apt-daily.timer").symlink_to("/dev/null")
    (units / "sams-guest.service").write_text(GUEST_UNIT)
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "sams-guest.service").symlink_to("../sams-guest.service")
    shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)


GUEST_UNIT = """\
[Unit]
Description=Run what the host put on the shared folder, then power off
After=dbus.service
[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
ExecStart=/bin/sh -c 'mkdir -p /mnt/host && (grep -q " /mnt/host " /proc/mounts || \
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 host /mnt/host || \
mount -t hostfs none /mnt/host -o "$(sed "s/.*sams.host=//; s/ .*//" /proc/cmdline)") && \
exec /bin/sh /mnt/host/start.sh'
ExecStopPost=/bin/sh -c 'sync; systemctl --no-block poweroff --force'
TimeoutStartSec=infinity
"""

INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t devtmpfs none /dev
for module in $(/bin/busybox cat /modules); do
    /bin/busybox insmod /lib/$module || echo "initrd: $module not loaded"
done
tries=0
until [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -lt 200 ] || { echo "initrd: no disk"; /bin/busybox poweroff -f; }
    /bin/busybox usleep 50000
done
/bin/busybox mount -t ext4 -o rw /dev/vda /root
/bin/busybox mount -t devtmpfs none /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""


def _initrd(modules: Path) -> bytes:
    """Pack busybox, the modules in the order in which they load, and the script above."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise ImageError("busybox is not installed: `make test-vm` installs busybox-static")
    loaded: dict[str, bytes] = {}
    paths = {_module_name(path): path for path in modules.glob("kernel/**/*.ko*")}
    for name in MODULES:
        for needed, content in _with_dependencies(name.replace("-", "_"), paths):
            loaded.setdefault(needed, content)
    entries = [
        ("bin", stat.S_IFDIR | 0o755, b""),
        ("lib", stat.S_IFDIR | 0o755, b""),
        ("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes()),
        ("init", stat.S_IFREG | 0o755, INIT.encode()),
        ("modules", stat.S_IFREG | 0o644, "".join(f"{n}.ko\n" for n in loaded).encode()),
        *((f"lib/{name}.ko", stat.S_IFREG | 0o644, body) for name, body in loaded.items()),
    ]
    return gzip.compress(_cpio(entries), compresslevel=1)


def _module_name(path: Path) -> str:
    return path.name.split(".")[0].replace("-", "_")


def _with_dependencies(name: str, paths: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    """Yield a module after what it depends on; nothing for one that is built in."""
    path = paths.get(name)
    if path is None:
        return
    content = path.read_bytes()
    if path.suffix == ".xz":
        content = lzma.decompress(content)
    found = re.search(rb"\0depends=([^\0]*)\0", content)
    needs = found.group(1).decode().split(",") if found else []
    # ext4 asks for a crc32c by its algorithm's name, which is no symbol dependency.
    for need in filter(None, needs):
        yield from _with_dependencies(need.replace("-", "_"), paths)
    yield name, content


def _cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """Write the "newc" archive that the kernel unpacks."""
    parts = []
    for number, (name, mode, body) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = (number, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields)
        head += name.encode() + b"\0"
        parts.append(head + b"\0" * (-len(head) % 4) + body + b"\0" * (-len(body) % 4))
    return b"".join(parts)
