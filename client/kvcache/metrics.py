"""Counters of KV caches in this process."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10,
)  # fmt: skip

HITS = Counter("emberfs_kvcache_hits", "Blocks that were found, verified and handed out")
MISSES = Counter("emberfs_kvcache_misses", "Blocks that were asked for in vain", ["reason"])
READ_BYTES = Counter("emberfs_kvcache_read_bytes", "Bytes of blocks handed out")
PUTS = Counter("emberfs_kvcache_puts", "Blocks stored and published")
PUT_FAILURES = Counter("emberfs_kvcache_put_failures", "Blocks not stored", ["reason"])
PUT_BYTES = Counter("emberfs_kvcache_put_bytes", "Bytes of blocks stored and published")
REMOVALS = Counter("emberfs_kvcache_removals", "Blocks removed by remove_many")
EVICTED_SEGMENTS = Counter("emberfs_kvcache_evicted_segments", "Segments evicted by this process")
EVICTED_BLOCKS = Counter("emberfs_kvcache_evicted_blocks", "Blocks in them that could be found")
CALL_SECONDS = Histogram(
    "emberfs_kvcache_call_seconds", "Time of one call of the API", ["call"], buckets=_SECONDS
)
REFRESH_SECONDS = Histogram(
    "emberfs_kvcache_refresh_seconds", "Time of one look at the logs of others", buckets=_SECONDS
)
FAILED_CALLS = Counter(
    "emberfs_kvcache_failed_calls", "Calls that storage did not answer well", ["reason"]
)
BREAKER_OPENED = Counter("emberfs_kvcache_breaker_opened", "How often calls were stopped")
SNAPSHOTS = Counter("emberfs_kvcache_snapshots", "Snapshots of the index written")
BLOCKS = Gauge("emberfs_kvcache_blocks", "Blocks in the index of this process", ["namespace"])
