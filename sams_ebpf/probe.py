"""`sams-ebpf probe`: try what this host can do, and say what would be used and why."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import importlib
import os
import platform
import re
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from sams_ebpf import cgroups, host, privileges
from sams_ebpf.errors import NotPossibleError
from sams_ebpf.host import Attempt, Choice, Facts, Loader, Tree, Verdict, Way

BTF_FILE: Final = Path("/sys/kernel/btf/vmlinux")
LOCKDOWN_FILE: Final = Path("/sys/kernel/security/lockdown")
BPFFS_FOLDER: Final = Path("/sys/fs/bpf")
OBJECT: Final = Path(__file__).with_name("_bpf") / "accounting.bpf.o"
PROGRAMS: Final = "sams_ebpf.programs"

_BTF_MAGIC: Final = 0xEB9F
_BPF_FS_MAGIC: Final = 0xCAFE4A11
# __NR_bpf; libc has no wrapper.
_NR_BPF: Final = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
    "ppc64": 361,
    "s390x": 351,
}

_libc = ctypes.CDLL(None, use_errno=True)


def command(arguments: argparse.Namespace) -> int:
    """`sams-ebpf probe`. Status 3 when nothing can be measured here at all."""
    facts = gather()
    verdicts = host.judge_all(facts)
    try:
        choice = host.choose(facts)
    except NotPossibleError:
        choice = None
    if arguments.json:
        import json  # noqa: PLC0415 (a collector decides as well, and prints nothing)

        print(json.dumps(_plain(facts, verdicts, choice)))
    else:
        print(_table(facts, verdicts, choice))
    return 0 if choice is not None else NotPossibleError.exit_status


def gather() -> Facts:
    """Try everything there is to try; the programs are loaded for a moment."""
    trees = tuple(_trees())
    attempts = [
        _privileges(),
        try_bpf(),
        _bpffs(),
        *(_PREREQUISITES[name]() for name in _PREREQUISITES if name != host.BPF_SYSCALL),
        _cgroups(trees),
        _clocks(),
        _executables(),
    ]
    without = [a for a in attempts if a.name in (host.BPF_SYSCALL, host.LOCKDOWN) and a.ok is False]
    for loader, name in _LOADS.items():
        attempts.append(
            Attempt(name, None, f"not tried: {without[0].name}") if without else _load(loader)
        )
    return Facts(attempts=tuple(attempts), trees=trees, proxy_execution=_proxy_execution())


def decide(
    load: Callable[[Loader], Attempt],
    *,
    mode: Literal["auto", "bpf", "proc"] = "auto",
    loader: Literal["auto", "libbpf", "bcc"] = "auto",
) -> Choice:
    """Choose a way by using it: `load` really loads, and what it loaded is kept.

    Nothing is tried that is not needed: what a way lacks is looked up only after it
    failed. Raises NotPossibleError with the reasons.
    """
    general = (_cgroups(tuple(_trees())), _clocks())

    def verdict(way: Way) -> Verdict:
        if way.loader is None:
            return host.judge(way, Facts(attempts=general))
        # A compiler is not run, for seconds, where what it makes is refused whatever it is.
        none = way.loader == "bcc" and (try_bpf().ok is False or _lockdown().ok is False)
        loaded = Attempt(way.loader, None, "not tried") if none else load(way.loader)
        tried = msgspec.structs.replace(loaded, name=_LOADS[way.loader])
        causes = () if loaded.ok else tuple(_PREREQUISITES[name]() for name in way.before)
        return host.judge(way, Facts(attempts=(*general, *causes, tried)))

    return host.first(verdict(way) for way in host.asked(mode, loader))


def try_bpf() -> Attempt:
    """Make a small map with bpf(2), called directly, to see whether it is there for us."""
    machine = platform.machine()
    number = _NR_BPF.get(machine)
    if number is None:
        return Attempt(host.BPF_SYSCALL, None, f"system call number of {machine} is not known")
    error = _make_map(number)
    if error == errno.EPERM and _lift_memlock():
        error = _make_map(number)
    if not error:
        return Attempt(host.BPF_SYSCALL, True, "a map could be made")
    why = {
        errno.ENOSYS: "not in this kernel, or hidden by a seccomp filter (a container?)",
        errno.EPERM: "refused: no CAP_BPF or CAP_SYS_ADMIN, kernel lockdown, a seccomp filter, "
        "or RLIMIT_MEMLOCK too low",
        errno.EACCES: "refused by a security module",
    }.get(error, "unexpected")
    return Attempt(host.BPF_SYSCALL, False, f"{os.strerror(error)}: {why}")


def _make_map(number: int) -> int:
    """BPF_MAP_CREATE of an array of one value of 4 bytes; the errno, 0 if it could be made."""
    attributes = ctypes.create_string_buffer(struct.pack("5I", 2, 4, 4, 1, 0), 128)
    fd: int = _libc.syscall(number, 0, attributes, 128)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def _lift_memlock() -> bool:
    """Lift the limit on locked memory; whether there was one and it could be lifted.

    Kernels before 5.11 charge it with all maps of the user. libbpf lifts it for what it makes.
    """
    most = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK) == most:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, most)
    except (ValueError, OSError):
        return False
    return True


def _privileges() -> Attempt:
    wanted = ("CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_SYS_RESOURCE")
    held = privileges.effective()
    missing = [name for name in wanted if name not in held]
    able = "CAP_SYS_ADMIN" in held or {"CAP_BPF", "CAP_PERFMON"} <= held
    text = f"uid {os.geteuid()}" + (f", without {', '.join(missing)}" if missing else "")
    return Attempt(host.PRIVILEGES, able, text)


def _lockdown() -> Attempt:
    """See whether programs may read kernel memory (kernel_lockdown(7))."""
    try:
        levels = LOCKDOWN_FILE.read_text(encoding="ascii")
    except OSError:
        return Attempt(host.LOCKDOWN, None, f"{LOCKDOWN_FILE}: cannot be read")
    level = levels.partition("[")[2].partition("]")[0]
    if level != "confidentiality":
        return Attempt(host.LOCKDOWN, True, level or levels.strip())
    return Attempt(host.LOCKDOWN, False, "confidentiality: programs may not read kernel memory")


def _btf() -> Attempt:
    try:
        with BTF_FILE.open("rb") as file:
            (magic,) = struct.unpack("=H", file.read(2))
    except OSError as error:
        return Attempt(host.BTF, False, f"{BTF_FILE}: {error.strerror}")
    except struct.error:
        return Attempt(host.BTF, False, f"{BTF_FILE}: empty")
    return Attempt(host.BTF, magic == _BTF_MAGIC, str(BTF_FILE))


def _bpffs() -> Attempt:
    """See whether a bpffs is mounted, in which programs outlive their loader (statfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(BPFFS_FOLDER), buffer) != 0:
        reason = os.strerror(ctypes.get_errno())
        return Attempt(host.BPFFS, False, f"{BPFFS_FOLDER}: {reason}; programs cannot stay")
    (kind,) = struct.unpack_from("=l", buffer.raw)
    if kind & 0xFFFFFFFF == _BPF_FS_MAGIC:
        return Attempt(host.BPFFS, True, f"mounted on {BPFFS_FOLDER}")
    return Attempt(host.BPFFS, False, f"not mounted on {BPFFS_FOLDER} (mount -t bpf none …)")


def _object() -> Attempt:
    try:
        size = OBJECT.stat().st_size
    except OSError as error:
        return Attempt(host.OBJECT, False, f"{OBJECT}: {error.strerror}; is the package whole?")
    return Attempt(host.OBJECT, True, f"{OBJECT.name}, {size} bytes")


def _libbpf() -> Attempt:
    for name in ("libbpf.so.1", "libbpf.so.0"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = getattr(library, "libbpf_version_string", None)
        if version is None:
            return Attempt(host.LIBBPF, True, name)
        version.restype = ctypes.c_char_p
        return Attempt(host.LIBBPF, True, f"{name}, {version().decode()}")
    return Attempt(host.LIBBPF, False, "no libbpf.so.1: install libbpf1 (Debian) or libbpf (RHEL)")


def _bcc() -> Attempt:
    """BCC of the distribution; the `bcc` of PyPI is something else."""
    folders = ["/usr/lib/python3/dist-packages", "/usr/lib/python3/site-packages"]
    folders += [f"/usr/lib/python{platform.python_version().rpartition('.')[0]}/site-packages"]
    import importlib.util  # noqa: PLC0415 (a collector decides as well, and seldom asks this)

    spec = importlib.util.find_spec("bcc")
    if spec is not None and spec.origin is not None:
        folders.insert(0, str(Path(spec.origin).parent.parent))
    for folder in folders:
        if Path(folder, "bcc", "table.py").exists():
            return Attempt(host.BCC, True, f"{folder}/bcc")
    wanted = "python3-bpfcc (Debian) or python3-bcc (RHEL)"
    return Attempt(host.BCC, False, f"not installed: install {wanted}")


def _headers() -> Attempt:
    folder = Path("/lib/modules", platform.release(), "build")
    if (folder / "include").exists():
        return Attempt(host.HEADERS, True, str(folder))
    packed = Path("/sys/kernel/kheaders.tar.xz")
    if packed.exists():
        return Attempt(host.HEADERS, True, str(packed))
    return Attempt(host.HEADERS, False, f"no {folder}: install the headers of this kernel")


def _load(loader: Loader) -> Attempt:
    """Load and attach the real programs, and let go of them again."""
    name = _LOADS[loader]
    try:
        programs = importlib.import_module(PROGRAMS)
    except ModuleNotFoundError as error:
        if error.name != PROGRAMS:
            raise
        return Attempt(name, False, "this installation has no BPF programs")
    attempt: Attempt = programs.attempt(loader)
    return msgspec.structs.replace(attempt, name=name)


_LOADS: Final[dict[Loader, str]] = {"libbpf": host.LOAD_LIBBPF, "bcc": host.LOAD_BCC}
_PREREQUISITES: Final[dict[str, Callable[[], Attempt]]] = {
    host.LOCKDOWN: _lockdown,
    host.BPF_SYSCALL: try_bpf,
    host.BTF: _btf,
    host.OBJECT: _object,
    host.LIBBPF: _libbpf,
    host.BCC: _bcc,
    host.HEADERS: _headers,
}


def _trees() -> list[Tree]:
    found = []
    for hierarchy in cgroups.mounted():
        top = cgroups.at(hierarchy.mount, [hierarchy])
        counts = False
        if top is not None:
            with contextlib.suppress(FileNotFoundError):
                counts = cgroups.cpu_ns(top) is not None
        found.append(
            Tree(
                name=hierarchy.name,
                version=hierarchy.version,
                mount=hierarchy.mount,
                cpu_counter=counts,
            )
        )
    return found


def _cgroups(trees: tuple[Tree, ...]) -> Attempt:
    if not trees:
        return Attempt(host.CGROUPS, False, "no hierarchy is mounted: mount cgroup2")
    shown = ", ".join(f"{t.name}{' (CPU counter)' if t.cpu_counter else ''}" for t in trees)
    return Attempt(host.CGROUPS, True, shown)


def _clocks() -> Attempt:
    """Read another process's CPU clock: the parent's, as sampling does with the job's."""
    clock = (~os.getppid() << 3) | 2
    try:
        time.clock_gettime_ns(clock)
    except OSError as error:
        return Attempt(host.CLOCKS, False, f"{error.strerror}")
    return Attempt(host.CLOCKS, True, "clocks of other processes can be read")


def _executables() -> Attempt:
    """Tell whether executables of other users' processes can be read (proc(5), ptrace(2))."""
    if "CAP_SYS_PTRACE" in privileges.effective():
        return Attempt(host.EXECUTABLES, True, "executables of other users can be read")
    return Attempt(
        host.EXECUTABLES, False, "executables of other users cannot be read without CAP_SYS_PTRACE"
    )


def _proxy_execution() -> bool:
    """Tell whether the kernel may run one task on another's account.

    There is no file that says so: the build's configuration and the command line do.
    """
    import gzip  # noqa: PLC0415 (a collector decides as well, and does not ask this)

    release = platform.release()
    configuration = ""
    for path in (Path("/proc/config.gz"), Path(f"/boot/config-{release}")):
        with contextlib.suppress(OSError, EOFError):
            data = path.read_bytes()
            text = gzip.decompress(data) if path.suffix == ".gz" else data
            configuration = text.decode("ascii", "replace")
            break
    if "\nCONFIG_SCHED_PROXY_EXEC=y\n" not in configuration:
        return False
    off = re.search(r"\bsched_proxy_exec=(0|n|off|false)\b", _command_line(), re.IGNORECASE)
    return off is None


def _command_line() -> str:
    try:
        return Path("/proc/cmdline").read_text()
    except OSError:
        return ""


def _plain(facts: Facts, verdicts: tuple[Verdict, ...], choice: Choice | None) -> dict[str, object]:
    return {
        "would_use": None if choice is None else {"mode": choice.mode, "loader": choice.loader},
        "kernel": platform.release(),
        "ways": [
            {
                "mode": verdict.way.mode,
                "loader": verdict.way.loader,
                "possible": verdict.possible,
                "reason": verdict.reason or None,
            }
            for verdict in verdicts
        ],
        "tried": [{"name": a.name, "ok": a.ok, "detail": a.detail} for a in facts.attempts],
        "cgroups": [
            {
                "name": tree.name,
                "version": tree.version,
                "mount": tree.mount,
                "cpu_counter": tree.cpu_counter,
            }
            for tree in facts.trees
        ],
        "warnings": host.warnings(facts),
    }


def _table(facts: Facts, verdicts: tuple[Verdict, ...], choice: Choice | None) -> str:
    words = {True: "yes", False: "no", None: "-"}
    width = max(len(attempt.name) for attempt in facts.attempts)
    lines = [f"Kernel {platform.release()}, {platform.machine()}", "", "Tried here"]
    lines += [f"  {a.name:<{width}}  {words[a.ok]:<3}  {a.detail}" for a in facts.attempts]
    lines += ["", "Ways to measure, best first"]
    width = max(len(verdict.way.name) for verdict in verdicts)
    lines += [
        f"  {v.way.name:<{width}}  {words[v.possible]:<3}  {v.reason}".rstrip() for v in verdicts
    ]
    lines += [f"warning: {text}" for text in host.warnings(facts)]
    if choice is None:
        lines += ["", "Nothing can be measured here."]
    else:
        way = (
            choice.mode if choice.loader is None else f"{choice.mode}, loaded with {choice.loader}"
        )
        lines += ["", f"Mode auto would use: {way}"]
    return "\n".join(lines)
