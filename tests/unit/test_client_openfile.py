"""Open files: the write buffer, close-to-open, truncation, late errors, read-ahead."""

import asyncio
import contextlib
import random

import pytest

from emberfs.client import description, openfile, writebuffer
from emberfs.fabric.region import Region
from emberfs.proto import meta_calls as mc
from emberfs.proto import storage_calls as sc
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, KiB, MiB
from emberfs.proto.meta_calls import Caller
from unit.client_fakes import CHUNK, run

ME = Caller(0, 0)


async def make(files, name=b"f", **flags):
    _, file = await files.create(ME, 1, name, 0o644, **flags)
    return file


def test_small_writes_become_one_update_and_the_length_settles_at_flush():
    async def test(world):
        files = world.client()
        file = await make(files)
        for at in range(0, CHUNK, 4 * KiB):
            await file.write(at, bytes([at >> 12]) * 4 * KiB)
        await file.flush()
        assert world.sizes == [CHUNK]
        assert world.meta.inodes[file.inode_id].length == CHUNK
        assert (await file.read(4 * KiB, 3)) == b"\1\1\1"
        await file.close()

    run(test)


def test_reads_see_buffered_writes_without_sending_them():
    async def test(world):
        files = world.client()
        file = await make(files)
        await file.write(100, b"hello")
        assert bytes(await file.read(101, 3)) == b"ell"
        assert world.applied == 0
        assert bytes(await file.read(0, 1000)) == bytes(100) + b"hello"  # partly a hole: sent first
        assert (await file.stat()).length == 105
        assert files.merged(world.meta.inodes[file.inode_id]).length == 105
        assert world.meta.inodes[file.inode_id].length == 0
        await file.close()
        assert world.meta.inodes[file.inode_id].length == 105

    run(test)


def test_another_client_sees_everything_after_close():
    async def test(world):
        ours, theirs = world.client(7), world.client(8)
        file = await make(ours)
        data = random.Random(1).randbytes(3 * CHUNK + 5)
        await file.write(0, data)
        await file.close()
        inode, other = await theirs.open(ME, file.inode_id)
        assert inode.length == len(data)
        assert bytes(await other.read(0, len(data) + 10)) == data
        await other.close()

    run(test)


def test_o1_reader_elsewhere_of_a_growing_file_sees_true_bytes_or_less(monkeypatch):
    """O1: a length is told only when storage has all bytes below it."""
    monkeypatch.setattr(openfile, "HINT_AGE_NS", 0)
    monkeypatch.setattr(openfile, "TICK_NS", 5_000_000)
    monkeypatch.setattr(openfile, "DIRTY_AGE_NS", 10_000_000)
    monkeypatch.setattr(description, "LENGTH_AGE_NS", 0)

    async def test(world):
        generator = random.Random(2)
        world.update_delay_s = lambda: generator.uniform(0, 0.02)
        file = await make(world.client(7))
        _, tail = await world.client(8).open(ME, file.inode_id)
        seen = grown = 0

        async def follow():
            nonlocal seen, grown
            while seen < 20 * CHUNK:
                part = bytes(await tail.read(seen, CHUNK, direct=True))
                assert b"\0" not in part, f"zeros at {seen}"
                seen += len(part)
                grown += bool(part)
                await asyncio.sleep(0.002)

        following = asyncio.ensure_future(follow())
        for at in range(0, 20 * CHUNK, 10_000):
            await file.write(at, b"x" * min(10_000, 20 * CHUNK - at))
            await asyncio.sleep(0.002)
        await file.flush()
        await following
        assert grown > 3
        await tail.close()
        await file.close()

    run(test)


def test_close_ends_the_session_and_is_stable():
    async def test(world):
        files = world.client()
        file = await make(files)
        assert world.meta.sessions[file.inode_id, file.session] == 1
        await file.write(0, b"data")
        await file.close()
        await file.close()
        assert not world.meta.sessions
        last = world.meta.settled[-1]
        assert (last.close, last.durable, last.length) == (True, True, 4)
        assert all(node.flushed for node in world.storage)

    run(test)


def test_close_without_durability_does_not_flush():
    async def test(world):
        file = await make(world.client(durable_close=False))
        await file.write(0, b"data")
        await file.close()
        assert not any(node.flushed for node in world.storage)
        assert not world.meta.settled[-1].durable

    run(test)


def test_close_of_a_file_that_was_only_read_tells_nothing_but_the_end():
    async def test(world):
        files = world.client()
        await (await make(files)).close()
        _, file = await files.open(ME, 2)
        before = len(world.meta.settled)
        await file.flush()
        await file.close()
        (last,) = world.meta.settled[before:]
        assert (last.close, last.length, last.mtime_ns) == (True, None, None)
        with pytest.raises(EmberfsError) as caught:
            await file.write(0, b"x")
        assert caught.value.code == Code.BAD_HANDLE

    run(test)


def test_fsync_flushes_the_chains_that_were_touched_and_only_once():
    async def test(world):
        file = await make(world.client())
        await file.write(0, b"data")
        await file.fsync()
        assert world.head().flushed == [(101,)]
        assert world.meta.settled[-1].durable
        settled = len(world.meta.settled)
        await file.fsync(data_only=True)
        assert world.head().flushed == [(101,)]
        assert len(world.meta.settled) == settled
        await file.write(4, b"more")
        await file.fsync(data_only=True)
        assert world.meta.settled[-1].durable  # the length grew
        await file.close()

    run(test)


def test_old_buffered_bytes_are_sent_by_themselves(monkeypatch):
    monkeypatch.setattr(openfile, "TICK_NS", 10_000_000)
    monkeypatch.setattr(openfile, "DIRTY_AGE_NS", 50_000_000)

    async def test(world):
        file = await make(world.client())
        await file.write(0, b"data")
        await asyncio.sleep(0.02)
        assert not world.applied
        await asyncio.sleep(0.15)
        assert world.applied == 1
        await file.close()

    run(test)


def test_direct_writes_return_when_committed():
    async def test(world):
        file = await make(world.client(), direct=True)
        await file.write(10, b"direct")
        assert world.content(file.inode_id, 16) == bytes(10) + b"direct"
        assert bytes(await file.read(0, 100)) == bytes(10) + b"direct"
        region = Region(CHUNK)
        region.view[:5] = b"again"
        await file.write(10, region.slice(0, 5))
        assert bytes(await file.read(10, 6)) == b"againt"
        sink = region.slice(100, 50)
        assert await file.read_into(10, sink) == 6
        assert bytes(sink.view[:6]) == b"againt"
        await file.close()
        region.close()

    run(test)


def test_direct_and_buffered_writes_apply_in_order():
    async def test(world):
        generator = random.Random(3)
        world.update_delay_s = lambda: generator.uniform(0, 0.005)
        file = await make(world.client())
        for turn in range(30):
            byte = bytes([turn + 1])
            await file.write(generator.randrange(50), byte * 100, direct=turn % 3 == 0)
            await file.write(40, byte * 20)
            assert bytes(await file.read(40, 20)) == byte * 20
        await file.flush()
        assert world.content(file.inode_id, 60)[40:] == byte * 20
        await file.close()

    run(test)


def test_error_of_a_background_write_is_told_once_to_each_description():
    async def test(world):
        files = world.client()
        file = await make(files)
        _, other = await files.open(ME, file.inode_id, write=True)
        await file.write(0, b"kept")
        await file.flush()
        world.head().refuse.extend([Code.NO_SPACE])
        await file.write(4, b"lost")
        with pytest.raises(EmberfsError) as caught:
            await file.flush()
        assert caught.value.code == Code.NO_SPACE
        with pytest.raises(EmberfsError):  # a flush does not take it away: see _raise_late_error
            await file.fsync()
        await file.flush()
        with pytest.raises(EmberfsError) as caught:
            await other.write(0, b"x")
        assert caught.value.code == Code.NO_SPACE
        assert file.length == 4  # not longer than what exists
        await other.close()
        await file.write(4, b"fine")
        await file.close()
        assert world.content(file.inode_id, 8) == b"keptfine"
        _, late = await files.open(ME, file.inode_id, write=True)
        await late.flush()
        await late.close()

    run(test)


def test_close_tells_a_write_error_and_still_ends_the_session():
    async def test(world):
        file = await make(world.client())
        world.head().refuse.append(Code.NO_SPACE)
        await file.write(0, b"lost")
        with pytest.raises(EmberfsError) as caught:
            await file.close()
        assert caught.value.code == Code.NO_SPACE
        assert not world.meta.sessions

    run(test)


@pytest.mark.parametrize("direct", [True, False])
def test_o2_meta_is_told_once_that_a_write_has_failed(direct):
    """Bytes of it may lie behind the end: who writes next must not make a hole over them."""

    async def test(world):
        file = await make(world.client())
        await file.write(0, b"kept", direct=True)
        world.head().refuse.append(Code.NO_SPACE)
        with contextlib.suppress(EmberfsError):  # a buffered write fails later
            await file.write(5000, b"lost", direct=direct)
        with contextlib.suppress(EmberfsError):
            await file.close()
        assert [told.torn for told in world.meta.settled].count(True) == 1
        assert world.meta.inodes[file.inode_id].length == 4

    run(test)


def test_closing_the_client_does_not_wait_for_ever_for_lost_servers(monkeypatch):
    monkeypatch.setattr(openfile, "CLOSE_NS", 200_000_000)

    async def test(world):
        files = world.client()
        file = await make(files)
        for node in world.storage:
            node.hang = True
        await file.write(0, b"data")
        await asyncio.wait_for(files.close(), 2)

    run(test)


def test_truncate_drops_what_is_buffered_and_what_storage_has_beyond():
    async def test(world):
        file = await make(world.client())
        await file.write(0, b"a" * 3 * CHUNK)  # sent
        await file.write(3 * CHUNK, b"b" * 100)  # buffered
        inode = await file.truncate(10, ME)
        assert inode.length == file.length == 10
        await file.write(20, b"c")
        assert bytes(await file.read(0, 100)) == b"a" * 10 + bytes(10) + b"c"
        await file.close()
        assert world.meta.inodes[file.inode_id].length == 21
        assert world.content(file.inode_id, 4 * CHUNK).rstrip(b"\0") == b"a" * 10 + bytes(10) + b"c"

    run(test)


def test_a_file_that_grows_has_told_meta_before_what_was_written():
    """Meta cuts what lies behind the length that it knows of: a dead writer may have left it."""

    async def test(world):
        files = world.client()
        file = await make(files)
        await file.write(0, b"a" * 1000)
        told, cut = [], world.meta.cut

        def listening(number, length):
            told.append(world.meta.inodes[number].length)
            return cut(number, length)

        world.meta.cut = listening
        await file.truncate(5000, ME)
        assert told == [1000]
        assert bytes(await file.read(0, 9000)) == b"a" * 1000 + bytes(4000)
        await file.close()

    run(test)


def test_a_file_that_is_cut_has_told_meta_what_was_written_since_another_client_cut_it():
    """It lies below the length that we believe in; for meta it lies behind the end."""

    async def test(world):
        ours, theirs = world.client(7), world.client(8)
        file = await make(ours)
        await file.write(0, b"1" * 1000)
        await file.flush()
        await theirs.truncate(ME, file.inode_id, 0)
        await file.write(0, b"2" * 700, direct=True)  # we do not know yet
        told, cut = [], world.meta.cut

        def listening(number, length):
            told.append(world.meta.inodes[number].length)
            return cut(number, length)

        world.meta.cut = listening
        await file.truncate(500, ME)
        assert told == [700]
        await file.close()

    run(test)


def test_what_was_written_and_told_needs_not_be_told_again_before_a_cut():
    async def test(world):
        file = await make(world.client())
        await file.write(0, b"1" * 1000)
        await file.flush()
        count = len(world.meta.settled)
        await file.truncate(500, ME)
        assert len(world.meta.settled) == count
        await file.close()

    run(test)


def test_a_flush_after_another_client_truncated_makes_the_length_stable():
    """The length that was stable before is no more: what is told instead must be."""

    async def test(world):
        ours, theirs = world.client(7), world.client(8)
        file = await make(ours)
        await file.write(0, b"1" * 1000)
        await file.flush()
        await theirs.truncate(ME, file.inode_id, 0)
        await file.write(100, b"2" * 10)  # we do not know yet
        await file.flush()
        last = world.meta.settled[-1]
        assert (last.length, last.durable) == (110, True)
        await file.close()

    run(test)


def test_truncate_by_path_and_open_with_truncate_respect_buffered_writes():
    async def test(world):
        files = world.client()
        file = await make(files)
        await file.write(0, b"x" * 1000)
        assert (await files.truncate(ME, file.inode_id, 500)).length == 500
        await file.write(500, b"y" * 10)
        assert file.length == 510
        inode, again = await files.open(ME, file.inode_id, write=True, truncate=True)
        assert inode.length == 0
        assert file.length == 0
        await file.write(0, b"z")
        created, third = await files.create(ME, 1, b"f", 0o644, truncate=True)
        assert created.length == 0
        assert bytes(await file.read(0, 10)) == b""
        for one in (file, again, third):
            await one.close()
        assert world.meta.inodes[file.inode_id].length == 0

    run(test)


def test_writes_after_another_client_truncated_are_not_lost():
    async def test(world):
        ours, theirs = world.client(7), world.client(8)
        file = await make(ours)
        await file.write(0, b"1" * 1000)
        await file.flush()
        await theirs.truncate(ME, file.inode_id, 0)
        await file.write(100, b"2" * 10)  # we do not know yet
        await file.fsync()
        inode, other = await theirs.open(ME, file.inode_id)
        assert inode.length == 110
        assert bytes(await other.read(0, 200)) == bytes(100) + b"2" * 10
        await other.close()
        await file.close()

    run(test)


def test_a_cut_that_is_heard_of_while_the_length_is_told_does_not_lose_it():
    """Meta refuses a length of before the cut; that the cut was known by then changes nothing."""

    async def test(world):
        file = await make(world.client())
        world.meta.change(file.inode_id, truncate_version=1, length=10)  # by somebody else
        tell = file._services.metadata.settle

        async def late(*args, **more):
            file._services.metadata.settle = tell
            file.state.note(world.meta.inodes[file.inode_id])
            return await tell(*args, **more)

        file._services.metadata.settle = late
        await file.write(0, b"2" * 1000, direct=True)
        await file.close()
        assert world.meta.inodes[file.inode_id].length == 1000

    run(test)


def test_close_after_another_client_truncated_tells_the_length():
    async def test(world):
        ours, theirs = world.client(7), world.client(8)
        file = await make(ours)
        await file.write(0, b"1" * 1000)
        await file.flush()
        await theirs.truncate(ME, file.inode_id, 0)
        await file.write(100, b"2" * 10)  # we do not know yet
        await file.close()
        assert world.meta.inodes[file.inode_id].length == 110

    run(test)


def test_r12_close_makes_a_truncation_stable():
    """A file that was only truncated is as stable after close as one that was written."""

    async def test(world):
        file = await make(world.client())
        await file.truncate(1000, ME)
        await file.close()
        assert world.meta.settled[-1].durable

    run(test)


@pytest.mark.parametrize("how", ["fsync", "close"])
def test_r12_a_truncation_that_a_power_cut_took_from_meta_is_told_again(how):
    """What was written below the new end stays within the file."""

    async def test(world):
        file = await make(world.client())
        await file.write(0, b"1" * 1000)
        await file.truncate(2000, ME)
        world.meta.change(file.inode_id, length=0)  # it was not stable
        await (file.fsync() if how == "fsync" else file.close())
        assert world.meta.inodes[file.inode_id].length == 2000
        await file.close()

    run(test)


@pytest.mark.parametrize("how", ["fsync", "close"])
def test_r12_a_length_that_a_power_cut_took_from_meta_is_told_again(how):
    """What was told in passing is told again at fsync and close: only then it must be stable."""

    async def test(world):
        file = await make(world.client())
        await file.write(0, b"1" * 1000, direct=True)
        await file.state.settle(file.session)
        world.meta.change(file.inode_id, length=0)  # the settlement was not stable
        await (file.fsync() if how == "fsync" else file.close())
        assert world.meta.inodes[file.inode_id].length == 1000
        await file.close()

    run(test)


@pytest.mark.parametrize("end", ["fsync", "close"])
def test_a_length_that_cannot_be_told_for_the_cuts_of_others_is_an_error(end):
    """Nothing is told to be safe that meta has not taken; the session ends all the same."""

    async def test(world):
        file = await make(world.client())

        def cut(method, request):
            if method is mc.SETTLE and request.length is not None:
                version = world.meta.inodes[file.inode_id].truncate_version
                world.meta.change(file.inode_id, truncate_version=version + 1)

        world.meta.before = cut
        await file.write(0, b"x" * 1000, direct=True)
        with pytest.raises(EmberfsError) as caught:
            await getattr(file, end)()
        assert caught.value.code == Code.SUPERSEDED
        world.meta.before = lambda *_: None
        await file.close()
        await asyncio.sleep(0.1)
        assert not +world.meta.sessions

    run(test)


def test_r12_a_cut_that_a_power_cut_undid_does_not_hide_later_lengths():
    """A truncate version seen here and lost at meta is given up when meta answers."""

    async def test(world):
        file = await make(world.client())
        await file.write(0, b"1" * 1000)
        await file.flush()
        lost = world.meta.change(file.inode_id, truncate_version=3, length=0)
        file.state.note(lost)
        world.meta.change(file.inode_id, truncate_version=0, length=1000)
        await file.write(1000, b"2" * 10)
        await file.fsync()
        assert world.meta.inodes[file.inode_id].length == 1010
        await file.close()

    run(test)


def test_explicit_mtime_survives_the_flush_of_earlier_writes():
    async def test(world):
        files = world.client()
        file = await make(files)
        await file.write(0, b"data")
        await files.setattr(ME, file.inode_id, mtime_ns=12345)
        await file.close()
        assert world.meta.inodes[file.inode_id].mtime_ns == 12345
        assert world.meta.inodes[file.inode_id].length == 4

    run(test)


def test_appends_of_one_client_never_overlap():
    async def test(world):
        files = world.client()
        first = await make(files)
        _, second = await files.open(ME, first.inode_id, write=True)
        records = [bytes([65 + i]) * (10 + i) for i in range(20)]
        await asyncio.gather(
            *((first, second)[i % 2].write(0, r, append=True) for i, r in enumerate(records))
        )
        await first.close()
        await second.close()
        total = sum(map(len, records))
        content = world.content(first.inode_id, total)
        assert sorted(content) == sorted(b"".join(records))
        assert all(record in content for record in records)

    run(test)


def test_c9_cancelled_and_timed_out_opens_leave_no_session():
    """An open whose caller has gone leaves no session behind.

    The reply of an open is lost.
    """

    async def test(world):
        files = world.client()
        await (await make(files)).close()
        world.meta.lose_replies = 0
        world.meta.delay_s = 0.1
        opening = asyncio.ensure_future(files.open(ME, 2))
        await asyncio.sleep(0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        world.meta.delay_s = 0
        await asyncio.sleep(0.2)
        assert not [s for s, count in world.meta.sessions.items() if count]

    run(test)


@pytest.mark.parametrize("how", ["open", "create"])
def test_c9_opens_whose_answer_is_lost_leave_no_session(how, monkeypatch):
    """They were performed and timed out; meta is away for longer than one call is tried."""
    monkeypatch.setattr(openfile, "ABANDON_RETRY_NS", 20 * MS)

    async def test(world):
        files = world.client()
        await (await make(files)).close()
        files.metadata.deadline_ns = 300 * MS
        world.meta.lose_replies = 1 << 30
        with pytest.raises(EmberfsError) as caught:
            await (files.open(ME, 2) if how == "open" else files.create(ME, 1, b"g", 0o644))
        assert caught.value.code == Code.TIMEOUT
        assert +world.meta.sessions
        await asyncio.sleep(0.5)
        world.meta.lose_replies = 0
        for _ in range(100):
            if not +world.meta.sessions:
                break
            await asyncio.sleep(0.02)
        assert not +world.meta.sessions

    run(test)


@pytest.mark.parametrize("how", ["open", "create"])
def test_c9_an_open_that_fails_after_its_session_was_recorded_leaves_none(how):
    """The cut that it had to wait for may fail, with what nobody tries again."""

    async def test(world):
        files = world.client()
        await (await make(files)).close()
        perform = getattr(files.metadata, how)

        async def fail(*args, **more):
            await perform(*args, **more)
            raise EmberfsError(Code.NO_SPACE, "truncating inode 2: the disk is full")

        setattr(files.metadata, how, fail)
        with pytest.raises(EmberfsError):
            await (files.open(ME, 2) if how == "open" else files.create(ME, 1, b"g", 0o644))
        await asyncio.sleep(0.1)
        assert not +world.meta.sessions

    run(test)


def test_c9_a_copy_of_an_open_that_comes_late_leaves_no_session(monkeypatch):
    """Its caller has gone, and its session was ended before it began."""
    monkeypatch.setattr(openfile, "LATE_NS", 200 * MS)

    async def test(world):
        files = world.client()
        await (await make(files)).close()
        opening = files.metadata.open

        async def late(caller, inode, session, **more):
            async def copy():
                await asyncio.sleep(0.1)
                await opening(caller, inode, session, **more)

            world.late = asyncio.ensure_future(copy())
            raise EmberfsError(Code.TIMEOUT, "no answer")

        files.metadata.open = late
        with pytest.raises(EmberfsError):
            await files.open(ME, 2)
        await world.late
        assert +world.meta.sessions
        await asyncio.sleep(0.3)
        assert not +world.meta.sessions

    run(test)


async def _fail_to_close(world, file, code):
    """Close while meta refuses, or does not answer to, what settles the file."""
    settle = file._services.metadata.settle

    async def refuse(*args, **more):
        raise EmberfsError(code, "injected")

    file._services.metadata.settle = refuse
    with contextlib.suppress(EmberfsError):
        await file.close()
    await asyncio.sleep(0.05)
    file._services.metadata.settle = settle
    assert +world.meta.sessions
    for _ in range(200):
        if not +world.meta.sessions:
            break
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("code", [Code.TIMEOUT, Code.NO_SPACE])
def test_a_close_that_fails_leaves_no_session(write, code, monkeypatch):
    """Nobody would end it while this client lives, and the file could not be collected."""
    monkeypatch.setattr(description, "END_RETRY_NS", 20 * MS)

    async def test(world):
        files = world.client()
        await (await make(files)).close()
        _, file = await files.open(ME, 2, write=write)
        if write:
            await file.write(0, b"x" * 100)
        await _fail_to_close(world, file, code)
        assert not +world.meta.sessions
        assert not files._states

    run(test)


def test_what_a_close_could_not_tell_in_time_is_told_later(monkeypatch):
    """It is at storage; a hole that a later writer makes behind the old end would show it."""
    monkeypatch.setattr(description, "END_RETRY_NS", 20 * MS)

    async def test(world):
        file = await make(world.client())
        await file.write(0, b"x" * 100)
        await _fail_to_close(world, file, Code.TIMEOUT)
        assert world.meta.inodes[file.inode_id].length == 100

    run(test)


def test_what_a_close_was_refused_is_said_to_lie_behind_the_end(monkeypatch):
    monkeypatch.setattr(description, "END_RETRY_NS", 20 * MS)

    async def test(world):
        file = await make(world.client())
        await file.write(0, b"x" * 100)
        await _fail_to_close(world, file, Code.NO_SPACE)
        assert (world.meta.settled[-1].torn, world.meta.settled[-1].close) == (True, True)
        assert world.meta.inodes[file.inode_id].length == 0

    run(test)


def test_c3_o8_dirty_bytes_are_bounded_and_writers_wait(monkeypatch):
    """Unwritten bytes are bounded: writers wait instead of filling memory."""
    monkeypatch.setattr(writebuffer, "FILE_BYTES", 4 * CHUNK)

    async def test(world):
        files = world.client()
        file = await make(files)
        world.update_delay_s = lambda: 0.01
        data = random.Random(4).randbytes(40 * CHUNK)
        most = 0

        async def watch():
            nonlocal most
            while True:
                most = max(most, files.write_memory.room.used_bytes)
                await asyncio.sleep(0.001)

        watching = asyncio.ensure_future(watch())
        for at in range(0, len(data), 30_000):
            await file.write(at, data[at : at + 30_000])
        await file.flush()
        watching.cancel()
        assert most <= 4 * CHUNK
        assert files.write_memory.room.used_bytes == 0
        assert files.write_memory.pool.taken_bytes == 0
        assert world.content(file.inode_id, len(data)) == data
        await file.close()

    run(test)


def test_c3_o8_many_files_share_the_bound_without_deadlock():
    """Many files share one bound of memory and all finish."""

    async def test(world):
        files = world.client()
        files.write_memory.room.limit_bytes = 2 * CHUNK
        opened = [await make(files, b"%d" % i) for i in range(10)]
        for turn in range(5):
            await asyncio.gather(
                *(file.write(turn * 20_000, bytes([turn + 1]) * 20_000) for file in opened)
            )
        for file in opened:
            await file.close()
            assert world.content(file.inode_id, 100_000)[::20_000] == bytes(range(1, 6))

    run(test)


def test_sequential_read_is_prefetched_and_served_as_views():
    async def test(world):
        files = world.client()
        file = await make(files)
        data = random.Random(5).randbytes(6 * MiB)
        await file.write(0, data)
        await file.close()
        _, file = await files.open(ME, file.inode_id)
        kept = []
        for at in range(0, len(data), 128 * KiB):
            kept.append(await file.read(at, 128 * KiB))
            await asyncio.sleep(0.001)
        assert b"".join(kept) == data  # views of prefetched memory stay valid
        reads = sum(node.calls.count(sc.READ_BATCH) for node in world.storage)
        assert reads < 30
        await file.close()
        kept.clear()
        assert files.read_memory.prefetched_bytes == 0

    run(test, chunk_bytes=1 * MiB, chains=4)


def test_random_reads_fetch_exactly_what_they_ask_for():
    async def test(world):
        files = world.client()
        file = await make(files)
        await file.write(0, bytes(4 * MiB))
        await file.close()
        for node in world.storage:
            node.calls.clear()
        _, file = await files.open(ME, file.inode_id)
        for at in (3 * MiB, 1 * MiB, 2 * MiB + 5, 77_777):
            await file.read(at, 100)
        assert sum(node.calls.count(sc.READ_BATCH) for node in world.storage) == 4
        assert files.read_memory.prefetched_bytes == 0
        await file.close()

    run(test)


def test_o14_prefetched_bytes_are_never_older_than_own_writes():
    """Bytes from the read-ahead are never older than one's own writes."""

    async def test(world):
        files = world.client()
        writer = await make(files)
        await writer.write(0, b"o" * 1 * MiB)
        await writer.flush()
        _, reader = await files.open(ME, writer.inode_id)
        for at in range(0, 512 * KiB, 64 * KiB):
            assert bytes(await reader.read(at, 64 * KiB)) == b"o" * 64 * KiB
            await writer.write(at + 64 * KiB, b"n" * 10, direct=at % 128 == 0)
            assert bytes(await reader.read(at + 64 * KiB, 11)) == b"n" * 10 + b"o"
            await writer.write(at + 64 * KiB, b"o" * 10)
            await writer.flush()
        await reader.close()
        await writer.close()

    run(test)


class Model:
    """The file as a bytearray."""

    def __init__(self):
        self.data = bytearray()

    def write(self, offset, part):
        if len(self.data) < offset:
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(part)] = part

    def truncate(self, length):
        del self.data[length:]
        self.data.extend(bytes(length - len(self.data)))


@pytest.mark.parametrize("seed", range(6))
def test_o17_any_sequence_of_operations_equals_a_bytearray(seed, monkeypatch):
    """Any sequence of operations leaves exactly the bytes that a model has."""
    monkeypatch.setattr(openfile, "TICK_NS", 3_000_000)
    monkeypatch.setattr(openfile, "DIRTY_AGE_NS", 5_000_000)
    monkeypatch.setattr(openfile, "HINT_AGE_NS", 5_000_000)

    async def test(world):
        generator = random.Random(seed)
        world.update_delay_s = lambda: generator.choice((0, 0, 0.003))
        files = world.client()
        file = await make(files)
        model = Model()
        size = 6 * CHUNK
        for step in range(250):
            offset = generator.randrange(size)
            length = min(generator.choice((1, 100, 5_000, CHUNK, 2 * CHUNK)), size - offset)
            choice = generator.random()
            if choice < 0.45:
                part = generator.randbytes(length)
                direct = generator.random() < 0.2
                append = generator.random() < 0.1 and len(model.data) < size
                await file.write(offset, part, direct=direct, append=append)
                model.write(len(model.data) if append else offset, part)
            elif choice < 0.8:
                direct = generator.random() < 0.2
                found = await file.read(offset, length, direct=direct)
                assert found == model.data[offset : offset + length], f"step {step}"
            elif choice < 0.88:
                sink = memoryview(bytearray(length))
                count = await file.read_into(offset, sink)
                assert sink[:count] == model.data[offset : offset + length], f"step {step}"
            elif choice < 0.92:
                await file.truncate(offset, ME)
                model.truncate(offset)
            elif choice < 0.95:
                await file.flush()
                assert world.meta.inodes[file.inode_id].length == len(model.data)
                assert world.content(file.inode_id, len(model.data)) == model.data
            elif choice < 0.97:
                await file.fsync()
            else:
                assert (await file.stat()).length == len(model.data)
        await file.close()
        assert world.meta.inodes[file.inode_id].length == len(model.data)
        assert world.content(file.inode_id, len(model.data)) == model.data
        assert files.write_memory.room.used_bytes == 0

    run(test)


@pytest.mark.parametrize("seed", range(3))
def test_concurrent_operations_are_atomic(seed, monkeypatch):
    """Every write fills its range with one byte: a read of a slot sees exactly one writer."""
    monkeypatch.setattr(openfile, "TICK_NS", 3_000_000)
    monkeypatch.setattr(openfile, "DIRTY_AGE_NS", 4_000_000)

    async def test(world):
        generator = random.Random(seed)
        world.update_delay_s = lambda: generator.choice((0, 0.002, 0.005))
        files = world.client()
        file = await make(files)
        slot = CHUNK + 1000  # crosses chunk borders
        last = {}

        async def work(number):
            _, mine = await files.open(ME, file.inode_id, write=True)
            for turn in range(25):
                at = generator.randrange(4)
                if generator.random() < 0.5:
                    byte = number * 25 + turn + 1
                    await mine.write(at * slot, bytes([byte]) * slot, direct=turn % 5 == 0)
                    last[at] = byte
                else:
                    found = bytes(await mine.read(at * slot, slot))
                    assert len(set(found)) <= 1, "torn"
                if turn % 10 == 9:
                    await mine.flush()
            await mine.close()

        await asyncio.gather(*(work(number) for number in range(8)))
        for at in range(4):
            assert len(set(bytes(await file.read(at * slot, slot)))) <= 1
        await file.close()
        length = world.meta.inodes[file.inode_id].length
        content = world.content(file.inode_id, length)
        for at in range(length // slot):
            assert len(set(content[at * slot : (at + 1) * slot])) == 1

    run(test)


def test_o2_o14_a_read_begins_again_where_a_frozen_server_cannot_write():
    """A frozen server that wakes up cannot write into a buffer that was read from another.

    A call that its server never confirmed to have ended taints the memory it named.
    """

    async def test(world):
        files = world.client()
        file = await make(files)
        data = random.Random(1).randbytes(1000)
        await file.write(0, data)
        await file.flush()
        chunkio = files._services.chunkio
        read, used = chunkio.read, []

        async def tainted_once(inode, layout, offset, sink, **options):
            used.append(sink)
            if len(used) == 1:
                sink.region.abandoned = True
                raise EmberfsError(Code.INVALID, "a server may still write to this region")
            await read(inode, layout, offset, sink, **options)

        chunkio.read = tainted_once
        assert bytes(await file.read(0, 1000, direct=True)) == data
        assert used[0].region is not used[1].region
        await file.close()

    run(test)
