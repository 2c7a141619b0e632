"""Which of several mgmtd leads: a lease record in the store that they share.

One machine: `handle(event, now_ns) -> effects`. The record names its holder and a fencing epoch,
and carries a counter that rises with every renewal. Clocks of machines are never compared, and no
wall clock is read:

- A candidate claims the record only after it has itself seen it unchanged for the whole lease, on
  its own clock, counted from when a look at it had ended. The claim is one transaction that fails
  if the record has changed since, and raises the epoch.
- The holder answers only until `answer_ns` after its last acknowledged renewal was started. Every
  renewal changes the record when it takes effect, hence after it was started; so a candidate's
  lease began later than the holder's, and it is longer by the margin. The margin also covers
  clocks that run at different rates.
- A transaction whose outcome is unknown counts as a renewal for the others (the record changed)
  and as none for oneself. Whoever finds a record of its own that it did not know to be its own
  claims anew with the next epoch: it does not answer, so nobody else need be waited for.
- Every write of the primary reads the record in its transaction and fails if it is another's
  (store.py): the epoch fences what was decided before a pause and arrives after it.

`exclusive`: nobody but this process can have the store open (a RocksDB holds a lock file as long as
its process lives), so whoever is recorded is dead, nobody can take over, and nothing is renewed.

Invariants: at most one operation on the store is in hand; of all machines on one store at most one
`may_answer` at any instant; epochs only rise.
"""

from enum import Enum
from typing import TypeAlias

import msgspec

from emberfs.proto.ids import NodeId


class Role(Enum):
    """What this mgmtd is just now."""

    STANDBY = "watches the record"
    CAMPAIGNING = "has asked for the record"
    PRIMARY = "leads"


class LeaseRecord(msgspec.Struct, frozen=True, gc=False):
    """Who leads, as stored."""

    node: NodeId
    incarnation: int  # random per start: two lives of one node are two candidates
    address: str  # for people
    epoch: int
    renewals: int
    lease_ns: int  # the holder's promise not to answer longer without a renewal


class ElectionTiming(msgspec.Struct, frozen=True, gc=False):
    """All in nanoseconds of the local monotonic clock."""

    lease_ns: int

    @property
    def answer_ns(self) -> int:
        """How long after the start of a renewal its holder may answer: a margin of a quarter."""
        return self.lease_ns * 3 // 4

    @property
    def renew_ns(self) -> int:
        """Pause from the start of one renewal to the next, and between looks of a candidate."""
        return self.lease_ns // 5

    @property
    def retry_ns(self) -> int:
        """Pause after an operation without an answer."""
        return self.lease_ns // 10


class Woke(msgspec.Struct, frozen=True, gc=False):
    """Time has passed; the first event of all."""


class Stored(msgspec.Struct, frozen=True, gc=False):
    """The operation in hand has ended: what is stored now, and whether it was written by it."""

    record: LeaseRecord | None
    written: bool


class Unanswered(msgspec.Struct, frozen=True, gc=False):
    """The operation in hand has failed; it may have taken effect, or may still do so."""


class Resigned(msgspec.Struct, frozen=True, gc=False):
    """The primary cannot go on, though its lease runs. Others get a chance first."""

    reason: str


Event: TypeAlias = Woke | Stored | Unanswered | Resigned


class Look(msgspec.Struct, frozen=True, gc=False):
    """Read the record."""


class Claim(msgspec.Struct, frozen=True, gc=False):
    """Replace the record if it still is `expected`."""

    expected: LeaseRecord | None
    record: LeaseRecord


class Renew(msgspec.Struct, frozen=True, gc=False):
    """Raise the counter of the record if it still is of this holder and epoch."""

    record: LeaseRecord


class Lead(msgspec.Struct, frozen=True, gc=False):
    """Load the cluster and answer."""

    record: LeaseRecord


class StepDown(msgspec.Struct, frozen=True, gc=False):
    """Stop answering, at once."""

    reason: str


class Wake(msgspec.Struct, frozen=True, gc=False):
    """Send Woke at this time; replaces the one before."""

    at_ns: int


Effect: TypeAlias = Look | Claim | Renew | Lead | StepDown | Wake
Operation: TypeAlias = Look | Claim | Renew


class Election:
    """One candidate."""

    def __init__(
        self,
        node: NodeId,
        incarnation: int,
        address: str,
        timing: ElectionTiming,
        *,
        exclusive: bool = False,
    ) -> None:
        """`incarnation` must differ between all candidates and between all lives of one."""
        self.role = Role.STANDBY
        self.record: LeaseRecord | None = None  # as last seen; the own one while PRIMARY
        self._own = (node, incarnation, address)
        self._timing = timing
        self._exclusive = exclusive
        self._looked = False
        self._since_ns = 0  # when `record` was seen first
        self._renewed_ns = 0  # when the last acknowledged renewal was started
        self._rest_until_ns = 0  # no claim before
        self._asked: tuple[Operation, int] | None = None  # in hand, and when it was started
        self._due_ns = 0  # when the next operation is to start

    def may_answer(self, now_ns: int) -> bool:
        """Tell whether nobody else can lead yet: to be asked before everything that is sent."""
        if self.role is not Role.PRIMARY:
            return False
        return self._exclusive or now_ns < self._renewed_ns + self._timing.answer_ns

    def handle(self, event: Event, now_ns: int) -> list[Effect]:
        """Apply one event; return what to do, in this order."""
        effects: list[Effect] = []
        match event:
            case Woke():
                pass
            case Stored():
                self._ended(event, now_ns, effects)
            case Unanswered():
                self._asked = None
                if self.role is Role.CAMPAIGNING:
                    self.role = Role.STANDBY
                self._due_ns = now_ns + self._timing.retry_ns
            case Resigned(reason):
                self._rest_until_ns = now_ns + self._timing.lease_ns
                self._step_down(reason, now_ns, effects)
        if self.role is Role.PRIMARY and not self.may_answer(now_ns):
            self._step_down("the lease could not be renewed in time", now_ns, effects)
        self._proceed(now_ns, effects)
        return effects

    def _ended(self, event: Stored, now_ns: int, effects: list[Effect]) -> None:
        """Draw the conclusions from the end of an operation."""
        assert self._asked is not None, "nothing was asked"
        operation, started_ns = self._asked
        self._asked = None
        fresh = self._exclusive or now_ns < started_ns + self._timing.answer_ns
        match operation:
            case Claim() if event.written and fresh and self.role is Role.CAMPAIGNING:
                assert event.record is not None
                self.role = Role.PRIMARY
                self._hold(event.record, started_ns)
                effects.append(Lead(event.record))
            case Renew() if event.written and self.role is Role.PRIMARY:
                assert event.record is not None
                self._hold(event.record, started_ns)
            case _:
                if self.role is Role.PRIMARY:
                    self._step_down("another mgmtd has taken over", now_ns, effects)
                self.role = Role.STANDBY
                self._observe(event.record, now_ns)

    def _hold(self, record: LeaseRecord, started_ns: int) -> None:
        self.record = record
        self._renewed_ns = started_ns
        self._due_ns = started_ns + self._timing.renew_ns

    def _observe(self, record: LeaseRecord | None, now_ns: int) -> None:
        if record != self.record or not self._looked:
            self.record, self._since_ns, self._looked = record, now_ns, True
        self._due_ns = max(now_ns, min(now_ns + self._timing.renew_ns, self._claimable_ns()))

    def _claimable_ns(self) -> int:
        """When the record, unchanged until then, may be claimed."""
        free_ns = self._since_ns
        mine = self.record is not None and self.record.incarnation == self._own[1]
        if not (self.record is None or mine or self._exclusive):
            free_ns += self.record.lease_ns
        return max(free_ns, self._rest_until_ns)

    def _step_down(self, reason: str, now_ns: int, effects: list[Effect]) -> None:
        if self.role is Role.PRIMARY:
            effects.append(StepDown(reason))
        self.role = Role.STANDBY
        self._looked = False  # look at it anew before anything else
        self._due_ns = now_ns

    def _proceed(self, now_ns: int, effects: list[Effect]) -> None:
        """Start the next operation if it is time, and say when to look again."""
        renews = self.role is Role.PRIMARY and not self._exclusive
        idle = self._asked is None and (self.role is Role.STANDBY or renews)
        if idle and now_ns >= self._due_ns:
            operation = self._next(now_ns)
            self._asked = (operation, now_ns)
            effects.append(operation)
            idle = False
        times = [self._due_ns] if idle else []
        if renews:
            times.append(self._renewed_ns + self._timing.answer_ns)
        if times:
            effects.append(Wake(min(times)))

    def _next(self, now_ns: int) -> Operation:
        if self.role is Role.PRIMARY:
            assert self.record is not None
            return Renew(self.record)
        if not self._looked or now_ns < self._claimable_ns():
            return Look()
        self.role = Role.CAMPAIGNING
        node, incarnation, address = self._own
        epoch = self.record.epoch + 1 if self.record is not None else 1
        new = LeaseRecord(node, incarnation, address, epoch, 0, self._timing.lease_ns)
        return Claim(self.record, new)
