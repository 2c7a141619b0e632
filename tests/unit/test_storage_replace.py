"""What fsck asks of storage: looking without healing, and one replica made equal to another."""

import asyncio
import random
from pathlib import Path

import pytest

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, ChainVersion, TargetId
from emberfs.proto.storage_calls import (
    LIST,
    REPAIR,
    ChunkRow,
    ListRequest,
    RepairRequest,
    UpdateKind,
)
from unit.test_storage_server_cluster import (
    ClusterUnderTest,
    NodeUnderTest,
    chunk_of,
    damage,
    run,
)


async def look(cluster: ClusterUnderTest, node: NodeUnderTest) -> list[ChunkRow]:
    peer = await cluster.peers.get(cluster.records[node.id].endpoints)
    request = ListRequest(node.target, b"", b"", 100, verify=True, heal=False)
    reply = await peer.call(LIST.number, LIST.encode_request(request), timeout_ns=3 * SECOND)
    return list(LIST.decode_answer(reply.body).rows)


async def repair(
    cluster: ClusterUnderTest, node: NodeUnderTest, source: TargetId, wanted: ChunkRow, **other: int
) -> None:
    peer = await cluster.peers.get(cluster.records[node.id].endpoints)
    request = RepairRequest(
        node.target,
        ChainVersion(other.get("chain_version", cluster.chain.version)),
        wanted.chunk,
        source,
        other.get("version", wanted.version),
        wanted.length,
    )
    await peer.call(REPAIR.number, REPAIR.encode_request(request), timeout_ns=5 * SECOND)


def test_o7_looking_at_damage_does_not_heal_it_and_repair_does(tmp_path: Path) -> None:
    """fsck reports damage that it saw, and only --repair changes it."""

    async def body(cluster: ClusterUnderTest) -> None:
        head, second, _ = cluster.nodes
        data = random.Random(5).randbytes(200_000)
        await cluster.write(chunk_of(0), data)
        assert head.hosted.replica is not None
        await head.hosted.replica.flush()
        damage(head.path, data[:64])
        for _ in range(5):
            assert (await look(cluster, head))[0].damaged
            await asyncio.sleep(0.02)
        (good,) = await look(cluster, second)
        await repair(cluster, head, second.target, good)
        assert await look(cluster, head) == [good]
        assert (await cluster.read(head, chunk_of(0), len(data)))[1] == data
        await cluster.assert_equal(*cluster.nodes)

    run(tmp_path, body)


@pytest.mark.parametrize("kind", ["older", "other content", "absent"])
def test_o7_a_replica_is_made_equal_whatever_it_holds(tmp_path: Path, kind: str) -> None:
    """Replicas that differ in version, content or existence are equal after a repair."""

    async def body(cluster: ClusterUnderTest) -> None:
        head, second, tail = cluster.nodes
        for text in (b"first" * 1000, b"second" * 1000):
            await cluster.write(chunk_of(0), text)
        (good,) = await look(cluster, second)
        assert tail.hosted.store is not None
        absent = kind == "absent"
        data = memoryview(b"" if absent else b"else" * 1000)
        tail.hosted.store.prepare_and_commit(
            chunk_of(0),
            UpdateKind.REPLACE,
            version=good.version - (kind == "older"),
            offset=0,
            length=len(data),
            data=data,
            chunk_bytes=1 << 20,
            remembered=(),
            replace_exists=not absent,
        )
        assert await look(cluster, tail) != [good]
        await repair(cluster, tail, head.target, good)
        await cluster.assert_equal(*cluster.nodes)
        await cluster.write(chunk_of(0), b"third" * 1000)
        content = b"third" * 1000 + (b"second" * 1000)[5000:]
        assert (await cluster.read(tail, chunk_of(0)))[1] == content
        await cluster.assert_equal(*cluster.nodes)

    run(tmp_path, body)


def test_a_repair_from_what_was_not_seen_is_refused(tmp_path: Path) -> None:
    async def body(cluster: ClusterUnderTest) -> None:
        head, second, _ = cluster.nodes
        await cluster.write(chunk_of(0), b"x" * 5000)
        (good,) = await look(cluster, second)
        for other in ({"version": 9}, {"chain_version": 99}):
            with pytest.raises(EmberfsError) as raised:
                await repair(cluster, head, second.target, good, **other)
            assert raised.value.code == Code.STALE
        with pytest.raises(EmberfsError) as raised:
            await repair(cluster, head, head.target, good)
        assert raised.value.code == Code.INVALID
        assert await look(cluster, head) == [good]

    run(tmp_path, body)


def test_a_source_that_no_target_can_be_is_refused_by_the_decoder() -> None:
    """Found by fuzzing: it did not fit into the read that was to fetch the content."""
    request = RepairRequest(TargetId(101), ChainVersion(1), chunk_of(0), TargetId(1 << 32), 1, 0)
    with pytest.raises(EmberfsError) as caught:
        REPAIR.decode_request(REPAIR.encode_request(request))
    assert caught.value.code == Code.MALFORMED
