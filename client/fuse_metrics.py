"""Counters of the FUSE daemon.

A labelled prometheus_client counter and histogram cost about 3 us a request, a tenth of a 4 KiB
read; so requests are counted in plain integers here and turned into metrics when somebody scrapes.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

LATENCY_BOUNDS_NS = (
    25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000,
    25_000_000, 100_000_000, 500_000_000, 1_000_000_000, 5_000_000_000, 30_000_000_000,
)  # fmt: skip


class OperationStats:
    """What one kind of request has seen so far."""

    __slots__ = ("buckets", "errors", "name", "total_ns")

    def __init__(self, name: str) -> None:
        self.name = name
        self.buckets = [0] * (len(LATENCY_BOUNDS_NS) + 1)
        self.total_ns = 0
        self.errors: dict[str, int] = {}  # by errno name

    def observe(self, duration_ns: int) -> None:
        """Count one request."""
        self.buckets[bisect_left(LATENCY_BOUNDS_NS, duration_ns)] += 1
        self.total_ns += duration_ns

    def failed(self, errno_name: str) -> None:
        """Count one error answer."""
        self.errors[errno_name] = self.errors.get(errno_name, 0) + 1

    @property
    def count(self) -> int:
        """Requests so far."""
        return sum(self.buckets)


class FuseMetrics(Collector):
    """All counters of one mount."""

    def __init__(self) -> None:
        self.operations: dict[str, OperationStats] = {}
        self.read_bytes = 0
        self.written_bytes = 0
        self.timeouts = 0

    def operation(self, name: str) -> OperationStats:
        """The counters of one kind of request."""
        return self.operations.setdefault(name, OperationStats(name))

    def register(self) -> None:
        """Show these counters at the process's Prometheus endpoint."""
        REGISTRY.register(self)

    def unregister(self) -> None:
        """Take them away again."""
        REGISTRY.unregister(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: names are fixed, labels come with use."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Render everything for one scrape."""
        counts = CounterMetricFamily(
            "emberfs_fuse_operations", "FUSE requests answered", labels=["operation"]
        )
        errors = CounterMetricFamily(
            "emberfs_fuse_errors", "FUSE requests answered with an errno",
            labels=["operation", "errno"],
        )  # fmt: skip
        latency = HistogramMetricFamily(
            "emberfs_fuse_latency_seconds", "Time from request to answer", labels=["operation"]
        )
        for stats in self.operations.values():
            counts.add_metric([stats.name], stats.count)
            for name, number in stats.errors.items():
                errors.add_metric([stats.name, name], number)
            latency.add_metric([stats.name], _cumulative(stats.buckets), stats.total_ns / 1e9)
        yield from (counts, errors, latency)
        yield CounterMetricFamily(
            "emberfs_fuse_read_bytes", "Bytes answered to reads", value=self.read_bytes
        )
        yield CounterMetricFamily(
            "emberfs_fuse_written_bytes", "Bytes accepted by writes", value=self.written_bytes
        )
        yield CounterMetricFamily(
            "emberfs_fuse_timeouts", "Requests given up at their deadline", value=self.timeouts
        )


def _cumulative(buckets: list[int]) -> list[tuple[str, float]]:
    bounds = [str(bound / 1e9) for bound in LATENCY_BOUNDS_NS] + ["+Inf"]
    total = 0
    rows = []
    for bound, number in zip(bounds, buckets, strict=True):
        total += number
        rows.append((bound, float(total)))
    return rows
