"""Control, Routing and Agent against a management service that dies, returns and lies."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import uvloop

from emberfs.client.agent import Agent
from emberfs.client.connection import Lease
from emberfs.client.control import Control
from emberfs.client.routing import Routing
from emberfs.kv.rocks import RocksStore
from emberfs.mgmtd.embedded import EmbeddedEngine
from emberfs.mgmtd.server import MgmtdConfig, MgmtdServer
from emberfs.proto import control_pb2 as pb
from emberfs.proto import control_wire
from emberfs.proto.cluster import (
    EMPTY_ROUTING,
    Chain,
    ChainTarget,
    LocalState,
    Node,
    NodeKind,
    PublicState,
    RoutingSnapshot,
    TargetReport,
    TargetStatus,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChainId, ChainVersion, NodeId, RoutingVersion, TargetId
from emberfs.runtime.real import RealEnv

NOBODY = "127.0.0.1:1"  # nothing listens on port 1
U32 = (1 << 32) - 1
U64 = (1 << 64) - 1


@asynccontextmanager
async def mgmtd(path: Path, listen: str = "127.0.0.1:0", **changes: object) -> AsyncIterator[str]:
    """Run mgmtd; the value is its address."""
    settings: dict[str, object] = {
        "cluster": "c", "data": str(path), "listen": listen, "node": 900,
        "lease_s": 1.0, "heartbeat_s": 0.1,
    }  # fmt: skip
    config = msgspec.convert(settings | changes, MgmtdConfig)
    env = RealEnv()
    server = MgmtdServer(config, env, EmbeddedEngine(env, lambda: RocksStore(f"{path}/state")))
    try:
        await server.start()
        yield server.address
    finally:
        await server.stop()


@asynccontextmanager
async def control_of(*addresses: str, cluster: str = "c") -> AsyncIterator[Control]:
    control = Control(addresses, cluster)
    try:
        yield control
    finally:
        await control.close()


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(15):
            await story()

    uvloop.run(bounded())


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def storage(number: int = 1, incarnation: int = 7) -> Node:
    return Node(NodeId(number), NodeKind.STORAGE, "h", ("tcp://x:1",), incarnation, True)


def snapshot(version: int, cluster: str = "c") -> RoutingSnapshot:
    return RoutingSnapshot(cluster, RoutingVersion(version), {}, {}, {})


class FakeMgmtd:
    """Answers as a test wants; stands in for Control."""

    def __init__(self) -> None:
        self.problem: EmberfsError | None = None
        self.problems: dict[str, EmberfsError] = {}
        self.calls: list[str] = []
        self.lease = Lease(400 * MS, 20 * MS, RoutingVersion(1))
        self.snapshots: asyncio.Queue[RoutingSnapshot | EmberfsError | None] = asyncio.Queue()

    def _answer(self, call: str) -> Lease:
        self.calls.append(call)
        if self.problem is not None:
            raise self.problem
        if call in self.problems:
            raise self.problems.pop(call)
        return self.lease

    async def register(self, node: Node, reports: Sequence[TargetReport]) -> Lease:
        return self._answer("register")

    async def heartbeat(
        self,
        node_id: NodeId,
        kind: NodeKind,
        incarnation: int,
        reports: Sequence[TargetReport],
        client: int = 0,
    ) -> Lease:
        return self._answer("heartbeat")

    async def watch(self, have_version: RoutingVersion) -> AsyncGenerator[RoutingSnapshot, None]:
        self.calls.append(f"watch {have_version}")
        while (found := await self.snapshots.get()) is not None:
            if isinstance(found, EmberfsError):
                raise found
            yield found


def test_every_field_survives_the_wire() -> None:
    node = Node(NodeId(U32), NodeKind.CLIENT, "h\u00e9", ("a", "b"), U64, True, "1:2", U64)
    report = TargetReport(
        TargetId(U32), LocalState.OFFLINE, ChainVersion(U32), U64, U64, "why", U64, U64
    )
    report = msgspec.structs.replace(report, doubtful=True)
    places = tuple(ChainTarget(TargetId(s + 1), NodeId(U32), s) for s in PublicState)
    chain = Chain(ChainId(U32), ChainVersion(U32), places, ChainVersion(U32 - 1))
    status = TargetStatus(TargetId(U32), NodeId(1), ChainId(2), PublicState.LASTSRV, report)
    whole = RoutingSnapshot(
        "c", RoutingVersion(U64), {node.id: node}, {chain.id: chain}, {status.target: status}
    )
    sent = control_wire.routing_to_wire(whole).SerializeToString()
    assert control_wire.routing_from_wire(pb.Routing.FromString(sent)) == whole
    assert control_wire.routing_from_wire(pb.Routing()) == EMPTY_ROUTING


@pytest.mark.parametrize(
    "message",
    [
        pb.Routing(chains=[pb.Chain(targets=[pb.ChainTarget()])]),
        pb.Routing(targets=[pb.TargetStatus(public=pb.SERVING)]),
        pb.Routing.FromString(b"\x1a\x02\x10\x09"),  # a node of kind 9
    ],
)
def test_unknown_values_are_malformed(message: pb.Routing) -> None:
    with pytest.raises(EmberfsError) as caught:
        control_wire.routing_from_wire(message)
    assert caught.value.code == Code.MALFORMED


def test_unreachable_mgmtd_is_named() -> None:
    async def story() -> None:
        async with control_of(NOBODY) as control:
            with pytest.raises(EmberfsError, match=r"127.0.0.1:1 does not answer.*check") as caught:
                await control.routing()
            assert caught.value.code == Code.UNREACHABLE
            agent = Agent(RealEnv(), control, storage())
            with pytest.raises(EmberfsError, match=r"gave up after 0.3 s.*127.0.0.1:1"):
                await agent.start(300 * MS)
            assert not agent.lease_ok()
            routing = Routing(RealEnv(), control)
            with pytest.raises(EmberfsError, match=r"127.0.0.1:1") as caught:
                await routing.start(300 * MS)
            assert caught.value.code == Code.UNREACHABLE

    run(story)


def test_addresses_are_tried_in_turn(tmp_path: Path) -> None:
    async def story() -> None:
        async with mgmtd(tmp_path) as address, control_of(NOBODY, address) as control:
            assert (await control.routing()).cluster == "c"
            routing = Routing(RealEnv(), control)
            await routing.start(2 * SECOND)
            await routing.close()

    run(story)


def test_r11_wrong_cluster_fails_at_once(tmp_path: Path) -> None:
    """A manager of another cluster is refused at once."""

    async def story() -> None:
        async with mgmtd(tmp_path) as address, control_of(address, cluster="d") as control:
            routing = Routing(RealEnv(), control)
            for starting in (routing.start, Agent(RealEnv(), control, storage()).start):
                with pytest.raises(EmberfsError, match='"c", not "d"') as caught:
                    await starting(60 * SECOND)
                assert caught.value.code == Code.WRONG_CLUSTER

    run(story)


def test_mgmtd_dies_and_returns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same port, the same process here: found again within about a second, logged once."""

    async def story() -> None:
        env = RealEnv()
        async with mgmtd(tmp_path) as address:
            control = Control((address,), "c")
            agent, routing = Agent(env, control, storage()), Routing(env, control)
            await agent.start(2 * SECOND)
            await routing.start(2 * SECOND)
            assert agent.lease_ok()
            await until(lambda: NodeId(1) in routing.snapshot.nodes)
        seen = routing.snapshot.version
        await until(lambda: not agent.lease_ok(), 1.0)  # half of the lease of 1 s
        await asyncio.sleep(0.5)
        async with mgmtd(tmp_path, address):
            assert await routing.wait_newer(seen, 2 * SECOND)
            await until(agent.lease_ok, 2.0)
            assert routing.snapshot.nodes[NodeId(1)].alive
        await agent.close()
        await routing.close()
        await control.close()

    with caplog.at_level(logging.INFO):
        run(story)
    lines = [r.message for r in caplog.records if r.name.startswith("emberfs.client")]
    assert sum("heartbeat of node 1 failed" in line for line in lines) == 1, lines
    assert sum("answers again" in line for line in lines) == 1, lines
    assert sum("may be old" in line for line in lines) <= 2, lines


def test_lease_is_counted_from_when_the_heartbeat_was_sent() -> None:
    async def story() -> None:
        fake = FakeMgmtd()
        env = RealEnv()
        agent = Agent(env, fake, storage())
        assert not agent.lease_ok()
        await agent.start(SECOND)
        assert agent.lease_ok()
        fake.problem = EmberfsError(Code.UNREACHABLE, "gone")
        lost_ns = env.now_ns()
        await until(lambda: not agent.lease_ok())
        assert 150 * MS < env.now_ns() - lost_ns < 400 * MS
        fake.problem = None
        await until(agent.lease_ok)
        await agent.close()
        assert not agent.lease_ok()

    run(story)


def test_o2_a_lease_that_ran_out_whole_is_counted_when_it_is_renewed() -> None:
    """Half a lease without an answer fences a server; a whole one makes a client look again."""

    async def story() -> None:
        fake = FakeMgmtd()
        agent = Agent(RealEnv(), fake, storage())
        assert not agent.is_member()
        await agent.start(SECOND)
        fake.problem = EmberfsError(Code.UNREACHABLE, "gone")
        await until(lambda: not agent.lease_ok())
        assert (agent.is_member(), agent.lapses) == (True, 0)
        await until(lambda: not agent.is_member())
        fake.problem = None
        await until(agent.is_member)
        assert agent.lapses == 1
        await agent.close()

    run(story)


def test_a_lapsed_lease_asks_for_the_routing_of_its_return() -> None:
    async def story() -> None:
        fake = FakeMgmtd()
        agent = Agent(RealEnv(), fake, storage())
        fake.lease = Lease(fake.lease.lease_ns, fake.lease.heartbeat_ns, RoutingVersion(5))
        await agent.start(SECOND)
        assert agent.needs_version == 5
        fake.lease = Lease(fake.lease.lease_ns, fake.lease.heartbeat_ns, RoutingVersion(6))
        beats = len(fake.calls)
        await until(lambda: len(fake.calls) > beats + 2)
        assert agent.needs_version == 5  # it was never in doubt meanwhile
        fake.problem = EmberfsError(Code.UNREACHABLE, "gone")
        await until(lambda: not agent.lease_ok())
        fake.lease = Lease(fake.lease.lease_ns, fake.lease.heartbeat_ns, RoutingVersion(9))
        fake.problem = None
        await until(agent.lease_ok)
        assert agent.needs_version == 9
        await agent.close()

    run(story)


def test_forgotten_node_registers_again() -> None:
    async def story() -> None:
        fake = FakeMgmtd()
        agent = Agent(RealEnv(), fake, storage())
        await agent.start(SECOND)
        fake.problems["heartbeat"] = EmberfsError(Code.NOT_REGISTERED)
        await until(lambda: fake.calls.count("register") == 2)
        await until(lambda: fake.calls[-1] == "heartbeat")
        assert agent.lease_ok()
        await agent.close()

    run(story)


def test_replaced_node_is_fenced_at_once() -> None:
    async def story() -> None:
        fake = FakeMgmtd()
        fake.lease = Lease(3600 * SECOND, 20 * MS, RoutingVersion(1))
        agent = Agent(RealEnv(), fake, storage())
        await agent.start(SECOND)
        fake.problem = EmberfsError(Code.NODE_ID_TAKEN, "taken")
        await until(lambda: not agent.lease_ok())
        await agent.close()

    run(story)


def test_beat_soon_does_not_wait_for_the_interval() -> None:
    async def story() -> None:
        fake = FakeMgmtd()
        fake.lease = Lease(3600 * SECOND, 600 * SECOND, RoutingVersion(1))
        told: list[int] = []

        def reports() -> list[TargetReport]:
            told.append(1)
            return []

        agent = Agent(RealEnv(), fake, storage(), reports)
        await agent.start(SECOND)
        await asyncio.sleep(0.05)
        assert fake.calls == ["register"]
        agent.beat_soon()
        await until(lambda: fake.calls == ["register", "heartbeat"])
        assert len(told) == 2
        await agent.close()

    run(story)


def test_start_waits_for_mgmtd_but_not_for_ever() -> None:
    async def story() -> None:
        fake = FakeMgmtd()
        fake.problem = EmberfsError(Code.UNREACHABLE, "not yet")
        agent = Agent(RealEnv(), fake, storage())
        starting = asyncio.ensure_future(agent.start(5 * SECOND))
        await until(lambda: len(fake.calls) > 2)
        fake.problem = None
        await starting
        await agent.close()
        fake.problem = EmberfsError(Code.NODE_ID_TAKEN, "by another")
        with pytest.raises(EmberfsError, match="by another"):
            await Agent(RealEnv(), fake, storage()).start(60 * SECOND)

    run(story)


def test_r4_o16_routing_never_goes_back(caplog: pytest.LogCaptureFixture) -> None:
    """A client takes no routing that is older than what it has seen."""

    async def story() -> None:
        fake = FakeMgmtd()
        routing = Routing(RealEnv(), fake)
        seen: list[int] = []
        end = routing.subscribe(lambda new: seen.append(new.version))
        routing.subscribe(lambda new: [][0])  # a broken subscriber harms nobody
        for version in (5, 7, 6, 7, 9):
            fake.snapshots.put_nowait(snapshot(version))
        await routing.start(SECOND)
        assert await routing.wait_newer(RoutingVersion(8), SECOND)
        assert seen == [5, 7, 9]
        assert routing.snapshot.version == 9
        assert not await routing.wait_newer(RoutingVersion(9), 10 * MS)
        waiting = asyncio.ensure_future(routing.wait_newer(RoutingVersion(9), 10 * SECOND))
        end()
        fake.snapshots.put_nowait(None)  # an orderly end of the stream
        fake.snapshots.put_nowait(EmberfsError(Code.UNREACHABLE, "gone"))
        fake.snapshots.put_nowait(snapshot(10))
        assert await waiting
        assert fake.calls == ["watch 0", "watch 9", "watch 9"]
        assert seen == [5, 7, 9]
        fake.snapshots.put_nowait(snapshot(11, "other"))
        await until(lambda: "serves cluster" in caplog.text)
        assert routing.snapshot.cluster == "c"
        ended = asyncio.ensure_future(routing.wait_newer(RoutingVersion(99), 10 * SECOND))
        await asyncio.sleep(0)
        await routing.close()
        assert not await ended

    run(story)
    assert "refused routing version 6 after 7" in caplog.text


def test_closed_control_refuses(tmp_path: Path) -> None:
    async def story() -> None:
        async with mgmtd(tmp_path) as address:
            control = Control((address,), "c")
            await control.routing()
            await control.close()
            with pytest.raises(EmberfsError) as caught:
                await control.routing()
            assert caught.value.code == Code.SHUTTING_DOWN
        with pytest.raises(EmberfsError, match="mgmtd"):
            Control((), "c")

    run(story)
