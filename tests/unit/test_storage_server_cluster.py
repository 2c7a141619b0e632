"""Three storage nodes in one process: real fabric, real chunk stores, routing made by hand."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from emberfs.fabric.pool import PeerPool
from emberfs.fabric.region import Region
from emberfs.fabric.server import Server
from emberfs.proto.cluster import (
    Chain,
    ChainTarget,
    LocalState,
    Node,
    NodeKind,
    PublicState,
    RoutingSnapshot,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import (
    SECOND,
    ChainId,
    ChainVersion,
    ChunkId,
    InodeId,
    NodeId,
    RoutingVersion,
    TargetId,
    pack_chunk_id,
)
from emberfs.proto.storage_calls import (
    FLUSH,
    FLUSH_TARGETS_MAX,
    FSCK,
    LIST,
    READ_BATCH,
    UPDATE,
    FlushRequest,
    FsckRequest,
    ListRequest,
    ReadOp,
    ReadResult,
    UpdateKind,
    UpdateRequest,
    WriteTag,
    pack_read_ops,
    unpack_read_results,
)
from emberfs.runtime.checksum import crc32c
from emberfs.runtime.real import RealEnv
from emberfs.storage import replica as replica_module
from emberfs.storage.hosted import HostedTarget
from emberfs.storage.scrub import ScrubSettings
from emberfs.storage.service import StorageService

CHUNK_BYTES = 1 << 20
CHAIN = ChainId(1)
SERVING, SYNCING, OFFLINE = PublicState.SERVING, PublicState.SYNCING, PublicState.OFFLINE


class FixedRouting:
    """Routing that a test sets."""

    def __init__(self) -> None:
        self.snapshot = RoutingSnapshot("test", RoutingVersion(0), {}, {}, {})
        self._callbacks: list[Callable[[RoutingSnapshot], None]] = []

    def subscribe(self, callback: Callable[[RoutingSnapshot], None]) -> None:
        self._callbacks.append(callback)

    async def wait_newer(self, than: RoutingVersion, timeout_ns: int) -> bool:
        return self.snapshot.version > than

    def publish(self, snapshot: RoutingSnapshot) -> None:
        self.snapshot = snapshot
        for callback in self._callbacks:
            callback(snapshot)


class NodeUnderTest:
    """One storage process's inside."""

    def __init__(self, env: RealEnv, number: int, path: Path) -> None:
        self.env = env
        self.id = NodeId(number)
        self.target = TargetId(number * 100 + 1)
        self.routing = FixedRouting()
        self.path = path
        self.lease = True
        self.reports = 0
        self.scrub = ScrubSettings()

    async def start(self, endpoint: str, snapshot: RoutingSnapshot | None = None) -> str:
        self.peers = PeerPool(self.env)
        self.hosted = HostedTarget(self.env, self.target, str(self.path))
        if snapshot is not None:
            self.routing.snapshot = snapshot
        self.service = StorageService(
            self.env,
            self.routing,
            self.peers,
            {self.target: self.hosted},
            lease_ok=lambda: self.lease,
            report_now=self.reported,
            scrub=self.scrub,
        )
        self.server = Server(self.env, self.service.handlers, name=f"node {self.id}")
        endpoint = await self.server.listen(endpoint)
        await self.service.open()
        return endpoint

    def reported(self) -> None:
        self.reports += 1

    async def stop(self) -> None:
        await self.service.close_replicas()
        await self.server.close(0)
        await self.service.close()
        await self.peers.close()


class ClusterUnderTest:
    def __init__(self, tmp_path: Path, transport: str) -> None:
        self.env = RealEnv()
        self.transport = transport
        self.tmp_path = tmp_path
        self.nodes = [
            NodeUnderTest(self.env, n, tmp_path / f"node{n}" / "target-1") for n in (1, 2, 3)
        ]
        for node in self.nodes:
            node.path.mkdir(parents=True)
        self.records: dict[NodeId, Node] = {}
        self.version = 0
        self.chain = Chain(CHAIN, ChainVersion(0), ())
        self.sequence = 0
        self.peers = PeerPool(self.env)

    def endpoint(self, node: NodeUnderTest) -> str:
        if self.transport == "tcp":
            return "tcp://127.0.0.1:0"
        return f"shm://{self.tmp_path}/{node.id}.{self.version}.sock"

    async def start(self, states: list[PublicState]) -> None:
        for node in self.nodes:
            await self.start_node(node)
        self.set_chain([(n, s) for n, s in zip(self.nodes, states, strict=True)])

    async def start_node(self, node: NodeUnderTest) -> None:
        snapshot = self.snapshot() if self.version else None
        endpoint = await node.start(self.endpoint(node), snapshot)
        self.records[node.id] = Node(
            node.id, NodeKind.STORAGE, "", (endpoint,), self.env.random.getrandbits(60), True
        )

    def snapshot(self) -> RoutingSnapshot:
        chains = {CHAIN: self.chain}
        return RoutingSnapshot("test", RoutingVersion(self.version), self.records, chains, {})

    def set_chain(self, members: list[tuple[NodeUnderTest, PublicState]]) -> None:
        self.version += 1
        targets = tuple(ChainTarget(n.target, n.id, s) for n, s in members)
        self.chain = Chain(CHAIN, ChainVersion(self.version), targets)
        for node in self.nodes:
            if hasattr(node, "service"):
                node.routing.publish(self.snapshot())

    async def stop(self) -> None:
        await self.peers.close()
        for node in self.nodes:
            await node.stop()

    # ------------------------------------------------------------ a client

    async def update(self, kind: UpdateKind, chunk: ChunkId, **what: object) -> int:
        """Update with retries, as a client does; returns the version."""
        self.sequence += 1
        tag = WriteTag(7, self.sequence % 40, self.sequence)
        for _ in range(40):
            try:
                return await self.update_once(kind, chunk, tag, **what)
            except EmberfsError as problem:
                if problem.code in (Code.NO_SPACE, Code.INVALID, Code.SUPERSEDED):
                    raise
                await asyncio.sleep(0.02)
        raise AssertionError("the write does not get through")

    async def update_once(
        self,
        kind: UpdateKind,
        chunk: ChunkId,
        tag: WriteTag,
        *,
        data: bytes = b"",
        offset: int = 0,
        length: int = 0,
    ) -> int:
        head = self.chain.head()
        assert head is not None
        peer = await self.peers.get(self.records[head.node].endpoints)
        request = UpdateRequest(
            target=head.target,
            chain_version=self.chain.version,
            chunk=chunk,
            kind=kind,
            offset=offset,
            length=len(data) or length,
            tag=tag,
            chunk_bytes=CHUNK_BYTES,
            checksum=crc32c(data) if data else 0,
        )
        sources = (memoryview(data),) if data else ()
        body = UPDATE.encode_request(request)
        reply = await peer.call(UPDATE.number, body, sources=sources, timeout_ns=3 * SECOND)
        return UPDATE.decode_answer(reply.body).version

    async def write(self, chunk: ChunkId, data: bytes, offset: int = 0) -> int:
        return await self.update(UpdateKind.WRITE, chunk, data=data, offset=offset)

    async def read(
        self, node: NodeUnderTest, chunk: ChunkId, length: int = CHUNK_BYTES, offset: int = 0
    ) -> tuple[ReadResult, bytes]:
        peer = await self.peers.get(self.records[node.id].endpoints)
        body = pack_read_ops([ReadOp(node.target, self.chain.version, chunk, offset, length)])
        region = Region(length)
        sink = region.slice(0, length)
        reply = await peer.call(READ_BATCH, body, sinks=(sink,), timeout_ns=3 * SECOND)
        (result,) = unpack_read_results(reply.body)
        content = bytes(sink.view[: result.length])
        region.close()
        return result, content

    async def rows(self, node: NodeUnderTest, verify: bool = False) -> list[tuple[object, ...]]:
        peer = await self.peers.get(self.records[node.id].endpoints)
        body = LIST.encode_request(ListRequest(node.target, b"", b"", 1000, verify))
        reply = await peer.call(LIST.number, body, timeout_ns=3 * SECOND)
        return [msgspec.structs.astuple(row) for row in LIST.decode_answer(reply.body).rows]

    async def assert_equal(self, *nodes: NodeUnderTest) -> list[tuple[object, ...]]:
        first = await self.rows(nodes[0], verify=True)
        for node in nodes:
            assert await self.rows(node, verify=True) == first
            peer = await self.peers.get(self.records[node.id].endpoints)
            body = FSCK.encode_request(FsckRequest(node.target))
            reply = await peer.call(FSCK.number, body, timeout_ns=3 * SECOND)
            assert FSCK.decode_answer(reply.body).findings == ()
        return first


def chunk_of(index: int) -> ChunkId:
    return pack_chunk_id(InodeId(77), index)


def run(
    tmp_path: Path,
    body: Callable[[ClusterUnderTest], Awaitable[None]],
    transport: str = "tcp",
    states: tuple[PublicState, ...] = (SERVING, SERVING, SERVING),
) -> None:
    async def main() -> None:
        cluster = ClusterUnderTest(tmp_path, transport)
        try:
            async with asyncio.timeout(12):
                await cluster.start(list(states))
                await body(cluster)
        finally:
            await cluster.stop()

    asyncio.run(main())


async def until(true: Callable[[], bool]) -> None:
    for _ in range(400):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("does not happen")


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_write_read_truncate_remove(tmp_path: Path, transport: str) -> None:
    async def body(cluster: ClusterUnderTest) -> None:
        big, small = random.Random(1).randbytes(CHUNK_BYTES), b"small" * 100
        assert await cluster.write(chunk_of(0), big) == 1
        assert await cluster.write(chunk_of(0), small, offset=5000) == 2
        assert await cluster.write(chunk_of(1), small) == 1
        await cluster.update(UpdateKind.TRUNCATE, chunk_of(1), length=100)
        await cluster.write(chunk_of(2), small)
        await cluster.update(UpdateKind.REMOVE, chunk_of(2))
        await cluster.update(UpdateKind.REMOVE, chunk_of(2))
        expected = bytearray(big)
        expected[5000 : 5000 + len(small)] = small
        for node in cluster.nodes:
            assert (await cluster.read(node, chunk_of(0)))[1] == expected
            result, content = await cluster.read(node, chunk_of(1), 4096)
            assert (result, content) == (ReadResult(0, 100, 2), small[:100])
            assert (await cluster.read(node, chunk_of(2), 4096))[0] == ReadResult(0, 0, 0)
        peer = await cluster.peers.get(cluster.records[NodeId(2)].endpoints)
        request = FLUSH.encode_request(FlushRequest((TargetId(201),)))
        await peer.call(FLUSH.number, request, timeout_ns=3 * SECOND)
        assert len(await cluster.assert_equal(*cluster.nodes)) == 2

    run(tmp_path, body, transport)


def test_a_flush_of_too_many_targets_is_refused(tmp_path: Path) -> None:
    async def body(cluster: ClusterUnderTest) -> None:
        peer = await cluster.peers.get(cluster.records[NodeId(2)].endpoints)
        request = FLUSH.encode_request(FlushRequest((TargetId(201),) * (FLUSH_TARGETS_MAX + 1)))
        with pytest.raises(EmberfsError) as failure:
            await peer.call(FLUSH.number, request, timeout_ns=3 * SECOND)
        assert failure.value.code == Code.MALFORMED
        assert str(FLUSH_TARGETS_MAX) in failure.value.message

    run(tmp_path, body)


def test_who_wants_a_chunk_to_stand_still_waits_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update may wait for its successor as long as an outage lasts; recovery says so instead."""
    monkeypatch.setattr(replica_module, "HOLD_NS", 50_000_000)

    async def body(cluster: ClusterUnderTest) -> None:
        replica = cluster.nodes[0].hosted.replica
        assert replica is not None
        async with replica.hold(chunk_of(0)):
            with pytest.raises(EmberfsError) as failure:
                async with replica.hold(chunk_of(0)):
                    pass
            assert failure.value.code == Code.BUSY
            with pytest.raises(EmberfsError):
                await replica.settled()
        async with replica.hold(chunk_of(0)):
            pass
        assert replica.active_count == 0

    run(tmp_path, body)


def test_a_retry_is_answered_and_not_repeated(tmp_path: Path) -> None:
    async def body(cluster: ClusterUnderTest) -> None:
        tag = WriteTag(5, 1, 10)
        twice = [
            cluster.update_once(UpdateKind.WRITE, chunk_of(0), tag, data=b"a" * 5000)
            for _ in range(2)
        ]
        assert await asyncio.gather(*twice) == [1, 1]
        assert await cluster.write(chunk_of(0), b"b" * 5000) == 2
        # The late duplicate must not overwrite what is newer, not even at another head.
        cluster.set_chain([(cluster.nodes[1], SERVING), (cluster.nodes[2], SERVING)])
        assert await cluster.update_once(UpdateKind.WRITE, chunk_of(0), tag, data=b"a" * 5000) == 1
        assert (await cluster.read(cluster.nodes[2], chunk_of(0), 5000))[1] == b"b" * 5000
        with pytest.raises(EmberfsError) as failure:
            await cluster.update_once(
                UpdateKind.WRITE, chunk_of(0), WriteTag(5, 1, 9), data=b"a" * 5000
            )
        assert failure.value.code == Code.SUPERSEDED

    run(tmp_path, body)


def test_refusals(tmp_path: Path) -> None:
    async def body(cluster: ClusterUnderTest) -> None:
        head, middle, _ = cluster.nodes
        await cluster.write(chunk_of(0), b"x" * 100)
        head.lease = False
        with pytest.raises(EmberfsError) as failure:
            await cluster.update_once(UpdateKind.WRITE, chunk_of(0), WriteTag(1, 1, 1), data=b"y")
        assert failure.value.code == Code.NOT_SERVING
        assert (await cluster.read(head, chunk_of(0), 100))[0].code == Code.NOT_SERVING
        assert (await cluster.read(middle, chunk_of(0), 100))[1] == b"x" * 100
        head.lease = True
        real = cluster.chain
        cluster.chain = msgspec.structs.replace(real, targets=tuple(reversed(real.targets)))
        with pytest.raises(EmberfsError) as failure:
            await cluster.update_once(UpdateKind.WRITE, chunk_of(0), WriteTag(1, 1, 1), data=b"y")
        assert failure.value.code == Code.NOT_HEAD
        cluster.chain = msgspec.structs.replace(real, version=ChainVersion(99))
        with pytest.raises(EmberfsError) as failure:
            await cluster.update_once(UpdateKind.WRITE, chunk_of(0), WriteTag(1, 1, 1), data=b"y")
        assert failure.value.code == Code.NOT_HEAD or failure.value.code == Code.CHAIN_VERSION
        assert (await cluster.read(middle, chunk_of(0), 100))[0].code == Code.CHAIN_VERSION

    run(tmp_path, body)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_r9_writes_go_on_when_a_replica_dies(tmp_path: Path, victim: int) -> None:
    """Writes go on when any replica of the chain dies."""

    async def body(cluster: ClusterUnderTest) -> None:
        dead = cluster.nodes[victim]
        rest = [node for node in cluster.nodes if node is not dead]
        written = {i: bytes([i + 1]) * 30_000 for i in range(40)}

        async def fail() -> None:
            await asyncio.sleep(0.02)
            await dead.stop()
            await asyncio.sleep(0.1)
            cluster.set_chain([(node, SERVING) for node in rest] + [(dead, OFFLINE)])

        async def write(i: int) -> None:
            await asyncio.sleep(0.002 * i)
            await cluster.write(chunk_of(i), written[i])

        await asyncio.gather(fail(), *(write(i) for i in written))
        for i, data in written.items():
            for node in rest:
                assert (await cluster.read(node, chunk_of(i), len(data)))[1] == data
        await cluster.assert_equal(*rest)
        await cluster.start_node(dead)  # so that stop() finds it running

    run(tmp_path, body)


def test_r3_r6_a_target_is_filled_while_writes_go_on(tmp_path: Path) -> None:
    """A target is filled while writes go on, and is then byte-equal."""

    async def body(cluster: ClusterUnderTest) -> None:
        first, second, third = cluster.nodes
        source = random.Random(3)
        for i in range(30):
            await cluster.write(chunk_of(i), source.randbytes(40_000))
        await third.stop()
        cluster.set_chain([(first, SERVING), (second, SERVING), (third, OFFLINE)])
        for i in range(10):
            await cluster.write(chunk_of(i), b"new" * 1000, offset=100 * i)
        for i in range(10, 15):
            await cluster.update(UpdateKind.REMOVE, chunk_of(i))
        for i in range(30, 40):
            await cluster.write(chunk_of(i), source.randbytes(70_000))
        await cluster.start_node(third)
        assert third.hosted.report().local == LocalState.ONLINE
        cluster.set_chain([(first, SERVING), (second, SERVING), (third, SYNCING)])

        async def keep_writing() -> None:
            for round_ in range(60):
                i = source.randrange(45)
                if round_ % 7 == 3:
                    await cluster.update(UpdateKind.TRUNCATE, chunk_of(i), length=round_ * 1000)
                elif round_ % 7 == 5:
                    await cluster.update(UpdateKind.REMOVE, chunk_of(i))
                else:
                    await cluster.write(chunk_of(i), b"w" * 3000, offset=round_ * 500)

        writing = asyncio.ensure_future(keep_writing())
        await until(lambda: third.hosted.report().local == LocalState.UPTODATE)
        report = third.hosted.report()
        assert report.chain_version == cluster.chain.version
        assert report.sync_done_bytes == report.sync_total_bytes > 0
        assert third.reports > 0
        cluster.set_chain([(first, SERVING), (second, SERVING), (third, SERVING)])
        await writing
        assert len(await cluster.assert_equal(first, second, third)) > 20

    run(tmp_path, body)


def test_r1_killed_between_pending_and_committed(tmp_path: Path) -> None:
    """Each replica killed between pending and committed: the chain converges when it is back.

    The tail has committed, its predecessors have not; they come back and converge.
    """

    async def body(cluster: ClusterUnderTest) -> None:
        first, second, third = cluster.nodes
        await cluster.write(chunk_of(0), b"1" * 9000)
        for node in (first, second):
            assert node.hosted.store is not None
            node.hosted.store.prepare(
                chunk_of(0),
                UpdateKind.WRITE,
                version=2,
                offset=10,
                length=3,
                data=memoryview(b"new"),
                chunk_bytes=CHUNK_BYTES,
                remembered=(),
            )
        # The head is restarted: it finds its pending version and rolls it forward.
        await first.stop()
        await cluster.start_node(first)
        cluster.set_chain([(node, SERVING) for node in cluster.nodes])
        await asyncio.sleep(0.05)
        for node in cluster.nodes:
            result, content = await cluster.read(node, chunk_of(0), 13)
            assert (result.version, content) == (2, b"1" * 10 + b"new")
        await cluster.assert_equal(first, second, third)

    run(tmp_path, body)


def test_o14_o7_damage_is_repaired_from_another_replica(tmp_path: Path) -> None:
    """A damaged block is served and repaired from another replica."""

    async def body(cluster: ClusterUnderTest) -> None:
        head = cluster.nodes[0]
        data = random.Random(5).randbytes(200_000)
        await cluster.write(chunk_of(0), data)
        assert head.hosted.replica is not None
        await head.hosted.replica.flush()
        damage(head.path, data[:64])
        assert (await cluster.read(head, chunk_of(0), len(data)))[0].code == Code.CHECKSUM
        assert (await cluster.read(cluster.nodes[1], chunk_of(0), len(data)))[1] == data
        for _ in range(100):
            result, content = await cluster.read(head, chunk_of(0), len(data))
            if not result.code:
                break
            await asyncio.sleep(0.01)
        assert content == data
        await cluster.assert_equal(*cluster.nodes)

    run(tmp_path, body)


def test_an_update_of_damaged_data_repairs_it_first(tmp_path: Path) -> None:
    async def body(cluster: ClusterUnderTest) -> None:
        data = random.Random(6).randbytes(200_000)
        await cluster.write(chunk_of(0), data)
        for victim in (0, 1):
            node = cluster.nodes[victim]
            assert node.hosted.replica is not None
            await node.hosted.replica.flush()
            damage(node.path, data[20:84])
            await cluster.write(chunk_of(0), b"part", offset=10)
        expected = data[:10] + b"part" + data[14:]
        for node in cluster.nodes:
            for _ in range(100):
                result, content = await cluster.read(node, chunk_of(0), len(data))
                if not result.code:
                    break
                await asyncio.sleep(0.01)
            assert content == expected
        await cluster.assert_equal(*cluster.nodes)

    run(tmp_path, body)


def damage(path: Path, beginning: bytes) -> None:
    """Flip bytes of the one block that begins with `beginning`."""
    for file in sorted(path.rglob("*")):
        if file.is_file() and (at := file.read_bytes().find(beginning)) >= 0:
            with file.open("r+b") as writable:
                writable.seek(at)
                writable.write(bytes(b ^ 0xFF for b in beginning))
            return
    raise AssertionError("the data is in no file")
