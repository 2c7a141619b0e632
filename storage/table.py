"""The metadata of a chunk store in memory and the batches that change it.

Every change is one atomic write to the ordered store and only then a change in memory, under one
lock; a failed write changes nothing.

How a block lives, with what holds it:

    taken       used in the bitmap       a prepare is writing its data
    owned       recorded in the bitmap   an M, P or U row names it
    held        used                     no row names it, but the write that says so is not stable
    in limbo    used                     that write is stable, but a reader may still look at it
    free

Undo: the first commit on a chunk in a flush epoch keeps what was committed before (U row, with its
block), unless all data of the new version is in its own rows. An in-place write never touches a
byte that a kept version needs (`floor`), so after a power cut the newest version whose data arrived
can be restored.
"""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from emberfs.kv.store import Change, OrderedStore
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChunkId, MiB
from emberfs.storage.allocator import (
    CLASS_BYTES,
    NO_BLOCK,
    Allocator,
    GroupBits,
    block_bytes,
)
from emberfs.storage.blocks import BlockFiles
from emberfs.storage.content import View
from emberfs.storage.records import (
    NO_TRIM,
    ChunkRecord,
    PendingRecord,
    RedoRecord,
    committed_from,
    decode_record,
    encode,
    encode_redo,
    group_row,
    pending_key,
    record_key,
    redo_key,
    undo_key,
)
from emberfs.storage.redo import Overlay, RedoLog, units_of
from emberfs.storage.tombstones import Tombstones

PENDING = -1  # as a version: the pending one, whose number a replacement may share
_CACHE_BYTES = 24 * MiB
_ROW_OVERHEAD_BYTES = 400


@dataclass(slots=True, eq=False)
class Pending:
    """A prepared version."""

    record: PendingRecord
    redo: RedoRecord | None
    units: Overlay  # of `redo`


def pending_from(record: PendingRecord, redo: RedoRecord | None) -> Pending:
    """Return the version that a record describes."""
    return Pending(record, redo, units_of(redo) if redo is not None else {})


@dataclass(slots=True, eq=False)
class Undo:
    """What a chunk can be taken back to: flush epoch -> (block, length) of a kept version."""

    kept: dict[int, tuple[int, int]]
    current: int  # block of the committed version

    def holds(self, block: int) -> bool:
        """Tell whether a kept version lives in this block."""
        return any(kept_block == block for kept_block, _ in self.kept.values())


class ChunkTable:
    """State shared by the parts of one chunk store."""

    def __init__(
        self,
        store: OrderedStore,
        files: BlockFiles,
        capacity_bytes: int,
        now_ns: Callable[[], int],
    ) -> None:
        self.store = store
        self.files = files
        self.capacity_bytes = capacity_bytes  # 0: as much as the file system gives
        self.lock = threading.RLock()
        self.allocator = Allocator()
        self.tombstones = Tombstones(store, now_ns)
        self.pending: dict[ChunkId, Pending] = {}
        self.undo: dict[ChunkId, Undo] = {}
        self.redo: dict[int, RedoLog] = {}  # by block
        self.overlay_bytes = 0  # of all redo logs
        self.epoch = 1
        self.held: list[tuple[int, int]] = []  # (epoch, block)
        self.waiting_bytes: dict[int, int] = {}  # epoch -> blocks that its flush will free
        self._limbo: list[tuple[int, int]] = []  # (serial, block)
        self._serial = itertools.count(1)
        self._readers: set[int] = set()
        self.records: OrderedDict[ChunkId, ChunkRecord | None] = OrderedDict()
        self._cache_bytes = 0

    # ------------------------------------------------------------ records

    def cached(self, chunk: ChunkId) -> tuple[bool, ChunkRecord | None]:
        """Return (known, committed record) without touching the store."""
        try:
            record = self.records[chunk]
            self.records.move_to_end(chunk)
        except KeyError:
            return False, None
        return True, record

    def record(self, chunk: ChunkId) -> ChunkRecord | None:
        """Return the committed record, None if the chunk is absent."""
        known, record = self.cached(chunk)
        if known:
            return record
        with self.lock:
            key = record_key(chunk)
            value = self.store.get(key)
            record = decode_record(key, value) if value is not None else None
            self._remember(chunk, record)
            return record

    def _remember(self, chunk: ChunkId, record: ChunkRecord | None) -> None:
        self._cache_bytes += _row_bytes(record)
        if chunk in self.records:
            self._cache_bytes -= _row_bytes(self.records.pop(chunk))
        self.records[chunk] = record
        while self._cache_bytes > _CACHE_BYTES:
            _, oldest = self.records.popitem(last=False)
            self._cache_bytes -= _row_bytes(oldest)

    def forget(self, chunk: ChunkId) -> None:
        """The store has another record now: read it again."""
        if chunk in self.records:
            self._cache_bytes -= _row_bytes(self.records.pop(chunk))

    def view(self, chunk: ChunkId, version: int, record: ChunkRecord | None) -> View | None:
        """Return how to read a version (0: the committed one, PENDING); None when it is "absent".

        Raises VERSION_GAP for a version that is neither committed nor pending.
        """
        pending = self.pending.get(chunk)
        if version == PENDING and pending is not None:
            return self.pending_view(pending, record)
        if version == 0 or (record is not None and record.version == version):
            return self.view_of(record) if record is not None else None
        if pending is not None and pending.record.version == version:
            return self.pending_view(pending, record)
        with self.lock:  # it may have been committed between the two looks
            record = self.record(chunk)
            if record is not None and record.version == version:
                return self.view_of(record)
        have = record.version if record is not None else 0
        raise EmberfsError(
            Code.VERSION_GAP, f"version {version} asked for, {have} is committed; ask again"
        )

    def view_of(self, record: ChunkRecord) -> View:
        """Return how to read a committed record."""
        log = self.redo.get(record.block)
        overlays = (log.overlay,) if log is not None else ()
        return View(record.version, record.block, record.length, record.checksums, overlays)

    def pending_view(self, pending: Pending, before: ChunkRecord | None) -> View | None:
        """Return how to read a pending version."""
        after = committed_from(pending.record, before)
        if after is None:
            return None
        view = self.view_of(after)
        if not pending.units:
            return view
        return msgspec.structs.replace(view, overlays=(*view.overlays, pending.units))

    def floor(self, chunk: ChunkId, record: ChunkRecord) -> int:
        """Return the end of what committed or kept versions need in the record's block."""
        undo = self.undo.get(chunk)
        if undo is None:
            return record.length
        kept = [length for block, length in undo.kept.values() if block == record.block]
        return max([record.length, *kept])

    # ------------------------------------------------------------ batches

    def store_pending(self, chunk: ChunkId, pending: Pending) -> None:
        """Record a prepared version in the place of one that is pending.

        Raises NO_SPACE or DISK, with nothing changed.
        """
        record = pending.record
        with self.lock:
            changes, removed = self._give_way(chunk)
            changes.append((pending_key(chunk), encode(record)))
            if pending.redo is not None:
                changes.append(
                    (redo_key(chunk, record.block, record.version), encode_redo(pending.redo))
                )
            added = [record.block] if record.fresh else []
            self._write(changes, added, removed)
            self.pending[chunk] = pending
            self._hold(removed)

    def commit(self, chunk: ChunkId, pending: Pending, *, stored: bool) -> None:
        """Make a version the committed one; `stored`: its pending record is in the store.

        If it is not, what is pending gives way. Raises NO_SPACE or DISK, with nothing changed.
        """
        with self.lock:
            record, before = pending.record, self.record(chunk)
            after = committed_from(record, before)
            changes: list[Change] = [(record_key(chunk), encode(after) if after else None)]
            added: list[int] = []
            removed: list[int] = []
            if self.pending.get(chunk) is not pending:
                gone, removed = self._give_way(chunk)
                changes += gone
            if stored:
                changes.append((pending_key(chunk), None))
            else:
                added = [record.block] if record.fresh else []
                if pending.redo is not None:
                    key = redo_key(chunk, record.block, record.version)
                    changes.append((key, encode_redo(pending.redo)))
            keeps = not _stands_alone(pending) and self._keep(chunk, before, changes)
            old_block = before.block if before is not None else NO_BLOCK
            moved = old_block != NO_BLOCK and old_block != record.block
            undo = self.undo.get(chunk)
            dropped = moved and not keeps and not (undo is not None and undo.holds(old_block))
            if dropped:
                changes += self.redo_deletions(old_block)
            burial = None if after else self.tombstones.bury(chunk, record.remembered)
            if burial is not None:
                changes += burial.changes
            self._write(changes, added, [*removed, *([old_block] if dropped else [])])
            if burial is not None:
                self.tombstones.buried(burial)
            self._committed(chunk, pending, before, after, keeps, moved, dropped)
            self._hold(removed)

    def _keep(self, chunk: ChunkId, before: ChunkRecord | None, changes: list[Change]) -> bool:
        """Add the undo row if this is the chunk's first commit in the epoch."""
        undo = self.undo.get(chunk)
        if undo is not None and self.epoch in undo.kept:
            return False
        changes.append((undo_key(chunk, self.epoch), encode(before) if before else b""))
        return True

    def _committed(
        self,
        chunk: ChunkId,
        pending: Pending,
        before: ChunkRecord | None,
        after: ChunkRecord | None,
        keeps: bool,
        moved: bool,
        dropped: bool,
    ) -> None:
        """The store has it: follow in memory."""
        old_block, old_length = (before.block, before.length) if before else (NO_BLOCK, 0)
        new_block = after.block if after is not None else NO_BLOCK
        undo = self.undo.get(chunk)
        if undo is not None:
            undo.current = new_block
        if keeps:
            undo = self.undo.setdefault(chunk, Undo({}, new_block))
            undo.kept[self.epoch] = (old_block, old_length)
        if moved:
            waiting = self.waiting_bytes.get(self.epoch, 0)
            self.waiting_bytes[self.epoch] = waiting + block_bytes(old_block)
        if dropped:
            self.drop_redo(old_block)
            self.held.append((self.epoch, old_block))
        if pending.redo is not None:
            self.add_redo(chunk, new_block, pending.record.version, pending.redo)
        self._remember(chunk, after)
        self.pending.pop(chunk, None)

    def discard(self, chunk: ChunkId) -> None:
        """Drop a pending version. Raises NO_SPACE or DISK, with nothing changed."""
        with self.lock:
            if chunk not in self.pending:
                return
            changes, removed = self._give_way(chunk)
            self._write(changes, [], removed)
            del self.pending[chunk]
            self._hold(removed)

    def _give_way(self, chunk: ChunkId) -> tuple[list[Change], list[int]]:
        """Return what removes the rows of a pending version, and the block that only it owns."""
        pending = self.pending.get(chunk)
        if pending is None:
            return [], []
        record = pending.record
        changes: list[Change] = [(pending_key(chunk), None)]
        if record.redo:
            changes.append((redo_key(chunk, record.block, record.version), None))
        return changes, [record.block] if record.fresh else []

    def _hold(self, blocks: list[int]) -> None:
        """Nothing owns these blocks any more; they are free once that is stable."""
        for block in blocks:
            self.held.append((self.epoch, block))
            waiting = self.waiting_bytes.get(self.epoch, 0)
            self.waiting_bytes[self.epoch] = waiting + block_bytes(block)

    def add_redo(self, chunk: ChunkId, block: int, version: int, redo: RedoRecord) -> None:
        """Fold committed redo data into the overlay of its block."""
        log = self.redo.setdefault(block, RedoLog(chunk, block))
        before = log.overlay_bytes
        log.add(version, redo)
        self.overlay_bytes += log.overlay_bytes - before

    def drop_redo(self, block: int) -> None:
        """Forget a block's redo log."""
        log = self.redo.pop(block, None)
        self.overlay_bytes -= log.overlay_bytes if log is not None else 0

    def redo_deletions(self, block: int) -> list[Change]:
        """Return what removes all committed redo rows of a block."""
        log = self.redo.get(block)
        if log is None:
            return []
        return [(redo_key(log.chunk, block, version), None) for version in log.versions]

    def _write(self, changes: list[Change], added: list[int], removed: list[int]) -> None:
        rows = self.allocator.preview(added, removed)
        self.write_rows(changes, rows)

    def write_rows(self, changes: list[Change], rows: Iterable[GroupBits]) -> None:
        """Write a batch together with bitmaps."""
        rows = list(rows)
        self.store.write([*changes, *map(group_row, rows)])
        self.allocator.record(rows)

    # ------------------------------------------------------------ blocks

    def take_block(self, size_class: int) -> int:
        """Take a free block, reserving a group if there is none. Raises NO_SPACE or DISK."""
        with self.lock:
            size = CLASS_BYTES[size_class]
            if self.capacity_bytes and self.allocator.used_bytes + size > self.capacity_bytes:
                raise EmberfsError(
                    Code.NO_SPACE,
                    f"target holds its {self.capacity_bytes} bytes; delete data or add targets",
                )
            position = self.allocator.take(size_class)
            if position is None:
                group = self.allocator.next_group(size_class)
                self.files.reserve_group(size_class, group)
                self.allocator.add_group(size_class, group)
                position = self.allocator.take(size_class)
                assert position is not None
            return position

    def give_block(self, position: int) -> None:
        """Return a block that never got an owner."""
        with self.lock:
            self.allocator.give(position)

    def free_leaked(self, blocks: list[int]) -> None:
        """Blocks that no row names are marked no more. STALE if one is not so; NO_SPACE, DISK."""
        with self.lock:
            if any(map(self._is_known, blocks)) or not self.allocator.are_recorded(blocks):
                raise EmberfsError(Code.STALE, "a block is in use, or free, by now; look again")
            self._write([], [], blocks)
            self._hold(blocks)

    def _is_known(self, block: int) -> bool:
        """Tell whether memory knows a use of a block, apart from committed versions."""
        return (
            block in self.redo
            or any(pending.record.block == block for pending in self.pending.values())
            or any(undo.current == block or undo.holds(block) for undo in self.undo.values())
        )

    def retire(self, blocks: Iterable[int]) -> None:
        """Blocks whose last record is gone for good: free once no reader can look at them."""
        serial = next(self._serial)
        self._limbo += [(serial, block) for block in blocks]
        self.reclaim()

    def reclaim(self) -> None:
        """Free what no reader can see any more, and give empty groups back."""
        oldest = min(list(self._readers), default=next(self._serial))
        classes: set[int] = set()
        rest: list[tuple[int, int]] = []
        for serial, block in self._limbo:
            if serial < oldest:
                self.allocator.give(block)
                classes.add(block >> 56)
            else:
                rest.append((serial, block))
        self._limbo = rest
        for size_class in sorted(classes):
            for group in self.allocator.idle_groups(size_class):
                self.allocator.drop_group(size_class, group)
                self.files.release_group(size_class, group)

    def reader_begins(self) -> int:
        """Announce a reader before it looks at any record; returns its token."""
        token = next(self._serial)
        self._readers.add(token)
        return token

    def reader_ends(self, token: int) -> None:
        """The reader looks at no block any more."""
        self._readers.discard(token)


def _stands_alone(pending: Pending) -> bool:
    """Tell whether a version is whole wherever its rows are: its data is in its redo row.

    Such a commit needs no undo row. A truncation does, to protect what it cuts off (`floor`).
    """
    return pending.redo is not None and pending.redo.trim == NO_TRIM


def _row_bytes(record: ChunkRecord | None) -> int:
    return _ROW_OVERHEAD_BYTES + (len(record.checksums) if record is not None else 0)
