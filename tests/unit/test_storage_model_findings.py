"""What the model of the chain protocol (tests/model) found in the product."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from emberfs.fabric.call import ServerCall
from emberfs.proto.cluster import LocalState
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.storage_calls import SYNC, SyncRequest, UpdateKind
from emberfs.storage import chunk_events as ev
from emberfs.storage.craq import ChunkMachine
from emberfs.storage.hosted import FILLED
from emberfs.storage.readrule import ReadPlan, plan_read, settle_read
from unit.test_storage_craq_rules import arrive, request, state, view, waiting
from unit.test_storage_server_cluster import (
    CHUNK_BYTES,
    SERVING,
    SYNCING,
    ClusterUnderTest,
    chunk_of,
)


class SyncCall:
    """As much of a ServerCall as SYNC looks at."""

    def __init__(self, request: SyncRequest) -> None:
        self.body = SYNC.encode_request(request)


def done(cluster: ClusterUnderTest) -> ServerCall:
    """Say to the second node that it holds everything."""
    target = cluster.nodes[1].target
    request = SyncRequest(target, cluster.chain.version, True, 0, 0)
    return cast(ServerCall, SyncCall(request))


async def start_syncing(cluster: ClusterUnderTest) -> None:
    """The second node is being filled, by a first one that does not run."""
    filled = cluster.nodes[1]
    cluster.set_chain([(cluster.nodes[0], SERVING), (filled, SYNCING)])
    # Twice, and complete in between: a directory that was empty would be told so.
    await filled.start("tcp://127.0.0.1:0", cluster.snapshot())
    await filled.stop()
    Path(filled.hosted.path, FILLED).write_bytes(b"yes")
    await filled.start("tcp://127.0.0.1:0", cluster.snapshot())


async def stop(cluster: ClusterUnderTest) -> None:
    await cluster.nodes[1].stop()
    await cluster.peers.close()


def test_a_target_is_not_complete_while_a_write_of_before_is_in_work(tmp_path: Path) -> None:
    """A write that a slow disk began before the target lost its place ends before it serves.

    BUG_SUCCESSOR_UNSETTLED: it became pending after the inventories had been compared; as tail of
    the next chain the target committed it, alone.
    """

    async def body() -> None:
        cluster = ClusterUnderTest(tmp_path, "tcp")
        await start_syncing(cluster)
        node = cluster.nodes[1]
        try:
            replica = node.hosted.replica
            assert replica is not None
            async with replica.hold(chunk_of(1)):
                telling = asyncio.ensure_future(node.service.sync(done(cluster)))
                await asyncio.sleep(0.05)
                assert not telling.done()
                assert node.hosted.state.local == LocalState.ONLINE
            async with asyncio.timeout(5):
                await telling
            assert node.hosted.state.local == LocalState.UPTODATE
        finally:
            await stop(cluster)

    asyncio.run(body())


def test_a_target_with_a_pending_write_of_before_is_compared_again(tmp_path: Path) -> None:
    """A leftover that the comparison did not see is never served. BUG_SUCCESSOR_UNSETTLED."""

    async def body() -> None:
        cluster = ClusterUnderTest(tmp_path, "tcp")
        await start_syncing(cluster)
        store = cluster.nodes[1].hosted.store
        assert store is not None
        store.prepare(
            chunk_of(1), UpdateKind.WRITE, version=1, offset=0, length=3,
            data=memoryview(b"old"), chunk_bytes=CHUNK_BYTES, remembered=(),
        )  # fmt: skip
        await cluster.nodes[1].stop()  # and killed, so that it is a leftover
        await start_syncing(cluster)
        node = cluster.nodes[1]
        try:
            with pytest.raises(EmberfsError) as problem:
                await node.service.sync(done(cluster))
            assert problem.value.code == Code.BUSY
            assert node.hosted.state.local == LocalState.ONLINE
        finally:
            await stop(cluster)

    asyncio.run(body())


def test_a_pending_version_is_not_given_up_before_its_replacement_is_there() -> None:
    """BUG_DISCARD_FIRST: between the two steps a middle replica shows an older version.

    The tail has committed version 5 and shown it. Head and middle were killed and came back, both
    with 5 as leftover. The head sends 5 whole; the middle discards its own 5 and writes the new one
    in a thread: reads see 4 meanwhile, and for good if it is killed once more.
    """
    machine = ChunkMachine(view(head=False), state(4, waiting(5)))
    (prepare,) = arrive(machine, request(UpdateKind.REPLACE, version=5))
    assert isinstance(prepare, ev.Prepare)
    # The store has what it had until the new version is there; see test_storage_swap.
    meanwhile = state(4, waiting(5))
    assert plan_read(meanwhile, machine.exposed, machine.view) == ReadPlan.ASK_TAIL
    assert settle_read(meanwhile, tail_version=5) == 5
