"""Small reads that share a call: over the real fabric, against nodes that fail."""

import asyncio
import time

import pytest

from emberfs.client import chunkread
from emberfs.client.combine import Combiner
from emberfs.fabric.region import Region
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS
from emberfs.proto.storage_calls import READ_BATCH
from unit.client_fakes import CHUNK, run
from unit.test_client_chunkio import INODE, chunkio_of, pattern, put, read

READERS = 24
SIZE = 512


def calls_of(world):
    return sum(node.calls.count(READ_BATCH) for node in world.storage)


async def many(io, world):
    """Readers of different places, all at once; returns what each found or its error."""
    return await asyncio.gather(
        *(read(io, world, n * 1000, SIZE) for n in range(READERS)), return_exceptions=True
    )


def expected():
    data = pattern(READERS * 1000 + SIZE)
    return [data[n * 1000 : n * 1000 + SIZE] for n in range(READERS)]


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_readers_at_the_same_time_share_calls(transport, tmp_path):
    async def test(world):
        put(world, 0, pattern(READERS * 1000 + SIZE))
        io = chunkio_of(world)
        assert await many(io, world) == expected()
        # The first one did not wait; the others went along with who had been there before them.
        assert calls_of(world) == 2

    endpoint = (lambda node: f"shm://{tmp_path}/{node.id}") if transport == "shm" else None
    run(test, endpoint=endpoint)


def test_who_is_much_busier_is_not_joined(monkeypatch):
    async def test(world):
        put(world, 0, pattern(READERS * 1000 + SIZE))
        io = chunkio_of(world)
        asked = []
        share = Combiner.share

        def gathered(self, node, work):
            asked.append(node)
            return share(self, node, work)

        def cost(reader, node):
            return 9 if node in asked[:1] else 0

        monkeypatch.setattr(Combiner, "share", gathered)
        monkeypatch.setattr(chunkread.ChunkReader, "cost", cost)
        assert await many(io, world) == expected()
        assert asked.count(asked[0]) == 1
        assert len(set(asked)) == 2  # one of the others gathers the rest

    run(test)


def test_large_reads_do_not_wait_for_others():
    async def test(world):
        put(world, 0, pattern(2 * CHUNK))
        io = chunkio_of(world)
        size = chunkread.SHARED_BYTES_MAX + 1
        found = await asyncio.gather(*(read(io, world, n, size) for n in range(6)))
        assert found == [pattern(2 * CHUNK)[n : n + size] for n in range(6)]
        assert calls_of(world) == 6

    run(test)


@pytest.mark.parametrize("code", [Code.DISK, Code.CHECKSUM])
def test_what_fails_for_one_is_read_elsewhere_and_the_others_do_not_notice(code):
    async def test(world):
        put(world, 0, pattern(READERS * 1000 + SIZE))
        io = chunkio_of(world)
        for node in world.storage[1:]:
            node.read_codes.append(code)
        assert await many(io, world) == expected()

    run(test)


def test_a_server_that_dies_under_a_shared_call_costs_another_replica():
    async def test(world):
        put(world, 0, pattern(READERS * 1000 + SIZE))
        io = chunkio_of(world)
        for node in world.storage:
            node.delay_s = 0.1
        reading = asyncio.ensure_future(many(io, world))
        await asyncio.sleep(0.05)
        await world.storage[0].stop()
        began = time.perf_counter()
        assert await reading == expected()
        assert time.perf_counter() - began < 1

    run(test)


def test_a_server_that_never_answers_a_shared_call_is_left(monkeypatch):
    monkeypatch.setattr(chunkread, "ATTEMPT_NS", 200 * MS)

    async def test(world):
        put(world, 0, pattern(READERS * 1000 + SIZE))
        io = chunkio_of(world)
        world.storage[0].hang = True
        assert await many(io, world) == expected()

    run(test)


def test_a_cancelled_reader_leaves_when_its_memory_is_at_rest():
    """The others of the call get their bytes all the same."""

    async def test(world):
        put(world, 0, pattern(READERS * 1000 + SIZE))
        io = chunkio_of(world)
        for node in world.storage:
            node.delay_s = 0.3
        readers = [asyncio.ensure_future(read(io, world, n * 1000, SIZE)) for n in range(READERS)]
        await asyncio.sleep(0.05)
        began = time.perf_counter()
        readers[5].cancel()
        readers[5].cancel()
        with pytest.raises(asyncio.CancelledError):
            await readers[5]
        assert time.perf_counter() - began > 0.15  # the call could still write till then
        wanted = expected()
        for n, reader in enumerate(readers):
            if n != 5:
                assert await reader == wanted[n]
        assert calls_of(world) <= 1 + len(world.storage)

    run(test)


def test_memory_that_must_not_be_named_again_fails_only_its_reader(tmp_path):
    async def test(world):
        put(world, 0, pattern(READERS * 1000 + SIZE))
        io = chunkio_of(world)
        bad = Region(SIZE)
        bad.abandoned = True
        reading = asyncio.ensure_future(many(io, world))
        with pytest.raises(EmberfsError) as caught:
            await io.read(INODE, world.layout, 0, bad.slice(0, SIZE))
        assert caught.value.code == Code.INVALID
        assert await reading == expected()
        bad.close()

    run(test, endpoint=lambda node: f"shm://{tmp_path}/{node.id}")


def test_a_call_that_is_full_leaves_at_once_and_nobody_is_forgotten():
    async def test(world):
        put(world, 0, pattern(CHUNK))
        io = chunkio_of(world)
        count = 300
        found = await asyncio.gather(*(read(io, world, n * 7, 64) for n in range(count)))
        assert found == [pattern(CHUNK)[n * 7 : n * 7 + 64] for n in range(count)]
        assert calls_of(world) < count / 10

    run(test)
