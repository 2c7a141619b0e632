"""What is special about PostgreSQL: connections, and how many transactions it is given."""

import asyncio
import random
from contextlib import suppress
from pathlib import Path

import pytest

from emberfs.kv.postgres import PostgresBackend
from emberfs.kv.postgres_pool import CONNECTIONS_MAX, Window
from emberfs.kv.remote import RemoteEngine
from emberfs.kv.transaction import Transaction, pack_counter, unpack_counter
from unit.kv_engines import make_place, read_all


def test_it_shrinks_with_conflicts_and_grows_with_success() -> None:
    async def main() -> None:
        window, inside, most = Window(8), 0, 0

        async def one(*, conflict: bool) -> None:
            nonlocal inside, most
            await window.enter()
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1
            window.leave(conflict=conflict)

        await asyncio.gather(*(one(conflict=False) for _ in range(50)))
        assert most == 8
        await asyncio.gather(*(one(conflict=True) for _ in range(50)))
        most = 0
        await asyncio.gather(*(one(conflict=True) for _ in range(20)))
        assert most == 1  # never none
        for _ in range(1000):
            await one(conflict=False)
        most = 0
        await asyncio.gather(*(one(conflict=False) for _ in range(50)))
        assert most == 8
        assert inside == 0

    asyncio.run(main())


def test_who_is_cancelled_passes_its_turn_on() -> None:
    async def main() -> None:
        window = Window(1)
        await window.enter()
        waiting = [asyncio.ensure_future(window.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        window.leave(conflict=False)
        waiting[1].cancel()  # it was just woken, or not yet: the third one must get in
        await asyncio.wait_for(waiting[2], 1)
        window.leave(conflict=False)

    asyncio.run(main())


def test_cancelled_transactions_leave_no_connection_and_no_half_effect(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place, dice = make_place("postgres", request, tmp_path), random.Random(1)

    async def main() -> None:
        engine = await place.open()
        assert isinstance(engine, RemoteEngine)
        assert isinstance(engine.backend, PostgresBackend)

        async def both(txn: Transaction) -> None:
            for key in (b"a", b"b"):
                txn.set(key, pack_counter(unpack_counter(await txn.get(key)) + 1))

        async def impatient() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(dice.random() * 0.05):
                    await engine.run(both)

        for _ in range(10):
            await asyncio.gather(*(impatient() for _ in range(4)))
        await engine.run(both)
        rows = await read_all(engine)
        assert rows[b"a"] == rows[b"b"]
        pool = engine.backend.pool
        await pool._tasks.drain()
        assert pool._gate._value == CONNECTIONS_MAX
        assert pool.window._inside == 0
        await engine.close()

    asyncio.run(main())
