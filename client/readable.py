"""How pyfuse3's asyncio mode waits for /dev/fuse, replaced by something that costs less.

pyfuse3 calls a handful of names of `trio`; its own asyncio adapter adds and removes a reader on the
event loop for every request and takes a lock around it. Here a worker polls first, and parks only
when nothing is there; the reader stays registered while anybody is parked.

Invariants: a parked worker polls again when it wakes, so a wake-up is only a hint; the descriptor
is non-blocking, so a request that vanishes between poll and read (its caller was killed) costs one
EAGAIN and never blocks the process; every eighth request goes through the event loop, so that
handlers that never wait cannot starve the connections to the servers.
"""

import asyncio
import errno
import os
import select
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NamedTuple, Self

import pyfuse3

from emberfs.runtime.tasks import TaskSet

YIELD_EVERY = 8  # requests that one worker may take without letting the event loop run


class ClosedResourceError(Exception):
    """The session ends: pyfuse3's workers leave their loop on it."""


class Readable:
    """Waits until one descriptor is readable, for many workers."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._loop = asyncio.get_running_loop()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        # After an unmount /dev/fuse reports EPOLLERR alone, on which uvloop drops a reader without
        # calling it. An epoll around it is plainly readable then.
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN)
        self._parked: deque[asyncio.Future[None]] = deque()
        self._registered = False
        self._closed = False
        self._calls = 0

    async def wait(self) -> None:
        """Return when a request can probably be read; raises ClosedResourceError after close."""
        self._calls += 1
        may_take = self._calls % YIELD_EVERY != 0
        while True:
            if self._closed:
                raise ClosedResourceError
            if may_take and self._poll.poll(0):
                return
            await self._park()
            may_take = True

    def close(self) -> None:
        """Wake every worker for good."""
        if self._closed:
            return
        self._closed = True
        self._unregister()
        for waiter in self._parked:
            if not waiter.done():
                waiter.set_result(None)
        self._parked.clear()
        self._epoll.close()

    async def _park(self) -> None:
        waiter = self._loop.create_future()
        self._parked.append(waiter)
        if not self._registered:
            self._loop.add_reader(self._epoll.fileno(), self._on_readable)
            self._registered = True
        try:
            await waiter
        except asyncio.CancelledError:
            self._hand_on(waiter)
            raise

    def _on_readable(self) -> None:
        """Wake one worker, or, with none parked, stop listening (the event is level-triggered)."""
        while self._parked:
            waiter = self._parked.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._unregister()

    def _hand_on(self, waiter: asyncio.Future[None]) -> None:
        """A cancelled worker gives its wake-up to the next one."""
        if waiter in self._parked:
            self._parked.remove(waiter)
        elif not self._closed:
            self._on_readable()

    def _unregister(self) -> None:
        if self._registered:
            self._loop.remove_reader(self._epoll.fileno())
            self._registered = False


class _Lock:
    """pyfuse3 guards its wait with a lock; workers of one event loop need none here."""

    async def __aenter__(self) -> None:
        return

    async def __aexit__(self, *problem: object) -> None:
        return


class Nursery:
    """Runs pyfuse3's workers: one that fails is logged, one that met EAGAIN goes on."""

    def __init__(self) -> None:
        self._tasks = TaskSet()

    async def __aenter__(self) -> Self:
        """Begin."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for all workers; a cancellation cancels them."""
        try:
            await self._tasks.drain()
        finally:
            await self._tasks.close()

    def start_soon(
        self, worker: Callable[..., Awaitable[None]], *arguments: object, name: str = "pyfuse"
    ) -> None:
        """Start a worker."""
        self._tasks.spawn(_persist(worker, arguments), name=name)


async def _persist(worker: Callable[..., Awaitable[None]], arguments: tuple[object, ...]) -> None:
    while True:
        try:
            return await worker(*arguments)
        except OSError as problem:
            if problem.errno != errno.EAGAIN:
                raise


class _Named(NamedTuple):
    name: str


class AsyncioMode:
    """The part of trio's interface that pyfuse3 uses, on asyncio. One FUSE session at a time."""

    Lock = _Lock
    ClosedResourceError = ClosedResourceError

    def __init__(self) -> None:
        self.lowlevel = self
        self.from_thread = self
        self._readable: Readable | None = None

    async def wait_readable(self, fd: int) -> None:
        """Wait for /dev/fuse."""
        if self._readable is None:
            self._readable = Readable(fd)
        await self._readable.wait()

    def notify_closing(self, fd: int) -> None:
        """Let the workers go (pyfuse3.terminate)."""
        if self._readable is not None:
            self._readable.close()

    def open_nursery(self) -> Nursery:
        """Where the workers live."""
        return Nursery()

    def current_task(self) -> _Named:
        """Who runs; pyfuse3 asks for the name, for its debug log."""
        task = asyncio.current_task()
        return _Named(task.get_name() if task else "")

    def current_trio_token(self) -> str:
        """Only ever passed back to us."""
        return "asyncio"


def enable() -> AsyncioMode:
    """Put pyfuse3 on the running event loop; call before pyfuse3.main, once per session."""
    mode = AsyncioMode()
    pyfuse3.trio = mode  # type: ignore[attr-defined]
    return mode
