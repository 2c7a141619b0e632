"""Making committed versions stable, and what may be done once they are.

One flush, in this order:
 1. close the epoch; remember which overlays exist;
 2. fdatasync the block files written so far;
 3. sync the store: everything committed in the closed epoch is now stable, data before metadata;
 4. in one batch: delete the epoch's undo rows, free the blocks that only they named, delete the
    redo rows whose data step 2 made stable in place;
 5. write the overlays of step 1 in place. Their redo rows are stable since step 3 and stay until a
    later step 2 has covered these writes.

A crash between any two steps is harmless: before 3 nothing was promised; after it every commit of
the epoch verifies by itself; the batch of 4 may be lost, and then only its bookkeeping is repeated.
A commit that comes while a flush runs opens the next epoch and keeps its own undo row, so that what
step 3 happened to sync without its data can be taken back.
"""

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from emberfs.kv.store import Change
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChunkId, MiB
from emberfs.storage.allocator import NO_BLOCK
from emberfs.storage.blocks import BlockFiles
from emberfs.storage.records import redo_key, undo_key
from emberfs.storage.redo import Overlay, RedoLog, runs_of
from emberfs.storage.table import ChunkTable

log = logging.getLogger("emberfs.storage.flush")

# Redo rows should die in the store's write buffer: larger, and they reach its tables too.
OVERLAY_BYTES_MAX = 2 * MiB
WAITING_BYTES_MAX = 256 * MiB
UNDO_COUNT_MAX = 16384


class _Captured(NamedTuple):
    """An overlay as a flush found it."""

    log: RedoLog
    version: int
    overlay: Overlay


class Flusher:
    """Performs flushes, one at a time."""

    def __init__(self, table: ChunkTable, files: BlockFiles) -> None:
        self._table = table
        self._files = files
        self._one = threading.Lock()
        self._failed = ""

    @property
    def needed(self) -> bool:
        """True when memory or space held until the next flush has grown large."""
        table = self._table
        return (
            len(table.undo) > UNDO_COUNT_MAX
            or sum(list(table.waiting_bytes.values())) > WAITING_BYTES_MAX
            or table.overlay_bytes > OVERLAY_BYTES_MAX
        )

    def flush(self) -> None:
        """Make everything committed so far stable. Raises DISK; after that every flush fails.

        When all is stable and only the tidying up finds no room, that is left to the next flush.
        """
        with self._one:
            if self._failed:
                raise EmberfsError(Code.DISK, self._failed)
            try:
                tidy = self._sync()
            except EmberfsError as problem:
                # The kernel drops dirty pages it failed to write: a second try would lie.
                self._failed = f"a sync failed: {problem.message}"
                raise EmberfsError(Code.DISK, self._failed) from None
            try:
                tidy()
            except EmberfsError as problem:
                if problem.code != Code.NO_SPACE:
                    self._failed = f"the disk fails: {problem.message}"
                    raise EmberfsError(Code.DISK, self._failed) from None
                log.warning("redo and undo records stay for now: %s", problem)

    def _sync(self) -> Callable[[], None]:
        """Make stable what is committed now; return how to tidy up after it."""
        table = self._table
        with table.lock:
            epoch, table.epoch = table.epoch, table.epoch + 1
            done = [(log, log.applied_versions()) for log in table.redo.values() if log.applied]
            captured = [
                _Captured(log, log.versions[-1], dict(log.overlay))
                for log in table.redo.values()
                if log.versions
            ]
        dirty = self._files.take_dirty()
        self._files.sync(dirty)
        table.store.sync()

        def tidy() -> None:
            with table.lock:
                self._forget(epoch, done)
            for found in captured:
                self._apply(found)

        return tidy

    def _forget(self, epoch: int, done: list[tuple[RedoLog, list[int]]]) -> None:
        """Step 4."""
        table = self._table
        changes: list[Change] = [
            (redo_key(log.chunk, log.block, version), None)
            for log, versions in done
            for version in versions
        ]
        freed: set[int] = set()
        kept: list[tuple[ChunkId, list[int]]] = []
        for chunk, undo in table.undo.items():
            past = [e for e in undo.kept if e <= epoch]
            changes += [(undo_key(chunk, e), None) for e in past]
            named = {block for e, (block, _) in undo.kept.items() if e > epoch} | {undo.current}
            freed |= {undo.kept[e][0] for e in past} - named - {NO_BLOCK}
            kept.append((chunk, past))
        for block in freed:
            changes += table.redo_deletions(block)
        if changes:
            table.write_rows(changes, table.allocator.preview([], sorted(freed)))
        self._release(epoch, freed, kept, done)

    def _release(
        self,
        epoch: int,
        freed: set[int],
        kept: list[tuple[ChunkId, list[int]]],
        done: list[tuple[RedoLog, list[int]]],
    ) -> None:
        """Follow in memory what the batch did."""
        table = self._table
        for chunk, past in kept:
            undo = table.undo[chunk]
            for e in past:
                del undo.kept[e]
            if not undo.kept:
                del table.undo[chunk]
        for block in freed:
            table.drop_redo(block)
        for log, versions in done:
            if table.redo.get(log.block) is log:
                log.forget(versions)
                if not log.versions:
                    table.drop_redo(log.block)
        held = [block for e, block in table.held if e <= epoch]
        table.held = [(e, block) for e, block in table.held if e > epoch]
        for e in [e for e in table.waiting_bytes if e <= epoch]:
            del table.waiting_bytes[e]
        table.retire([*sorted(freed), *held])

    def _apply(self, found: _Captured) -> None:
        """Step 5 for one block, unless it was abandoned meanwhile."""
        table, log = self._table, found.log
        with table.lock:
            if table.redo.get(log.block) is not log:
                return
            for offset, pieces in runs_of(found.overlay):
                self._files.write(log.block, offset, pieces)
            before = log.overlay_bytes
            log.settle(found.overlay, found.version)
            table.overlay_bytes += log.overlay_bytes - before
