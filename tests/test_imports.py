"""Who may import whom: the collector nobody, the others only what is shared."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What receiver and aggregator may take from the collector's package.
SHARED = {"wire", "errors", "settings", "durable", "program", "paths", "__version__"}
PACKAGES = {
    "sams_ebpf": ROOT / "sams_ebpf",
    "sams_receiver": ROOT / "receiver" / "sams_receiver",
    "sams_aggregator": ROOT / "aggregator" / "sams_aggregator",
}


def imports(file: Path) -> set[str]:
    """Every module that a file imports, as dotted names down to what is taken from it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def files(package: str) -> list[Path]:
    found = sorted(PACKAGES[package].rglob("*.py"))
    assert found
    return found


def test_the_collector_imports_neither_of_the_others() -> None:
    for file in files("sams_ebpf"):
        taken = {name.split(".")[0] for name in imports(file)}
        assert not taken & {"sams_receiver", "sams_aggregator"}, file


@pytest.mark.parametrize("package", ["sams_receiver", "sams_aggregator"])
def test_the_others_take_from_the_collector_only_what_is_shared(package: str) -> None:
    for file in files(package):
        for name in imports(file):
            parts = name.split(".")
            assert parts[0] != "sams_ebpf" or parts[1] in SHARED, f"{file}: {name}"


def test_the_receiver_does_not_know_the_aggregator() -> None:
    for file in files("sams_receiver"):
        assert not any(name.startswith("sams_aggregator") for name in imports(file)), file


def test_the_aggregator_reads_archives_through_the_archive_module_alone() -> None:
    for file in files("sams_aggregator"):
        for name in imports(file):
            if name.startswith("sams_receiver"):
                assert name.split(".")[1] == "archive", f"{file}: {name}"


def test_the_archive_knows_nothing_of_http() -> None:
    for file in sorted((PACKAGES["sams_receiver"] / "archive").rglob("*.py")):
        assert not any(name.split(".")[0] in ("aiohttp", "requests") for name in imports(file)), (
            file
        )


@pytest.mark.parametrize("module", ["msgpack", "bcc"])
def test_modules_that_are_not_ours_to_import(module: str) -> None:
    for package in PACKAGES:
        for file in files(package):
            assert module not in {name.split(".")[0] for name in imports(file)}, file


# Batches go through wire.py alone; the others pack frames of kinds of their own.
PACKERS = {"wire.py", "app.py", "format.py", "inspect.py", "sams_facts.py", "outbox.py"}


def test_one_door_to_msgpack() -> None:
    for package in PACKAGES:
        for file in files(package):
            assert "msgspec.msgpack" not in file.read_text() or file.name in PACKERS, file
