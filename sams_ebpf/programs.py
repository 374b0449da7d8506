"""A set of accounting programs: loaded, attached, its maps at hand.

A set serves every job of a node (pinned, see `pins.py`) or one process (private: it goes
with its descriptors, whatever happens to the process).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from sams_ebpf import bpf, layout
from sams_ebpf.cgroups import Hierarchy, mounted
from sams_ebpf.host import Attempt

if TYPE_CHECKING:
    from sams_ebpf import bcc_loader

OBJECT: Final = "accounting.bpf.o"
# In the order in which they are tried, and whether their programs are typed (see
# bpf/kernel_compat.h). The second is for kernels whose verifier refuses the first: without
# bpf_loop() and fetching atomics.
OBJECTS: Final = {OBJECT: True, "accounting-older.bpf.o": False}
TRACEPOINTS: Final = {
    "on_new_task": "task_newtask",
    "on_exec": "sched_process_exec",
    "on_exit": "sched_process_exit",
    "on_free": "sched_process_free",
    "on_switch": "sched_switch",
    "on_charge": "sched_stat_runtime",
    "on_attach": "cgroup_attach_task",
    "on_mkdir": "cgroup_mkdir",
    "on_rmdir": "cgroup_rmdir",
}
# They run at every context switch of the node: only where that is asked for.
_EXACT: Final = {"on_switch", "on_charge"}
# Attached for a moment, to tell the distance of two clocks (see bpf/clock.h).
CALIBRATE: Final = "on_calibrate"
BY_HAND: Final = ("harvest", "find", "adopt")
ITERATORS: Final = {"harvest": "tasks", "adopt": None}
MAPS: Final = (
    *("tasks", "processes", "totals", "names", "chains", "cgroups", "slots", "free_slots"),
    *("jobs", "claims", "remade", "splits", "node", "costs"),
)
# Of no use to a collector.
_PROGRAMS_OWN: Final = ("clocks", "scratch", "dying", "moves")
# Moves under way; a task that sleeps is on its way until it runs again.
_MOVES: Final = 4096
_ZERO: Final = layout.U32.pack(0)
_log = logging.getLogger(__name__)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is settled when a set is loaded.

    exact: take each task's final value at its last context switch instead of when it is
        freed, and look at its charges for where a move between cgroups falls.
    quota: executables per job. limit_percent: of the programs' own time, per CPU and
        second; beyond it they switch themselves off. parents: absolute paths of the
        cgroups in which job cgroups are recognised when they are made.
    """

    hierarchy: Hierarchy
    exact: bool = False
    quota: int = 1024
    tasks: int = 32768
    executables: int = 8192
    cgroups: int = 8192
    limit_percent: float = 0
    parents: tuple[str, ...] = ()

    def attached(self) -> set[str]:
        """Names of the programs that run all the time."""
        return set(TRACEPOINTS) - ({"on_free"} if self.exact else _EXACT)


class ProgramSet:
    """Maps and iterators of a set that is attached."""

    def __init__(
        self,
        maps: dict[str, bpf.Map],
        iterators: dict[str, int],
        links: dict[str, int],
        loader: Literal["libbpf", "bcc"] = "libbpf",
        compiled: bcc_loader.Loaded | None = None,
    ) -> None:
        self.compiled = compiled
        self.maps = maps
        self.iterators = iterators
        self.links = links
        self.loader: Literal["libbpf", "bcc"] = loader

    def node(self) -> layout.Node:
        """What concerns all jobs of this set."""
        data = self.maps["node"].lookup(_ZERO)
        return layout.Node._make(layout.NODE.unpack(data or bytes(24)))

    def set_node(self, **changes: int) -> None:
        """Change flags of the set; only under the loader's lock."""
        values = self.node()._replace(**changes)
        self.maps["node"].update(_ZERO, layout.NODE.pack(*values))

    def costs(self) -> list[layout.Cost]:
        """What the programs cost, per possible CPU."""
        count = possible_cpus()
        each = layout.COST
        costs = self.maps["costs"]
        wide = bpf.Map(costs.name, costs.fd, costs.key_size, each.size * count)
        data = wide.lookup(_ZERO) or b""
        return [layout.Cost._make(values) for values in each.iter_unpack(data)]

    def settle(self) -> Iterator[tuple[bytes, bool]]:
        """Settle every task.

        Yields the keys of rows whose task has gone unseen (False), or is dying (True): past
        its exit, but not at its last switch.
        """
        if self.loader == "libbpf":
            told = bpf.run_iterator(self.iterators["harvest"])
            for (key,) in layout.U64.iter_unpack(told):
                yield layout.U64.pack(key & ~1), bool(key & 1)
            return
        for row in self.maps["tasks"].all_keys():
            found = bpf.run_program(self.iterators["harvest"], layout.U64.unpack(row))
            if found:
                yield row, found == layout.DYING

    def adopt(self, folders: Iterable[Path]) -> None:
        """Take up the tasks that are in these cgroups, and noted as a job's, already."""
        if self.loader == "libbpf":
            bpf.run_iterator(self.iterators["adopt"])
            return
        for folder in folders:
            for pid in (folder / "cgroup.procs").read_text(encoding="ascii").split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone meanwhile
                    for task in Path("/proc", pid, "task").iterdir():
                        self._adopt(int(pid), int(task.name))

    def _adopt(self, pid: int, tid: int) -> None:
        low, high = (bpf.run_program(self.iterators["find"], (pid, tid, n)) for n in (0, 1))
        if high:
            bpf.run_program(self.iterators["adopt"], (high << 32 | low, tid))

    def close(self) -> None:
        """Let go of all descriptors; a set that is not pinned ends with that."""
        for one in self.maps.values():
            one.close()
        for fd in (*self.iterators.values(), *self.links.values()):
            os.close(fd)
        self.maps, self.iterators, self.links = {}, {}, {}


# A folder beside this file and no importlib.resources, which would cost every collector a
# megabyte: the programs are files for libbpf and clang anyway.
_FOLDER: Final = Path(__file__).resolve().parent / "_bpf"


def object_bytes(name: str = OBJECT) -> bytes:
    """Read the compiled programs. Raises BpfError if the package was built without them."""
    try:
        return (_FOLDER / name).read_bytes()
    except FileNotFoundError as error:
        raise bpf.BpfError(f"{error.filename}: missing; the package was not built whole") from error


def attempt(loader: Literal["libbpf", "bcc"]) -> Attempt:
    """Load and attach a small private set, let go of it, and tell how that went."""
    hierarchies = [h for h in mounted() if h.version == 2 or "cpuacct" in h.controllers]
    if not hierarchies:
        return Attempt(loader, False, "no cgroup tree that can be accounted is mounted")
    try:
        began = time.monotonic()
        made = load(Options(hierarchy=hierarchies[0], tasks=64, executables=64, cgroups=64), loader)
    except bpf.BpfError as error:
        return Attempt(loader, False, str(error))
    cost = f"in {(time.monotonic() - began) * 1000:.0f} ms"
    if made.compiled is not None:
        cost += f", {made.compiled.peak_kib // 1024} MiB for as long as it compiled"
    made.close()
    return Attempt(loader, True, cost)


def abi(options: Options, loader: Literal["libbpf", "bcc"] = "libbpf") -> str:
    """Name a set by its programs and options: sets of different names are strangers."""
    text = msgspec.json.encode(options)
    # Told apart, not protected: the folder is root's. OpenSSL would cost every collector 4 MB.
    digest = f"{zlib.crc32(object_bytes()):08x}{zlib.crc32(text):08x}"
    return f"v{layout.VERSION}_{loader}_{digest}-{tree_name(options.hierarchy)}"


def tree_name(hierarchy: Hierarchy) -> str:
    """Name of a cgroup tree that can stand in a file name."""
    return hierarchy.name.replace(",", "+").replace("name=", "")


def load(options: Options, loader: Literal["libbpf", "bcc"] = "libbpf") -> ProgramSet:
    """Load and attach a set. Raises BpfError with the kernel's or libbpf's reason."""
    if loader == "bcc":
        return _load_with_bcc(options)
    attached = options.attached()
    wanted = attached | set(ITERATORS) | {CALIBRATE}
    maps, programs, typed = _load_first(options, wanted)
    _prepare(maps)
    _calibrate(programs[CALIBRATE], typed=typed)
    links = _attach(programs, attached, typed=typed)
    iterators = {
        name: bpf.attach_iterator(programs[name], maps[over] if over else None)
        for name, over in ITERATORS.items()
    }
    for fd in programs.values():
        os.close(fd)
    for name in _PROGRAMS_OWN:
        maps.pop(name).close()
    return ProgramSet(maps, iterators, links)


def _load_first(
    options: Options, wanted: set[str]
) -> tuple[dict[str, bpf.Map], dict[str, int], bool]:
    """Load the first object that the kernel takes; maps, programs, and whether these are typed."""
    reasons: list[str] = []
    for name, typed in OBJECTS.items():
        try:
            maps, programs = _load_object(name, options, wanted)
        except bpf.BpfError as error:
            reasons.append(f"{name}: {error}")
            if error.errno in (errno.EPERM, 0):
                break
        else:
            for reason in reasons:
                _log.info("%s is used: %s", name, reason)
            return maps, programs, typed
    raise bpf.BpfError("; ".join(reasons))


def _load_with_bcc(options: Options) -> ProgramSet:
    """Maps from the object, as with libbpf; programs compiled by BCC."""
    # CO-RE is not needed to make maps, and libbpf asks for BTF where it might be.
    maps, _ = _load_object(OBJECT, options, set(), own_btf=True)
    attached = options.attached()
    rodata = _Rodata()
    _fill_options(rodata, options, slices=True)
    constants = {
        f"option_{name}": getattr(rodata, name)
        for name, _ in _Rodata._fields_
        if name != "parent_hash"
    }
    constants |= {f"PARENT_{i}": f"{rodata.parent_hash[i]}ULL" for i in range(layout.PARENTS)}
    for name in ("seed", "limit_ns", "slice_ns"):
        constants[f"option_{name}"] = f"{constants[f'option_{name}']}ULL"
    fds = {name: one.fd for name, one in maps.items()}
    from sams_ebpf import bcc_loader  # noqa: PLC0415 (few nodes need it)

    made = bcc_loader.load(fds, constants, attached | set(BY_HAND) | {CALIBRATE})
    _prepare(maps)
    _calibrate(made.programs[CALIBRATE], typed=False)
    links = _attach(made.programs, attached, typed=False)
    # Iterators need BTF: these programs are run by hand instead, so they stay.
    iterators = {name: made.programs.pop(name) for name in BY_HAND}
    for fd in made.programs.values():
        os.close(fd)
    for name in _PROGRAMS_OWN:
        maps.pop(name).close()
    return ProgramSet(maps, iterators, links, "bcc", made)


def _prepare(maps: dict[str, bpf.Map]) -> None:
    """Fill the maps that programs expect to find filled."""
    for index in range(layout.SLOTS):
        maps["free_slots"].update(None, layout.U32.pack(index))
    _open_clocks(maps["clocks"])


def _attach(programs: dict[str, int], names: set[str], *, typed: bool) -> dict[str, int]:
    return {
        name: bpf.attach_raw_tracepoint(TRACEPOINTS[name], programs[name], typed=typed)
        for name in sorted(names)
    }


def _load_object(
    name: str, options: Options, wanted: set[str], *, own_btf: bool = False
) -> tuple[dict[str, bpf.Map], dict[str, int]]:
    opened = bpf.Object(object_bytes(name), _FOLDER / name if own_btf else None)
    try:
        sizes = {
            "tasks": options.tasks,
            "processes": options.tasks,
            "moves": _MOVES if options.exact else 1,
            "totals": options.executables,
            "names": options.executables,
            "chains": 2 * options.executables,
            "splits": options.executables,
            "cgroups": options.cgroups,
            "clocks": possible_cpus(),
        }
        opened.resize(sizes)
        _set_options(opened.read_only_data(), options, slices=True)
        return opened.load(wanted)
    finally:
        opened.close()


class _Rodata(ctypes.Structure):
    """The options of `bpf/maps.h`, in the order in which they stand there."""

    _fields_ = (
        ("controller", ctypes.c_uint32),
        ("hierarchy", ctypes.c_int32),
        ("quota", ctypes.c_uint32),
        ("host_mounts", ctypes.c_uint32),
        ("exact", ctypes.c_uint32),
        ("slices", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("limit_ns", ctypes.c_uint64),
        ("slice_ns", ctypes.c_uint64),
        ("parents", ctypes.c_uint32),
        ("parent_hash", ctypes.c_uint64 * layout.PARENTS),
    )


def _set_options(data: ctypes.Array[ctypes.c_char], options: Options, *, slices: bool) -> None:
    if ctypes.sizeof(data) != ctypes.sizeof(_Rodata):
        raise bpf.BpfError(f"the BPF object's options are {ctypes.sizeof(data)} bytes long")
    _fill_options(_Rodata.from_buffer(data), options, slices=slices)


def _fill_options(rodata: _Rodata, options: Options, *, slices: bool) -> None:
    hierarchy = options.hierarchy
    rodata.controller = controller(hierarchy)
    rodata.hierarchy = hierarchy_id(hierarchy)
    rodata.quota = options.quota
    rodata.host_mounts = _host_mounts()
    rodata.exact = options.exact
    rodata.slices = slices
    rodata.seed = int.from_bytes(os.urandom(8))
    rodata.limit_ns = int(options.limit_percent * 10_000_000)
    rodata.slice_ns = _longest_slice_ns()
    rodata.parents = len(options.parents)
    for index, parent in enumerate(options.parents):
        rodata.parent_hash[index] = layout.path_hash(os.fsencode(parent))


_CLOCK_MONOTONIC_COARSE: Final = 6  # clock_gettime(2): it moves on once a tick


def _longest_slice_ns() -> int:
    """How long a task can run before the scheduler brings its counter up to date.

    A tick, and a quarter for one that is late; a second where CPUs run without ticks
    (nohz_full=), whose tasks are then looked at from another CPU.
    """
    try:
        tickless = Path("/sys/devices/system/cpu/nohz_full").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        tickless = ""
    if tickless not in ("", "(null)"):
        return 1_250_000_000
    return int(time.clock_getres(_CLOCK_MONOTONIC_COARSE) * 1.25e9)


def _host_mounts() -> int:
    """Number of the host's mount namespace: that of PID 1, or ours where that is hidden.

    0, by which no path is marked, in a service that has a mount namespace of its own and
    may not look at PID 1's.
    """
    try:
        return Path("/proc/1/ns/mnt").stat().st_ino
    except PermissionError:
        service = "INVOCATION_ID" in os.environ
        return 0 if service else Path("/proc/self/ns/mnt").stat().st_ino


def controller(hierarchy: Hierarchy) -> int:
    """Number of the tree for the kernel side. Raises BpfError for one it cannot account."""
    if hierarchy.version == 2:
        return layout.CONTROLLERS["v2"]
    for name in hierarchy.controllers:
        if name in layout.CONTROLLERS:
            return layout.CONTROLLERS[name]
    raise bpf.BpfError(f"cgroup v1 tree {hierarchy.name}: has no controller to account by")


def hierarchy_id(hierarchy: Hierarchy) -> int:
    """The kernel's number of the tree, the first field of /proc/self/cgroup (cgroups(7))."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        number, controllers, _ = line.split(":", 2)
        if controllers == ",".join(hierarchy.controllers):
            return int(number)
    raise bpf.BpfError(f"cgroup tree {hierarchy.name}: not in /proc/self/cgroup")


def possible_cpus() -> int:
    """How many CPUs the kernel has room for: per-CPU maps have that many values."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii")
    return int(text.strip().split(",")[-1].split("-")[-1]) + 1


class _PerfEventAttr(ctypes.Structure):  # perf_event_open(2), first published version
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("room", ctypes.c_uint64 * 6),
    )


_PERF_EVENT_OPEN: Final = {"x86_64": 298, "aarch64": 241, "ppc64le": 319, "s390x": 331}
_PERF_TYPE_SOFTWARE: Final = 1
_PERF_FLAG_FD_CLOEXEC: Final = 8


def _open_clocks(clocks: bpf.Map) -> None:
    """Put each CPU's clock counter into the map, which keeps it from then on."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _PERF_EVENT_OPEN[os.uname().machine]
    attributes = _PerfEventAttr(type=_PERF_TYPE_SOFTWARE, size=ctypes.sizeof(_PerfEventAttr))
    for cpu in range(possible_cpus()):
        fd = libc.syscall(number, ctypes.byref(attributes), -1, cpu, -1, _PERF_FLAG_FD_CLOEXEC)
        if fd < 0:
            continue  # offline: splits on it will be counted as uncertain
        try:
            clocks.update(layout.U32.pack(cpu), layout.U32.pack(fd))
        finally:
            os.close(fd)


def _calibrate(program_fd: int, *, typed: bool, rounds: int = 4) -> None:
    """Let every CPU switch a few times while the calibrating program is attached."""
    link = bpf.attach_raw_tracepoint("sched_switch", program_fd, typed=typed)
    try:
        allowed = os.sched_getaffinity(0)
        try:
            for cpu in _online_cpus():
                try:
                    os.sched_setaffinity(0, {cpu})
                except OSError:
                    continue  # not ours to run on; its own switches will do
                for _ in range(rounds):
                    time.sleep(0.00005)
        finally:
            os.sched_setaffinity(0, allowed)
    finally:
        os.close(link)


def _online_cpus() -> Iterable[int]:
    text = Path("/sys/devices/system/cpu/online").read_text(encoding="ascii").strip()
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
