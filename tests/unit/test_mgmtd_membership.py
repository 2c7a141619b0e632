"""Stories of nodes that come, go, return and lie, on virtual time."""

import random

import msgspec
import pytest

from emberfs.mgmtd.events import (
    Answer,
    ChainsRequested,
    Effect,
    Event,
    HeartbeatArrived,
    Loaded,
    Persist,
    Publish,
    Refused,
    Registered,
    Ticked,
    Timing,
)
from emberfs.mgmtd.membership import Membership
from emberfs.proto.cluster import (
    LocalState,
    Node,
    NodeKind,
    PublicState,
    RoutingSnapshot,
    TargetReport,
)
from emberfs.proto.errors import Code
from emberfs.proto.ids import MS, SECOND, ChainId, ChainVersion, NodeId, RoutingVersion, TargetId

S, L, Y, W, O = PublicState  # noqa: E741
UP, ON, OFF = LocalState
TIMING = Timing(lease_ns=5 * SECOND, heartbeat_ns=SECOND)
OWN = Node(NodeId(900), NodeKind.MGMTD, "m", ("grpc://x",), 1, True)
TARGETS = tuple(TargetId(n * 100 + 1) for n in (1, 2, 3))


def storage(number: int, incarnation: int = 1, host: str = "") -> Node:
    where = host or f"host{number}"
    endpoints = (f"tcp://{where}:9",)
    return Node(NodeId(number), NodeKind.STORAGE, where, endpoints, incarnation, True)


def client(number: int) -> Node:
    return Node(NodeId(number), NodeKind.CLIENT, "c", (), 1, True, client=(1 << 40) + number)


def report(target: int, local: LocalState = UP, version: int = 0, used: int = 0) -> TargetReport:
    return TargetReport(TargetId(target), local, ChainVersion(version), used, 1000)


class World:
    """A machine, its clock, what it has stored, and what it has published."""

    def __init__(self, loaded: Loaded | None = None, start_ns: int = 10**15) -> None:
        self.now_ns = start_ns
        self.machine = Membership("c", OWN, TIMING)
        self.nodes: dict[NodeId, Node] = {}
        self.persisted: list[Persist] = []
        self.published: list[RoutingSnapshot] = []
        self.stored = loaded or Loaded()
        self.send(self.stored)

    def send(self, event: Event) -> Answer | Refused | None:
        effects = self.machine.handle(event, self.now_ns)
        self.machine.check()
        return self._perform(effects)

    def _perform(self, effects: list[Effect]) -> Answer | Refused | None:
        kinds = [(Persist, Publish, Answer, Refused).index(type(e)) for e in effects]
        assert kinds == sorted(kinds), "stored before published before answered"
        reply = None
        for effect in effects:
            match effect:
                case Persist():
                    self.persisted.append(effect)
                    self._store(effect)
                case Publish(snapshot):
                    assert not self.published or snapshot.version > self.now.version
                    assert snapshot.version <= self.stored.reserved, "reserved before it is used"
                    self.published.append(snapshot)
                case Answer() | Refused():
                    assert reply is None
                    reply = effect
        if self.published:
            chains = {c.id: c for c in self.stored.chains}
            assert chains == self.now.chains, "what is published is what is stored"
        return reply

    def _store(self, effect: Persist) -> None:
        nodes = {n.id: n for n in self.stored.nodes} | {n.id: n for n in effect.nodes}
        chains = {c.id: c for c in self.stored.chains} | {c.id: c for c in effect.chains}
        for number in effect.dropped:
            del nodes[number]
        if effect.chains:
            assert effect.durable
        reserved = effect.reserved or self.stored.reserved
        self.stored = Loaded(tuple(nodes.values()), tuple(chains.values()), reserved, 5 * SECOND)

    @property
    def now(self) -> RoutingSnapshot:
        return self.published[-1]

    def states(self, chain: int = 1) -> list[tuple[int, PublicState]]:
        return [(m.node, m.state) for m in self.now.chains[ChainId(chain)].targets]

    def version(self, chain: int = 1) -> int:
        return self.now.chains[ChainId(chain)].version

    def register(self, node: Node, *reports: TargetReport) -> Answer | Refused | None:
        return self.send(Registered(node, reports))

    def beat(self, node: int, *reports: TargetReport, incarnation: int = 1) -> object:
        return self.send(HeartbeatArrived(NodeId(node), NodeKind.STORAGE, incarnation, reports))

    def run(self, seconds: float, *beating: int, local: LocalState = UP) -> None:
        """Let time pass while the storage nodes `beating` send heartbeats."""
        end_ns = self.now_ns + int(seconds * SECOND)
        beats = 0
        while self.now_ns < end_ns:
            self.now_ns += TIMING.tick_ns
            self.send(Ticked())
            beats += 1
            if beats % 4 == 0:
                for node in beating:
                    version = self.version() if self.now.chains else 0
                    self.beat(node, report(node * 100 + 1, local, version))

    def restarted(self) -> "World":
        return World(self.stored, self.now_ns + SECOND)


def three() -> World:
    """Three storage nodes with one chain over all."""
    world = World()
    for number in (1, 2, 3):
        assert isinstance(world.register(storage(number), report(number * 100 + 1)), Answer)
    answer = world.send(ChainsRequested(((ChainId(1), TARGETS),)))
    assert isinstance(answer, Answer)
    assert answer.created == (ChainId(1),)
    assert answer.version == world.now.version
    return world


def test_new_chain_serves() -> None:
    world = three()
    assert world.states() == [(1, S), (2, S), (3, S)]
    assert world.now.nodes[OWN.id] == OWN
    assert world.now.targets[TARGETS[0]].chain == 1


def test_node_dies_after_a_lease_and_not_before() -> None:
    world = three()
    world.run(4.75, 2, 3)
    assert world.states() == [(1, S), (2, S), (3, S)]
    world.run(0.5, 2, 3)
    assert world.states() == [(2, S), (3, S), (1, O)]
    assert not world.now.nodes[NodeId(1)].alive
    assert "node 1" in world.now.targets[TARGETS[0]].report.reason


def test_returning_node_is_filled_and_serves_again() -> None:
    world = three()
    world.run(6, 2, 3)
    version = world.version()
    world.beat(1, report(101, UP, 1))  # SIGSTOP past the lease: an old UPTODATE
    assert world.states() == [(2, S), (3, S), (1, Y)]
    assert world.version() == version + 1
    world.beat(1, report(101, UP, version))
    assert world.states() == [(2, S), (3, S), (1, Y)], "decided on an older chain"
    world.beat(1, report(101, UP, version + 1))
    assert world.states() == [(2, S), (3, S), (1, S)]


def test_r5_fast_restart_keeps_serving() -> None:
    """A restart within the lease costs no replica its state."""
    world = three()
    version = world.version()
    world.now_ns += 100 * MS
    assert isinstance(world.register(storage(1, 2), report(101, ON)), Answer)
    assert world.version() == version
    old = world.beat(1, report(101, UP, 1), incarnation=1)
    assert isinstance(old, Refused)
    assert old.code == Code.NOT_REGISTERED
    again = world.register(storage(1, 1), report(101))
    assert isinstance(again, Refused)
    assert again.code == Code.NODE_ID_TAKEN, "two live processes must not take turns"


def test_restart_without_reports_keeps_targets_for_a_lease() -> None:
    world = three()
    world.register(storage(1, 2))
    assert world.states() == [(1, S), (2, S), (3, S)]
    for _ in range(6):
        world.now_ns += SECOND
        for node in (2, 3):
            world.beat(node, report(node * 100 + 1, UP, world.version()))
        world.beat(1, incarnation=2)
        world.send(Ticked())
    assert world.states() == [(2, S), (3, S), (1, O)], "it does not have the target"


def test_other_host_must_wait_for_the_lease() -> None:
    world = three()
    refused = world.register(storage(1, 9, "elsewhere"), report(101))
    assert isinstance(refused, Refused)
    assert refused.code == Code.NODE_ID_TAKEN
    world.run(6, 2, 3)
    assert isinstance(world.register(storage(1, 9, "elsewhere"), report(101, ON)), Answer)
    assert world.states() == [(2, S), (3, S), (1, Y)]


def test_longer_lease_of_before_is_honoured() -> None:
    stored = msgspec.structs.replace(three().stored, lease_ns=20 * SECOND)
    again = World(stored, 10**16)
    again.run(19.5)
    assert again.states() == [(1, S), (2, S), (3, S)], "they may still believe in 20 s"
    again.run(1)
    assert again.states() == [(1, L), (2, L), (3, L)]


def test_new_incarnation_is_believed_when_it_has_lost_its_data() -> None:
    world = three()
    world.beat(2, report(201, OFF, 1))
    world.register(storage(1, 2), report(101, OFF, 1))  # an older version, but nothing is better
    assert world.states() == [(3, S), (2, O), (1, O)]


def test_late_node_registers_with_the_same_words() -> None:
    world = three()
    world.run(6, 2, 3)
    world.register(storage(1), report(101))
    assert world.states() == [(2, S), (3, S), (1, Y)]


def test_after_a_power_cut_hosts_may_have_new_names() -> None:
    again = three().restarted()
    assert isinstance(again.register(storage(1, 9, "renamed"), report(101, ON)), Answer)
    assert again.states() == [(1, S), (2, S), (3, S)]
    again.beat(2, report(201))
    refused = again.register(storage(2, 9, "elsewhere"), report(201))
    assert isinstance(refused, Refused), "but who has been heard is alive"


def test_r7_total_outage_any_replica_returns_first() -> None:
    """When all replicas died at once, any of them may return first."""
    for first in (1, 2, 3):
        world = three()
        world.run(6)
        assert world.states() == [(1, L), (2, L), (3, L)]
        world.register(storage(first, 2), report(first * 100 + 1, ON))
        others = [n for n in (1, 2, 3) if n != first]
        assert world.states() == [(first, S), *((n, O) for n in others)]
        for other in others:
            world.register(storage(other, 2), report(other * 100 + 1, ON))
        world.run(3, first)
        for _ in range(3):
            for place in world.now.chains[ChainId(1)].targets:
                local = UP if place.state in (S, Y) else ON
                number = 1 if place.node == first else 2
                world.beat(place.node, report(place.target, local, world.version()), incarnation=2)
                del number
        assert sorted(world.states()) == [(1, S), (2, S), (3, S)]


def doubtful(target: int, local: LocalState = ON, version: int = 0) -> TargetReport:
    return msgspec.structs.replace(report(target, local, version), doubtful=True)


@pytest.mark.parametrize("power", [True, False])
def test_r12_the_loss_of_a_chain_is_stored_published_and_kept(power: bool) -> None:
    """The first replica to return says whether it lost what it had not flushed."""
    world = three()
    world.run(6)
    assert world.states() == [(1, L), (2, L), (3, L)]
    ready = doubtful(201) if power else report(201, ON)
    world.register(storage(2, 2), ready)
    lost = world.version() if power else 0
    assert (world.states()[0], world.now.chains[ChainId(1)].lost) == ((2, S), lost)
    world.register(storage(1, 2), doubtful(101))
    world.beat(2, report(201, UP, world.version()), incarnation=2)
    assert world.version() > lost
    for later in (world, world.restarted()):
        assert later.now.chains[ChainId(1)].lost == lost, "who is filled changes nothing"


def test_r12_a_replica_that_lost_power_beside_others_is_no_loss() -> None:
    world = three()
    world.register(storage(3, 2), doubtful(301, OFF))
    world.beat(3, doubtful(301, ON, world.version()), incarnation=2)
    assert dict(world.states())[3] == Y
    assert world.now.chains[ChainId(1)].lost == 0


def test_r7_last_one_standing_holds_the_chain() -> None:
    """A replica that missed writes does not serve before the last one that took them."""
    world = three()
    world.run(6, 2, 3)
    world.run(6, 3)
    world.run(6)
    assert world.states()[0] == (3, L)
    world.register(storage(1, 2), report(101, ON))
    world.register(storage(2, 2), report(201, ON))
    assert (3, L) in world.states(), "who missed writes must not bring the chain back"
    assert S not in dict(world.states()).values()
    world.register(storage(3, 2), report(301, ON))
    assert dict(world.states())[3] == S
    assert sorted(dict(world.states()).values()) == [S, Y, W]


def test_target_asks_for_recovery() -> None:
    world = three()
    world.beat(1, report(101, OFF, 1))
    assert world.states() == [(2, S), (3, S), (1, O)]
    world.beat(1, report(101, ON, 2))
    assert world.states() == [(2, S), (3, S), (1, Y)]
    world.beat(1, report(101, OFF, 1))
    assert world.states() == [(2, S), (3, S), (1, Y)], "an old OFFLINE, arrived late"
    world.beat(1, report(101, OFF, world.version()))
    assert world.states() == [(2, S), (3, S), (1, O)]


def test_r1_r7_stubborn_old_offline_is_believed_in_the_end() -> None:
    """A target that insists on being offline does not hold its chain for ever."""
    world = three()
    world.beat(2, report(201, OFF, 1))
    version = world.version()
    for _ in range(7):
        world.now_ns += SECOND
        world.beat(1, report(101, OFF, 1))
        world.beat(3, report(301, UP, version))
        world.beat(2, report(201, OFF, 1))
        world.send(Ticked())
    assert world.states() == [(3, S), (2, O), (1, O)]


def test_r4_restart_keeps_chains_and_versions_rise() -> None:
    """A restart of mgmtd keeps the chains, and versions rise."""
    world = three()
    world.run(2, 1, 2, 3)
    before = world.now
    again = world.restarted()
    assert again.published[0].version > before.version
    assert again.now.chains == before.chains
    assert again.now.nodes == before.nodes
    again.run(4.75)
    assert again.states() == [(1, S), (2, S), (3, S)], "no verdict before a full lease"
    again.run(0.5)
    assert again.states() == [(1, L), (2, L), (3, L)]


def test_restart_of_mgmtd_needs_no_new_registration() -> None:
    again = three().restarted()
    version = again.version()
    again.run(10, 1, 2, 3)
    assert again.version() == version


def test_missing_node_after_restart_is_declared_dead() -> None:
    again = three().restarted()
    again.run(6, 2, 3)
    assert again.states() == [(2, S), (3, S), (1, O)]


def test_r10_own_pause_kills_nobody() -> None:
    """A mgmtd that was paused itself declares nobody dead for it."""
    world = three()
    world.run(1, 1, 2, 3)
    world.now_ns += 60 * SECOND
    world.send(Ticked())
    assert world.states() == [(1, S), (2, S), (3, S)]
    world.run(4.5)
    assert world.states() == [(1, S), (2, S), (3, S)]
    world.run(1)
    assert world.states() == [(1, L), (2, L), (3, L)]


def test_clients_vanish_with_their_lease_and_survive_a_restart() -> None:
    world = World()
    world.register(client(77))
    again = world.restarted()
    assert NodeId(77) in again.now.nodes
    again.run(4)
    assert NodeId(77) in again.now.nodes
    again.run(1.5)
    assert NodeId(77) not in again.now.nodes
    assert not again.stored.nodes
    refused = again.send(HeartbeatArrived(NodeId(77), NodeKind.CLIENT, 1, ()))
    assert isinstance(refused, Refused)
    assert refused.code == Code.NOT_REGISTERED


def test_progress_is_published_once_per_second() -> None:
    world = three()
    world.run(1.5, 1, 2, 3)
    count = len(world.published)
    for step in range(100):
        world.now_ns += 20 * MS
        world.beat(1, report(101, UP, 1, used=step))
    assert 2 <= len(world.published) - count <= 3
    count = len(world.published)
    world.beat(1, msgspec.structs.replace(report(101, OFF, 1), reason="disk"))
    assert len(world.published) == count + 1, "a state is published at once"
    assert world.now.targets[TARGETS[0]].report.reason == "disk"


@pytest.mark.parametrize(
    ("chains", "words"),
    [
        (((2, (101,)),), "already in chain 1"),
        (((2, (401,)),), "has not been reported by node 4"),
        (((1, (101, 201)),), "exists with other targets"),
        (((2, ()),), "no targets"),
        (((0, (101,)),), "not 0"),
        (((2, (102, 102)),), "already in chain 2"),
        (((2, (202,)),), "offline"),
    ],
)
def test_bad_chains_are_refused_whole(
    chains: tuple[tuple[int, tuple[int, ...]], ...], words: str
) -> None:
    world = three()
    world.beat(1, report(101, UP, 1), report(102, ON))
    world.beat(2, report(201, UP, 1), report(202, OFF))
    typed = tuple((ChainId(n), tuple(TargetId(t) for t in targets)) for n, targets in chains)
    refused = world.send(ChainsRequested(((ChainId(9), (TargetId(102),)), *typed)))
    if words != "already in chain 2":
        assert isinstance(refused, Refused)
        assert words in refused.message
    assert isinstance(refused, Refused)
    assert set(world.now.chains) == {1}


def test_same_chain_again_is_left_alone() -> None:
    world = three()
    version = world.now.version
    answer = world.send(ChainsRequested(((ChainId(1), TARGETS[::-1]),)))
    assert answer == Answer(version, ())


@pytest.mark.parametrize(
    ("node", "reports", "code"),
    [
        (storage(0), (), Code.INVALID),
        (storage(900), (), Code.NODE_ID_TAKEN),
        (storage(4), (report(101),), Code.INVALID),
        (storage(4), (report(401), report(401)), Code.INVALID),
        (Node(NodeId(1), NodeKind.META, "host1", (), 5, True), (), Code.NODE_ID_TAKEN),
        (Node(NodeId(5), NodeKind.META, "host1", (), 5, True), (report(501),), Code.INVALID),
        (Node(NodeId(5), NodeKind.MGMTD, "host1", (), 5, True), (), Code.INVALID),
        (Node(NodeId(5), NodeKind.CLIENT, "host1", (), 5, True), (), Code.INVALID),
    ],
)
def test_bad_registration_changes_nothing(
    node: Node, reports: tuple[TargetReport, ...], code: Code
) -> None:
    world = three()
    before = world.now
    refused = world.register(node, *reports)
    assert isinstance(refused, Refused)
    assert refused.code == code
    assert refused.message
    assert world.now is before


def test_reservations_cover_every_version() -> None:
    world = three()
    for step in range(2500):
        world.now_ns += SECOND
        world.beat(1, report(101, UP, 1, used=step))
    assert world.now.version > 2500
    assert world.restarted().now.version > world.now.version
    assert sum(p.reserved > 0 for p in world.persisted) <= 4


@pytest.mark.parametrize("seed", range(8))
def test_random_life(seed: int) -> None:
    """Crashes, pauses, lies and restarts of mgmtd; in the end all is well again."""
    generator = random.Random(seed)
    world = three()
    incarnations = {1: 1, 2: 1, 3: 1}
    newest = RoutingVersion(0)
    chain_version = 0
    for _ in range(600):
        world.now_ns += generator.choice([0, 100 * MS, SECOND, 3 * SECOND])
        node = generator.choice([1, 2, 3])
        version = max(0, world.version() - generator.choice([0, 0, 0, 1, 2]))
        told = report(node * 100 + 1, generator.choice(list(LocalState)), version)
        match generator.randrange(5):
            case 0:
                incarnations[node] += 1
                world.register(storage(node, incarnations[node]), told)
            case 1 | 2:
                world.beat(node, told, incarnation=incarnations[node])
            case 3:
                world.send(Ticked())
            case 4 if generator.random() < 0.1:
                world = world.restarted()
        assert world.now.version >= newest
        assert world.version() >= chain_version
        newest, chain_version = world.now.version, world.version()
        states = [state for _, state in world.states()]
        assert S in states or L in states
    for _ in range(20):
        world.now_ns += SECOND
        for node, incarnation in incarnations.items():
            world.beat(node, report(node * 100 + 1, UP, world.version()), incarnation=incarnation)
        world.send(Ticked())
    assert {state for _, state in world.states()} == {S}


def test_a_longer_lease_of_before_is_honoured_over_two_restarts() -> None:
    """Nodes may still hold the lease that an earlier mgmtd promised, also after a second start."""
    lease_ns = 60 * SECOND
    world = World(Loaded(lease_ns=lease_ns))
    assert [p.lease_ns for p in world.persisted] == [0], "it stays on record"
    world.run(30)
    assert not any(p.lease_ns for p in world.persisted)
    world.run(31)
    assert world.persisted[-1].lease_ns == TIMING.lease_ns
    count = len(world.persisted)
    world.run(10)
    assert len(world.persisted) == count
    fresh = World()
    assert fresh.persisted[0].lease_ns == TIMING.lease_ns
