"""Small files at the metadata server: content beside the inode, versions, growth into chunks."""

import asyncio
import stat
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from emberfs.kv import keys
from emberfs.meta import files, promote, schema
from emberfs.meta.orphans import Orphans
from emberfs.meta.server import MetaConfig, check_config
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import INLINE_BYTES_MAX, Inode
from emberfs.proto.ids import InodeId
from emberfs.proto.inline import of_one_life
from unit.meta_world import ROOT, World, fails, play, until

LIMIT = 8192
DISK = EmberfsError(Code.DISK, "Input/output error")


def play_inline(scene: Callable[[World], Awaitable[None]]) -> World:
    return play(scene, inline_bytes_max=LIMIT)


async def content(w: World, inode: int) -> bytes | None:
    return (await files.content(w.context, calls.ContentRequest(InodeId(inode)))).content


async def put(w: World, inode: Inode, data: bytes, **more: Any) -> Inode:
    more = {"length": len(data), "inline_version": inode.inline_version} | more
    return await w.settle(inode.id, content=data, **more)


async def grow(w: World, inode: int) -> Inode:
    request = calls.PromoteRequest(w.rid(), InodeId(inode))
    return (await promote.promote(w.context, request)).inode


def owners(w: World) -> int:
    return len(w.rows(keys.Prefix.OWNER))


def test_a_new_file_is_inline_and_is_opened_with_its_content() -> None:
    async def scene(w: World) -> None:
        request = calls.CreateRequest(ROOT, w.rid(), InodeId(1), b"a", 0o644, 1, True)  # type: ignore[arg-type]
        made = await files.create(w.context, request)
        assert (made.inode.inline, made.content, made.inline_bytes_max) == (True, b"", LIMIT)
        told = await put(w, made.inode, b"hello", durable=True)
        assert (told.length, told.inline_version > made.inode.inline_version) == (5, True)
        opening = calls.OpenRequest(ROOT, w.rid(), told.id, 2, True, False)  # type: ignore[arg-type]
        opened = await files.open_(w.context, opening)
        assert (opened.content, opened.inode.inline_version) == (b"hello", told.inline_version)
        again = await files.open_(w.context, opening)
        assert again.content is None, "what a request is remembered by has no content"
        assert (await w.mknod(b"b", stat.S_IFREG | 0o644)).inline
        assert not (await w.mkdir(b"d")).inline

    assert play_inline(scene).chunks.log == []


def test_without_the_setting_files_have_chunks() -> None:
    async def scene(w: World) -> None:
        made = await w.create(b"a")
        assert (made.inline, made.inline_version) == (False, 0)
        await fails(Code.SUPERSEDED, put(w, made, b"x"))
        assert await grow(w, made.id) == made

    play(scene)


def test_a_content_that_was_made_from_another_one_is_refused() -> None:
    """And nothing else of that call happens: no time, no end of the session."""

    async def scene(w: World) -> None:
        made = await w.create(b"a")
        first = await put(w, made, b"first")
        await fails(Code.SUPERSEDED, put(w, made, b"second", close=True, mtime_ns=5))
        assert await w.getattr(made.id) == first
        assert len(w.rows(keys.Prefix.SESSION)) == 1
        lost = first.inline_version + 7  # a power cut took that one
        assert (await put(w, first, b"third", inline_version=lost)).length == 5
        assert await content(w, made.id) == b"third"

    play_inline(scene)


@pytest.mark.parametrize(
    ("data", "length"), [(b"12345", 4), (b"x", None), (bytes(INLINE_BYTES_MAX + 1), 1 << 20)]
)
def test_contents_that_cannot_be_are_refused(data: bytes, length: int | None) -> None:
    async def scene(w: World) -> None:
        await fails(Code.INVALID, put(w, await w.create(b"a"), data, length=length))

    play_inline(scene)


def test_what_is_told_again_keeps_its_times() -> None:
    """Found by the model: close after ftruncate, or after futimens, set the mtime to now."""

    async def scene(w: World) -> None:
        made = await w.mknod(b"a", stat.S_IFREG | 0o644)
        told = await put(w, made, b"hello", mtime_ns=5)
        again = await put(w, told, b"hello", durable=True)
        assert (again.mtime_ns, again.ctime_ns) == (5, told.ctime_ns)
        assert again.inline_version > told.inline_version
        other = await put(w, again, b"hallo")
        assert other.mtime_ns > 5
        longer = await put(w, await put(w, other, b"hallo", mtime_ns=5), b"hallo", length=6)
        assert longer.mtime_ns > 5

    play_inline(scene)


def test_zeros_at_the_end_are_not_kept_and_an_empty_content_has_no_row() -> None:
    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"ab\0\0\0")
        assert (await content(w, made.id), made.length) == (b"ab", 5)
        made = await put(w, made, bytes(9))
        assert (w.rows(keys.Prefix.INLINE), made.length) == ([], 9)

    play_inline(scene)


def test_cuts_and_growth_by_length_are_within_the_transaction() -> None:
    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"0123456789")
        short = await w.setattr(made.id, length=4)
        assert short.truncate_version == made.truncate_version + 1
        assert short.inline_version > made.inline_version
        tall = await w.setattr(made.id, length=1 << 30)
        assert (tall.length, await content(w, made.id)) == (1 << 30, b"0123")
        assert (await w.create(b"a", truncate=True, session=3)).length == 0
        assert await content(w, made.id) == b""

    assert play_inline(scene).chunks.log == []


def test_a_length_without_content_says_nothing_about_an_inline_file() -> None:
    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"abc")
        assert (await w.settle(made.id, length=100, torn=True)) == made

    play_inline(scene)


def test_a_removed_small_file_leaves_nothing_to_collect() -> None:
    async def scene(w: World) -> None:
        await put(w, await w.create(b"a"), b"abc", close=True)
        await w.unlink(b"a")
        assert not w.rows(keys.Prefix.INLINE)
        assert not w.rows(keys.Prefix.DELETED)

    play_inline(scene)


def test_a_file_that_grows_gets_a_fresh_name_for_its_chunks() -> None:
    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"abc")
        grown = await grow(w, made.id)
        assert grown.layout is not None
        data = grown.layout.data
        assert (grown.inline, grown.length, data not in (0, made.id)) == (False, 3, True)
        assert w.chunks.log == [("write", data, 0, b"abc")]
        assert await grow(w, made.id) == grown
        await fails(Code.SUPERSEDED, put(w, made, b"late"))
        assert (await w.settle(made.id, length=90_000)).length == 90_000
        w.chunks.put(data, 65536, 90_000 - 65536)
        await w.setattr(made.id, length=70_000)
        assert w.chunks.of(data) == {0: 65536, 1: 70_000 - 65536}
        await w.settle(made.id, close=True)
        await w.unlink(b"a")
        await w.context.collector.collect()
        assert (w.chunks.of(data), owners(w)) == ({}, 0)

    play_inline(scene)


def test_an_empty_file_that_grows_keeps_its_id() -> None:
    async def scene(w: World) -> None:
        made = await w.create(b"a")
        grown = await grow(w, made.id)
        assert grown.layout == made.layout
        assert (w.chunks.log, owners(w)) == ([], 0)

    play_inline(scene)


def test_a_promotion_looks_again_and_begins_anew() -> None:
    """What was written for the content of before is collected."""

    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"before")
        w.chunks.gate = asyncio.Event()
        growing = asyncio.ensure_future(grow(w, made.id))
        await until(lambda: bool(w.chunks.log))
        await put(w, made, b"after")
        w.chunks.gate.set()
        grown = await growing
        assert grown.layout is not None
        (_, first, _, _), (_, second, _, data) = [e for e in w.chunks.log if e[0] == "write"]
        assert (data, second, first != second) == (b"after", grown.layout.data, True)
        await w.context.collector.collect()
        assert (w.chunks.of(first), w.chunks.of(second), owners(w)) == ({}, {0: 5}, 1)

    play_inline(scene)


def test_a_promotion_that_fails_or_takes_too_long_leaves_the_file_as_it_was() -> None:
    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"abc")
        w.chunks.error = DISK
        await fails(DISK.code, grow(w, made.id))
        w.chunks.error = None
        assert await w.getattr(made.id) == made
        w.chunks.gate = asyncio.Event()
        growing = asyncio.ensure_future(grow(w, made.id))
        await until(lambda: len([e for e in w.chunks.log if e[0] == "write"]) == 2)
        w.env.skipped_ns += 2 * promote.ATTEMPT_NS  # fsck may have removed the chunk by now
        w.chunks.gate.set()
        await growing
        names = [e[1] for e in w.chunks.log if e[0] == "write"]
        await w.context.collector.collect()
        assert [bool(w.chunks.of(name)) for name in names] == [False, False, True]

    play_inline(scene)


def test_a_repeated_promotion_does_nothing_twice() -> None:
    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"abc")
        request = calls.PromoteRequest(w.rid(), made.id)
        found = await asyncio.gather(*(promote.promote(w.context, request) for _ in range(3)))
        assert (len({answer.inode for answer in found}), owners(w)) == (1, 1)
        await w.context.collector.collect()
        assert len({inode for inode, _ in w.chunks.chunks}) == 1

    play_inline(scene)


def test_the_search_for_lost_chunks_knows_data_ids() -> None:
    """After a death amid a promotion its chunk goes, and that of a file that has grown stays."""

    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"abc")
        grown = await grow(w, made.id)
        assert grown.layout is not None
        lost = await w.context.ids.take()
        w.chunks.put(lost, 3)
        await w.context.close()
        w.boot()
        await w.open()
        orphans = Orphans(w.env, w.engine, w.chunks, lambda: w.routing, 0)
        await orphans.load()
        assert await orphans.search() == 1
        assert (w.chunks.of(lost), w.chunks.of(grown.layout.data)) == ({}, {0: 3})

    play_inline(scene)


def test_versions_are_not_given_twice_over_a_power_cut() -> None:
    async def scene(w: World) -> None:
        made = await w.create(b"a")
        await w.engine.sync()
        lost = await put(w, made, b"lost")
        assert of_one_life(made.inline_version, lost.inline_version)
        await w.context.close()
        w.store.crash()  # type: ignore[attr-defined]
        w.boot()
        await w.open()
        assert await w.getattr(made.id) == made
        told = await put(w, made, b"told")
        assert told.inline_version > lost.inline_version
        assert not of_one_life(told.inline_version, lost.inline_version)
        await fails(Code.SUPERSEDED, put(w, lost, b"lost and more"))

    play_inline(scene)


def test_the_setting_is_checked() -> None:
    for wrong in (-1, INLINE_BYTES_MAX + 1):
        config = MetaConfig("c", 1, ("m",), ("l",), "d", inline_bytes_max=wrong)
        with pytest.raises(EmberfsError, match="inline_bytes_max"):
            check_config(config)


def test_a_store_without_inline_files_is_taken_over() -> None:
    """And refused by a server of before from then on, which would show small files empty."""

    async def scene(w: World) -> None:
        key = keys.FILE_SYSTEM_KEY
        w.store.write([(key, schema.FILE_SYSTEM.encode(schema.FileSystem("test", 1)))])
        w.boot()
        await w.open()
        found = w.store.get(key)
        assert found is not None
        assert schema.FILE_SYSTEM.decode(found).format == schema.FORMAT

    play_inline(scene)


def test_r12_a_content_that_a_blackout_takes_on_its_way_to_chunks_is_written_again() -> None:
    """It was stable beside the inode: the flush of replicas that have lost it does not count."""

    async def scene(w: World) -> None:
        made = await put(w, await w.create(b"a"), b"x" * 50, durable=True)
        w.chunks.loses_next = True
        grown = await grow(w, made.id)
        assert grown.layout is not None
        assert w.chunks.of(grown.layout.data) == {0: 50}

    play_inline(scene)
