"""Metadata calls: one request id per logical call, servers that restart, the deadline."""

import asyncio
import time

import pytest

from emberfs.client.metadata import Metadata
from emberfs.proto import meta_calls as mc
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS
from emberfs.proto.meta_calls import Caller
from unit.client_fakes import META_NODE, FakeMeta, run

ME = Caller(0, 0)


def metadata_of(world, **more):
    return Metadata(world.env, world.routing, world.peers, 7, **more)


def test_c9_lost_reply_is_retried_with_the_same_request_id():
    """A metadata call whose reply was lost is retried with the same request id."""

    async def test(world):
        meta = metadata_of(world)
        world.meta.lose_replies = 1
        made = await meta.mknod(ME, 1, b"d", 0o040755)
        assert made.is_directory()
        assert world.meta.calls.count(mc.MKNOD.number) == 2  # the second did not say EXISTS
        assert len(world.meta.requests) == 1

    run(test)


def test_every_mutating_call_has_its_own_request_id():
    async def test(world):
        meta = metadata_of(world)
        inode = (await meta.create(ME, 1, b"a", 0o644, session=5, write=True)).inode
        await meta.setattr(ME, inode.id, mode=0o600)
        await meta.settle(inode.id, 5, close=True)
        await meta.rename(ME, 1, b"a", 1, b"b")
        await meta.setxattr(ME, inode.id, b"user.x", b"1")
        await meta.link(ME, inode.id, 1, b"c")
        await meta.symlink(ME, 1, b"s", b"b")
        await meta.remove(ME, 1, b"b", directory=False)
        assert len(world.meta.requests) == 8
        assert [key.sequence for key in world.meta.requests] == list(range(1, 9))
        assert {key.client for key in world.meta.requests} == {7}
        assert (await meta.lookup(ME, 1, b"c")).id == inode.id
        assert await meta.resolve_parent(ME, b"/c") == (await meta.getattr(1), b"c")
        assert await meta.getxattr(ME, inode.id, b"user.x") == b"1"
        assert (await meta.statfs()).total_bytes == 1 << 40
        await meta.stable()

    run(test)


def test_errors_for_the_application_come_at_once():
    async def test(world):
        began = time.perf_counter()
        with pytest.raises(EmberfsError) as caught:
            await metadata_of(world).lookup(ME, 1, b"none")
        assert caught.value.code == Code.NOT_FOUND
        assert time.perf_counter() - began < 0.3
        assert len(world.meta.calls) == 1

    run(test)


def test_restart_of_the_only_server_is_waited_out():
    async def test(world):
        meta = metadata_of(world)
        await meta.getattr(1)
        address = world.meta.endpoint
        await world.meta.stop()
        waiting = asyncio.ensure_future(meta.getattr(1))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await world.meta.start(address)
        assert (await waiting).id == 1
        # Restarted elsewhere: routing tells.
        await world.meta.stop()
        waiting = asyncio.ensure_future(meta.getattr(1))
        await asyncio.sleep(0.1)
        await world.meta.start()
        world.republish()
        assert (await waiting).id == 1

    run(test)


@pytest.mark.parametrize("code", [Code.CONFLICT, Code.BUSY, Code.SHUTTING_DOWN, Code.OVERLOADED])
def test_passing_troubles_are_hidden(code):
    async def test(world):
        world.meta.refuse.extend([code] * 3)
        assert (await metadata_of(world).getattr(1)).id == 1

    run(test)


def test_deadline_names_call_and_cause():
    async def test(world):
        await world.meta.stop()
        meta = metadata_of(world, deadline_ns=400 * MS)
        began = time.perf_counter()
        with pytest.raises(EmberfsError) as caught:
            await meta.getattr(1)
        assert time.perf_counter() - began < 1.5
        assert caught.value.code == Code.TIMEOUT
        assert "getattr" in caught.value.message
        assert "UNREACHABLE" in caught.value.message

    run(test)


def test_o15_server_that_never_answers_is_left_for_another():
    """A metadata server that accepts and never answers is left for another."""

    async def test(world):
        other = FakeMeta(world.env, world, META_NODE + 1)
        await other.start()
        try:
            nodes = dict(world.routing.snapshot.nodes)
            world.routing.publish({**nodes, other.id: other.record()})
            meta = metadata_of(world, attempt_ns=200 * MS)
            first = (await meta.getattr(1)) and (world.meta if world.meta.calls else other)
            first.hang = True
            began = time.perf_counter()
            assert (await meta.getattr(1)).id == 1
            assert time.perf_counter() - began < 1
            began = time.perf_counter()
            await meta.getattr(1)  # stays with the one that answers
            assert time.perf_counter() - began < 0.15
        finally:
            await other.stop()

    run(test)


def test_dead_in_routing_ends_a_pending_call():
    async def test(world):
        meta = metadata_of(world)
        world.meta.hang = True
        waiting = asyncio.ensure_future(meta.getattr(1))
        await asyncio.sleep(0.1)
        world.meta.hang = False
        world.republish(lost=(META_NODE,))
        world.republish()
        began = time.perf_counter()
        assert (await waiting).id == 1
        assert time.perf_counter() - began < 1

    run(test)


def test_c9_a_retry_at_another_server_says_that_there_may_be_a_copy():
    """Whoever performs it remembers the outcome for all; a retry at the same server needs not."""

    async def test(world):
        other = FakeMeta(world.env, world, META_NODE + 1)
        await other.start()
        try:
            nodes = dict(world.routing.snapshot.nodes)
            world.routing.publish({**nodes, other.id: other.record()})
            meta = metadata_of(world, attempt_ns=200 * MS)
            await meta.getattr(1)
            home, second = (world.meta, other) if world.meta.calls else (other, world.meta)
            home.refuse.append(Code.OVERLOADED)
            await meta.mknod(ME, 1, b"a", 0o040755)
            assert [key.elsewhere for key in home.requests] == [False]
            home.hang = True
            await meta.mknod(ME, 1, b"b", 0o040755)
            assert [(key.sequence, key.elsewhere) for key in second.requests] == [(2, True)]
            await meta.mknod(ME, 1, b"c", 0o040755)  # the first one is left alone now
            assert [key.elsewhere for key in second.requests] == [True, False]
        finally:
            home.hang = False
            await other.stop()

    run(test)
