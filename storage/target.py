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
    DiskFailed                   any               FAILED: OFFLINE with its reason, for good

A process that was killed and comes back while the chain still has it as SERVING may go on: chains
commit only what every writable member has, so nothing was committed without it. After a power cut,
or with an empty directory in place of the old one, data that the chain relies on may be gone.
"""

from enum import IntEnum

import msgspec

from emberfs.proto.cluster import LocalState, PublicState
from emberfs.proto.ids import ChainVersion, TargetId
from emberfs.storage.view import View, absent_view


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


class DiskFailed(msgspec.Struct, frozen=True, gc=False):
    """The store cannot be opened or trusted any more."""

    reason: str


Event = Opened | RoutingChanged | SyncCompleted | DiskFailed


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


_LOCAL = {
    Condition.CLOSED: LocalState.OFFLINE,
    Condition.DISTRUSTED: LocalState.OFFLINE,
    Condition.ONLINE: LocalState.ONLINE,
    Condition.UPTODATE: LocalState.UPTODATE,
    Condition.FAILED: LocalState.OFFLINE,
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
        self.completed_version = ChainVersion(0)  # chain version of the last SyncCompleted
        self._failure = ""
        self._blank = False

    @property
    def local(self) -> LocalState:
        """What heartbeats say."""
        return _LOCAL[self.condition]

    @property
    def reason(self) -> str:
        """Why we are OFFLINE, in words; empty otherwise."""
        if self._blank and self.published.public == PublicState.LASTSRV:
            return _LOST
        return self._failure or _REASON.get(self.condition, "")

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
                    doubtful = event.doubtful or event.blank
                    self._blank = event.blank
                    self.condition = Condition.DISTRUSTED if doubtful else Condition.ONLINE
            case RoutingChanged():
                self.published = event.view
            case SyncCompleted():
                if event.chain_version == self.published.chain_version:
                    self.completed_version = event.chain_version
            case DiskFailed():
                if before != Condition.FAILED:
                    self.condition, self._failure = Condition.FAILED, event.reason
        self.condition = self._settle(self.condition)
        return self._effects(before)

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
            if view.serving and (view.head or view.tail_here):
                effects.append(FinishLeftovers())
        if self.condition != before:
            effects.append(ReportNow())
        return effects
