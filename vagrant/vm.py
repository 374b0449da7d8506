"""Boot the rows of the kernel table without KVM, test the product on each, write the results.

    python vagrant/vm.py [ROW[:PART] …]     default: every row that can be had

A row is run in parts, each in a machine of its own of a few minutes. Each machine starts
from the same disk (changes are thrown away), finds the wheel and the tests on a folder
shared with the host, and puts its results there as JSON. What a part finds replaces what
the same part found before; all else in vagrant/results.json stays.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import table
from image import Cache, run

from sams_ebpf.errors import SamsError

ROOT = Path(__file__).resolve().parent.parent
# Of one machine, on a host that has other work too; what hangs ends by itself long before.
LIMIT_S = 1800
# Before a machine is stopped its tests are, so that what they found gets out.
MARGIN_S = 90
# How much slower than real hardware the tests take these machines to be.
SCALE = 20
# What the machine needs of this repository.
NEEDED = ("tests", "pyproject.toml")
LOGS = ("guest.log", "journal.log", "pytest-*.log")


def main() -> int:
    """Run the rows named, then write docs/kernels.md from all results so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "rows", nargs="*", metavar="ROW[:PART]", help="default: all that can be had"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/vm")
    parser.add_argument("--results", type=Path, default=ROOT / "vagrant/results.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/kernels.md")
    parser.add_argument("--cpus", type=int, default=2, help="of a machine that runs tests")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds that a part may take")
    parser.add_argument(
        "--not-run", metavar="REASON", help="run nothing; note why parts without a result were not"
    )
    arguments = parser.parse_args()
    rows = table.read()
    every = {f"{row.id}:{part}": row for row in rows if not row.vm.absent for part in row.parts}
    asked = arguments.rows or [row.id for row in rows if not row.vm.absent]
    wanted = [name for name in every if name in asked or name.partition(":")[0] in asked]
    unknown = {one for one in asked if not any(one in (n, n.partition(":")[0]) for n in wanted)}
    if unknown:
        parser.error(f"no such row, or one that cannot be had: {', '.join(sorted(unknown))}")
    if arguments.not_run:
        results = json.loads(arguments.results.read_text())
        for name in wanted:
            row, part = every[name], name.partition(":")[2]
            if "steps" not in results.get(row.id, {}).get(part, {}):
                found = {"not_run": arguments.not_run}
                results = _keep(arguments.results, row, part, found, page=arguments.page, rows=rows)
        arguments.page.write_text(report.page(rows, results, table.boxes()))
        return 0
    cache = Cache(arguments.cache.absolute())
    suites = sorted({row.vm.suite for row in rows if row.vm.suite})
    failed = False
    temporary = tempfile.TemporaryDirectory(prefix="sams-vm-")
    try:
        product = Path(temporary.name)
        commit = _commit()
        _build(product)
        disk = cache.disk(suites)
        for name in wanted:
            row, part = every[name], name.partition(":")[2]
            print(f"{name}: booting", flush=True)
            tests = any(step.startswith("tests") for step in row.parts[part])
            found = _boot(
                *(row, part, cache, disk, product),
                cpus=arguments.cpus if tests else 1,
                limit_s=arguments.limit,
                commit=commit,
            )
            print(f"{name}: {report.verdict(row, part, found)}", flush=True)
            _keep(arguments.results, row, part, found, page=arguments.page, rows=rows)
            failed = failed or bool(report.problems(row, part, found))
    except SamsError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1
    finally:
        temporary.cleanup()
    return 1 if failed else 0


def _keep(
    file: Path,
    row: table.Row,
    part: str,
    found: dict[str, Any],
    *,
    page: Path,
    rows: list[table.Row],
) -> dict[str, Any]:
    """Put what a part found beside all else, which another runner may have added to.

    The page is of the same moment: it is written under the same lock.
    """
    with file.open("a+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        opened.seek(0)
        results: dict[str, Any] = json.loads(opened.read() or "{}")
        results.setdefault(row.id, {})[part] = found
        opened.truncate(0)
        opened.write(json.dumps(results, indent=1, sort_keys=True) + "\n")
        opened.flush()
        page.write_text(report.page(rows, results, table.boxes()))
    return results


def _commit() -> str:
    """What is tested; results of other parts, written meanwhile, do not make it another."""
    git = ("git", "-C", ROOT)
    changed = run(
        *git, "status", "--porcelain", "--", ".", ":!vagrant/results.json", ":!docs/kernels.md"
    )
    return run(*git, "rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")


def _build(folder: Path) -> None:
    """Build what all machines get: the wheel, its content, the tests and their programs."""
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", folder, ROOT)
    wheel = next(folder.glob("sams_ebpf-*.whl"))
    run(sys.executable, "-m", "zipfile", "-e", wheel, folder / "unpacked")
    for name in NEEDED:
        source, target = ROOT / name, folder / "repo" / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "golden_sams")
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy(source, target)
    # Both would take minutes in a machine, and are the same there.
    run(
        sys.executable, "-m", "compileall", "-q", folder / "unpacked", folder / "repo/tests/support"
    )
    compile_all = "import sys, workloads, pathlib; workloads.compile_all(pathlib.Path(sys.argv[1]))"
    programs = folder / "programs"
    run(sys.executable, "-c", compile_all, programs, PYTHONPATH=str(ROOT / "tests/support"))
    with tarfile.open(folder / "tests.tar", "w") as packed:
        for name in ("unpacked", "repo", "programs"):
            packed.add(folder / name, name)
            shutil.rmtree(folder / name)
    shutil.copy(ROOT / "vagrant/guest.py", folder)
    shutil.copy(ROOT / "receiver/systemd/sams-receiver.service", folder)
    (folder / "start.sh").write_text(START)


def _boot(
    row: table.Row,
    part: str,
    cache: Cache,
    disk: Path,
    product: Path,
    *,
    cpus: int,
    limit_s: int,
    commit: str,
) -> dict[str, Any]:
    """Run one machine to its end; its results, or what is known of why there are none."""
    with tempfile.TemporaryDirectory(prefix=f"sams-vm-{row.id}-") as folder:
        share = Path(folder) / "share"
        shutil.copytree(product, share)
        share.chmod(0o755)
        asked = {
            "cgroup": row.cgroup,
            "steps": row.parts[part],
            "scale": SCALE,
            "end_s": limit_s - MARGIN_S,
        }
        (share / "row.json").write_text(json.dumps(asked))
        command = _uml(row, disk, share) if row.vm.uml else _qemu(row, cache, disk, share, cpus)
        began = time.monotonic()
        console = cache.folder / f"{row.id}-{part}-console.log"
        with console.open("wb") as log:
            process = subprocess.Popen(
                ["nice", "-n", "5", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                # UML has processes of its own; they are all in this session.
                os.killpg(process.pid, 9)
                process.wait()
        try:
            result: dict[str, Any] = json.loads((share / "result.json").read_text())
        except FileNotFoundError:
            last = console.read_bytes()[-300:].decode("utf-8", "replace").split("\n")[-3:]
            result = {"error": f"no result: {' / '.join(line.strip() for line in last)}"}
        for log in (one for pattern in LOGS for one in share.glob(pattern)):
            shutil.copy(log, cache.folder / f"{row.id}-{part}-{log.name}")
        result["missing"] = [x for x in row.parts[part] if x not in result.get("steps", {})]
        result["cpus"] = cpus
        result["commit"] = commit
        result["machine_s"] = round(time.monotonic() - began)
        return result


START = """\
exec > /mnt/host/guest.log 2>&1
exec python3 /mnt/host/guest.py /mnt/host
"""


def _qemu(row: table.Row, cache: Cache, disk: Path, share: Path, cpus: int) -> list[str]:
    assert row.vm.suite is not None  # noqa: S101 (told by the table)
    kernel = cache.kernel(row.vm.suite)
    append = "console=ttyS0 root=/dev/vda rw quiet panic=-1 mitigations=off no_timer_check"
    # A busy host makes a calibration of the TSC wrong by factors; any other clock is read
    # through the emulator, which halves the speed of everything.
    append += f" tsc=reliable tsc_early_khz={tsc_khz()} systemd.default_timeout_start_sec=900"
    # Of all processors the fastest to emulate: no instructions of AVX, no `rep movsb`.
    return [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "Nehalem"),
        *("-smp", str(cpus)),
        *("-m", "2048", "-nographic", "-no-reboot", "-nic", "none"),
        *("-kernel", str(kernel.image), "-initrd", str(kernel.initrd)),
        *("-drive", f"file={disk},format=raw,if=virtio,snapshot=on"),
        *("-virtfs", f"local,path={share},mount_tag=host,security_model=none,id=host"),
        *("-append", f"{append} {row.command_line}"),
    ]


def tsc_khz() -> int:
    """Measure the frequency of this host's time stamp counter, which the emulator passes on."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "tsc")
        run("gcc", "-O1", "-o", program, ROOT / "vagrant/tsc.c")
        return int(run(program))


def _uml(row: table.Row, disk: Path, share: Path) -> list[str]:
    library = share / "umlfp.so"
    run("gcc", "-O2", "-shared", "-fPIC", "-o", library, ROOT / "vagrant/umlfp.c", "-ldl")
    return [
        *("env", f"LD_PRELOAD={library}"),
        *("linux.uml", "mem=1G", f"ubd0c={share}/cow,{disk}", "root=/dev/ubda", "rw", "quiet"),
        *("con=null", "con0=null,fd:1", "panic=-1", f"sams.host={share}"),
        *row.command_line.split(),
    ]


if __name__ == "__main__":
    sys.exit(main())
