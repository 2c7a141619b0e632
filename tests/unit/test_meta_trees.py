"""Trees that are removed in one step, and the trash."""

import asyncio
from typing import Any

import pytest

from emberfs.kv import keys
from emberfs.meta import tree_calls
from emberfs.meta.context import Policy
from emberfs.proto import quota_calls as calls
from emberfs.proto.errors import Code
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE, SECOND, InodeId
from emberfs.proto.meta_calls import RequestId
from unit.meta_world import ALICE, BOB, CHUNK, ROOT, World, fails, play, until
from unit.quota_world import check_counters, set_quota, used, walked


async def remove_tree(world: World, name: bytes, parent: int = ROOT_INODE, who: Any = ROOT) -> None:
    request = calls.RemoveTreeRequest(who, world.rid(), InodeId(parent), name)
    await tree_calls.remove_tree(world.context, request)


async def trash(world: World, name: bytes, parent: int = ROOT_INODE, who: Any = ROOT) -> None:
    request = calls.TrashRequest(who, world.rid(), InodeId(parent), name, b"/" + name)
    await tree_calls.trash(world.context, request)


async def trashed(world: World, who: Any = ROOT) -> list[calls.TrashItem]:
    answer = await tree_calls.list_trash(world.context, calls.ListTrashRequest(who))
    return list(answer.items)


async def restore(world: World, item: calls.TrashItem, who: Any = ROOT) -> None:
    request = calls.RestoreRequest(who, world.rid(), item.time_ns, item.id)
    await tree_calls.restore(world.context, request)


async def empty(world: World, item: calls.TrashItem, who: Any = ROOT) -> None:
    request = calls.EmptyTrashRequest(who, world.rid(), item.time_ns, item.id)
    await tree_calls.empty_trash(world.context, request)


async def finished(world: World) -> None:
    """All the work in the background is done."""
    await world.context.removed_trees.finish()
    await world.context.collector.collect()
    await walked(world)
    assert not world.rows(keys.Prefix.REMOVED)


async def make_tree(world: World, who: Any = ROOT, files: int = 3, depth: int = 3) -> Inode:
    """Directories in directories, each with some files; returns the top, /t."""
    top = place = await world.mkdir(b"t", who=who)
    for level in range(depth):
        for number in range(files):
            made = await world.file(b"f%d" % number, place.id, who)
            world.chunks.put(made.id, CHUNK, 10)
            await world.settle(made.id, 0, length=CHUNK + 10)
        if level < depth - 1:
            place = await world.mkdir(b"d", place.id, who)
    return top


def count(world: World, prefix: keys.Prefix) -> int:
    return len(world.rows(prefix))


# ---------------------------------------------------------------- removal


def test_a_tree_goes_in_one_step_and_its_contents_follow() -> None:
    async def scene(w: World) -> None:
        await make_tree(w, files=100, depth=4)
        await w.file(b"stays")
        before = count(w, keys.Prefix.INODE)
        await remove_tree(w, b"t")
        assert await w.names() == [b"stays"]
        assert (await w.getattr(ROOT_INODE)).nlink == 2
        assert count(w, keys.Prefix.INODE) == before, "nothing else in the caller's time"
        w.check()
        while await w.context.removed_trees.step():
            w.check()
        await finished(w)
        assert count(w, keys.Prefix.INODE) == 2
        assert not w.chunks.chunks

    play(scene)


def test_nothing_in_a_removed_tree_is_reached_any_more() -> None:
    async def scene(w: World) -> None:
        top = await make_tree(w)
        inner = await w.lookup(b"d", top.id)
        deep = await w.lookup(b"d", inner.id)
        await w.file(b"outside")
        await remove_tree(w, b"t")
        for place in (top.id, inner.id, deep.id):
            await fails(Code.NOT_FOUND, w.lookup(b"f0", place))
            await fails(Code.NOT_FOUND, w.readdir(place))
            await fails(Code.NOT_FOUND, w.file(b"new", place))
            await fails(Code.NOT_FOUND, w.create(b"f0", place))
            await fails(Code.NOT_FOUND, w.unlink(b"f0", place))
            await fails(Code.NOT_FOUND, w.rename(b"outside", b"x", new_parent=place))
            await fails(Code.NOT_FOUND, w.rename(b"f0", b"x", place))
            await fails(Code.NOT_FOUND, remove_tree(w, b"d", place))
        await fails(Code.NOT_FOUND, w.walk(b"/t"))
        assert (await w.getattr(top.id)).nlink == 0
        await finished(w)
        await fails(Code.NOT_FOUND, w.getattr(deep.id))

    play(scene)


def test_open_files_and_other_names_stay() -> None:
    async def scene(w: World) -> None:
        top = await make_tree(w)
        held, linked = await w.lookup(b"f0", top.id), await w.lookup(b"f1", top.id)
        await w.open_file(held.id, 7)
        await w.link(linked.id, b"kept")
        await remove_tree(w, b"t")
        await finished(w)
        assert (await w.getattr(held.id)).nlink == 0
        assert w.chunks.of(held.id)
        assert (await w.lookup(b"kept")).nlink == 1
        await w.settle(held.id, 7, close=True)
        await w.context.collector.collect()
        assert not w.chunks.of(held.id)
        assert w.chunks.of(linked.id)

    play(scene)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_the_work_goes_on_after_a_restart_and_may_be_shared(steps: int) -> None:
    async def scene(w: World) -> None:
        await make_tree(w, files=80, depth=5)
        await remove_tree(w, b"t")
        for _ in range(steps):
            await w.context.removed_trees.step()
        await w.context.close()
        w.boot()
        await w.context.load()
        first = w.context.removed_trees
        await asyncio.gather(first.finish(), first.finish(), first.finish())
        await finished(w)
        assert count(w, keys.Prefix.INODE) == 1
        assert not w.chunks.chunks

    play(scene)


def test_a_retry_after_a_lost_answer_removes_nothing_more() -> None:
    async def scene(w: World) -> None:
        await w.setattr(ROOT_INODE, mode=0o777)
        await make_tree(w, ALICE)
        request = calls.RemoveTreeRequest(ALICE, w.rid(), ROOT_INODE, b"t")
        await tree_calls.remove_tree(w.context, request)
        await w.mkdir(b"t", who=ALICE)
        await tree_calls.remove_tree(w.context, request)
        assert await w.names() == [b"t"]

    play(scene)


def test_the_rights_are_those_of_rm() -> None:
    async def scene(w: World) -> None:
        await w.setattr(ROOT_INODE, mode=0o777)
        top = await make_tree(w, ALICE)
        inner = await w.lookup(b"d", top.id)
        await fails(Code.ACCESS, remove_tree(w, b"t", who=BOB))
        theirs = await w.mkdir(b"theirs", inner.id, mode=0o755)
        await w.setattr(theirs.id, uid=BOB.uid)
        await remove_tree(w, b"theirs", inner.id, ALICE)  # empty: as rmdir
        theirs = await w.mkdir(b"theirs", inner.id, mode=0o755)
        await w.setattr(theirs.id, uid=BOB.uid)
        await w.file(b"f", theirs.id, BOB)
        await fails(Code.ACCESS, remove_tree(w, b"t", who=ALICE))
        await fails(Code.ACCESS, trash(w, b"t", who=ALICE))
        await w.setattr(theirs.id, mode=0o1777)
        await fails(Code.NOT_PERMITTED, remove_tree(w, b"t", who=ALICE))
        await w.setattr(theirs.id, mode=0o777)
        await remove_tree(w, b"t", who=ALICE)
        await w.file(b"plain")
        await fails(Code.NOT_DIRECTORY, remove_tree(w, b"plain"))
        for name, code in ((b".", Code.INVALID), (b"..", Code.NOT_EMPTY), (b"x", Code.NOT_FOUND)):
            await fails(code, remove_tree(w, name))
        await finished(w)

    play(scene)


def test_a_tree_too_large_to_check_is_removed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_calls, "CHECK_NAMES_MAX", 5)

    async def scene(w: World) -> None:
        await w.setattr(ROOT_INODE, mode=0o777)
        await make_tree(w, ALICE)
        await fails(Code.TOO_MANY_NAMES, remove_tree(w, b"t", who=ALICE))
        await remove_tree(w, b"t")

    play(scene)


def test_the_room_comes_back_with_the_work_and_quotas_inside_go() -> None:
    async def scene(w: World) -> None:
        await set_quota(w, ROOT_INODE, files_max=1000)
        top = await make_tree(w, files=100)
        await walked(w)
        inner = await w.lookup(b"d", top.id)
        await set_quota(w, inner.id, files_max=500)
        await walked(w)
        before = used(w, ROOT_INODE)
        await remove_tree(w, b"t")
        assert used(w, ROOT_INODE) == before
        await w.context.removed_trees.step()
        assert used(w, ROOT_INODE).files < before.files
        await check_counters(w)
        await finished(w)
        await check_counters(w)
        assert used(w, ROOT_INODE) == (1, 0)
        assert count(w, keys.Prefix.QUOTA) == 1

    play(scene)


def test_the_background_works_by_itself() -> None:
    async def scene(w: World) -> None:
        w.context.start()
        await make_tree(w)
        await remove_tree(w, b"t")
        await until(lambda: not w.chunks.chunks and count(w, keys.Prefix.INODE) == 1)

    play(scene)


# ---------------------------------------------------------------- trash


def test_trash_and_back() -> None:
    async def scene(w: World) -> None:
        top = await make_tree(w)
        await w.file(b"plain")
        await trash(w, b"t")
        await trash(w, b"plain")
        assert await w.names() == []
        first, second = await trashed(w)
        assert (first.path, second.path) == (b"/t", b"/plain")
        await restore(w, first)
        assert (await w.lookup(b"t")).id == top.id
        assert (await w.lookup(b"..", top.id)).id == ROOT_INODE
        await w.file(b"plain")
        await fails(Code.EXISTS, restore(w, second))
        await w.unlink(b"plain")
        await restore(w, second)
        await fails(Code.NOT_FOUND, restore(w, second))
        assert await trashed(w) == []

    play(scene)


def test_restore_needs_the_old_directory() -> None:
    async def scene(w: World) -> None:
        place = await w.mkdir(b"place")
        await w.file(b"a", place.id)
        await trash(w, b"a", place.id)
        await trash(w, b"place")
        inside, outside = await trashed(w)
        await fails(Code.NOT_FOUND, restore(w, inside))  # its directory is in the trash, too
        await restore(w, outside)
        await restore(w, inside)
        await trash(w, b"a", place.id)
        [item] = await trashed(w)
        await w.rename(b"place", b"elsewhere")
        await restore(w, item)
        assert await w.names(place.id) == [b"a"]
        await trash(w, b"a", place.id)
        [item] = await trashed(w)
        await remove_tree(w, b"elsewhere")
        await fails(Code.NOT_FOUND, restore(w, item))
        await finished(w)
        await fails(Code.NOT_FOUND, restore(w, item))
        await empty(w, item)

    play(scene)


def test_everybody_has_their_own_trash() -> None:
    async def scene(w: World) -> None:
        await w.setattr(ROOT_INODE, mode=0o777)
        await w.file(b"a", who=ALICE)
        await w.file(b"b", who=BOB)
        await trash(w, b"a", who=ALICE)
        await trash(w, b"b", who=BOB)
        [item] = await trashed(w, ALICE)
        assert len(await trashed(w)) == 2
        await fails(Code.NOT_PERMITTED, restore(w, item, BOB))
        await fails(Code.NOT_PERMITTED, empty(w, item, BOB))
        await w.setattr(ROOT_INODE, mode=0o755)
        await fails(Code.ACCESS, restore(w, item, ALICE))
        await empty(w, item, ALICE)
        assert len(await trashed(w)) == 1

    play(scene)


def test_what_is_in_the_trash_counts_where_it_was() -> None:
    async def scene(w: World) -> None:
        place, other = await w.mkdir(b"place"), await w.mkdir(b"other")
        await set_quota(w, place.id, bytes_max=100)
        await walked(w)
        tree = await w.mkdir(b"tree", place.id)
        file = await w.file(b"f", tree.id)
        await w.settle(file.id, 0, length=60)
        await trash(w, b"tree", place.id)
        assert used(w, place.id) == (3, 60)
        [item] = await trashed(w)
        await restore(w, item)
        await trash(w, b"tree", place.id)
        [item] = await trashed(w)
        await empty(w, item)
        await finished(w)
        assert used(w, place.id) == (1, 0)
        # A quota that was set while it was away counts it when it is back.
        again = await w.mkdir(b"again", other.id)
        await w.file(b"f", again.id)
        await trash(w, b"again", other.id)
        await set_quota(w, other.id, bytes_max=100)
        await walked(w)
        assert used(w, other.id) == (1, 0)
        [item] = await trashed(w)
        await restore(w, item)
        await walked(w)
        assert used(w, other.id) == (3, 0)
        await check_counters(w)

    play(scene)


def test_a_quota_that_is_removed_leaves_nothing_in_the_trash() -> None:
    async def scene(w: World) -> None:
        from unit.quota_world import listed, remove_quota

        place = await w.mkdir(b"place")
        await set_quota(w, place.id, bytes_max=100)
        tree = await w.mkdir(b"tree", place.id)
        await w.file(b"f", tree.id)
        await trash(w, b"tree", place.id)
        await remove_quota(w, place.id)
        await walked(w)
        assert await listed(w) == ()
        await check_counters(w)

    play(scene)


def test_the_trash_is_emptied_by_age() -> None:
    async def scene(w: World) -> None:
        w.context.policy = Policy(CHUNK, 16, trash_age_ns=100 * SECOND)
        await make_tree(w)
        await w.file(b"f")
        await trash(w, b"t")
        await trash(w, b"f")
        assert await tree_calls.expire(w.context) == 0
        real = w.env.wall_ns
        w.env.wall_ns = lambda: real() + 101 * SECOND  # type: ignore[method-assign]
        assert await tree_calls.expire(w.context) == 2
        await finished(w)
        assert count(w, keys.Prefix.INODE) == 2, "the root and the trash itself"
        assert not w.chunks.chunks
        w.context.policy = Policy(CHUNK, 16, trash_age_ns=0)
        await w.file(b"f")
        await trash(w, b"f")
        w.env.wall_ns = lambda: real() + 10**9 * SECOND  # type: ignore[method-assign]
        assert await tree_calls.expire(w.context) == 0

    play(scene)


def test_two_names_of_a_file_in_the_trash() -> None:
    async def scene(w: World) -> None:
        file = await w.file(b"a")
        await w.link(file.id, b"b")
        request = calls.TrashRequest(ROOT, RequestId(9, 9), ROOT_INODE, b"a", b"/a")
        await tree_calls.trash(w.context, request)
        await tree_calls.trash(w.context, request)  # a retry
        await trash(w, b"b")
        first, second = await trashed(w)
        await restore(w, second)
        assert await w.names() == [b"b"]
        await empty(w, first)
        assert (await w.lookup(b"b")).nlink == 1

    play(scene)
