"""Group commit: many callers, one sync at a time."""

import asyncio
from collections.abc import Callable

from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet
from emberfs.storage.diskwatch import DiskWatch
from emberfs.storage.metrics import FLUSH_SECONDS, FLUSHES


class GroupFlush:
    """Runs `flush` in a thread, never twice at once.

    Whoever calls while one is running shares the next: an answer always comes from a flush that
    started after the request.
    """

    def __init__(self, env: Env, flush: Callable[[], None], tasks: TaskSet) -> None:
        self._env = env
        self._flush = flush
        self.watch = DiskWatch(env)  # of everything that its owner does in threads, too
        self._tasks = tasks
        self._next: asyncio.Future[None] | None = None
        self._running = False
        self.dirty = False  # set by whoever commits; cleared when a flush that covers it starts

    async def flush(self) -> None:
        """Return when everything committed before this call is stable. Raises what flush raises."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        mine = self._next
        if not self._running:
            self._running = True
            self._tasks.spawn(self._rounds(), name="group flush")
        await asyncio.shield(mine)

    async def _rounds(self) -> None:
        try:
            while self._next is not None:
                current, self._next = self._next, None
                await self._round(current)
        finally:
            self._running = False
            if self._next is not None:
                self._next.cancel()
                self._next = None

    async def _round(self, current: "asyncio.Future[None]") -> None:
        self.dirty = False
        started_ns = self._env.now_ns()
        try:
            await self.watch.run(self._flush)
        except asyncio.CancelledError:
            current.cancel()
            raise
        except Exception as problem:
            self.dirty = True
            current.set_exception(problem)
            current.exception()  # seen, even if every caller has gone
        else:
            current.set_result(None)
            FLUSHES.inc()
            FLUSH_SECONDS.observe((self._env.now_ns() - started_ns) / 1e9)
