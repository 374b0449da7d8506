"""Bodies, headers and connections that mean no good. All reproducible from a seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import NamedTuple

import batches
import msgspec
from backports import zstd

from sams_ebpf import wire

Chance = random.Random


class Request(NamedTuple):
    """One request: what it is, where it goes, how it says that it is encoded, its body."""

    what: str
    path: str
    headers: dict[str, str]
    body: bytes


def request(seed: int) -> Request:
    """The request of that seed."""
    chance = random.Random(seed)
    what, make = chance.choice(_KINDS)
    path = "/v1/batches"
    headers = {"Content-Type": "application/msgpack"}
    made = make(chance)
    if isinstance(made, Request):
        return made._replace(what=what)
    if chance.random() < 0.3:
        made = zstd.compress(made, 1)
        headers["Content-Encoding"] = "zstd"
    return Request(what, path, headers, made)


def _valid(chance: Chance) -> bytes:
    return batches.encoded(
        node=f"h{chance.randrange(50)}",
        job=chance.randrange(1 << 30),
        sequence=chance.randrange(1000),
        records=chance.randrange(12),
    )


def _plain(chance: Chance) -> dict[str, object]:
    return wire.to_plain(_valid(chance))


def mutated(chance: Chance) -> bytes:
    """A valid one with bytes changed, cut out, doubled or added."""
    data = bytearray(_valid(chance))
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data))
        match chance.randrange(5):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.choice((0, 0x80, 0xC0, 0xC1, 0xC6, 0xCF, 0xDD, 0xDF, 0xFF))
            case 2:
                del data[at : at + chance.randrange(1, 20)]
            case 3:
                data[at:at] = data[at : at + chance.randrange(1, 50)]
            case _:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
        if not data:
            return b"\x80"
    return bytes(data)


def _random(chance: Chance) -> bytes:
    return chance.randbytes(chance.randrange(2000))


def _deep(chance: Chance) -> bytes:
    depth = chance.choice((100, 5_000, 200_000, 2_000_000))
    opener = chance.choice((b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01"))
    nested = opener * depth + b"\xc0"
    if chance.random() < 0.5:
        # At a place where a reader looks, or at one that it skips over.
        head = msgspec.msgpack.encode({"v": 1})
        key = chance.choice((b"\xa7records", b"\xa6claims", b"\xa7unknown"))
        return b"\x82" + head[1:] + key + nested
    return nested


def _length(chance: Chance) -> bytes:
    size = chance.choice((1 << 16, 1 << 24, (1 << 31) - 1, (1 << 32) - 1))
    kind = chance.choice((0xC6, 0xDB, 0xDD, 0xDF, 0xC9))
    claimed = bytes([kind]) + struct.pack(">I", size) + chance.randbytes(chance.randrange(50))
    if chance.random() < 0.5:
        return claimed
    head = msgspec.msgpack.encode({"v": 1})
    return b"\x82" + head[1:] + chance.choice((b"\xa7records", b"\xa5epoch", b"\xa3new")) + claimed


_VALUES: tuple[object, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, float("nan"),
    float("inf"), "", "x", "x" * 70_000, b"", b"\0" * 16, b"\xff" * 8, [], {}, [[]], [None] * 70,
    [{}] * 1000, {"a": {"b": {}}}, "../../etc/passwd", "\0", "a\nb", "\u202e", "n1/../n2",
    msgspec.msgpack.Ext(5, b"x"),
)  # fmt: skip


def _types(chance: Chance) -> bytes:
    document = _plain(chance)
    for _ in range(chance.randint(1, 3)):
        document[chance.choice(list(document))] = chance.choice(_VALUES)
    return msgspec.msgpack.encode(document)


def _record_types(chance: Chance) -> bytes:
    document = _plain(chance)
    row: list[object] = [b"/x", 0, None, 1, *[None] * (len(wire.FIELDS) - 4)]
    for _ in range(chance.randint(1, 4)):
        row[chance.randrange(len(row))] = chance.choice(_VALUES)
    rows: list[object] = [row] * chance.choice((1, 3, 5000))
    if chance.random() < 0.3:
        rows.append(chance.choice(_VALUES))
    document["records"] = rows
    if chance.random() < 0.3:
        fields = list(wire.FIELDS)
        chance.shuffle(fields)
        document["fields"] = fields
    return msgspec.msgpack.encode(document)


def _names(chance: Chance) -> bytes:
    tricks = ("../n1", "/etc/passwd", "n1\0", "n1\n", "..", ".", "", "n" * 255, "n" * 5000, "🙂",
              "n1;rm -rf /", "$(id)", "%2e%2e%2f", "n1\r\nX: y", "\ud800")  # fmt: skip
    document = _plain(chance)
    claims = dict(document["claims"])  # type: ignore[call-overload]
    for key in chance.sample(["node", "cluster", "user", "job_name", "boot_id", "start_text"], 2):
        claims[key] = chance.choice(tricks).encode("utf-8", "replace").decode()
    document["claims"] = claims
    return msgspec.msgpack.encode(document)


def _bomb(chance: Chance) -> Request:
    match chance.randrange(6):
        case 0:
            body = _BOMBS[0]
        case 1:
            body = _BOMBS[1]
        case 2:
            body = zstd.compress(_valid(chance))[: -chance.randrange(1, 20)]
        case 3:
            body = zstd.compress(_valid(chance)) + chance.randbytes(5)
        case 4:
            body = chance.randbytes(300)
        case _:
            damaged = bytearray(zstd.compress(_valid(chance)))
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            body = bytes(damaged)
    headers = {"Content-Type": "application/msgpack", "Content-Encoding": "zstd"}
    return Request("", "/v1/batches", headers, body)


def _make_bombs() -> tuple[bytes, bytes]:
    # 9 kB that become 280 MB; and some that ask their reader for a window of 128 MB.
    made = []
    for window in (20, 27):
        stream = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window})
        pieces = [stream.compress(bytes(1 << 20)) for _ in range(280)]
        made.append(b"".join([*pieces, stream.flush()]))
    return made[0], made[1]


_BOMBS = _make_bombs()


def _headers(chance: Chance) -> Request:
    headers = {
        "Content-Type": chance.choice(
            ("application/msgpack", "application/json", "text/plain", "", "x" * 500, "a/b;" * 50)
        ),
        "Content-Encoding": chance.choice(("gzip", "br", "deflate", "zstd, zstd", "identity", "x")),
    }
    return Request("", "/v1/batches", headers, _valid(chance))


def _paths(chance: Chance) -> Request:
    path = chance.choice(
        ("/", "/v1", "/v1/batches/", "/v1/batches?x=1", "/v2/batches", "/../etc/passwd",
         "/%2e%2e/x", "/1/../../x.json", "/1/%2e%2e", "/1/..", "/1/.hidden", "/x/y.json",
         "/99999999999999999999/x.json", "/1/a/b.json", "/1/" + "a" * 3000, "//1/x.json",
         "/1/%00.json", "/1/x.json%0a")
    )  # fmt: skip
    return Request("", path, {"Content-Type": "application/json"}, b'{"a": 1}')


def _json(chance: Chance) -> Request:
    job = str(chance.randrange(1, 1 << 40))
    good = {"sams.sampler.Core": {"jobid": int(job), "node": "n1"}, "sams.sampler.Software": {}}
    text = msgspec.json.encode(good)
    body = chance.choice(
        (
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b'{"sams.sampler.Core": {"jobid": 1e999, "node": "n1"}}',
            b'{"sams.sampler.Core": {"jobid": ' + b"9" * 5000 + b', "node": "n1"}}',
            text[: chance.randrange(len(text))],
            text.replace(b"n1", chance.choice((b"../x", b"", b"\\u0000", b"\xff", b"n" * 500))),
            text.replace(job.encode(), b"5", 1),
            b"null", b"", b"\xff\xfe", b'"x"', b"NaN",
            text[:-1] + b',"x":' + b"[" * 3000 + b"]" * 3000 + b"}",
        )
    )  # fmt: skip
    return Request("", f"/{job}/{job}.n1.json", {"Content-Type": "application/json"}, body)


_KINDS: tuple[tuple[str, Callable[[Chance], bytes | Request]], ...] = (
    ("mutated", mutated),
    ("mutated", mutated),
    ("mutated", mutated),
    ("random", _random),
    ("deep", _deep),
    ("length", _length),
    ("types", _types),
    ("types", _types),
    ("record types", _record_types),
    ("names", _names),
    ("bomb", _bomb),
    ("headers", _headers),
    ("paths", _paths),
    ("json", _json),
)


def raw(seed: int, token: str) -> bytes:
    """What is not even HTTP, or HTTP of the wrong sort; the sender closes behind it."""
    chance = random.Random(seed)
    head = b"POST /v1/batches HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token.encode()
    head += b"\r\nContent-Type: application/msgpack\r\n"
    body = _valid(chance)
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    return chance.choice(
        (
            chance.randbytes(400),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(300),
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST " + b"/" * 20_000 + b" HTTP/1.1\r\n\r\n",
            head + b"X: " + b"y" * 100_000 + b"\r\n" + length + body,
            head + b"".join(b"X-%d: y\r\n" % n for n in range(2000)) + length + body,
            head + b"Content-Length: -1\r\n\r\n" + body,
            head + b"Content-Length: 99999999999999999999\r\n\r\n" + body,
            head + b"Content-Length: 5\r\n" + length + body,
            head + b"Transfer-Encoding: chunked\r\n" + length + body,
            head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + body,
            head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 500 + b"0\r\n\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
            head + length + body[: len(body) // 2],
            head + b"Expect: 100-continue\r\n" + length + body,
            head + b"Upgrade: websocket\r\nConnection: upgrade\r\n" + length + body,
            head.replace(b"Bearer", b"B\0arer") + length + body,
            b"\r\n" * 5000,
        )
    )
