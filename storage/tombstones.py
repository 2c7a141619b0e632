"""Who wrote the chunks that were removed, so that a retry does not bring one of them back.

The memory of a chunk's writers (remembering.py) is part of its record and goes with it. What goes
on is a row of its own, written in the batch that commits the removal: neither is there without the
other, whatever dies in between. It stays when the chunk is written anew, because a power cut may
take the chunk back to absent; while the chunk is there, its record knows and the row is not read.

To remember too much does no harm: every write that a tombstone names had begun before a removal
ended, so a retry may be told that it was done just before. Hence rows are merged and never taken
back. To forget is harmful as long as a client may still retry (10 minutes at most), hence

    KEPT_MS          of time during which the store was open; it may only seem to have been less
    TOMBSTONES_MAX   beyond it the oldest goes
    DROPS_MAX        old rows that a removal takes along, so that none costs much more than another

In memory are the chunks and their ages, not what is remembered.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from emberfs.kv.store import Change, OrderedStore
from emberfs.proto.ids import MS, ChunkId
from emberfs.proto.storage_calls import RememberedWrite
from emberfs.storage.records import (
    TombstoneRecord,
    chunk_of_key,
    decode_tombstone,
    encode,
    prefix_range,
    tombstone_key,
    tombstone_range,
)
from emberfs.storage.remembering import merge_remembered

TOMBSTONES_MAX = 65_536
KEPT_MS = 3600 * 1000
DROPS_MAX = 4
_PAGE_ROWS = 1000

Writers = tuple[RememberedWrite, ...]


class Burial(NamedTuple):
    """What a batch changes, for who has written it."""

    chunk: ChunkId
    at_ms: int
    dropped: tuple[ChunkId, ...]
    changes: list[Change]


class Tombstones:
    """Of one chunk store. Changed under the table's lock; `of` is for any thread."""

    def __init__(self, store: OrderedStore, now_ns: Callable[[], int]) -> None:
        self._store = store
        self._now_ns = now_ns
        self._start_ns = now_ns()
        self._start_ms = 0  # what the newest row says: the clock goes on from there
        self._ages: OrderedDict[ChunkId, int] = OrderedDict()  # at_ms, the oldest first

    def __len__(self) -> int:
        """How many there are."""
        return len(self._ages)

    def load(self) -> None:
        """Learn which rows there are. Raises DISK when one is damaged."""
        found: list[tuple[int, ChunkId]] = []
        start, stop = prefix_range(b"T")
        while page := self._store.scan(start, stop, limit=_PAGE_ROWS):
            found += [(decode_tombstone(key, v).at_ms, chunk_of_key(key)) for key, v in page]
            start = page[-1][0] + b"\0"
        found.sort()
        self._ages = OrderedDict((chunk, at_ms) for at_ms, chunk in found)
        self._start_ms = found[-1][0] if found else 0

    def of(self, chunk: ChunkId) -> Writers:
        """Return who wrote a removed chunk, the newest first. Raises DISK."""
        if chunk not in self._ages:
            return ()
        key = tombstone_key(chunk)
        value = self._store.get(key)
        return decode_tombstone(key, value).remembered if value is not None else ()

    def bury(self, chunk: ChunkId, writers: Writers) -> Burial | None:
        """Return what belongs into the batch that removes a chunk; None if there is nothing."""
        writers = merge_remembered(writers, self.of(chunk))
        if not writers:
            return None
        now_ms = self._now_ms()
        dropped = self._outlived(chunk, now_ms)
        changes: list[Change] = [(tombstone_key(one), None) for one in dropped]
        changes.append((tombstone_key(chunk), encode(TombstoneRecord(now_ms, writers))))
        return Burial(chunk, now_ms, dropped, changes)

    def buried(self, burial: Burial) -> None:
        """The batch is written: follow in memory."""
        for chunk in burial.dropped:
            del self._ages[chunk]
        self._ages[burial.chunk] = burial.at_ms
        self._ages.move_to_end(burial.chunk)

    def page(self, start: bytes, stop: bytes, limit: int) -> tuple[dict[ChunkId, Writers], bytes]:
        """Return up to `limit` of [start, stop), and the end of what was looked at (0: no limit).

        Those that have outlived their time and only wait to be dropped are left out.
        """
        found = self._store.scan(*tombstone_range(start, stop), limit=limit)
        end = chunk_of_key(found[-1][0]) + b"\0" if limit and len(found) == limit else stop
        oldest_ms = self._now_ms() - KEPT_MS
        records = ((chunk_of_key(key), decode_tombstone(key, value)) for key, value in found)
        return {c: record.remembered for c, record in records if record.at_ms >= oldest_ms}, end

    def _outlived(self, chunk: ChunkId, now_ms: int) -> tuple[ChunkId, ...]:
        """Choose what goes to make room for a chunk's row."""
        spare = TOMBSTONES_MAX - len(self._ages) - (chunk not in self._ages)
        oldest = [row for row in islice(self._ages.items(), DROPS_MAX) if row[0] != chunk]
        return tuple(
            one
            for number, (one, at_ms) in enumerate(oldest)
            if spare + number < 0 or at_ms < now_ms - KEPT_MS
        )

    def _now_ms(self) -> int:
        return self._start_ms + (self._now_ns() - self._start_ns) // MS
