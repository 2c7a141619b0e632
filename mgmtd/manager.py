"""A management service without its network: standby, campaigning, primary, standby, for ever.

The shell around Election: performs its operations on the shared store and wakes it in time; while
it leads, a Term answers. Knows nothing of gRPC; the simulator calls it directly.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator

from emberfs.kv.keys import Prefix
from emberfs.kv.transactions import Transactions
from emberfs.mgmtd import metrics
from emberfs.mgmtd.election import (
    Claim,
    Election,
    ElectionTiming,
    Event,
    Lead,
    LeaseRecord,
    Look,
    Operation,
    Renew,
    Resigned,
    Role,
    StepDown,
    Unanswered,
    Wake,
    Woke,
)
from emberfs.mgmtd.events import Answer, Timing
from emberfs.mgmtd.events import Event as Request
from emberfs.mgmtd.membership import Membership
from emberfs.mgmtd.store import ClusterStore, not_primary
from emberfs.mgmtd.term import Term
from emberfs.proto.cluster import EMPTY_ROUTING, ClusterId, Node, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.mgmtd.manager")


class Manager:
    """One of the mgmtd that share a store. Whoever made the engine closes it, after `close`."""

    def __init__(
        self,
        env: Env,
        engine: Transactions,
        cluster: str,
        own: Node,
        timing: Timing,
        *,
        exclusive: bool = False,
        prefix: bytes = bytes(Prefix.MGMTD.value),
    ) -> None:
        """`own.incarnation` must be new. `exclusive`: see election.py. `prefix`: of the keys."""
        self.timing = timing
        self.cluster = cluster
        self._last = EMPTY_ROUTING  # of earlier terms
        self._env = env
        self._own = own
        self._store = ClusterStore(engine, cluster, prefix)
        self._exclusive = exclusive
        address = own.endpoints[0].removeprefix("grpc://") if own.endpoints else ""
        self._election_timing = ElectionTiming(timing.election_lease_ns)
        self._election = Election(
            own.id, own.incarnation, address, self._election_timing, exclusive=exclusive
        )
        self._identity = env.random.getrandbits(63) | 1  # if the cluster has none yet
        self._term: Term | None = None
        self._ending: list[Term] = []
        self._wake_ns: int | None = None
        self._rescheduled = asyncio.Event()
        self._started: asyncio.Future[None] | None = None  # while `start` waits
        self._tasks = TaskSet()
        self._closed = False

    @property
    def snapshot(self) -> RoutingSnapshot:
        """The last one that this mgmtd has published; for people and tests, it may be old."""
        current = self._term.snapshot if self._term is not None else EMPTY_ROUTING
        return current if current.version else self._last

    @property
    def leads(self) -> bool:
        """Tell whether this mgmtd answers just now."""
        return self._ready() is not None

    async def start(self) -> None:
        """Begin to stand for election; with `exclusive` return as primary.

        EmberfsError: WRONG_CLUSTER if the store belongs to another; with `exclusive` also whatever
        the store says. A shared store that does not answer is waited for in the background.
        """
        try:
            await self._store.look()
        except EmberfsError as problem:
            if self._exclusive or problem.code == Code.WRONG_CLUSTER:
                raise
            log.warning("the store does not answer yet: %s", problem)
        if self._exclusive:
            self._started = asyncio.get_running_loop().create_future()
        self._handle(Woke())
        self._tasks.spawn(self._keep_time(), name="mgmtd election")
        if self._started is not None:
            await self._started

    async def close(self) -> None:
        """End all watches, finish the event in hand, stop campaigning. May be repeated."""
        self._closed = True
        await self._tasks.close()
        problem = EmberfsError(Code.SHUTTING_DOWN, "mgmtd stops")
        for term in [*self._ending, *([self._term] if self._term else [])]:
            await term.close(problem)
        metrics.LEADS.set(0)

    async def stored_identity(self) -> int:
        """Return the identity that the store holds, 0 if none."""
        return await self._store.identity()

    # What clients ask.

    def check_cluster(self, asked: ClusterId) -> None:
        """Refuse who means another cluster. WRONG_CLUSTER."""
        known = ClusterId(self.cluster, self.snapshot.identity)
        if asked.differs(known):
            raise EmberfsError(
                Code.WRONG_CLUSTER,
                f"this mgmtd manages cluster {known.beside(asked)}, not {asked.beside(known)}; "
                'correct "cluster" or the address of mgmtd',
            )

    async def request(self, event: Request) -> Answer:
        """Apply an event that asks for something. EmberfsError: why it was refused."""
        return await self._leading().request(event)

    def watch(self, have_version: int) -> AsyncGenerator[RoutingSnapshot, None]:
        """Yield the newest snapshot whenever it is newer; see Term.watch. NOT_PRIMARY at once."""
        return self._leading().watch(have_version)

    def _leading(self) -> Term:
        term = self._ready()
        if term is None:
            self._check()
            raise self._not_primary()
        return term

    def _ready(self) -> Term | None:
        term = self._term
        may_answer = self._election.may_answer(self._env.now_ns())
        return term if term is not None and term.snapshot.version and may_answer else None

    def _check(self) -> None:
        """Raise unless this mgmtd is the primary for certain."""
        if self._closed:
            raise EmberfsError(Code.SHUTTING_DOWN, "mgmtd stops")
        if not self._election.may_answer(self._env.now_ns()):
            raise self._not_primary()

    def _not_primary(self) -> EmberfsError:
        return EmberfsError(Code.NOT_PRIMARY, not_primary(self._own.id, self._election.record))

    # The election.

    async def _keep_time(self) -> None:
        while True:
            self._rescheduled.clear()
            at_ns = self._wake_ns
            pause_ns = None if at_ns is None else at_ns - self._env.now_ns()
            if pause_ns is not None and pause_ns <= 0:
                self._wake_ns = None
                self._handle(Woke())
                continue
            try:
                async with asyncio.timeout(None if pause_ns is None else pause_ns / SECOND):
                    await self._rescheduled.wait()
            except TimeoutError:
                pass

    def _handle(self, event: Event) -> None:
        if self._closed:
            return
        for effect in self._election.handle(event, self._env.now_ns()):
            match effect:
                case Look() | Claim() | Renew():
                    self._tasks.spawn(self._operate(effect), name="mgmtd lease")
                case Lead(record):
                    self._lead(record)
                case StepDown(reason):
                    self._step_down(reason)
                case Wake(at_ns):
                    self._wake_ns = at_ns
                    self._rescheduled.set()

    async def _operate(self, operation: Operation) -> None:
        """Carry out an operation on the lease record; it always ends, by an answer or by time."""
        outcome: Event = Unanswered()
        try:
            async with asyncio.timeout(self._election_timing.lease_ns / SECOND):
                match operation:
                    case Look():
                        outcome = await self._store.look()
                    case Claim(expected, record):
                        outcome = await self._store.claim(expected, record, self._identity)
                    case Renew(record):
                        outcome = await self._store.renew(record)
        except EmberfsError as problem:
            self._fail_start(problem)
            log.warning("the lease record cannot be reached: %s", problem)
        except TimeoutError:
            log.warning("the lease record cannot be reached: the store does not answer")
        except Exception:
            log.exception("an operation on the lease record failed")
        self._handle(outcome)

    def _lead(self, record: LeaseRecord) -> None:
        log.info("mgmtd %d leads, epoch %d", self._own.id, record.epoch)
        metrics.TERMS.inc()
        machine = Membership(self.cluster, self._own, self.timing)
        self._term = Term(self._env, self._store, record, machine, self._check, self._resign)
        self._tasks.spawn(self._begin(self._term), name="mgmtd term begins")

    async def _begin(self, term: Term) -> None:
        try:
            await term.begin(self.timing.tick_ns)
        except EmberfsError as problem:
            if not self._fail_start(problem):
                log.error("the cluster cannot be loaded: %s", problem)
            if term is self._term:
                self._resign(problem.message)
            return
        metrics.LEADS.set(1)
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _fail_start(self, problem: EmberfsError) -> bool:
        """Tell `start`, if it still waits."""
        if self._started is None or self._started.done():
            return False
        self._started.set_exception(problem)
        return True

    def _resign(self, reason: str) -> None:
        if self._election.role is Role.PRIMARY:
            self._handle(Resigned(reason))

    def _step_down(self, reason: str) -> None:
        term, self._term = self._term, None
        assert term is not None
        if term.snapshot.version:
            self._last = term.snapshot
        log.warning("mgmtd %d does not lead any more: %s", self._own.id, reason)
        metrics.LEADS.set(0)
        self._ending.append(term)
        term.end(
            EmberfsError(Code.NOT_PRIMARY, f"mgmtd {self._own.id} has lost its lead: {reason}")
        )
        self._tasks.spawn(self._bury(term), name="mgmtd term is over")

    async def _bury(self, term: Term) -> None:
        await term.close(self._not_primary())
        self._ending.remove(term)
