"""Sets of programs that outlive the process that loaded them: pinned in bpffs.

    /sys/fs/bpf/sams-ebpf/v<layout>_<loader>_<abi>-<tree>/map_<name>, link_<program>, iter_<program>

One lock per node, held for the moment in which sets come and go or a slot is claimed. A
set is pinned under a name of its own first and then renamed, so that one with its right
name is whole. A set of another ABI may have jobs of its own: it takes no new ones once a
newer set is there, and goes when the last of them has ended. Of a set whose maps are laid
out as in another version of the product, no more is done than that.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from sams_ebpf import bpf, layout, programs, slots
from sams_ebpf.cgroups import Hierarchy
from sams_ebpf.errors import NotPossibleError
from sams_ebpf.programs import Options, ProgramSet

ROOT: Final = Path("/sys/fs/bpf/sams-ebpf")
LOCK: Final = Path("/run/sams-ebpf/lock")
_UNFINISHED: Final = "-new"  # no dot: bpffs refuses those

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock(path: Path = LOCK) -> Iterator[None]:
    """Hold the node's lock; the kernel gives it up with the process."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotPossibleError(f"{path}: {error.strerror}; root is needed (try sudo)") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def folders(root: Path = ROOT) -> list[Path]:
    """List the pinned sets, oldest first."""
    try:
        found = [
            path for path in root.iterdir() if path.is_dir() and not path.name.endswith(_UNFINISHED)
        ]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: path.stat().st_ctime_ns)


def is_readable(folder: Path) -> bool:
    """Tell whether the maps of a pinned set are laid out as in this version."""
    return folder.name.startswith(f"v{layout.VERSION}_")


def open_set(folder: Path) -> ProgramSet:
    """Open a pinned set. Raises BpfError if it is not whole, or of another version."""
    if not is_readable(folder):
        raise bpf.BpfError(f"{folder}: of another version, whose collectors finish its jobs")
    maps = {name: bpf.open_map(folder / f"map_{name}") for name in programs.MAPS}
    bcc = folder.name.startswith(f"v{layout.VERSION}_bcc_")
    runs = programs.BY_HAND if bcc else tuple(programs.ITERATORS)
    iterators = {name: bpf.open_pinned(folder / f"iter_{name}") for name in runs}
    return ProgramSet(maps, iterators, {}, loader="bcc" if bcc else "libbpf")


def readable_sets(root: Path = ROOT) -> Iterator[tuple[Path, ProgramSet]]:
    """Open each pinned set that this version can read; closing it is up to the caller."""
    for folder in filter(is_readable, folders(root)):
        try:
            yield folder, open_set(folder)
        except bpf.BpfError as error:
            _log.warning("%s; passed over", error)


def find(
    options: Options, root: Path = ROOT, loader: Literal["libbpf", "bcc"] = "libbpf"
) -> ProgramSet | None:
    """Open the pinned set of these programs and options; None if there is none."""
    folder = root / programs.abi(options, loader)
    return open_set(folder) if folder.is_dir() else None


def pin_set(made: ProgramSet, name: str, root: Path = ROOT) -> Path:
    """Pin a set under its name; under the lock. Raises BpfError, and then nothing is pinned."""
    mount_bpffs(root.parent)
    folder = root / name
    unfinished = root / f"{name}{_UNFINISHED}"
    try:
        unfinished.mkdir(mode=0o700, parents=True)
        for prefix, items in (
            ("map", {n: m.fd for n, m in made.maps.items()}),
            ("iter", made.iterators),
            ("link", made.links),
        ):
            for item, fd in items.items():
                bpf.pin(fd, unfinished / f"{prefix}_{item}")
        unfinished.rename(folder)
    except OSError as error:
        remove(unfinished)
        raise bpf.BpfError(f"{folder}: cannot be pinned", error.errno or 0) from error
    except bpf.BpfError:
        remove(unfinished)
        raise
    return folder


def mount_bpffs(folder: Path) -> None:
    """Mount bpffs where it is missing: systemd does at boot, a container may not."""
    if folder.is_mount():
        return
    code = bpf.mount(b"bpf", folder, b"bpf")
    if code:
        raise bpf.BpfError(f"{folder}: bpffs cannot be mounted", code)


def is_of(folder: Path, hierarchy: Hierarchy) -> bool:
    """Tell whether a pinned set accounts this cgroup tree."""
    return folder.name.partition("-")[2] == programs.tree_name(hierarchy)


def load(
    options: Options,
    loader: Literal["libbpf", "bcc"],
    *,
    stay: bool,
    make: bool = True,
    root: Path = ROOT,
) -> ProgramSet:
    """Give the pinned set for these options, loaded if need be; under the lock.

    stay: until `unload`, not only while there are jobs. A set of another ABI takes no
    new jobs from now on. make: False: only what is there. Raises BpfError.
    """
    found = find(options, root, loader) or (None if stay else _standing(options.hierarchy, root))
    if found is None and not make:
        raise bpf.BpfError(
            f"{loader}: no programs are loaded, and this unit has no memory to compile them in:"
            " start sams-ebpf-load.service"
        )
    if found is None:
        name = programs.abi(options, loader)
        _load_aside(options, loader, name, root)
        found = open_set(root / name)
    if stay and not found.node().stay:
        found.set_node(stay=1)
    if stay:
        close_others(programs.abi(options, loader), root)
    return found


def _load_aside(options: Options, loader: Literal["libbpf", "bcc"], name: str, root: Path) -> None:
    """Load and pin in a child: what that needs for a moment would stay with a collector.

    Raises BpfError with the child's reason.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        reason = "the loader died"
        try:
            pin_set(programs.load(options, loader), name, root)
            reason = ""
        except (bpf.BpfError, OSError) as error:
            reason = str(error)
        finally:
            os.write(write, reason.encode()[:4096])
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        reason = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if reason or status:
        raise bpf.BpfError(reason or f"the loader ended with status {status}")


def _standing(hierarchy: Hierarchy, root: Path) -> ProgramSet | None:
    """Open the set that was loaded to stay and accounts this tree, whatever its options."""
    for folder in reversed(folders(root)):
        if is_of(folder, hierarchy) and is_readable(folder):
            one = open_set(folder)
            node = one.node()
            if node.stay and not node.closed:
                return one
            one.close()
    return None


def close_others(name: str, root: Path = ROOT) -> None:
    """Let the sets of other names take no new jobs, and remove those without any."""
    for folder in folders(root):
        if folder.name != name:
            _close(folder)
    collect_garbage(root)


def _close(folder: Path) -> None:
    """Let a set, of any version, take no new jobs."""
    node = bpf.open_map(folder / "map_node")
    key = layout.U32.pack(0)
    flags = node.lookup(key)
    if flags is not None:
        begin = layout.NODE_BEGIN
        tripped, _, _ = begin.unpack_from(flags)
        node.update(key, begin.pack(tripped, 1, 0) + flags[begin.size :])
    node.close()


def _is_idle(folder: Path) -> bool:
    """Tell whether a set, of any version, is not to stay and has no job."""
    node = bpf.open_map(folder / "map_node")
    flags = node.lookup(layout.U32.pack(0)) or bytes(layout.NODE_BEGIN.size)
    node.close()
    if layout.NODE_BEGIN.unpack_from(flags)[2]:
        return False
    table = bpf.open_map(folder / "map_slots")
    rows = (table.lookup(key) for key in table.all_keys())
    begin = layout.SLOT_BEGIN
    jobs = any(row and begin.unpack_from(row)[1] == layout.SLOT_USED for row in rows)
    table.close()
    return not jobs


def remove(folder: Path) -> None:
    """Unpin: what nobody else holds open is gone from the kernel with that."""
    if folder.is_dir():
        for pinned in folder.iterdir():
            pinned.unlink()
        folder.rmdir()
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # the last one takes the product's folder along


def let_go(used: ProgramSet, slot_id: int, root: Path = ROOT) -> None:
    """Release a job's slot, and the set if that was the last job of a set not to stay."""
    with lock():
        slots.release(used, slot_id)
        collect_garbage(root)


def collect_garbage(root: Path = ROOT) -> list[Path]:
    """Remove sets without a job that are not to stay, and unfinished ones; under the lock."""
    gone = list(root.glob(f"*{_UNFINISHED}")) if root.is_dir() else []
    for folder in folders(root):
        try:
            idle = _is_idle(folder)
        except bpf.BpfError:
            idle = True  # not whole: not even these two maps are there
        if idle:
            gone.append(folder)
    for folder in gone:
        remove(folder)
    return gone
