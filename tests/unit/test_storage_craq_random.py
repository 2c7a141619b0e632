"""Chains of one to three chunk machines under random interleavings and faults.

Fault model: any message or its answer may be lost; a replica may be killed between any two effects
and come back with what its store held, in time (same chain) or after it was taken out (then it is
filled again from the last serving replica); views reach the replicas at different times.
The chunk's content is the list of writes applied to it: a read tells exactly which writes it saw.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import pytest

from emberfs.proto.cluster import Chain, ChainTarget, PublicState
from emberfs.proto.errors import Code
from emberfs.proto.ids import ChainId, ChainVersion, ChunkId, NodeId, TargetId
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind, UpdateRequest, WriteTag
from emberfs.storage import chunk_events as ev
from emberfs.storage.craq import ChunkMachine
from emberfs.storage.readrule import ABSENT, AGAIN, ReadPlan, plan_read, settle_read
from emberfs.storage.view import View, view_of

CHUNK = ChunkId(bytes(12))
S, Y = PublicState.SERVING, PublicState.SYNCING


class Kept(NamedTuple):
    version: int
    content: tuple[int, ...]
    remembered: tuple[RememberedWrite, ...]


class Waiting(NamedTuple):
    version: int
    kind: UpdateKind
    length: int
    remembered: tuple[RememberedWrite, ...]
    removes: bool


class StateNow(NamedTuple):
    version: int
    length: int
    remembered: tuple[RememberedWrite, ...]
    pending: Waiting | None


@dataclass
class Replica:
    """A store that survives, and a process that does not."""

    target: TargetId
    committed: Kept | None = None
    pending: Kept | None = None
    alive: bool = True
    life: int = 0
    view: View | None = None
    machine: ChunkMachine | None = None
    payloads: dict[int, Any] = field(default_factory=dict)  # key -> (content, answer callback)

    def state(self) -> StateNow | None:
        waiting = None
        if self.pending is not None:
            p = self.pending
            waiting = Waiting(p.version, UpdateKind.WRITE, len(p.content), p.remembered, False)
        if self.committed is None:
            return StateNow(0, 0, (), waiting) if waiting else None
        c = self.committed
        return StateNow(c.version, len(c.content), c.remembered, waiting)


Answer = Callable[[Code | None], None]


class Cluster:
    def __init__(self, seed: int, count: int) -> None:
        self.random = random.Random(seed)
        self.replicas = {TargetId(t): Replica(TargetId(t)) for t in range(1, count + 1)}
        self.chain = Chain(
            ChainId(1),
            ChainVersion(1),
            tuple(ChainTarget(TargetId(t), NodeId(t), S) for t in self.replicas),
        )
        self.steps: list[Callable[[], None]] = []
        self.keys = 0
        self.seen: tuple[int, ...] = ()  # the longest content that any read or answer has shown
        self.quiet = False
        for replica in self.replicas.values():
            replica.view = view_of(self.chain, replica.target)

    def later(self, step: Callable[[], None]) -> None:
        self.steps.append(step)

    def run_one(self) -> None:
        self.steps.pop(self.random.randrange(len(self.steps)))()

    # ---------------------------------------------------- machines and effects

    def feed(self, replica: Replica, event: ev.Event) -> None:
        assert replica.view is not None
        if replica.machine is None:
            replica.machine = ChunkMachine(replica.view, replica.state())
        events = [event]
        while events:
            for effect in replica.machine.handle(events.pop(0), 0):
                if not self.quiet and self.random.random() < 0.002 and self.may_lose(replica):
                    self.kill(replica)
                    return
                follows = self.perform(replica, effect)
                if follows is not None:
                    events.append(follows)
            replica.machine.check()
        if replica.machine.idle:
            replica.machine = None

    def at_life(self, replica: Replica, event: ev.Event) -> None:
        """Deliver an event later, unless the process has died meanwhile."""
        life, machine = replica.life, replica.machine

        def step() -> None:
            if replica.life == life and replica.machine is machine:
                self.feed(replica, event)

        self.later(step)

    def perform(self, replica: Replica, effect: ev.Effect) -> ev.Event | None:
        match effect:
            case ev.Prepare():
                content = self.content_of(replica, effect)
                made = Kept(effect.version, content, effect.remembered)
                if effect.commit:
                    replica.committed, replica.pending = made, None
                    event: ev.Event = ev.Committed(replica.state())
                else:
                    replica.pending = made
                    event = ev.Prepared(replica.state())
                if self.random.random() < 0.5:
                    self.at_life(replica, event)  # as from a thread
                    return None
                return event
            case ev.Commit():
                assert replica.pending is not None
                assert replica.pending.version == effect.version
                replica.committed, replica.pending = replica.pending, None
                return ev.Committed(replica.state())
            case ev.Discard():
                replica.pending = None
                return ev.Discarded(replica.state())
            case ev.Forward():
                self.forward(replica, effect)
            case ev.Pause():
                self.at_life(replica, ev.RetryDue(effect.attempt))
            case ev.Reply():
                self.reply(replica, effect)
            case ev.Granted():
                replica.payloads.pop(effect.key, (None, lambda code: None))[1](None)
        return None

    def payloads_of(self, replica: Replica, key: int) -> Any:
        return replica.payloads.get(key, (None, lambda code: None))

    def reply(self, replica: Replica, effect: ev.Reply) -> None:
        self.payloads_of(replica, effect.key)[1](effect.code)
        replica.payloads.pop(effect.key, None)

    def content_of(self, replica: Replica, effect: ev.Prepare) -> tuple[int, ...]:
        given = replica.payloads[effect.key][0]
        if effect.request.kind == UpdateKind.REPLACE:
            return given
        return (replica.committed.content if replica.committed else ()) + given

    # ---------------------------------------------------- messages

    def forward(self, replica: Replica, effect: ev.Forward) -> None:
        life = replica.life
        if effect.whole or effect.request is None:
            assert replica.pending is not None
            self.keys += 1
            request = replace_request(effect, replica.pending, self.keys)
            content = replica.pending.content
        else:
            content = replica.payloads[effect.key][0]
            request = msgspec.structs.replace(
                effect.request,
                target=effect.successor,
                chain_version=effect.chain_version,
                version=effect.version,
            )

        def answered(code: Code | None) -> None:
            if replica.life == life and replica.machine is not None:
                event = (
                    ev.ForwardAnswered(effect.attempt)
                    if code is None
                    else ev.ForwardFailed(effect.attempt, code, "")
                )
                self.feed(replica, event)

        self.send(effect.successor, request, content, answered)

    def send(
        self, target: TargetId, request: UpdateRequest, content: Any, answered: Answer
    ) -> None:
        """Deliver a request, then its answer; both may be lost, and the sender is told."""
        receiver = self.replicas[target]
        told = False

        def tell(code: Code | None) -> None:
            nonlocal told
            if not told:
                told = True
                self.later(lambda: answered(code))

        def deliver() -> None:
            lossy = not self.quiet and self.random.random() < 0.08
            if not receiver.alive or (lossy and self.random.random() < 0.5):
                tell(Code.DISCONNECTED)
                return
            self.keys += 1
            life, key = receiver.life, self.keys

            def done(code: Code | None) -> None:
                tell(Code.TIMEOUT if lossy else code)

            def died() -> None:
                if receiver.life != life:
                    tell(Code.DISCONNECTED)
                elif not told:
                    self.later(died)

            receiver.payloads[key] = (content, done)
            self.feed(receiver, ev.UpdateArrived(key, request))
            self.later(died)

        self.later(deliver)

    # ---------------------------------------------------- life, death, chain

    def may_lose(self, replica: Replica) -> bool:
        serving = [m.target for m in self.chain.serving() if self.replicas[m.target].alive]
        return replica.alive and (replica.target not in serving or len(serving) > 1)

    def kill(self, replica: Replica) -> None:
        replica.alive = False
        replica.life += 1
        replica.machine = None
        replica.payloads.clear()
        if self.random.random() < 0.5:
            self.later(lambda: self.start(replica))
        else:
            self.later(lambda: self.take_out(replica))

    def start(self, replica: Replica) -> None:
        replica.alive = True
        replica.view = view_of(self.chain, replica.target)
        self.finish_leftover(replica)

    def take_out(self, replica: Replica) -> None:
        members = tuple(m for m in self.chain.targets if m.target != replica.target)
        self.new_chain(members)
        self.later(lambda: self.join(replica))

    def join(self, replica: Replica) -> None:
        if any(m.state == Y for m in self.chain.targets):
            self.later(lambda: self.join(replica))
            return
        replica.alive = True
        member = ChainTarget(replica.target, NodeId(replica.target), Y)
        self.new_chain((*self.chain.targets, member))
        self.later(lambda: self.fill(replica))

    def new_chain(self, members: tuple[ChainTarget, ...]) -> None:
        self.chain = Chain(ChainId(1), ChainVersion(self.chain.version + 1), members)
        for replica in self.replicas.values():
            self.later(lambda replica=replica, chain=self.chain: self.apply(replica, chain))

    def apply(self, replica: Replica, chain: Chain) -> None:
        assert replica.view is not None
        if not replica.alive or chain.version <= replica.view.chain_version:
            return
        replica.view = view_of(chain, replica.target)
        if replica.machine is not None:
            self.feed(replica, ev.RoutingChanged(replica.view))
        self.finish_leftover(replica)

    def finish_leftover(self, replica: Replica) -> None:
        view = replica.view
        assert view is not None
        if replica.pending is not None and view.serving and (view.head or view.tail_here):
            self.keys += 1
            self.feed(replica, ev.ResumeArrived(self.keys))

    def fill(self, replica: Replica) -> None:
        """Recovery of a one-chunk target: under the tail's lock, one replacement."""
        member = self.chain.member(replica.target)
        if member is None or member.state != Y:
            return
        tail = self.replicas[self.chain.tail().target]
        view = tail.view
        again = lambda: self.later(lambda: self.fill(replica))  # noqa: E731
        if (
            not tail.alive
            or not replica.alive
            or view is None
            or view.chain_version != self.chain.version
        ):
            again()
            return
        self.keys += 1
        key, life = self.keys, tail.life

        def finished(code: Code | None) -> None:
            if tail.life == life and tail.machine is not None:
                self.feed(tail, ev.Abandoned(key))
            same = self.chain.version == view.chain_version and tail.life == life
            if code is None and same and replica.alive:
                self.new_chain(tuple(ChainTarget(m.target, m.node, S) for m in self.chain.targets))
            else:
                again()

        def granted(code: Code | None) -> None:
            if code is not None or tail.view != view or tail.life != life:
                finished(Code.CHAIN_VERSION)
            elif tail.committed is None:
                if replica.committed is None and replica.pending is None:
                    finished(None)
                else:
                    replica.committed = replica.pending = None
                    finished(None)
            else:
                effect = ev.Forward(0, None, 0, replica.target, view.chain_version, 0, True)
                request = replace_request(effect, tail.committed, key)
                self.send(replica.target, request, tail.committed.content, finished)

        def died() -> None:
            if tail.life != life:
                again()
            elif key in tail.payloads:
                self.later(died)

        tail.payloads[key] = ((), lambda code: self.later(lambda: granted(code)))
        self.feed(tail, ev.HoldArrived(key))
        self.later(died)

    # ---------------------------------------------------- clients

    def write(self, client: int, sequence: int, done: Callable[[], None]) -> None:
        """Write with retries until it is acknowledged."""
        head = self.chain.head()
        retry = lambda: self.later(lambda: self.write(client, sequence, done))  # noqa: E731

        def answered(code: Code | None) -> None:
            if code is not None:
                assert code != Code.SUPERSEDED
                retry()
                return
            done()

        request = UpdateRequest(
            target=head.target,
            chain_version=self.chain.version,
            chunk=CHUNK,
            kind=UpdateKind.WRITE,
            offset=0,
            length=1,
            tag=WriteTag(client, 0, sequence),
            chunk_bytes=65536,
            checksum=0,
        )
        self.send(head.target, request, (client * 1000 + sequence,), answered)

    def read(self) -> None:
        """Read at a random serving replica; what it shows must extend all that was shown."""
        before = self.seen
        member = self.random.choice(self.chain.serving())
        self.try_read(self.replicas[member.target], before, 30)

    def try_read(self, replica: Replica, before: tuple[int, ...], tries: int) -> None:
        view = replica.view
        if not replica.alive or view is None or not view.serving or not tries:
            return
        again = lambda: self.later(lambda: self.try_read(replica, before, tries - 1))  # noqa: E731
        state = replica.state()
        plan = plan_read(state, self.exposed(replica), view)
        if plan == ReadPlan.COMMITTED:
            self.shown(replica.committed.content if replica.committed else (), before)
        elif plan == ReadPlan.WAIT:
            again()
        else:
            tail = self.replicas[view.tail]
            self.later(lambda: self.ask_tail(replica, tail, view, before, tries, again))

    def exposed(self, replica: Replica) -> bool:
        if replica.machine is not None:
            return replica.machine.exposed
        return replica.pending is not None

    def ask_tail(
        self,
        replica: Replica,
        tail: Replica,
        view: View,
        before: tuple[int, ...],
        tries: int,
        again: Callable[[], None],
    ) -> None:
        theirs = tail.view
        if not tail.alive or theirs is None or theirs.chain_version != view.chain_version:
            again()
            return
        if plan_read(tail.state(), self.exposed(tail), theirs) != ReadPlan.COMMITTED:
            again()
            return
        version = tail.committed.version if tail.committed else 0

        def settle() -> None:
            if not replica.alive or replica.view != view:
                return
            found = settle_read(replica.state(), version)
            if found == AGAIN:
                again()
            elif found == ABSENT:
                self.shown((), before)
            else:
                versions = [k for k in (replica.committed, replica.pending) if k is not None]
                content = next(k.content for k in versions if k.version == found)
                self.shown(content, before)

        self.later(settle)

    def shown(self, content: tuple[int, ...], before: tuple[int, ...]) -> None:
        assert content[: len(before)] == before, f"{content} after {before} was seen"
        longer, shorter = sorted((content, self.seen), key=len, reverse=True)
        assert longer[: len(shorter)] == shorter, f"{content} and {self.seen} were both seen"
        self.seen = longer

    def settle(self) -> None:
        """No more faults: everything must come to rest, with everyone equal."""
        self.quiet = True
        for _ in range(20_000):
            if not self.steps:
                break
            self.run_one()
        assert not self.steps, "never comes to rest"


def replace_request(effect: ev.Forward, kept: Kept, token: int) -> UpdateRequest:
    return UpdateRequest(
        target=effect.successor,
        chain_version=ChainVersion(effect.chain_version),
        chunk=CHUNK,
        kind=UpdateKind.REPLACE,
        offset=0,
        length=len(kept.content),
        tag=WriteTag(999, 0, token),
        chunk_bytes=65536,
        checksum=0,
        version=kept.version,
        remembered=kept.remembered,
    )


def run_history(seed: int, count: int) -> Cluster:
    cluster = Cluster(seed, count)
    acknowledged: list[int] = []

    def client(number: int, sequence: int) -> None:
        def done() -> None:
            acknowledged.append(number * 1000 + sequence)
            if sequence < 12:
                cluster.later(lambda: client(number, sequence + 1))

        cluster.write(number, sequence, done)

    for number in (1, 2, 3):
        client(number, 1)
    for _ in range(1500):
        if not cluster.steps:
            break
        cluster.run_one()
        draw = cluster.random.random()
        if draw < 0.15:
            cluster.read()
        elif draw < 0.16:
            replica = cluster.random.choice(list(cluster.replicas.values()))
            if cluster.may_lose(replica):
                cluster.kill(replica)
    cluster.settle()
    for _ in range(5):
        cluster.read()
        cluster.settle()
    assert len(acknowledged) == 36
    contents = {r.committed.content for r in cluster.replicas.values() if r.committed}
    versions = {r.committed.version for r in cluster.replicas.values() if r.committed}
    assert len(contents) == len(versions) == 1, "replicas differ"
    assert all(r.pending is None for r in cluster.replicas.values())
    (content,) = contents
    assert sorted(content) == sorted(acknowledged), (
        f"lost {set(acknowledged) - set(content)}, twice {len(content) - len(set(content))}"
    )
    return cluster


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("start", range(0, 60, 20))
def test_r1_r2_o7_random_histories(count: int, start: int) -> None:
    """Random histories of a chain with crashes at every step stay linearizable and converge."""
    for seed in range(start, start + 20):
        try:
            run_history(seed, count)
        except BaseException:
            print(f"repeat: run_history(seed={seed}, count={count})")
            raise
