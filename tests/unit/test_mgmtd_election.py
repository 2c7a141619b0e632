"""Election machines against each other: stalls, drifting clocks, lost and late transactions.

Fault model: a clock runs up to 5 % fast or slow and stands nowhere in particular; a machine may
stall for several leases; an operation takes effect once, at any time within some leases after it
was asked, also after its sender has given it up, and its answer may be lost or late.
"""

import heapq
import random
from collections.abc import Callable
from itertools import count

import msgspec
import pytest

from emberfs.mgmtd.election import (
    Claim,
    Effect,
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
    Stored,
    Unanswered,
    Wake,
    Woke,
)
from emberfs.proto.ids import MS, SECOND, NodeId

TIMING = ElectionTiming(lease_ns=2 * SECOND)


class Register:
    """The lease record in the store; operations on it are atomic."""

    def __init__(self) -> None:
        self.record: LeaseRecord | None = None
        self.epochs: list[int] = []

    def perform(self, operation: Operation) -> Stored:
        stored = self.record
        match operation:
            case Look():
                return Stored(stored, written=False)
            case Claim(expected, record):
                if stored != expected:
                    return Stored(stored, written=False)
                self.epochs.append(record.epoch)
                self.record = record
            case Renew(record):
                mine = (record.epoch, record.incarnation)
                if stored is None or (stored.epoch, stored.incarnation) != mine:
                    return Stored(stored, written=False)
                self.record = msgspec.structs.replace(stored, renewals=stored.renewals + 1)
        return Stored(self.record, written=True)


class Machine:
    """One candidate with a clock of its own."""

    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.offset_ns = world.random.randrange(10**15)
        self.rate = world.random.uniform(0.95, 1.05)
        self.election = Election(NodeId(number), world.random.getrandbits(60), "a", TIMING)
        self.stalled_until_ns = 0
        self.wakes = 0

    def clock(self) -> int:
        return self.offset_ns + int(self.world.now_ns * self.rate)

    def answers(self) -> bool:
        return self.election.may_answer(self.clock())

    def handle(self, event: Event) -> None:
        """Take an event, later if the machine stands still."""
        if self.world.now_ns < self.stalled_until_ns:
            self.world.at(self.stalled_until_ns, lambda: self.handle(event))
            return
        was = self.answers()
        effects = self.election.handle(event, self.clock())
        for effect in effects:
            self.perform(effect)
        if not was and self.answers():
            self.world.leads += 1

    def perform(self, effect: Effect) -> None:
        match effect:
            case Look() | Claim() | Renew():
                self.world.operate(self, effect)
            case Wake(at_ns):
                self.wakes += 1
                mine = self.wakes
                pause_ns = int((at_ns - self.clock()) / self.rate) + 1
                self.world.at(self.world.now_ns + max(pause_ns, 0), lambda: self.ring(mine))
            case Lead() | StepDown():
                pass

    def ring(self, mine: int) -> None:
        if mine == self.wakes:
            self.handle(Woke())


class World:
    """Real time, the store, and everything that is on its way."""

    def __init__(self, seed: int, machines: int, *, faults: bool) -> None:
        self.random = random.Random(seed)
        self.now_ns = 0
        self.faults = faults
        self.leads = 0
        self.register = Register()
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self.machines = [Machine(self, number) for number in range(1, machines + 1)]
        for machine in self.machines:
            machine.handle(Woke())

    def at(self, time_ns: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time_ns, next(self._order), action))

    def operate(self, machine: Machine, operation: Operation) -> None:
        """Let it take effect some time; tell its sender, in time or not, the truth or nothing."""
        slow = self.faults and self.random.random() < 0.15
        lost = self.faults and self.random.random() < 0.15
        limit_ns = 5 * SECOND if slow else 20 * MS
        effect_ns = self.now_ns + self.random.randrange(limit_ns)
        answer_ns = effect_ns + self.random.randrange(limit_ns)
        give_up_ns = self.now_ns + TIMING.lease_ns
        told: list[Stored] = []
        self.at(effect_ns, lambda: told.append(self.register.perform(operation)))
        if lost or answer_ns > give_up_ns:
            self.at(give_up_ns, lambda: machine.handle(Unanswered()))
        else:
            self.at(answer_ns, lambda: machine.handle(told[0]))

    def run(self, seconds: float) -> None:
        end_ns = self.now_ns + int(seconds * SECOND)
        while self._queue and self._queue[0][0] <= end_ns:
            time_ns, _, action = heapq.heappop(self._queue)
            self.now_ns = max(self.now_ns, time_ns)
            self.check()
            action()
            self.check()
            if self.faults and self.random.random() < 0.01:
                machine = self.random.choice(self.machines)
                if self.random.random() < 0.3:
                    if machine.election.role is Role.PRIMARY:
                        machine.handle(Resigned("a test"))
                else:
                    pause_ns = self.random.randrange(3 * TIMING.lease_ns)
                    machine.stalled_until_ns = self.now_ns + pause_ns
        self.now_ns = end_ns
        self.check()

    def check(self) -> None:
        assert sum(machine.answers() for machine in self.machines) <= 1
        epochs = self.register.epochs
        assert epochs[-2:] == sorted(set(epochs[-2:])), "epochs rise"


@pytest.mark.parametrize("machines", [1, 2, 3, 5])
def test_never_two_that_may_answer_and_always_one_in_the_end(machines: int) -> None:
    """In no history do two mgmtd answer at once; when faults stop, one leads within a bound."""
    terms = 0
    for seed in range(60):
        world = World(seed, machines, faults=True)
        world.run(60)
        world.faults = False
        world.run(10)  # what is still on its way: stalls of 6 s, late effects
        world.run(2 * TIMING.lease_ns / SECOND)
        assert any(machine.answers() for machine in world.machines), f"seed {seed}"
        terms += world.leads
    assert terms > 60 * 2, "the histories are too quiet to prove anything"


def test_without_faults_the_first_leads_for_ever() -> None:
    world = World(1, 3, faults=False)
    world.run(600)
    assert world.leads == 1
    assert world.register.epochs == [1]


def test_a_dead_primary_is_replaced_after_its_lease() -> None:
    world = World(2, 2, faults=False)
    world.run(5)
    dead = next(m for m in world.machines if m.answers())
    other = next(m for m in world.machines if m is not dead)
    dead.stalled_until_ns = 10**18
    world.run(1.0)
    assert not other.answers()
    world.run(1.6)
    assert other.answers()
    assert world.register.epochs == [1, 2]


def test_an_exclusive_store_is_led_at_once_and_not_renewed() -> None:
    dead = LeaseRecord(NodeId(1), 5, "a", 7, 3, 3600 * SECOND)
    election = Election(NodeId(1), 6, "a", TIMING, exclusive=True)
    assert election.handle(Woke(), 0) == [Look()]
    (claim,) = election.handle(Stored(dead, written=False), 1)
    assert isinstance(claim, Claim)
    assert (claim.expected, claim.record.epoch) == (dead, 8)
    assert election.handle(Stored(claim.record, written=True), 2) == [Lead(claim.record)]
    assert election.may_answer(10**18)
    stepping, looking = election.handle(Resigned("x"), 10)
    assert (type(stepping), type(looking)) == (StepDown, Look)


def test_the_record_of_an_own_claim_without_an_answer_is_claimed_anew() -> None:
    """A claim that took effect unheard must not count from its repetition: its lease runs."""
    election = Election(NodeId(1), 6, "a", TIMING)
    election.handle(Woke(), 0)
    claim = election.handle(Stored(None, written=False), 1)[0]
    assert isinstance(claim, Claim)
    retry_ns = 1 + TIMING.retry_ns
    assert election.handle(Unanswered(), 1) == [Wake(retry_ns)]
    assert election.handle(Woke(), retry_ns) == [claim]
    (again,) = election.handle(Stored(claim.record, written=False), retry_ns + 5)
    assert isinstance(again, Claim)
    assert not election.may_answer(retry_ns + 5)
    assert (again.expected, again.record.epoch) == (claim.record, 2)
