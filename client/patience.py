"""How long one logical call keeps trying, and what it waits for between tries."""

from collections.abc import Callable

from emberfs.client.nodecalls import RoutingView
from emberfs.proto.errors import Code, EmberfsError, Reaction
from emberfs.proto.ids import MS, SECOND, RoutingVersion
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff

PAUSE_FIRST_NS = 5 * MS
PAUSE_MAX_NS = 100 * MS


class Patience:
    """The retry state of one logical call: a deadline, a growing attempt time, growing pauses."""

    def __init__(
        self,
        env: Env,
        routing: RoutingView,
        describe: Callable[[], str],
        *,
        timeout_ns: int,
        attempt_ns: int,
        pause_first_ns: int = PAUSE_FIRST_NS,
        pause_max_ns: int = PAUSE_MAX_NS,
        began_ns: int | None = None,
    ) -> None:
        """`describe` says what is being tried; `attempt_ns` is the time of the first attempt.

        `began_ns`: when the call began, if a first attempt was made before anybody needed this.
        """
        self._env = env
        self._routing = routing
        self._describe = describe
        self._timeout_ns = timeout_ns
        self._deadline_ns = (env.now_ns() if began_ns is None else began_ns) + timeout_ns
        self._attempt_ns = attempt_ns
        self._backoff = Backoff(pause_first_ns, pause_max_ns)
        self._refusal: EmberfsError | None = None  # the last answer that was more than silence

    def attempt_ns(self, extra_ns: int = 0) -> int:
        """Time for the next attempt: bounded, so that a server that never answers is left."""
        left_ns = self._deadline_ns - self._env.now_ns()
        return max(1, min(left_ns, self._attempt_ns + extra_ns))

    def note(self, problem: EmberfsError) -> None:
        """Raise it if nothing can help; give the next attempt more time if this one had too little.

        Raises TIMEOUT with the last cause when the deadline has passed.
        """
        if problem.reaction == Reaction.GIVE_UP:
            raise problem
        if problem.code == Code.TIMEOUT:
            self._attempt_ns *= 2
        else:
            self._refusal = problem
        if self._env.now_ns() >= self._deadline_ns:
            raise self._over(problem)

    async def pause(self, problem: EmberfsError, seen: RoutingVersion) -> None:
        """Wait before the next try; for routing above `seen` where that may help.

        Raises TIMEOUT with the last cause when the pause would pass the deadline.
        """
        until_ns = self._env.now_ns() + self._backoff.next_ns(self._env.random)
        if until_ns >= self._deadline_ns:
            raise self._over(problem)
        if problem.reaction != Reaction.RETRY and await self._routing.wait_newer(
            seen, until_ns - self._env.now_ns()
        ):
            return
        # Routing that is closed, because the process ends, waits for nothing.
        if self._env.now_ns() < until_ns:
            await self._env.sleep_ns(until_ns - self._env.now_ns())

    def _over(self, problem: EmberfsError) -> EmberfsError:
        text = f"{self._describe()}: no success in {self._timeout_ns / SECOND:.1f} s"
        text += f"; last: {problem}"
        if problem.code == Code.TIMEOUT and self._refusal is not None:
            # The last attempt was cut short by the deadline: it says nothing of the cause.
            text += f"; before: {self._refusal}"
        return EmberfsError(Code.TIMEOUT, text)
