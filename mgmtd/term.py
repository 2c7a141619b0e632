"""One term of a primary: the shell around Membership, from its loading to the loss of the lead.

One event at a time, its effects in order, snapshots to watchers. A lock makes events serial;
heartbeats carry the time at which they arrived, so that a slow disk does not make them late. While
the state cannot be stored nothing is published or answered: the write, which is idempotent, is
tried again until it succeeds or the term is over. A term that is over never comes back: the next
one, here or elsewhere, loads what is stored.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from emberfs.mgmtd import metrics
from emberfs.mgmtd.election import LeaseRecord
from emberfs.mgmtd.events import Answer, Event, Persist, Publish, Refused, Ticked
from emberfs.mgmtd.membership import Membership
from emberfs.mgmtd.store import ClusterStore
from emberfs.proto.cluster import EMPTY_ROUTING, Chain, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.mgmtd.term")

RETRY_FIRST_NS = 100 * MS
RETRY_MAX_NS = 2 * SECOND

Check = Callable[[], None]  # raises NOT_PRIMARY when somebody else may lead
Resign = Callable[[str], None]


class Term:
    """The management service while this mgmtd leads."""

    def __init__(
        self,
        env: Env,
        store: ClusterStore,
        record: LeaseRecord,
        machine: Membership,
        check: Check,
        resign: Resign,
    ) -> None:
        """`check` is called before everything that is stored or sent."""
        self.snapshot = EMPTY_ROUTING
        self._env = env
        self._store = store
        self._record = record
        self._machine = machine
        self._check = check
        self._resign = resign
        self._persisted = 0
        self._lock = asyncio.Lock()
        self._watchers: dict[asyncio.Event, None] = {}
        self._tasks = TaskSet()
        self._performing = TaskSet()  # at most one
        self._work: asyncio.Task[Answer | Refused | EmberfsError | None] | None = None
        self._over: EmberfsError | None = None

    async def begin(self, tick_ns: int) -> None:
        """Load the cluster, publish it, and begin to watch the time. Raises as the store."""
        await self.apply(await self._store.load(self._record))
        self._tasks.spawn(self._tick(tick_ns), name="mgmtd tick")

    def end(self, problem: EmberfsError) -> None:
        """Refuse everything with `problem` from now on, also what is in hand or watched."""
        if self._over is None:
            self._over = problem
            self._wake_watchers()
            if self._work is not None and self._work is not asyncio.current_task():
                self._work.cancel()  # it may hang in the store; what it decided is fenced off

    async def close(self, problem: EmberfsError) -> None:
        """End all watches in an orderly way and finish the event in hand. May be repeated."""
        self._over = self._over or problem
        self._wake_watchers()
        await self._tasks.close()
        await self._performing.drain()

    async def _tick(self, tick_ns: int) -> None:
        while True:
            await self._env.sleep_ns(tick_ns)
            try:
                await self.apply(Ticked())
            except EmberfsError as problem:
                if self._over is not None:
                    return
                log.debug("a tick was not carried out: %s", problem)

    async def request(self, event: Event) -> Answer:
        """Apply an event that asks for something. EmberfsError: why it was refused."""
        reply = await self.apply(event)
        self._go_on()
        if isinstance(reply, Refused):
            raise EmberfsError(reply.code, reply.message)
        assert reply is not None
        return reply

    async def apply(self, event: Event) -> Answer | Refused | None:
        """Apply an event and perform its effects.

        The caller may be cancelled while it waits for its turn, not in between: what the machine
        has decided is always carried out, or the term is over.
        """
        arrived_ns = self._env.now_ns()
        await self._lock.acquire()
        try:
            self._go_on()
            work = self._performing.spawn(self._perform(event, arrived_ns), name="mgmtd event")
        except BaseException:
            self._lock.release()
            raise
        self._work = work
        work.add_done_callback(lambda _: self._lock.release())
        outcome = await asyncio.shield(work)
        if isinstance(outcome, EmberfsError):
            raise outcome
        return outcome

    def _go_on(self) -> None:
        """Refuse when the term is over, or must be."""
        if self._over is not None:
            raise EmberfsError(self._over.code, self._over.message)
        self._check()

    async def _perform(
        self, event: Event, arrived_ns: int
    ) -> Answer | Refused | EmberfsError | None:
        """Return an error instead of raising it: the caller may have gone."""
        try:
            return await self._carry_out(event, arrived_ns)
        except EmberfsError as problem:
            # The machine is ahead of the store now.
            self._resign(problem.message)
            return problem
        except asyncio.CancelledError:
            if self._over is None:
                raise
            return EmberfsError(self._over.code, self._over.message)

    async def _carry_out(self, event: Event, arrived_ns: int) -> Answer | Refused | None:
        try:
            effects = self._machine.handle(event, arrived_ns)
        except Exception as problem:
            # Memory and store may differ now: loading again is safe, going on is not.
            log.critical(
                "mgmtd gives up its lead; the last events: %s",
                list(self._machine.story),
                exc_info=problem,
            )
            raise EmberfsError(Code.INTERNAL, "mgmtd has failed, see its log") from problem
        for effect in effects:
            match effect:
                case Persist():
                    await self._persist(effect)
                case Publish(snapshot):
                    self._go_on()
                    self._publish(snapshot)
                case Answer() | Refused():
                    return effect
        return None

    async def _persist(self, effect: Persist) -> None:
        backoff = Backoff(RETRY_FIRST_NS, RETRY_MAX_NS)
        self._persisted += 1
        while True:
            self._check()
            try:
                await self._store.persist(self._record, self._persisted, effect)
                return
            except EmberfsError as problem:
                if problem.code == Code.NOT_PRIMARY:
                    raise
                metrics.PERSIST_FAILURES.inc()
                if self._over is not None:
                    raise
                log.error("the cluster state cannot be stored, trying again: %s", problem)
            await self._env.sleep_ns(backoff.next_ns(self._env.random))

    def _publish(self, snapshot: RoutingSnapshot) -> None:
        _log_changes(self.snapshot, snapshot)
        self.snapshot = snapshot
        metrics.show(snapshot)
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        for event in self._watchers:
            event.set()

    async def watch(self, have_version: int) -> AsyncGenerator[RoutingSnapshot, None]:
        """Yield the newest snapshot whenever it is newer; a slow reader skips those between.

        Ends when mgmtd stops; NOT_PRIMARY when the term is over; TOO_OLD.
        """
        if have_version > self.snapshot.version:
            raise EmberfsError(
                Code.TOO_OLD,
                f"you have seen routing version {have_version}, this mgmtd is at "
                f"{self.snapshot.version}: it has lost its data directory or is not the one of "
                "before",
            )
        event = asyncio.Event()
        self._watchers[event] = None
        metrics.WATCHERS.set(len(self._watchers))
        try:
            while self._over is None:
                if self.snapshot.version > have_version:
                    self._go_on()
                    snapshot = self.snapshot
                    have_version = snapshot.version
                    yield snapshot
                    continue
                event.clear()
                await event.wait()
        finally:
            del self._watchers[event]
            metrics.WATCHERS.set(len(self._watchers))
        if self._over.code != Code.SHUTTING_DOWN:
            raise EmberfsError(self._over.code, self._over.message)


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
        if before is not None and before.lost < chain.lost:
            log.warning("chain %d is back without what it had not flushed", chain_number)


def _describe(chain: Chain) -> str:
    return ", ".join(f"{t.target} {t.state.name.lower()}" for t in chain.targets)
