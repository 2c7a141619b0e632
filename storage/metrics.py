"""What a storage service counts."""

from prometheus_client import Counter, Gauge, Histogram

_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

_OPERATIONS = Counter("emberfs_storage_operations", "Operations answered", ["kind", "result"])
_SECONDS = Histogram(
    "emberfs_storage_seconds", "From request to answer, in seconds", ["kind"], buckets=_BUCKETS_S
)

READS_OK = _OPERATIONS.labels("read", "ok")
READS_FAILED = _OPERATIONS.labels("read", "failed")
UPDATES_OK = _OPERATIONS.labels("update", "ok")
UPDATES_FAILED = _OPERATIONS.labels("update", "failed")
READ_SECONDS = _SECONDS.labels("read")
UPDATE_SECONDS = _SECONDS.labels("update")
FLUSH_SECONDS = _SECONDS.labels("flush")

READ_BYTES = Counter("emberfs_storage_read_bytes", "Payload bytes read")
WRITTEN_BYTES = Counter("emberfs_storage_written_bytes", "Payload bytes received in updates")
TAIL_QUESTIONS = Counter(
    "emberfs_storage_tail_questions", "Reads that asked the tail which version is committed"
)
FORWARD_FAILURES = Counter(
    "emberfs_storage_forward_failures", "Forwards to a successor that failed", ["code"]
)
FLUSHES = Counter("emberfs_storage_flushes", "Group-committed flushes to stable storage")
DAMAGED = Counter("emberfs_storage_damaged_chunks", "Checksum errors found on disk")
REPAIRS = Counter("emberfs_storage_repairs", "Damaged chunks repaired from another replica")
SYNCED_BYTES = Counter("emberfs_storage_synced_bytes", "Bytes sent to targets in recovery")

PUBLIC_STATE = Gauge("emberfs_storage_public_state", "PublicState of a local target", ["target"])
LOCAL_STATE = Gauge("emberfs_storage_local_state", "LocalState of a local target", ["target"])
USED_BYTES = Gauge("emberfs_storage_used_bytes", "Bytes that a local target uses", ["target"])
DAMAGED_NOW = Gauge(
    "emberfs_storage_damaged_now", "Chunks known to be damaged and not repaired yet", ["target"]
)
RECOVERY = Gauge(
    "emberfs_storage_recovery",
    "Recovery of a local target: bytes and chunks done and in all, bytes per second",
    ["target", "what"],
)
SCRUBBED_BYTES = Counter("emberfs_storage_scrubbed_bytes", "Bytes that the scrubber has verified")
SCRUB_FINDINGS = Counter(
    "emberfs_storage_scrub_findings",
    "Chunks found damaged, missing or differing from a neighbour in the chain",
    ["kind"],
)
SCRUB_FINISHED = Gauge(
    "emberfs_storage_scrub_finished_seconds",
    "When the last whole pass over a target ended, seconds since 1970",
    ["target"],
)
