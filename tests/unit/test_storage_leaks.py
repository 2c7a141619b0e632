"""Blocks that are marked and that nothing names: found, and freed while the store is at work."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from emberfs.kv.memory import MemoryStore
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import InodeId, KiB, MiB, pack_chunk_id
from emberfs.proto.storage_calls import Leak, UpdateKind
from emberfs.storage.allocator import pack_position
from emberfs.storage.chunks import ChunkStore
from emberfs.storage.records import group_key, redo_key
from unit.chunk_faults import Crash, FakeEnv, World

CHUNK = pack_chunk_id(InodeId(5), 0)
LEAKED = (200, 201, 250)  # of group 0 of the smallest class
THREE = Leak(64 * KiB, 3)


def plant(store: MemoryStore, *indexes: int) -> None:
    """Mark blocks of the first group of the smallest class."""
    key = group_key(0, 0)
    bits = int.from_bytes(store.get(key) or b"", "little")
    for index in indexes:
        bits |= 1 << index
    store.write([(key, bits.to_bytes(32, "little"))])


def put(store: ChunkStore, index: int, *, commit: bool = True) -> None:
    chunk = pack_chunk_id(InodeId(5), index)
    state = store.state(chunk)
    call = store.prepare_and_commit if commit else store.prepare
    call(
        chunk, UpdateKind.WRITE, version=(state.version if state else 0) + 1, offset=0,
        length=3, data=memoryview(b"abc"), chunk_bytes=MiB, remembered=(),
    )  # fmt: skip


@contextmanager
def damaged(env: FakeEnv) -> Iterator[ChunkStore]:
    """A store with committed, kept and pending versions and three blocks that nobody owns."""
    store = env.open()
    for index in range(3):
        put(store, index)
    store.flush()
    put(store, 0)  # keeps version 1 until the next flush
    put(store, 3, commit=False)
    store.close()
    plant(env.store, *LEAKED)
    store = env.open()
    yield store
    store.close()


def test_leaked_blocks_are_freed_and_used_again() -> None:
    env = FakeEnv(1)
    with damaged(env) as store:
        before = store.used_bytes
        found = store.check()
        assert found.leaks == (THREE,)
        assert found.findings == (THREE.in_words(),)
        store.free_leaked(THREE)
        assert store.check().findings == ()
        assert store.used_bytes == before  # not before it is stable
        store.flush()
        assert store.used_bytes <= before - 3 * 64 * KiB
        for index in range(4, 300):  # every block there is
            put(store, index)
        assert store.check().findings == ()
        assert store.state(CHUNK) is not None
    assert env.open().check().findings == ()


@pytest.mark.parametrize("leak", [Leak(64 * KiB, 2), Leak(64 * KiB, 4), Leak(128 * KiB, 3)])
def test_nothing_is_freed_on_other_evidence(leak: Leak) -> None:
    with damaged(FakeEnv(1)) as store:
        with pytest.raises(EmberfsError) as caught:
            store.free_leaked(leak)
        assert caught.value.code == Code.STALE
        assert store.check().leaks == (THREE,)
        store.free_leaked(THREE)
        with pytest.raises(EmberfsError):  # a second time, as after a lost answer
            store.free_leaked(THREE)


def test_a_block_that_a_redo_row_names_is_not_freed() -> None:
    env = FakeEnv(1)
    with damaged(env) as store:
        block = pack_position(0, 0, LEAKED[0])
        env.store.write([(redo_key(CHUNK, block, 1), b"")])
        found = store.check()
        assert found.leaks == (Leak(64 * KiB, 2),)
        assert any("belongs to no block" in text for text in found.findings)
        store.free_leaked(Leak(64 * KiB, 2))
        env.store.write([(redo_key(CHUNK, block, 1), None)])
        assert store.check().leaks == (Leak(64 * KiB, 1),)


@pytest.mark.parametrize("power_cut", [False, True])
def test_death_in_between_frees_all_or_nothing(power_cut: bool) -> None:
    for after in range(1, 8):
        env = FakeEnv(after)
        with damaged(env) as store:
            env.fuse.crash_at = env.fuse.count + after
            try:
                store.free_leaked(THREE)
                store.flush()
            except Crash:
                pass
            env.fuse.crash_at = -1
            if power_cut:
                env.power_cut()
            again = env.open()
            assert again.check().leaks in ((), (THREE,))
            assert len(again.pending_chunks()) <= 1


def test_freeing_while_everything_moves_takes_no_block_that_is_in_use() -> None:
    """A random life goes on in another thread; its content is compared with its model."""
    env = FakeEnv(3)
    world = World(env)
    world.run(10)
    world.store.close()
    stop = threading.Event()
    problems: list[BaseException] = []
    world.store = env.open()

    def repair() -> None:
        dice = random.Random(1)
        while not stop.is_set():
            try:
                for leak in world.store.check().leaks:
                    world.store.free_leaked(leak)
                world.store.free_leaked(Leak(64 * KiB, dice.randint(0, 1)))
            except EmberfsError as problem:
                if problem.code != Code.STALE:
                    problems.append(problem)
            except BaseException as problem:
                problems.append(problem)
                return

    thread = threading.Thread(target=repair)
    thread.start()
    try:
        for _ in range(20):
            world.run(20)
            world.compare()
    finally:
        stop.set()
        thread.join(20)
    assert problems == []
    world.store.close()
