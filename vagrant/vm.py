"""Boot the rows of the kernel table without KVM, test the product on each, write the results.

    python vagrant/vm.py [ROW …]     default: every row that can be had

Each machine starts from the same disk (changes are thrown away), finds the wheel and the
tests on a folder shared with the host, and puts its results there as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import table
from image import Cache, run

from sams_ebpf.errors import SamsError

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 1500
# What the machine needs of this repository.
PARTS = ("tests", "pyproject.toml")


def main() -> int:
    """Run the rows named, then write docs/kernels.md from all results so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all that can be had")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/vm")
    parser.add_argument("--results", type=Path, default=ROOT / "vagrant/results.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/kernels.md")
    arguments = parser.parse_args()
    rows = table.read()
    unknown = set(arguments.rows) - {row.id for row in rows}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        results = json.loads(arguments.results.read_text())
    wanted = [row for row in rows if not row.vm.absent and row.id in (arguments.rows or {row.id})]
    cache = Cache(arguments.cache.absolute())
    suites = sorted({row.vm.suite for row in rows if row.vm.suite})
    temporary = tempfile.TemporaryDirectory(prefix="sams-vm-")
    try:
        wheel = _wheel(Path(temporary.name))
        disk = cache.disk(suites)
        for row in wanted:
            print(f"{row.id}: booting", flush=True)
            results[row.id] = _boot(row, cache, disk, wheel)
            print(f"{row.id}: {report.verdict(row, results[row.id])}", flush=True)
            arguments.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    except SamsError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1
    finally:
        temporary.cleanup()
    arguments.page.write_text(report.page(rows, results))
    failed = [row.id for row in wanted if report.problems(row, results[row.id])]
    return 1 if failed else 0


def _wheel(folder: Path) -> Path:
    """Build the product's wheel."""
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", folder, ROOT)
    return next(folder.glob("sams_ebpf-*.whl"))


def _boot(row: table.Row, cache: Cache, disk: Path, wheel: Path) -> dict[str, Any]:
    """Run one machine to its end; its results, or what is known of why there are none."""
    with tempfile.TemporaryDirectory(prefix=f"sams-vm-{row.id}-") as name:
        share = Path(name)
        share.chmod(0o755)
        shutil.copy(wheel, share)
        for part in PARTS:
            source = ROOT / part
            ignore = shutil.ignore_patterns("__pycache__", "golden_sams")
            if source.is_dir():
                shutil.copytree(source, share / "repo" / part, ignore=ignore)
            else:
                shutil.copy(source, share / "repo" / part)
        shutil.copy(ROOT / "vagrant/guest.py", share)
        (share / "start.sh").write_text(START)
        (share / "row.json").write_text(
            json.dumps({"id": row.id, "cgroup": row.cgroup, "loaders": row.expect.loaders})
        )
        command = _uml(row, disk, share) if row.vm.uml else _qemu(row, cache, disk, share)
        began = time.monotonic()
        console = cache.folder / f"console-{row.id}.log"
        with console.open("wb") as log:
            process = subprocess.Popen(
                ["nice", "-n", "10", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                # UML has processes of its own; they are all in this session.
                os.killpg(process.pid, 9)
                process.wait()
        try:
            result: dict[str, Any] = json.loads((share / "result.json").read_text())
        except FileNotFoundError:
            last = console.read_bytes()[-300:].decode("utf-8", "replace").split("\n")[-3:]
            result = {"error": f"no result: {' / '.join(line.strip() for line in last)}"}
        for log_name in ("guest.log", "pytest-libbpf.log", "pytest-bcc.log", "pytest-proc.log"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(share / log_name, cache.folder / f"{row.id}-{log_name}")
        result["machine_s"] = round(time.monotonic() - began)
        return result


START = """\
exec > /mnt/host/guest.log 2>&1
exec python3 /mnt/host/guest.py /mnt/host
"""


def _qemu(row: table.Row, cache: Cache, disk: Path, share: Path) -> list[str]:
    assert row.vm.suite is not None  # noqa: S101 (told by the table)
    kernel = cache.kernel(row.vm.suite)
    append = "console=ttyS0 root=/dev/vda rw quiet panic=-1 mitigations=off no_timer_check"
    # A busy host makes the calibration of the TSC wrong by factors.
    append += " tsc=unstable clocksource=acpi_pm systemd.default_timeout_start_sec=900"
    return [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
        *("-m", "2048", "-nographic", "-no-reboot", "-nic", "none"),
        *("-kernel", str(kernel.image), "-initrd", str(kernel.initrd)),
        *("-drive", f"file={disk},format=raw,if=virtio,snapshot=on"),
        *("-virtfs", f"local,path={share},mount_tag=host,security_model=none,id=host"),
        *("-append", f"{append} {row.command_line}"),
    ]


def _uml(row: table.Row, disk: Path, share: Path) -> list[str]:
    return [
        *("linux.uml", "mem=1G", f"ubd0={share}/cow,{disk}", "root=/dev/ubda", "rw", "quiet"),
        *("con=null", "con0=null,fd:1", "panic=-1", f"sams.host={share}"),
        *row.command_line.split(),
    ]


if __name__ == "__main__":
    sys.exit(main())
