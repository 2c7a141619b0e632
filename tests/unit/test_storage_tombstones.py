"""What is left of removed chunks: with the removal, over restarts and power cuts, within bounds."""

from collections.abc import Callable

import pytest

from emberfs.kv.memory import MemoryStore
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, ChunkId, InodeId, pack_chunk_id
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind
from emberfs.storage import tombstones
from emberfs.storage.chunks import ChunkStore
from emberfs.storage.records import TombstoneRecord, encode, tombstone_key
from emberfs.storage.tombstones import DROPS_MAX, KEPT_MS, Tombstones
from unit.chunk_faults import Crash, FakeEnv

WRITE, REMOVE, REPLACE = UpdateKind.WRITE, UpdateKind.REMOVE, UpdateKind.REPLACE
Writers = tuple[RememberedWrite, ...]


def chunk_of(number: int) -> ChunkId:
    return pack_chunk_id(InodeId(5), number)


def mark(client: int, sequence: int = 1) -> RememberedWrite:
    return RememberedWrite(client, 1, sequence, 1)


def put(
    store: ChunkStore, chunk: ChunkId, *writers: RememberedWrite, kind: UpdateKind = WRITE
) -> None:
    state = store.state(chunk)
    data = memoryview(b"x" * 5000) if kind == WRITE else None
    store.prepare_and_commit(
        chunk, kind, version=(state.version if state else 0) + 1, offset=0,
        length=len(data or b""), data=data, chunk_bytes=1 << 20, remembered=writers,
        replace_exists=kind != REPLACE,
    )  # fmt: skip


def removed(store: ChunkStore, chunk: ChunkId) -> None:
    put(store, chunk, mark(1))
    put(store, chunk, mark(2), mark(1), kind=REMOVE)


class Rows:
    """Tombstones over a row store, with a clock that the test moves."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.open()

    def open(self) -> None:
        self.now_ms = 5  # a monotonic clock begins anywhere
        self.found = Tombstones(self.store, lambda: self.now_ms * MS)
        self.found.load()

    def bury(self, number: int, *writers: RememberedWrite) -> int:
        """Remove a chunk; return how many other rows went."""
        burial = self.found.bury(chunk_of(number), writers)
        assert burial is not None
        self.store.write(burial.changes)
        self.found.buried(burial)
        return len(burial.dropped)

    def of(self, number: int) -> Writers:
        return self.found.of(chunk_of(number))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(tombstones, "TOMBSTONES_MAX", 10)
    return 10


# ---------------------------------------------------------------- with the removal


@pytest.mark.parametrize("kind", [REMOVE, REPLACE])
def test_c10_a_removed_chunk_is_remembered_over_a_restart(kind: UpdateKind) -> None:
    """A removal, by a client or by a recovery, keeps who wrote the chunk; a restart too."""
    env, chunk = FakeEnv(1), chunk_of(1)
    store = env.open()
    put(store, chunk, mark(1))
    put(store, chunk, mark(2), mark(1), kind=kind)
    for _ in range(2):
        assert store.state(chunk) is None
        assert store.tombstone(chunk) == (mark(2), mark(1))
        assert store.check().findings == ()
        store = env.open()


def test_c10_a_pending_removal_is_remembered_when_it_is_committed() -> None:
    """Not before: what is pending may be dropped."""
    store, chunk = FakeEnv(1).open(), chunk_of(1)
    put(store, chunk, mark(1))
    store.prepare(
        chunk, REMOVE, version=2, offset=0, length=0, data=None, chunk_bytes=1 << 20,
        remembered=(mark(2), mark(1)),
    )  # fmt: skip
    assert store.tombstone(chunk) == ()
    store.commit(chunk, 2)
    assert store.tombstone(chunk) == (mark(2), mark(1))


def test_r7_an_absence_from_elsewhere_does_not_answer_for_what_it_takes_away() -> None:
    """A write that the chain has lost is not among its writers: its retry must be done."""
    store, known, unknown = FakeEnv(1).open(), chunk_of(1), chunk_of(2)
    for chunk, writers in ((known, (mark(2),)), (unknown, ())):
        put(store, chunk, mark(1))
        put(store, chunk, *writers, kind=REPLACE)
        assert store.state(chunk) is None
        assert store.tombstone(chunk) == writers


def test_c10_r12_death_at_any_step_leaves_the_chunk_or_who_wrote_it() -> None:
    """Never neither: a removal and its memory are one batch."""
    for power_cut in (False, True):
        for step in range(1, 12):
            env, chunk = FakeEnv(step), chunk_of(1)
            store = env.open()
            put(store, chunk, mark(1))
            store.flush()
            env.fuse.crash_at = env.fuse.count + step
            try:
                put(store, chunk, mark(2), mark(1), kind=REMOVE)
                put(store, chunk, mark(3), mark(2), mark(1))
                put(store, chunk, mark(4), mark(3), mark(2), mark(1), kind=REMOVE)
                store.flush()
            except Crash:
                pass
            env.fuse.crash_at = -1
            if power_cut:
                env.power_cut()
            store = env.open()
            state = store.state(chunk)
            known = state.remembered if state is not None else store.tombstone(chunk)
            assert mark(1) in known
            assert store.check().findings == ()


def test_c10_r12_a_power_cut_that_takes_a_new_chunk_back_leaves_its_tombstone() -> None:
    """The data of the chunk that was made anew is lost: who wrote the one before is known."""
    lost = 0
    for seed in range(40):
        env, chunk = FakeEnv(seed), chunk_of(1)
        store = env.open()
        removed(store, chunk)
        store.flush()
        put(store, chunk, mark(3), mark(2), mark(1))
        env.power_cut()
        store = env.open()
        if store.state(chunk) is None:
            lost += 1
            assert store.tombstone(chunk) == (mark(2), mark(1))
    assert lost


def test_s11_a_removal_without_room_changes_nothing() -> None:
    """A full disk leaves the chunk, and nothing is remembered of a removal that was not done."""
    env, chunk = FakeEnv(1), chunk_of(1)
    store = env.open()
    put(store, chunk, mark(1))
    env.fuse.error_at = env.fuse.count + 1
    with pytest.raises(EmberfsError) as failure:
        put(store, chunk, mark(2), mark(1), kind=REMOVE)
    assert failure.value.code == Code.NO_SPACE
    assert store.state(chunk) is not None
    assert store.tombstone(chunk) == ()
    put(store, chunk, mark(2), mark(1), kind=REMOVE)
    assert store.tombstone(chunk) == (mark(2), mark(1))


def test_what_was_known_before_stays_behind_what_is_new() -> None:
    """Of each writer the newest; a removal that knows of nobody changes nothing."""
    rows = Rows()
    rows.bury(1, mark(1, 5), mark(2))
    rows.bury(1, mark(3), mark(1, 7))
    assert rows.of(1) == (mark(3), mark(1, 7), mark(2))
    rows.bury(1, mark(4), mark(1, 6))  # of a chunk that a power cut has taken back
    assert rows.of(1) == (mark(4), mark(1, 7), mark(3), mark(2))
    assert rows.found.bury(chunk_of(2), ()) is None
    assert rows.of(2) == ()


# ---------------------------------------------------------------- bounds


def test_o9_o22_the_oldest_go_when_there_are_too_many(few: int) -> None:
    """Each removal takes along as many as it must, and never more than it may."""
    rows = Rows()
    for number in range(few + 5):
        assert rows.bury(number, mark(1)) == (number >= few)
    assert len(rows.found) == few
    assert [bool(rows.of(number)) for number in (0, 4, 5, few + 4)] == [False, False, True, True]
    rows.bury(5, mark(2))  # the newest now
    assert len(rows.found) == few
    rows.bury(100, mark(1))
    assert (rows.of(5), rows.of(6)) == ((mark(2), mark(1)), ())


def test_more_than_allowed_are_found_and_go_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A store that an earlier program has filled with more rows than this one keeps."""
    rows = Rows()
    for number in range(30):
        rows.bury(number, mark(1))
    monkeypatch.setattr(tombstones, "TOMBSTONES_MAX", 10)
    rows.open()
    assert [rows.bury(100 + n, mark(1)) for n in range(9)] == [DROPS_MAX] * 6 + [3, 1, 1]
    assert len(rows.found) == 10


def test_o22_they_live_for_an_hour_of_work() -> None:
    """The clock stands still while the store is closed: no row may seem older than it is."""
    rows = Rows()
    rows.bury(1, mark(1))
    rows.now_ms += KEPT_MS - 10
    rows.bury(2, mark(1))
    rows.open()
    assert rows.bury(3, mark(1)) == 0
    rows.now_ms += 11
    assert set(rows.found.page(b"", b"", 0)[0]) == {chunk_of(2), chunk_of(3)}
    assert rows.of(1)  # it does no harm until it is dropped
    assert rows.bury(4, mark(1)) == 1
    assert rows.of(1) == ()
    assert rows.of(2)


def test_r14_a_damaged_row_is_one_clear_error() -> None:
    """Whoever opens the store is told what to do."""
    for value in (b"", b"garbage", encode(TombstoneRecord(-1, ()))):
        rows = Rows()
        rows.store.write([(tombstone_key(chunk_of(1)), value)])
        with pytest.raises(EmberfsError, match="move this target") as failure:
            rows.open()
        assert failure.value.code == Code.DISK


# ---------------------------------------------------------------- inventories


def pages(listed: Callable[[bytes], tuple[list, bytes]]) -> list:
    """All rows, page by page."""
    found: list = []
    start = b""
    while True:
        rows, start = listed(start)
        found += rows
        if not start:
            return found


def test_an_inventory_tells_of_absent_chunks_when_asked() -> None:
    """In order with all others, in pages of any size, each once."""
    store = FakeEnv(1).open()
    for number in range(12):
        removed(store, chunk_of(number))
    for number in (0, 3, 4, 11):
        put(store, chunk_of(number), mark(3), mark(2), mark(1))
    store.prepare(
        chunk_of(5), WRITE, version=1, offset=0, length=1, data=memoryview(b"x"),
        chunk_bytes=1 << 20, remembered=(mark(4), mark(2), mark(1)),
    )  # fmt: skip
    whole, more = store.list(b"", b"", 0, tombstones=True)
    assert not more
    assert [row.chunk for row in whole] == [chunk_of(number) for number in range(12)]
    for number, row in enumerate(whole):
        present = number in (0, 3, 4, 11)
        assert row.version == present
        assert row.pending == (number == 5)
        assert row.remembered == (() if present else (mark(2), mark(1)))
    for limit in (1, 2, 3, 5, 12, 100):
        assert pages(lambda at, n=limit: store.list(at, b"", n, tombstones=True)) == whole
    listed = pages(lambda at: store.list(at, b"", 2))
    assert [row.chunk for row in listed] == [chunk_of(n) for n in (0, 3, 4, 5, 11)]
    part, _ = store.list(chunk_of(1), chunk_of(4), 0, tombstones=True)
    assert part == whole[1:4]


def test_no_page_is_longer_than_twice_its_limit() -> None:
    """However many chunks were removed: an answer has a bound."""
    store = FakeEnv(1).open()
    for number in range(60):
        removed(store, chunk_of(number))
    rows, more = store.list(b"", b"", 7, tombstones=True)
    assert len(rows) == 7
    assert more == chunk_of(6) + b"\0"
