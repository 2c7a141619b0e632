"""Small reads that are asked for at the same time share a call to their node.

A call costs both ends several times what a read of 4 KiB costs beside it: frames, system calls, two
wake-ups. So reads are gathered for as long as every turn of the event loop brings another one, and
leave as one call per node, to few nodes (chunkread.py); no timer is waited for. A lone reader does
not even wait for a turn.

Invariant: a reader leaves only when no server may write to its memory any more. A shared call
cannot be cancelled for one of its readers; a reader that is cancelled waits for its end, which the
call's deadline bounds.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from emberfs.proto.ids import NodeId
from emberfs.runtime.tasks import TaskSet

Work = TypeVar("Work")

SHARED_MAX = 64  # of one call
QUIET_TURNS = 2  # without another work: whoever reads requests has none left


class _Lot(Generic[Work]):
    """What leaves as one call."""

    __slots__ = ("ended", "futures", "leaving", "works")

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.futures: list[asyncio.Future[bool]] = []
        self.ended = False
        self.leaving: list[asyncio.Future[None]] = []  # cancelled readers that wait for the end


class Combiner(Generic[Work]):
    """Gathers work by node and performs it together."""

    def __init__(self, perform: Callable[[list[Work]], Awaitable[list[bool]]]) -> None:
        """`perform` makes one call for works of one node, and tells of each whether it is done."""
        self._perform = perform
        self._gathering: dict[NodeId, _Lot[Work]] = {}
        self._arrived = 0
        self._watching = False  # a look at the next turn is scheduled
        self._tasks = TaskSet()

    def gathers_for(self, node: NodeId) -> bool:
        """Tell whether a call to a node is being gathered."""
        return node in self._gathering

    async def share(self, node: NodeId, work: Work) -> bool:
        """Tell whether it is done. If not, nobody came along, or it failed: do it alone."""
        loop = asyncio.get_running_loop()
        lot = self._gathering.get(node)
        if lot is None:
            lot = self._gathering[node] = _Lot()
        future: asyncio.Future[bool] = loop.create_future()
        lot.works.append(work)
        lot.futures.append(future)
        self._arrived += 1
        if len(lot.works) == SHARED_MAX:
            self._leave(self._gathering.pop(node))
        if not self._watching:
            self._watching = True
            loop.call_soon(self._look, loop, self._arrived, QUIET_TURNS)
        try:
            return await future
        except asyncio.CancelledError:
            await self._see_the_end(lot)
            raise

    def _look(self, loop: asyncio.AbstractEventLoop, arrived: int, turns: int) -> None:
        """Once a turn: is there still more to come?"""
        if self._arrived != arrived:
            turns = QUIET_TURNS
        elif turns <= 1:
            self._watching = False
            lots, self._gathering = self._gathering, {}
            for lot in lots.values():
                self._leave(lot)
            return
        loop.call_soon(self._look, loop, self._arrived, turns - 1)

    def _leave(self, lot: _Lot[Work]) -> None:
        if len(lot.works) == 1:
            self._end(lot, [False])
        else:
            self._tasks.spawn(self._call(lot), name=f"{len(lot.works)} reads in one call")

    async def _call(self, lot: _Lot[Work]) -> None:
        done = [False] * len(lot.works)
        try:
            done = await self._perform(lot.works)
        finally:
            self._end(lot, done)

    def _end(self, lot: _Lot[Work], done: list[bool]) -> None:
        lot.ended = True
        for future, result in zip(lot.futures, done, strict=True):
            if not future.done():
                future.set_result(result)
        for waiter in lot.leaving:
            if not waiter.done():
                waiter.set_result(None)

    async def _see_the_end(self, lot: _Lot[Work]) -> None:
        while not lot.ended:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            lot.leaving.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                pass  # a further cancellation cannot hurry the server
