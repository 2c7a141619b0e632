"""Preparing an update: choose how to store it, write its data, describe the pending version.

    copy     into a fresh block: new chunks, at least half of the content changes, the block is too
             small or much too large, whole replacements
    append   in place behind the committed end, which no reader of a committed version looks at;
             not where a pending version stands that the new one is to replace: it may be there
    redo     a small update: only logged; the block is written after the log is stable
    cut      a truncation: a shorter record, and a trim for older redo data

No row is written here. After a failure the only trace is bytes that no version refers to.
"""

from typing import NamedTuple

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import CHUNK_BYTES_MAX, ChunkId
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind
from emberfs.runtime.checksum import crc32c_blocks
from emberfs.storage.allocator import NO_BLOCK, block_bytes, class_for
from emberfs.storage.blocks import BlockFiles
from emberfs.storage.content import Outcome, View, read_view, stream_checksums, zeros
from emberfs.storage.records import (
    CHECKSUM_BYTES,
    NO_TRIM,
    UNIT_BYTES,
    ChunkRecord,
    PendingRecord,
    RedoRecord,
    count_of,
    grain_of,
)
from emberfs.storage.table import ChunkTable, Pending, pending_from

NOTHING = memoryview(b"")


class Update(NamedTuple):
    """What a prepare is asked to do; see ChunkStore.prepare."""

    kind: UpdateKind
    version: int
    offset: int
    length: int
    data: memoryview
    chunk_bytes: int
    remembered: tuple[RememberedWrite, ...]
    exists: bool
    checksums: bytes = b""  # REPLACE: of what damaged content should be


class Span(NamedTuple):
    """Bytes that change: `gap` zeros from `start`, then `data`."""

    start: int
    gap: int
    data: memoryview

    @property
    def stop(self) -> int:
        """End of the bytes that change."""
        return self.start + self.gap + len(self.data)


def check_update(update: Update) -> None:
    """Refuse what cannot be stored. Raises INVALID."""
    data = update.data
    wanted = update.length if update.kind in (UpdateKind.WRITE, UpdateKind.REPLACE) else 0
    if update.kind == UpdateKind.REPLACE and not update.exists:
        wanted = 0
    if len(data) != wanted:
        raise EmberfsError(Code.INVALID, f"{len(data)} bytes of data for {wanted} declared")
    if update.checksums and len(update.checksums) != count_of(update.length) * CHECKSUM_BYTES:
        raise EmberfsError(Code.INVALID, "the checksums do not fit the length")
    if update.offset < 0 or update.length < 0 or update.version < 1:
        raise EmberfsError(Code.INVALID, "negative offset or length, or no version")
    if not 0 < update.chunk_bytes <= CHUNK_BYTES_MAX:
        raise EmberfsError(Code.INVALID, f"chunk size {update.chunk_bytes} is out of range")
    offset = update.offset if update.kind == UpdateKind.WRITE else 0
    if update.kind != UpdateKind.REMOVE and offset + update.length > update.chunk_bytes:
        raise EmberfsError(
            Code.INVALID,
            f"update ends at {offset + update.length}, behind the chunk of {update.chunk_bytes}",
        )


class Preparer:
    """Turns updates into pending versions."""

    def __init__(self, table: ChunkTable, files: BlockFiles, damaged: set[ChunkId]) -> None:
        self._table = table
        self._files = files
        self._damaged = damaged

    def stage(self, chunk: ChunkId, update: Update) -> Pending:
        """Write the update's data. Raises NO_SPACE, DISK, CHECKSUM (old content is damaged)."""
        record = self._table.record(chunk)
        before = record.length if record is not None else 0
        if update.kind == UpdateKind.REMOVE or not update.exists:
            return self._pending(update, NO_BLOCK, 0, removes=True)
        if update.kind == UpdateKind.REPLACE:
            return self._copy(chunk, update, None, Span(0, 0, update.data))
        if update.kind == UpdateKind.TRUNCATE:
            if record is not None and update.length < before:
                return self._cut(chunk, update, record)
            span = Span(before, update.length - before, NOTHING)
        else:
            gap = max(0, update.offset - before) if update.length else 0
            start = min(update.offset, before) if update.length else before
            span = Span(start, gap, update.data)
        return self._choose(chunk, update, record, span)

    def _choose(
        self, chunk: ChunkId, update: Update, record: ChunkRecord | None, span: Span
    ) -> Pending:
        before = record.length if record is not None else 0
        length = max(before, span.stop)
        if span.start == span.stop:
            block = record.block if record is not None else NO_BLOCK
            return self._pending(update, block, length, first=count_of(length))
        if (
            record is None
            or record.block == NO_BLOCK
            or span.stop > block_bytes(record.block)
            or grain_of(length) != grain_of(before)
        ):
            return self._copy(chunk, update, record, span)
        replaces = chunk in self._table.pending
        if not replaces and span.start == before >= self._table.floor(chunk, record):
            return self._append(chunk, update, record, span)
        if 2 * (span.stop - span.start) >= length:
            return self._copy(chunk, update, record, span)
        return self._redo(chunk, update, record, span)

    def reads_old_content(self, record: ChunkRecord | None, offset: int, length: int) -> bool:
        """Tell whether a WRITE must read and merge what is there."""
        if record is None or record.length == 0:
            return False
        stop, grain = offset + length, grain_of(max(record.length, offset + length))
        if offset >= record.length:
            return bool(record.length % grain) or stop > block_bytes(record.block)
        if offset == 0 and stop >= record.length:
            return False
        aligned = offset % grain == 0 and (stop % grain == 0 or stop >= record.length)
        small = 2 * length < max(record.length, stop) and stop <= block_bytes(record.block)
        return not (aligned and small and grain == grain_of(record.length))

    # ------------------------------------------------------------ the four ways

    def _copy(
        self, chunk: ChunkId, update: Update, record: ChunkRecord | None, span: Span
    ) -> Pending:
        """Into a fresh block, merged with what the span leaves of the old content."""
        before = record.length if record is not None else 0
        length = max(before, span.stop)
        if not length:
            return self._pending(update, NO_BLOCK, 0)
        grain = grain_of(length)
        if span.start == 0 and span.stop >= before:
            checksums = stream_checksums(NOTHING, span.gap, span.data, grain)
            views = [*zeros(span.gap), span.data]
        else:
            assert record is not None
            merged = memoryview(bytearray(length))
            self._content(chunk, record, 0, merged[: span.start])
            merged[span.start + span.gap : span.stop] = span.data
            if span.stop < before:
                self._content(chunk, record, span.stop, merged[span.stop :])
            checksums = crc32c_blocks(merged, grain)
            views = [merged]
        return self._fresh(update, length, update.checksums or checksums, views)

    def _fresh(
        self, update: Update, length: int, checksums: bytes, views: list[memoryview]
    ) -> Pending:
        block = self._table.take_block(class_for(length))
        try:
            self._files.write(block, 0, views)
        except EmberfsError:
            self._table.give_block(block)
            raise
        return self._pending(update, block, length, checksums=checksums, fresh=True)

    def _append(self, chunk: ChunkId, update: Update, record: ChunkRecord, span: Span) -> Pending:
        """Behind the committed end; a gap is written as zeros, old garbage may lie there."""
        grain = grain_of(span.stop)
        start = record.length - record.length % grain
        prefix = memoryview(bytearray(record.length - start))
        self._content(chunk, record, start, prefix)
        checksums = stream_checksums(prefix, span.gap, span.data, grain)
        self._files.write(record.block, record.length, [*zeros(span.gap), span.data])
        return self._pending(
            update, record.block, span.stop, first=start // grain, checksums=checksums
        )

    def _redo(self, chunk: ChunkId, update: Update, record: ChunkRecord, span: Span) -> Pending:
        """Widen the span to whole grains for the checksums and to whole units for the log."""
        before = record.length
        length = max(before, span.stop)
        grain = grain_of(length)
        low = span.start - span.start % grain
        high = min(-(-span.stop // grain) * grain, length)
        merged = memoryview(bytearray(high - low))
        last = span.stop - span.stop % grain  # start of the grain that the span ends in
        if span.start > low:
            self._content(chunk, record, low, merged[: min(grain, before - low)])
        if last < span.stop < before and (last > low or span.start == low):
            self._content(chunk, record, last, merged[last - low : min(last + grain, before) - low])
        # A gap begins at the committed end, where `merged` is still zero.
        merged[span.start + span.gap - low : span.stop - low] = span.data
        first = span.start // UNIT_BYTES
        end = min(-(-span.stop // UNIT_BYTES) * UNIT_BYTES, length)
        logged = bytes(merged[first * UNIT_BYTES - low : end - low])
        return self._pending(
            update,
            record.block,
            length,
            first=low // grain,
            checksums=crc32c_blocks(merged, grain),
            redo=RedoRecord(NO_TRIM, first, logged),
        )

    def _cut(self, chunk: ChunkId, update: Update, record: ChunkRecord) -> Pending:
        """Shorten: in the same block unless most of it would be wasted."""
        length = update.length
        if not length:
            return self._pending(update, NO_BLOCK, 0)
        grain = grain_of(record.length)
        wasteful = class_for(length) + 2 <= class_for(block_bytes(record.block))
        if wasteful or grain_of(length) != grain:
            merged = memoryview(bytearray(length))
            self._content(chunk, record, 0, merged)
            return self._fresh(update, length, crc32c_blocks(merged, grain_of(length)), [merged])
        start = length - length % grain
        tail = memoryview(bytearray(length - start))
        self._content(chunk, record, start, tail)
        # Rows of an overlay that is already applied count too: a replay brings them back.
        log = self._table.redo.get(record.block)
        trim = RedoRecord(length, 0, b"") if log is not None and log.versions else None
        return self._pending(
            update,
            record.block,
            length,
            first=start // grain,
            checksums=crc32c_blocks(tail, grain),
            redo=trim,
        )

    # ------------------------------------------------------------ parts

    def _pending(
        self,
        update: Update,
        block: int,
        length: int,
        *,
        first: int = 0,
        checksums: bytes = b"",
        fresh: bool = False,
        removes: bool = False,
        redo: RedoRecord | None = None,
    ) -> Pending:
        record = PendingRecord(
            version=update.version,
            kind=update.kind,
            removes=removes,
            fresh=fresh,
            redo=redo is not None,
            block=block,
            length=length,
            first=first,
            checksums=checksums,
            remembered=update.remembered,
        )
        return pending_from(record, redo)

    def _content(self, chunk: ChunkId, record: ChunkRecord, start: int, target: memoryview) -> None:
        """Fill `target` with verified committed content. Raises CHECKSUM."""
        if not len(target):
            return
        table = self._table
        view: View = table.view_of(record)
        if read_view(self._files, view, start, target, cached=False) == Outcome.DONE:
            return
        with table.lock:  # nothing is written in place now: the next answer is final
            view = table.view_of(record)
            if read_view(self._files, view, start, target, cached=False) == Outcome.DONE:
                return
        self._damaged.add(chunk)
        raise EmberfsError(
            Code.CHECKSUM,
            f"chunk {chunk.hex()}: the content to merge is damaged; replace it from a replica",
        )
