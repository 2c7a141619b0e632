"""Mutations of the chunk store: what is written, when it is stable, what is read back."""

from typing import Any

from emberfs.storage import chunks, content, flush, table
from emberfs.storage.blocks import BlockFiles
from emberfs.storage.chunks import ChunkStore
from emberfs.storage.flush import Flusher
from emberfs.storage.group_flush import GroupFlush
from emberfs.storage.reopen import Reopening
from emberfs.storage.table import ChunkTable
from sim.mutations import LINEAR, WRONG, Patch, mutation

# After a power cut a store may also say that it is damaged, and clients then fail.
CUT = f"not durable, damaged, error at a client, no exit, {WRONG}"
BLOCKS = "blocks, owned twice, owned but free, leaked"


@mutation("blackout", CUT)
def flush_is_acknowledged_unsynced(patch: Patch) -> None:
    """A flush returns at once."""

    async def flush(self: Any) -> None:
        pass

    patch.set(GroupFlush, "flush", flush)


@mutation("blackout", CUT)
def blocks_are_not_synced(patch: Patch) -> None:
    """A flush syncs the records and not the data."""
    patch.set(BlockFiles, "sync", lambda self, size_classes: None)


@mutation("blackout", CUT)
def records_are_not_synced(patch: Patch) -> None:
    """A flush syncs the data and not the records."""

    def make(original: Any) -> Any:
        def init(self: Any, found: Any, files: Any) -> None:
            original(self, found, files)
            found.store = _NoSync(found.store)

        return init

    patch.wrap(Flusher, "__init__", make)


class _NoSync:
    """A row store whose sync does nothing."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def sync(self) -> None:
        """Not now."""


@mutation("blackout", CUT)
def power_cut_is_not_noticed(patch: Patch) -> None:
    """After a power cut nothing is verified or taken back."""

    def make(original: Any) -> Any:
        def run(self: Any, *, power_cut: bool) -> None:
            original(self, power_cut=False)

        return run

    patch.wrap(Reopening, "run", make)


@mutation("blackout", CUT)
def lost_writes_are_remembered(patch: Patch) -> None:
    """A power cut took a version's data; that its writer is done with it is still remembered."""

    def make(original: Any) -> Any:
        def take_back(self: Any, chunk: Any) -> None:
            before = self._table.record(chunk)
            original(self, chunk)
            after = self._table.record(chunk)
            if before is not None and after is not None:
                after = chunks.msgspec.structs.replace(after, remembered=before.remembered)
                self._table.store.write([(table.record_key(chunk), table.encode(after))])
                self._table.forget(chunk)

        return take_back

    patch.wrap(Reopening, "_take_back", make)


@mutation("blackout", CUT)
def nothing_is_kept_for_undo(patch: Patch) -> None:
    """A commit drops what was committed before, though its own data is not stable yet."""
    patch.set(ChunkTable, "_keep", lambda self, chunk, before, changes: False)


@mutation("blackout", CUT)
def blocks_are_free_before_it_is_stable(patch: Patch) -> None:
    """A block is used again before the write that says it is free is stable."""

    def make(original: Any) -> Any:
        def free(self: Any, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            held, self.held = self.held, []
            self.retire([block for _, block in held])

        return free

    patch.wrap(ChunkTable, "discard", make)
    patch.wrap(ChunkTable, "_committed", make)
    patch.set(ChunkTable, "_keep", lambda self, chunk, before, changes: False)


@mutation("blackout", CUT)
def kept_versions_are_overwritten(patch: Patch) -> None:
    """Appends go over bytes that a version kept for undo still needs."""
    patch.set(ChunkTable, "floor", lambda self, chunk, record: record.length)


@mutation("disk", WRONG)
def checksums_are_not_compared(patch: Patch) -> None:
    """Reads return what is on the disk, rotten or not."""

    def fill(
        files: Any, view: Any, start: int, target: Any, grain: int, cached: bool
    ) -> content.Outcome:
        read = files.read_cached_into if cached else files.read_into
        count = read(view.block, start, target) if len(target) else 0
        if count < 0:
            return content.Outcome.BLOCKED
        target[count:] = bytes(len(target) - count)
        for overlay in view.overlays:
            content.patch(target, start, overlay)
        return content.Outcome.DONE

    patch.set(content, "_fill", fill)
    patch.set(ChunkStore, "_read_plain", lambda self, chunk, offset, sink: None)


@mutation("calm, gentle", f"damaged, error at a client, internal error, {WRONG}")
def redo_data_is_lost(patch: Patch) -> None:
    """Logged updates are not laid over the block."""
    patch.set(ChunkTable, "add_redo", lambda self, chunk, block, version, redo: None)
    patch.set(content, "patch", lambda target, start, overlay: None)


@mutation("outage, gentle, blackout", f"damaged, error at a client, no exit, {WRONG}")
def redo_rows_are_not_loaded(patch: Patch) -> None:
    """After a restart the logged updates that were not yet in place are forgotten."""
    patch.set(Reopening, "_load_redo", lambda self: None)


@mutation("gentle, processes, outage", WRONG)
def pending_versions_are_in_memory(patch: Patch) -> None:
    """A prepared version does not survive the death of the process."""

    def store_pending(self: Any, chunk: Any, pending: Any) -> None:
        self.pending[chunk] = pending

    def discard(self: Any, chunk: Any) -> None:
        pending = self.pending.pop(chunk, None)
        if pending is not None and pending.record.fresh:
            self.give_block(pending.record.block)

    def make(original: Any) -> Any:
        def commit(self: Any, chunk: Any, pending: Any, *, stored: bool) -> None:
            original(self, chunk, pending, stored=False)

        return commit

    patch.set(ChunkTable, "store_pending", store_pending)
    patch.set(ChunkTable, "discard", discard)
    patch.wrap(ChunkTable, "commit", make)


@mutation("gentle, processes, outage", WRONG)
def committed_versions_are_in_memory(patch: Patch) -> None:
    """A commit does not survive the death of the process: the version is pending again, or old."""

    def make(original: Any) -> Any:
        def commit(self: Any, chunk: Any, pending: Any, *, stored: bool) -> None:
            store, self.store = self.store, _NoWrite(self.store)
            try:
                original(self, chunk, pending, stored=stored)
            finally:
                self.store = store

        return commit

    patch.wrap(ChunkTable, "commit", make)


class _NoWrite:
    """A row store that forgets what is written."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, changes: Any) -> None:
        """Not now."""


@mutation("gentle, messages, disk, aimed", BLOCKS)
def discarded_blocks_leak(patch: Patch) -> None:
    """The block of a dropped version stays marked."""

    def make(original: Any) -> Any:
        def give_way(self: Any, chunk: Any) -> Any:
            changes, _ = original(self, chunk)
            return changes, []

        return give_way

    patch.wrap(ChunkTable, "_give_way", make)


@mutation("calm, gentle", BLOCKS)
def overwritten_blocks_leak(patch: Patch) -> None:
    """A flush does not free what older versions held."""

    def make(original: Any) -> Any:
        def write_rows(self: Any, changes: Any, rows: Any) -> None:
            rows = list(rows)
            keep = [g for g in rows if bits(self, g) <= g.bits.bit_count()]
            original(self, changes, keep)

        return write_rows

    def bits(self: Any, group: Any) -> int:
        for found, _ in self.allocator.groups():
            if found[:2] == group[:2]:
                return int(found.bits.bit_count())
        return 0

    patch.wrap(ChunkTable, "write_rows", make)


@mutation("aimed, gentle, messages", LINEAR)
def writers_are_forgotten_on_restart(patch: Patch) -> None:
    """What a chunk remembers of its writers does not survive a restart."""

    def make(original: Any) -> Any:
        def decode(key: bytes, value: bytes) -> Any:
            return chunks.msgspec.structs.replace(original(key, value), remembered=())

        return decode

    patch.wrap(table, "decode_record", make)


@mutation("calm, messages", WRONG)
def truncation_keeps_the_tail(patch: Patch) -> None:
    """Bytes that a truncation cut off come back when the chunk grows again, checksums and all."""
    from emberfs.storage import update

    patch.set(update, "zeros", lambda length: [memoryview(b"\xaa" * length)])

    def checksums(prefix: Any, gap: int, data: Any, grain: int) -> bytes:
        return content.crc32c_blocks(b"".join([prefix, b"\xaa" * gap, data]), grain)

    patch.set(update, "stream_checksums", checksums)


@mutation("calm, messages", WRONG)
def long_writes_are_cut(patch: Patch) -> None:
    """Only the first half of a write that needs a new block is stored."""
    from emberfs.storage.update import Preparer

    def make(original: Any) -> Any:
        def stage(self: Any, chunk: Any, update: Any) -> Any:
            if update.length > 4096 and update.kind == chunks.UpdateKind.WRITE:
                half = update.length // 2
                update = update._replace(length=half, data=update.data[:half])
            return original(self, chunk, update)

        return stage

    patch.wrap(Preparer, "stage", make)


@mutation("blackout", CUT)
def logged_data_goes_before_its_place_is_stable(patch: Patch) -> None:
    """A flush deletes logged updates that it has just put in place."""

    def make(original: Any) -> Any:
        def forget(self: Any, epoch: int, done: Any) -> None:
            logs = [log for log in self._table.redo.values() if log.versions]
            for log in logs:
                self._apply(flush._Captured(log, log.versions[-1], dict(log.overlay)))
            original(self, epoch, [(log, log.applied_versions()) for log in logs])

        return forget

    patch.wrap(Flusher, "_forget", make)
