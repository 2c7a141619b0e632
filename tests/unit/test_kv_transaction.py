"""The local engine: bounds of its history, retries, syncs (the rest: test_kv_engines.py)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from emberfs.kv.memory import MemoryStore
from emberfs.kv.rocks import RocksStore
from emberfs.kv.store import OrderedStore
from emberfs.kv.transaction import Engine, Transaction
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
