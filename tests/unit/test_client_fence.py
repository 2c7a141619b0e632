"""A client that was taken for dead does not write what nobody would remove."""

import asyncio
import contextlib

import msgspec
import pytest

from emberfs.proto.cluster import NodeKind
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.meta_calls import Caller
from unit.client_fakes import run

ME = Caller(0, 0)


async def make(files):
    _, file = await files.create(ME, 1, b"f", 0o644)
    return file


class Member:
    """A membership that a test moves."""

    def __init__(self):
        self.lapses = 0
        self.alive = True

    def is_member(self):
        return self.alive


def lose(world, inode):
    """What meta does when the sessions of a client end and its file has no name."""
    world.meta.sessions.clear()
    del world.meta.inodes[inode]


@pytest.mark.parametrize("direct", [True, False])
def test_o2_o20_a_client_that_wakes_does_not_write_to_a_file_that_is_gone(direct):
    """After a lapse of the lease the file is opened anew before a chunk is written."""

    async def test(world):
        member = Member()
        file = await make(world.client(membership=member))
        lose(world, file.inode_id)
        member.lapses += 1

        async def write_and_close():
            await file.write(0, b"x" * 100, direct=direct)
            await file.close()

        with pytest.raises(EmberfsError) as caught:
            await write_and_close()
        assert caught.value.code in (Code.STALE, Code.NOT_FOUND)
        assert not world.chunks

    run(test)


def test_a_small_file_that_is_closed_and_gets_chunks_is_not_written_when_it_is_gone():
    """Its session is being ended, but its bytes are still to be written first."""

    async def test(world):
        world.meta.inline_bytes_max = 2000
        member = Member()
        file = await make(world.client(membership=member))
        await file.write(0, b"x" * 100)
        _, other = await world.client(8).open(ME, file.inode_id, write=True)
        await other.write(2000, b"y")
        await other.close()
        before = {chunk: bytes(data) for chunk, data in world.chunks.items()}
        promote = file._services.metadata.promote

        async def and_lapse(inode):
            found = await promote(inode)
            lose(world, inode)
            member.lapses += 1
            return found

        file._services.metadata.promote = and_lapse
        with pytest.raises(EmberfsError):
            await file.close()
        assert world.chunks == before

    run(test)


def test_o2_writes_wait_while_the_lease_has_run_out_and_sessions_come_back():
    """A client that is cut off writes when it is a member again, under sessions that are valid."""

    async def test(world):
        member = Member()
        file = await make(world.client(membership=member))
        member.alive = False
        writing = asyncio.ensure_future(file.write(0, b"x" * 100, direct=True))
        await asyncio.sleep(0.1)
        assert not writing.done()
        assert not world.chunks
        world.meta.sessions.clear()  # it was thought dead
        member.alive, member.lapses = True, 1
        await writing
        assert world.meta.sessions[file.inode_id, file.session] == 1
        assert world.chunks
        await file.close()
        assert not +world.meta.sessions

    run(test)


def test_o2_a_reader_that_wakes_is_told_that_its_file_is_gone():
    """Never zeros: the chunks of the file may have been collected meanwhile."""

    async def test(world):
        member = Member()
        client = world.client(membership=member)
        file = await make(client)
        await file.write(0, b"x" * 100)
        await file.close()
        _, reader = await client.open(ME, file.inode_id)
        lose(world, file.inode_id)
        member.lapses += 1
        with pytest.raises(EmberfsError) as caught:
            await reader.read(0, 100)
        assert caught.value.code == Code.STALE

    run(test)


def test_r12_o11_sessions_are_renewed_when_meta_has_a_new_life():
    """A power cut may have taken them: without, an unlink elsewhere would free the open file."""

    async def test(world):
        client = world.client(routing=world.routing)
        file = await make(client)
        world.meta.sessions.clear()
        nodes = dict(world.routing.snapshot.nodes)
        number = next(n for n, node in nodes.items() if node.kind == NodeKind.META)
        nodes[number] = msgspec.structs.replace(nodes[number], incarnation=99)
        world.routing.publish(nodes)
        await asyncio.sleep(0.1)
        assert world.meta.sessions[file.inode_id, file.session] == 1
        await file.close()
        world.routing.publish()
        await asyncio.sleep(0.05)
        assert not +world.meta.sessions

    run(test)


def test_sessions_are_left_alone_when_another_metadata_server_has_lived_on():
    """What they share loses no commit; a restart of one is no reason to open everything anew."""

    async def test(world):
        nodes = dict(world.routing.snapshot.nodes)
        number = next(n for n, node in nodes.items() if node.kind == NodeKind.META)
        second = msgspec.structs.replace(nodes[number], id=number + 50, incarnation=7)
        nodes[second.id] = second
        world.routing.publish(nodes)
        client = world.client(routing=world.routing)
        file = await make(client)
        world.meta.sessions.clear()
        nodes[number] = msgspec.structs.replace(nodes[number], incarnation=99)
        world.routing.publish(nodes)
        await asyncio.sleep(0.1)
        assert not +world.meta.sessions
        dead = {n: msgspec.structs.replace(node, alive=n != second.id) for n, node in nodes.items()}
        world.routing.publish(dead)
        dead[number] = msgspec.structs.replace(dead[number], incarnation=100)
        world.routing.publish(dead)
        await asyncio.sleep(0.1)
        assert world.meta.sessions[file.inode_id, file.session] == 1
        await file.close()

    run(test)


@pytest.mark.parametrize("answered", [True, False])
def test_a_session_that_is_renewed_while_its_file_closes_does_not_stay(answered):
    async def test(world):
        client = world.client(routing=world.routing)
        file = await make(client)
        metadata = file._services.metadata
        opened, settled = metadata.open, metadata.settle

        async def late_open(*args, **more):
            await file.close()
            answer = await opened(*args, **more)
            if not answered:
                raise EmberfsError(Code.TIMEOUT, "no answer")
            return answer

        metadata.open = late_open
        with contextlib.suppress(EmberfsError):
            await client._reopen(file.inode_id)
        await asyncio.sleep(0.1)
        assert not +world.meta.sessions
        assert metadata.settle == settled

    run(test)


def test_a_session_that_is_renewed_while_its_file_closes_does_not_end_before_the_length_is_told():
    """Meta would take the bytes for nobody's, or the file for one that nobody has open."""

    async def test(world):
        client = world.client(routing=world.routing)
        file = await make(client)
        await file.write(0, b"x" * 100, direct=True)
        metadata, telling, told = file._services.metadata, asyncio.Event(), asyncio.Event()
        opened, settled = metadata.open, metadata.settle

        async def slow_settle(*args, **more):
            if more.get("length") is not None:
                telling.set()
                await told.wait()
            return await settled(*args, **more)

        async def open_amid_close(*args, **more):
            answer = await opened(*args, **more)
            world.closing = asyncio.ensure_future(file.close())
            await telling.wait()
            return answer

        metadata.settle, metadata.open = slow_settle, open_amid_close
        await client._reopen(file.inode_id)
        await asyncio.sleep(0.1)
        assert not world.meta.settled
        told.set()
        await world.closing
        await asyncio.sleep(0.1)
        assert world.meta.settled[0].length == 100
        assert [request.close for request in world.meta.settled] == [True, True]
        assert not +world.meta.sessions

    run(test)


def test_o2_a_read_during_which_the_file_went_is_no_zeros():
    """What a read found is given out only if the file is still there when it ends."""

    async def test(world):
        member = Member()
        client = world.client(membership=member)
        file = await make(client)
        await file.write(0, b"x" * 100)
        await file.close()
        _, reader = await client.open(ME, file.inode_id)
        chunkio, fetch = reader._services.chunkio, reader._services.chunkio.read

        async def slow(*args, **more):
            await fetch(*args, **more)
            lose(world, file.inode_id)
            member.lapses += 1

        chunkio.read = slow
        with pytest.raises(EmberfsError) as caught:
            await reader.read(0, 100)
        assert caught.value.code == Code.STALE

    run(test)
