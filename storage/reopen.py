"""Opening a chunk store: load what lives in memory, and after a power cut take back what was lost.

After the death of the process alone everything that was written is there. After a power cut the
store holds a prefix of its batches, but block data that was not synced may be missing, also under
records that did arrive. Only chunks with undo rows can be concerned: each gets its newest version
that verifies. Redo rows are part of the store and are laid over a block before it is judged.
"""

from collections import defaultdict

import msgspec

from emberfs.kv.store import Change
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChunkId, MiB
from emberfs.storage.allocator import CLASS_BYTES, GROUP_BLOCKS, NO_BLOCK
from emberfs.storage.blocks import BlockFiles
from emberfs.storage.content import Outcome, View, read_view
from emberfs.storage.records import (
    ChunkRecord,
    PendingRecord,
    RedoRecord,
    decode_pending,
    decode_record,
    decode_redo,
    encode,
    parse_group_row,
    parse_redo_key,
    parse_undo_key,
    pending_key,
    prefix_range,
    record_key,
    redo_key,
    undo_key,
)
from emberfs.storage.redo import RedoLog
from emberfs.storage.table import ChunkTable, Undo, pending_from

_VERIFY_BYTES = 1 * MiB
_Redo = dict[int, RedoRecord]  # by version


class Reopening:
    """Fills an empty table from its store."""

    def __init__(self, table: ChunkTable, files: BlockFiles) -> None:
        self._table = table
        self._files = files
        self._redo: dict[tuple[ChunkId, int], _Redo] = defaultdict(dict)  # (chunk, block)
        self._undo: dict[ChunkId, dict[int, ChunkRecord | None]] = defaultdict(dict)
        self._pending: dict[ChunkId, PendingRecord] = {}

    def run(self, *, power_cut: bool) -> None:
        """Recover. Raises DISK when rows are damaged."""
        self._load_groups()
        self._load_rows()
        self._table.tombstones.load()
        if power_cut:
            for chunk in sorted(self._undo.keys() | self._pending.keys()):
                self._take_back(chunk)
        else:
            self._keep_undo()
        self._load_redo()
        self._load_pending()
        if power_cut:
            self._table.store.sync()

    # ------------------------------------------------------------ loading

    def _load_groups(self) -> None:
        allocator = self._table.allocator
        for key, value in self._table.store.scan(*prefix_range(b"G")):
            size_class, group, bits = parse_group_row(key, value)
            if size_class >= len(CLASS_BYTES) or bits >> GROUP_BLOCKS[size_class]:
                raise EmberfsError(Code.DISK, f"bitmap {key.hex()} names blocks that cannot exist")
            if group >= self._files.group_limit(size_class):
                self._files.reserve_group(size_class, group)
            allocator.add_group(size_class, group, bits)
        for size_class in range(len(CLASS_BYTES)):
            for group in reversed(range(self._files.group_limit(size_class))):
                if not allocator.has_group(size_class, group):
                    self._files.release_group(size_class, group)

    def _load_rows(self) -> None:
        store = self._table.store
        for key, value in store.scan(*prefix_range(b"U")):
            chunk, epoch = parse_undo_key(key)
            self._undo[chunk][epoch] = decode_record(key, value) if value else None
            self._table.epoch = max(self._table.epoch, epoch + 1)
        for key, value in store.scan(*prefix_range(b"P")):
            self._pending[ChunkId(key[1:])] = decode_pending(key, value)
        for key, value in store.scan(*prefix_range(b"R")):
            chunk, block, version = parse_redo_key(key)
            self._redo[chunk, block][version] = decode_redo(key, value)

    def _keep_undo(self) -> None:
        for chunk, kept in self._undo.items():
            record = self._table.record(chunk)
            self._table.undo[chunk] = Undo(
                {e: (r.block, r.length) if r else (NO_BLOCK, 0) for e, r in kept.items()},
                record.block if record is not None else NO_BLOCK,
            )

    def _load_redo(self) -> None:
        """Build the overlays; delete rows of versions that are neither committed nor pending."""
        orphans: list[Change] = []
        for (chunk, block), rows in self._redo.items():
            record, pending = self._table.record(chunk), self._pending.get(chunk)
            undo = self._table.undo.get(chunk)
            newest = record.version if record is not None and record.block == block else 0
            kept = not newest and undo is not None and undo.holds(block)
            for version in sorted(rows):
                if kept or version <= newest:
                    self._table.add_redo(chunk, block, version, rows[version])
                elif pending is None or (pending.block, pending.version) != (block, version):
                    orphans.append((redo_key(chunk, block, version), None))
        if orphans:
            self._table.store.write(orphans)

    def _load_pending(self) -> None:
        for chunk, record in self._pending.items():
            redo = self._redo[chunk, record.block][record.version] if record.redo else None
            self._table.pending[chunk] = pending_from(record, redo)

    # ------------------------------------------------------------ after a power cut

    def _take_back(self, chunk: ChunkId) -> None:
        """Choose the newest version whose data is there, in one batch; drop all others."""
        table, kept = self._table, self._undo.pop(chunk, {})
        current = table.record(chunk)
        choices = [current, *(kept[epoch] for epoch in sorted(kept, reverse=True))]
        chosen = current
        if kept:
            # If nothing verifies the disk is damaged otherwise: reads of the current one say so.
            chosen = next((r for r in choices if self._verifies(chunk, r)), current)
        changes: list[Change] = [(undo_key(chunk, epoch), None) for epoch in kept]
        changes.append((record_key(chunk), encode(chosen) if chosen is not None else None))
        named = {r.block for r in choices if r is not None}
        stays = {chosen.block if chosen is not None else NO_BLOCK, NO_BLOCK}
        pending = self._pending.get(chunk)
        if pending is not None:
            named.add(pending.block)
            if chosen is current and self._pending_verifies(chunk, pending, chosen):
                stays.add(pending.block)
            else:
                del self._pending[chunk]
                changes.append((pending_key(chunk), None))
        freed = sorted(named - stays)
        table.write_rows(changes, table.allocator.preview([], freed))
        for block in freed:
            table.allocator.give(block)
        table.forget(chunk)

    def _verifies(self, chunk: ChunkId, record: ChunkRecord | None) -> bool:
        """Tell whether a version's content is there; its redo rows are laid over the block."""
        if record is None or record.block == NO_BLOCK:
            return True
        view = View(record.version, record.block, record.length, record.checksums, ())
        return self._content_verifies(chunk, view)

    def _pending_verifies(
        self, chunk: ChunkId, pending: PendingRecord, chosen: ChunkRecord | None
    ) -> bool:
        view = self._table.pending_view(pending_from(pending, None), chosen)
        if pending.removes or view is None or view.block == NO_BLOCK:
            return True
        return self._content_verifies(chunk, view)

    def _content_verifies(self, chunk: ChunkId, view: View) -> bool:
        log = RedoLog(chunk, view.block)
        rows = self._redo.get((chunk, view.block), {})
        for version in sorted(v for v in rows if v <= view.version):
            log.add(version, rows[version])
        return view_verifies(self._files, msgspec.structs.replace(view, overlays=(log.overlay,)))


def view_verifies(files: BlockFiles, view: View) -> bool:
    """Read a whole version piece by piece and compare its checksums. Raises DISK."""
    scratch = memoryview(bytearray(min(_VERIFY_BYTES, view.length)))
    for start in range(0, view.length, _VERIFY_BYTES):
        piece = scratch[: min(_VERIFY_BYTES, view.length - start)]
        if read_view(files, view, start, piece, cached=False) != Outcome.DONE:
            return False
    return True
