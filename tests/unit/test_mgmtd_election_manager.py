"""Several managers on one store: takeover, fencing, pauses of the store, two stores."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
import uvloop

from emberfs.client.agent import Agent
from emberfs.client.connection import Lease
from emberfs.client.control import Control
from emberfs.client.routing import Routing
from emberfs.kv.memory import MemoryStore
from emberfs.kv.transaction import Engine
from emberfs.kv.transactions import ReadWrite
from emberfs.mgmtd.election import LeaseRecord
from emberfs.mgmtd.events import (
    ChainsRequested,
    HeartbeatArrived,
    Loaded,
    Persist,
    Registered,
    Timing,
)
from emberfs.mgmtd.manager import Manager
from emberfs.mgmtd.store import ClusterStore
from emberfs.proto.cluster import (
    ClusterId,
    LocalState,
    Node,
    NodeKind,
    RoutingSnapshot,
    TargetReport,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChainId, ChainVersion, NodeId, RoutingVersion, TargetId
from emberfs.runtime.real import RealEnv

T = TypeVar("T")

TIMING = Timing(lease_ns=500 * MS, heartbeat_ns=100 * MS)  # a mgmtd leads 200 ms by one renewal


class SteppedEnv(RealEnv):
    """A machine whose time of day somebody changes."""

    def __init__(self) -> None:
        super().__init__()
        self.step_ns = 0

    def wall_ns(self) -> int:
        return super().wall_ns() + self.step_ns


class Store:
    """One engine that several managers reach over a network of their own."""

    def __init__(self) -> None:
        self.engine = Engine(RealEnv(), MemoryStore())


class Link:
    """A manager's way to the store. While `down` nothing is answered; `late` answers are lost."""

    def __init__(self, store: Store) -> None:
        self._engine = store.engine
        self.down = False
        self.hangs = False
        self.lost_answers = 0.0
        self._random = random.Random(1)

    async def run(
        self,
        work: Callable[[ReadWrite], Awaitable[T]],
        *,
        read_only: bool = False,
        durable: bool = False,
    ) -> T:
        if self.hangs:
            await asyncio.sleep(3600)
        if self.down:
            raise EmberfsError(Code.TIMEOUT, "the store is away")
        result = await self._engine.run(work, read_only=read_only, durable=durable)
        if self._random.random() < self.lost_answers:
            raise EmberfsError(Code.MAYBE_COMMITTED, "no answer")
        return result

    async def sync(self) -> None:
        await self._engine.sync()

    async def close(self) -> None:
        """The engine is shared."""


class Direct:
    """A Connection to a manager in this process."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager

    async def register(
        self, cluster: ClusterId, node: Node, reports: Sequence[TargetReport]
    ) -> Lease:
        return await self._ask(cluster, Registered(node, tuple(reports)))

    async def heartbeat(
        self,
        cluster: ClusterId,
        node_id: NodeId,
        kind: NodeKind,
        incarnation: int,
        reports: Sequence[TargetReport],
        client: int,
    ) -> Lease:
        event = HeartbeatArrived(node_id, kind, incarnation, tuple(reports))
        return await self._ask(cluster, event)

    async def _ask(self, cluster: ClusterId, event: Registered | HeartbeatArrived) -> Lease:
        self.manager.check_cluster(cluster)
        answer = await self.manager.request(event)
        identity = self.manager.snapshot.identity
        return Lease(TIMING.lease_ns, TIMING.heartbeat_ns, answer.version, identity)

    async def create_chains(
        self, cluster: ClusterId, chains: Sequence[tuple[ChainId, tuple[TargetId, ...]]]
    ) -> list[ChainId]:
        self.manager.check_cluster(cluster)
        return list((await self.manager.request(ChainsRequested(tuple(chains)))).created)

    async def watch(
        self, cluster: ClusterId, have_version: RoutingVersion
    ) -> AsyncGenerator[RoutingSnapshot, None]:
        self.manager.check_cluster(cluster)
        stream = self.manager.watch(have_version)
        try:
            async for snapshot in stream:
                yield snapshot
        finally:
            await stream.aclose()

    async def close(self) -> None:
        """Nothing is open."""


class Site:
    """Some managers, by address."""

    def __init__(self) -> None:
        self.env = SteppedEnv()
        self.managers: dict[str, Manager] = {}
        self.links: dict[str, Link] = {}

    async def add(self, address: str, store: Store, cluster: str = "c") -> Manager:
        link = self.links[address] = Link(store)
        number = NodeId(900 + len(self.links))
        own = Node(
            number, NodeKind.MGMTD, "m", (f"grpc://{address}",), random.getrandbits(60), True
        )
        manager = Manager(self.env, link, cluster, own, TIMING)
        self.managers[address] = manager
        await manager.start()
        return manager

    def connect(self, address: str) -> Direct:
        return Direct(self.managers[address])

    def leaders(self) -> list[str]:
        return [address for address, manager in self.managers.items() if manager.leads]

    async def leader(self) -> str:
        await until(lambda: len(self.leaders()) == 1)
        return self.leaders()[0]

    @asynccontextmanager
    async def client(self) -> AsyncIterator["Client"]:
        client = Client(self)
        try:
            yield client
        finally:
            await client.agent.close()
            await client.routing.close()
            await client.control.close()


class Client:
    """A storage node: it registers, beats and follows."""

    def __init__(self, site: Site) -> None:
        self.control = Control(tuple(site.managers), "c", site.connect)
        self.routing = Routing(site.env, self.control)
        self.seen: list[int] = []
        self.chain_versions: list[int] = []
        self.routing.subscribe(self._see)
        report = TargetReport(TargetId(101), LocalState.UPTODATE, ChainVersion(0), 0, 100)
        node = Node(NodeId(1), NodeKind.STORAGE, "h", ("tcp://x:1",), 7, True)
        self.agent = Agent(site.env, self.control, node, lambda: [report])

    def _see(self, snapshot: RoutingSnapshot) -> None:
        self.seen.append(snapshot.version)
        if snapshot.chains:
            self.chain_versions.append(snapshot.chains[ChainId(1)].version)

    async def start(self) -> None:
        await self.routing.start(5 * SECOND)
        await self.agent.start(5 * SECOND)
        await self.control.create_chains([(ChainId(1), (TargetId(101),))])
        await until(lambda: bool(self.routing.snapshot.chains))

    def check(self) -> None:
        assert self.seen == sorted(set(self.seen)), "versions strictly rise"
        assert self.chain_versions == sorted(self.chain_versions)


def run(story: Callable[[Site], Awaitable[None]]) -> None:
    async def bounded() -> None:
        site = Site()
        try:
            async with asyncio.timeout(20):
                await story(site)
        finally:
            for manager in site.managers.values():
                await manager.close()

    uvloop.run(bounded())


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_one_leads_and_the_others_say_who() -> None:
    async def story(site: Site) -> None:
        store = Store()
        for address in ("a:1", "b:1", "c:1"):
            await site.add(address, store)
        leader = await site.leader()
        standby = next(m for a, m in site.managers.items() if a != leader)
        await until(lambda: standby.snapshot.version == 0 and not standby.leads)
        await asyncio.sleep(0.1)
        for ask in (lambda: standby.watch(0), lambda: standby.watch(10**9)):
            with pytest.raises(EmberfsError, match=f"mgmtd 90. at {leader} did") as caught:
                ask()
            assert caught.value.code == Code.NOT_PRIMARY
        with pytest.raises(EmberfsError) as caught:
            await standby.request(ChainsRequested(()))
        assert caught.value.code == Code.NOT_PRIMARY

    run(story)


def test_r4_versions_rise_for_a_watcher_that_moves_between_mgmtd() -> None:
    """Routing and chain versions strictly rise at an observer while mgmtd after mgmtd dies."""

    async def story(site: Site) -> None:
        store = Store()
        for address in ("a:1", "b:1", "c:1"):
            await site.add(address, store)
        async with site.client() as client:
            await client.start()
            for turn in range(4):
                leader = await site.leader()
                before = client.routing.snapshot.version
                await site.managers[leader].close()
                assert await client.routing.wait_newer(before, 3 * SECOND)
                assert client.routing.snapshot.chains[ChainId(1)].head() is not None
                await until(client.agent.lease_ok)
                del site.managers[leader], site.links[leader]
                await site.add(leader, store)
                client.control._connections.pop(leader)  # as a new process would end it
                assert turn < 4
            client.check()
            assert client.chain_versions[-1] == 1, "nobody was declared dead on the way"

    run(story)


def test_a_cut_off_primary_steps_down_before_another_leads() -> None:
    async def story(site: Site) -> None:
        store = Store()
        first = await site.add("a:1", store)
        await site.leader()
        second = await site.add("b:1", store)
        async with site.client() as client:
            await client.start()
            for hangs in (False, True):
                link = site.links["a:1" if first.leads else "b:1"]
                old, new = (first, second) if first.leads else (second, first)
                link.down, link.hangs = True, hangs
                while old.leads:
                    assert not new.leads
                    await asyncio.sleep(0.005)
                await until(lambda new=new: new.leads)
                before = client.routing.snapshot.version
                assert await client.routing.wait_newer(before, SECOND) or client.seen[-1] > 1000
                link.down = link.hangs = False
                await asyncio.sleep(0.3)
                assert new.leads
            client.check()

    run(story)


@pytest.mark.parametrize("hangs", [False, True])
def test_r10_store_pauses_and_clock_steps(hangs: bool) -> None:
    """While the store is away nobody leads or publishes; when it is back one does; wall-clock
    steps of an hour change nothing."""

    async def story(site: Site) -> None:
        store = Store()
        for address in ("a:1", "b:1"):
            await site.add(address, store)
        async with site.client() as client:
            await client.start()
            leader = await site.leader()
            for step in (3600, -3600):
                site.env.step_ns += step * SECOND
                await asyncio.sleep(0.3)
                assert site.leaders() == [leader]
            for link in site.links.values():
                link.down, link.hangs = True, hangs
            await until(lambda: not site.leaders(), 0.5)
            seen = len(client.seen)
            creating = asyncio.ensure_future(client.control.create_chains([]))
            await asyncio.sleep(1.5)  # many leases
            with pytest.raises(EmberfsError, match="does not lead") as caught:
                await creating
            assert caught.value.code == Code.UNREACHABLE
            assert not site.leaders()
            assert len(client.seen) == seen, "nothing was published"
            assert client.routing.snapshot.chains, "what is known stays"
            for link in site.links.values():
                link.down = link.hangs = False
            await site.leader()
            before = client.seen[-1]
            await until(lambda: client.agent.lease_ok() and client.seen[-1] >= before)
            await until(lambda: len(client.seen) > seen)
            client.check()
            assert client.chain_versions[-1] == 1, "the grace of a new primary"

    run(story)


def test_r11_mgmtd_on_another_store_is_refused() -> None:
    """Of two mgmtd with one name and two stores, a client accepts only the one it knows."""

    async def story(site: Site) -> None:
        await site.add("a:1", Store())
        async with site.client() as alone:
            await alone.start()
            await site.add("b:1", Store())
            await until(lambda: len(site.leaders()) == 2)
            foreign = Control(("b:1", "a:1"), "c", site.connect)
            foreign.identity = alone.control.identity
            assert (await foreign.routing()).identity == alone.control.identity
            await site.managers["a:1"].close()
            for ask in (foreign.routing, lambda: foreign.register(alone.agent.node)):
                with pytest.raises(EmberfsError, match=r"manages cluster.*of identity") as caught:
                    await ask()
                assert caught.value.code == Code.WRONG_CLUSTER
            stranger = Control(("b:1",), "c", site.connect)
            other = await stranger.routing()
            with pytest.raises(EmberfsError, match="instead of"):
                alone.routing.offer(other)

    run(story)


def test_r11_store_of_another_cluster_is_refused_at_the_start() -> None:
    """A mgmtd does not start on a store that belongs to a cluster of another name."""

    async def story(site: Site) -> None:
        store = Store()
        await site.add("a:1", store)
        await site.leader()
        with pytest.raises(EmberfsError, match='belongs to cluster "c"') as caught:
            await site.add("b:1", store, "other")
        assert caught.value.code == Code.WRONG_CLUSTER

    run(story)


def test_o16_client_refuses_older_routing() -> None:
    """A client that has seen a version accepts no older one, whoever sends it."""

    async def story(site: Site) -> None:
        store = Store()
        for address in ("a:1", "b:1"):
            await site.add(address, store)
        async with site.client() as client:
            await client.start()
            stale = client.routing.snapshot
            await site.managers[await site.leader()].close()
            assert await client.routing.wait_newer(stale.version, 3 * SECOND)
            assert not client.routing.offer(stale)
            assert client.routing.snapshot.version > stale.version
            leader = site.managers[await site.leader()]
            ahead = leader.watch(leader.snapshot.version + 5000)
            with pytest.raises(EmberfsError) as caught:
                await anext(ahead)
            assert caught.value.code == Code.TOO_OLD

    run(story)


def test_commits_of_unknown_outcome_are_harmless() -> None:
    async def story(site: Site) -> None:
        store = Store()
        for address in ("a:1", "b:1"):
            await site.add(address, store)
        for link in site.links.values():
            link.lost_answers = 0.3
        async with site.client() as client:
            await client.routing.start(5 * SECOND)
            await client.agent.start(5 * SECOND)
            for number in range(20):
                node = Node(NodeId(50 + number), NodeKind.META, "h", (), 7, True)
                for _ in range(20):
                    try:
                        await client.control.register(node)
                        break
                    except EmberfsError as problem:
                        assert problem.code == Code.UNREACHABLE  # noqa: PT017
                        await asyncio.sleep(0.1)
                else:
                    raise AssertionError("never registered")
            await until(lambda: len(client.routing.snapshot.nodes_of(NodeKind.META)) == 20)
            client.check()

    run(story)


def test_a_late_write_does_not_undo_the_next() -> None:
    """A write given up by its sender may arrive after later ones: it must not change anything."""

    async def story(site: Site) -> None:
        engine = Store().engine
        gates: list[asyncio.Event] = []

        class Late(Link):
            """Commits when the gate opens; the reads are from before."""

            async def run(
                self,
                work: Callable[[ReadWrite], Awaitable[T]],
                *,
                read_only: bool = False,
                durable: bool = False,
            ) -> T:
                async def held(transaction: ReadWrite) -> T:
                    result = await work(transaction)
                    if gates:
                        await gates.pop().wait()
                    return result

                return await engine.run(held, read_only=read_only, durable=durable)

        store = ClusterStore(Late(Store()), "c", b"")
        mine = LeaseRecord(NodeId(900), 1, "x", 1, 0, 1)
        await store.claim(None, mine, 77)
        gate = asyncio.Event()
        gates.append(gate)
        old, new = (Node(NodeId(1), NodeKind.META, host, (), 7, True) for host in ("old", "new"))
        effects = [Persist((node,), (), (), RoutingVersion(0), durable=True) for node in (old, new)]
        late = asyncio.ensure_future(store.persist(mine, 1, effects[0]))
        await asyncio.sleep(0.01)
        await store.persist(mine, 1, effects[0])
        await store.persist(mine, 2, effects[1])
        gate.set()
        await late
        assert (await store.load(mine)).nodes == (new,)

    run(story)


def test_a_write_of_an_older_epoch_is_refused() -> None:
    async def story(site: Site) -> None:
        store = ClusterStore(Link(Store()), "c", b"")
        old = LeaseRecord(NodeId(900), 1, "x", 1, 0, 1)
        new = LeaseRecord(NodeId(901), 2, "y", 2, 0, 1)
        await store.claim(None, old, 77)
        await store.claim(old, new, 78)
        effect = Persist((), (), (), RoutingVersion(5), durable=True)
        for ask in (store.persist(old, 1, effect), store.load(old)):
            with pytest.raises(EmberfsError, match="mgmtd 901 at y") as caught:
                await ask
            assert caught.value.code == Code.NOT_PRIMARY
        assert not (await store.renew(old)).written
        assert (await store.load(new)) == Loaded(identity=77)

    run(story)


def test_a_renewal_that_counts_survives_a_power_cut_of_the_store() -> None:
    async def story(site: Site) -> None:
        rows = MemoryStore()
        store = ClusterStore(Engine(RealEnv(), rows), "c", b"")
        mine = LeaseRecord(NodeId(900), 1, "x", 1, 0, 1)
        await store.claim(None, mine, 77)
        renewed = (await store.renew(mine)).record
        rows.crash()
        assert (await store.look()).record == renewed

    run(story)
