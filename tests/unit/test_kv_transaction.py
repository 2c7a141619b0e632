"""Serializability of the transaction engine, the same on every store."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from emberfs.kv.memory import MemoryStore
from emberfs.kv.rocks import RocksStore
from emberfs.kv.store import OrderedStore
from emberfs.kv.transaction import Engine, Transaction, pack_counter, unpack_counter
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.real import RealEnv

END = b"\xff" * 8


@pytest.fixture(params=["memory", "rocks"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OrderedStore]:
    made = MemoryStore() if request.param == "memory" else RocksStore(str(tmp_path / "kv"))
    yield made
    made.close()


def live(store: OrderedStore, work: Callable[[Engine], Awaitable[None]], **options: int) -> None:
    async def main() -> None:
        engine = Engine(RealEnv(), store, **options)
        async with asyncio.timeout(10):
            await work(engine)
        await engine.sync()

    asyncio.run(main())


async def put(engine: Engine, **values: bytes) -> None:
    async def work(txn: Transaction) -> None:
        for key, value in values.items():
            txn.set(key.encode(), value)

    await engine.run(work)


async def refused(txn: Transaction) -> Code:
    with pytest.raises(EmberfsError) as raised:
        await txn.commit()
    return raised.value.code


def test_counter_by_read_modify_write(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        async def increment(txn: Transaction) -> None:
            value = unpack_counter(await txn.get(b"c"))
            await asyncio.sleep(0)  # let the others in: conflicts must happen
            txn.set(b"c", pack_counter(value + 1))

        async def many() -> None:
            for _ in range(10):
                await engine.run(increment)

        await asyncio.gather(*(many() for _ in range(5)))
        assert unpack_counter(store.get(b"c")) == 50
        assert engine.conflicts > 0

    live(store, work)


def test_atomic_adds_never_conflict(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        async def add(txn: Transaction) -> None:
            txn.add(b"c", 2)
            await asyncio.sleep(0)
            txn.add(b"c", -1)

        await asyncio.gather(*(engine.run(add) for _ in range(50)))
        assert unpack_counter(store.get(b"c")) == 50
        assert engine.conflicts == 0

    live(store, work)


def test_one_winner_creates_a_name(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        async def create(txn: Transaction) -> bool:
            taken = await txn.get(b"d/name") is not None
            await asyncio.sleep(0)
            if not taken:
                txn.set(b"d/name", b"1")
            return not taken

        won = await asyncio.gather(*(engine.run(create) for _ in range(8)))
        assert sum(won) == 1

    live(store, work)


def test_no_write_skew(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        await put(engine, x=b"1", y=b"1")
        first, second = engine.begin(), engine.begin()
        for txn, mine in ((first, b"x"), (second, b"y")):
            assert await txn.get_many([b"x", b"y"]) == [b"1", b"1"]
            txn.set(mine, b"0")
        await first.commit()
        assert await refused(second) == Code.CONFLICT

    live(store, work)


def test_no_phantom_when_a_range_was_found_empty(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        await put(engine, dir=b"alive")
        remove, create = engine.begin(), engine.begin()
        assert await remove.get_range(b"dir/", b"dir0", limit=1) == []
        remove.clear(b"dir")
        assert await create.get(b"dir") == b"alive"
        create.set(b"dir/f", b"1")
        await create.commit()
        assert await refused(remove) == Code.CONFLICT

    live(store, work)


@pytest.mark.parametrize("by", ["clear", "clear_range", "add", "write_conflict"])
def test_every_kind_of_write_is_seen_by_readers(store: OrderedStore, by: str) -> None:
    async def work(engine: Engine) -> None:
        await put(engine, s2=pack_counter(1))
        point, span, other = engine.begin(), engine.begin(), engine.begin()
        await point.get(b"s2")
        await span.get_range(b"s", b"t")
        await other.get(b"s3")
        await other.get_range(b"a", b"s2")
        writer = engine.begin()
        if by == "clear":
            writer.clear(b"s2")
        elif by == "clear_range":
            writer.clear_range(b"s1", b"s3")
        elif by == "add":
            writer.add(b"s2", 1)
        else:
            writer.add_write_conflict(b"s2", b"s2\0")
        await writer.commit()
        for txn in (point, span, other):
            txn.set(b"out", b"1")
        assert await refused(point) == Code.CONFLICT
        assert await refused(span) == Code.CONFLICT
        if by == "clear_range":
            other.cancel()  # it reads up to s2, which begins inside the cleared range
        else:
            await other.commit()

    live(store, work)


def test_range_conflict_ends_at_the_last_key_returned(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        await put(engine, k1=b"", k2=b"", k3=b"", k4=b"")
        forward, backward, hit = engine.begin(), engine.begin(), engine.begin()
        assert len(await forward.get_range(b"k", b"l", limit=2)) == 2
        assert len(await backward.get_range(b"k", b"l", limit=1, reverse=True)) == 1
        assert len(await hit.get_range(b"k", b"l", limit=3)) == 3
        await put(engine, k3=b"new")
        for txn in (forward, backward, hit):
            txn.set(b"out", b"1")
        await forward.commit()
        await backward.commit()
        assert await refused(hit) == Code.CONFLICT

    live(store, work)


def test_snapshot_reads_and_explicit_conflicts(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        await put(engine, a=b"1")
        free, bound = engine.begin(), engine.begin()
        for txn in (free, bound):
            await txn.get(b"a", snapshot=True)
            await txn.get_range(b"a", b"b", snapshot=True)
            txn.set(b"out", b"1")
        bound.add_read_conflict(b"a", b"a\0")
        await put(engine, a=b"2")
        assert await free.get(b"a", snapshot=True) == b"1"  # repeatable
        await free.commit()
        assert await refused(bound) == Code.CONFLICT

    live(store, work)


def test_own_writes_are_seen(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        seed = engine.begin()
        for i in range(10):
            seed.set(b"k%d" % i, b"old")
        seed.set(b"n", pack_counter(5))
        await seed.commit()
        txn = engine.begin()
        txn.clear_range(b"k2", b"k5")
        txn.set(b"k3", b"new")
        txn.clear(b"k6")
        txn.set(b"k55", b"new")
        txn.add(b"n", 2)
        txn.add(b"fresh", 1)
        assert await txn.get(b"k2") is None
        assert await txn.get_many([b"k3", b"k6", b"k7"]) == [b"new", None, b"old"]
        assert unpack_counter(await txn.get(b"n")) == 7
        names = [b"k0", b"k1", b"k3", b"k5", b"k55", b"k7", b"k8", b"k9"]
        assert [k for k, _ in await txn.get_range(b"k", b"l")] == names
        for limit in range(1, 9):
            rows = await txn.get_range(b"k", b"l", limit=limit)
            assert [k for k, _ in rows] == names[:limit]
            rows = await txn.get_range(b"k", b"l", limit=limit, reverse=True)
            assert [k for k, _ in rows] == names[::-1][:limit]
        counters = await txn.get_range(b"f", b"g")
        assert counters == [(b"fresh", pack_counter(1))]
        await txn.commit()
        assert [k for k, _ in store.scan(b"k", b"l")] == names
        assert unpack_counter(store.get(b"n")) == 7

    live(store, work)


def test_random_transactions_see_their_own_writes(store: OrderedStore) -> None:
    dice = random.Random(3)

    def key() -> bytes:
        return b"%02d" % dice.randrange(30)

    async def work(engine: Engine) -> None:
        model: dict[bytes, bytes] = {}
        for step in range(60):
            txn = engine.begin()
            for _ in range(8):
                act, low, high = dice.randrange(4), key(), key()
                if act == 0:
                    txn.set(low, b"%d" % step)
                    model[low] = b"%d" % step
                elif act == 1:
                    txn.clear(low)
                    model.pop(low, None)
                elif act == 2 and dice.random() < 0.3:
                    txn.clear_range(low, high)
                    for gone in [k for k in model if low <= k < high]:
                        del model[gone]
                limit, reverse = dice.randrange(5), dice.random() < 0.5
                expected = sorted(
                    ((k, v) for k, v in model.items() if low <= k < high), reverse=reverse
                )
                found = await txn.get_range(low, high, limit=limit, reverse=reverse)
                assert found == (expected[:limit] if limit else expected)
                assert await txn.get(high) == model.get(high)
            await txn.commit()
            assert store.scan(b"", END) == sorted(model.items())

    live(store, work)


def test_o5_bank_sum_is_constant_for_every_reader(store: OrderedStore) -> None:
    """In a storm of conflicting transactions every reader sees a consistent sum."""
    accounts, dice = 8, random.Random(1)

    async def work(engine: Engine) -> None:
        await put(engine, **{f"b{i}": pack_counter(100) for i in range(accounts)})

        async def transfer(txn: Transaction) -> None:
            source, sink = (b"b%d" % i for i in dice.sample(range(accounts), 2))
            amount = unpack_counter(await txn.get(source))
            await asyncio.sleep(0)
            txn.set(source, pack_counter(amount - 1))
            txn.set(sink, pack_counter(unpack_counter(await txn.get(sink)) + 1))

        async def total(txn: Transaction) -> int:
            left = await txn.get_range(b"b0", b"b4")
            await asyncio.sleep(0)
            right = await txn.get_range(b"b4", b"b9")
            return sum(unpack_counter(v) for _, v in left + right)

        async def mover() -> None:
            for _ in range(15):
                await engine.run(transfer)

        async def auditor() -> None:
            for _ in range(30):
                assert await engine.run(total, read_only=True) == accounts * 100

        await asyncio.gather(mover(), mover(), mover(), auditor())

    live(store, work)


def test_too_old_when_history_is_forgotten(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        old = engine.begin()
        await old.get(b"untouched")
        for i in range(20):
            await put(engine, **{f"k{i}": b"v"})
        old.set(b"out", b"1")
        assert await refused(old) == Code.TOO_OLD

    live(store, work, history_keys_max=10)


def test_o5_retries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that always conflicts is given up after a bounded number of tries."""
    monkeypatch.setattr("emberfs.kv.transaction.TRIES_MAX", 3)
    store, tries = MemoryStore(), []

    async def work(engine: Engine) -> None:
        async def loses(txn: Transaction) -> None:
            tries.append(await txn.get(b"a"))
            txn.set(b"b", b"")
            await put(engine, a=b"%d" % len(tries))

        with pytest.raises(EmberfsError) as raised:
            await engine.run(loses)
        assert raised.value.code == Code.CONFLICT

    live(store, work)
    assert tries == [None, b"1", b"2"]


def test_failures_leave_nothing_behind(store: OrderedStore) -> None:
    async def work(engine: Engine) -> None:
        async def fails(txn: Transaction) -> None:
            txn.set(b"a", b"1")
            raise EmberfsError(Code.NOT_FOUND, "no")

        async def writes(txn: Transaction) -> None:
            txn.set(b"a", b"1")

        with pytest.raises(EmberfsError, match="no"):
            await engine.run(fails)
        with pytest.raises(EmberfsError) as raised:
            await engine.run(writes, read_only=True)
        assert raised.value.code == Code.READ_ONLY
        assert store.get(b"a") is None

    live(store, work)


def test_too_large_a_transaction_is_refused() -> None:
    async def work(engine: Engine) -> None:
        txn = engine.begin()
        for i in range(17):
            txn.set(b"%d" % i, bytes(1 << 20))
        assert await refused(txn) == Code.TRANSACTION_TOO_LARGE

    live(MemoryStore(), work)


class SlowSync(MemoryStore):
    """Counts syncs, and notes what each of them made stable."""

    def __init__(self) -> None:
        super().__init__()
        self.stable: list[int] = []

    def sync(self) -> None:
        self.stable.append(len(self.scan(b"", END)))
        super().sync()


class SlowEnv(RealEnv):
    """Blocking work takes until `gate` opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def run_blocking(self, work):  # type: ignore[no-untyped-def, override]
        result = work()
        await self.gate.wait()
        return result


def test_callers_share_a_sync_that_began_after_their_commit() -> None:
    async def main() -> None:
        store, env = SlowSync(), SlowEnv()
        engine = Engine(env, store)

        async def write(i: int) -> None:
            async def work(txn: Transaction) -> None:
                txn.set(b"%02d" % i, b"")

            await engine.run(work, durable=True)
            assert store.stable[-1] >= i + 1

        first = asyncio.ensure_future(write(0))
        await asyncio.sleep(0.01)
        rest = [asyncio.ensure_future(write(i)) for i in range(1, 10)]
        await asyncio.sleep(0.01)
        assert not first.done()
        rest.pop().cancel()  # a cancelled waiter harms nobody
        env.gate.set()
        async with asyncio.timeout(5):
            await asyncio.gather(first, *rest)
        assert store.stable == [1, 10]
        await engine.sync()  # nothing new: no further sync
        assert len(store.stable) == 2
        await engine.close()

    asyncio.run(main())


def test_a_failed_sync_fails_every_waiter() -> None:
    async def main() -> None:
        store = MemoryStore()
        engine = Engine(RealEnv(), store)
        await put(engine, a=b"1")
        store.sync_error = EmberfsError(Code.DISK, "bad disk")
        outcomes = await asyncio.gather(*(engine.sync() for _ in range(3)), return_exceptions=True)
        assert [type(o) for o in outcomes] == [EmberfsError] * 3
        await engine.close()

    asyncio.run(main())


def test_default_commits_survive_the_process_and_durable_ones_the_power_cut() -> None:
    store = MemoryStore()

    async def main() -> None:
        engine = Engine(RealEnv(), store)
        await put(engine, a=b"1")

        async def durably(txn: Transaction) -> None:
            txn.set(b"b", b"1")

        await engine.run(durably, durable=True)
        await put(engine, c=b"1")

    asyncio.run(main())
    store.crash()
    assert [key for key, _ in store.scan(b"", END)] == [b"a", b"b"]
