"""Quotas: what counts, what is refused, and how counting starts and ends."""

from emberfs.kv import keys
from emberfs.meta import files
from emberfs.meta.quota import Amount, charge
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code
from emberfs.proto.ids import ROOT_INODE, MiB
from unit.meta_world import ALICE, BOB, World, fails, play, until
from unit.quota_world import (
    check_counters,
    check_tree,
    listed,
    remove_quota,
    set_quota,
    show,
    statfs,
    used,
    walked,
)

MANY = 200  # names: more than two batches of a walk


async def ended(world: World) -> None:
    """All is counted, and right."""
    await walked(world)
    await check_counters(world)
    check_tree(world)


def test_what_is_made_below_counts_until_it_is_gone() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, bytes_max=1 * MiB)
        await walked(w)
        assert used(w, top.id) == (1, 0)
        inner = await w.mkdir(b"inner", top.id)
        file = await w.create(b"f", inner.id)
        await w.symlink(b"l", b"target", inner.id)
        assert used(w, top.id) == (4, 0)
        await w.settle(file.id, length=1000)
        await w.settle(file.id, length=3000, close=True)
        assert used(w, top.id) == (4, 3000)
        await w.setattr(file.id, length=10)
        assert used(w, top.id) == (4, 10)
        await w.create(b"f", inner.id, truncate=True, session=2)
        assert used(w, top.id) == (4, 0)
        await w.settle(file.id, 2, length=70, truncate_version=2)
        await w.unlink(b"f", inner.id)
        assert used(w, top.id).files == 4, "it is open"
        await w.settle(file.id, 2, close=True)
        await w.unlink(b"l", inner.id)
        await w.rmdir(b"inner", top.id)
        assert used(w, top.id) == (1, 0)
        await ended(w)

    play(scene)


def test_hard_links_count_once() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, files_max=3)
        file = await w.file(b"f", top.id)
        await w.settle(file.id, 0, length=5)
        await w.link(file.id, b"g", top.id)
        assert used(w, top.id) == (2, 5)
        await fails(Code.OTHER_QUOTA, w.link(file.id, b"g"))
        await w.unlink(b"f", top.id)
        assert used(w, top.id) == (2, 5)
        await w.unlink(b"g", top.id)
        assert used(w, top.id) == (1, 0)
        await ended(w)

    play(scene)


def test_growth_beyond_a_limit_is_refused_and_changes_nothing() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, bytes_max=1000, files_max=3)
        file = await w.file(b"f", top.id)
        await w.setattr(file.id, length=1000)
        await fails(Code.QUOTA, w.setattr(file.id, length=1001))
        await w.mkdir(b"d", top.id)
        for call in (w.mkdir(b"e", top.id), w.create(b"e", top.id), w.symlink(b"e", b"x", top.id)):
            await fails(Code.QUOTA, call)
        assert used(w, top.id) == (3, 1000)
        await w.setattr(file.id, length=500)
        await w.rename(b"f", b"f2", top.id, top.id)
        await set_quota(w, top.id, files_max=0)
        await w.mkdir(b"e", top.id)
        await set_quota(w, top.id, bytes_max=100)  # below what is used: no growth until it fits
        await fails(Code.QUOTA, w.setattr(file.id, length=501))
        await w.setattr(file.id, length=50)
        await w.setattr(file.id, length=100)
        await ended(w)

    play(scene)


def test_what_is_written_is_never_refused_at_settle() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, bytes_max=1000)
        file = await w.create(b"f", top.id)
        assert (await w.settle(file.id, length=3000, close=True)).length == 3000
        assert used(w, top.id).bytes == 3000
        await ended(w)

    play(scene)


def test_a_quota_inside_another_counts_for_both() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        inner = await w.mkdir(b"inner", top.id)
        await set_quota(w, top.id, bytes_max=1000)
        await set_quota(w, inner.id, bytes_max=5000)
        await walked(w)
        file = await w.file(b"f", inner.id)
        await w.setattr(file.id, length=800)
        assert used(w, inner.id) == (2, 800)
        assert used(w, top.id) == (3, 800)
        await fails(Code.QUOTA, w.setattr(file.id, length=1200))
        reports = await show(w, file.id)
        assert [r.path for r in reports] == [b"/top/inner", b"/top"]
        assert [r.bytes_used for r in reports] == [800, 800]
        space = await statfs(w, file.id)
        assert (space.total_bytes, space.free_bytes) == (1000, 200)
        await ended(w)

    play(scene)


def test_setting_and_removing_counts_what_is_there() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        deep = await w.mkdir(b"deep", top.id)
        for number in range(MANY):
            file = await w.file(b"%d" % number, deep.id)
            await w.settle(file.id, 0, length=number)
        total = sum(range(MANY))
        await set_quota(w, top.id, bytes_max=total)
        assert [r.state for r in await listed(w)] == ["counting"]
        await ended(w)
        assert used(w, top.id) == (MANY + 2, total)
        [report] = await listed(w)
        assert (report.state, report.walked, report.waiting) == ("active", MANY + 1, 0)
        await fails(Code.QUOTA, w.setattr(file.id, length=MANY))
        await remove_quota(w, top.id)
        await w.setattr(file.id, length=MANY)
        await ended(w)
        assert await listed(w) == ()
        assert not w.rows(keys.Prefix.USAGE)

    play(scene)


def test_a_quota_around_another_takes_its_counters_over() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        inner = await w.mkdir(b"inner", top.id)
        file = await w.file(b"f", inner.id)
        await w.settle(file.id, 0, length=77)
        await set_quota(w, inner.id, files_max=10)
        await walked(w)
        await set_quota(w, top.id, files_max=10)
        await ended(w)
        assert used(w, top.id) == (3, 77)
        assert used(w, inner.id) == (2, 77)
        await remove_quota(w, inner.id)
        await ended(w)
        assert used(w, top.id) == (3, 77)
        await set_quota(w, inner.id, files_max=10)
        await remove_quota(w, top.id)
        await ended(w)
        assert used(w, inner.id) == (2, 77)

    play(scene)


def test_changes_while_counting_are_counted_once() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        places = [await w.mkdir(b"d%d" % i, top.id) for i in range(3)]
        for place in places:
            for number in range(100):
                await w.file(b"%03d" % number, place.id)
        await set_quota(w, top.id, files_max=1000)
        step, moved = 0, 0
        while await w.context.quota_walks.step():
            step += 1
            source, target = places[step % 3], places[(step + 1) % 3]
            await w.rename(b"%03d" % (step + 20), b"m%d" % step, source.id, target.id)
            await w.file(b"n%d" % step, places[step % 3].id)
            moved += 1
            await check_counters(w)
        assert step > 3
        await ended(w)
        assert used(w, top.id) == (304 + moved, 0)

    play(scene)


def test_counting_and_removing_survive_the_server() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        for number in range(MANY):
            await w.file(b"%d" % number, top.id)
        await set_quota(w, top.id, files_max=1000)
        await w.context.quota_walks.step()
        await w.context.close()
        w.boot()
        await w.context.load()
        await ended(w)
        assert used(w, top.id) == (MANY + 1, 0)
        await remove_quota(w, top.id)
        await w.context.quota_walks.step()
        await set_quota(w, top.id, files_max=500)  # set again amid being removed
        await w.context.close()
        w.boot()
        await w.context.load()
        await ended(w)
        assert used(w, top.id) == (MANY + 1, 0)
        assert (await listed(w))[0].files_max == 500

    play(scene)


def test_a_directory_that_counting_has_not_reached_moves_within() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        for number in range(100):
            await w.mkdir(b"%03d" % number, top.id)
        late = await w.lookup(b"099", top.id)
        await w.file(b"f", late.id)
        await set_quota(w, top.id, files_max=1000)
        await w.context.quota_walks.step()
        await w.rename(b"099", b"000a", top.id, top.id)
        await ended(w)
        assert used(w, top.id) == (102, 0)

    play(scene)


def test_a_plain_file_moves_across_a_directory_does_not() -> None:
    async def scene(w: World) -> None:
        top, other = await w.mkdir(b"top"), await w.mkdir(b"other")
        await set_quota(w, top.id, bytes_max=100, files_max=4)
        await set_quota(w, other.id, bytes_max=50)
        await walked(w)
        file = await w.file(b"f")
        await w.settle(file.id, 0, length=60)
        await w.rename(b"f", b"f", new_parent=top.id)
        assert used(w, top.id) == (2, 60)
        await fails(Code.QUOTA, w.rename(b"f", b"f", top.id, other.id))
        await w.setattr(file.id, length=40)
        await w.rename(b"f", b"f", top.id, other.id)
        assert (used(w, top.id), used(w, other.id)) == ((1, 0), (2, 40))
        tree = await w.mkdir(b"tree")
        await w.file(b"x", tree.id)
        await fails(Code.OTHER_QUOTA, w.rename(b"tree", b"tree", new_parent=top.id))
        await w.unlink(b"x", tree.id)
        await w.rename(b"tree", b"tree", new_parent=top.id)  # empty: as good as a file
        await w.link(file.id, b"g", other.id)
        await fails(Code.OTHER_QUOTA, w.rename(b"g", b"g", other.id, top.id))
        await w.file(b"plain")
        await w.rename(b"plain", b"tree2", new_parent=top.id)
        await w.file(b"swap")
        await w.rename(b"swap", b"tree2", new_parent=top.id, flags=2)
        assert used(w, top.id) == (3, 0)
        await ended(w)

    play(scene)


def test_a_directory_with_a_quota_moves_as_a_whole() -> None:
    async def scene(w: World) -> None:
        top, other = await w.mkdir(b"top"), await w.mkdir(b"other")
        inner = await w.mkdir(b"inner", top.id)
        file = await w.file(b"f", inner.id)
        await w.settle(file.id, 0, length=60)
        for place, limit in ((top, 100), (other, 50), (inner, 90)):
            await set_quota(w, place.id, bytes_max=limit)
        await walked(w)
        await fails(Code.QUOTA, w.rename(b"inner", b"inner", top.id, other.id))
        await w.rename(b"inner", b"inner", top.id)
        assert used(w, top.id) == (1, 0)
        await w.setattr(file.id, length=30)
        await w.rename(b"inner", b"inner", new_parent=other.id)
        assert used(w, other.id) == (3, 30)
        await ended(w)

    play(scene)


def test_an_overwritten_target_makes_room_first() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, bytes_max=100, files_max=2)
        old, new = await w.file(b"f", top.id), await w.file(b"new")
        await w.settle(old.id, 0, length=90)
        await w.settle(new.id, 0, length=80)
        await w.rename(b"new", b"f", new_parent=top.id)
        assert used(w, top.id) == (2, 80)
        await ended(w)

    play(scene)


def test_a_removed_directory_takes_its_quota_along() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, ROOT_INODE, files_max=100)
        await set_quota(w, top.id, files_max=10)
        await walked(w)
        held = await w.create(b"f", top.id, session=9)
        await w.settle(held.id, 9, length=10)
        await w.unlink(b"f", top.id)
        await w.rmdir(b"top")
        await walked(w)
        await check_counters(w)
        assert [report.path for report in await listed(w)] == [b"/"]
        assert used(w, ROOT_INODE) == (2, 10), "the open file counts for the quota above"
        await w.settle(held.id, 9, close=True)
        assert used(w, ROOT_INODE) == Amount(1, 0)
        await ended(w)

    play(scene)


def test_the_background_counts_by_itself() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await w.file(b"f", top.id)
        w.context.start()
        await set_quota(w, top.id, files_max=10)
        await until(lambda: used(w, top.id) == (2, 0) and not w.rows(keys.Prefix.WALK))

    play(scene)


def test_who_may_set_quotas_and_on_what() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        file = await w.file(b"f")
        await fails(Code.NOT_PERMITTED, set_quota(w, top.id, ALICE, bytes_max=1))
        await fails(Code.NOT_DIRECTORY, set_quota(w, file.id, bytes_max=1))
        await fails(Code.NOT_FOUND, set_quota(w, 9999, bytes_max=1))
        await fails(Code.NOT_FOUND, remove_quota(w, top.id))
        await w.setattr(ROOT_INODE, uid=ALICE.uid)
        await set_quota(w, top.id, ALICE, bytes_max=1)
        await fails(Code.NOT_PERMITTED, remove_quota(w, top.id, BOB))
        await fails(Code.NOT_PERMITTED, listed(w, BOB))
        await ended(w)

    play(scene)


def test_the_room_of_a_writer_shrinks_near_the_limit() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, bytes_max=800 * MiB)
        file = await w.create(b"f", top.id)

        async def room(length: int) -> int | None:
            request = calls.SettleRequest(w.rid(), file.id, 1, length=length)  # type: ignore[arg-type]
            return (await files.settle(w.context, request)).room

        assert await room(0) == 64 * MiB
        assert await room(720 * MiB) == 10 * MiB
        assert await room(799 * MiB) == 1 * MiB
        assert await room(800 * MiB - 5) == 5
        assert await room(900 * MiB) == 0
        plain = await w.create(b"f")
        request = calls.SettleRequest(w.rid(), plain.id, 1)  # type: ignore[arg-type]
        assert (await files.settle(w.context, request)).room is None

    play(scene)


def test_space_of_a_quota_and_of_the_whole() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        whole = await statfs(w)
        assert await statfs(w, top.id) == whole
        await set_quota(w, top.id, bytes_max=500, files_max=7)
        await w.file(b"f", top.id)
        space = await statfs(w, top.id)
        assert (space.total_bytes, space.free_bytes) == (500, 500)
        assert (space.inodes, space.inodes_max) == (2, 7)
        await set_quota(w, top.id, bytes_max=1 << 40)
        assert (await statfs(w, top.id)).free_bytes == whole.free_bytes, "no more than there is"

    play(scene)


def test_a_quota_that_is_set_again_before_it_was_counted() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        inner = await w.mkdir(b"inner", top.id)
        await w.file(b"f", inner.id)
        await set_quota(w, top.id, files_max=10)
        await w.context.quota_walks.step()  # `inner` counts, what is in it does not yet
        await remove_quota(w, top.id)
        await set_quota(w, top.id, files_max=10)
        await ended(w)
        assert used(w, top.id) == (3, 0)

    play(scene)


def test_near_a_limit_two_that_would_both_fit_conflict() -> None:
    async def scene(w: World) -> None:
        top = await w.mkdir(b"top")
        await set_quota(w, top.id, files_max=2)
        await walked(w)
        first, second = w.engine.begin(), w.engine.begin()
        for txn in (first, second):
            await charge(txn, top.id, Amount(1, 0))
        await first.commit()
        await fails(Code.CONFLICT, second.commit())
        await set_quota(w, top.id, files_max=2000)
        first, second = w.engine.begin(), w.engine.begin()
        for txn in (first, second):
            await charge(txn, top.id, Amount(1, 0))
        await first.commit()
        await second.commit()  # far from it they do not
        assert used(w, top.id) == (4, 0)

    play(scene)
