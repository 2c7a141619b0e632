"""A ring on an event loop: the same batches, awaited."""

import asyncio
from collections.abc import Sequence
from typing import Self

from emberfs.client.native.layout import READ, WRITE
from emberfs.client.native.ring import Result, Ring, Wanted


class AsyncRing:
    """Awaits batches of a Ring that nobody else waits for."""

    def __init__(self, ring: Ring) -> None:
        """To be made on the event loop that is to wait; closes the ring in the end."""
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._under_way = 0
        self._loop.add_reader(ring.fileno(), self._rang)

    async def read_many(self, wanted: Sequence[Wanted]) -> list[Result]:
        """Fill every piece of memory; one result for each, in order.

        Cancelled, the reads go on: leave their memory alone until the ring is closed.
        """
        return await self._perform(READ, wanted)

    async def write_many(self, wanted: Sequence[Wanted]) -> list[Result]:
        """Write every piece of memory; as read_many."""
        return await self._perform(WRITE, wanted)

    async def _perform(self, operation: int, wanted: Sequence[Wanted]) -> list[Result]:
        batch = self._ring.submit(operation, wanted)
        if batch.left:
            done = self._loop.create_future()

            def tell() -> None:
                self._under_way -= 1
                if not done.done():
                    done.set_result(None)

            batch.when_done = tell
            self._under_way += 1
            self._listen()
            await done
        return self._ring.wait(batch)

    def _listen(self) -> None:
        """Have the bell rung for the next completion; take what is complete already."""
        while self._under_way and not self._ring.lost and not self._ring.arm(1):
            self._ring.collect()

    def _rang(self) -> None:
        self._ring.collect()
        if self._ring.lost:
            self._loop.remove_reader(self._ring.fileno())
        else:
            self._listen()

    async def __aenter__(self) -> Self:
        """Nothing to do."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Wait for nothing any more."""
        if not self._ring.closed:
            self._loop.remove_reader(self._ring.fileno())
            self._ring.close()
