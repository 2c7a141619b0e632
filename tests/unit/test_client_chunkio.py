"""Chunk I/O over the real fabric against storage nodes that fail in every way."""

import asyncio
import contextlib
import time

import pytest

from emberfs.client import chunkread, chunkwrite
from emberfs.client.chunkio import ChunkIO
from emberfs.fabric.region import Region
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, pack_chunk_id
from emberfs.proto.storage_calls import READ_BATCH
from unit.client_fakes import CHUNK, run

INODE = 42


def pattern(length, salt=0):
    return bytes((i * 7 + i // 251 + salt) & 0xFF for i in range(length))


def chunkio_of(world):
    return ChunkIO(world.env, world.routing, world.peers, 7)


def put(world, offset, data):
    """Place bytes directly into the fake chunks."""
    for at, byte in enumerate(data):
        index, within = divmod(offset + at, CHUNK)
        chunk = world.chunks.setdefault(pack_chunk_id(INODE, index), bytearray())
        if len(chunk) <= within:
            chunk.extend(bytes(within + 1 - len(chunk)))
        chunk[within] = byte


async def read(io, world, offset, length, **more):
    sink = bytearray(b"\xee" * length)  # old bytes that must not shine through
    await io.read(INODE, world.layout, offset, memoryview(sink), **more)
    return bytes(sink)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_write_then_read_across_chunks(transport, tmp_path):
    async def test(world):
        io = chunkio_of(world)
        data = pattern(5 * CHUNK + 123)
        await io.write(INODE, world.layout, 1000, memoryview(data))
        assert await read(io, world, 1000, len(data)) == data
        assert await read(io, world, 0, 1000) == bytes(1000)
        region = Region(len(data))
        await io.read(INODE, world.layout, 1000, region.slice(0, len(data)))
        assert bytes(region.view[: len(data)]) == data
        await io.write(INODE, world.layout, 0, region.slice(10, 500))
        assert await read(io, world, 0, 500) == data[10:510]
        region.close()

    endpoint = (lambda node: f"shm://{tmp_path}/{node.id}") if transport == "shm" else None
    run(test, endpoint=endpoint)


def test_holes_short_and_missing_chunks_read_as_zeros():
    async def test(world):
        put(world, 0, b"abc")
        put(world, 2 * CHUNK, b"x" * 10)
        io = chunkio_of(world)
        found = await read(io, world, 0, 4 * CHUNK)
        assert found == world.content(INODE, 4 * CHUNK)
        assert found[:4] == b"abc\0"

    run(test)


def test_read_many_is_one_call_per_node_and_fills_every_sink():
    async def test(world):
        io = chunkio_of(world)
        data = pattern(8 * CHUNK)
        await io.write(INODE, world.layout, 0, memoryview(data))
        sinks = [bytearray(512) for _ in range(100)]
        wanted = [(i * 4099) % (8 * CHUNK - 512) for i in range(100)]
        await io.read_many(
            [(INODE, world.layout, at, memoryview(s)) for at, s in zip(wanted, sinks, strict=True)]
        )
        for at, sink in zip(wanted, sinks, strict=True):
            assert sink == data[at : at + 512]
        calls = sum(node.calls.count(READ_BATCH) for node in world.storage)
        assert calls <= len(world.storage)

    run(test)


def test_a_batch_is_cut_by_operations_and_bytes(monkeypatch):
    monkeypatch.setattr(chunkread, "OPS_MAX", 4)

    async def test(world):
        io = chunkio_of(world)
        await read(io, world, 0, 10 * CHUNK)
        assert world.storage[0].calls.count(READ_BATCH) == 3

    run(test, nodes=1)


def test_replicas_share_the_reads():
    async def test(world):
        io = chunkio_of(world)
        for index in range(30):
            await read(io, world, index * CHUNK, 100)
        assert all(node.calls.count(READ_BATCH) >= 3 for node in world.storage)

    run(test)


@pytest.mark.parametrize("code", [Code.DISK, Code.CHECKSUM])
def test_an_operation_that_fails_at_one_replica_is_read_from_another_at_once(code):
    async def test(world):
        put(world, 0, pattern(1000))
        for node in world.storage[:2]:
            node.read_codes.extend([code] * 3)
        io = chunkio_of(world)
        began = time.perf_counter()
        for _ in range(3):
            assert await read(io, world, 0, 1000) == pattern(1000)
        assert time.perf_counter() - began < 0.5

    run(test, chains=1)


def test_o14_what_is_damaged_on_every_replica_is_an_error_at_once():
    """What every replica refutes is an error, never content.

    No replica can mend it and waiting cannot help: EIO with the chunk's name, not a timeout.
    """

    async def test(world):
        put(world, 0, pattern(1000))
        for node in world.storage:
            node.read_codes.extend([Code.CHECKSUM] * 100)
        io = chunkio_of(world)
        began = time.perf_counter()
        with pytest.raises(EmberfsError) as caught:
            await read(io, world, 0, 1000)
        assert time.perf_counter() - began < 2
        assert caught.value.code == Code.CHECKSUM
        assert pack_chunk_id(INODE, 0).hex() in caught.value.message

    run(test, chains=1)


def test_chain_version_is_refreshed_from_routing():
    async def test(world):
        put(world, 0, pattern(100))
        io = chunkio_of(world)
        old = world.routing.snapshot
        world.republish()
        new, world.routing.snapshot = world.routing.snapshot, old
        for node in world.storage:  # they know the new chain, the client does not yet
            node._chain = lambda target, version=None: (
                None
                if version in (None, 2)
                else (_ for _ in ()).throw(EmberfsError(Code.CHAIN_VERSION, "old"))
            )
        reading = asyncio.ensure_future(read(io, world, 0, 100))
        await asyncio.sleep(0.05)
        assert not reading.done()
        world.routing.publish(new.nodes, new.chains)
        assert await reading == pattern(100)

    run(test)


def test_r9_killed_server_costs_reads_nothing_but_another_replica():
    """A killed replica costs a read nothing but another replica."""

    async def test(world):
        put(world, 0, pattern(4 * CHUNK))
        io = chunkio_of(world)
        assert await read(io, world, 0, 4 * CHUNK) == pattern(4 * CHUNK)
        await world.storage[1].stop()  # routing still says that it serves
        began = time.perf_counter()
        assert await read(io, world, 0, 4 * CHUNK) == pattern(4 * CHUNK)
        assert time.perf_counter() - began < 0.5

    run(test)


def test_r9_server_dies_under_a_read_in_flight():
    """A replica that dies under a read in flight: the read ends well at another."""

    async def test(world):
        put(world, 0, pattern(4 * CHUNK))
        io = chunkio_of(world)
        for node in world.storage:
            node.delay_s = 0.1
        reading = asyncio.ensure_future(read(io, world, 0, 4 * CHUNK))
        await asyncio.sleep(0.05)
        await world.storage[0].stop()
        began = time.perf_counter()
        assert await reading == pattern(4 * CHUNK)
        assert time.perf_counter() - began < 1

    run(test)


def test_o15_server_that_accepts_but_never_answers_is_left_and_then_avoided(monkeypatch):
    """A server that accepts and never answers is left, and avoided by the next reads."""
    monkeypatch.setattr(chunkread, "ATTEMPT_NS", 200 * MS)

    async def test(world):
        put(world, 0, pattern(4 * CHUNK))
        io = chunkio_of(world)
        world.storage[0].hang = True
        assert await read(io, world, 0, 4 * CHUNK) == pattern(4 * CHUNK)
        asked = len(world.storage[0].calls)
        assert asked
        assert await read(io, world, 0, 4 * CHUNK) == pattern(4 * CHUNK)
        assert len(world.storage[0].calls) == asked

    run(test)


def test_o15_pending_read_ends_when_routing_declares_its_node_dead():
    """A read at a silent server ends as soon as routing declares it dead."""

    async def test(world):
        put(world, 0, pattern(100))
        io = chunkio_of(world)
        for node in world.storage:
            node.hang = True
        reading = asyncio.ensure_future(read(io, world, 0, 100))
        await asyncio.sleep(0.1)
        busy = next(n for n in world.storage if n.calls)
        for node in world.storage:
            node.hang = False
        began = time.perf_counter()
        world.republish(lost=(busy.id,))
        assert await reading == pattern(100)
        assert time.perf_counter() - began < 0.4  # far below the attempt's second

    run(test)


def test_a_write_waits_for_its_turn_no_longer_than_for_an_answer():
    async def test(world):
        io, layout = chunkio_of(world), world.layout
        for node in world.storage:
            node.hang = True
        first = asyncio.ensure_future(io.write(INODE, layout, 0, memoryview(b"first")))
        await asyncio.sleep(0.05)
        with pytest.raises(EmberfsError) as caught:
            async with asyncio.timeout(5):
                await io.write(INODE, layout, 0, memoryview(b"second"), timeout_ns=100 * MS)
        assert caught.value.code == Code.TIMEOUT
        assert "was not sent" in caught.value.message
        first.cancel()
        await asyncio.wait([first])
        for node in world.storage:
            node.hang = False
        await io.write(INODE, layout, 0, memoryview(b"third"))
        assert bytes(world.chunks[pack_chunk_id(INODE, 0)]) == b"third"

    run(test)


def test_deadline_names_what_went_wrong():
    async def test(world):
        io = chunkio_of(world)
        for node in world.storage:
            node.read_codes.extend([Code.DISK] * 1000)
        began = time.perf_counter()
        with pytest.raises(EmberfsError) as caught:
            await read(io, world, 0, 100, timeout_ns=300 * MS)
        assert time.perf_counter() - began < 1
        assert caught.value.code == Code.TIMEOUT
        assert "DISK" in caught.value.message
        assert "0.3 s" in caught.value.message

    run(test)


def test_chain_without_serving_replica_waits_for_routing():
    async def test(world):
        put(world, 0, pattern(100))
        io = chunkio_of(world)
        world.republish(lost=(1, 2, 3))
        reading = asyncio.ensure_future(read(io, world, 0, 100))
        writing = asyncio.ensure_future(io.write(INODE, world.layout, CHUNK, memoryview(b"late")))
        await asyncio.sleep(0.1)
        assert not reading.done()
        assert not writing.done()
        chains = world.routing.snapshot.chains
        await world.storage[0].stop()
        await world.storage[0].start()
        again = type(chains[1])(1, 9, (chains[1].targets[0],))
        from emberfs.proto.cluster import ChainTarget, PublicState

        serving = {
            c: type(again)(c, 9, (ChainTarget(100 + c, 1, PublicState.SERVING),)) for c in chains
        }
        world.routing.publish({1: world.storage[0].record()}, serving)
        assert await reading == pattern(100)
        await writing
        assert await read(io, world, CHUNK, 4) == b"late"

    run(test)


def test_c10_lost_reply_is_retried_with_the_same_tag_and_applied_once():
    """A write whose reply was lost is retried with the same tag and applied once."""

    async def test(world):
        io = chunkio_of(world)
        head = world.head()
        head.lose_replies = 1
        await io.write(INODE, world.layout, 0, memoryview(b"once"))
        assert len(head.tags) == 2
        assert head.tags[0] == head.tags[1]
        assert world.applied == 1
        await io.write(INODE, world.layout, 0, memoryview(b"then"))
        assert head.tags[2].sequence > head.tags[1].sequence

    run(test)


@pytest.mark.parametrize("code", [Code.CHAIN_VERSION, Code.BUSY, Code.NOT_HEAD, Code.OVERLOADED])
def test_refused_update_is_tried_again_with_the_same_tag(code):
    async def test(world):
        io = chunkio_of(world)
        world.head().refuse.append(code)
        await io.write(INODE, world.layout, 0, memoryview(b"data"))
        assert await read(io, world, 0, 4) == b"data"

    run(test, chains=1)


@pytest.mark.parametrize(
    ("code", "seen"), [(Code.NO_SPACE, Code.NO_SPACE), (Code.SUPERSEDED, Code.INTERNAL)]
)
def test_final_errors_of_updates_are_raised(code, seen):
    async def test(world):
        io = chunkio_of(world)
        world.head().refuse.append(code)
        with pytest.raises(EmberfsError) as caught:
            await io.write(INODE, world.layout, 0, memoryview(b"data"))
        assert caught.value.code == seen

    run(test)


def test_r9_lost_head_writes_go_to_the_new_head():
    """When the head is lost, writes go to the new one."""

    async def test(world):
        io = chunkio_of(world)
        old = world.head()
        old.hang = True  # stopped, not dead: the connection stays
        writing = asyncio.ensure_future(
            io.write(INODE, world.layout, 0, memoryview(pattern(3 * CHUNK)))
        )
        await asyncio.sleep(0.1)
        assert not writing.done()
        began = time.perf_counter()
        world.republish(lost=(old.id,))
        await writing
        assert time.perf_counter() - began < 0.5
        assert world.content(INODE, 3 * CHUNK) == pattern(3 * CHUNK)

    run(test)


def test_c5_updates_of_one_chunk_keep_their_order_and_chunks_run_in_parallel():
    """Writes of one chunk keep their order; those of different chunks run side by side."""

    async def test(world):
        io = chunkio_of(world)
        world.update_delay_s = lambda: 0.02  # the fake asserts: never two of a chunk at once
        began = time.perf_counter()
        await asyncio.gather(
            *(
                io.write(INODE, world.layout, index * CHUNK, memoryview(bytes([turn]) * 100))
                for turn in range(5)
                for index in range(8)
            )
        )
        took = time.perf_counter() - began
        assert took < 0.5  # 40 updates of 20 ms, five in a row
        for index in range(8):
            assert world.content(INODE, 8 * CHUNK)[index * CHUNK] == 4

    run(test)


def test_c10_late_duplicate_of_an_update_that_was_given_up_is_void():
    """An update that its client gave up, arriving late, never overwrites what came after.

    The next update of the chunk uses the same channel with a higher sequence.
    """

    async def test(world):
        io = chunkio_of(world)
        head = world.head()
        head.hang = True
        with pytest.raises(EmberfsError) as caught:
            await io.write(INODE, world.layout, 0, memoryview(b"old"), timeout_ns=200 * MS)
        assert caught.value.code == Code.TIMEOUT
        cancelled = asyncio.ensure_future(
            io.write(INODE, world.layout, 2 * CHUNK, memoryview(b"old"))
        )
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await cancelled
        head.hang = False
        head.tags.clear()
        await io.write(INODE, world.layout, 4 * CHUNK, memoryview(b"other"))
        await io.write(INODE, world.layout, 0, memoryview(b"new"))
        await io.write(INODE, world.layout, 2 * CHUNK, memoryview(b"new"))
        other, first, second = (tag.channel for tag in head.tags)
        assert len({other, first, second}) == 3

    run(test)


def test_channels_are_kept_for_the_chunk_only():
    channels = chunkwrite.Channels()
    chunk, other = pack_chunk_id(1, 0), pack_chunk_id(1, 1)
    first, one = channels.take(chunk)
    channels.keep(chunk, first)
    second, two = channels.take(other)
    assert second != first
    channels.give(second)
    again, three = channels.take(chunk)
    assert again == first
    assert one < two < three
    channels.give(again)
    assert channels.take(other)[0] in (first, second)


def test_remove_chunks_from_an_index_on(monkeypatch):
    monkeypatch.setattr("emberfs.client.chunkio.LIST_ROWS", 3)

    async def test(world):
        io = chunkio_of(world)
        await io.write(INODE, world.layout, 0, memoryview(pattern(20 * CHUNK)))
        await io.write(INODE + 1, world.layout, 0, memoryview(b"neighbour"))
        await io.remove_chunks(INODE, world.layout, 5)
        left = {chunk for chunk in world.chunks if chunk.startswith(pack_chunk_id(INODE, 0)[:8])}
        assert left == {pack_chunk_id(INODE, index) for index in range(5)}
        await io.remove_chunks(INODE, world.layout, 0)
        assert set(world.chunks) == {pack_chunk_id(INODE + 1, 0)}

    run(test)


def test_truncate_chunk_never_creates_or_grows():
    async def test(world):
        io = chunkio_of(world)
        await io.truncate_chunk(INODE, world.layout, 0, 10)
        assert not world.chunks
        await io.write(INODE, world.layout, 0, memoryview(b"12345"))
        await io.truncate_chunk(INODE, world.layout, 0, 10)
        assert bytes(world.chunks[pack_chunk_id(INODE, 0)]) == b"12345"
        await io.truncate_chunk(INODE, world.layout, 0, 2)
        assert bytes(world.chunks[pack_chunk_id(INODE, 0)]) == b"12"

    run(test)


def test_flush_asks_every_node_once_and_repeats_when_the_chain_changed():
    async def test(world):
        io = chunkio_of(world)
        await io.flush([1, 2, 1])
        assert all(len(node.flushed) == 1 for node in world.storage)
        assert sorted(world.storage[0].flushed[0]) == [101, 102]
        world.storage[2].hang = True
        flushing = asyncio.ensure_future(io.flush([1]))
        await asyncio.sleep(0.05)
        assert not flushing.done()
        world.republish(lost=(3,))
        await flushing
        assert len(world.storage[0].flushed) == 3

    run(test)


def test_a_flush_of_many_targets_comes_in_calls_of_bounded_size(monkeypatch):
    monkeypatch.setattr(chunkwrite, "FLUSH_TARGETS_MAX", 1)

    async def test(world):
        await chunkio_of(world).flush([1, 2])
        assert sorted(world.storage[0].flushed) == [(101,), (102,)]

    run(test)


def test_failed_flush_is_tried_again():
    async def test(world):
        io = chunkio_of(world)
        world.storage[1].refuse.append(Code.BUSY)
        await io.flush([1], timeout_ns=5 * SECOND)
        assert world.storage[1].flushed

    run(test)
