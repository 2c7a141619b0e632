"""What is left to do in the background: in small steps, callers first, until nothing is left."""

import asyncio
import logging

from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import MS, SECOND
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

IDLE_NS = 1 * SECOND
PAUSE_NS = 1 * MS  # between steps

log = logging.getLogger("emberfs.meta.backlog")


class Backlog:
    """Steps through recorded work, for ever. Subclasses say what one step is."""

    what = ""  # is done, for people

    def __init__(self, env: Env) -> None:
        self._env = env
        self._woken = asyncio.Event()
        self._tasks = TaskSet()

    async def step(self) -> bool:
        """Do a bounded part of it. False if nothing is left to do."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin in the background."""
        self._tasks.spawn(self._live(), name=f"meta {self.what}")

    async def close(self) -> None:
        """Stop; what is left stays recorded."""
        await self._tasks.close()

    def wake(self) -> None:
        """There may be something to do."""
        self._woken.set()

    async def finish(self) -> int:
        """Work until nothing is left; returns the number of steps."""
        steps = 0
        while await self.step():
            steps += 1
            await self._env.sleep_ns(PAUSE_NS)
        return steps

    async def _live(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self.finish()
            except EmberfsError as problem:
                log.warning("%s: %s", self.what, problem)
            try:
                async with asyncio.timeout(IDLE_NS / SECOND):
                    await self._woken.wait()
            except TimeoutError:
                continue
