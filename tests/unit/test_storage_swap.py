"""A pending version and the one that replaces it: at every instant one of them is there."""

import pytest

from emberfs.proto.ids import InodeId, KiB, MiB, pack_chunk_id
from emberfs.proto.storage_calls import UpdateKind
from emberfs.storage.chunks import ChunkStore
from emberfs.storage.table import PENDING
from unit.chunk_faults import Crash, FakeEnv

CHUNK = pack_chunk_id(InodeId(5), 0)
WRITE, TRUNCATE, REMOVE, REPLACE = UpdateKind
BASE = b"b" * 10_000
# kind, offset, length, letter of the data, and the content that comes of it
Change = tuple[UpdateKind, int, int, bytes, bytes]
CHANGES: dict[str, Change] = {
    "append": (WRITE, 10_000, 6000, b"x", BASE + b"x" * 6000),
    "longer append": (WRITE, 10_000, 9000, b"y", BASE + b"y" * 9000),
    "gap": (WRITE, 12_000, 100, b"y", BASE + bytes(2000) + b"y" * 100),
    "redo": (WRITE, 4096, 1000, b"y", BASE[:4096] + b"y" * 1000 + BASE[5096:]),
    "redo and append": (WRITE, 9000, 2000, b"z", BASE[:9000] + b"z" * 2000),
    "copy": (WRITE, 0, 9000, b"z", b"z" * 9000 + BASE[9000:]),
    "cut": (TRUNCATE, 0, 5000, b"", BASE[:5000]),
    "extension": (TRUNCATE, 0, 15_000, b"", BASE + bytes(5000)),
    "replacement": (REPLACE, 0, 7000, b"r", b"r" * 7000),
}


def prepare(store: ChunkStore, change: Change, *, commit: bool = False) -> None:
    kind, offset, length, letter, _ = change
    call = store.prepare_and_commit if commit else store.prepare
    call(
        CHUNK, kind, version=2, offset=offset, length=length,
        data=memoryview(letter * length) if letter else None, chunk_bytes=MiB, remembered=(),
    )  # fmt: skip


def look(store: ChunkStore, version: int) -> bytes:
    sink = memoryview(bytearray(64 * KiB))
    found = store.read_into(CHUNK, version=version, offset=0, length=len(sink), sink=sink)
    return bytes(sink[: found.length])


def fresh(env: FakeEnv, first: str) -> ChunkStore:
    """A chunk with version 1 committed and `first` pending as version 2."""
    store = env.open()
    store.prepare_and_commit(
        CHUNK, WRITE, version=1, offset=0, length=len(BASE), data=memoryview(BASE),
        chunk_bytes=MiB, remembered=(),
    )  # fmt: skip
    store.flush()  # no kept version stands behind the end, so that an append goes in place
    prepare(store, CHANGES[first])
    return store


def dies(env: FakeEnv, store: ChunkStore, after: int, second: str, *, commit: bool) -> bool:
    env.fuse.crash_at = env.fuse.count + after
    try:
        prepare(store, CHANGES[second], commit=commit)
    except Crash:
        return True
    finally:
        env.fuse.crash_at = -1
    return False


@pytest.mark.parametrize("commit", [False, True])
@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_death_in_between_leaves_the_old_or_the_new_version(
    first: str, second: str, commit: bool
) -> None:
    """BUG_DISCARD_FIRST: what the tail has committed and shown was in no store of the others."""
    old, new = CHANGES[first][4], CHANGES[second][4]
    for after in range(1, 10):
        env = FakeEnv(after)
        dead = dies(env, fresh(env, first), after, second, commit=commit)
        store = env.open()
        state = store.state(CHUNK)
        assert state is not None
        if state.pending is None:  # the new version is committed
            assert commit
            assert look(store, 0) == new
        else:
            assert look(store, 0) == BASE
            assert look(store, PENDING) in ((old, new) if dead and not commit else
                                            (old,) if dead else (new,))  # fmt: skip
        store.flush()
        assert store.check().findings == ()
        if not dead:
            return
    raise AssertionError("it has more steps than were tried")


@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_a_failed_replacement_leaves_what_was_pending(first: str, second: str) -> None:
    env = FakeEnv(1)
    store = fresh(env, first)
    env.fuse.error_at = env.fuse.count + 1  # the disk is full, or the row store
    try:
        prepare(store, CHANGES[second])
    except Exception:
        assert look(store, PENDING) == CHANGES[first][4]
    store.discard(CHUNK)
    assert look(store, 0) == BASE
    store.flush()
    assert store.check().findings == ()


def test_what_gave_way_is_free_after_a_flush() -> None:
    env = FakeEnv(1)
    store = fresh(env, "replacement")
    for _ in range(3):
        prepare(store, CHANGES["replacement"])
    store.flush()
    assert store.used_bytes == 2 * 64 * KiB  # the committed version and the pending one
    store.commit(CHUNK, 2)
    store.flush()
    assert store.used_bytes == 64 * KiB
