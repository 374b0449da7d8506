"""What cannot be used is kept beside the archive with its reason, within a bound."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

log = logging.getLogger(__name__)

SUFFIX = ".aside"


class Aside:
    """A folder of files, each one line of JSON that gives the reason, then the bytes.

    Nothing here is acknowledged to anybody, so nothing is synced; and what does not fit
    into max_bytes is dropped with a line in the log.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.dropped = 0
        self.bytes = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))

    def put(
        self, kind: str, data: bytes, facts: Mapping[str, object], name: str | None = None
    ) -> bool:
        """Keep data; the same data under the same name is kept once. False if it was dropped."""
        digest = blake2b(data, digest_size=8).hexdigest()
        path = self.folder / f"{kind}-{name or time.strftime('%Y%m%d', time.gmtime())}-{digest}"
        path = path.with_name(path.name + SUFFIX)
        head = json.dumps({"kind": kind, "bytes": len(data), **facts}).encode() + b"\n"
        if self.bytes + len(head) + len(data) > self.max_bytes:
            return self._drop(f"{kind}: {len(data)} bytes do not fit any more")
        try:
            self.folder.mkdir(mode=0o750, exist_ok=True)
            with path.open("xb") as file:
                file.write(head)
                file.write(data)
        except FileExistsError:
            return True
        except OSError as error:
            path.unlink(missing_ok=True)
            return self._drop(f"{kind}: {error.strerror}")
        self.bytes += len(head) + len(data)
        return True

    def take_file(self, path: Path, reason: str) -> None:
        """Move a whole file here, whatever its size: it may be all there is of its data."""
        self.folder.mkdir(mode=0o750, exist_ok=True)
        target = self.folder / f"{path.parent.name}-{path.name}-{time.time_ns()}{SUFFIX}"
        path.rename(target)
        self.bytes += target.stat().st_size
        log.error("%s; moved to %s", reason, target)

    def _drop(self, what: str) -> bool:
        self.dropped += 1
        log.warning("%s: %s; dropped", self.folder, what)
        return False
