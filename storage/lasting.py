"""Work that must come to its end because it uses somebody else's memory."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from emberfs.runtime.env import Env

T = TypeVar("T")


async def run_to_end(work: Awaitable[T]) -> T:
    """Await `work`; a cancellation is delivered only once it has ended."""
    future = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as problem:
            cancelled = problem
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # nobody will look at it any more
        raise cancelled
    return future.result()


async def run_thread_to_end(env: Env, work: Callable[[], T]) -> T:
    """Run `work` in a thread and never leave it behind, even when cancelled."""
    return await run_to_end(env.run_blocking(work))
