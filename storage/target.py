"""What a target says of itself, and what a change of its chain means for it [pure].

    event                        before            after
    Opened, data as it was       -                 ONLINE
    Opened, data may be older    -                 DISTRUSTED: reported OFFLINE until the chain has
                                                   it as LASTSRV, OFFLINE or no member; then ONLINE
    chain: SERVING               ONLINE            UPTODATE
    chain: SYNCING               UPTODATE          ONLINE, unless this very chain version completed
    chain: LASTSRV, WAITING,
           OFFLINE, no member    UPTODATE          ONLINE: to be filled again
    SyncCompleted                ONLINE, SYNCING   UPTODATE
    Opened, directory was empty  -                 as before, but never ONLINE while LASTSRV
    DiskFailed                   any               FAILED: OFFLINE with its reason
    Closed                       any               CLOSED: to be opened again, with doubt
    Ticked                       ONLINE, SYNCING   RESTING, if the recovery has not advanced for
                                                   STALL_NS: reported OFFLINE, so that the chain
                                                   goes on without us
    Withdrew                     ONLINE, UPTODATE  RESTING: what we hold must not go further
    Unwanted, for a reason       ONLINE, UPTODATE  RESTING: somebody in the chain cannot reach us,
                                                   or we cannot reach them
    Ticked                       RESTING           ONLINE, once the chain relies on us no more, the
                                                   rest is over and we are wanted: to be filled

A process that was killed and comes back while the chain still has it as SERVING may go on: chains
commit only what every writable member has, so nothing was committed without it. After a power cut,
or with an empty directory in place of the old one, data that the chain relies on may be gone.

`doubtful` is told to mgmtd from such an opening until the target is UPTODATE for the first time: it
was filled, or the chain went on with what it has, and says so (Chain.lost).
"""

from enum import IntEnum

import msgspec

from emberfs.proto.cluster import LocalState, PublicState
from emberfs.proto.ids import SECOND, ChainVersion, TargetId
from emberfs.storage.view import View, absent_view

STALL_NS = 30 * SECOND  # without any progress of our recovery
REST_FIRST_NS = 5 * SECOND  # before the next attempt; doubles with each in a row
REST_MAX_NS = 60 * SECOND


class Opened(msgspec.Struct, frozen=True, gc=False):
    """The store is open. `doubtful`: the data may be older than what was acknowledged."""

    doubtful: bool
    blank: bool = False  # a new directory: must never stand in for what a chain has lost


class RoutingChanged(msgspec.Struct, frozen=True, gc=False):
    """The chain as mgmtd publishes it now."""

    view: View


class SyncCompleted(msgspec.Struct, frozen=True, gc=False):
    """The predecessor says that we hold everything."""

    chain_version: ChainVersion


class SyncHeard(msgspec.Struct, frozen=True, gc=False):
    """The predecessor tells how our recovery goes; `problem`: why it does not advance."""

    chain_version: ChainVersion
    problem: str


class Withdrew(msgspec.Struct, frozen=True, gc=False):
    """Leave the chain for a while: another serving replica has what we have lost."""

    reason: str


class Unwanted(msgspec.Struct, frozen=True, gc=False):
    """mgmtd asks us to leave the chain and to stay outside; empty `reason`: not any more."""

    reason: str


class Ticked(msgspec.Struct, frozen=True, gc=False):
    """Time has passed: about once a second."""


class Closed(msgspec.Struct, frozen=True, gc=False):
    """The store was closed; an attempt to open it follows."""


class DiskFailed(msgspec.Struct, frozen=True, gc=False):
    """The store cannot be opened or trusted any more."""

    reason: str


Event = (
    Opened
    | RoutingChanged
    | SyncCompleted
    | SyncHeard
    | Withdrew
    | Unwanted
    | Ticked
    | Closed
    | DiskFailed
)


class ViewChanged(msgspec.Struct, frozen=True, gc=False):
    """What the chunk machines and the readers have to go by from now on."""

    view: View


class ReportNow(msgspec.Struct, frozen=True, gc=False):
    """Do not wait for the next heartbeat."""


class FinishLeftovers(msgspec.Struct, frozen=True, gc=False):
    """Pending versions without an owner are to be rolled forward."""


Effect = ViewChanged | ReportNow | FinishLeftovers


class Condition(IntEnum):
    """What we know of our own data."""

    CLOSED = 0
    DISTRUSTED = 1
    ONLINE = 2
    UPTODATE = 3
    FAILED = 4
    RESTING = 5


_LOCAL = {
    Condition.CLOSED: LocalState.OFFLINE,
    Condition.DISTRUSTED: LocalState.OFFLINE,
    Condition.ONLINE: LocalState.ONLINE,
    Condition.UPTODATE: LocalState.UPTODATE,
    Condition.FAILED: LocalState.OFFLINE,
    Condition.RESTING: LocalState.OFFLINE,
}
_REASON = {
    Condition.CLOSED: "opening",
    Condition.DISTRUSTED: "data may be older than its chain's; waits to be filled again",
}
_LOST = "its directory is empty, but the chain's last complete replica is expected here"
_RELIES_ON_US = (PublicState.SERVING, PublicState.SYNCING, PublicState.WAITING)


class TargetState:
    """The condition of one target. `handle` alone mutates it."""

    def __init__(self, target: TargetId) -> None:
        self.target = target
        self.condition = Condition.CLOSED
        self.published = absent_view(target)  # as the chain has it
        self.view = absent_view(target)  # the same, or absent while we must not be used
        self.doubtful = False  # what we acknowledged and did not flush may be gone, and is missed
        self.completed_version = ChainVersion(0)  # chain version of the last SyncCompleted
        self._failure = ""
        self._blank = False
        self._advanced_ns = 0  # when our recovery was last known to advance
        self._problem = ""  # what hinders it, as the predecessor says
        self._unwanted = False
        self._rests = 0  # in a row
        self._rest_until_ns = 0

    @property
    def local(self) -> LocalState:
        """What heartbeats say."""
        return _LOCAL[self.condition]

    @property
    def reason(self) -> str:
        """Why we are OFFLINE, in words; empty otherwise."""
        if self._blank and self.published.public == PublicState.LASTSRV:
            return _LOST
        if self.condition in (Condition.FAILED, Condition.RESTING):
            return self._failure
        return _REASON.get(self.condition, "")

    @property
    def sync_problem(self) -> str:
        """Why our recovery does not advance; empty while it does."""
        return self._problem if self.published.public == PublicState.SYNCING else ""

    @property
    def serves(self) -> bool:
        """Whether reads may be answered (lease apart)."""
        return self.condition == Condition.UPTODATE and self.view.serving

    def handle(self, event: Event, now_ns: int) -> list[Effect]:
        """Take one event; effects are to be performed in order."""
        before = self.condition
        match event:
            case Opened():
                if before == Condition.CLOSED:
                    self.doubtful = event.doubtful or event.blank
                    self._blank = event.blank
                    self.condition = Condition.DISTRUSTED if self.doubtful else Condition.ONLINE
            case RoutingChanged():
                if event.view != self.published:
                    self._advanced_ns, self._problem = now_ns, ""
                self.published = event.view
            case SyncCompleted():
                if event.chain_version == self.published.chain_version:
                    self.completed_version = event.chain_version
                    self._rests = 0
            case SyncHeard():
                self._hear(event, now_ns)
            case Withdrew():
                if before in (Condition.ONLINE, Condition.UPTODATE):
                    self._rest(event.reason, now_ns)
            case Unwanted():
                self._unwanted = bool(event.reason)
                if event.reason and before in (Condition.ONLINE, Condition.UPTODATE):
                    self._rest(event.reason, now_ns)
            case Ticked():
                self._tick(now_ns)
            case Closed():
                self.condition = Condition.CLOSED
            case DiskFailed():
                if before != Condition.FAILED:
                    self.condition, self._failure = Condition.FAILED, event.reason
        self.condition = self._settle(self.condition)
        if self.condition == Condition.UPTODATE:
            self.doubtful = False
        effects = self._effects(before)
        if (
            isinstance(event, Ticked)
            and self._owns_leftovers()
            and FinishLeftovers() not in effects
        ):
            effects.append(FinishLeftovers())  # a commit may have failed on a full disk
        return effects

    def _owns_leftovers(self) -> bool:
        return self.view.serving and (self.view.head or self.view.tail_here)

    def _hear(self, event: SyncHeard, now_ns: int) -> None:
        if event.chain_version == self.published.chain_version:
            self._problem = event.problem
            if not event.problem:
                self._advanced_ns = now_ns

    def _tick(self, now_ns: int) -> None:
        public = self.published.public
        filling = self.condition == Condition.ONLINE and public == PublicState.SYNCING
        if filling and now_ns - self._advanced_ns >= STALL_NS:
            why = self._problem or "nobody has sent anything"
            self._rest(f"its recovery does not advance: {why}", now_ns)
        rested = public not in _RELIES_ON_US and now_ns >= self._rest_until_ns
        rested = rested and not self._unwanted
        if self.condition == Condition.RESTING and rested:
            self.condition = Condition.ONLINE

    def _rest(self, reason: str, now_ns: int) -> None:
        rest_ns = min(REST_FIRST_NS << min(self._rests, 8), REST_MAX_NS)
        self._rests += 1
        self._rest_until_ns = now_ns + rest_ns
        self._failure = f"{reason}; tries again in {rest_ns // SECOND} s"
        self.condition = Condition.RESTING

    def _settle(self, condition: Condition) -> Condition:
        public, version = self.published.public, self.published.chain_version
        if condition == Condition.DISTRUSTED and public not in _RELIES_ON_US:
            lost = self._blank and public == PublicState.LASTSRV
            return condition if lost else Condition.ONLINE
        if condition in (Condition.ONLINE, Condition.UPTODATE):
            complete = public == PublicState.SERVING or (
                public == PublicState.SYNCING and self.completed_version == version
            )
            return Condition.UPTODATE if complete else Condition.ONLINE
        return condition

    def _effects(self, before: Condition) -> list[Effect]:
        effects: list[Effect] = []
        usable = self.condition in (Condition.ONLINE, Condition.UPTODATE)
        view = self.published if usable else absent_view(self.target)
        if view != self.view:
            self.view = view
            effects.append(ViewChanged(view))
            if self._owns_leftovers():
                effects.append(FinishLeftovers())
        if self.condition != before:
            effects.append(ReportNow())
        return effects
