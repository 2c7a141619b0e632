"""A real management service on loopback with a real store."""

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import msgspec
import pytest
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from emberfs.client.control import Control
from emberfs.client.routing import Routing
from emberfs.kv.memory import MemoryStore
from emberfs.kv.rocks import RocksStore
from emberfs.kv.transaction import Engine
from emberfs.mgmtd.election import LeaseRecord, Stored
from emberfs.mgmtd.embedded import EmbeddedEngine
from emberfs.mgmtd.events import Loaded, Persist
from emberfs.mgmtd.server import SERVICE, MgmtdConfig, MgmtdServer, timing_of
from emberfs.mgmtd.store import ClusterStore
from emberfs.proto.cluster import (
    Chain,
    ChainTarget,
    LocalState,
    Node,
    NodeKind,
    PublicState,
    RoutingSnapshot,
    TargetReport,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChainId, ChainVersion, NodeId, RoutingVersion, TargetId
from emberfs.runtime.real import RealEnv

S = PublicState.SERVING


def config(path: Path, **changes: object) -> MgmtdConfig:
    settings: dict[str, object] = {
        "cluster": "c", "data": str(path), "listen": "127.0.0.1:0", "node": 900,
        "lease_s": 0.5, "heartbeat_s": 0.1,
    }  # fmt: skip
    return msgspec.convert(settings | changes, MgmtdConfig)


@asynccontextmanager
async def running(settings: MgmtdConfig) -> AsyncIterator[MgmtdServer]:
    env = RealEnv()
    server = MgmtdServer(
        settings, env, EmbeddedEngine(env, lambda: RocksStore(f"{settings.data}/state"))
    )
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: MgmtdServer, cluster: str = "c") -> AsyncIterator[Control]:
    control = Control((server.address,), cluster)
    try:
        yield control
    finally:
        await control.close()


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(15):
            await story()

    uvloop.run(bounded())


def storage(number: int) -> Node:
    return Node(NodeId(number), NodeKind.STORAGE, f"h{number}", ("tcp://x:1",), 7, True)


def report(target: int, version: int = 0) -> TargetReport:
    return TargetReport(TargetId(target), LocalState.UPTODATE, ChainVersion(version), 5, 100)


async def make_chain(control: Control, nodes: tuple[int, ...] = (1, 2)) -> None:
    for number in nodes:
        await control.register(storage(number), [report(number * 100 + 1)])
    targets = tuple(TargetId(number * 100 + 1) for number in nodes)
    assert await control.create_chains([(ChainId(1), targets)]) == [1]


async def beat(control: Control, *nodes: int) -> None:
    for number in nodes:
        await control.heartbeat(NodeId(number), NodeKind.STORAGE, 7, [report(number * 100 + 1)])


def states(snapshot: RoutingSnapshot) -> list[tuple[int, str]]:
    return [(t.node, t.state.name) for t in snapshot.chains[ChainId(1)].targets]


def test_register_heartbeat_and_lease(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(config(tmp_path)) as server, connected(server) as control:
            lease = await control.register(storage(1), [report(101)])
            assert (lease.lease_ns, lease.heartbeat_ns) == (500_000_000, 100_000_000)
            again = await control.heartbeat(NodeId(1), NodeKind.STORAGE, 7, [report(101)])
            assert again.version == (await control.routing()).version
            with pytest.raises(EmberfsError) as caught:
                await control.heartbeat(NodeId(1), NodeKind.STORAGE, 8, [])
            assert caught.value.code == Code.NOT_REGISTERED
            with pytest.raises(EmberfsError, match="choose another") as caught:
                await control.register(msgspec.structs.replace(storage(1), kind=NodeKind.META))
            assert caught.value.code == Code.NODE_ID_TAKEN
            with pytest.raises(EmberfsError, match="not been reported") as caught:
                await control.create_chains([(ChainId(1), (TargetId(201),))])
            assert caught.value.code == Code.INVALID
            snapshot = await control.routing()
            assert snapshot.nodes[NodeId(1)] == storage(1)
            assert snapshot.nodes[NodeId(900)].kind == NodeKind.MGMTD

    run(story)


def test_change_is_pushed_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        settings = config(tmp_path, lease_s=5.0)
        async with running(settings) as server, connected(server) as control:
            stream = control.watch()
            first = await anext(stream)
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.05)
            began = loop.time()
            await control.register(storage(1), [report(101)])
            second = await waiting
            assert loop.time() - began < 0.5  # typically some ms; polling would take a second
            assert second.version > first.version
            assert NodeId(1) in second.nodes
            await stream.aclose()

    run(story)


def test_o9_slow_watcher_gets_the_latest_only(tmp_path: Path) -> None:
    """A watcher that does not read gets the latest routing only: nothing piles up for it."""

    async def story() -> None:
        settings = config(tmp_path, lease_s=5.0)
        async with running(settings) as server, connected(server) as control:
            stream = server.manager.watch(0)
            assert (await anext(stream)).version == server.manager.snapshot.version
            for incarnation in range(1, 21):
                node = msgspec.structs.replace(storage(1), incarnation=incarnation)
                await control.register(node, [report(101)])
            newest = await anext(stream)
            assert newest.version == server.manager.snapshot.version
            assert newest.nodes[NodeId(1)].incarnation == 20
            await stream.aclose()

    run(story)


def test_lost_lease_changes_the_chain(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(config(tmp_path)) as server, connected(server) as control:
            await make_chain(control)
            stream = control.watch()
            beating = asyncio.ensure_future(keep_beating(control, 2))
            async for snapshot in stream:
                if states(snapshot) != [(1, "SERVING"), (2, "SERVING")]:
                    break
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            assert states(snapshot) == [(2, "SERVING"), (1, "OFFLINE")]
            assert not snapshot.nodes[NodeId(1)].alive
            await stream.aclose()

    async def keep_beating(control: Control, number: int) -> None:
        while True:
            await beat(control, number)
            await asyncio.sleep(0.1)

    run(story)


def test_restart_keeps_chains_and_versions_rise(tmp_path: Path) -> None:
    async def story() -> None:
        settings = config(tmp_path, lease_s=5.0)
        async with running(settings) as server, connected(server) as control:
            await make_chain(control)
            before = await control.routing()
        async with running(settings) as server, connected(server) as control:
            after = await control.routing()
            assert after.chains == before.chains
            assert after.nodes.keys() == before.nodes.keys()
            assert after.version > before.version
            await beat(control, 1, 2)
            ahead = control.watch(RoutingVersion(after.version + 5000))
            with pytest.raises(EmberfsError, match="lost its data") as caught:
                await anext(ahead)
            assert caught.value.code == Code.TOO_OLD

    run(story)


def test_killed_process_comes_back_with_its_chains(tmp_path: Path) -> None:
    """SIGKILL right after an answer; the watcher sees rising versions and no lost chain."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    file = tmp_path / "mgmtd.toml"
    file.write_text(f'cluster = "c"\nlisten = "{address}"\ndata = "{tmp_path}/data"\nnode = 900\n')

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "emberfs.mgmtd.server", "--config", str(file)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    async def story() -> None:
        process = start()
        control = Control((address,), "c")
        routing = Routing(RealEnv(), control)
        try:
            await routing.start(10 * SECOND)
            await make_chain(control)
            process.kill()
            process.wait()
            await routing.wait_newer(routing.snapshot.version, 100 * MS)
            before = routing.snapshot
            assert states(before) == [(1, "SERVING"), (2, "SERVING")]
            process = start()
            assert await routing.wait_newer(before.version, 8 * SECOND)
            assert routing.snapshot.chains == before.chains
            await beat(control, 1, 2)  # needs no new registration
        finally:
            await routing.close()
            await control.close()
            process.kill()
            process.wait()

    run(story)


def test_wrong_cluster(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(config(tmp_path)) as server, connected(server, "other") as control:
            calls = (control.routing(), control.register(storage(1)), anext(control.watch()))
            for call in calls:
                with pytest.raises(EmberfsError, match='"c", not "other"') as caught:
                    await call
                assert caught.value.code == Code.WRONG_CLUSTER
        with pytest.raises(EmberfsError, match='belongs to cluster "c"') as caught:
            async with running(config(tmp_path, cluster="other")):
                pass
        assert caught.value.code == Code.WRONG_CLUSTER

    run(story)


def test_port_in_use(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(config(tmp_path / "a")) as server:
            with pytest.raises(EmberfsError, match="Address already in use; stop"):
                async with running(config(tmp_path / "b", listen=server.address)):
                    pass
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(EmberfsError, match='another "listen"'):
                async with running(config(tmp_path / "b", listen=listen)):
                    pass

    run(story)


def test_data_directory_in_use(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(config(tmp_path)):
            with pytest.raises(EmberfsError, match="another process has it open"):
                async with running(config(tmp_path)):
                    pass

    run(story)


@pytest.mark.parametrize(
    "changes",
    [{"lease_s": 0.05}, {"heartbeat_s": 0.4}, {"heartbeat_s": 0}, {"cluster": ""}],
)
def test_impossible_settings(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(EmberfsError) as caught:
        timing_of(config(tmp_path, **changes))
    assert caught.value.code == Code.CONFIG


@pytest.mark.parametrize("listen", ["9000", "127.0.0.1", "127.0.0.1:99999", ":1", "h:x"])
def test_bad_address(tmp_path: Path, listen: str) -> None:
    async def story() -> None:
        with pytest.raises(EmberfsError, match="write it as"):
            async with running(config(tmp_path, listen=listen)):
                pass

    run(story)


def test_health_and_reflection(tmp_path: Path) -> None:
    async def story() -> None:
        settings = config(tmp_path)
        async with running(settings) as server, grpc.aio.insecure_channel(server.address) as plain:
            health = health_pb2_grpc.HealthStub(plain)
            for name in ("", SERVICE):
                reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            stub = reflection_pb2_grpc.ServerReflectionStub(plain)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            call = stub.ServerReflectionInfo(iter([asked]))
            names = [s.name for s in (await call.read()).list_services_response.service]
            assert SERVICE == "emberfs.control.v1.Mgmtd"
            assert SERVICE in names
            call.cancel()

    run(story)


def test_stored_state_is_read_back() -> None:
    async def story() -> None:
        memory = MemoryStore()
        store = ClusterStore(Engine(RealEnv(), memory), "c", b"")
        mine = LeaseRecord(NodeId(900), 1, "x", 1, 0, 1)
        assert await store.claim(None, mine, 77) == Stored(mine, written=True)
        assert await store.load(mine) == Loaded(identity=77)
        places = (ChainTarget(TargetId(101), NodeId(1), S),)
        chain = Chain(ChainId(1), ChainVersion(3), places)
        gone = storage(2)
        first = Persist((storage(1), gone), (), (chain,), RoutingVersion(1000), True, 5)
        await store.persist(mine, 1, first)
        await store.persist(mine, 2, Persist((), (gone.id,), (), RoutingVersion(0), False))
        memory.crash()
        loaded = await store.load(mine)
        assert loaded == Loaded((storage(1), gone), (chain,), RoutingVersion(1000), 5, 77)
        await store.persist(mine, 3, Persist((), (gone.id,), (), RoutingVersion(0), True))
        loaded = await store.load(mine)
        assert loaded == Loaded((storage(1),), (chain,), RoutingVersion(1000), 5, 77)
        memory.write([(b"chain/\0\0\0\1", b"rubbish")])
        with pytest.raises(EmberfsError, match="damaged"):
            await store.load(mine)

    run(story)


def test_r4_r10_nothing_is_published_before_it_is_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No routing is published before it is stored.

    While the disk fails callers wait; when it is well again, all goes on (R10).
    """

    async def story() -> None:
        memory = MemoryStore()
        settings = config(tmp_path, lease_s=5.0)
        server = MgmtdServer(settings, RealEnv(), EmbeddedEngine(RealEnv(), lambda: memory))
        await server.start()
        try:
            async with connected(server) as control:
                await control.register(storage(1), [report(101)])
                before = server.manager.snapshot
                memory.sync_error = EmberfsError(Code.DISK, "sick")
                creating = asyncio.ensure_future(
                    control.create_chains([(ChainId(1), (TargetId(101),))])
                )
                await asyncio.sleep(0.3)
                assert server.manager.snapshot is before
                assert not creating.done()
                memory.sync_error = None
                assert await creating == [1]
                assert server.manager.snapshot.chains
        finally:
            await server.stop()

    with caplog.at_level(logging.ERROR):
        run(story)
    assert "sick" in caplog.text
