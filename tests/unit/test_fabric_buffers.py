"""The buffer pool: bounded, fair, and nothing is handed out twice."""

import asyncio
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberfs.fabric.buffers import IDLE_BYTES_MAX, SLAB_BYTES, BufferPool
from emberfs.fabric.region import Region, Slice
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, KiB, MiB


def overlaps(a: Slice, b: Slice) -> bool:
    return (
        a.region is b.region and a.offset < b.offset + b.length and b.offset < a.offset + a.length
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 700 * KiB)), max_size=60))
def test_o13_buffers_never_overlap_and_the_bound_holds(steps: list[tuple[bool, int]]) -> None:
    """No byte of a pool is ever lent to two users."""
    pool = BufferPool(4 * MiB)
    held: list[Slice] = []
    for take, number in steps:
        if take:
            try:
                buffer = pool.take(number)
            except EmberfsError as problem:
                if problem.code is not Code.OVERLOADED:
                    raise
                continue
            assert buffer.length == number == len(buffer.view)
            assert not any(overlaps(buffer, other) for other in held)
            held.append(buffer)
        elif held:
            pool.give(held.pop(number % len(held)))
        assert pool.taken_bytes <= pool.slab_bytes <= pool.limit_bytes
        assert pool.taken_bytes >= sum(buffer.length for buffer in held)
    for buffer in held:
        pool.give(buffer)
    assert pool.taken_bytes == 0
    # All of it can be had again, as one buffer, whatever classes it was cut into.
    pool.give(pool.take(4 * MiB))
    pool.close()


def test_o9_idle_memory_goes_back_to_the_kernel() -> None:
    """Memory that was needed for a moment goes back to the kernel."""
    pool = BufferPool(256 * MiB)
    held = [pool.take(1 * MiB) for _ in range(128)]
    assert pool.slab_bytes >= 128 * MiB
    for buffer in held:
        pool.give(buffer)
    assert 0 < pool.slab_bytes <= IDLE_BYTES_MAX
    pool.give(pool.take(1 * MiB))
    pool.close()


def test_a_steady_load_keeps_its_memory() -> None:
    pool = BufferPool(256 * MiB)
    seen = set()
    for _ in range(50):
        held = [pool.take(1 * MiB) for _ in range(8)]
        seen.update(buffer.region.id for buffer in held)
        for buffer in held:
            pool.give(buffer)
    assert len(seen) == 2  # 8 MiB in slabs of 4
    pool.close()


def test_what_never_fits_is_too_large() -> None:
    pool = BufferPool(1 * MiB)
    with pytest.raises(EmberfsError) as caught:
        pool.take(1 * MiB + 1)
    assert caught.value.code is Code.TOO_LARGE
    pool.close()


def test_o13_a_buffer_given_twice_is_noticed() -> None:
    """A buffer that is given back twice is an error, not a second lending."""
    pool = BufferPool(1 * MiB)
    buffer = pool.take(100)
    pool.give(buffer)
    with pytest.raises(KeyError):
        pool.give(buffer)
    pool.close()


def test_waiters_are_served_in_order_and_may_leave() -> None:
    async def live() -> None:
        pool = BufferPool(1 * MiB)
        whole = pool.take(1 * MiB)
        order: list[str] = []

        async def wait(name: str, length: int) -> None:
            buffer = await pool.take_wait(length)
            order.append(name)
            await asyncio.sleep(0.005)
            pool.give(buffer)

        tasks = [asyncio.ensure_future(wait("large", MiB))]
        await asyncio.sleep(0)
        leaving = asyncio.ensure_future(wait("leaving", 10))
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(wait("small", 10)))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        with pytest.raises(EmberfsError):  # nobody jumps the queue
            pool.take(10)
        pool.give(whole)
        await asyncio.wait_for(asyncio.gather(*tasks), 2)
        assert order == ["large", "small"]
        assert pool.taken_bytes == 0
        pool.close()

    asyncio.run(live())


def test_one_that_leaves_with_a_buffer_gives_it_back() -> None:
    async def live() -> None:
        pool = BufferPool(1 * MiB)
        whole = pool.take(1 * MiB)
        task = asyncio.ensure_future(pool.take_wait(1 * MiB))
        await asyncio.sleep(0)
        pool.give(whole)  # the task owns it now, but has not run
        task.cancel()
        await asyncio.wait([task])
        assert pool.taken_bytes == 0
        pool.close()

    asyncio.run(live())


def test_o13_abandoned_memory_is_not_used_again() -> None:
    """Memory that a server may still write to is never lent again."""
    pool = BufferPool(1 * MiB)
    first, second = pool.take(100), pool.take(100)
    assert first.region is second.region
    first.region.abandoned = True
    pool.give(first)
    assert pool.take(100).region is not first.region
    pool.give(second)
    assert first.region.fd == -1  # closed with its last buffer
    pool.close()


def test_closing_gives_descriptors_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    pool = BufferPool(8 * MiB)
    for length in (1, 5000, 70_000, 2 * MiB):
        pool.give(pool.take(length))
    pool.close()
    region = Region(100)
    assert region.size_bytes == 4096
    kept = region.slice(0, 10).view
    region.close()
    region.close()
    kept[:] = b"0123456789"  # still mapped while somebody holds a view
    del kept
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_who_waits_for_a_buffer_waits_for_a_bounded_time() -> None:
    async def scenario() -> None:
        pool = BufferPool(4 * MiB)
        held = pool.take(4 * MiB)
        with pytest.raises(EmberfsError) as caught:
            await pool.take_within(1 * MiB, 20 * MS)
        assert caught.value.code is Code.OVERLOADED
        waiting = asyncio.ensure_future(pool.take_within(1 * MiB, 5 * SECOND))
        await asyncio.sleep(0)
        pool.give(held)
        pool.give(await waiting)
        assert pool.taken_bytes == 0

    asyncio.run(scenario())


def test_a_lone_user_keeps_its_memory_however_much_others_have_left_idle():
    """A small buffer taken and given again and again after large ones costs no new region."""
    pool = BufferPool(256 * MiB)
    large = [pool.take(1 * MiB) for _ in range(64)]
    for buffer in large:
        pool.give(buffer)
    regions = set()
    for _ in range(50):
        buffer = pool.take(4 * KiB)
        regions.add(buffer.region.id)
        pool.give(buffer)
    assert len(regions) == 1
    assert pool.slab_bytes <= IDLE_BYTES_MAX + SLAB_BYTES
    pool.close()


def test_a_lone_user_keeps_its_memory_beside_slabs_that_are_hardly_used():
    """The same where nothing older can be given up: each of the other slabs has one taken."""
    pool = BufferPool(256 * MiB)
    large = [pool.take(1 * MiB) for _ in range(64)]
    for place, buffer in enumerate(large):
        if place % 4:
            pool.give(buffer)
    regions = set()
    for _ in range(50):
        buffer = pool.take(4 * KiB)
        regions.add(buffer.region.id)
        pool.give(buffer)
    assert len(regions) == 1
    pool.close()


def test_what_has_been_idle_longest_goes_first():
    pool = BufferPool(256 * MiB)
    held = [pool.take(4 * MiB) for _ in range(10)]  # a slab each
    for buffer in held:
        pool.give(buffer)
    assert held[0].region.fd == -1
    assert held[-1].region.fd >= 0
    assert pool.slab_bytes <= IDLE_BYTES_MAX
    pool.close()
