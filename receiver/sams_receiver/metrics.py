"""What `/metrics` tells: Prometheus counters of one receiver, bound once, cheap to bump."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from sams_receiver.store import Observer

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Metrics(Observer):
    """All metrics of the receiver, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "sams_receiver_requests",
            "Requests answered, by what was asked for and HTTP status.",
            ["what", "status"],
            registry=self.registry,
        )
        self._bound: dict[tuple[str, int], Counter] = {}
        outcome = Counter(
            "sams_receiver_batches",
            "Payloads by what became of them.",
            ["outcome"],
            registry=self.registry,
        )
        self.stored = outcome.labels("stored")
        self.duplicates = outcome.labels("duplicate")
        self.conflicts = outcome.labels("conflict")
        self.invalid = outcome.labels("invalid")
        self.unvouched = self._counter(
            "unvouched_batches", "Stored without proof that the sender is the node it names."
        )
        self.received_bytes = self._counter("received_bytes", "Bytes of bodies read.")
        self._stored_bytes = self._counter("stored_bytes", "Bytes of payloads on disk.")
        self.denied = Counter(
            "sams_receiver_denied",
            "Requests not let in, by status.",
            ["status"],
            registry=self.registry,
        )
        self.limited = Counter(
            "sams_receiver_limited",
            "Requests refused by a limit or a quota.",
            ["limit"],
            registry=self.registry,
        )
        self.aside_dropped = self._counter(
            "aside_dropped", "Refused payloads not kept aside because of a quota."
        )
        self._groups = self._counter("commits", "Groups written and synced.")
        self._commit_seconds = self._histogram("commit_seconds", "Time to write and sync a group.")
        self._write_failures = self._counter("write_failures", "Groups that could not be written.")
        self._sealed = self._counter("sealed_segments", "Segments sealed.")
        self._seal_failures = self._counter("seal_failures", "Attempts to seal that failed.")
        self._seal_seconds = self._histogram("seal_seconds", "Time to seal a segment.")
        self.in_flight = self._gauge("in_flight_bytes", "Bytes of bodies in memory now.")
        self.connections = self._gauge("connections", "Open connections.")
        self.free = self._gauge("free_bytes", "Free space where the archive is.")
        self.digests = self._gauge("digests_in_memory", "Payloads in segments not sealed yet.")
        self.aside = self._gauge("aside_bytes", "Bytes set aside with a reason.")

    def answered(self, what: str, status: int) -> None:
        """Count an answer."""
        bound = self._bound.get((what, status))
        if bound is None:
            bound = self._bound[what, status] = self._requests.labels(what, status)
        bound.inc()

    def text(self) -> bytes:
        """What Prometheus scrapes."""
        return generate_latest(self.registry)

    def committed(self, frames: int, size: int, seconds: float) -> None:  # noqa: ARG002, D102
        self._groups.inc()
        self._stored_bytes.inc(size)
        self._commit_seconds.observe(seconds)

    def write_failed(self) -> None:  # noqa: D102
        self._write_failures.inc()

    def sealed(self, seconds: float) -> None:  # noqa: D102
        self._sealed.inc()
        self._seal_seconds.observe(seconds)

    def seal_failed(self) -> None:  # noqa: D102
        self._seal_failures.inc()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"sams_receiver_{name}", text, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"sams_receiver_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"sams_receiver_{name}", text, buckets=_SECONDS, registry=self.registry)
