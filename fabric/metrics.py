"""Figures of the fabric, by role ("client" or "server") and transport."""

from prometheus_client import Counter, Gauge

CALLS = Counter("emberfs_fabric_calls", "Calls finished", ["role", "transport"])
ERRORS = Counter("emberfs_fabric_errors", "Calls that ended in an error", ["role", "transport"])
BYTES_OUT = Counter("emberfs_fabric_sent_bytes", "Bytes sent", ["role", "transport"])
CONNECTIONS = Gauge("emberfs_fabric_connections", "Open connections", ["role", "transport"])
REFUSED = Counter("emberfs_fabric_refused_frames", "Malformed or oversized frames", ["role"])


class Tally:
    """Counts of one connection: plain integers on the hot path, published now and then."""

    def __init__(self, role: str, transport: str) -> None:
        self.calls = 0
        self.errors = 0
        self._sent_before = 0
        self._calls = CALLS.labels(role, transport)
        self._errors = ERRORS.labels(role, transport)
        self._bytes = BYTES_OUT.labels(role, transport)
        self._connections = CONNECTIONS.labels(role, transport)
        self._connections.inc()

    def publish(self, sent_bytes: int) -> None:
        """Add what happened since the last time."""
        self._calls.inc(self.calls)
        self._errors.inc(self.errors)
        self._bytes.inc(sent_bytes - self._sent_before)
        self.calls = self.errors = 0
        self._sent_before = sent_bytes

    def close(self, sent_bytes: int) -> None:
        """Publish the rest; the connection is gone."""
        self.publish(sent_bytes)
        self._connections.dec()
