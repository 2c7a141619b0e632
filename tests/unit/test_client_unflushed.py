"""What was acknowledged and not flushed, in which life of its chain; how files tell of a loss."""

import asyncio
import contextlib
import errno

import pytest

from emberfs.client.unflushed import Unflushed, lowest
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.meta_calls import Caller
from unit.client_fakes import CHUNK, run

ME = Caller(0, 0)


async def make(files, name=b"f", **flags):
    _, file = await files.create(ME, 1, name, 0o644, **flags)
    return file


async def is_told(call):
    """Tell whether a call says that something is lost."""
    try:
        await call
    except EmberfsError as problem:
        if problem.errno != errno.EIO or "write it again" not in problem.message:
            raise
        return True
    return False


# ---------------------------------------------------------------- marks


def test_what_is_newer_than_the_loss_is_safe_and_what_is_older_is_told_once():
    for acknowledged, lost, told in ((4, 0, False), (4, 4, False), (3, 4, True), (0, 4, True)):
        marks = Unflushed({1: acknowledged, 2: 9})
        assert marks.chains == {1, 2}
        assert marks.flushed(marks.now(), {1: lost, 2: 5}) == told
        assert not marks
        assert not marks.flushed(marks.now(), {1: lost, 2: 5})


def test_what_comes_during_a_flush_is_left_for_the_next():
    marks = Unflushed({1: 3})
    covered = marks.now()
    marks.note({1: 3})
    assert not marks.flushed(covered, {1: 0})
    assert marks.chains == {1}


def test_what_comes_during_a_flush_that_has_met_a_loss():
    """Before the loss: told with the rest. After it: not concerned."""
    marks = Unflushed({1: 3})
    covered = marks.now()
    marks.note({1: 3})
    marks.note({1: 5})
    assert marks.flushed(covered, {1: 5})
    assert set(marks.now()) == {(1, 5)}


def test_a_flush_that_ends_late_does_not_forget_what_came_after_it_began():
    """Two flushes at a time: the first one's end and a write made the counts of both equal."""
    marks = Unflushed({1: 3})
    first, second = marks.now(), marks.now()
    marks.flushed(first, {})
    marks.note({1: 3})
    marks.flushed(second, {})
    assert marks.chains == {1}


def test_two_flushes_that_meet_one_loss_tell_it_once():
    marks = Unflushed({1: 3})
    first, second = marks.now(), marks.now()
    assert marks.flushed(first, {1: 4})
    assert not marks.flushed(second, {1: 4})


def test_of_several_acknowledgements_the_oldest_counts():
    assert lowest([(1, 5), (2, 7), (1, 3), (1, 9)]) == {1: 3, 2: 7}


# ---------------------------------------------------------------- chunks


def test_updates_and_flushes_tell_versions():
    async def test(world):
        io = world.client().chunkio
        data = memoryview(bytes(2 * CHUNK))
        assert await io.write(42, world.layout, 0, data) == {1: 1, 2: 1}
        assert await io.flush([1, 2]) == {1: 0, 2: 0}
        world.republish(blackout=True)
        assert await io.flush([1]) == {1: 2}
        assert await io.truncate_chunk(42, world.layout, 0, 10) == {1: 2}
        assert await io.truncate_chunk(42, world.layout, 0, 10) == {}
        assert await io.remove_chunks(42, world.layout, 1) == {2: 2}
        assert await io.remove_chunks(42, world.layout, 1) == {}

    run(test)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("data_only", [True, False])
def test_r12_fsync_after_a_blackout_fails_once_for_each_description(direct, data_only):
    """Probe of the simulator: it said OK, and the write was gone."""

    async def test(world):
        files = world.client()
        file = await make(files)
        _, other = await files.open(ME, file.inode_id, write=True)
        await file.write(0, b"first")
        await file.fsync()
        await file.write(0, b"second", direct=direct)
        await file.state.buffer.drain()
        world.republish(blackout=True)
        assert await is_told(file.fsync(data_only))
        assert not await is_told(file.fsync(data_only))
        assert await is_told(other.fsync(data_only))
        assert not await is_told(other.fsync(data_only))
        await file.write(0, b"third")
        assert not await is_told(file.fsync(data_only))
        assert not await is_told(other.close())
        assert not await is_told(file.close())

    run(test)


@pytest.mark.parametrize("durable", [True, False])
def test_r12_close_after_a_blackout_fails_if_it_is_to_be_durable(durable):
    async def test(world):
        file = await make(world.client(durable_close=durable))
        await file.write(0, b"data")
        await file.state.buffer.drain()
        world.republish(blackout=True)
        assert await is_told(file.flush()) == durable  # the close(2) of a mount
        assert await is_told(file.close()) == durable
        assert not world.meta.sessions

    run(test)


def test_what_was_flushed_before_or_written_after_a_blackout_is_no_loss():
    async def test(world):
        file = await make(world.client())
        await file.write(0, b"data")
        await file.fsync()
        world.republish(blackout=True)
        assert not await is_told(file.fsync())
        await file.write(0, b"more")
        assert not await is_told(file.fsync())
        await file.write(0, b"kept")
        await file.state.buffer.drain()
        world.republish()  # replicas that lose nothing
        assert not await is_told(file.close())

    run(test)


def test_a_write_that_is_tried_again_across_a_blackout_counts_as_what_answered_it():
    async def test(world):
        file = await make(world.client())
        for node in world.storage:
            node.hang = True
        await file.write(0, b"data")
        file.state.buffer.push_all()
        await asyncio.sleep(0.05)
        for node in world.storage:
            node.hang = False
        world.republish((1,), blackout=True)
        assert not await is_told(file.fsync())
        assert world.content(file.inode_id, 4) == b"data"
        await file.close()

    run(test)


def test_a_flush_under_way_during_a_blackout_tells_of_it():
    async def test(world):
        file = await make(world.client())
        await file.write(0, b"data")
        await file.state.buffer.drain()
        world.storage[2].hang = True
        flushing = asyncio.ensure_future(is_told(file.fsync()))
        await asyncio.sleep(0.05)
        assert not flushing.done()
        world.storage[2].hang = False
        world.republish(blackout=True)
        assert await flushing
        await file.close()

    run(test)


def test_a_loss_that_no_flush_could_tell_yet_is_not_forgotten():
    """A flush that fails has told nothing: the next one does."""

    async def test(world):
        file = await make(world.client())
        await file.write(0, b"data")
        await file.state.buffer.drain()
        world.republish(blackout=True)
        original = file.chunkio.flush

        async def failing(chains, **more):
            await original(chains)
            raise EmberfsError(Code.TIMEOUT, "one of them does not answer")

        file.state._chunkio.flush = failing
        with pytest.raises(EmberfsError) as caught:
            await file.fsync()
        assert caught.value.code == Code.TIMEOUT
        file.state._chunkio.flush = original
        assert await is_told(file.fsync())
        with contextlib.suppress(EmberfsError):
            await file.close()

    run(test)
