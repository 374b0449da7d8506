"""Strict reading of the site's one YAML file: a section per part, unknown keys refused.

Each program describes the sections it uses as one frozen `msgspec.Struct` with
`forbid_unknown_fields`, and leaves the other programs' sections alone.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sams_ebpf.errors import UsageError

SECTIONS = ("site", "collector", "spool", "ship", "receiver", "aggregator", "software")
MAX_BYTES = 16 << 20
MAX_SECRET_BYTES = 64 << 10
# A node's or a cluster's name; a receiver refuses batches that claim any other.
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")

T = TypeVar("T", bound=msgspec.Struct)


def load(path: Path, model: type[T]) -> T:
    """Read `path` into `model`, a Struct whose fields are sections.

    Raises UsageError with one line that names the file, the key and the fix.
    """
    document = read_yaml(path, strict=True)
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise UsageError(f"{path}: the top level has to be a mapping of sections")
    for name in document:
        if name not in SECTIONS:
            raise UsageError(f"{path}: {name}: unknown section{_hint(str(name), SECTIONS)}")
    wanted = {
        key: value
        for key, value in document.items()
        if key in model.__struct_fields__ and value is not None
    }
    return convert(wanted, model, str(path))


def read_yaml(path: Path, *, strict: bool = False) -> Any:  # noqa: ANN401
    """Parse one YAML document, or raise UsageError with file and line.

    strict: a key may not stand twice in one mapping.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_BYTES:
        raise UsageError(f"{path}: larger than {MAX_BYTES} bytes")
    import yaml  # noqa: PLC0415 (a megabyte that a node without a file does without)

    try:
        return yaml.load(text, _strict_loader() if strict else yaml.SafeLoader)  # noqa: S506 - both are safe
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise UsageError(f"{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        # A value of the right looks that is none (2026-02-31, !!int x): PyYAML lets through
        # whatever its conversion raises.
        raise UsageError(f"{path}: not valid YAML: {error!s:.200}") from error


def _strict_loader() -> Any:  # noqa: ANN401
    """PyYAML's safe loader, but for a key that stands twice: the first was meant, too."""
    import yaml  # noqa: PLC0415

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value}: stands there twice", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Strict


def read_secret(path: Path) -> str:
    """Read a file with one line that only its owner and group may read.

    Raises UsageError when it belongs to someone else than root or this user, when others
    may read it or its group write it, or when it does not hold one line of ASCII.
    """
    return _secret_line(path, _secret_bytes(path))


def check_secret(path: Path) -> None:
    """Check owner and permissions of a secret that a library reads itself (a key)."""
    _secret_bytes(path)


def _secret_bytes(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path}: not a regular file")
        if found.st_uid not in (0, os.geteuid()):
            raise UsageError(f"{path}: belongs to user {found.st_uid}: chown it to root")
        if found.st_mode & 0o027:
            mode = stat.S_IMODE(found.st_mode)
            raise UsageError(f"{path}: a secret with mode {mode:04o}: chmod it to 0640 or stricter")
        return os.read(fd, MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def _secret_line(path: Path, data: bytes) -> str:
    try:
        text = data.decode("ascii").removesuffix("\n")
    except UnicodeDecodeError:
        text = ""
    if not text.strip() or not text.isprintable() or len(data) > MAX_SECRET_BYTES:
        raise UsageError(f"{path}: has to hold one line of printable ASCII")
    return text.strip()


def convert(document: object, model: type[T], where: str) -> T:
    """Turn plain YAML data into `model`; UsageError names the key within `where`."""
    try:
        return msgspec.convert(document, model, dec_hook=_decode)
    except msgspec.ValidationError as error:
        message = _explain(str(error), model)
        head, found, tail = message.partition("[...]")
        if found:
            message = f"{head}{_which(document, model, str(error), head)}{tail}"
        raise UsageError(f"{where}: {message}") from error


def _which(document: object, model: type[msgspec.Struct], error: str, key: str) -> str:
    """Name the member of the mapping at a dotted key that an error is about."""
    place: object = document
    for part in key.split("."):
        place = place.get(part) if isinstance(place, dict) else None
    for name in place if isinstance(place, dict) else ():
        alone: object = {name: place[name]} if isinstance(place, dict) else None
        for part in reversed(key.split(".")):
            alone = {part: alone}
        try:
            msgspec.convert(alone, model, dec_hook=_decode)
        except msgspec.ValidationError as again:
            if str(again) == error:
                return f".{name}"
    return "[...]"


def _decode(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)


def _explain(message: str, model: type[msgspec.Struct]) -> str:
    text, _, place = message.partition(" - at `")
    name_in = re.fullmatch(r"key` in `(.*)`", place)
    if name_in is not None:
        place, text = name_in[1], f"a name in it does not fit: {text}"
    key = place.rstrip("`").removeprefix("$").lstrip(".")
    unknown = re.match(r"Object contains unknown field `(.*)`", text, re.DOTALL)
    if unknown is None:
        return f"{key or 'document'}: {text}"
    name = unknown.group(1)
    known = _fields_at(model, key)
    return f"{f'{key}.{name}' if key else name}: unknown key{_hint(name, known)}"


def _fields_at(model: type[msgspec.Struct], key: str) -> tuple[str, ...]:
    """Names of the fields of the struct that stands at a dotted key below model."""
    info: Any = msgspec.inspect.type_info(model)
    for part in re.findall(r"\[\.\.\.\]|\[\d+\]|[^.\[]+", key):
        if part.startswith("["):
            info = getattr(info, "item_type", getattr(info, "value_type", None))
        else:
            found = [f.type for f in getattr(info, "fields", ()) if f.encode_name == part]
            info = found[0] if found else None
        if isinstance(info, msgspec.inspect.UnionType):
            structs = [t for t in info.types if isinstance(t, msgspec.inspect.StructType)]
            info = structs[0] if structs else None
    return tuple(field.encode_name for field in getattr(info, "fields", ()))


def _hint(name: str, known: tuple[str, ...]) -> str:
    import difflib  # noqa: PLC0415 (only for an error's text)

    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
