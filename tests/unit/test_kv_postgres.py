"""How many transactions PostgreSQL is given at a time."""

import asyncio

from emberfs.kv.postgres_pool import Window


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
