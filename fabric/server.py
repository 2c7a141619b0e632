"""A fabric server: it listens on any number of endpoints and gives calls to handlers."""

import asyncio
import logging
from collections.abc import Mapping
from types import MappingProxyType

from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.call import Handler, QuickHandler
from emberfs.fabric.endpoint import Listener, Transport
from emberfs.fabric.session import Session
from emberfs.fabric.transports import TRANSPORTS, transport_of
from emberfs.proto.ids import MS, MiB
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.fabric.server")

POOL_BYTES_DEFAULT = 256 * MiB
_DRAIN_STEP_NS = 5 * MS


class Server:
    """Handlers by method number, on one or more endpoints; `quick` ones are tried first.

    A handler gets sources and sinks that are valid until it returns. So it must not return, not
    even by being cancelled, while a thread or a task that it began still uses them.
    """

    def __init__(
        self,
        env: Env,
        handlers: Mapping[int, Handler],
        *,
        name: str,
        quick: Mapping[int, QuickHandler] = MappingProxyType({}),
        pool: BufferPool | None = None,
        transports: Mapping[str, Transport] = TRANSPORTS,
    ) -> None:
        self.env = env
        self.name = name
        self.handlers = handlers
        self.quick = quick
        self._transports = transports
        self._own_pool = pool is None
        self.pool = pool if pool is not None else BufferPool(POOL_BYTES_DEFAULT)
        self.tasks = TaskSet()
        self.draining = False
        self._listeners: list[Listener] = []
        self._sessions: set[Session] = set()

    async def listen(self, endpoint: str) -> str:
        """Accept callers; returns the endpoint to publish.

        "tcp://127.0.0.1:0" takes a free port, "shm:///path" gains the host key. Raises OSError
        when the address cannot be had and CONFIG when it is not one.
        """
        listener = await transport_of(endpoint, self._transports).listen(self, endpoint)
        self._listeners.append(listener)
        return listener.endpoint

    async def close(self, drain_ns: int = 0) -> None:
        """Accept no more calls, let those that run finish for up to `drain_ns`, cancel the rest."""
        self.draining = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        end_ns = self.env.now_ns() + drain_ns
        while self.env.now_ns() < end_ns and not all(s.idle for s in self._sessions):
            await self.env.sleep_ns(_DRAIN_STEP_NS)
        await self.tasks.close()
        await asyncio.gather(*(session.close() for session in list(self._sessions)))
        if self._own_pool:
            self.pool.close()

    def joined(self, session: Session) -> None:
        """Hear of a new session (see session.Host)."""
        self._sessions.add(session)

    def left(self, session: Session) -> None:
        """Hear that a session is over (see session.Host)."""
        self._sessions.discard(session)
