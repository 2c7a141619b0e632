"""Hears from every metadata server what has changed, so that caches need not run out.

Each server is asked again and again for its changes (meta/announce.py); an answer is held back
until there are some. What was cached may be believed as long as every server that could change it
has been heard lately, and routing, which names those servers, is itself no older than a lease
allows. Otherwise, or when changes were missed, whoever listens must forget everything: `lost`.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from emberfs.client.nodecalls import NodeCalls, Peers, RoutingView
from emberfs.proto.cluster import NodeKind, RoutingSnapshot
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import MS, SECOND, NodeId
from emberfs.proto.meta_calls import LISTEN, Change, ListenAnswer, ListenRequest
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.listening")

HOLD_NS = 500 * MS  # a server without news answers after this
HEARD_NS = 2 * SECOND  # what a server said when asked this long ago may be believed
LOOK_NS = 250 * MS
PAUSE_NS = 100 * MS  # after a call that failed


class Lease(Protocol):
    """What is asked of client.agent.Agent."""

    def lease_ok(self) -> bool:
        """Tell whether mgmtd has answered within half a lease."""
        ...


class Listener(Protocol):
    """Who caches."""

    def heard(self, changes: Sequence[Change]) -> None:
        """Forget what has changed."""
        ...

    def lost(self) -> None:
        """Forget everything."""
        ...


class Listening:
    """One client's ear at every metadata server."""

    def __init__(
        self, env: Env, routing: RoutingView, peers: Peers, client: int, lease: Lease | None
    ) -> None:
        self._env = env
        self._routing = routing
        self._nodes = NodeCalls(env, routing, peers)
        self._client = client
        self._lease = lease
        self._listener: Listener | None = None
        self._asked_ns: dict[tuple[NodeId, int], int] = {}  # when the last answer was asked for
        self._asking: dict[tuple[NodeId, int], asyncio.Task[None]] = {}
        self._current = False
        self._tasks = TaskSet()

    def start(self, listener: Listener) -> None:
        """Begin to listen; `listener` is told on the event loop."""
        self._listener = listener
        routing = self._routing
        routing.subscribe(self._follow)
        self._follow(routing.snapshot)
        self._tasks.spawn(self._watch(), name="listening")

    async def close(self) -> None:
        """Listen no more."""
        self._listener = None
        self._nodes.close()
        await self._tasks.close()

    def is_current(self) -> bool:
        """Tell whether nothing can have changed lately without being heard."""
        if not self._current:
            return False
        self._look()
        return self._current

    def _follow(self, snapshot: RoutingSnapshot) -> None:
        """Ask every server that lives; one that has begun a new life is another one."""
        if self._listener is None:
            return
        nodes = snapshot.nodes_of(NodeKind.META)
        living = {(node.id, node.incarnation) for node in nodes if node.alive}
        for key in set(self._asking) - living:
            self._asking.pop(key).cancel()
            self._asked_ns.pop(key, None)
            self._lose("a metadata server is gone")  # and with it what it had not told yet
        for key in living - set(self._asking):
            name = f"listening to node {key[0]}"
            self._asking[key] = self._tasks.spawn(self._ask(key), name=name)
            self._lose("a metadata server is new")

    async def _ask(self, key: tuple[NodeId, int]) -> None:
        life = after = 0
        while True:
            asked_ns = self._env.now_ns()
            request = ListenRequest(self._client, life, after, HOLD_NS)
            try:
                answer = await self._call(key[0], request)
            except EmberfsError as problem:
                log.debug("node %d does not tell of changes: %s", key[0], problem)
                await self._env.sleep_ns(PAUSE_NS)
                continue
            if answer.missed:
                self._lose(f"changes of node {key[0]} were missed" if life else "")
            elif answer.changes and self._listener is not None:
                self._listener.heard(answer.changes)
            life, after = answer.life, answer.last
            self._asked_ns[key] = asked_ns
            self._look()

    async def _call(self, node: NodeId, request: ListenRequest) -> ListenAnswer:
        reply = await self._nodes.call(
            node, LISTEN.number, LISTEN.encode_request(request), timeout_ns=HEARD_NS
        )
        return LISTEN.decode_answer(reply.body)

    async def _watch(self) -> None:
        while True:
            await self._env.sleep_ns(LOOK_NS)
            self._look()

    def _look(self) -> None:
        """Notice that the servers are heard again, or not any more."""
        oldest_ns = self._env.now_ns() - HEARD_NS
        heard = self._asking and all(self._asked_ns.get(k, 0) > oldest_ns for k in self._asking)
        current = bool(heard) and (self._lease is None or self._lease.lease_ok())
        if current and not self._current:
            self._current = True
        elif self._current and not current:
            self._lose("not every metadata server is heard")

    def _lose(self, why: str) -> None:
        if self._current:
            log.info("caches are dropped: %s", why)
        self._current = False
        if self._listener is not None:
            self._listener.lost()
