"""Shared and exclusive locks on byte ranges of one file, first come, first served.

They make each read and write of this client atomic against its other writes, while disjoint ranges
proceed in parallel. No deadlock: a holder never asks for a second range.
"""

import asyncio

END = 1 << 63


class Hold:
    """One range, held for the body of an `async with` or from `try_hold` to `give`."""

    __slots__ = ("exclusive", "granted", "lock", "start", "stop")

    def __init__(self, lock: "RangeLock", start: int, stop: int, exclusive: bool) -> None:
        self.lock = lock
        self.start = start
        self.stop = stop
        self.exclusive = exclusive
        self.granted: asyncio.Future[None] | None = None

    def conflicts(self, other: "Hold") -> bool:
        """Tell whether both cannot be held."""
        return (
            (self.exclusive or other.exclusive)
            and self.start < other.stop
            and other.start < self.stop
        )

    async def __aenter__(self) -> None:  # noqa: D105
        await self.lock.take(self)

    async def __aexit__(self, *problem: object) -> None:  # noqa: D105
        self.lock.give(self)


class RangeLock:
    """The locks of one file."""

    def __init__(self) -> None:
        self._held: list[Hold] = []
        self._waiting: list[Hold] = []

    def hold(self, start: int, stop: int, *, exclusive: bool) -> Hold:
        """Hold [start, stop) for the body of an `async with`."""
        return Hold(self, start, stop, exclusive)

    def try_hold(self, start: int, stop: int) -> Hold | None:
        """Hold [start, stop), shared, until `give`; None where that would have to wait."""
        mine = Hold(self, start, stop, exclusive=False)
        if not self._free(mine, len(self._waiting)):
            return None
        self._held.append(mine)
        return mine

    async def take(self, mine: Hold) -> None:
        """Wait until a range is held."""
        if self._free(mine, len(self._waiting)):
            self._held.append(mine)
        else:
            await self._wait(mine)

    def give(self, mine: Hold) -> None:
        """End a hold."""
        self._held.remove(mine)
        if self._waiting:
            self._grant()

    def _free(self, mine: Hold, ahead: int) -> bool:
        """Nothing held, and nobody of the first `ahead` waiters, is in the way."""
        for other in self._held:
            if mine.conflicts(other):
                return False
        return not any(mine.conflicts(other) for other in self._waiting[:ahead])

    async def _wait(self, mine: Hold) -> None:
        mine.granted = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            await mine.granted
        except BaseException:
            if mine in self._waiting:
                self._waiting.remove(mine)
            else:  # granted and cancelled at the same time
                self._held.remove(mine)
            self._grant()
            raise

    def _grant(self) -> None:
        place = 0
        while place < len(self._waiting):
            waiter = self._waiting[place]
            assert waiter.granted is not None
            if waiter.granted.done() or not self._free(waiter, place):
                place += 1
                continue
            del self._waiting[place]
            self._held.append(waiter)
            waiter.granted.set_result(None)
