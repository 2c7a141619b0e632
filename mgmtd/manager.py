"""The shell around Membership: one event at a time, its effects in order, snapshots to watchers.

Knows nothing of gRPC; the simulator calls it directly. A lock makes events serial; heartbeats carry
the time at which they arrived, so that a slow disk does not make them late. While the state cannot
be stored nothing is published or answered: the write, which is idempotent, is tried again for ever
on a store opened anew.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from emberfs.kv.store import OrderedStore
from emberfs.mgmtd import metrics
from emberfs.mgmtd.events import Answer, Event, Persist, Publish, Refused, Ticked, Timing
from emberfs.mgmtd.membership import Membership
from emberfs.mgmtd.store import ClusterStore
from emberfs.proto.cluster import EMPTY_ROUTING, Chain, Node, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.mgmtd.manager")

RETRY_FIRST_NS = 100 * MS
RETRY_MAX_NS = 2 * SECOND


class Manager:
    """The management service without its network."""

    def __init__(
        self,
        env: Env,
        open_store: Callable[[], OrderedStore],
        cluster: str,
        own: Node,
        timing: Timing,
    ) -> None:
        self.snapshot = EMPTY_ROUTING
        self.timing = timing
        self.cluster = cluster
        self._env = env
        self._open_store = open_store
        self._store: ClusterStore | None = None
        self._machine = Membership(cluster, own, timing)
        self._lock = asyncio.Lock()
        self._watchers: set[asyncio.Event] = set()
        self._tasks = TaskSet()
        self._performing = TaskSet()  # at most one: never cancelled
        self._closed = False
        self._failed = False

    async def start(self) -> None:
        """Open the store, load the cluster, and begin to watch the time.

        EmberfsError as the store's opening and ClusterStore.load.
        """
        store = self._store = await self._env.run_blocking(lambda: ClusterStore(self._open_store))
        loaded = await self._env.run_blocking(
            lambda: store.load(self.cluster, self.timing.lease_ns)
        )
        await self.apply(loaded)
        self._tasks.spawn(self._tick(), name="mgmtd tick")

    async def close(self) -> None:
        """End all watches, finish the event in hand, release the store. May be repeated."""
        self._closed = True
        for event in self._watchers:
            event.set()
        await self._tasks.close()
        await self._performing.drain()
        store, self._store = self._store, None
        if store is not None:
            await self._env.run_blocking(store.close)

    async def _tick(self) -> None:
        while True:
            await self._env.sleep_ns(self.timing.tick_ns)
            await self.apply(Ticked())

    async def request(self, event: Event) -> Answer:
        """Apply an event that asks for something. EmberfsError: why it was refused."""
        reply = await self.apply(event)
        if isinstance(reply, Refused):
            raise EmberfsError(reply.code, reply.message)
        assert reply is not None
        return reply

    async def apply(self, event: Event) -> Answer | Refused | None:
        """Apply an event and perform its effects.

        The caller may be cancelled while it waits for its turn, not in between: what the machine
        has decided is always carried out.
        """
        arrived_ns = self._env.now_ns()
        await self._lock.acquire()
        try:
            self._refuse_if_over()
            work = self._performing.spawn(self._perform(event, arrived_ns), name="mgmtd event")
        except BaseException:
            self._lock.release()
            raise
        work.add_done_callback(lambda _: self._lock.release())
        return await asyncio.shield(work)

    def _refuse_if_over(self) -> None:
        if self._closed:
            raise EmberfsError(Code.SHUTTING_DOWN, "mgmtd stops")
        if self._failed:
            raise EmberfsError(Code.INTERNAL, "mgmtd has failed, see its log; restart it")

    async def _perform(self, event: Event, arrived_ns: int) -> Answer | Refused | None:
        try:
            effects = self._machine.handle(event, arrived_ns)
        except Exception:
            # Memory and disk may differ now: a restart from the disk is safe, going on is not.
            self._failed = True
            log.critical("mgmtd stops answering; the last events: %s", list(self._machine.story))
            raise
        for effect in effects:
            match effect:
                case Persist():
                    await self._persist(effect)
                case Publish(snapshot):
                    self._publish(snapshot)
                case Answer() | Refused():
                    return effect
        return None

    async def _persist(self, effect: Persist) -> None:
        backoff = Backoff(RETRY_FIRST_NS, RETRY_MAX_NS)
        store = self._store
        assert store is not None
        again = False
        while True:
            try:
                if again:
                    await self._env.run_blocking(store.reopen)
                await self._env.run_blocking(lambda: store.persist(effect))
                return
            except (EmberfsError, OSError) as problem:
                metrics.PERSIST_FAILURES.inc()
                if self._closed:
                    raise
                log.error("the cluster state cannot be stored, trying again: %s", problem)
            again = True
            await self._env.sleep_ns(backoff.next_ns(self._env.random))

    def _publish(self, snapshot: RoutingSnapshot) -> None:
        _log_changes(self.snapshot, snapshot)
        self.snapshot = snapshot
        metrics.show(snapshot)
        for event in self._watchers:
            event.set()

    async def watch(self, have_version: int) -> AsyncGenerator[RoutingSnapshot, None]:
        """Yield the newest snapshot whenever it is newer; a slow reader skips those between."""
        event = asyncio.Event()
        self._watchers.add(event)
        metrics.WATCHERS.set(len(self._watchers))
        try:
            while not self._closed:
                if self.snapshot.version > have_version:
                    snapshot = self.snapshot
                    have_version = snapshot.version
                    yield snapshot
                    continue
                event.clear()
                await event.wait()
        finally:
            self._watchers.discard(event)
            metrics.WATCHERS.set(len(self._watchers))


def _log_changes(old: RoutingSnapshot, new: RoutingSnapshot) -> None:
    """One line for every node that came or went and every chain that changed."""
    if not old.version:
        log.info("routing version %d: %d chains", new.version, len(new.chains))
        return
    for number, node in new.nodes.items():
        known = old.nodes.get(number)
        if known is None or known.alive != node.alive or known.incarnation != node.incarnation:
            log.info(
                "%s %d on %s is %s",
                node.kind.name.lower(),
                number,
                node.host,
                "alive" if node.alive else "dead",
            )
    for number in old.nodes.keys() - new.nodes.keys():
        log.info("client %d is gone", number)
    for chain_number, chain in new.chains.items():
        before = old.chains.get(chain_number)
        if before is None or before.version != chain.version:
            metrics.CHAIN_CHANGES.inc()
            log.info("chain %d version %d: %s", chain_number, chain.version, _describe(chain))


def _describe(chain: Chain) -> str:
    return ", ".join(f"{t.target} {t.state.name.lower()}" for t in chain.targets)
