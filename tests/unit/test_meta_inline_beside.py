"""Small files beside the rest: quotas, trees, other servers, holes, announcements, flags."""

import asyncio
import stat

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import files
from emberfs.meta.announce import change_of
from emberfs.meta.inline import Versions
from emberfs.meta.inode_ids import BLOCK_IDS
from emberfs.meta.orphans import Orphans
from emberfs.meta.promote import barred_block
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code
from emberfs.proto.ids import ROOT_INODE, InodeId, MiB
from emberfs.proto.inline import of_one_life
from unit.meta_world import ALICE, ROOT, World, fails, until
from unit.quota_world import check_counters, remove_quota, set_quota, used, walked
from unit.test_meta_inline import LIMIT, content, grow, owners, play_inline, put
from unit.test_meta_trees import empty, remove_tree, trash, trashed

# ---------------------------------------------------------------- quotas, trees


def test_contents_count_as_lengths_and_promotion_counts_nothing() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, bytes_max=1 * MiB)
        await walked(w)
        made = await put(w, await w.create(b"a", top.id), b"x" * 1000)
        assert used(w, top.id) == (2, 1000)
        made = await put(w, made, b"x" * 300)
        assert used(w, top.id) == (2, 300)
        made = await w.setattr(made.id, length=5000)
        assert used(w, top.id) == (2, 5000)
        await grow(w, made.id)
        assert used(w, top.id) == (2, 5000)
        await w.settle(made.id, length=7000, truncate_version=made.truncate_version, close=True)
        assert used(w, top.id) == (2, 7000)
        await put(w, await w.create(b"b", top.id, session=2), b"y" * 50, session=2)
        await remove_quota(w, top.id)
        await walked(w)
        await set_quota(w, top.id, bytes_max=10)
        await walked(w)
        assert used(w, top.id) == (3, 7050)
        await check_counters(w)

    play_inline(scene)


def test_what_a_writer_has_accepted_is_settled_though_the_quota_is_full() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, bytes_max=100)
        await walked(w)
        request = calls.CreateRequest(ROOT, w.rid(), top.id, b"a", 0o644, session=1, write=True)
        answer = await files.create(w.context, request)
        assert (answer.room, answer.content, answer.inline_bytes_max) == (100, b"", LIMIT)
        made = await put(w, answer.inode, b"x" * 150)
        settle = calls.SettleRequest(w.rid(), made.id, 1, want=10)
        assert (await files.settle(w.context, settle)).room == 0
        opened = calls.OpenRequest(ROOT, w.rid(), made.id, 2, True, True)
        assert (await files.open_(w.context, opened)).room == 0
        assert (await files.content(w.context, calls.ContentRequest(made.id))).room is None
        await fails(Code.QUOTA, w.setattr(made.id, length=151))
        assert (await w.setattr(made.id, length=10)).length == 10
        assert used(w, top.id) == (2, 10)
        await check_counters(w)

    play_inline(scene)


def test_a_length_that_only_its_writer_knows_is_counted_when_it_is_cut() -> None:
    """A power cut took the settlement, and what it had added to the counters."""

    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, bytes_max=5000)
        await walked(w)
        made = await w.create(b"a", top.id)
        await grow(w, made.id)
        await w.setattr(made.id, length=8000, written=9000, truncate_version=0, session=1)
        assert used(w, top.id) == (2, 8000)
        await check_counters(w)

    play_inline(scene)


def test_removed_trees_and_the_trash_leave_no_contents() -> None:
    """Neither contents nor owners of data ids: the invariants are checked behind every scene."""

    async def scene(w: World) -> None:
        for name in (b"tree", b"rubbish"):
            top = await w.mkdir(name)
            await set_quota(w, top.id, bytes_max=1 * MiB)
            await walked(w)
            small = await put(w, await w.create(b"small", top.id), b"abc")
            grown = await grow(w, (await put(w, await w.create(b"grown", top.id), b"def")).id)
            for inode in (small, grown):
                await w.settle(inode.id, close=True)
        await remove_tree(w, b"tree")
        await w.context.removed_trees.finish()
        assert (len(w.rows(keys.Prefix.INLINE)), owners(w)) == (1, 1)
        await trash(w, b"rubbish")
        (item,) = await trashed(w)
        await empty(w, item)
        await w.context.removed_trees.finish()
        await w.context.collector.collect()
        assert (w.rows(keys.Prefix.INLINE), owners(w), w.chunks.chunks) == ([], 0, {})

    play_inline(scene)


# ---------------------------------------------------------------- other servers


def test_on_a_shared_store_no_other_server_looks_like_a_loss() -> None:
    async def scene(w: World) -> None:
        one, two = Versions(w.engine), Versions(w.engine)
        for versions in (one, two):
            await versions.load(takes_back=False)
        given = [one.after(0)]
        for versions in (two, two, one, one, two):
            given.append(versions.after(given[-1]))
        assert given == sorted(set(given))
        assert all(of_one_life(given[0], version) for version in given)
        again = Versions(w.engine)
        await again.load(takes_back=True)
        assert not of_one_life(again.after(given[-1]), given[-1])

    play_inline(scene)


def test_another_server_that_starts_takes_no_chunk_of_a_promotion() -> None:
    """Its search looks at the block whose ids this one gives: they are barred before."""

    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"abc")
        w.chunks.gate = asyncio.Event()
        growing = asyncio.ensure_future(grow(w, made.id))
        await until(lambda: bool(w.chunks.log))
        orphans = Orphans(w.env, w.engine, w.chunks, lambda: w.routing, 0)
        await orphans.load()
        w.chunks.gate.set()
        grown = await growing
        assert grown.layout is not None
        await w.context.collector.collect()
        assert await orphans.search() == 0
        assert w.chunks.chunks == {(grown.layout.data, 0): 3}

        async def barred(txn: Transaction) -> int:
            return await barred_block(txn)

        assert await w.engine.run(barred) < grown.layout.data // BLOCK_IDS
        other = await grow(w, (await put(w, await w.create(b"b"), b"def")).id)
        assert other.layout is not None
        assert other.layout.data // BLOCK_IDS == grown.layout.data // BLOCK_IDS

    play_inline(scene)


# ---------------------------------------------------------------- attributes


def test_the_flag_of_holes_outlives_a_promotion() -> None:
    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"abc")
        assert not made.sparse
        longer = await w.setattr(made.id, length=5000)
        assert longer.sparse
        assert (await put(w, longer, b"abcd", length=5000)).sparse
        assert (await grow(w, made.id)).sparse
        whole = await put(w, await w.create(b"b"), b"abc")
        assert not (await grow(w, whole.id)).sparse
        emptied = await w.create(b"a", truncate=True)
        assert not emptied.sparse

    play_inline(scene)


def test_a_new_content_is_announced_as_a_change_of_its_inode() -> None:
    async def scene(w: World) -> None:
        made = await w.create(b"a")
        before = w.store.get(keys.inode_key(made.id))
        await put(w, await put(w, made, b"abc"), b"xyz")
        assert w.store.get(keys.inode_key(made.id)) != before
        assert change_of(keys.inode_key(made.id)) == calls.Change(made.id)
        assert change_of(keys.inline_key(made.id)) is None
        assert change_of(keys.owner_key(InodeId(5))) is None

    play_inline(scene)


def test_rights_and_flags_hold_for_small_files() -> None:
    """Opening asks for them; who has the file open goes on, also when it grows."""

    async def scene(w: World) -> None:
        await w.setattr(ROOT_INODE, mode=0o777)
        made = await w.create(b"a", who=ALICE, mode=0o4755)
        await w.set_xattr(made.id, b"trusted.emberfs.flags", b"i")
        await fails(Code.NOT_PERMITTED, w.open_file(made.id, 2, write=True))
        await fails(Code.NOT_PERMITTED, w.setattr(made.id, length=1))
        written = await put(w, made, b"abc")
        assert not written.mode & stat.S_ISUID
        assert (await w.open_file(made.id, 3, who=ALICE)).length == 3
        await grow(w, made.id)
        assert await content(w, made.id) is None

    play_inline(scene)
