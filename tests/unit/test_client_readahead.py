"""The small parts of the client's data path: read-ahead policy, range lock, room, lending."""

import asyncio
import gc

from emberfs.client.lending import Lender
from emberfs.client.rangelock import END, RangeLock
from emberfs.client.readahead import WINDOW_BYTES_FIRST, WINDOW_BYTES_MAX, ReadAhead
from emberfs.client.room import Room
from emberfs.proto.ids import KiB, MiB

BIG = 1 << 40


def test_stream_doubles_the_window_up_to_its_bound():
    policy = ReadAhead()
    windows, ahead = [], 0
    for at in range(0, 64 * MiB, 128 * KiB):
        planned = policy.plan(at, 128 * KiB, BIG)
        if planned is not None:
            assert planned[0] == max(ahead, at + 128 * KiB)  # neither gaps nor twice
            ahead = planned[1]
        windows.append(policy.window_bytes)
        assert ahead <= at + 128 * KiB + WINDOW_BYTES_MAX
    assert windows[0] == 2 * WINDOW_BYTES_FIRST
    assert windows[-1] == WINDOW_BYTES_MAX
    assert windows == sorted(windows)


def test_plans_are_few_and_large():
    policy = ReadAhead()
    plans = [policy.plan(at, 128 * KiB, BIG) for at in range(0, 64 * MiB, 128 * KiB)]
    sizes = [stop - start for start, stop in filter(None, plans)]
    assert min(sizes[8:]) >= 4 * MiB


def test_random_reads_plan_nothing():
    policy = ReadAhead()
    for at in (5 * MiB, 1 * MiB, 900 * MiB, 3 * MiB, 77):
        assert policy.plan(at, 4 * KiB, BIG) is None
    assert policy.window_bytes == 0


def test_nothing_is_planned_beyond_the_file():
    policy = ReadAhead()
    assert policy.plan(0, 10, 50) == (10, 50)
    assert policy.plan(10, 10, 50) is None
    assert policy.plan(20, 30, 50) is None


def test_a_jump_closes_the_window_and_a_new_stream_opens_it():
    policy = ReadAhead()
    for at in range(0, 4 * MiB, 128 * KiB):
        policy.plan(at, 128 * KiB, BIG)
    assert policy.plan(100 * MiB, 4 * KiB, BIG) is None
    assert policy.window_bytes == 0
    planned = policy.plan(100 * MiB + 4 * KiB, 4 * KiB, BIG)
    assert planned == (100 * MiB + 8 * KiB, 100 * MiB + 8 * KiB + WINDOW_BYTES_FIRST)


def test_reads_of_one_stream_may_come_out_of_order():
    policy = ReadAhead()
    order = [0, 1, 3, 2, 5, 4, 6, 7]
    for index in order:
        policy.plan(index * 128 * KiB, 128 * KiB, BIG)
    assert policy.window_bytes >= 1 * MiB


def test_range_lock_orders_conflicts_and_lets_the_rest_pass():
    async def main():
        lock = RangeLock()
        log = []

        async def hold(name, start, stop, exclusive):
            async with lock.hold(start, stop, exclusive=exclusive):
                log.append(name)
                await asyncio.sleep(0.01)
                log.append(name.upper())

        await asyncio.gather(
            hold("a", 0, 10, True),
            hold("b", 5, 15, False),
            hold("c", 10, 20, True),  # waits behind b
            hold("d", 30, 40, True),
            hold("e", 0, END, True),
            hold("f", 0, 1, False),  # waits behind e
        )
        place = {name: at for at, name in enumerate(log)}
        assert place["d"] < place["A"]
        assert place["A"] < place["b"] < place["B"] < place["c"] < place["C"] < place["e"]
        assert place["E"] < place["f"]

    asyncio.run(main())


def test_cancelled_waiters_of_a_range_lock_leave_nothing_behind():
    async def main():
        lock = RangeLock()

        async def forever():
            async with lock.hold(0, 10, exclusive=True):
                await asyncio.sleep(100)

        tasks = [asyncio.ensure_future(forever()) for _ in range(4)]
        await asyncio.sleep(0)
        for task in (tasks[2], tasks[0], tasks[1], tasks[3]):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(1), lock.hold(0, 10, exclusive=True):
            pass

    asyncio.run(main())


def test_room_is_given_in_order_and_bounded():
    async def main():
        room = Room(10)
        await room.take(8)
        order = []

        async def want(count):
            await room.take(count)
            order.append(count)

        tasks = [asyncio.ensure_future(want(count)) for count in (5, 1, 30)]
        await asyncio.sleep(0)
        assert room.wanted
        assert not room.try_take(1)  # others wait
        tasks[0].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == [1]
        room.give(8)
        room.give(1)
        await asyncio.sleep(0)
        assert order == [1, 30]  # more than all of it: alone
        room.give(30)
        assert room.used_bytes == 0

    asyncio.run(main())


def test_lent_memory_returns_when_its_last_view_is_gone():
    lender = Lender(1 * MiB)
    buffer, view = lender.lend(5000)
    view[:3] = b"abc"
    assert bytes(buffer.view[:3]) == b"abc"
    part = view[1:3]
    del view
    gc.collect()
    for _ in range(300):
        _, other = lender.lend(5000)
        assert other is not part
        other[:] = bytes(5000)
        del other
    assert bytes(part) == b"bc"  # never lent to anyone else meanwhile
    held = [lender.lend(512 * KiB)[1] for _ in range(8)]  # beyond the bound: private memory
    assert all(len(one) == 512 * KiB for one in held)
    del part, held
    lender.close()
