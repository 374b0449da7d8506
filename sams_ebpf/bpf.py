"""The only door to bpf(2): libbpf by ctypes, maps and links as file descriptors.

Nothing here knows what the maps mean. libbpf compiles nothing, needs no headers, and is
let go of once the programs run: what stays open are plain descriptors.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sams_ebpf.errors import SamsError

ANY: Final = 0
NOEXIST: Final = 1
_TRACE_ITER: Final = 28  # enum bpf_attach_type in linux/bpf.h


class BpfError(SamsError):
    """The kernel or libbpf refused something; the message has their reason."""

    exit_status = 3

    def __init__(self, what: str, number: int = 0, detail: str = "") -> None:
        reason = os.strerror(number) if number else ""
        super().__init__(": ".join(part for part in (what, reason, detail) if part))
        self.errno = number


def _load_library() -> ctypes.CDLL:
    reason = ""
    for name in ("libbpf.so.1", "libbpf.so.0"):
        try:
            return ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            reason = str(error)
    raise BpfError("libbpf cannot be loaded", 0, f"{reason}; install libbpf1 (libbpf on RHEL)")


_library: ctypes.CDLL | None = None

_VP, _INT, _U32, _SIZE, _CHARS = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_size_t,
    ctypes.c_char_p,
)
_PROTOTYPES: Final = {
    "bpf_object__open_mem": (_VP, [_CHARS, _SIZE, _VP]),
    "bpf_object__load": (_INT, [_VP]),
    "bpf_object__close": (None, [_VP]),
    "bpf_object__next_map": (_VP, [_VP, _VP]),
    "bpf_object__next_program": (_VP, [_VP, _VP]),
    "bpf_map__name": (_CHARS, [_VP]),
    "bpf_map__fd": (_INT, [_VP]),
    "bpf_map__set_max_entries": (_INT, [_VP, _U32]),
    "bpf_map__key_size": (_U32, [_VP]),
    "bpf_map__value_size": (_U32, [_VP]),
    "bpf_map__initial_value": (_VP, [_VP, ctypes.POINTER(_SIZE)]),
    "bpf_program__name": (_CHARS, [_VP]),
    "bpf_program__fd": (_INT, [_VP]),
    "bpf_program__set_autoload": (_INT, [_VP, ctypes.c_bool]),
    "bpf_map_lookup_elem": (_INT, [_INT, _VP, _VP]),
    "bpf_map_lookup_batch": (_INT, [_INT, _VP, _VP, _VP, _VP, _VP, _VP]),
    "bpf_map_lookup_and_delete_elem": (_INT, [_INT, _VP, _VP]),
    "bpf_map_update_elem": (_INT, [_INT, _VP, _VP, ctypes.c_uint64]),
    "bpf_map_delete_elem": (_INT, [_INT, _VP]),
    "bpf_map_get_next_key": (_INT, [_INT, _VP, _VP]),
    "bpf_obj_pin": (_INT, [_INT, _CHARS]),
    "bpf_obj_get": (_INT, [_CHARS]),
    "bpf_obj_get_info_by_fd": (_INT, [_INT, _VP, _VP]),
    "bpf_raw_tracepoint_open": (_INT, [_CHARS, _INT]),
    "bpf_link_create": (_INT, [_INT, _INT, _INT, _VP]),
    "bpf_iter_create": (_INT, [_INT]),
    "bpf_prog_test_run_opts": (_INT, [_INT, _VP]),
}


def library() -> ctypes.CDLL:
    """Load libbpf once. Raises BpfError where there is none."""
    global _library  # noqa: PLW0603 (one library per process)
    if _library is None:
        loaded = _load_library()
        try:
            for name, (result, arguments) in _PROTOTYPES.items():
                function = getattr(loaded, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise BpfError(f"this libbpf is too old: {error}") from error
        _library = loaded
    return _library


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno() or -result
        raise BpfError(what, number)
    return result


class Map:
    """An open map: keys and values are bytes of the map's own sizes."""

    __slots__ = ("_lookup", "_value", "fd", "key_size", "name", "value_size")

    def __init__(self, name: str, fd: int, key_size: int, value_size: int) -> None:
        self.name = name
        self.fd = fd
        self.key_size = key_size
        self.value_size = value_size
        self._value = ctypes.create_string_buffer(value_size)
        self._lookup = library().bpf_map_lookup_elem  # thousands a harvest

    def lookup(self, key: bytes) -> bytes | None:
        """Value at key; None if there is none."""
        if self._lookup(self.fd, key, self._value) < 0:
            self._absent("look-up")
            return None
        return self._value.raw

    def array(self, count: int) -> Iterator[bytes]:
        """Yield the values of an array of `count` elements.

        Many in one call where the kernel can (5.6 and later): four times as fast.
        """
        size, many, done = self.value_size, 64, 0
        keys, after = (_U32 * many)(), _U32()
        values = ctypes.create_string_buffer(many * size)
        while done < count:
            got = _U32(min(many, count - done))
            before = ctypes.byref(after) if done else None
            code = library().bpf_map_lookup_batch(
                self.fd, before, ctypes.byref(after), keys, values, ctypes.byref(got), None
            )
            if code < 0 or not got.value:
                break
            data = values.raw
            yield from (data[at : at + size] for at in range(0, got.value * size, size))
            done += got.value
        for key in range(done, count):
            yield self.lookup(key.to_bytes(4, "little")) or bytes(size)

    def update(self, key: bytes | None, value: bytes, flags: int = ANY) -> bool:
        """Set the value; False where NOEXIST met an element. A queue's key is None."""
        if library().bpf_map_update_elem(self.fd, key, value, flags) < 0:
            number = ctypes.get_errno()
            if number == errno.EEXIST:
                return False
            raise BpfError(f"map {self.name}: update", number)
        return True

    def delete(self, key: bytes) -> bool:
        """Remove the element; False if there was none."""
        if library().bpf_map_delete_elem(self.fd, key) < 0:
            self._absent("delete")
            return False
        return True

    def pop(self) -> bytes | None:
        """Take the next of a queue; None if it is empty."""
        if library().bpf_map_lookup_and_delete_elem(self.fd, None, self._value) < 0:
            self._absent("pop")
            return None
        return self._value.raw

    def all_keys(self) -> list[bytes]:
        """All keys now; elements made or removed meanwhile may or may not be among them."""
        found: list[bytes] = []
        key: bytes | None = None
        after = ctypes.create_string_buffer(self.key_size)
        while library().bpf_map_get_next_key(self.fd, key, after) == 0:
            key = after.raw
            found.append(key)
        if ctypes.get_errno() != errno.ENOENT:
            raise BpfError(f"map {self.name}: keys", ctypes.get_errno())
        return found

    def _absent(self, what: str) -> None:
        number = ctypes.get_errno()
        if number != errno.ENOENT:
            raise BpfError(f"map {self.name}: {what}", number)

    def close(self) -> None:
        """Let go of the map; pinned or used by a program, it lives on."""
        os.close(self.fd)


class _MapInfo(ctypes.Structure):  # the beginning of struct bpf_map_info
    _fields_ = (("type", _U32), ("id", _U32), ("key_size", _U32), ("value_size", _U32))


def open_map(path: Path) -> Map:
    """Open a pinned map. Raises BpfError if it is not there."""
    fd = open_pinned(path)
    info, size = _MapInfo(), _U32(ctypes.sizeof(_MapInfo))
    code = library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    _check(code, f"{path}: is no map")
    return Map(path.name, fd, info.key_size, info.value_size)


def open_pinned(path: Path) -> int:
    """Open any pinned object; its descriptor."""
    return _check(library().bpf_obj_get(os.fsencode(path)), f"{path}: cannot be opened")


def pin(fd: int, path: Path) -> None:
    """Give an object a name in bpffs, so that it outlives this process."""
    _check(library().bpf_obj_pin(fd, os.fsencode(path)), f"{path}: cannot be pinned")


def attach_raw_tracepoint(name: str, program_fd: int, *, typed: bool) -> int:
    """Run the program at a tracepoint; descriptor of the link.

    typed: it was loaded for this tracepoint, for the sake of its arguments' types, and the
    kernel does not want to be told again (BPF_RAW_TRACEPOINT_OPEN).
    """
    what = f"tracepoint {name}: cannot be attached to"
    return _check(
        library().bpf_raw_tracepoint_open(None if typed else name.encode(), program_fd), what
    )


def mount(source: bytes, target: Path, kind: bytes) -> int:
    """Mount a file system; 0, or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, os.fsencode(target), kind, 0, None) == 0:
        return 0
    return ctypes.get_errno()


class _LinkOptions(ctypes.Structure):  # struct bpf_link_create_opts of libbpf
    _fields_ = (
        ("sz", _SIZE),
        ("flags", _U32),
        ("iter_info", _VP),
        ("iter_info_len", _U32),
        ("target_btf_id", _U32),
        ("room", ctypes.c_uint64 * 4),
    )


def attach_iterator(program_fd: int, over: Map | None = None) -> int:
    """Make an iterator program ready to be run, over the elements of a map if given."""
    options = _LinkOptions(sz=_LinkOptions.target_btf_id.offset + 4)
    info = _U32(over.fd if over is not None else 0)
    if over is not None:
        options.iter_info = ctypes.cast(ctypes.pointer(info), _VP)
        options.iter_info_len = ctypes.sizeof(info)
    link = library().bpf_link_create(program_fd, 0, _TRACE_ITER, ctypes.byref(options))
    return _check(link, "iterator: cannot be attached")


def run_iterator(link_fd: int) -> bytes:
    """Run it over all its objects; what it wrote."""
    fd = _check(library().bpf_iter_create(link_fd), "iterator: cannot be run")
    try:
        output = b""
        while piece := os.read(fd, 65536):
            output += piece
        return output
    finally:
        os.close(fd)


class _RunOptions(ctypes.Structure):  # struct bpf_test_run_opts of libbpf
    _fields_ = (
        ("sz", _SIZE),
        ("data_in", _VP),
        ("data_out", _VP),
        ("data_size_in", _U32),
        ("data_size_out", _U32),
        ("ctx_in", _VP),
        ("ctx_out", _VP),
        ("ctx_size_in", _U32),
        ("ctx_size_out", _U32),
        ("retval", _U32),
        ("repeat", _INT),
        ("duration", _U32),
        ("flags", _U32),
        ("cpu", _U32),
        ("batch_size", _U32),
    )


def run_program(program_fd: int, arguments: tuple[int, ...]) -> int:
    """Run a program of a raw tracepoint once, with these arguments; what it returned."""
    values = (ctypes.c_uint64 * len(arguments))(*arguments)
    options = _RunOptions(
        sz=ctypes.sizeof(_RunOptions),
        ctx_in=ctypes.cast(values, _VP),
        ctx_size_in=ctypes.sizeof(values),
    )
    result = library().bpf_prog_test_run_opts(program_fd, ctypes.byref(options))
    _check(result, "program: cannot be run")
    return int(options.retval)


class _OpenOptions(ctypes.Structure):  # struct bpf_object_open_opts of libbpf
    _fields_ = (
        ("sz", _SIZE),
        ("object_name", _CHARS),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", _CHARS),
        ("room", _U32),
        ("kconfig", _CHARS),
        ("btf_custom_path", _CHARS),
    )


class Object:
    """An object file between opening and loading: the time to size maps and set options."""

    def __init__(self, data: bytes, btf: Path | None = None) -> None:
        self._data = data  # libbpf refers to it
        options = _OpenOptions(sz=ctypes.sizeof(_OpenOptions))
        if btf is not None:
            options.btf_custom_path = os.fsencode(btf)
        with _log() as lines:
            handle = library().bpf_object__open_mem(data, len(data), ctypes.byref(options))
            if not handle:
                raise BpfError("the BPF object cannot be read", ctypes.get_errno(), _last(lines))
        self._handle = handle
        self._maps = dict(self._items("bpf_object__next_map", "bpf_map__name"))
        self._programs = dict(self._items("bpf_object__next_program", "bpf_program__name"))

    def _items(self, following: str, name: str) -> Iterator[tuple[str, int]]:
        item = getattr(library(), following)(self._handle, None)
        while item:
            yield getattr(library(), name)(item).decode(), item
            item = getattr(library(), following)(self._handle, item)

    def resize(self, sizes: dict[str, int]) -> None:
        """Set how many elements maps have room for."""
        for name, size in sizes.items():
            what = f"map {name}: size {size}"
            if name not in self._maps:
                raise BpfError(f"{what}: not in the BPF object; it is of another version")
            _check(library().bpf_map__set_max_entries(self._maps[name], size), what)

    def read_only_data(self) -> ctypes.Array[ctypes.c_char]:
        """The programs' constants, writable until `load`."""
        name = next(name for name in self._maps if name.endswith(".rodata"))
        size = _SIZE()
        address = library().bpf_map__initial_value(self._maps[name], ctypes.byref(size))
        if not address:
            raise BpfError("the BPF object's options cannot be set")
        return (ctypes.c_char * size.value).from_address(address)

    def load(self, programs: set[str]) -> tuple[dict[str, Map], dict[str, int]]:
        """Make the maps and load the programs named; their descriptors are the caller's."""
        for name, program in self._programs.items():
            library().bpf_program__set_autoload(program, name in programs)
        with _log() as lines:
            result = library().bpf_object__load(self._handle)
            if result < 0:
                raise BpfError("the kernel refuses the BPF programs", -result, _last(lines))
        maps = {
            name: Map(
                name,
                os.dup(library().bpf_map__fd(handle)),
                library().bpf_map__key_size(handle),
                library().bpf_map__value_size(handle),
            )
            for name, handle in self._maps.items()
            if "." not in name
        }
        loaded = {
            name: os.dup(library().bpf_program__fd(self._programs[name])) for name in programs
        }
        return maps, loaded

    def close(self) -> None:
        """Give back libbpf's own memory and descriptors."""
        library().bpf_object__close(self._handle)
        # What libbpf needed for a moment would else stay with a collector for its life.
        ctypes.CDLL(None).malloc_trim(0)


_WARNING_BYTES: Final = 4 << 20
_PRINT = ctypes.CFUNCTYPE(_INT, _INT, _CHARS, _VP)


@contextlib.contextmanager
def _log() -> Iterator[list[str]]:
    """Keep what libbpf says instead of printing it."""
    lines: list[str] = []
    libc = ctypes.CDLL(None)
    libc.vsnprintf.argtypes = [_VP, _SIZE, _CHARS, _VP]

    def keep(level: int, pattern: bytes, arguments: int) -> int:
        # A warning may be the verifier's whole log, whose end names the cause; a va_list
        # can be read once, so there is no asking for the size before.
        buffer = ctypes.create_string_buffer(_WARNING_BYTES if level == 0 else 4096)
        libc.vsnprintf(buffer, len(buffer), pattern, arguments)
        lines.extend(buffer.value.decode("utf-8", "replace").splitlines())
        del lines[:-200]
        return 0

    callback = _PRINT(keep)
    library().libbpf_set_print.restype = _VP
    before = library().libbpf_set_print(callback)
    try:
        yield lines
    finally:
        library().libbpf_set_print(ctypes.cast(before, _PRINT) if before else None)


def _last(lines: list[str]) -> str:
    """Give the line of libbpf's or the verifier's words that names the cause."""
    words = [
        line
        for line in lines
        if line
        and not line.startswith(("libbpf: failed to load", "-- ", "processed", "libbpf: prog"))
    ]
    causes = [line for line in words if not line.startswith(("libbpf: elf", ";", "0:"))]
    return (causes or words or [""])[-1].removeprefix("libbpf: ")
