"""What the metadata service counts."""

from prometheus_client import Counter, Gauge, Histogram

SECONDS = Histogram(
    "emberfs_meta_operation_seconds",
    "Time to answer a metadata call",
    ["method"],
    buckets=(5e-5, 1e-4, 2.5e-4, 1e-3, 5e-3, 2.5e-2, 0.1, 1, 10),
)
ERRORS = Counter("emberfs_meta_errors_total", "Failed metadata calls", ["method", "code"])
CONFLICTS = Gauge("emberfs_meta_transaction_conflicts", "Transactions that had to be repeated")
TRIMS_PENDING = Gauge("emberfs_meta_trims_pending", "Shrunk files whose chunks are not cut yet")
DELETED_WAITING = Gauge("emberfs_meta_deleted_waiting", "Deleted files that failed to be collected")
DELETED = Counter("emberfs_meta_deleted_total", "Deleted files whose chunks were removed")
QUOTA_WALKS = Gauge("emberfs_meta_quota_walks", "1 while what counts for a quota is counted anew")
TRASH_EXPIRED = Counter("emberfs_meta_trash_expired_total", "Things removed from the trash by age")
REMOVED_WAITING = Gauge(
    "emberfs_meta_removed_directories", "Removed directories that are not emptied yet"
)
REMOVED_NAMES = Counter("emberfs_meta_removed_names_total", "Names of removed trees taken away")
SESSIONS_ENDED = Counter("emberfs_meta_sessions_ended_total", "Sessions of vanished clients ended")
