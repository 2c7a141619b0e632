"""Rows of the fault list that need nothing but one module: the chunk store, the fabric, meta."""

import asyncio
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import uvloop

from emberfs.fabric.pool import PeerPool
from emberfs.kv import keys
from emberfs.kv.memory import MemoryStore
from emberfs.kv.transaction import Transaction
from emberfs.meta import files
from emberfs.mgmtd.events import Answer, ChainsRequested
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import (
    ROOT_INODE,
    SECOND,
    ChainId,
    InodeId,
    KiB,
    MiB,
    SessionId,
    TargetId,
    pack_chunk_id,
)
from emberfs.runtime.real import RealEnv
from emberfs.storage.allocator import GROUP_BYTES, class_for
from unit.chunk_faults import Crash, FakeEnv
from unit.fabric_conformance import ECHO, FILL, TRANSPORTS, Bench, bench
from unit.meta_world import ROOT, World, play
from unit.test_mgmtd_membership import World as Manager
from unit.test_mgmtd_membership import report, storage
from unit.test_storage_chunks import CHUNK, REMOVE, REPLACE, change, get, opened, put

# ---------------------------------------------------------------- the manager


def test_r13_the_order_of_a_chain_is_the_one_that_was_given() -> None:
    """The order of replicas in which a chain was made is published, stored, and kept."""
    world = Manager()
    for number in (1, 2, 3):
        world.register(storage(number), report(number * 100 + 1))
    order = (TargetId(301), TargetId(101), TargetId(201))
    assert isinstance(world.send(ChainsRequested(((ChainId(1), order),))), Answer)
    for manager in (world, world.restarted()):
        assert tuple(t.target for t in manager.now.chains[ChainId(1)].targets) == order


# ---------------------------------------------------------------- the chunk store


def test_s1_a_crash_anywhere_in_removal_and_reuse_gives_no_block_two_owners() -> None:
    """Death at every step of remove, flush and reuse: no block has two owners, none leaks."""
    ended = False
    for step in range(1, 200):
        env = FakeEnv(step)
        store = env.open()
        old, new = (pack_chunk_id(InodeId(1), n) for n in range(2))
        put(store, b"old" * 20_000, chunk=old)
        store.flush()
        env.fuse.crash_at = env.fuse.count + step
        try:
            change(store, REMOVE, chunk=old)
            put(store, b"new" * 20_000, chunk=new)
            store.flush()
            put(store, b"NEW" * 20_000, chunk=new)
            store.flush()
            ended = True
        except Crash:
            pass
        env.fuse.crash_at = -1
        if step % 2:
            env.power_cut()
        store = env.open()
        assert get(store, chunk=old) in (b"", b"old" * 20_000)
        assert get(store, chunk=new) in (b"", b"new" * 20_000, b"NEW" * 20_000)
        assert store.check().findings == ()
        for chunk in (old, new):
            change(store, REMOVE, chunk=chunk)
        store.flush()
        store.flush()
        assert store.used_bytes == 0, "a block leaks"
        if ended:
            break
    assert ended


def test_s2_s4_removals_race_with_rewrites_and_each_other(tmp_path: Path) -> None:
    """Removals in opposite order, rewrites and flushes at once: no deadlock, no revived chunk."""
    count = 40
    chunks = [pack_chunk_id(InodeId(2), number) for number in range(count)]
    locks = [threading.Lock() for _ in chunks]  # one update of a chunk at a time, as in the service
    problems: list[BaseException] = []
    with opened(tmp_path / "t") as store:

        def worker(order: list[int], seed: int) -> None:
            dice = random.Random(seed)
            try:
                for _ in range(3):
                    for number in order:
                        with locks[number]:
                            if dice.random() < 0.5:
                                put(store, dice.randbytes(9000), chunk=chunks[number])
                            else:
                                change(store, REMOVE, chunk=chunks[number])
                                assert get(store, chunk=chunks[number]) == b""
                        if dice.random() < 0.1:
                            store.flush()
            except BaseException as problem:
                problems.append(problem)

        up, down = list(range(count)), list(range(count))[::-1]
        threads = [
            threading.Thread(target=worker, args=(order, seed))
            for seed, order in enumerate((up, down, up, down))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "deadlock"
        assert not problems, problems
        assert store.check().findings == ()
        for chunk in chunks:
            change(store, REMOVE, chunk=chunk)
        store.flush()
        store.flush()
        assert store.used_bytes == 0
        assert not store.list(b"", b"", 1000)[0]


def test_s3_a_rewrite_with_the_same_bytes_is_a_new_version() -> None:
    """Identical content is a change like any other: its version, its block and its crash."""
    for step in range(1, 30):
        env = FakeEnv(step)
        store = env.open()
        put(store, b"same" * 5000)
        put(store, b"same" * 5000)
        state = store.state(CHUNK)
        assert state is not None
        assert state.version == 2
        store.flush()
        env.fuse.crash_at = env.fuse.count + step
        try:
            put(store, b"same" * 5000, kind=REPLACE, version=7)
            store.flush()
        except Crash:
            pass
        env.fuse.crash_at = -1
        env.power_cut()
        store = env.open()
        state = store.state(CHUNK)
        assert state is not None
        assert state.version in (2, 7)
        assert get(store) == b"same" * 5000
        assert store.check().findings == ()


def test_s5_what_was_removed_is_gone_for_every_way_of_reading(tmp_path: Path) -> None:
    """After a removal no way of reading shows the chunk, nor after a restart."""
    with opened(tmp_path / "t") as store:
        for number in range(20):
            put(store, b"x" * 5000, chunk=pack_chunk_id(InodeId(3), number))
        store.flush()
        for number in range(20):
            assert get(store, chunk=pack_chunk_id(InodeId(3), number))  # now it may be cached
            change(store, REMOVE, chunk=pack_chunk_id(InodeId(3), number))
        for _ in range(2):
            for number in range(20):
                chunk = pack_chunk_id(InodeId(3), number)
                sink = memoryview(bytearray(100))
                assert get(store, chunk=chunk) == b""
                quick = store.try_read_into(chunk, version=0, offset=0, length=100, sink=sink)
                assert quick is None or not quick.version
                assert store.state(chunk) is None
            assert not store.list(b"", b"", 1000)[0]
            store.flush()
    with opened(tmp_path / "t") as store:
        assert not store.list(b"", b"", 1000)[0]


def test_s7_numbers_beyond_four_billion() -> None:
    """Versions and inode numbers beyond 32 bits, and thousands of removals, are nothing special."""
    env = FakeEnv(1)
    store = env.open()
    high = pack_chunk_id(InodeId((1 << 62) + 5), (1 << 32) - 1)
    put(store, b"high" * 100, chunk=high, kind=REPLACE, version=(1 << 40) + 1)
    put(store, b"HIGH", chunk=high)
    state = store.state(high)
    assert state is not None
    assert state.version == (1 << 40) + 2
    for number in range(3000):
        put(store, b"s", chunk=pack_chunk_id(InodeId(4), number))
    store.flush()
    for number in range(3000):
        change(store, REMOVE, chunk=pack_chunk_id(InodeId(4), number))
    store.flush()
    rows, more = store.list(b"", b"", 1000)
    assert [(row.chunk, row.version) for row in rows] == [(high, (1 << 40) + 2)]
    assert not more
    store.close()
    store = env.open()
    assert get(store, chunk=high) == b"HIGH" + b"high" * 99
    assert store.check().findings == ()


def test_s10_space_freed_by_one_target_serves_another_on_the_same_disk() -> None:
    """Blocks of removed chunks go back to the file system, all but one group of each size."""
    env = FakeEnv(1)
    store = env.open()
    for number in range(60):
        put(store, b"a" * MiB, chunk=pack_chunk_id(InodeId(5), number))
    store.flush()

    def taken() -> int:
        return sum(any(f.data[at : at + 4096]) for f in env.disk.files.values()
                   for at in range(0, len(f.data), 64 * KiB))  # fmt: skip

    assert taken() >= 60 * 16
    for number in range(60):
        change(store, REMOVE, chunk=pack_chunk_id(InodeId(5), number))
    store.flush()
    store.flush()
    assert taken() * 64 * KiB <= GROUP_BYTES[class_for(MiB)]


# ---------------------------------------------------------------- the fabric


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_c8_nothing_depends_on_empty_messages_and_they_arrive(transport: str) -> None:
    """Empty bodies, empty sources and empty sinks, alone and mixed, arrive like any other."""

    async def scenario(b: Bench) -> None:
        empty = memoryview(bytearray())
        for _ in range(50):
            assert (await b.call(ECHO)).body == b""
            assert (await b.call(ECHO, b"", [empty, empty])).body == b""
            assert (await b.call(ECHO, b"x", [empty, memoryview(b"yz"), empty])).body == b"xyz"
            full = memoryview(bytearray(10))
            reply = await b.call(FILL, b"", sinks=[empty, full, empty])
            assert list(reply.filled) == [0, 10, 0]
            assert bytes(full) == b"\2" * 10

    async def live() -> None:
        async with asyncio.timeout(20), bench(transport) as b:
            await scenario(b)

    uvloop.run(live())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_c6_ten_thousand_calls_on_hundreds_of_connections_leak_nothing(transport: str) -> None:
    """Connections that come and go by the hundred leave no descriptor behind."""

    async def scenario(b: Bench) -> None:
        async def one_shot() -> None:
            pool = PeerPool(RealEnv())
            peer = await pool.get([b.endpoint])
            for _ in range(20):
                await peer.call(ECHO, b"x" * 100, timeout_ns=5 * SECOND)
            await pool.close()

        for _ in range(10):
            await one_shot()
        await asyncio.sleep(0.1)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            await asyncio.gather(*(one_shot() for _ in range(10)))
        for _ in range(200):
            if len(os.listdir("/proc/self/fd")) <= before:
                break
            await asyncio.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) <= before

    async def live() -> None:
        async with asyncio.timeout(30), bench(transport) as b:
            await scenario(b)

    uvloop.run(live())


# ---------------------------------------------------------------- the metadata


def test_c9_the_reply_of_an_open_create_is_lost() -> None:
    """The reply of an open-create is lost and the call repeated: one file, one session."""

    async def scene(w: World) -> None:
        request = calls.CreateRequest(
            ROOT, w.rid(), ROOT_INODE, b"f", 0o644, SessionId(1), write=True, exclusive=True
        )
        lost = await files.create(w.context, request)
        again = await files.create(w.context, request)
        assert again == lost
        assert await w.names() == [b"f"]
        assert len(w.rows(keys.Prefix.SESSION)) == 1
        await w.settle(lost.inode.id, session=1, close=True)
        late = await files.create(w.context, request)  # a copy that comes after the close
        assert late == lost
        assert w.rows(keys.Prefix.SESSION) == [], "a late copy opened a session for nobody"

    play(scene)


def test_o21_a_rename_is_there_for_the_next_call_of_anybody() -> None:
    """From the answer of a rename on, every lookup and listing of anybody shows it."""

    async def scene(w: World) -> None:
        for turn in range(30):
            new = await w.create(b"new", session=turn + 1)
            await w.settle(new.id, session=turn + 1, length=turn, close=True)
            await w.rename(b"new", b"last")
            assert (await w.lookup(b"last")).id == new.id
            assert (await w.lookup(b"last")).length == turn
            assert await w.names() == [b"last"]

    play(scene)


def test_o5_a_storm_on_one_name_ends_with_one_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty clients create one name at once: one wins, all are answered, in few tries."""
    get = Transaction.get

    async def slow_get(self: Transaction, *args: Any, **options: Any) -> bytes | None:
        await asyncio.sleep(0)  # lets the others in, as a remote store would
        return await get(self, *args, **options)

    monkeypatch.setattr(Transaction, "get", slow_get)

    async def scene(w: World) -> None:
        async def one(number: int) -> str:
            try:
                await w.create(b"f", exclusive=True, session=number + 1)
                return "created"
            except EmberfsError as problem:
                return problem.code.name

        outcomes = await asyncio.gather(*(one(number) for number in range(50)))
        assert outcomes.count("created") == 1
        assert set(outcomes) == {"created", Code.EXISTS.name}
        assert 0 < w.engine.conflicts < 50 * 20

    play(scene, MemoryStore())


def test_c6_o9_thousands_of_opens_and_closes_leave_no_record() -> None:
    """Thousands of opens and closes leave no session behind, and one reply per call at the most."""

    async def scene(w: World) -> None:
        f = await w.create(b"f")
        for number in range(2, 2000):
            await w.open_file(f.id, number, read=True, write=True)
            await w.settle(f.id, session=number, close=True)
        assert len(w.rows(keys.Prefix.SESSION)) == 1
        assert len(w.rows(keys.Prefix.REPLY)) <= 2 * 2000

    play(scene)
