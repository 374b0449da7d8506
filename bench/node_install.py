"""The collector as a node has it: a wheel in a venv of its own, byte-compiled.

What the tests run is an editable install amid everything that developers need: slower to
start, and larger.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from testbed import product

FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "bench" / "node"


def program() -> str:
    """Build the wheel, install it with what it depends on and nothing else; its program."""
    product.build_wheels()
    shutil.rmtree(FOLDER, ignore_errors=True)
    base = Path(sys.executable).resolve()
    subprocess.run([base, "-m", "venv", "--without-pip", FOLDER], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--python", f"{FOLDER}/bin/python", "install", "-q"]
    pip += ["--disable-pip-version-check", "--no-index", "--find-links", str(product.WHEELS)]
    subprocess.run([*pip, "sams-ebpf"], check=True, timeout=120)
    return str(FOLDER / "bin" / "sams-ebpf")
