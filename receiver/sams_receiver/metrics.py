"""What `/metrics` tells: Prometheus counters of one receiver, bound once, cheap to bump."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from sams_receiver.store import Observer

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Tally:
    """A number that only grows, bumped by the event loop alone: no lock, no look-up."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, by: int = 1) -> None:
        """Add."""
        self.value += by


class _Tallies(Collector):
    """Shows the tallies that are bumped with every request as Prometheus counters."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[str, tuple[str, ...], dict[tuple[str, ...], Tally]]] = {}

    def tally(self, name: str, text: str, **labels: str) -> Tally:
        """Tally of that name and these labels; made at first use."""
        family = self._families.setdefault(name, (text, tuple(labels), {}))
        return family[2].setdefault(tuple(labels.values()), Tally())

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What Prometheus asks for."""
        for name, (text, labels, tallies) in self._families.items():
            shown = CounterMetricFamily(f"sams_receiver_{name}", text, labels=labels)
            for values, tally in tallies.items():
                shown.add_metric(list(values), tally.value)
            yield shown


class Metrics(Observer):
    """All metrics of the receiver, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tallies = _Tallies()
        self.registry.register(self._tallies)
        self._answers: dict[tuple[str, int], Tally] = {}
        batches = "Payloads by what became of them."
        self.stored = self._tallies.tally("batches", batches, outcome="stored")
        self.duplicates = self._tallies.tally("batches", batches, outcome="duplicate")
        self.conflicts = self._tallies.tally("batches", batches, outcome="conflict")
        self.invalid = self._tallies.tally("batches", batches, outcome="invalid")
        self.unvouched = self._tallies.tally(
            "unvouched_batches", "Stored without proof that the sender is the node it names."
        )
        self.received_bytes = self._tallies.tally("received_bytes", "Bytes of bodies read.")
        self._stored_bytes = self._tallies.tally("stored_bytes", "Bytes of payloads on disk.")
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
        tally = self._answers.get((what, status))
        if tally is None:
            text = "Requests answered, by what was asked for and HTTP status."
            tally = self._tallies.tally("requests", text, status=str(status), what=what)
            self._answers[what, status] = tally
        tally.inc()

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
