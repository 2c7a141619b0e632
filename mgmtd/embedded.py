"""Transactions on a store that lies open in this process alone, opened anew after a disk error.

A store whose sync has failed refuses everything from then on: only the log on the disk tells what
has survived. Opening it again reads that log, so whoever repeats its transaction goes on safely.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from emberfs.kv.store import OrderedStore
from emberfs.kv.transaction import Engine, Transaction
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.env import Env

T = TypeVar("T")

_SICK = (Code.DISK, Code.NO_SPACE)


class EmbeddedEngine:
    """Opens its store when it is first used. Fits kv.transactions.Transactions."""

    def __init__(self, env: Env, open_store: Callable[[], OrderedStore]) -> None:
        """`open_store` blocks; it is called in a thread."""
        self._env = env
        self._open_store = open_store
        self._engine: Engine | None = None
        self._sick = False
        self._closed = False
        self._opening = asyncio.Lock()

    async def run(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        read_only: bool = False,
        durable: bool = False,
    ) -> T:
        """As Engine.run; EmberfsError also as the store's opening."""
        engine = await self._opened()
        try:
            return await engine.run(work, read_only=read_only, durable=durable)
        except EmberfsError as problem:
            self._blame(engine, problem)
            raise

    async def sync(self) -> None:
        """As Engine.sync."""
        engine = await self._opened()
        try:
            await engine.sync()
        except EmberfsError as problem:
            self._blame(engine, problem)
            raise

    async def close(self) -> None:
        """Release the store. May be repeated."""
        self._closed = True
        async with self._opening:
            await self._release()

    def _blame(self, engine: Engine, problem: EmberfsError) -> None:
        if engine is self._engine and problem.code in _SICK:
            self._sick = True

    async def _opened(self) -> Engine:
        async with self._opening:
            if self._closed:
                raise EmberfsError(Code.SHUTTING_DOWN, "the store is closed")
            if self._sick:
                await self._release()
            if self._engine is None:
                try:
                    store = await self._env.run_blocking(self._open_store)
                except OSError as problem:
                    raise EmberfsError(
                        Code.DISK, f"the store cannot be opened: {problem}"
                    ) from None
                self._engine = Engine(self._env, store)
            return self._engine

    async def _release(self) -> None:
        engine, self._engine, self._sick = self._engine, None, False
        if engine is not None:
            await engine.close()
