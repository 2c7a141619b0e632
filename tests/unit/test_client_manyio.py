"""Many ranges at once: few calls, a result for each, and the promises of single reads."""

import asyncio
import random

import pytest

from emberfs.client.chunkio import ChunkIO
from emberfs.client.manyio import Range, read_many, write_many
from emberfs.fabric.region import Region
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import KiB
from emberfs.proto.meta_calls import Caller
from emberfs.proto.storage_calls import READ_BATCH
from unit.client_fakes import CHUNK, run

ME = Caller(0, 0)
DATA = random.Random(3).randbytes(6 * CHUNK + 77)


def reads(world):
    return sum(node.calls.count(READ_BATCH) for node in world.storage)


async def filled(files, name=b"f", data=DATA):
    _, file = await files.create(ME, 1, name, 0o644)
    await file.write(0, data)
    await file.flush()
    return file


def test_ranges_of_several_files_share_the_calls_of_a_node():
    async def test(world):
        files = world.client()
        one, two = await filled(files), await filled(files, b"g", DATA[::-1])
        region = Region(256 * KiB)
        dice = random.Random(1)
        places = [(dice.choice((one, two)), dice.randrange(len(DATA) - 500)) for _ in range(200)]
        ranges = [
            Range(file, at, region.slice(500 * i, 500)) for i, (file, at) in enumerate(places)
        ]
        before = reads(world)
        assert await read_many(files.chunkio, ranges) == [500] * 200
        # Those that lie in two chunks are read in a second round.
        assert reads(world) - before <= 2 * len(world.storage)
        for i, (file, at) in enumerate(places):
            data = DATA if file is one else DATA[::-1]
            assert region.view[500 * i : 500 * i + 500] == data[at : at + 500]
        region.close()

    run(test)


def test_few_small_ranges_take_one_call():
    async def test(world):
        files = world.client()
        file = await filled(files)
        region = Region(256 * KiB)
        ranges = [Range(file, CHUNK * (i % 6), region.slice(600 * i, 600)) for i in range(60)]
        ranges.append(Range(file, len(DATA) - 5, region.slice(100_000, 600)))  # ends early
        ranges.append(Range(file, -1, region.slice(200_000, 1)))
        ranges.append(Range(file, 5, region.slice(200_000, 0)))
        before = reads(world)
        results = await read_many(files.chunkio, ranges[:60])
        assert results == [600] * 60
        assert reads(world) - before == 1
        results = await read_many(files.chunkio, ranges)
        assert results[:61] == [600] * 60 + [5]
        assert isinstance(results[61], EmberfsError)
        assert results[62] == 0
        for i in range(60):
            at = CHUNK * (i % 6)
            assert region.view[600 * i : 600 * i + 600] == DATA[at : at + 600]
        assert region.view[100_000:100_005] == DATA[-5:]
        region.close()

    run(test)


def test_memory_may_be_given_back_while_a_hole_is_read_into_it():
    """Whoever completes the call clears what a hole leaves, but not in a region that is closed."""

    async def test(world):
        files = world.client()
        _, file = await files.create(ME, 1, b"sparse", 0o644)
        await file.write(CHUNK, b"end")
        await file.flush()
        region = Region(64 * KiB)
        region.view[:100] = b"x" * 100
        for node in world.storage:
            node.delay_s = 0.1
        ranges = [Range(file, 1000 * i, region.slice(100 * i, 100)) for i in range(20)]
        reading = asyncio.ensure_future(read_many(files.chunkio, ranges))
        await asyncio.sleep(0.03)
        region.close()
        assert await reading == [100] * 20

    run(test)


def test_each_range_has_its_own_result():
    async def test(world):
        files = world.client()
        file, closed = await filled(files), await filled(files, b"g")
        await closed.close()
        memories = [bytearray(100) for _ in range(5)]
        views = [memoryview(memory) for memory in memories]
        ends = len(DATA)
        wanted = [(file, 0), (file, ends - 40), (file, ends + 5), (file, -1), (closed, 0)]
        ranges = [Range(f, at, view) for (f, at), view in zip(wanted, views, strict=True)]
        results = await read_many(files.chunkio, ranges)
        assert results[:3] == [100, 40, 0]
        assert isinstance(results[3], EmberfsError)
        assert results[3].code == Code.INVALID
        assert memories[0] == DATA[:100]
        assert memories[1][:40] == DATA[-40:]

    run(test)


def test_each_write_says_that_it_has_ended():
    async def test(world):
        files = world.client()
        file, closed = await filled(files), await filled(files, b"g")
        await closed.close()
        heard = {}
        ranges = [Range(f, 10, memoryview(b"new")) for f in (file, closed)]
        results = await write_many(ranges, heard.__setitem__)
        assert heard == dict(enumerate(results))
        assert results[0] == 3
        assert isinstance(results[1], EmberfsError)

    run(test)


def test_what_is_buffered_here_is_read_as_well():
    async def test(world):
        files = world.client()
        file = await filled(files)
        await file.write(1000, b"fresh")
        memory = bytearray(7)
        assert await read_many(files.chunkio, [Range(file, 999, memoryview(memory))]) == [7]
        assert memory == DATA[999:1000] + b"fresh" + DATA[1005:1006]

    run(test)


def test_a_range_waits_for_the_writer_that_is_at_it():
    async def test(world):
        files = world.client()
        file = await filled(files)
        world.update_delay_s = lambda: 0.05
        writing = asyncio.ensure_future(file.write(0, b"n" * 100, direct=True))
        await asyncio.sleep(0.01)
        memory, other = bytearray(200), bytearray(100)
        ranges = [Range(file, 0, memoryview(memory)), Range(file, CHUNK, memoryview(other))]
        assert await read_many(files.chunkio, ranges) == [200, 100]
        assert writing.done()
        assert memory == b"n" * 100 + DATA[100:200]
        assert other == DATA[CHUNK : CHUNK + 100]
        await writing

    run(test)


def test_no_servers_no_data_but_the_reason(monkeypatch):
    for method in (ChunkIO.read, ChunkIO.read_many):
        monkeypatch.setitem(method.__kwdefaults__, "timeout_ns", 2 * 10**8)

    async def test(world):
        files = world.client()
        file = await filled(files)
        for node in world.storage:
            await node.stop()
        ranges = [Range(file, at, memoryview(bytearray(10))) for at in (0, CHUNK)]
        for result in await read_many(files.chunkio, ranges):
            assert isinstance(result, EmberfsError)
            assert result.code == Code.TIMEOUT

    run(test)


def test_writes_are_committed_when_they_are_told():
    async def test(world):
        files = world.client()
        file = await filled(files)
        ranges = [Range(file, i * CHUNK, memoryview(bytes([i]) * 300)) for i in range(6)]
        results = await write_many([*ranges, Range(file, -4, memoryview(b"x"))])
        assert results[:6] == [300] * 6
        assert results[6].code == Code.INVALID
        for i in range(6):
            found = world.content(file.inode_id, len(DATA))[i * CHUNK : i * CHUNK + 301]
            assert found == bytes([i]) * 300 + DATA[i * CHUNK + 300 : i * CHUNK + 301]

    run(test)


@pytest.mark.parametrize("count", [0, 1])
def test_few(count):
    async def test(world):
        files = world.client()
        file = await filled(files)
        ranges = [Range(file, 5, memoryview(bytearray(3)))] * count
        assert await read_many(files.chunkio, ranges) == [3] * count
        assert await write_many(ranges) == [3] * count

    run(test)
