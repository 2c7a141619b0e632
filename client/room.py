"""A bound on bytes, with waiting in order of arrival."""

import asyncio
from collections import deque


class Room:
    """Bytes that may be in use; one request larger than the bound gets it alone."""

    def __init__(self, limit_bytes: int) -> None:
        assert limit_bytes > 0
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def wanted(self) -> bool:
        """Somebody waits for room."""
        return bool(self._waiting)

    def try_take(self, count: int) -> bool:
        """Take without waiting, unless there is no room or others wait for it."""
        if self._waiting or not self._fits(count):
            return False
        self.used_bytes += count
        return True

    async def take(self, count: int) -> None:
        """Take, waiting for the turn."""
        if self.try_take(count):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(count)
            else:
                self._serve()
            raise

    def give(self, count: int) -> None:
        """Give back what was taken."""
        assert 0 <= count <= self.used_bytes
        self.used_bytes -= count
        self._serve()

    def _fits(self, count: int) -> bool:
        return self.used_bytes == 0 or self.used_bytes + count <= self.limit_bytes

    def _serve(self) -> None:
        while self._waiting:
            count, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(count):
                    return
                self.used_bytes += count
                turn.set_result(None)
            self._waiting.popleft()
