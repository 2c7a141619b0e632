"""Inline files in the client: no chunk is touched, writers that meet, growth, failures."""

import asyncio
import random

import pytest

from emberfs.client import description, openfile
from emberfs.proto import meta_calls as mc
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.meta_calls import Caller
from unit.client_fakes import CHUNK, run

ME = Caller(0, 0)
LIMIT = 2000


def play(test, **world):
    """Run a test in a world whose files are inline up to LIMIT."""

    async def inline(world):
        world.meta.inline_bytes_max = LIMIT
        await test(world)

    run(inline, **world)


async def make(files, content=b"", name=b"f", **flags):
    _, file = await files.create(ME, 1, name, 0o644, **flags)
    if content:
        await file.write(0, content)
        await file.flush()
    return file


def told(world):
    """What settlements carried as content."""
    return [r.content for r in world.meta.settled if r.content is not None]


def test_a_small_file_is_one_create_and_one_settlement():
    async def test(world):
        files = world.client()
        file = await make(files)
        await file.write(0, b"hello")
        await file.write(10, b"world")
        await file.flush()
        assert told(world) == [b"hello\0\0\0\0\0world"]
        assert world.meta.settled[0].durable
        await file.flush()
        await file.fsync(data_only=True)
        assert (len(world.meta.settled), world.chunks) == (1, {})
        await file.close()
        assert not world.meta.settled[-1].content

    play(test)


def test_open_and_read_of_a_small_file_is_one_call():
    async def test(world):
        await (await make(world.client(), b"content")).close()
        theirs = world.client(8)
        _, file = await theirs.open(ME, 2)

        def refuse(method, request):
            raise EmberfsError(Code.INTERNAL, f"{method.name} is one call more")

        world.meta.before = refuse
        assert bytes(await file.read(0, 100)) == b"content"
        assert bytes(await file.read(3, 2)) == b"te"
        world.meta.before = lambda method, request: None

    play(test)


def test_a_write_is_told_after_a_second_without_any_flush(monkeypatch):
    monkeypatch.setattr(openfile, "TICK_NS", 3_000_000)
    monkeypatch.setattr(openfile, "DIRTY_AGE_NS", 5_000_000)

    async def test(world):
        file = await make(world.client())
        await file.write(0, b"x")
        while not told(world):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not world.meta.settled[0].durable
        await file.fsync()  # and durably again: a power cut may have taken it
        assert (told(world), world.meta.settled[-1].durable) == ([b"x", b"x"], True)

    play(test)


def test_direct_writes_are_durable_on_return():
    async def test(world):
        file = await make(world.client(), direct=True)
        await file.write(0, b"x")
        assert (told(world), world.meta.settled[-1].durable) == ([b"x"], True)

    play(test)


def test_two_clients_do_not_undo_each_others_bytes():
    async def test(world):
        one = await make(world.client(), b"o" * 9)
        _, two = await world.client(8).open(ME, one.inode_id, write=True)
        await one.write(0, b"1")
        await two.write(8, b"22")
        await one.close()
        await two.close()
        assert world.content(one.inode_id, 10) == b"1oooooooo"[:8] + b"22"
        assert world.meta.inodes[one.inode_id].length == 10

    play(test)


def test_a_file_that_is_fought_for_gets_chunks():
    async def test(world):
        file = await make(world.client(), b"o" * 4)

        def come_first(method, request):
            if method is mc.SETTLE and request.content is not None:
                world.meta.cut(request.inode, 4)

        world.meta.before = come_first
        await file.write(0, b"1")
        await file.fsync()
        assert not world.meta.inodes[file.inode_id].inline
        assert world.content(file.inode_id, 4) == b"1ooo"

    play(test)


def test_a_file_grows_by_whoever_writes_over_the_limit():
    async def test(world):
        one = await make(world.client(), b"o" * 4)
        _, two = await world.client(8).open(ME, one.inode_id, write=True)
        await one.write(0, b"1")
        await two.write(LIMIT, b"2")
        assert not world.meta.inodes[one.inode_id].inline
        await two.close()
        await one.close()
        wanted = b"1ooo" + bytes(LIMIT - 4) + b"2"
        assert world.content(one.inode_id, LIMIT + 1) == wanted
        assert world.meta.inodes[one.inode_id].length == LIMIT + 1

    play(test)


def test_a_reader_sees_what_was_closed_before_it_opened_again(monkeypatch):
    monkeypatch.setattr(description, "LENGTH_AGE_NS", 0)

    async def test(world):
        writer = await make(world.client(), b"first")
        theirs = world.client(8)
        _, kept = await theirs.open(ME, writer.inode_id)
        assert bytes(await kept.read(0, 9)) == b"first"
        await writer.write(0, b"second")
        await writer.close()
        _, again = await theirs.open(ME, writer.inode_id)
        assert bytes(await again.read(0, 9)) == b"second"
        assert bytes(await kept.read(0, 9)) == b"second"
        await theirs.truncate(ME, writer.inode_id, 3)
        assert bytes(await kept.read(0, 9)) == b"sec"

    play(test)


def test_a_refused_settlement_keeps_the_bytes_and_a_failed_close_loses_them():
    async def test(world):
        files = world.client()
        file = await make(files, b"old")
        _, reader = await files.open(ME, file.inode_id)

        def refuse(method, request):
            if method is mc.SETTLE:
                raise EmberfsError(Code.NO_SPACE, "full")

        world.meta.before = refuse
        await file.write(0, b"new")
        with pytest.raises(EmberfsError, match="full"):
            await file.fsync()
        assert bytes(await reader.read(0, 3)) == b"new"
        with pytest.raises(EmberfsError, match="full"):
            await file.close()
        world.meta.before = lambda method, request: None
        assert bytes(await reader.read(0, 3)) == b"old"

    play(test)


def test_a_removed_file_is_stale_when_it_must_be_told():
    async def test(world):
        file = await make(world.client(), b"old")
        await file.write(0, b"new")
        del world.meta.inodes[file.inode_id]
        with pytest.raises(EmberfsError) as raised:
            await file.fsync()
        assert raised.value.code == Code.NOT_FOUND
        with pytest.raises(EmberfsError) as raised:
            await file.write(0, b"new")
        assert raised.value.code == Code.STALE

    play(test)


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_operations_of_two_clients_equals_a_bytearray(seed, monkeypatch):
    """One after the other opens, works and closes; sizes are around the limit."""
    monkeypatch.setattr(openfile, "TICK_NS", 3_000_000)
    monkeypatch.setattr(openfile, "DIRTY_AGE_NS", 5_000_000)

    async def test(world):
        dice = random.Random(seed)
        clients = [world.client(), world.client(8)]
        for turn in range(6):
            name, model, number = b"f%d" % turn, bytearray(), 0
            kept = []
            for _ in range(12):
                files = dice.choice(clients)
                truncate = dice.random() < 0.15
                if number and dice.random() < 0.8:
                    _, file = await files.open(ME, number, write=True, truncate=truncate)
                else:
                    _, file = await files.create(ME, 1, name, 0o644, truncate=truncate)
                number = file.inode_id
                if truncate:
                    model.clear()
                if dice.random() < 0.2:
                    kept.append((await files.open(ME, number))[1])
                for _ in range(dice.randrange(5)):
                    await _step(dice, world, file, model)
                await file.close()
                assert world.meta.inodes[number].length == len(model)
                assert world.content(number, len(model)) == model
            for file in kept:
                await asyncio.sleep(0.0)
                await file.close()

    play(test, timeout_s=60)


async def _step(dice, world, file, model):
    offset = dice.randrange(LIMIT if dice.random() < 0.96 else 2 * CHUNK)
    length = dice.choice((1, 10, 100, min(500, max(1, LIMIT - offset))))
    roll = dice.random()
    if roll < 0.5:
        data = dice.randbytes(length)
        append = dice.random() < 0.1
        offset = len(model) if append else offset
        await file.write(offset, data, append=append, direct=dice.random() < 0.2)
        model.extend(bytes(max(0, offset + length - len(model))))
        model[offset : offset + length] = data
    elif roll < 0.75:
        found = await file.read(offset, length, direct=dice.random() < 0.2)
        assert found == model[offset : offset + length]
    elif roll < 0.85:
        await file.truncate(offset, ME)
        del model[offset:]
        model.extend(bytes(offset - len(model)))
    elif roll < 0.93:
        await file.fsync()
    else:
        assert (await file.stat()).length == len(model)
        await asyncio.sleep(0.01)


# ---------------------------------------------------------------- quotas, blocks


def test_a_write_beyond_the_quota_fails_at_once_and_what_was_accepted_settles():
    async def test(world):
        world.meta.quota_bytes = 1000
        file = await make(world.client())
        await file.write(0, b"x" * 600)
        await file.write(600, b"x" * 400)
        with pytest.raises(EmberfsError) as found:
            await file.write(1000, b"x")
        assert found.value.code == Code.QUOTA
        await file.flush()
        assert (told(world)[-1], world.chunks) == (b"x" * 1000, {})
        world.meta.quota_bytes = 1010
        await file.write(1000, b"x" * 10)
        await file.close()
        assert told(world)[-1] == b"x" * 1010

    play(test)


def test_blocks_of_a_small_file_are_its_content_and_storage_is_not_asked():
    async def test(world):
        files = world.client()
        file = await make(files, b"x" * 600)
        holed = world.meta.change(file.inode_id, length=LIMIT, sparse=True)
        assert await files.stored_bytes(holed) == 600
        await file.close()
        other = world.client(8)
        assert await other.stored_bytes(holed) == 600
        world.meta.before = lambda method, request: pytest.fail(f"{method.name} is asked")
        whole = world.meta.change(file.inode_id, length=600, sparse=False)
        assert await other.stored_bytes(whole) == 600
        world.meta.before = lambda method, request: None

    play(test)


def test_a_hole_that_a_small_file_takes_along_is_told():
    """It is written behind its end and grows: meta has not heard of either."""

    async def test(world):
        file = await make(world.client(), b"x")
        await file.write(1500, b"y" * 10)
        await file.write(LIMIT, b"z" * 10)
        await file.flush()
        assert any(r.sparse for r in world.meta.settled)

    play(test)


def test_a_read_goes_on_when_the_file_gets_chunks_while_meta_is_asked(monkeypatch):
    """Somebody else's write of this client lets it grow; the read had looked that it is inline."""
    monkeypatch.setattr(description, "LENGTH_AGE_NS", 0)

    async def test(world):
        file = await make(world.client(), b"x")
        ask = file._services.metadata.getattr

        async def while_it_grows(inode):
            file._services.metadata.getattr = ask
            found = await ask(inode)
            await file.write(LIMIT, b"y")
            assert file.state.small is None
            return found

        file._services.metadata.getattr = while_it_grows
        assert bytes(await file.read(0, 2)) == b"x\0"
        await file.close()

    play(test)
