"""The receiver with its store replaced by a file per batch, written and synced in the handler."""

from __future__ import annotations

import sys
from typing import Any

from sams_ebpf import durable
from sams_receiver import __main__ as program
from sams_receiver import serve
from sams_receiver.archive import Item
from sams_receiver.archive.format import Tag
from sams_receiver.archive.seen import Verdict
from sams_receiver.store import Store


class FilePerBatch(Store):
    """Everything else is the same: authentication, limits, validation, metrics."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._files = self._folder / "files"
        self._files.mkdir()

    async def put(self, cluster: str | None, node: str | None, item: Item, tag: Tag) -> Verdict:
        """Write, sync, rename, sync, in the event loop."""
        del cluster, node
        durable.write(self._files / f"{tag.key.hex()}-{tag.sequence}.msgpack", item.data)
        return Verdict.NEW


if __name__ == "__main__":
    serve.Store = FilePerBatch  # type: ignore[attr-defined]
    sys.exit(program.main())
