"""Transactions of one process that wait for one another instead of conflicting again and again.

Optimistic transactions on a busy row at a server cost a round trip each, and all but one are
refused. After a first conflict the next try waits for its turn on the rows it both read and wrote.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager


class Turns:
    """A lock per row that somebody wants."""

    def __init__(self) -> None:
        self._locks: dict[bytes, tuple[asyncio.Lock, int]] = {}  # and how many want it

    @asynccontextmanager
    async def take(self, keys: Iterable[bytes]) -> AsyncGenerator[None, None]:
        """Hold the turn of all these rows. Taken in order: no two wait for each other."""
        async with AsyncExitStack() as held:
            for key in sorted(keys):
                await held.enter_async_context(self._one(key))
            yield

    @asynccontextmanager
    async def _one(self, key: bytes) -> AsyncGenerator[None, None]:
        lock, wanted = self._locks.get(key) or (asyncio.Lock(), 0)
        self._locks[key] = (lock, wanted + 1)
        try:
            async with lock:
                yield
        finally:
            lock, wanted = self._locks.pop(key)
            if wanted > 1:
                self._locks[key] = (lock, wanted - 1)
