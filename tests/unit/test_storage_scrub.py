"""The scrubber: its rules, and real stores with one byte flipped, one row gone, one chunk other."""

import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from emberfs.kv.rocks import RocksStore
from emberfs.proto.errors import Code
from emberfs.proto.ids import ChunkId
from emberfs.proto.storage_calls import ChunkRow, UpdateKind
from emberfs.storage import scrub
from emberfs.storage.records import record_key
from emberfs.storage.scrubplan import Note, Verdict, differing, judge, wait_s
from unit.test_storage_server_cluster import (
    CHUNK_BYTES,
    SERVING,
    ClusterUnderTest,
    NodeUnderTest,
    chunk_of,
    damage,
    run,
    until,
)

CHUNK = chunk_of(0)
FAST = scrub.ScrubSettings(bytes_per_s=1 << 30, interval_s=3600)


def row(version: int = 3, pending: int = 0, digest: int = 1, damaged: bool = False) -> ChunkRow:
    return ChunkRow(CHUNK, version, pending, 10, digest, damaged)


@pytest.mark.parametrize(
    ("here", "there", "verdict"),
    [
        (None, None, Verdict.SAME),
        (row(), row(), Verdict.SAME),
        (row(), row(pending=4), Verdict.BUSY),
        (row(pending=4), None, Verdict.BUSY),
        (row(), None, Verdict.SEND),
        (None, row(), Verdict.FETCH),
        (row(4), row(3), Verdict.SEND),
        (row(3), row(4), Verdict.FETCH),
        (row(), row(digest=2), Verdict.SEND),
        (row(damaged=True), row(), Verdict.MEND),
        (row(), row(4, damaged=True), Verdict.MEND),
    ],
)
def test_who_is_right(here: ChunkRow | None, there: ChunkRow | None, verdict: Verdict) -> None:
    assert judge(here, there) == verdict
    listed = differing([here] if here else [], [there] if there else [], b"")
    assert listed == ([] if verdict in (Verdict.SAME, Verdict.BUSY) else [CHUNK])


def test_when_the_next_pass_is_due() -> None:
    assert wait_s(Note(), 100, 50) == 0  # never done
    assert wait_s(Note("00ff", 1000), 100, 1001) == 0  # under way
    assert wait_s(Note("", 1000), 100, 1030) == 70
    assert wait_s(Note("", 1000), 100, 2000) == 0
    assert wait_s(Note("", 10**9), 100, 5) == 100  # the clock was an age ahead


class Gate:
    """Closed while all restart: a scrubber that meets another chain version leaves it for later."""

    is_open = True


def scrubbing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: Callable[[ClusterUnderTest, bytes], Awaitable[None]],
) -> None:
    """Three replicas with five chunks each on stable storage; the third chunk is `data`."""
    monkeypatch.setattr(scrub, "LOOK_NS", 20_000_000)
    may = scrub.Scrubber._may
    monkeypatch.setattr(scrub.Scrubber, "_may", lambda self: Gate.is_open and may(self))
    Gate.is_open = True

    async def main(cluster: ClusterUnderTest) -> None:
        source = random.Random(9)
        for i in range(5):
            data = source.randbytes(200_000)
            await cluster.write(chunk_of(i), data)
            if i == 2:
                victim_data = data
        for node in cluster.nodes:
            assert node.hosted.replica is not None
            await node.hosted.replica.flush()
        await body(cluster, victim_data)

    run(tmp_path, main)


async def restart(cluster: ClusterUnderTest, node: NodeUnderTest) -> None:
    await node.stop()
    node.scrub = FAST
    await cluster.start_node(node)
    cluster.set_chain([(n, SERVING) for n in cluster.nodes])


def agree(nodes: Sequence[NodeUnderTest]) -> bool:
    """Tell whether all serve, in the same version of their chain."""
    replicas = [node.hosted.replica for node in nodes]
    serving = [r.view.chain_version for r in replicas if r is not None and r.state.serves]
    return len(serving) == len(nodes) and len(set(serving)) == 1


async def scrubbed(*nodes: NodeUnderTest) -> None:
    await until(lambda: agree(nodes))
    Gate.is_open = True
    await until(lambda: all(n.hosted.report().scrub_finished_s for n in nodes))


def findings(cluster: ClusterUnderTest) -> int:
    return sum(node.hosted.report().scrub_findings for node in cluster.nodes)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_o7_scrub_finds_and_mends_a_flipped_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    """One flipped byte on any replica is found and mended before anybody reads it."""

    async def body(cluster: ClusterUnderTest, data: bytes) -> None:
        damage(cluster.nodes[victim].path, data[100_000:100_001] + data[100_001:100_064])
        Gate.is_open = False
        for node in cluster.nodes:
            await restart(cluster, node)
        await scrubbed(*cluster.nodes)
        assert findings(cluster) == 1
        assert cluster.nodes[victim].hosted.report().scrub_findings == 1
        assert cluster.nodes[victim].hosted.report().damaged_chunks == 0
        await cluster.assert_equal(*cluster.nodes)

    scrubbing(tmp_path, monkeypatch, body)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_o7_scrub_finds_and_restores_a_missing_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    """A chunk whose record vanished on any replica comes back, with its writers' memory."""

    async def body(cluster: ClusterUnderTest, data: bytes) -> None:
        lost = cluster.nodes[victim]
        await lost.stop()
        store = RocksStore(f"{lost.path}/meta", write_buffer_bytes=1 << 20)
        store.write([(record_key(chunk_of(2)), None)])
        store.close()
        await cluster.start_node(lost)
        cluster.set_chain([(n, SERVING) for n in cluster.nodes])
        assert (await cluster.read(lost, chunk_of(2), 100))[0].length == 0
        Gate.is_open = False
        for node in cluster.nodes:
            await restart(cluster, node)
        await scrubbed(*cluster.nodes)
        assert findings(cluster) in (1, 2)  # both neighbours in the chain may see it
        states = []
        for node in cluster.nodes:
            assert (await cluster.read(node, chunk_of(2), len(data)))[1] == data
            assert node.hosted.store is not None
            states.append(node.hosted.store.state(chunk_of(2)))
        assert states[0] == states[1] == states[2]

    scrubbing(tmp_path, monkeypatch, body)


def test_o7_scrub_finds_replicas_that_differ_though_each_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that disagree at the same version are made equal."""

    async def body(cluster: ClusterUnderTest, data: bytes) -> None:
        other = cluster.nodes[2]
        assert other.hosted.store is not None
        other.hosted.store.prepare_and_commit(
            chunk_of(2),
            UpdateKind.REPLACE,
            version=1,
            offset=0,
            length=5,
            data=memoryview(b"other"),
            chunk_bytes=CHUNK_BYTES,
            remembered=(),
        )
        Gate.is_open = False
        for node in cluster.nodes:
            await restart(cluster, node)
        await scrubbed(*cluster.nodes)
        assert findings(cluster) == 1
        assert (await cluster.read(other, chunk_of(2), len(data)))[1] == data
        await cluster.assert_equal(*cluster.nodes)

    scrubbing(tmp_path, monkeypatch, body)


def test_what_nobody_can_mend_is_told_and_does_not_stop_the_scrubber(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: ClusterUnderTest, data: bytes) -> None:
        for node in cluster.nodes:
            damage(node.path, data[50_000:50_064])
        Gate.is_open = False
        for node in cluster.nodes:
            await restart(cluster, node)
        await scrubbed(*cluster.nodes)
        for node in cluster.nodes:
            assert node.hosted.report().damaged_chunks == 1
            assert (await cluster.read(node, chunk_of(2), len(data)))[0].code == Code.CHECKSUM
            whole = (await cluster.read(node, chunk_of(2), 40_000))[1]
            assert whole == data[:40_000]

    scrubbing(tmp_path, monkeypatch, body)


def test_a_pass_goes_on_where_it_was_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "PAGE_CHUNKS", 2)
    monkeypatch.setattr(scrub, "NOTE_NS", 0)

    async def body(cluster: ClusterUnderTest, data: bytes) -> None:
        tail = cluster.nodes[2]
        await tail.stop()
        tail.scrub = scrub.ScrubSettings(bytes_per_s=2_000_000, interval_s=3600)
        await cluster.start_node(tail)
        cluster.set_chain([(n, SERVING) for n in cluster.nodes])
        note = tail.path / "scrub"
        await until(note.exists)
        await tail.stop()
        verified: list[ChunkId] = []
        await cluster.start_node(tail)
        store = tail.hosted.store
        assert store is not None
        verify = store.verify
        monkeypatch.setattr(
            store, "verify", lambda c, from_disk=False: verified.append(c) or verify(c)
        )
        cluster.set_chain([(n, SERVING) for n in cluster.nodes])
        await scrubbed(tail)
        assert chunk_of(0) not in verified
        assert chunk_of(4) in verified

    scrubbing(tmp_path, monkeypatch, body)
