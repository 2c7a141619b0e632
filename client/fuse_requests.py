"""What every FUSE request goes through: errors become errnos, deadlines hold, all is counted.

pyfuse3 answers a request only if its handler returns or raises FUSEError; any other exception would
leave the application in D state and kill the worker. So every handler is wrapped here.
"""

import asyncio
import contextlib
import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3

from emberfs.client.fuse_metrics import FuseMetrics
from emberfs.proto.errors import Code, EmberfsError, Reaction
from emberfs.proto.ids import SECOND
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.client.fuse")

P = ParamSpec("P")
T = TypeVar("T")

SWEEP_NS = SECOND // 4  # how late a deadline may be noticed


class Requests:
    """The requests that are being answered, by the worker task that answers them.

    A timer per request would cost a tenth of a small read; one sweep over the few running requests
    costs nothing.
    """

    def __init__(self, env: Env, metrics: FuseMetrics, timeout_ns: int) -> None:
        self.env = env
        self.metrics = metrics
        self.timeout_ns = timeout_ns
        self.running: dict[asyncio.Task[Any], int] = {}  # task -> when it began
        self.on_doubt: Callable[[], object] = lambda: None  # a failed request may have had effect
        self._expired: set[asyncio.Task[Any]] = set()

    async def sweep(self) -> None:
        """Cancel what has passed its deadline; runs as long as the mount does."""
        while True:
            await self.env.sleep_ns(min(SWEEP_NS, self.timeout_ns))
            begun_before_ns = self.env.now_ns() - self.timeout_ns
            for task, begun_ns in list(self.running.items()):
                if begun_ns < begun_before_ns:
                    self._expired.add(task)
                    task.cancel()

    def failure(self, operation: str, problem: BaseException) -> BaseException:
        """Return what a handler must raise instead of `problem`."""
        if isinstance(problem, asyncio.CancelledError) and not self._claim_expired():
            return problem  # the mount is being torn down
        answer = self._errno(operation, problem)
        self.metrics.operation(operation).failed(errno.errorcode.get(answer, str(answer)))
        return pyfuse3.FUSEError(answer)

    def finish(self, task: asyncio.Task[Any]) -> None:
        """Forget a request that was answered."""
        del self.running[task]
        if task in self._expired:
            # It ended in the very moment of its deadline, or its code swallowed the cancellation.
            self._claim_expired()

    def _claim_expired(self) -> bool:
        """Take back the cancellation that the sweep asked for: the worker task must live on."""
        task = asyncio.current_task()
        if task is None or task not in self._expired:
            return False
        self._expired.discard(task)
        while task.cancelling():
            task.uncancel()
        return True

    def _errno(self, operation: str, problem: BaseException) -> int:
        """The one place where errors become errnos."""
        if isinstance(problem, pyfuse3.FUSEError):
            return int(problem.errno)
        if isinstance(problem, EmberfsError):
            level = logging.DEBUG if problem.reaction == Reaction.GIVE_UP else logging.WARNING
            log.log(level, "%s: %s", operation, problem)
            if problem.reaction != Reaction.GIVE_UP:
                self.on_doubt()
            return problem.errno
        if isinstance(problem, asyncio.CancelledError):
            seconds = self.timeout_ns / SECOND
            log.warning("%s: given up after %.0f s (request_timeout_s)", operation, seconds)
            self.metrics.timeouts += 1
            self.on_doubt()
            return errno.ETIMEDOUT
        log.error("%s: internal error", operation, exc_info=problem)
        return errno.EIO


@contextlib.contextmanager
def looked_up_anew() -> Iterator[None]:
    """Around calls on an inode that the kernel knows by a name: one that is gone is ESTALE.

    Its name may lead to another file now: the kernel walks the path again after ESTALE, asking for
    every name (Documentation/filesystems/path-lookup.rst). ENOENT would tell of a missing name.
    """
    try:
        yield
    except EmberfsError as problem:
        if problem.code != Code.NOT_FOUND:
            raise
        raise EmberfsError(Code.STALE, problem.message) from None


class HasRequests(Protocol):
    """The class whose methods are handlers."""

    requests: Requests


S = TypeVar("S", bound=HasRequests)


def handler(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Wrap a FUSE request handler."""
    name = method.__name__

    async def answer(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        requests = self.requests
        now_ns = requests.env.now_ns
        task = asyncio.current_task()
        assert task is not None
        begun_ns = requests.running[task] = now_ns()
        try:
            return await method(self, *args, **kwargs)
        except BaseException as problem:
            raise requests.failure(name, problem) from None
        finally:
            requests.finish(task)
            requests.metrics.operation(name).observe(now_ns() - begun_ns)

    functools.update_wrapper(answer, method)
    return answer
