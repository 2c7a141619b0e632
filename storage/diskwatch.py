"""How long the disk has kept somebody waiting.

A disk that fails says so; one that hangs says nothing, and neither does the target above it: it
keeps its lease, accepts updates and never ends them. Work on the store in threads is therefore
timed, and a target whose oldest piece of it is too old leaves its chain (hosted.py). The thread
stays where it is; the target is opened again once it has come back.
"""

from collections.abc import Callable
from typing import TypeVar

from emberfs.proto.ids import SECOND
from emberfs.runtime.env import Env
from emberfs.storage.lasting import run_thread_to_end

T = TypeVar("T")

# A sync of gigabytes on a slow disk takes seconds; the kernel gives up on a disk after 30 s.
HANGS_NS = 20 * SECOND


class DiskWatch:
    """The pieces of work in hand on one store."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._begun_ns: dict[object, int] = {}

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread to its end, as run_thread_to_end does, and time it."""
        ticket = object()
        self._begun_ns[ticket] = self._env.now_ns()
        try:
            return await run_thread_to_end(self._env, work)
        finally:
            del self._begun_ns[ticket]

    @property
    def hangs(self) -> bool:
        """Whether some piece of work should have ended long ago."""
        oldest_ns = min(self._begun_ns.values(), default=None)
        return oldest_ns is not None and self._env.now_ns() - oldest_ns > HANGS_NS
