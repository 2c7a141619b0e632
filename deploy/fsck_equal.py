"""Are the replicas of a chunk equal, and if not, which one is right? [pure]

An acknowledged write is on all serving replicas, so the highest version that some undamaged replica
holds is the truth, if no other replica claims more. Replicas of that version whose contents differ
are told apart by majority, else by the operator (`trusted`).
"""

from collections import Counter
from collections.abc import Sequence

from emberfs.proto.ids import TargetId
from emberfs.proto.storage_calls import ChunkRow

Seen = tuple[ChunkRow | None, ...]  # one per serving replica, head first


def content_of(row: ChunkRow) -> tuple[int, int, int]:
    """What two replicas must have in common."""
    return row.version, row.length, row.digest


def are_equal(rows: Seen) -> bool:
    """Tell whether all replicas hold the same, sound, and nothing is pending."""
    first = rows[0]
    if first is None:
        return False
    wanted = content_of(first)
    return all(
        row is not None and not row.damaged and not row.pending and content_of(row) == wanted
        for row in rows
    )


def good_replica(
    rows: Seen, targets: Sequence[TargetId], trusted: TargetId | None = None
) -> int | None:
    """Return the place of a replica that the others may be made from; None if that is unclear."""
    newest = max((row.version for row in rows if row is not None), default=0)
    sound = [
        place
        for place, row in enumerate(rows)
        if row is not None and not row.damaged and not row.pending and row.version
    ]
    for place in sound:
        if targets[place] == trusted:
            return place
    candidates = [place for place in sound if _version(rows, place) == newest]
    if not candidates or any(row is not None and row.pending for row in rows):
        return None
    votes = Counter(content_of(row) for place in candidates if (row := rows[place]) is not None)
    (best, count), *others = votes.most_common()
    if others and others[0][1] == count:
        return None
    return next(p for p in candidates if (row := rows[p]) is not None and content_of(row) == best)


def _version(rows: Seen, place: int) -> int:
    row = rows[place]
    return row.version if row is not None else 0


def in_words(row: ChunkRow | None) -> str:
    """Describe one replica."""
    if row is None:
        return "absent"
    pending = f", pending {row.pending}" if row.pending else ""
    damaged = ", damaged" if row.damaged else ""
    return f"version {row.version}, {row.length} bytes, digest {row.digest:08x}{pending}{damaged}"
