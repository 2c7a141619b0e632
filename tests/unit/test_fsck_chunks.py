"""fsck of chunks: against metadata, against the other replicas, and the ownership of blocks."""

import pytest
from msgspec.structs import replace

from emberfs.deploy import fsck_chunks, fsck_owners
from emberfs.deploy.fsck_chunks import RemoveChunks
from emberfs.deploy.fsck_equal import are_equal, good_replica
from emberfs.deploy.fsck_mend import Mender
from emberfs.deploy.fsck_owners import BEYOND, MISPLACED, ORPHAN, kind_of
from emberfs.kv import keys
from emberfs.meta import promote, schema
from emberfs.proto.cluster import PublicState
from emberfs.proto.errors import Code
from emberfs.proto.files import Inode, Layout
from emberfs.proto.ids import SECOND, ChainId, ChunkId, InodeId, TargetId
from emberfs.proto.meta_calls import Mend, PromoteRequest
from emberfs.proto.storage_calls import ChunkRow, Leak
from unit.fsck_world import QUICK, Scene, chain_of
from unit.meta_world import CHUNK, World, chain, fails, play, snapshot

NOBODY = 999_999


def row(version: int = 1, length: int = 10, digest: int = 7, **fields: object) -> ChunkRow:
    made = ChunkRow(ChunkId(b"\0" * 12), version, 0, length, digest)
    return replace(made, **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------- replicas


async def differing(scene: Scene, **fields: object) -> Inode:
    """A sound file, one replica (the second) of its first chunk different."""
    inode = await scene.file(b"f", 2 * CHUNK)
    target = chain_of(inode.layout, 0) * 10 + 1
    scene.stores.change(target, inode.id, 0, **fields)
    return inode


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"version": 2}, "version 2"), ({"length": 5}, "5 bytes"), ({"damaged": True}, "damaged")],
    ids=["version", "length", "damage"],
)
def test_o7_a_differing_replica_is_found_and_replaced(
    fields: dict[str, object], expected: str
) -> None:
    """Replicas that differ do not stay unseen, and are repaired from a good one."""

    async def main(world: World) -> None:
        scene = Scene(world)
        inode = await differing(scene, **fields)
        if fields == {"length": 5}:  # two replicas of one version: the operator must decide
            trusted = TargetId(chain_of(inode.layout, 0) * 10)
            left = await scene.repaired()
            assert len(left) == 1
            assert await scene.repaired(trusted=trusted) == []
        else:
            texts = await scene.texts()
            assert len(texts) == 1
            assert f"inode {inode.id} chunk 0 differs" in texts[0]
            assert expected in texts[0]
            assert await scene.repaired() == []
        assert await scene.texts() == []

    play(main)


def test_o3_a_missing_block_on_one_replica_is_found_by_path() -> None:
    """fsck of a path sees a chunk that is missing on one replica, and only of that path."""

    async def main(world: World) -> None:
        scene = Scene(world)
        inode = await scene.file(b"f", 2 * CHUNK)
        await scene.file(b"other", 2 * CHUNK)
        member = world.routing.chains[chain_of(inode.layout, 1)].targets[0]
        rows = scene.stores.rows[member.target]
        del rows[max(c for c in rows if c[:8] == inode.id.to_bytes(8, "big"))]
        texts = await scene.texts(QUICK._replace(path=b"/f"))
        assert len(texts) == 1
        assert f"target {member.target}: absent" in texts[0]
        assert await scene.texts(QUICK._replace(path=b"/other")) == []
        assert await scene.repaired(path=b"/f") == []
        assert await scene.texts() == []

    play(main)


def test_damage_is_not_looked_for_without_verify() -> None:
    async def main(world: World) -> None:
        scene = Scene(world)
        await differing(scene, damaged=True)
        assert await scene.texts(QUICK._replace(verify=False)) == []
        assert len(await scene.texts()) == 1

    play(main)


def test_a_passing_write_is_no_finding() -> None:
    """A difference that has gone, or changes at every look, does not count."""

    async def main(world: World) -> None:
        scene = Scene(world)
        inode = await differing(scene, pending=2)
        target = chain_of(inode.layout, 0) * 10 + 1
        plain, looks = scene.stores.list, 0

        async def changing(*arguments: object, **named: object) -> object:
            nonlocal looks
            looks += 1
            scene.stores.change(target, inode.id, 0, pending=looks)
            return await plain(*arguments, **named)  # type: ignore[arg-type]

        scene.stores.list = changing  # type: ignore[method-assign, assignment]
        assert await scene.texts() == []
        assert any("written all the time" in said for said in scene.said)
        scene.stores.list = plain  # type: ignore[method-assign]
        scene.stores.change(target, inode.id, 0, pending=0)
        assert await scene.texts() == []

    play(main)


def test_a_pending_version_that_stays_is_a_finding() -> None:
    async def main(world: World) -> None:
        scene = Scene(world)
        await differing(scene, pending=2)
        texts = await scene.texts()
        assert len(texts) == 1
        assert "pending 2" in texts[0]
        assert await scene.repaired() == texts  # replication ends it, not fsck

    play(main)


def test_pages_of_replicas_are_walked_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages, replicas with different holes: every chunk is compared exactly once."""
    monkeypatch.setattr(fsck_chunks, "PAGE_ROWS", 3)
    monkeypatch.setattr(fsck_chunks, "VERIFY_BYTES", 2 * CHUNK)

    async def main(world: World) -> None:
        scene = Scene(world)
        inode = await scene.file(b"f", 90 * CHUNK)
        report = await scene.fsck()
        assert report.findings == []
        assert report.chunks == 90
        gone = 0
        for target, rows in scene.stores.rows.items():
            for place, chunk in enumerate(sorted(rows)):
                if place % 7 == target % 2:
                    del rows[chunk]
                    gone += 1
        report = await scene.fsck()
        assert len({finding.text for finding in report.findings}) == gone
        assert report.chunks == 90
        assert await scene.repaired() == []
        assert inode.length == 90 * CHUNK

    play(main)


def test_chunks_that_only_one_replica_has_are_all_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first replica is empty: its only page must not end the walk over the other one."""
    monkeypatch.setattr(fsck_chunks, "PAGE_ROWS", 3)

    async def main(world: World) -> None:
        scene = Scene(world)
        await scene.file(b"f", 90 * CHUNK)
        for one in scene.stores.chains():
            scene.stores.rows[one.targets[0].target].clear()
        assert len(await scene.texts(QUICK._replace(verify=False))) == 90
        assert await scene.repaired() == []

    play(main)


def test_the_good_replica_is_the_newest_sound_one() -> None:
    targets = [TargetId(t) for t in (1, 2, 3)]
    assert good_replica((row(1), row(2), None), targets) == 1
    assert good_replica((row(damaged=True), row(), row()), targets) == 1
    assert good_replica((row(digest=1), row(digest=2), row(digest=2)), targets) == 1
    assert good_replica((row(digest=1), row(digest=2), None), targets) is None
    assert good_replica((row(digest=1), row(digest=2), None), targets, TargetId(2)) == 1
    # The newest is damaged everywhere: an older one would take back an acknowledged write.
    assert good_replica((row(2, damaged=True), row(1), row(1)), targets) is None
    assert good_replica((row(2, damaged=True), row(1), row(1)), targets, TargetId(3)) == 2
    assert good_replica((row(1, pending=2), row(2), row(2)), targets) is None
    assert good_replica((None, None, None), targets) is None
    assert are_equal((row(), row()))
    assert not are_equal((row(), row(pending=2)))
    assert not are_equal((row(damaged=True), row()))
    assert not are_equal((row(), None))


def test_a_replica_that_does_not_serve_is_a_finding() -> None:
    async def main(world: World) -> None:
        world.routing = snapshot(
            chain(1, PublicState.SERVING, PublicState.SYNCING), chain(2, PublicState.SERVING)
        )
        scene = Scene(world)
        assert await scene.texts() == ["chain 1: target 11 is syncing"]

    play(main)


def test_s1_block_findings_are_reported_if_they_stay() -> None:
    """A block that is owned twice or leaked is reported by every fsck."""

    async def main(world: World) -> None:
        scene = Scene(world)
        scene.stores.blocks[TargetId(10)] = ("block 0x5 belongs to more than one chunk",)
        texts = await scene.texts()
        assert texts == ["target 10: block 0x5 belongs to more than one chunk"]

    play(main)


def test_s1_leaked_blocks_are_freed_and_nothing_else_of_a_store_is_touched() -> None:
    """Blocks without owner are freed when asked for; one with two owners is left to a person."""

    async def main(world: World) -> None:
        scene = Scene(world)
        scene.stores.blocks[TargetId(10)] = ("block 0x5 belongs to more than one chunk",)
        scene.stores.leaks[TargetId(10)] = Leak(65536, 3)
        shared = "target 10: block 0x5 belongs to more than one chunk"
        leaked = "target 10: 3 blocks of 64 KiB are marked and have no owner"
        assert await scene.texts() == [shared, leaked]
        assert scene.stores.leaks
        assert await scene.repaired() == [shared]
        assert not scene.stores.leaks
        assert f"repair: {leaked}: free them" in scene.said

    play(main)


# ---------------------------------------------------------------- owners


def test_o3_chunks_without_a_file_are_listed_and_removed() -> None:
    """Orphan chunks are listed with count and bytes, and removed only when asked for."""

    async def main(world: World) -> None:
        scene = Scene(world)
        inode = await scene.file(b"f", 3 * CHUNK)
        scene.stores.put(2, NOBODY, 0, 100)
        scene.stores.put(2, NOBODY, 9, 50)
        expected = f"chain 2: 2 chunks, 150 bytes of inode {NOBODY}, which does not exist"
        assert await scene.texts() == [expected]
        assert scene.stores.removed == []
        assert await scene.repaired() == []
        assert len(scene.stores.removed) == 2
        assert all(c[:8] == NOBODY.to_bytes(8, "big") for c in scene.stores.removed)
        report = await scene.fsck()
        assert report.chunks == 3
        assert inode.length == 3 * CHUNK

    play(main)


def test_orphans_that_still_change_are_no_finding() -> None:
    """Somebody removes them, or writes: both looks must see the same."""

    async def main(world: World) -> None:
        scene = Scene(world)
        scene.stores.put(2, NOBODY, 0, 100)
        sleep_ns = world.env.sleep_ns

        async def sleep(duration_ns: int) -> None:
            scene.stores.put(2, NOBODY, 5, 100)
            await sleep_ns(duration_ns)

        world.env.sleep_ns = sleep  # type: ignore[method-assign]
        assert await scene.texts() == []
        assert len(await scene.texts()) == 1

    play(main)


def test_chunks_that_wait_for_collection_are_in_order() -> None:
    async def main(world: World) -> None:
        scene = Scene(world)
        await scene.file(b"f", 3 * CHUNK)
        await world.unlink(b"f")
        assert await scene.repaired() == []
        assert scene.stores.removed == []
        for key, _ in world.rows(keys.Prefix.DELETED):  # forgotten with its chunks in place
            await scene.write(key, None)
        assert len(await scene.texts()) == 3  # one on each chain
        assert await scene.repaired() == []

    play(main)


def test_an_open_unlinked_file_keeps_its_chunks() -> None:
    async def main(world: World) -> None:
        scene = Scene(world)
        inode = await scene.file(b"f", 3 * CHUNK)
        await world.open_file(inode.id, 5)
        await world.unlink(b"f")
        assert await scene.repaired() == []
        assert scene.stores.removed == []

    play(main)


def test_o11_a_chunk_on_a_foreign_chain_is_found_and_removed() -> None:
    """What a move of data leaves behind on another chain does not stay."""

    async def main(world: World) -> None:
        scene = Scene(world)
        inode = await scene.file(b"f", 2 * CHUNK)
        foreign = chain_of(inode.layout, 1)
        scene.stores.put(foreign, inode.id, 0)
        texts = await scene.texts()
        assert len(texts) == 1
        assert "keeps them elsewhere" in texts[0]
        assert await scene.repaired() == []
        assert len(scene.stores.removed) == 1
        assert (await scene.fsck()).chunks == 2

    play(main)


def test_chunks_behind_the_end_are_cut_unless_somebody_writes() -> None:
    async def main(world: World) -> None:
        scene = Scene(world)
        inode = await scene.file(b"f", CHUNK + 10)
        for index in range(2, 5):
            scene.stores.put(chain_of(inode.layout, index), inode.id, index, 20)
        await world.open_file(inode.id, 5, write=True)
        assert await scene.texts() == []
        await world.settle(inode.id, 5, close=True)
        report = await scene.fsck()
        assert len(report.findings) == 3
        assert all("behind the end" in finding.text for finding in report.findings)
        trim = report.findings[0].mend
        assert isinstance(trim, Mend)
        await world.open_file(inode.id, 6, write=True)  # between look and repair
        await fails(Code.STALE, scene.records.mend(trim))
        await world.settle(inode.id, 6, close=True)
        await scene.repaired()
        assert ("remove", inode.id, 2) in world.chunks.log
        assert ("truncate", inode.id, 1, 10) in world.chunks.log

    play(main)


def test_a_pending_trim_is_in_order() -> None:
    async def main(world: World) -> None:
        scene = Scene(world)
        inode = await scene.file(b"f", CHUNK)
        scene.stores.put(chain_of(inode.layout, 1), inode.id, 1)
        assert inode.layout is not None
        key = keys.trim_key(inode.id)
        await scene.write(key, schema.TRIM.encode(schema.Trim(CHUNK, inode.layout)))
        assert await scene.texts() == []
        await scene.write(key, None)
        assert len(await scene.texts()) == 1

    play(main)


def test_orphans_stay_for_the_grace_time_and_are_looked_at_again() -> None:
    """What got an owner, or changed, between look and repair is left alone."""

    async def main(world: World) -> None:
        scene = Scene(world)
        scene.stores.put(2, NOBODY, 0, 100)
        order = RemoveChunks(ChainId(2), NOBODY, ORPHAN, 1, 100)
        waits: list[int] = []

        async def sleep_ns(duration_ns: int) -> None:
            waits.append(duration_ns)

        world.env.sleep_ns = sleep_ns  # type: ignore[method-assign, assignment]
        mender = Mender(world.env, scene.records, scene.stores, grace_ns=60 * SECOND)
        finding = fsck_chunks.ChunkFinding("", "", order._replace(chunks=2))
        assert "have changed" in await mender.mend(finding, world.env.now_ns())
        assert waits
        assert waits[0] > 59 * SECOND
        made = await world.file(b"f")
        scene.stores.put(2, made.id, 0, 100)
        finding = finding._replace(mend=order._replace(inode=made.id))
        assert "exists now" in await mender.mend(finding, 0)
        assert scene.stores.removed == []
        assert await mender.mend(finding._replace(mend=order), 0) == ""
        assert len(scene.stores.removed) == 1

    play(main)


def test_strange_inodes_are_remembered_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck_owners, "INODES_MAX", 3)

    async def main(world: World) -> None:
        scene = Scene(world)
        for number in range(5):
            scene.stores.put(2, NOBODY + number, 0, 100)
        assert len(await scene.texts()) == 3
        assert await scene.repaired() == []

    play(main)


def test_kinds_of_strange_chunks() -> None:
    layout = Layout(CHUNK, (ChainId(1), ChainId(2)))
    inode = Inode(InodeId(5), 0o100644, 0, 0, 1, CHUNK + 10, 0, 0, 0, layout=layout)
    assert kind_of(None, ChainId(1), 0, 10) == ORPHAN
    assert kind_of(inode, ChainId(1), 0, CHUNK) == ""
    assert kind_of(inode, ChainId(2), 1, 10) == ""
    assert kind_of(inode, ChainId(2), 1, 11) == BEYOND
    assert kind_of(inode, ChainId(1), 1, 10) == MISPLACED
    assert kind_of(inode, ChainId(1), 2, 0) == BEYOND
    assert kind_of(replace(inode, layout=None), ChainId(1), 0, 1) == MISPLACED


def test_chunks_of_a_small_file_that_grew_have_an_owner() -> None:
    """By the record of their data id; those under the inode's own id belong to nobody."""

    async def main(world: World) -> None:
        scene = Scene(world)
        made = await world.create(b"grown", session=0)
        await world.settle(made.id, content=b"abc", length=3, inline_version=made.inline_version)
        request = PromoteRequest(world.rid(), made.id)
        grown = (await promote.promote(world.context, request)).inode
        assert grown.layout is not None
        chain = chain_of(grown.layout, 0)
        scene.stores.put(chain, grown.layout.data, 0, 3)
        assert await scene.texts() == []
        assert await scene.texts(QUICK._replace(path=b"/grown")) == []
        scene.stores.put(chain, grown.layout.data, len(grown.layout.chains), 3)
        scene.stores.put(chain, grown.id, 0, 3)
        small = await world.create(b"small", session=0)
        scene.stores.put(chain_of(small.layout, 0), small.id, 0, 3)
        texts = sorted(await scene.texts())
        assert len(texts) == 3
        assert sum("keeps them elsewhere" in text for text in texts) == 2
        assert f"behind the end of inode {grown.id} (3 bytes)" in "".join(texts)
        await scene.repaired()
        assert world.chunks.of(grown.layout.data) == {0: 3}
        await world.unlink(b"grown")
        assert not any("does not exist" in text for text in await scene.texts())

    play(main, inline_bytes_max=100)
