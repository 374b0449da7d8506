"""The plainest way to apply rules: a loop over `re`. What the fast way is compared with."""

from __future__ import annotations

import re
from typing import Any

FIELDS = ("software", "version", "versionstr")
Mapped = tuple[str, str, str, bool, bool]


class Reference:
    def __init__(self, document: dict[str, Any]) -> None:
        self.rules = [(re.compile(rule["match"]), rule) for rule in document.get("rules", [])]
        self.rewrites = [
            ([(key, re.compile(rx)) for key, rx in entry["match"].items()], entry["update"])
            for entry in document.get("rewrite", [])
        ]
        self.stop = document.get("stop_on_rewrite_match", False)

    def map(self, path: bytes) -> Mapped | None:
        text = path.decode("utf-8", "surrogateescape")
        for regex, rule in self.rules:
            found = regex.match(text)
            if found:
                fields = {name: rule[name] % found.groupdict() for name in FIELDS}
                self.rewrite(fields)
                flags = bool(rule.get("user_provided")), bool(rule.get("ignore"))
                return (*(_text(fields[name]) for name in FIELDS), *flags)  # type: ignore[return-value]
        return None

    def rewrite(self, fields: dict[str, str]) -> None:
        for match, update in self.rewrites:
            found = {key: regex.match(fields[key]) for key, regex in match}
            if not all(found.values()):
                continue
            seen: dict[str, Any] = dict(fields)
            for key in FIELDS:
                if key in found:
                    seen |= found[key].groupdict()  # type: ignore[union-attr]
            for key in FIELDS:
                if key in update:
                    fields[key] = update[key] % seen
            if self.stop:
                return


def _text(text: str) -> str:
    raw = text.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace").replace("\0", "\\x00")
