"""What the gateway counts, for Prometheus. One registry per gateway, so that two in one process do not meet."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vm_runtime.drivers.base import FlatteningStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# From a warm machine (tens of milliseconds) to a template built on the way (minutes).
START_BUCKETS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0, 180.0, 600.0)


class _SandboxCollector(Collector):
    """Counts sandboxes by state and what their chains need when asked, so that the numbers are never stale."""

    def __init__(
        self,
        states: Callable[[], Iterable[str]],
        pool_ready: Callable[[], int],
        flattening: Callable[[], FlatteningStatus],
    ) -> None:
        self._states = states
        self._pool_ready = pool_ready
        self._flattening = flattening

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        sandboxes = GaugeMetricFamily("hypercell_sandboxes", "Sandboxes by state.", labels=["state"])
        for state, count in sorted(Tally(self._states()).items()):
            sandboxes.add_metric([state], count)
        yield sandboxes
        now = self._flattening()
        for family, name, text, value in (
            (GaugeMetricFamily, "pool_ready", "Warm machines ready to be given out.", self._pool_ready()),
            (GaugeMetricFamily, "flattening_waiting", "Snapshots whose chains are to be shortened.", now.waiting),
            (GaugeMetricFamily, "flattening_failing", "Those of them that failed last time.", len(now.failing)),
            (CounterMetricFamily, "flattening_failures", "Attempts to shorten a chain that failed.", now.failures),
            (CounterMetricFamily, "flattening_bytes", "Bytes written to shorten chains.", now.merged_bytes),
        ):
            yield family(f"hypercell_{name}", text, value=value)


class Metrics:
    """All counters. states, pool_ready, flattening: asked for the present when the numbers are read."""

    def __init__(
        self,
        *,
        states: Callable[[], Iterable[str]],
        pool_ready: Callable[[], int],
        flattening: Callable[[], FlatteningStatus] = FlatteningStatus,
    ) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        registry.register(_SandboxCollector(states, pool_ready, flattening))
        self.start_seconds = Histogram(
            "hypercell_sandbox_start_seconds",
            "From the request for a sandbox to its answer.",
            buckets=START_BUCKETS_S,
            registry=registry,
        )
        self.failed_starts = Counter(
            "hypercell_sandbox_start_failures",
            "Requests for a sandbox that failed, by code.",
            ["code"],
            registry=registry,
        )
        self.connections = Gauge("hypercell_websockets", "Open WebSockets to kernels.", registry=registry)
        self._messages = Counter(
            "hypercell_messages", "Kernel messages passed on.", ["direction", "channel"], registry=registry
        )
        self._bytes = Counter("hypercell_message_bytes", "Bytes of them.", ["direction", "channel"], registry=registry)
        self.malformed_messages = Counter(
            "hypercell_malformed_messages", "Messages from kernels that could not be written down.", registry=registry
        )
        self.back_pressure_seconds = Counter(
            "hypercell_back_pressure_seconds",
            "Time in which a kernel was not read for its slow client.",
            registry=registry,
        )
        self.requests = Counter(
            "hypercell_requests", "HTTP answers by status.", ["method", "status"], registry=registry
        )
        self._pairs: dict[tuple[str, str], tuple[Counter, Counter]] = {}

    def count_message(self, direction: str, channel: str, size: int) -> None:
        """One message passed on. direction: to_client or to_kernel."""
        pair = self._pairs.get((direction, channel))
        if pair is None:
            pair = (self._messages.labels(direction, channel), self._bytes.labels(direction, channel))
            self._pairs[direction, channel] = pair
        pair[0].inc()
        pair[1].inc(size)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
