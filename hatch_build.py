"""Build hook: compiles the BPF objects into the package, or fails loudly."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CFLAGS = (
    "-O2",
    "-g",
    "-mcpu=v3",
    "-I/usr/include/x86_64-linux-gnu",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fdebug-compilation-dir=.",
)


def compile_objects(root: Path) -> list[Path]:
    """Compile every `bpf/*.bpf.c` below root into `sams_ebpf/_bpf/`; returns the objects."""
    sources = sorted((root / "bpf").glob("*.bpf.c"))
    if not sources:
        raise RuntimeError(f"no BPF sources in {root / 'bpf'}: is the source tree whole?")
    clang = shutil.which("clang")
    strip = shutil.which("llvm-strip")
    if clang is None or strip is None:
        raise RuntimeError(
            "clang and llvm-strip are needed to compile the BPF programs: "
            "apt-get install clang llvm libbpf-dev"
        )
    out = root / "sams_ebpf" / "_bpf"
    out.mkdir(exist_ok=True)
    built = []
    for source in sources:
        target = out / source.name.replace(".bpf.c", ".bpf.o")
        subprocess.run(
            [
                clang,
                "-target",
                "bpf",
                *CFLAGS,
                f"-ffile-prefix-map={root}=.",
                "-I",
                str(root / "bpf"),
                "-c",
                str(source),
                "-o",
                str(target),
            ],
            check=True,
            cwd=root,
        )
        subprocess.run([strip, "-g", str(target)], check=True)
        built.append(target)
    # BCC compiles the sources on the node.
    shutil.rmtree(out / "src", ignore_errors=True)
    shutil.copytree(root / "bpf", out / "src")
    return built


class BpfBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles BPF before a wheel or an editable install is made."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Hatchling's entry point."""
        if self.target_name == "wheel":
            compile_objects(Path(self.root))
            build_data["pure_python"] = True


if __name__ == "__main__":
    for path in compile_objects(Path(__file__).resolve().parent):
        print(path)
