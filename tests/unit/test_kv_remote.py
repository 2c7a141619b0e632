"""Lost answers, outages and refusals: what an engine before a server makes of them."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from emberfs.kv import slots
from emberfs.kv.backend import AwayError
from emberfs.kv.history import ReadSet, WriteSet
from emberfs.kv.remote import RemoteEngine
from emberfs.kv.transaction import Transaction, pack_counter, unpack_counter
from emberfs.kv.turns import Turns
from emberfs.proto.errors import Code, EmberfsError
from kv_faulty import FaultyAttempt, FaultyBackend, faulty_engine
from unit.kv_engines import read_all


def live(engine: RemoteEngine, work: Callable[[RemoteEngine, FaultyBackend], Awaitable[None]]):
    async def main() -> None:
        async with asyncio.timeout(30):
            assert isinstance(engine.backend, FaultyBackend)
            await work(engine, engine.backend)
            await engine.close()

    asyncio.run(main())


async def append(engine: RemoteEngine, name: bytes) -> None:
    """Neither of these may happen twice: the work reads nothing that would show it."""

    async def work(txn: Transaction) -> None:
        txn.add(b"Ctimes", 1)
        txn.add(b"plain", 1)
        txn.stamp(b"s" + name)
        log = await txn.get(b"log") or b""
        txn.set(b"log", log + name + b" ")

    await engine.run(work)


@pytest.mark.parametrize("seed", range(4))
def test_every_transaction_happens_exactly_once(seed: int) -> None:
    async def work(engine: RemoteEngine, backend: FaultyBackend) -> None:
        await asyncio.gather(*(append(engine, b"%03d" % i) for i in range(80)))
        await asyncio.sleep(0.02)  # for what is late
        rows = await read_all(engine)
        assert unpack_counter(rows[b"Ctimes"]) == unpack_counter(rows[b"plain"]) == 80
        assert sorted(rows[b"log"].split()) == [b"%03d" % i for i in range(80)]
        for kind in ("maybe", "committed all the same", "conflict", "too old", "away"):
            assert backend.injected.get(kind), kind

    live(faulty_engine(0.2, seed), work)


def test_an_outage_is_waited_out() -> None:
    async def work(engine: RemoteEngine, backend: FaultyBackend) -> None:
        backend.down = True
        waiting = asyncio.ensure_future(append(engine, b"1"))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        backend.down = False
        await waiting
        assert (await read_all(engine))[b"log"] == b"1 "

    live(faulty_engine(0, patience_s=5), work)


def test_an_outage_without_end_is_told_and_leaves_nothing() -> None:
    async def work(engine: RemoteEngine, backend: FaultyBackend) -> None:
        await engine.open()
        backend.down = True
        with pytest.raises(AwayError):
            await append(engine, b"1")
        backend.down = False
        assert await read_all(engine) == {}

    live(faulty_engine(0, patience_s=0.1), work)


@pytest.mark.parametrize("committed", [False, True])
def test_an_answer_that_stays_lost_is_told_and_cleared_up_before_anything_else(
    committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[Callable[[], int]] = []

    async def lost(self: FaultyAttempt, read: ReadSet, written: WriteSet) -> int:
        self._backend.down = True
        monkeypatch.undo()
        if committed:
            self._apply(read, written)
        else:
            self._held = True  # the request hangs somewhere
            late.append(lambda: self._apply(read, written))
        raise EmberfsError(Code.MAYBE_COMMITTED, "lost")

    async def work(engine: RemoteEngine, backend: FaultyBackend) -> None:
        await engine.open()
        monkeypatch.setattr(FaultyAttempt, "commit", lost)
        with pytest.raises(EmberfsError) as raised:
            await append(engine, b"1")
        assert raised.value.code == Code.MAYBE_COMMITTED
        backend.down = False
        await append(engine, b"2")
        for arrive in late:  # behind the next transaction: refused
            with pytest.raises(EmberfsError):
                arrive()
        log = b"1 2 " if committed else b"2 "
        assert (await read_all(engine))[b"log"] == log
        assert not engine.slots.doubts

    live(faulty_engine(0, patience_s=0.1), work)


def test_a_commit_that_is_cancelled_takes_no_effect_later(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[Callable[[], int]] = []

    async def hangs(self: FaultyAttempt, read: ReadSet, written: WriteSet) -> int:
        monkeypatch.undo()
        self._held = True
        if not self._txn._viewing:
            self._txn._begin()
        arrived.append(lambda: self._apply(read, written))
        await asyncio.sleep(60)
        raise AssertionError

    async def work(engine: RemoteEngine, backend: FaultyBackend) -> None:
        await engine.open()
        monkeypatch.setattr(FaultyAttempt, "commit", hangs)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await append(engine, b"1")
        await append(engine, b"2")
        with pytest.raises(EmberfsError):
            arrived[0]()
        assert (await read_all(engine))[b"log"] == b"2 "

    live(faulty_engine(0), work)


def test_slots_are_as_many_as_transactions_at_a_time() -> None:
    async def work(engine: RemoteEngine, backend: FaultyBackend) -> None:
        for _ in range(5):
            await asyncio.gather(*(append(engine, b"%d" % i) for i in range(10)))
        rows = backend.engine._store.scan(*slots.SLOTS)
        assert len(rows) <= 10
        shares = backend.engine._store.scan(*slots.SHARES)
        assert {slots.counter_of(key) for key, _ in shares} == {b"Ctimes"}
        assert sum(unpack_counter(value) for _, value in shares) == 50

    live(faulty_engine(0), work)


def test_conflicts_on_one_row_are_few() -> None:
    async def work(engine: RemoteEngine, backend: FaultyBackend) -> None:
        async def increment(txn: Transaction) -> None:
            value = unpack_counter(await txn.get(b"hot"))
            txn.set(b"hot", pack_counter(value + 1))

        async def many() -> None:
            for _ in range(5):
                await engine.run(increment)

        await asyncio.gather(*(many() for _ in range(40)))
        assert (await read_all(engine))[b"hot"] == pack_counter(200)
        assert engine.conflicts < 400  # each would lose against all others, without turns

    live(faulty_engine(0), work)


def test_turns_exclude_each_other_and_leave_nothing() -> None:
    async def main() -> None:
        turns, inside, dice = Turns(), set(), random.Random(1)

        async def one() -> None:
            keys = {b"%d" % dice.randrange(4) for _ in range(2)}
            async with turns.take(keys):
                assert not keys & inside
                inside.update(keys)
                await asyncio.sleep(dice.random() / 1000)
                inside.difference_update(keys)

        async with asyncio.timeout(10):
            await asyncio.gather(*(one() for _ in range(50)))
        assert turns._locks == {}

    asyncio.run(main())
