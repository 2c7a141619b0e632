"""No state without an exit: recovery over damage, without progress, and after lost content."""

import asyncio
import random
from pathlib import Path

import pytest

from emberfs.proto.cluster import LocalState, PublicState
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, ChainId, ChainVersion, TargetId
from emberfs.proto.storage_calls import UpdateKind
from emberfs.storage import filling, target
from emberfs.storage.progress import STILL_NS, Progress
from emberfs.storage.target import (
    REST_FIRST_NS,
    STALL_NS,
    Opened,
    RoutingChanged,
    SyncHeard,
    TargetState,
    Ticked,
    Withdrew,
)
from emberfs.storage.view import View
from unit.test_storage_server_cluster import (
    CHUNK_BYTES,
    OFFLINE,
    SERVING,
    SYNCING,
    ClusterUnderTest,
    chunk_of,
    damage,
    run,
    until,
)

ME = TargetId(301)


def seen(public: PublicState, version: int) -> RoutingChanged:
    none = TargetId(0)
    view = View(ME, ChainId(1), ChainVersion(version), public, False, none, False, TargetId(101))
    return RoutingChanged(view)


def syncing() -> TargetState:
    state = TargetState(ME)
    state.handle(seen(SYNCING, 3), 0)
    state.handle(Opened(doubtful=False), 0)
    assert state.local == LocalState.ONLINE
    return state


def test_r2_a_recovery_that_does_not_advance_leaves_the_chain_and_comes_back() -> None:
    """No target stays SYNCING without progress for longer than a bounded time."""
    state = syncing()
    state.handle(Ticked(), STALL_NS - 1)
    assert state.local == LocalState.ONLINE
    effects = state.handle(Ticked(), STALL_NS)
    assert state.local == LocalState.OFFLINE
    assert "nobody has sent anything" in state.reason
    assert target.ReportNow() in effects
    assert not state.view.writable  # the chain's writes do not wait for us
    now_ns = STALL_NS + REST_FIRST_NS
    state.handle(Ticked(), now_ns)
    assert state.local == LocalState.OFFLINE  # the chain has not let us go yet
    state.handle(seen(OFFLINE, 4), now_ns)
    state.handle(Ticked(), now_ns)
    assert state.local == LocalState.ONLINE
    state.handle(seen(SYNCING, 5), now_ns)
    state.handle(Ticked(), now_ns + STALL_NS - 1)
    assert state.local == LocalState.ONLINE
    state.handle(Ticked(), now_ns + STALL_NS)
    state.handle(seen(OFFLINE, 6), now_ns + STALL_NS)
    state.handle(Ticked(), now_ns + STALL_NS + REST_FIRST_NS)
    assert state.local == LocalState.OFFLINE  # the second rest is longer


def test_progress_keeps_a_recovery_and_its_lack_is_told() -> None:
    state = syncing()
    for second in range(0, 200, 10):
        state.handle(SyncHeard(ChainVersion(3), ""), second * SECOND)
        state.handle(Ticked(), (second + 9) * SECOND)
        assert state.local == LocalState.ONLINE
    state.handle(SyncHeard(ChainVersion(2), ""), 219 * SECOND)  # of an older chain: counts nothing
    state.handle(SyncHeard(ChainVersion(3), "no route"), 219 * SECOND)
    assert state.sync_problem == "no route"
    state.handle(Ticked(), 190 * SECOND + STALL_NS)
    assert state.local == LocalState.OFFLINE
    assert "no route" in state.reason


def test_withdrawal_waits_until_the_chain_relies_on_us_no_more() -> None:
    state = TargetState(ME)
    state.handle(seen(SERVING, 3), 0)
    state.handle(Opened(doubtful=False), 0)
    assert state.serves
    state.handle(Withdrew("lost something"), 0)
    assert not state.serves
    assert state.local == LocalState.OFFLINE
    state.handle(Ticked(), REST_FIRST_NS)
    assert not state.serves
    state.handle(seen(OFFLINE, 4), REST_FIRST_NS)
    state.handle(Ticked(), REST_FIRST_NS)
    assert state.local == LocalState.ONLINE


def test_a_problem_is_told_until_a_session_comes_further() -> None:
    progress = Progress()
    progress.begin(10, 1000, 0)
    for _ in range(4):
        progress.sent(100, SECOND)
    progress.failed("refused")
    progress.begin(10, 1000, 2 * SECOND)
    progress.equal(4, 400, 2 * SECOND)
    assert progress.problem(2 * SECOND) == "refused"
    progress.sent(100, 3 * SECOND)
    assert progress.problem(3 * SECOND) == ""
    assert "nothing has moved" in progress.problem(4 * SECOND + STILL_NS)
    progress.waits(4 * SECOND + STILL_NS)
    assert progress.problem(4 * SECOND + STILL_NS) == ""


def test_the_rate_is_of_the_last_seconds_and_counts_what_was_sent() -> None:
    progress = Progress()
    progress.begin(100, 10**6, 0)
    assert progress.bytes_per_s(0) == 0
    for second in range(1, 40):
        progress.equal(1, 5000, second * SECOND)
        progress.sent(1000 if second < 20 else 3000, second * SECOND)
        rate = progress.bytes_per_s(second * SECOND)
    assert 2900 <= rate <= 3100


def fill(cluster: ClusterUnderTest) -> None:
    first, second, third = cluster.nodes
    cluster.set_chain([(first, SERVING), (third, SYNCING), (second, OFFLINE)])


def test_damage_on_the_only_complete_copy_does_not_hold_up_recovery(tmp_path: Path) -> None:
    """A chunk damaged on its only complete copy is told of; all the rest is filled and serves."""

    async def body(cluster: ClusterUnderTest) -> None:
        first, second, third = cluster.nodes
        cluster.set_chain([(first, SERVING), (second, OFFLINE), (third, OFFLINE)])
        source = random.Random(4)
        written = [source.randbytes(300_000) for _ in range(6)]
        for i, data in enumerate(written):
            await cluster.write(chunk_of(i), data)
        assert first.hosted.replica is not None
        await first.hosted.replica.flush()
        damage(first.path, written[3][150_000:150_064])
        fill(cluster)
        await until(lambda: third.hosted.report().local == LocalState.UPTODATE)
        cluster.set_chain([(first, SERVING), (third, SERVING), (second, OFFLINE)])
        for node in (first, third):
            assert node.hosted.report().damaged_chunks == 1
            for i, data in enumerate(written):
                result, content = await cluster.read(node, chunk_of(i), len(data))
                assert content == (b"" if i == 3 else data)
                assert result.code == (Code.CHECKSUM if i == 3 else 0)
            good = (await cluster.read(node, chunk_of(3), 100_000))[1]
            assert good == written[3][:100_000]  # what is good of it is not lost
        report = third.hosted.report()
        assert (report.sync_source, report.sync_done_chunks) == (0, 0)  # only while it is filled
        await cluster.write(chunk_of(3), written[0])  # whoever writes it anew heals it
        for node in (first, third):
            assert (await cluster.read(node, chunk_of(3), 300_000))[1] == written[0]
            assert node.hosted.report().damaged_chunks == 0

    run(tmp_path, body)


def test_a_write_to_a_damaged_chunk_ends_while_the_successor_is_filled(tmp_path: Path) -> None:
    """A small write beside the damage reaches a target in recovery with all that is good."""

    async def body(cluster: ClusterUnderTest) -> None:
        first, second, third = cluster.nodes
        cluster.set_chain([(first, SERVING), (second, OFFLINE), (third, OFFLINE)])
        data = random.Random(5).randbytes(300_000)
        await cluster.write(chunk_of(0), data)
        assert first.hosted.replica is not None
        await first.hosted.replica.flush()
        damage(first.path, data[150_000:150_064])
        fill(cluster)
        async with asyncio.timeout(4):
            await cluster.write(chunk_of(0), b"n" * 4096, offset=8192)
        await until(lambda: third.hosted.report().local == LocalState.UPTODATE)
        cluster.set_chain([(first, SERVING), (third, SERVING), (second, OFFLINE)])
        for node in (first, third):
            content = (await cluster.read(node, chunk_of(0), 16384))[1]
            assert content == data[:8192] + b"n" * 4096 + data[12288:16384]
            assert (await cluster.read(node, chunk_of(0), 300_000))[0].code == Code.CHECKSUM

    run(tmp_path, body)


def test_r1_a_head_that_cannot_finish_its_update_leaves_it_to_who_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pending update over damaged content is ended by who is complete, not tried for ever."""
    monkeypatch.setattr(target, "REST_FIRST_NS", SECOND // 10)
    monkeypatch.setattr("emberfs.storage.hosted.TICK_NS", SECOND // 50)

    async def body(cluster: ClusterUnderTest) -> None:
        first, second, third = cluster.nodes
        data = random.Random(6).randbytes(300_000)
        await cluster.write(chunk_of(0), data)
        for node in cluster.nodes:
            assert node.hosted.replica is not None
            await node.hosted.replica.flush()
        for node in (first, second):
            assert node.hosted.store is not None
            node.hosted.store.prepare(
                chunk_of(0),
                UpdateKind.WRITE,
                version=2,
                offset=4096,
                length=4096,
                data=memoryview(b"n" * 4096),
                chunk_bytes=CHUNK_BYTES,
                remembered=(),
            )
        damage(first.path, data[150_000:150_064])
        await first.stop()
        await second.stop()
        await cluster.start_node(second)
        await cluster.start_node(first)
        cluster.set_chain([(node, SERVING) for node in cluster.nodes])
        await until(lambda: first.hosted.report().local == LocalState.OFFLINE)
        assert "damage" in first.hosted.report().reason
        cluster.set_chain([(second, SERVING), (third, SERVING), (first, OFFLINE)])
        expected = data[:4096] + b"n" * 4096 + data[8192:]
        await until(lambda: first.hosted.report().local == LocalState.ONLINE)
        for node in (second, third):
            assert (await cluster.read(node, chunk_of(0), 300_000))[1] == expected
        cluster.set_chain([(second, SERVING), (third, SERVING), (first, SYNCING)])
        await until(lambda: first.hosted.report().local == LocalState.UPTODATE)
        cluster.set_chain([(node, SERVING) for node in (second, third, first)])
        assert (await cluster.read(first, chunk_of(0), 300_000))[1] == expected
        await cluster.assert_equal(*cluster.nodes)

    run(tmp_path, body)


def test_r2_recovery_brings_a_target_back_that_is_ahead_or_differs(tmp_path: Path) -> None:
    """Whatever a returning target holds, in the end it holds what its predecessor has."""

    async def body(cluster: ClusterUnderTest) -> None:
        first, second, third = cluster.nodes
        cluster.set_chain([(first, SERVING), (second, SERVING), (third, OFFLINE)])
        for i in range(6):
            await cluster.write(chunk_of(i), bytes([i]) * 50_000)
        await cluster.update(UpdateKind.REMOVE, chunk_of(5))
        store = third.hosted.store
        assert store is not None
        for i, version, what in (
            (0, 9, b"ahead"),
            (1, 1, b"same version, other content"),
            (2, 1, bytes([2]) * 50_000),
            (5, 4, b"removed meanwhile"),
            (8, 1, b"never was"),
        ):
            store.prepare_and_commit(
                chunk_of(i),
                UpdateKind.REPLACE,
                version=version,
                offset=0,
                length=len(what),
                data=memoryview(what),
                chunk_bytes=CHUNK_BYTES,
                remembered=(),
            )
        for i in (2, 3):  # equal but for a pending version; nothing but a pending version
            have = store.state(chunk_of(i))
            store.prepare(
                chunk_of(i),
                UpdateKind.WRITE,
                version=have.version + 1 if have is not None else 1,
                offset=0,
                length=3,
                data=memoryview(b"old"),
                chunk_bytes=CHUNK_BYTES,
                remembered=(),
            )
        cluster.set_chain([(first, SERVING), (second, SERVING), (third, SYNCING)])
        await until(lambda: third.hosted.report().local == LocalState.UPTODATE)
        report = third.hosted.report()
        assert report.sync_source == second.target
        assert report.sync_done_chunks == report.sync_total_chunks
        cluster.set_chain([(node, SERVING) for node in cluster.nodes])
        assert len(await cluster.assert_equal(*cluster.nodes)) == 5

    run(tmp_path, body)


def test_r6_a_blank_disk_is_filled_at_the_rate_that_was_set(tmp_path: Path) -> None:
    """A blank target is filled in full, no faster than allowed, and tells how far it is."""

    async def body(cluster: ClusterUnderTest) -> None:
        first, second, third = cluster.nodes
        cluster.set_chain([(first, SERVING), (second, SERVING), (third, OFFLINE)])
        for i in range(20):
            await cluster.write(chunk_of(i), random.Random(i).randbytes(100_000))
        assert second.hosted.replica is not None
        second.service._throttle._bytes_per_s = 2_000_000
        began = asyncio.get_running_loop().time()
        cluster.set_chain([(first, SERVING), (second, SERVING), (third, SYNCING)])
        await until(lambda: 0 < third.hosted.report().sync_done_chunks < 20)
        assert third.hosted.report().sync_total_chunks == 20
        assert third.hosted.report().sync_total_bytes == 2_000_000
        await until(lambda: third.hosted.report().local == LocalState.UPTODATE)
        assert asyncio.get_running_loop().time() - began > 0.8
        cluster.set_chain([(node, SERVING) for node in cluster.nodes])
        assert len(await cluster.assert_equal(*cluster.nodes)) == 20

    filling_progress = filling.PROGRESS_NS
    filling.PROGRESS_NS = SECOND // 20
    try:
        run(tmp_path, body)
    finally:
        filling.PROGRESS_NS = filling_progress


def test_one_chunk_that_is_refused_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of one chunk is told and tried again; all others are there by then."""
    monkeypatch.setattr(filling, "TRANSFERS_MAX", 1)

    async def body(cluster: ClusterUnderTest) -> None:
        first, second, third = cluster.nodes
        cluster.set_chain([(first, SERVING), (second, SERVING), (third, OFFLINE)])
        for i in range(12):
            await cluster.write(chunk_of(i), bytes([i]) * 10_000)
        assert third.hosted.replica is not None
        update, refuse = third.hosted.replica.update, True

        async def picky(request, source):  # type: ignore[no-untyped-def]
            if request.chunk == chunk_of(4) and refuse:
                raise EmberfsError(Code.INVALID, "not this one")
            return await update(request, source)

        monkeypatch.setattr(third.hosted.replica, "update", picky)
        cluster.set_chain([(first, SERVING), (second, SERVING), (third, SYNCING)])
        await until(lambda: "not this one" in third.hosted.report().sync_problem)
        assert len(await cluster.rows(third)) == 11
        refuse = False
        await until(lambda: third.hosted.report().local == LocalState.UPTODATE)
        assert third.hosted.report().sync_problem == ""
        cluster.set_chain([(node, SERVING) for node in cluster.nodes])
        await cluster.assert_equal(*cluster.nodes)

    run(tmp_path, body)
