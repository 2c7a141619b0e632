"""An asyncio event loop on virtual time, whose callbacks belong to simulated processes.

Waiting costs nothing: when nobody is ready, the clock jumps to the next timer. There is no thread,
no descriptor and no signal, so one seed gives one history.

A process that is killed never runs another line: its callbacks are dropped, not cancelled, hence no
`finally` of it tidies up, as with SIGKILL. A paused one (SIGSTOP) finds on waking all that has
happened meanwhile, its timers overdue. Which process a callback belongs to is told by a context
variable that tasks and callbacks inherit.
"""

import asyncio
import contextvars
import gc
import heapq
import sys
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

MAX_CANCELLED_SHARE = 0.5


class Killed(BaseException):
    """Raised inside a process at the instant at which it dies."""


class Process:
    """Something that can be killed and paused."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.held: list[asyncio.Handle] = []  # ready while paused
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self.graveyard: list[asyncio.Task[Any]] = []  # so that no coroutine is closed early
        self.watchers: list[Callable[[], None]] = []  # told when it dies
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)

    def kill(self) -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.held.clear()
        self.graveyard.extend(self.tasks)
        for watcher in self.watchers:
            watcher()

    def pause(self) -> None:
        """SIGSTOP."""
        self.paused = True

    def resume(self) -> None:
        """SIGCONT."""
        self.paused = False
        held, self.held = self.held, []
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        loop.give_back(held)


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class StuckError(Exception):
    """Nobody is ready and no timer runs: the simulated program would wait for ever."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self.steps = 0  # callbacks run so far
        self.set_task_factory(_make_task)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self._now_s

    def now_ns(self) -> int:
        """Virtual nanoseconds since the start."""
        return round(self._now_s * 1e9)

    def give_back(self, handles: list[asyncio.Handle]) -> None:
        """Make callbacks ready that were held."""
        self._ready.extend(handles)  # type: ignore[attr-defined]

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled  # type: ignore[attr-defined]
        self._drop_cancelled(timers)
        if not ready:
            while timers and timers[0]._cancelled:
                heapq.heappop(timers)._scheduled = False
                self._timer_cancelled_count -= 1
            if not timers:
                raise StuckError
            self._now_s = max(self._now_s, timers[0]._when)
        while timers and timers[0]._when <= self._now_s:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if timer._cancelled:
                self._timer_cancelled_count -= 1
            else:
                ready.append(timer)
        for _ in range(len(ready)):
            self._run_one(ready.popleft())

    def _run_one(self, handle: Any) -> None:
        if handle._cancelled:
            return
        process = handle._context.get(PROCESS)
        if process is not None:
            if not process.alive:
                return
            if process.paused:
                process.held.append(handle)
                return
        self.steps += 1
        handle._run()

    def _drop_cancelled(self, timers: list[Any]) -> None:
        count = self._timer_cancelled_count
        if count > 100 and count > len(timers) * MAX_CANCELLED_SHARE:
            kept = [timer for timer in timers if not timer._cancelled]
            for timer in timers:
                if timer._cancelled:
                    timer._scheduled = False
            timers[:] = kept
            heapq.heapify(timers)
            self._timer_cancelled_count = 0

    def _write_to_self(self) -> None:
        """Nobody calls from another thread."""

    def _process_events(self, event_list: object) -> None:
        raise AssertionError("there are no descriptors")


def _make_task(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], **options: Any
) -> asyncio.Task[T]:
    task = asyncio.Task(work, loop=loop, **options)
    context = options.get("context")
    process = context.get(PROCESS) if context is not None else PROCESS.get()
    if process is not None:
        process.tasks.add(task)
    # A killed process leaves tasks behind that nobody will ever end.
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    return task


def run(main: Callable[[SimLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a simulation to its end on a loop of its own.

    The garbage collector sleeps meanwhile: finalizers at times of its choosing would make two runs
    of one seed differ.
    """
    loop = SimLoop()
    collecting = gc.isenabled()
    gc.disable()
    hook = sys.unraisablehook
    # What the dead leave behind is closed in the end, with nobody to hear its complaints.
    sys.unraisablehook = lambda _: None
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop._ready.clear()  # type: ignore[attr-defined]
        loop._scheduled.clear()  # type: ignore[attr-defined]
        loop.set_exception_handler(lambda *_: None)
        loop.close()
        del loop
        gc.collect()
        sys.unraisablehook = hook
        if collecting:
            gc.enable()
