"""The wait for /dev/fuse, on a socket pair in its place."""

import asyncio
import errno
import os
import socket

import pytest
import uvloop

from emberfs.client.readable import YIELD_EVERY, AsyncioMode, ClosedResourceError, Nursery, Readable

SHORT_S = 0.05


def run(work):
    uvloop.run(asyncio.wait_for(work, 5))


class Pair:
    """A descriptor to wait for, and the other end that makes it readable."""

    def __init__(self):
        self.near, self.far = socket.socketpair()
        self.readable = Readable(self.near.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.readable.close()
        self.near.close()
        self.far.close()

    def send(self):
        self.far.send(b"x")

    def receive(self):
        return self.near.recv(1)


async def until(true):
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.sleep(SHORT_S)


def test_returns_at_once_when_something_is_there() -> None:
    async def work():
        with Pair() as pair:
            pair.send()
            await asyncio.wait_for(pair.readable.wait(), 1)
            assert pair.receive() == b"x"

    run(work())


def test_descriptor_is_made_non_blocking() -> None:
    async def work():
        with Pair() as pair, pytest.raises(BlockingIOError):
            os.read(pair.near.fileno(), 1)

    run(work())


def test_one_request_wakes_one_worker() -> None:
    async def work():
        with Pair() as pair:
            served = []

            async def worker(name):
                await pair.readable.wait()
                served.append(name)
                pair.receive()

            tasks = [asyncio.create_task(worker(n)) for n in range(3)]
            await settle()
            assert served == []
            for count in (1, 2, 3):
                pair.send()
                await settle()
                assert len(served) == count
            await asyncio.gather(*tasks)

    run(work())


def test_worker_waits_again_after_a_false_alarm() -> None:
    """Another worker took the request between the wake-up and the poll."""

    async def work():
        with Pair() as pair:
            waiting = asyncio.create_task(pair.readable.wait())
            await settle()
            pair.send()
            await until(lambda: not pair.readable._parked)
            pair.receive()  # stolen before the woken task runs
            await settle()
            if waiting.done():
                pytest.skip("the task ran before the theft")
            pair.send()
            await asyncio.wait_for(waiting, 1)

    run(work())


def test_no_busy_loop_while_all_workers_are_busy() -> None:
    async def work():
        with Pair() as pair:
            waiting = asyncio.create_task(pair.readable.wait())
            await settle()
            pair.send()
            await waiting  # the byte stays unread and nobody is parked
            await settle()
            assert not pair.readable._registered

    run(work())


def test_other_work_gets_its_turn() -> None:
    """Requests that never wait must not starve the rest of the process."""

    async def work():
        with Pair() as pair:
            pair.send()  # readable all the time
            turns = 0

            async def other():
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            task = asyncio.create_task(other())
            for _ in range(YIELD_EVERY * 10):
                await pair.readable.wait()
            task.cancel()
            assert turns >= 10

    run(work())


def test_cancelled_worker_hands_its_wake_up_on() -> None:
    async def work():
        with Pair() as pair:
            first = asyncio.create_task(pair.readable.wait())
            await settle()
            second = asyncio.create_task(pair.readable.wait())
            await settle()
            pair.send()
            await until(lambda: len(pair.readable._parked) == 1)
            first.cancel()
            await asyncio.wait_for(second, 1)
            assert first.cancelled() or first.done()

    run(work())


def test_close_ends_every_wait() -> None:
    async def work():
        with Pair() as pair:
            tasks = [asyncio.create_task(pair.readable.wait()) for _ in range(3)]
            await settle()
            pair.readable.close()
            for problem in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(problem, ClosedResourceError)
            with pytest.raises(ClosedResourceError):
                await pair.readable.wait()

    run(work())


def test_hang_up_of_the_other_side_is_noticed() -> None:
    async def work():
        with Pair() as pair:
            waiting = asyncio.create_task(pair.readable.wait())
            await settle()
            pair.far.close()
            await asyncio.wait_for(waiting, 1)

    run(work())


def test_worker_goes_on_after_a_vanished_request(caplog) -> None:
    async def work():
        tries = []

        async def worker(argument):
            tries.append(argument)
            if len(tries) < 3:
                raise OSError(errno.EAGAIN, "vanished")

        async with Nursery() as nursery:
            nursery.start_soon(worker, "a", name="w")
        assert tries == ["a"] * 3

    run(work())
    assert not caplog.records


def test_failed_worker_is_logged(caplog) -> None:
    async def work():
        async def worker():
            raise RuntimeError("broken")

        async with Nursery() as nursery:
            nursery.start_soon(worker, name="pyfuse-07")

    run(work())
    assert "pyfuse-07" in caplog.text
    assert "broken" in caplog.text


def test_mode_has_what_pyfuse3_uses() -> None:
    async def work():
        mode = AsyncioMode()
        near, far = socket.socketpair()
        async with mode.Lock():
            far.send(b"x")
            await mode.lowlevel.wait_readable(near.fileno())
        assert isinstance(mode.lowlevel.current_task().name, str)
        mode.notify_closing(near.fileno())
        with pytest.raises(mode.ClosedResourceError):
            await mode.wait_readable(near.fileno())
        near.close()
        far.close()

    run(work())
