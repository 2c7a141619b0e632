"""The chunk store of one target: versions of chunks in block files, their records in a store.

The caller guarantees one update per chunk at a time (prepare, then commit or discard). Reads run
concurrently with everything and from any thread. Methods marked [T] may block and belong into a
thread; the others are quick. How changes are stored: update.py; how they become stable: flush.py;
what memory mirrors and how a block lives: table.py; what a crash leaves: reopen.py.
"""

import logging
from collections.abc import Callable

import msgspec

from emberfs.kv.rocks import RocksStore
from emberfs.kv.store import OrderedStore
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChunkId, KiB, MiB
from emberfs.proto.storage_calls import ChunkRow, FsckAnswer, Leak, RememberedWrite, UpdateKind
from emberfs.runtime.checksum import crc32c, crc32c_blocks
from emberfs.runtime.env import Env
from emberfs.storage.blocks import BlockFiles, disk_error, record_reserve_bytes
from emberfs.storage.content import Outcome, View, read_unverified, read_view
from emberfs.storage.flush import Flusher
from emberfs.storage.leaks import Leaks
from emberfs.storage.plainread import PlainReads
from emberfs.storage.records import (
    CHECKSUM_BYTES,
    ChunkRecord,
    chunk_of_key,
    decode_record,
    grain_of,
    record_range,
)
from emberfs.storage.reopen import Reopening, view_verifies
from emberfs.storage.table import ChunkTable, Pending
from emberfs.storage.update import NOTHING, Preparer, Update, check_update

log = logging.getLogger("emberfs.storage.chunks")

FORMAT_VERSION = 1
QUICK_BYTES_MAX = 256 * KiB
_TRIES_UNLOCKED = 2


class ReadOutcome(msgspec.Struct, frozen=True, gc=False):
    """What a read filled in. An absent chunk is length 0 and version 0."""

    length: int  # bytes; short when the chunk ends earlier
    version: int  # which version they are of


class PendingState(msgspec.Struct, frozen=True, gc=False):
    """A version that is prepared and neither committed nor discarded."""

    version: int
    kind: UpdateKind
    length: int
    remembered: tuple[RememberedWrite, ...]
    removes: bool  # committing it makes the chunk absent


class ChunkState(msgspec.Struct, frozen=True, gc=False):
    """A chunk as this target has it; version 0 with a pending version: being created."""

    version: int
    length: int
    digest: int  # as ChunkRow.digest
    remembered: tuple[RememberedWrite, ...]
    pending: PendingState | None


# As boot_id, those of nobody: whoever opens next must verify, and doubts as well.
_NO_BOOT = "a sync failed"
_DOUBTFUL_BOOT = "not complete since a power cut"


class _Format(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file `format` of a target's directory."""

    version: int
    boot_id: str  # of the machine when the store was last open
    clean: bool  # closed in order: everything is stable


def digest_of(record: ChunkRecord) -> int:
    """Return a CRC32C over length and checksums: equal exactly when the contents are."""
    return crc32c(record.checksums, crc32c(record.length.to_bytes(8, "little")))


def open_rocks(path: str) -> OrderedStore:
    """Open the metadata store of a target."""
    # Redo rows live shorter than this buffer lasts, so most never reach a table on disk.
    return RocksStore(path, write_buffer_bytes=16 * MiB)


class ChunkStore:
    """See the module. Open one with `ChunkStore.open`."""

    def __init__(
        self, env: Env, path: str, table: ChunkTable, files: BlockFiles, unlock: Callable[[], None]
    ) -> None:
        """Not for callers: use `open`."""
        self._env = env
        self._path = path
        self._table = table
        self._files = files
        self._unlock = unlock
        self._closed = False
        self._distrusted = False  # a sync has failed, and the format file says so
        self.damaged: set[ChunkId] = set()  # chunks whose content was refuted by its checksums
        self._adopted: set[ChunkId] = set()  # whose pending version came damaged
        self.power_cut_possible = False  # the target may have lost what was not flushed
        self._doubtful = False  # the same, until somebody calls `trust`
        self._preparer = Preparer(table, files, self.damaged)
        self._flusher = Flusher(table, files)
        self._leaks = Leaks(table)
        self.plain = PlainReads(table, files)

    # ------------------------------------------------------------ life

    @classmethod
    def open(
        cls,
        env: Env,
        path: str,
        *,
        open_store: Callable[[str], OrderedStore] = open_rocks,
        capacity_bytes: int = 0,
        distrust: bool = False,
    ) -> "ChunkStore":
        """Open a target's directory, formatting an empty one. [T]

        `distrust`: treat it as after a power cut, because a sync of it has failed.
        Raises CONFIG (used by another process, or another format), NO_SPACE, DISK.
        """
        unlock = _lock(env, path)
        files: BlockFiles | None = None
        store: OrderedStore | None = None
        try:
            found = _read_format(env, path)
            files = BlockFiles(env.disk, path)
            store = open_store(f"{path}/meta")
            table = ChunkTable(store, files, capacity_bytes, env.now_ns)
            self = cls(env, path, table, files, unlock)
            self._recover(found, distrust)
        except BaseException as problem:
            for opened in (store, files):
                if opened is not None:
                    opened.close()
            unlock()
            if isinstance(problem, OSError):
                raise disk_error(problem, f"opening {path}") from None
            raise
        return self

    def _recover(self, found: _Format | None, distrust: bool) -> None:
        if found is None:
            if not self._table.store.scan(b"", b"\xff", limit=1):
                self._write_format(clean=False)
                return
            log.warning("%s has chunks and no format file", self._path)
            found = _Format(FORMAT_VERSION, "", clean=False)
        unclean = not found.clean
        other_boot = found.boot_id != self._env.boot_id
        self.power_cut_possible = unclean and (other_boot or distrust)
        self._doubtful = self.power_cut_possible or distrust
        if self.power_cut_possible:
            log.warning("%s may have lost what was not flushed: verifying", self._path)
        Reopening(self._table, self._files).run(power_cut=self.power_cut_possible)
        if unclean:
            self._files.mark_all_dirty()
        self._write_format(clean=False)

    def _write_format(self, *, clean: bool, boot_id: str = "") -> None:
        """Also syncs the directory, and with it the names of the block files."""
        if self._doubtful:
            clean, boot_id = False, boot_id or _DOUBTFUL_BOOT
        boot_id = boot_id or self._env.boot_id
        content = msgspec.json.encode(_Format(FORMAT_VERSION, boot_id, clean))
        self._env.disk.replace_small(f"{self._path}/format", content + b"\n")

    def trust(self) -> None:
        """What was lost is made good, or nobody expects it any more. [T] Raises OSError.

        Until then whoever opens the store doubts it again, also within the same boot.
        """
        if self._doubtful and not self._closed:
            self._doubtful = False
            self._write_format(clean=False)
            if self._distrusted:  # meanwhile, or before
                self._write_format(clean=False, boot_id=_NO_BOOT)

    def close(self) -> None:
        """Flush and release everything; a store that cannot be flushed stays unclean. [T]"""
        if self._closed:
            return
        self._closed = True
        try:
            self._flusher.flush()
            clean = True
        except EmberfsError as problem:
            log.error("%s: closing without a flush: %s", self._path, problem)
            clean = False
        self._table.store.close()
        self._files.close()
        if clean:
            self._write_format(clean=True)
        self._unlock()

    # ------------------------------------------------------------ state

    def state(self, chunk: ChunkId) -> ChunkState | None:
        """Return committed and pending version; None when there is neither."""
        while True:
            pending = self._table.pending.get(chunk)
            record = self._table.record(chunk)
            if self._table.pending.get(chunk) is pending:  # no commit between the two looks
                break
        if record is None and pending is None:
            return None
        waiting = _pending_state(pending) if pending is not None else None
        if record is None:
            return ChunkState(0, 0, 0, (), waiting)
        return ChunkState(
            record.version, record.length, digest_of(record), record.remembered, waiting
        )

    def tombstone(self, chunk: ChunkId) -> tuple[RememberedWrite, ...]:
        """Return who wrote a chunk before it was removed; () if nothing is known. Raises DISK."""
        return self._table.tombstones.of(chunk)

    def pending_chunks(self) -> list[ChunkId]:
        """Chunks with a pending version, in order."""
        return sorted(self._table.pending)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks in use, those included that the next flush frees."""
        return self._table.allocator.used_bytes

    @property
    def capacity_bytes(self) -> int:
        """As configured, else used + reserved + what the file system has free."""
        if self._table.capacity_bytes:
            return self._table.capacity_bytes
        space = self._env.disk.space(self._path)
        free = max(0, space.free_bytes - record_reserve_bytes(space))
        return self._table.allocator.reserved_bytes + free

    @property
    def need_flush(self) -> bool:
        """True when so much waits for a flush that one should run in the background."""
        return self._flusher.needed

    # ------------------------------------------------------------ updates

    def is_quick(
        self, kind: UpdateKind, length: int, *, chunk: ChunkId | None = None, offset: int = 0
    ) -> bool:
        """Tell whether prepare may run on the event loop: little to write, nothing to read.

        Without `chunk` the answer assumes that the old content, if needed, is in memory.
        """
        if kind == UpdateKind.REMOVE:
            return True
        if length > QUICK_BYTES_MAX:
            return False
        if kind == UpdateKind.REPLACE or chunk is None:
            return kind != UpdateKind.TRUNCATE
        if chunk in self._table.pending:
            return False  # an append beside it is merged into a block of its own
        known, record = self._table.cached(chunk)
        if not known or kind == UpdateKind.TRUNCATE:
            return False
        return not self._preparer.reads_old_content(record, offset, length)

    def prepare(
        self,
        chunk: ChunkId,
        kind: UpdateKind,
        *,
        version: int,
        offset: int,
        length: int,
        data: memoryview | None,
        chunk_bytes: int,
        remembered: tuple[RememberedWrite, ...],
        replace_exists: bool = True,
        checksums: bytes = b"",
    ) -> None:
        """Write `version` as pending; it survives kill -9 when this returns. [T] or is_quick

        `version` is committed + 1; any for REPLACE. `remembered` becomes the chunk's. It takes the
        place of a pending version in the same step, so that at no instant there is neither. Raises
        VERSION_GAP, INVALID, NO_SPACE, DISK, CHECKSUM (the content to merge with is damaged); then
        the committed version is untouched, and so is the pending one.
        `checksums`: a REPLACE by content that is damaged already; these are what it should have.
        """
        update = Update(
            kind, version, offset, length, data if data is not None else NOTHING,
            chunk_bytes, remembered, replace_exists, checksums,
        )  # fmt: skip
        pending = self._stage(chunk, update)
        try:
            self._table.store_pending(chunk, pending)
        except EmberfsError:
            self._give_back(pending)
            raise
        self._adopt(chunk, update)

    def prepare_and_commit(
        self,
        chunk: ChunkId,
        kind: UpdateKind,
        *,
        version: int,
        offset: int,
        length: int,
        data: memoryview | None,
        chunk_bytes: int,
        remembered: tuple[RememberedWrite, ...],
        replace_exists: bool = True,
        checksums: bytes = b"",
    ) -> None:
        """As prepare and commit, in one batch. [T] or is_quick"""
        update = Update(
            kind, version, offset, length, data if data is not None else NOTHING,
            chunk_bytes, remembered, replace_exists, checksums,
        )  # fmt: skip
        pending = self._stage(chunk, update)
        try:
            self._table.commit(chunk, pending, stored=False)
        except EmberfsError:
            self._give_back(pending)
            raise
        self._adopt(chunk, update)
        self._healed(chunk, pending)

    def _stage(self, chunk: ChunkId, update: Update) -> Pending:
        check_update(update)
        record = self._table.record(chunk)
        have = record.version if record is not None else 0
        if update.kind != UpdateKind.REPLACE and update.version != have + 1:
            raise EmberfsError(
                Code.VERSION_GAP, f"version {update.version} does not follow committed {have}"
            )
        try:
            return self._preparer.stage(chunk, update)
        except EmberfsError as problem:
            if problem.code != Code.NO_SPACE or not self._table.waiting_bytes:
                raise
        self._flusher.flush()  # frees what overwritten and removed chunks held
        return self._preparer.stage(chunk, update)

    def _adopt(self, chunk: ChunkId, update: Update) -> None:
        """Remember whether what is pending now came damaged."""
        if update.checksums:
            self._adopted.add(chunk)
        else:
            self._adopted.discard(chunk)

    def _give_back(self, pending: Pending) -> None:
        if pending.record.fresh:
            self._table.give_block(pending.record.block)

    def commit(self, chunk: ChunkId, version: int) -> None:
        """Make the pending version the committed one; survives kill -9 when this returns.

        A version that is committed already is fine. Raises VERSION_GAP, NO_SPACE, DISK.
        """
        pending = self._table.pending.get(chunk)
        if pending is None or pending.record.version != version:
            record = self._table.record(chunk)
            if record is not None and record.version == version:
                return
            raise EmberfsError(Code.VERSION_GAP, f"version {version} is not pending")
        self._table.commit(chunk, pending, stored=True)
        self._healed(chunk, pending)

    def _healed(self, chunk: ChunkId, pending: Pending) -> None:
        if chunk in self._adopted:
            self.damaged.add(chunk)
        elif pending.record.fresh or pending.record.removes:
            self.damaged.discard(chunk)
        self._adopted.discard(chunk)

    def discard(self, chunk: ChunkId) -> None:
        """Drop the pending version, if any. Raises NO_SPACE, DISK."""
        self._table.discard(chunk)
        self._adopted.discard(chunk)

    # ------------------------------------------------------------ reads

    def read_into(
        self, chunk: ChunkId, *, version: int, offset: int, length: int, sink: memoryview
    ) -> ReadOutcome:
        """Fill `sink` with verified content of a version (0: the committed one). [T]

        Raises VERSION_GAP, CHECKSUM (the chunk is then in `damaged`), DISK.
        """
        outcome = self._read(chunk, version, offset, sink[:length], cached=False)
        assert outcome is not None
        return outcome

    def try_read_into(
        self, chunk: ChunkId, *, version: int, offset: int, length: int, sink: memoryview
    ) -> ReadOutcome | None:
        """As read_into, but None instead of waiting for the disk."""
        if len(sink) != length:
            sink = sink[:length]
        if version == 0:
            outcome = self._read_plain(chunk, offset, sink)
            if outcome is not None:
                return outcome
        return self._read(chunk, version, offset, sink, cached=True)

    def _read_plain(self, chunk: ChunkId, offset: int, sink: memoryview) -> ReadOutcome | None:
        """The common read without ceremony: whole grains of a known version, no overlay, cached.

        None: something of that does not hold, or the checksums refute what was read; look closer.
        """
        table, length = self._table, len(sink)
        token = table.reader_begins()
        try:
            _, record = table.cached(chunk)
            if record is None or record.block in table.redo:
                return None
            grain, stop = grain_of(record.length), offset + length
            if offset % grain or stop > record.length or not length:
                return None
            if stop % grain and stop != record.length:
                return None
            if self._files.read_cached_into(record.block, offset, sink) != length:
                return None
        finally:
            table.reader_ends(token)
        found = crc32c_blocks(sink, grain)
        first = offset // grain * CHECKSUM_BYTES
        if found != record.checksums[first : first + len(found)]:
            return None
        return ReadOutcome(length, record.version)

    def _read(
        self, chunk: ChunkId, version: int, offset: int, sink: memoryview, *, cached: bool
    ) -> ReadOutcome | None:
        token = self._table.reader_begins()
        try:
            for _ in range(_TRIES_UNLOCKED):
                known, record = self._table.cached(chunk)
                if not known:
                    if cached:
                        return None
                    record = self._table.record(chunk)
                state, outcome = self._read_once(chunk, record, version, offset, sink, cached)
                if state != Outcome.REFUTED:
                    return outcome
            if cached:
                return None  # settle it in a thread
            # Nothing is committed or written in place while we hold the lock.
            with self._table.lock:
                record = self._table.record(chunk)
                state, outcome = self._read_once(chunk, record, version, offset, sink, cached)
        finally:
            self._table.reader_ends(token)
        if state == Outcome.REFUTED:
            self.damaged.add(chunk)
            raise EmberfsError(
                Code.CHECKSUM, f"chunk {chunk.hex()} is damaged on disk; read another replica"
            )
        return outcome

    def _read_once(
        self,
        chunk: ChunkId,
        record: ChunkRecord | None,
        version: int,
        offset: int,
        sink: memoryview,
        cached: bool,
    ) -> tuple[Outcome, ReadOutcome | None]:
        view = self._table.view(chunk, version, record)
        if view is None:
            return Outcome.DONE, ReadOutcome(0, 0)
        length = len(sink)
        if offset + length > view.length:
            length = max(0, view.length - offset)
            sink = sink[:length]
        if not length:
            return Outcome.DONE, ReadOutcome(0, view.version)
        state = read_view(self._files, view, offset, sink, cached=cached)
        outcome = ReadOutcome(length, view.version) if state == Outcome.DONE else None
        return state, outcome

    def read_damaged(self, chunk: ChunkId, *, version: int, sink: memoryview) -> bytes:
        """Fill `sink` with a whole version whatever its checksums say, and return those. [T]

        For the last copy of a damaged chunk: what is good of it is not lost. Raises VERSION_GAP,
        DISK.
        """
        table = self._table
        token = table.reader_begins()
        try:
            with table.lock:  # nothing is written in place meanwhile
                view = table.view(chunk, version, table.record(chunk))
                if view is None or view.length != len(sink):
                    raise EmberfsError(Code.VERSION_GAP, f"version {version} has gone")
                read_unverified(self._files, view, sink)
                return view.checksums
        finally:
            table.reader_ends(token)

    # ------------------------------------------------------------ upkeep

    def flush(self) -> None:
        """Make everything committed so far stable. [T] Raises DISK, and from then on always."""
        try:
            self._flusher.flush()
        except EmberfsError:
            self._mark_distrusted()
            raise

    def _mark_distrusted(self) -> None:
        """Tell whoever opens this next, also another process, that a sync has failed."""
        if self._distrusted or self._closed:
            return
        self._distrusted = True
        try:
            self._write_format(clean=False, boot_id=_NO_BOOT)
        except OSError as problem:
            log.error("%s: cannot note that a sync failed: %s", self._path, problem)

    def list(
        self,
        start: bytes,
        stop: bytes,
        limit: int,
        verify: bool = False,
        tombstones: bool = False,
    ) -> tuple[list[ChunkRow], bytes]:
        """Return up to `limit` chunks of [start, stop) in order, and where to go on. [T]

        b"" as `start` or `stop` is open; b"" as the continuation is the end. `verify` reads all
        data and marks what is damaged. `tombstones`: up to as many absent chunks with their
        writers, too. Raises DISK.
        """
        graves: dict[ChunkId, tuple[RememberedWrite, ...]] = {}
        bound = stop
        with self._table.lock:
            if tombstones:
                graves, bound = self._table.tombstones.page(start, stop, limit)
            found = self._table.store.scan(*record_range(start, bound), limit=limit)
            full = bool(limit) and len(found) == limit
            bound = chunk_of_key(found[-1][0]) + b"\0" if full else bound
            pending = {
                chunk: waiting.record.version
                for chunk, waiting in self._table.pending.items()
                if start <= chunk and (not bound or chunk < bound)
            }
        rows = [self._row(decode_record(key, value), chunk_of_key(key), pending, verify)
                for key, value in found]  # fmt: skip
        present = {row.chunk for row in rows}
        rows += [ChunkRow(chunk, 0, pending.pop(chunk, 0), 0, 0, remembered=writers)
                 for chunk, writers in graves.items()
                 if chunk not in present and (not bound or chunk < bound)]  # fmt: skip
        rows += [ChunkRow(chunk, 0, version, 0, 0) for chunk, version in pending.items()]
        rows.sort(key=lambda row: row.chunk)
        return rows, bound if bound != stop or full else b""

    def _row(
        self, record: ChunkRecord, chunk: ChunkId, pending: dict[ChunkId, int], verify: bool
    ) -> ChunkRow:
        """Describe a chunk, taking its pending version out of `pending`."""
        damaged = chunk in self.damaged or (verify and not self.verify(chunk))
        return ChunkRow(
            chunk, record.version, pending.pop(chunk, 0), record.length, digest_of(record), damaged
        )

    def verify(self, chunk: ChunkId, *, from_disk: bool = False) -> bool:
        """Read the committed version and compare its checksums; a mismatch is remembered. [T]

        `from_disk`: not from the page cache, as far as what is there has been written back.
        """
        token = self._table.reader_begins()
        try:
            for attempt in range(_TRIES_UNLOCKED + 1):
                with self._table.lock:
                    record = self._table.record(chunk)
                    if record is None:
                        return True
                    view = self._table.view_of(record)
                    if attempt == _TRIES_UNLOCKED:
                        break
                if self._verifies(view, from_disk=from_disk):
                    return True
            with self._table.lock:
                record = self._table.record(chunk)
                if record is None or view_verifies(self._files, self._table.view_of(record)):
                    return True
        finally:
            self._table.reader_ends(token)
        self.damaged.add(chunk)
        return False

    def _verifies(self, view: View, *, from_disk: bool) -> bool:
        if not from_disk or not view.length:
            return view_verifies(self._files, view)
        # What nobody keeps in memory is not left there by us either.
        warm = self._files.is_cached(view.block)
        self._files.drop_cached(view.block, view.length)
        found = view_verifies(self._files, view)
        if not warm:
            self._files.drop_cached(view.block, view.length)
        return found

    def check(self) -> FsckAnswer:
        """Compare bitmaps with records: findings in words, none when all is sound. [T]"""
        return self._leaks.check().answer()

    def free_leaked(self, leak: Leak) -> None:
        """Free blocks that a check found to have no owner. [T] STALE if that has changed."""
        self._leaks.free(leak)


def _pending_state(pending: Pending) -> PendingState:
    record = pending.record
    return PendingState(
        record.version, record.kind, record.length, record.remembered, record.removes
    )


def _lock(env: Env, path: str) -> Callable[[], None]:
    try:
        env.disk.make_directory(path)
        return env.disk.lock(f"{path}/lock")
    except BlockingIOError:
        raise EmberfsError(
            Code.CONFIG, f"{path} is used by another process; stop that one first"
        ) from None
    except OSError as problem:
        raise disk_error(problem, f"opening {path}") from None


def _read_format(env: Env, path: str) -> _Format | None:
    try:
        found = msgspec.json.decode(env.disk.read_small(f"{path}/format"), type=_Format)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as problem:
        raise EmberfsError(
            Code.CONFIG,
            f"{path}/format is not of a chunk store ({problem}); use another directory",
        ) from None
    if found.version != FORMAT_VERSION:
        raise EmberfsError(
            Code.CONFIG, f"{path} has format {found.version}, this program knows {FORMAT_VERSION}"
        )
    return found
