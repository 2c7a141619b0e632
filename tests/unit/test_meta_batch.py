"""Batches at the metadata server: files with their content in one transaction, stats together."""

import asyncio
import stat
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from emberfs.kv import keys
from emberfs.kv.memory import MemoryStore
from emberfs.kv.transaction import Transaction
from emberfs.meta import batch, files, namespace
from emberfs.proto import batch_calls as bc
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import IMMUTABLE, Inode
from emberfs.proto.ids import ROOT_INODE, InodeId
from unit.meta_world import ALICE, BOB, CLIENT, ROOT, World, fails, play
from unit.quota_world import check_counters, check_tree, set_quota, used, walked

LIMIT = 100
DONE, ORDINARY = bc.DONE, bc.ORDINARY
ID = calls.RequestId(CLIENT, 900)


def play_inline(scene: Callable[[World], Awaitable[None]], **more: Any) -> World:
    return play(scene, inline_bytes_max=LIMIT, **more)


def request_of(w: World, files: dict[bytes, bytes] | list[tuple[bytes, bytes]], **more: Any) -> Any:
    fields = {"caller": ROOT, "request": w.rid(), "mode": 0o644} | more
    pairs = files.items() if isinstance(files, dict) else files
    return bc.BatchCreateRequest(items=tuple(bc.BatchItem(*pair) for pair in pairs), **fields)


async def create(w: World, files: Any, **more: Any) -> list[int]:
    answer = await batch.create(w.context, request_of(w, files, **more))
    return [outcome.code for outcome in answer.outcomes]


async def look(w: World, *paths: bytes, who: Any = ROOT, follow: bool = True) -> list[Inode | int]:
    answer = await batch.stat(w.context, bc.BatchStatRequest(who, paths, follow))
    return [row.inode or row.outcome.code for row in answer.rows]


async def content(w: World, path: bytes) -> bytes | None:
    inode = (await w.walk(path)).inode.id
    return (await files.content(w.context, calls.ContentRequest(inode))).content


def test_files_are_made_with_their_content_in_one_stable_transaction() -> None:
    async def scene(w: World) -> None:
        d = await w.mkdir(b"d")
        await w.context.ids.take()  # the reservation is a transaction of its own
        before, store = w.engine._version, w.store
        assert isinstance(store, MemoryStore)
        made = {b"/d/%d" % n: b"content %d" % n for n in range(50)} | {
            b"/top": b"",
            b"/d/0s": b"x\0",
        }
        assert set(await create(w, made)) == {DONE}
        assert (w.engine._version, store.unsynced_count) == (before + 1, 0)
        for path, data in made.items():
            assert await content(w, path) == data.rstrip(b"\0")
            inode = (await w.walk(path)).inode
            assert (inode.length, inode.inline, inode.nlink) == (len(data), True, 1)
        assert (await w.getattr(d.id)).mtime_ns > d.mtime_ns

    assert play_inline(scene).chunks.log == []


def test_every_item_has_an_outcome_of_its_own() -> None:
    async def scene(w: World) -> None:
        await w.mkdir(b"d", mode=0o777)
        await w.mkdir(b"closed", mode=0o700)
        await w.mkdir(b"sealed", mode=0o755)
        await w.file(b"theirs", mode=0o644)
        await w.symlink(b"link", b"d/target")
        await w.symlink(b"around", b"around")
        items = [
            (b"/d/a", b"a", DONE),
            (b"/none/a", b"a", Code.NOT_FOUND),
            (b"/theirs/a", b"a", Code.NOT_DIRECTORY),
            (b"/closed/a", b"a", Code.ACCESS),
            (b"/sealed/a", b"a", Code.ACCESS),
            (b"/theirs", b"a", Code.ACCESS),
            (b"/d", b"a", Code.IS_DIRECTORY),
            (b"/link", b"a", ORDINARY),
            (b"/around/a", b"a", Code.LOOP),
            (b"/d/large", bytes(LIMIT + 1), ORDINARY),
            (b"/d/full", bytes(LIMIT), DONE),
            (b"/d/a", b"again", ORDINARY),
            (b"/d/" + b"x" * 256, b"", Code.NAME_TOO_LONG),
            (b"/" + b"d/../" * 1000 + b"x", b"", Code.NAME_TOO_LONG),
            (b"", b"", Code.NOT_FOUND),
            (b"/d/", b"", Code.NOT_FOUND),
            (b"/d/..", b"", Code.EXISTS),
            (b"/d/\0", b"", Code.INVALID),
            (b"/d/../d/z", b"z", DONE),
        ]
        got = await create(w, [(path, data) for path, data, _ in items], caller=ALICE)
        assert got == [code for _, _, code in items]
        d = (await w.lookup(b"d")).id
        assert await w.names(d) == [b"a", b"full", b"z"]
        assert await content(w, b"/d/a") == b"a"

    play_inline(scene)


def test_attributes_of_new_files_are_those_of_create() -> None:
    async def scene(w: World) -> None:
        d = await w.mkdir(b"d")
        await w.setattr(d.id, mode=0o2777, gid=50)
        await create(w, {b"/d/a": b"1"}, caller=BOB, mode=0o6666, umask=0o027)
        made, other = (
            await w.lookup(b"a", d.id),
            await w.create(b"b", d.id, BOB, mode=0o6666, umask=0o027),
        )
        same = ("mode", "uid", "gid", "nlink", "quota", "inline", "acl", "sparse", "flags")
        assert [getattr(made, n) for n in same] == [getattr(other, n) for n in same]

    play_inline(scene)


def test_what_exists_is_replaced_in_one_step_or_refused() -> None:
    async def scene(w: World) -> None:
        await create(w, {b"/a": b"old content", b"/same": b"x", b"/fixed": b"x"})
        old = await w.lookup(b"a")
        await w.setattr(old.id, mode=0o4777)
        fixed = await w.lookup(b"fixed")
        await w.set_xattr(fixed.id, b"trusted.emberfs.flags", b"i")
        assert (await w.getattr(fixed.id)).flags == IMMUTABLE
        assert await create(w, {b"/a": b"new", b"/b": b""}, exclusive=True) == [Code.EXISTS, DONE]
        assert await content(w, b"/a") == b"old content"
        assert await create(w, {b"/a": b"new", b"/fixed": b""}, caller=BOB) == [
            DONE,
            Code.NOT_PERMITTED,
        ]
        new = await w.lookup(b"a")
        assert (new.id, new.length, await content(w, b"/a")) == (old.id, 3, b"new")
        assert (oct(new.mode & 0o7777), new.uid) == ("0o777", 0)
        assert new.inline_version > old.inline_version
        assert new.truncate_version > old.truncate_version
        assert new.mtime_ns > old.mtime_ns
        settling = w.settle(new.id, content=b"o", length=1, inline_version=old.inline_version)
        await fails(Code.SUPERSEDED, settling)
        await w.link(new.id, b"again")
        assert await create(w, {b"/a": b"1", b"/again": b"2"}) == [DONE, ORDINARY]
        assert await create(w, {b"/n": b"", b"//n": b""}, exclusive=True) == [DONE, Code.EXISTS]

    play_inline(scene)


def test_files_with_chunks_special_files_and_own_open_ones_are_not_for_a_batch() -> None:
    async def scene(w: World) -> None:
        w.context.policy = type(w.context.policy)(65536, 16)
        await w.file(b"chunks")
        assert await create(w, {b"/x": b"", b"/chunks": b""}) == [ORDINARY, ORDINARY]
        w.context.policy = type(w.context.policy)(65536, 16, inline_bytes_max=LIMIT)
        await w.mknod(b"fifo", stat.S_IFIFO | 0o666)
        opened = await w.create(b"open", session=5)
        await create(w, {b"/free": b"1"})
        found = await create(w, {b"/chunks": b"", b"/fifo": b"", b"/open": b"2", b"/free": b"3"})
        assert found == [ORDINARY, Code.UNSUPPORTED, ORDINARY, DONE]
        theirs = request_of(w, {b"/open": b"2"}, request=calls.RequestId(CLIENT + 1, 1))
        assert (await batch.create(w.context, theirs)).outcomes[0].code == DONE
        assert (await w.getattr(opened.id)).length == 1
        await w.settle(opened.id, 5, close=True)

    play_inline(scene)


def test_too_much_is_refused_as_a_whole() -> None:
    async def scene(w: World) -> None:
        many = bc.BATCH_CREATE.encode_request(
            request_of(w, {b"/%d" % n: b"" for n in range(bc.ITEMS_MAX + 1)})
        )
        with pytest.raises(EmberfsError) as caught:
            bc.BATCH_CREATE.decode_request(many)
        assert caught.value.code == Code.MALFORMED
        await fails(Code.TOO_LARGE, create(w, {b"/a": b"", b"/b": bytes(bc.BYTES_MAX)}))
        await fails(Code.TOO_LARGE, look(w, b"/" + b"x" * bc.BYTES_MAX))
        assert await create(w, {}) == await look(w) == []
        assert await w.names() == []

    play_inline(scene)


# ---------------------------------------------------------------- once


@pytest.fixture
def yielding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other tasks in at every read, as a remote store would: transactions now conflict."""
    for name in ("get", "get_many", "get_range"):
        monkeypatch.setattr(Transaction, name, _slow(getattr(Transaction, name)))


def _slow(read: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def slow(*args: Any, **options: Any) -> Any:
        await asyncio.sleep(0)
        return await read(*args, **options)

    return slow


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_c9_a_retry_of_a_batch_answers_the_same_and_does_nothing_twice(
    restart: bool, elsewhere: bool
) -> None:
    """Also its errors: what would succeed by now is not made by a retry."""

    async def scene(w: World) -> None:
        request = request_of(w, {b"/a": b"1", b"/d/b": b"2", b"/big": bytes(LIMIT + 1)}, request=ID)
        first = await batch.create(w.context, request)
        assert [o.code for o in first.outcomes] == [DONE, Code.NOT_FOUND, ORDINARY]
        d = await w.mkdir(b"d")
        await w.unlink(b"a")
        if restart:
            await w.context.close()
            w.boot()
            await w.open()
        again = request_of(
            w,
            {item.path: item.content for item in request.items},
            request=calls.RequestId(CLIENT, 900, elsewhere),
        )
        assert await batch.create(w.context, again) == first
        assert (await w.names(), await w.names(d.id)) == ([b"d"], [])

    play_inline(scene)


def test_c9_a_batch_that_failed_altogether_has_no_late_effect() -> None:
    """All items were refused, so no record was written; a copy that comes late does nothing."""

    async def scene(w: World) -> None:
        request = request_of(w, {b"/d/a": b"1"}, request=ID)
        first = await batch.create(w.context, request)
        d = await w.mkdir(b"d")
        assert await batch.create(w.context, request) == first
        assert await w.names(d.id) == []
        await batch.create(w.context, request_of(w, {b"/d/b": b""}, request=(one := w.rid())))
        wrong = calls.RemoveRequest(ROOT, one, ROOT_INODE, b"d", directory=True)
        await fails(Code.INVALID, namespace.remove(w.context, wrong))

    play_inline(scene)


def test_copies_of_a_batch_at_the_same_time_and_rivals(yielding: None) -> None:
    async def scene(w: World) -> None:
        await w.context.ids.take()
        paths = [b"/%d" % n for n in range(20)]
        request = request_of(w, dict.fromkeys(paths, b"mine"), exclusive=True)
        rivals = [
            create(w, dict.fromkeys(paths[::step], b"their"), exclusive=True) for step in (-1, 3)
        ]
        answers, *theirs = await asyncio.gather(
            asyncio.gather(*(batch.create(w.context, request) for _ in range(3))), *rivals
        )
        assert answers[0] == answers[1] == answers[2]
        mine = [outcome.code for outcome in answers[0].outcomes]
        won = sum(codes.count(DONE) for codes in (mine, *theirs))
        assert won == len(paths)
        assert w.engine.conflicts > 0

    play_inline(scene)


@pytest.mark.parametrize("keep", range(4))
def test_c9_a_power_cut_takes_a_batch_whole_or_not_at_all(keep: int) -> None:
    """An answered one stays; of one that is cut off amid its way nothing or everything is there."""

    async def scene(w: World) -> None:
        assert isinstance(w.store, MemoryStore)
        told = [b"/told%d" % n for n in range(9)]
        await create(w, dict.fromkeys(told, b"told"))
        w.store.sync_error = EmberfsError(Code.DISK, "Input/output error")
        lost = [b"/lost%d" % n for n in range(9)]
        request = request_of(w, dict.fromkeys(lost, b"lost"))
        await fails(Code.DISK, batch.create(w.context, request))
        await w.context.close()
        w.store.sync_error = None
        w.store.crash(keep)
        w.boot()
        await w.open()
        found = await look(w, *told, *lost)
        assert all(isinstance(one, Inode) for one in found[:9])
        assert len({isinstance(one, Inode) for one in found[9:]}) == 1
        answer = await batch.create(w.context, request)
        assert {outcome.code for outcome in answer.outcomes} == {DONE}
        assert {await content(w, path) for path in lost} == {b"lost"}

    play_inline(scene)


# ---------------------------------------------------------------- quotas


def test_quotas_are_charged_and_refuse_single_items() -> None:
    async def scene(w: World) -> None:
        outer = await w.mkdir(b"outer")
        inner = await w.mkdir(b"inner", outer.id)
        await set_quota(w, outer.id, bytes_max=1000)
        await set_quota(w, inner.id, files_max=4)  # the directory itself is one
        await walked(w)
        made = {b"/outer/inner/%d" % n: b"x" * 10 for n in range(5)} | {b"/outer/a": b"y"}
        quota = Code.QUOTA
        assert await create(w, made) == [DONE, DONE, DONE, quota, quota, DONE]
        assert used(w, inner.id) == (4, 30)
        assert used(w, outer.id) == (6, 31)
        await check_counters(w)
        check_tree(w)

    play_inline(scene)


def test_a_refused_item_has_charged_nothing_to_the_quotas_around_it() -> None:
    """The inner quota has room, the outer one has not."""

    async def scene(w: World) -> None:
        outer = await w.mkdir(b"outer")
        inner = await w.mkdir(b"inner", outer.id)
        await set_quota(w, outer.id, bytes_max=50)
        await set_quota(w, inner.id, bytes_max=1000)
        await walked(w)
        sizes = (40, 20, 10)
        made = {b"/outer/inner/%d" % size: bytes(size) for size in sizes}
        assert await create(w, made) == [DONE, Code.QUOTA, DONE]
        assert (used(w, inner.id).bytes, used(w, outer.id).bytes) == (50, 50)
        grown = {b"/outer/inner/10": bytes(11), b"/outer/inner/40": bytes(3)}
        assert await create(w, grown) == [Code.QUOTA, DONE]
        assert (used(w, inner.id).bytes, used(w, outer.id).bytes) == (13, 13)
        await check_counters(w)

    play_inline(scene)


def test_rival_batches_do_not_pass_a_limit(yielding: None) -> None:
    async def scene(w: World) -> None:
        d = await w.mkdir(b"d")
        await w.mkdir(b"e", d.id)
        await w.mkdir(b"f", d.id)
        await set_quota(w, d.id, files_max=33)
        await walked(w)
        found = await asyncio.gather(
            *(create(w, {b"/d/%s/%d" % (x, n): b"" for n in range(20)}) for x in (b"e", b"f"))
        )
        assert sum(codes.count(DONE) for codes in found) == 30
        assert used(w, d.id).files == 33
        assert w.engine.conflicts > 0

    play_inline(scene)


def test_rival_batches_that_are_refused_in_part_do_not_pass_an_outer_limit(yielding: None) -> None:
    """What is left of each is far from the outer limit, all of them together are not."""

    async def scene(w: World) -> None:
        d = await w.mkdir(b"d")
        await set_quota(w, d.id, files_max=500)
        for name in (b"e", b"f", b"g"):
            inner = await w.mkdir(name, d.id)
            await set_quota(w, inner.id, files_max=201)
        await walked(w)
        await w.context.ids.take()
        found = await asyncio.gather(
            *(
                create(w, {b"/d/%s/%d" % (x, n): b"" for n in range(250)})
                for x in (b"e", b"f", b"g")
            )
        )
        assert sum(codes.count(DONE) for codes in found) == 496
        assert used(w, d.id).files == 500

    play_inline(scene)


# ---------------------------------------------------------------- attributes


def test_stats_are_those_of_resolve_path_by_path() -> None:
    async def scene(w: World) -> None:
        d = await w.mkdir(b"d")
        await w.mkdir(b"closed", mode=0o700)
        await create(w, {b"/d/a": b"1", b"/closed/a": b"2"})
        await w.symlink(b"way", b"d")
        await w.symlink(b"here", b"a", d.id)
        await w.symlink(b"around", b"around")
        await w.symlink(b"nowhere", b"none")
        paths = [
            *(b"/", b"/d", b"/d/", b"/d/.", b"/d/..", b"/d/a", b"/d/a/", b"d/a", b"//d//a", b""),
            *(b"/way", b"/way/", b"/way/a", b"/d/here", b"/around", b"/nowhere", b"/nowhere/x"),
            *(b"/closed", b"/closed/a", b"/d/a/b", b"/none", b"/d/" + b"x" * 256, b"/d/\0"),
            *(b"/" + b"x" * 5000, b"/d/a"),
        ]
        for who in (ROOT, ALICE):
            for follow in (True, False):
                wanted: list[Inode | int] = []
                for path in paths:
                    try:
                        wanted.append((await w.walk(path, who, follow=follow)).inode)
                    except EmberfsError as problem:
                        wanted.append(problem.code)
                assert await look(w, *paths, who=who, follow=follow) == wanted

    play_inline(scene)


def test_a_removed_directory_is_gone_for_batches() -> None:
    async def scene(w: World) -> None:
        d = await w.mkdir(b"d")
        find = batch._directories

        async def slow(*args: Any, **more: Any) -> Any:
            found = await find(*args, **more)
            await w.rmdir(b"d")
            return found

        batch._directories = slow
        try:
            assert await create(w, {b"/d/a": b"", b"/b": b""}) == [Code.NOT_FOUND, DONE]
        finally:
            batch._directories = find
        await fails(Code.NOT_FOUND, w.getattr(InodeId(d.id)))

    play_inline(scene)


def test_without_a_serving_chain_the_whole_batch_waits() -> None:
    """It is no fault of an item: the client tries again."""

    async def scene(w: World) -> None:
        serving, w.routing = w.routing, type(w.routing)("test", 2, {}, {}, {})
        await fails(
            Code.NOT_SERVING, batch.create(w.context, request_of(w, {b"/a": b""}, request=ID))
        )
        w.routing = serving
        assert (
            await batch.create(w.context, request_of(w, {b"/a": b""}, request=ID))
        ).outcomes == (bc.Outcome(),)
        assert not w.rows(keys.Prefix.SESSION)

    play_inline(scene)
