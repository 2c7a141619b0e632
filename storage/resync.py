"""Two inventories in, a list of transfers out [pure].

The predecessor of a SYNCING target is authoritative: whatever differs there is replaced in full.
3FS has rows in this table that end in a fatal error (a successor that is ahead, equal versions with
unequal checksums); here every row has an end.

    there \\ here     absent              present
    absent           -, or bury          copy
    present          remove              same version and digest, nothing pending there: keep
                                         anything else: copy

Bury: what we know of the writers of a removed chunk is told, if they do not know it. What only they
know stays: it does no harm (tombstones.py).
"""

from collections.abc import Sequence

import msgspec

from emberfs.proto.ids import ChunkId
from emberfs.proto.storage_calls import ChunkRow

END = b""  # as a page's `next`: nothing follows


class Transfer(msgspec.Struct, frozen=True, gc=False):
    """One chunk to make equal there; the content is read again when its turn comes."""

    chunk: ChunkId
    length: int  # bytes here, 0 when it is absent


class Comparison(msgspec.Struct, frozen=True, gc=False):
    """What a pair of pages says."""

    transfers: tuple[Transfer, ...]
    same_bytes: int  # data that is equal already
    same_chunks: int


def common_end(own_next: bytes, their_next: bytes) -> bytes:
    """Return up to where both pages are complete; END if both reach the end."""
    if own_next == END:
        return their_next
    if their_next == END:
        return own_next
    return min(own_next, their_next)


def compare(own: Sequence[ChunkRow], theirs: Sequence[ChunkRow], stop: bytes) -> Comparison:
    """Compare two pages with the same start, up to `stop` (exclusive; END for no bound)."""
    mine = {row.chunk: row for row in own if stop == END or row.chunk < stop}
    others = {row.chunk: row for row in theirs if stop == END or row.chunk < stop}
    transfers: list[Transfer] = []
    same_bytes = same_chunks = 0
    for chunk in sorted(mine.keys() | others.keys()):
        here, there = mine.get(chunk), others.get(chunk)
        if here is not None and here.version:
            if there is None or not _equal(here, there):
                transfers.append(Transfer(chunk, here.length))
                continue
            same_bytes += here.length
            same_chunks += 1
        elif not _is_gone(there) or not _knows(there, here):
            transfers.append(Transfer(chunk, 0))
    return Comparison(tuple(transfers), same_bytes, same_chunks)


def _is_gone(there: ChunkRow | None) -> bool:
    return there is None or not (there.version or there.pending)


def _knows(there: ChunkRow | None, here: ChunkRow | None) -> bool:
    """Tell whether they know of an absent chunk's writers what we know."""
    told = there.remembered if there is not None else ()
    newest = {(row.client, row.channel): row.sequence for row in told}
    ours = here.remembered if here is not None else ()
    return all(newest.get((row.client, row.channel), -1) >= row.sequence for row in ours)


def _equal(here: ChunkRow, there: ChunkRow) -> bool:
    # Our own pending version does not count: it will be forwarded in full when it moves on.
    return (
        here.version == there.version
        and here.length == there.length
        and here.digest == there.digest
        and there.pending == 0
        and not there.damaged
    )
