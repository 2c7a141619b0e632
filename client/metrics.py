"""Counters of the client data path."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)

READ_BYTES = Counter("emberfs_client_read_bytes", "Payload bytes read from storage")
READ_CALLS = Counter("emberfs_client_read_calls", "Read batches sent to storage")
READ_SECONDS = Histogram(
    "emberfs_client_read_seconds", "Time of one logical chunk read", buckets=_SECONDS
)
UPDATE_BYTES = Counter("emberfs_client_update_bytes", "Payload bytes written to storage")
UPDATE_SECONDS = Histogram(
    "emberfs_client_update_seconds", "Time of one chunk update, retries included", buckets=_SECONDS
)
FLUSHES = Counter("emberfs_client_flushes", "Flush calls to storage nodes")
RETRIES = Counter("emberfs_client_retries", "Failed attempts that were tried again", ["code"])
META_SECONDS = Histogram(
    "emberfs_client_meta_seconds", "Time of one metadata call, retries included", buckets=_SECONDS
)
DIRTY_BYTES = Gauge("emberfs_client_dirty_bytes", "Written bytes not yet committed by storage")
WRITE_ERRORS = Counter("emberfs_client_write_errors", "Background writes that were lost")
READ_AHEAD_BYTES = Counter("emberfs_client_read_ahead_bytes", "Bytes prefetched")
READ_AHEAD_HITS = Counter("emberfs_client_read_ahead_hit_bytes", "Bytes served from prefetched")
OPEN_FILES = Gauge("emberfs_client_open_files", "Open file descriptions")
RING_ENTRIES = Counter("emberfs_client_ring_entries", "Reads and writes done for rings")
