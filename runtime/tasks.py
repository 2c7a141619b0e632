"""Background tasks with an owner: none is forgotten, none dies in silence."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger("emberfs.runtime.tasks")


class TaskSet:
    """The tasks of one owner, cancelled and awaited together."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Start a task; if it fails, its traceback is logged under `name`."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def __len__(self) -> int:
        """How many are running."""
        return len(self._tasks)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=problem)

    async def drain(self) -> None:
        """Wait until all running tasks have ended by themselves."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Cancel all and wait for them; the calling task, if one of them, is left alone."""
        current = asyncio.current_task()
        while waiting := {task for task in self._tasks if task is not current}:
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
