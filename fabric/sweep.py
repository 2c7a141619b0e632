"""One timer for all deadlines of a connection: a timer for each call would cost more than it."""

import asyncio
from collections.abc import Callable

from emberfs.proto.ids import MS
from emberfs.runtime.env import Env

SWEEP_NS = 50 * MS  # coarseness of deadlines


class Sweep:
    """Calls `action(now_ns)` when a deadline may have passed, and soon after being armed.

    The action looks at everything and arms again for what is left, so an idle connection has no
    timer at all.
    """

    def __init__(self, env: Env, action: Callable[[int], None]) -> None:
        self._env = env
        self._action = action
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._at_ns = 0

    def arm(self, now_ns: int, deadline_ns: int) -> None:
        """Run within `SWEEP_NS`, or at the deadline if that is earlier."""
        at_ns = min(deadline_ns, now_ns + SWEEP_NS)
        if self._timer is not None:
            if self._at_ns <= at_ns + MS:
                return
            self._timer.cancel()
        self._at_ns = at_ns
        self._timer = self._loop.call_later(max(0, at_ns - now_ns) / 1e9, self._run)

    def cancel(self) -> None:
        """Do not run any more unless armed again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _run(self) -> None:
        self._timer = None
        self._action(self._env.now_ns())
