"""The second loader: the same C sources, compiled by BCC for the running kernel.

For kernels with headers but without BTF. The maps are those that libbpf made from the
object; only the programs come from here. BCC brings a whole compiler along, so it runs in
a process of its own, which hands over the programs' descriptors and is gone.

BCC is the distribution's (python3-bpfcc, python3-bcc): the `bcc` of PyPI is another thing.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
import os
import platform
import re
import resource
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, Final

from sams_ebpf.bpf import BpfError

FOLDERS: Final = ("/usr/lib/python3/dist-packages", "/usr/lib/python3/site-packages")
LIMIT_S: Final = 300
_KHEADERS: Final = Path("/sys/kernel/kheaders.tar.xz")
_TEXT: Final = '#include "accounting.bpf.c"\n'


class Loaded:
    """Programs by name, and what compiling took: seconds and KiB at the peak."""

    def __init__(self, programs: dict[str, int], seconds: float, peak_kib: int) -> None:
        self.programs = programs
        self.seconds = seconds
        self.peak_kib = peak_kib


def load(maps: dict[str, int], constants: dict[str, int], wanted: set[str]) -> Loaded:
    """Compile and load the programs wanted, in another process.

    maps: descriptors by name. constants: the values of `option_…` and the like. Raises
    BpfError with the reason.
    """
    names = sorted(wanted)
    flags = [f"-DMAP_{name}={fd}" for name, fd in sorted(maps.items())]
    flags += [f"-D{name}={value}" for name, value in sorted(constants.items())]
    flags += _features()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(), *maps.values()),
        )
        theirs.close()
        try:
            _, errors = child.communicate(
                json.dumps({"flags": flags, "names": names}).encode(), LIMIT_S
            )
        except subprocess.TimeoutExpired as error:
            child.kill()
            child.communicate()
            raise BpfError("BCC", 0, f"no programs after {LIMIT_S} s") from error
        if child.returncode != 0:
            raise BpfError("BCC", 0, _reason(errors.decode("utf-8", "replace")))
        said, fds, _, _ = socket.recv_fds(ours, 4096, len(names))
    cost = json.loads(said)
    for fd in fds:
        os.set_inheritable(fd, False)
    return Loaded(dict(zip(names, fds, strict=True)), cost["seconds"], cost["peak_kib"])


def _reason(errors: str) -> str:
    """Give the line of the compiler's, the kernel's or Python's words that names the cause."""
    lines = [line for line in errors.splitlines() if line.strip() and "warning:" not in line]
    causes = [line for line in lines if "error:" in line or "Error" in line]
    return (causes or lines or ["it failed without a word"])[-1].strip()


def _features() -> list[str]:
    """Tell from the headers' text what C cannot ask: which of two names a field has.

    `state` became `__state` in 2f064a59a11f ("sched: Change task_struct::state") (in
    v5.14). The counter of a mount namespace moved from before its `ns_common` into it in
    1a7b8969e664 ("mnt: Use generic ns_common::count") (in v5.11).
    """
    sched = _header("include/linux/sched.h")
    common = _header("include/linux/ns_common.h")
    state = "__state" if re.search(r"\b__state;", sched) else "state"
    counted = re.search(r"\b(count|__ns_ref);", common) is None
    return [f"-DTASK_STATE={state}", *(["-DMOUNT_NAMESPACE_COUNTED"] if counted else [])]


def _header(name: str) -> str:
    modules = Path("/lib/modules", platform.release())
    for folder in (modules / "source", modules / "build"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8", errors="replace")
    try:
        with tarfile.open(_KHEADERS) as packed:
            file = packed.extractfile(f"./{name}")
            return "" if file is None else file.read().decode("utf-8", "replace")
    except (OSError, KeyError, tarfile.TarError) as error:
        raise BpfError(
            f"headers of kernel {platform.release()}", 0, "not installed: install them"
        ) from error


def _find_bcc() -> Any:  # noqa: ANN401
    """Import the distribution's BCC."""
    version = platform.python_version().rpartition(".")[0]
    for folder in (*FOLDERS, f"/usr/lib/python{version}/site-packages"):
        if Path(folder, "bcc", "table.py").exists():
            sys.path.append(folder)
            return importlib.import_module("bcc")
    raise BpfError("BCC", 0, "not installed: install python3-bpfcc (Debian) or python3-bcc (RHEL)")


def _child(number: int) -> None:
    """Compile, load, and send the descriptors over the socket of this number."""
    order = json.load(sys.stdin)
    bcc = _find_bcc()
    began = time.monotonic()
    sources = importlib.resources.files("sams_ebpf") / "_bpf" / "src"
    with importlib.resources.as_file(sources) as folder:
        flags = [f"-I{folder}", "-DSAMS_BCC", "-Wno-macro-redefined", *order["flags"]]
        module = bcc.BPF(text=_TEXT, cflags=flags)
        programs = [
            module.load_func(name.encode(), bcc.BPF.RAW_TRACEPOINT).fd for name in order["names"]
        ]
    cost = {
        "seconds": time.monotonic() - began,
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    with socket.socket(fileno=number) as theirs:
        socket.send_fds(theirs, [json.dumps(cost).encode()], programs)
    # BCC's own tidying up would look for probes that it never attached.
    os._exit(0)


if __name__ == "__main__":
    _child(int(sys.argv[1]))
