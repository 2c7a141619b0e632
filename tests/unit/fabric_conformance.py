"""What every transport of the fabric has to pass: scenarios over a server and its callers.

Each scenario is an async function of a Bench; test_fabric_conformance.py runs all of them over
every transport. A new transport adds its name to TRANSPORTS and passes, or it is not one.
"""

import asyncio
import os
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.call import BODY_BYTES_MAX, Handler, Peer, Reply, ServerCall
from emberfs.fabric.frame import pack_descriptors
from emberfs.fabric.peer import INFLIGHT_CALLS_MAX
from emberfs.fabric.pool import PeerPool
from emberfs.fabric.region import Buffer, Region, Slice
from emberfs.fabric.server import Server
from emberfs.fabric.sinks import PackedSinks
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, KiB, MiB
from emberfs.runtime.real import RealEnv

TRANSPORTS = ["tcp", "shm"]

ECHO, FILL, SLEEP, FAIL, CRASH, SCRIBBLE, HALF, GATE, QUICK = range(1, 10)
PATTERN = bytes(range(256)) * 16


class Bench:
    """A server with all handlers of the suite, and a pool of connections to it."""

    def __init__(self, transport: str, directory: Path) -> None:
        self.env = RealEnv()
        self.directory = directory
        self.listen_on = (
            f"shm://{directory}/server.sock" if transport == "shm" else "tcp://127.0.0.1:0"
        )
        self.transport = transport
        self.endpoint = ""
        self.peers = PeerPool(self.env)
        self.server: Server | None = None
        self.running = 0
        self.running_max = 0
        self.cancelled = 0
        self.writes_after_cancel = 0
        self.gate = asyncio.Event()
        self.source_addresses: list[Slice] = []

    @property
    def handlers(self) -> dict[int, Handler]:
        return {
            ECHO: self.echo,
            FILL: self.fill,
            SLEEP: self.sleep,
            FAIL: self.fail,
            CRASH: self.crash,
            SCRIBBLE: self.scribble,
            HALF: self.half,
            GATE: self.wait_at_gate,
            QUICK: self.after_all,
        }

    async def start(self, pool: BufferPool | None = None) -> None:
        self.server = Server(
            self.env, self.handlers, name="suite", quick={QUICK: self.at_once}, pool=pool
        )
        self.endpoint = await self.server.listen(self.endpoint or self.listen_on)

    async def stop(self, drain_ns: int = 0) -> None:
        if self.server is not None:
            await self.server.close(drain_ns)
            self.server = None

    async def peer(self) -> Peer:
        return await self.peers.get([self.endpoint])

    async def call(
        self,
        method: int,
        body: bytes = b"",
        sources: list[Buffer] | None = None,
        sinks: list[Buffer] | None = None,
        timeout_ns: int = 5 * SECOND,
    ) -> Reply:
        peer = await self.peer()
        return await peer.call(
            method, body, sources=sources or (), sinks=sinks or (), timeout_ns=timeout_ns
        )

    # the handlers

    def at_once(self, call: ServerCall) -> bytes | None:
        """As the body says."""
        match bytes(call.body):
            case b"answer":
                for sink in call.sinks:
                    sink[:] = b"q" * len(sink)
                call.fill_all()
                return b"at once"
            case b"refuse":
                raise EmberfsError(Code.INVALID, "refused at once")
            case b"break":
                raise RuntimeError("broken on purpose")
        return None

    async def after_all(self, call: ServerCall) -> bytes:
        """What the quick handler leaves."""
        call.fill_all()
        return b"after all"

    async def echo(self, call: ServerCall) -> bytes:
        self.source_addresses = list(call.sources)
        return bytes(call.body) + b"".join(bytes(source.view) for source in call.sources)

    async def fill(self, call: ServerCall) -> bytes:
        """Fill every sink with a byte of its own index."""
        for index, sink in enumerate(call.sinks):
            sink[:] = bytes([index % 251 + 1]) * len(sink)
            call.fill(index, len(sink))
        return b"filled"

    async def half(self, call: ServerCall) -> bytes:
        """Sinks 0, 3, 6 stay empty, 1, 4, 7 half, 2, 5, 8 full."""
        for index, sink in enumerate(call.sinks):
            length = len(sink) * (index % 3) // 2
            sink[:length] = bytes([index + 1]) * length
            call.fill(index, length)
        return b""

    async def sleep(self, call: ServerCall) -> bytes:
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            await self.env.sleep_ns(int(bytes(call.body)) * MS)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return b"slept"

    async def wait_at_gate(self, call: ServerCall) -> bytes:
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        return bytes(call.sources[0].view[:1]) if call.sources else b""

    async def scribble(self, call: ServerCall) -> bytes:
        """Write to the sink until cancelled, and take some time to stop."""
        count = 0
        try:
            while True:
                count += 1
                call.sinks[0][:] = bytes([count % 255 + 1]) * len(call.sinks[0])
                await self.env.sleep_ns(1 * MS)
        except asyncio.CancelledError:
            for _ in range(20):
                call.sinks[0][:] = b"\xee" * len(call.sinks[0])
                await self.env.sleep_ns(1 * MS)
            self.cancelled += 1
            raise

    async def fail(self, call: ServerCall) -> bytes:
        raise EmberfsError(Code(int(bytes(call.body))), "as asked: é")

    async def crash(self, call: ServerCall) -> bytes:
        raise ZeroDivisionError("a bug in a handler")


@asynccontextmanager
async def bench(transport: str, pool: BufferPool | None = None) -> AsyncIterator[Bench]:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    with tempfile.TemporaryDirectory() as directory:
        made = Bench(transport, Path(directory))
        await made.start(pool)
        try:
            yield made
        finally:
            await made.peers.close()
            await made.stop()
    assert not problems, problems[0]


async def expect(code: Code, work: Awaitable[object]) -> EmberfsError:
    with pytest.raises(EmberfsError) as caught:
        await work
    assert caught.value.code is code, caught.value
    return caught.value


async def until(condition: Callable[[], bool], seconds: float = 3) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it did not happen in time"
        await asyncio.sleep(0.002)


# ---------------------------------------------------------------- moving data


async def bodies_come_back(b: Bench) -> None:
    assert (await b.call(ECHO, b"hello")).body == b"hello"
    assert (await b.call(ECHO)).body == b""
    big = os.urandom(BODY_BYTES_MAX)
    assert (await b.call(ECHO, big)).body == big
    replies = await asyncio.gather(*(b.call(ECHO, b"%d" % i) for i in range(300)))
    assert [reply.body for reply in replies] == [b"%d" % i for i in range(300)]


async def sources_are_pulled(b: Bench) -> None:
    region = Region(64 * KiB)
    region.view[: len(PATTERN)] = PATTERN
    plain = memoryview(os.urandom(3000))
    sources: list[Buffer] = [region.slice(10, 500), plain, region.slice(0, 4096), plain[7:7]]
    expected = PATTERN[10:510] + bytes(plain) + PATTERN
    assert (await b.call(ECHO, b">", sources)).body == b">" + expected
    # They are the server's own: neither the caller's memory nor another call's.
    assert all(source.region is not region for source in b.source_addresses)
    region.close()


async def large_sources_are_pulled(b: Bench) -> None:
    data = os.urandom(3 * MiB + 17)
    region = Region(len(data))
    region.view[: len(data)] = data
    for source in (memoryview(data), region.slice(0, len(data))):
        assert (await b.call(ECHO, b"", [source])).body == data
    region.close()


async def sinks_are_filled(b: Bench) -> None:
    region = Region(2 * MiB)
    sizes = [4096, 1, 100_000, 0, 300, 65536]
    sinks: list[Buffer] = []
    at = 0
    for size in sizes:
        sinks.append(region.slice(at, size))
        at += size + 64
    plain = memoryview(bytearray(50_000))
    sinks += [plain[:20_000], plain[30_000:]]
    reply = await b.call(FILL, b"", sinks=sinks)
    assert reply.body == b"filled"
    assert list(reply.filled) == [*sizes, 20_000, 20_000]
    at = 0
    for index, size in enumerate(sizes):
        assert bytes(region.view[at : at + size]) == bytes([index + 1]) * size
        assert bytes(region.view[at + size : at + size + 64]) == bytes(64)
        at += size + 64
    assert bytes(plain) == b"\x07" * 20_000 + bytes(10_000) + b"\x08" * 20_000
    region.close()


async def what_is_quick_is_answered_without_a_task(b: Bench) -> None:
    region = Region(64 * KiB)
    sinks: list[Buffer] = [region.slice(0, 4096), region.slice(5000, 10)]
    for _ in range(3):
        region.view[:8192] = bytes(8192)
        reply = await b.call(QUICK, b"answer", sinks=sinks)
        assert (reply.body, list(reply.filled)) == (b"at once", [4096, 10])
        assert bytes(region.view[:6000]) == b"q" * 4096 + bytes(904) + b"q" * 10 + bytes(990)
    assert (await b.call(QUICK, b"leave it", sinks=sinks)).body == b"after all"
    await expect(Code.INVALID, b.call(QUICK, b"refuse", sinks=sinks))
    await expect(Code.INTERNAL, b.call(QUICK, b"break", sinks=sinks))
    answers = await asyncio.gather(*(b.call(QUICK, b"answer") for _ in range(300)))
    assert {answer.body for answer in answers} == {b"at once"}
    large: list[Buffer] = [memoryview(bytearray(2 * MiB))]  # would keep others waiting
    assert (await b.call(QUICK, b"answer", sinks=large)).body == b"after all"
    region.close()


async def packed_sinks_are_filled(b: Bench) -> None:
    one, other = Region(64 * KiB), Region(64 * KiB)
    parts = [(one, 4096, 100), (other, 0, 4096), (one, 0, 4096), (one, 9000, 0)]
    flat = [number for region, at, size in parts for number in (region.id, at, size)]
    sinks = PackedSinks(pack_descriptors(flat), 8292, [one, other])
    peer = await b.peer()
    reply = await peer.call(FILL, b"", sinks=sinks, timeout_ns=SECOND)
    assert list(reply.filled) in ([], [100, 4096, 4096, 0])  # packed, or one by one
    for index, (region, at, size) in enumerate(parts):
        assert bytes(region.view[at : at + size]) == bytes([index + 1]) * size
    reply = await peer.call(HALF, b"", sinks=sinks, timeout_ns=SECOND)
    assert list(reply.filled) == [0, 2048, 4096, 0]
    one.close()
    await expect(Code.INVALID, peer.call(FILL, b"", sinks=sinks, timeout_ns=SECOND))
    other.close()


async def a_started_call_needs_no_coroutine(b: Bench) -> None:
    region = Region(64 * KiB)
    sinks: list[Buffer] = [region.slice(0, 4096)]
    peer = await b.peer()
    started = peer.start(FILL, b"", sinks=sinks, timeout_ns=SECOND)
    assert started is not None
    assert list((await started.future).filled) == [4096]
    refused = peer.start(FAIL, b"", timeout_ns=SECOND)
    assert refused is not None
    with pytest.raises(EmberfsError):
        await refused.future
    before = b.cancelled
    given_up = peer.start(SCRIBBLE, b"", sinks=sinks, timeout_ns=5 * SECOND)
    assert given_up is not None
    await asyncio.sleep(0.02)
    given_up.give_up(EmberfsError(Code.DISCONNECTED, "it is dead"))
    given_up.give_up(EmberfsError(Code.CANCELLED, "said twice"))
    with pytest.raises(EmberfsError, match="it is dead"):
        await given_up.future
    region.view[:4096] = b"\x55" * 4096
    await until(lambda: b.cancelled == before + 1)
    assert bytes(region.view[:4096]) == b"\x55" * 4096
    assert not region.abandoned
    late = peer.start(SLEEP, b"5000", timeout_ns=30 * MS)
    assert late is not None
    with pytest.raises(EmberfsError) as problem:
        await late.future
    assert problem.value.code == Code.TIMEOUT
    region.close()


async def nothing_is_started_that_would_have_to_wait(b: Bench) -> None:
    peer = await b.peer()
    begun = [peer.start(GATE, b"", timeout_ns=5 * SECOND) for _ in range(INFLIGHT_CALLS_MAX + 1)]
    assert begun.pop() is None
    b.gate.set()
    for started in begun:
        assert started is not None
        await started.future
    again = peer.start(ECHO, b"", timeout_ns=SECOND)
    assert again is not None
    await again.future
    await peer.close()
    with pytest.raises(EmberfsError) as problem:
        peer.start(ECHO, b"", timeout_ns=SECOND)
    assert problem.value.code == Code.DISCONNECTED


async def many_sinks(b: Bench) -> None:
    region = Region(4 * MiB)
    sinks: list[Buffer] = [region.slice(i * 4096, 4096) for i in range(1024)]
    await b.call(FILL, sinks=sinks)
    for i in range(0, 1024, 37):
        assert bytes(region.view[i * 4096 : (i + 1) * 4096]) == bytes([i % 251 + 1]) * 4096
    scattered: list[Buffer] = [memoryview(bytearray(1000)) for _ in range(1024)]
    await b.call(FILL, sinks=scattered)
    for i in (0, 500, 1023):
        one = scattered[i]
        assert isinstance(one, memoryview)
        assert bytes(one) == bytes([i % 251 + 1]) * 1000
    region.close()


async def sinks_may_be_filled_in_part(b: Bench) -> None:
    region = Region(1 * MiB)
    sinks: list[Buffer] = [region.slice(i * 1000, 1000) for i in range(6)]
    sinks += [memoryview(bytearray(100_000)) for _ in range(3)]
    reply = await b.call(HALF, sinks=sinks)
    assert list(reply.filled) == [0, 500, 1000, 0, 500, 1000, 0, 50_000, 100_000]
    for i in range(6):
        count = reply.filled[i]
        part = bytes(region.view[i * 1000 : (i + 1) * 1000])
        # On shm a handler may have touched more than it declares; this one did not.
        assert part == bytes([i + 1]) * count + bytes(1000 - count)
    for i in range(6, 9):
        plain = sinks[i]
        assert isinstance(plain, memoryview)
        assert bytes(plain) == bytes([i + 1]) * reply.filled[i] + bytes(100_000 - reply.filled[i])
    region.close()


async def concurrent_large_reads(b: Bench) -> None:
    region = Region(16 * MiB)
    calls = [
        b.call(FILL, sinks=[region.slice((2 * i + j) * MiB, MiB) for j in range(2)])
        for i in range(8)
    ]
    await asyncio.gather(*calls)
    for i in range(16):
        assert region.view[i * MiB] == region.view[(i + 1) * MiB - 1] == i % 2 + 1
    region.close()


async def other_views_and_bad_ones(b: Bench) -> None:
    numbers = memoryview(bytearray(800)).cast("Q")
    await b.call(FILL, sinks=[numbers])
    assert numbers[99] == 0x0101010101010101
    await expect(Code.INVALID, b.call(FILL, sinks=[memoryview(b"read-only")]))
    await expect(Code.INVALID, b.call(FILL, sinks=[memoryview(bytearray(10))[::2]]))
    assert (await b.call(ECHO, b"still here")).body == b"still here"


# ---------------------------------------------------------------- errors


async def error_codes_pass(b: Bench) -> None:
    for code in (Code.NOT_FOUND, Code.CHAIN_VERSION, Code.NO_SPACE):
        problem = await expect(code, b.call(FAIL, b"%d" % code))
        assert "as asked: é" in problem.message
    await expect(Code.UNSUPPORTED, b.call(999, b"", [memoryview(bytes(200_000))]))
    await expect(Code.INTERNAL, b.call(CRASH))
    assert (await b.call(ECHO, b"still here")).body == b"still here"


async def too_large_is_refused(b: Bench) -> None:
    await expect(Code.TOO_LARGE, b.call(ECHO, bytes(BODY_BYTES_MAX + 1)))
    plain = memoryview(bytearray(1))
    await expect(Code.TOO_LARGE, b.call(FILL, sinks=[plain] * 1025))
    await expect(Code.TOO_LARGE, b.call(ECHO, b"", [plain] * 65))
    huge = memoryview(bytearray(33 * MiB))
    await expect(Code.TOO_LARGE, b.call(ECHO, b"", [huge, huge]))
    # The answer of ECHO would be longer than a body may be.
    await expect(Code.TOO_LARGE, b.call(ECHO, b"x", [huge[:BODY_BYTES_MAX]]))
    assert (await b.call(ECHO, b"still here")).body == b"still here"


async def deadlines_hold(b: Bench) -> None:
    loop = asyncio.get_running_loop()
    for timeout_ms in (20, 200):
        began = loop.time()
        await expect(Code.TIMEOUT, b.call(SLEEP, b"3000", timeout_ns=timeout_ms * MS))
        assert timeout_ms / 1000 - 0.002 <= loop.time() - began < timeout_ms / 1000 + 0.5
    await until(lambda: b.cancelled == 2)
    assert (await b.call(ECHO, b"still here")).body == b"still here"


async def late_data_goes_nowhere(b: Bench) -> None:
    """A reply that comes after its caller has given up does not reach the sinks."""
    sink = memoryview(bytearray(2 * MiB))
    for timeout_ms in (1, 2, 3, 5, 8):
        sink[:] = bytes(len(sink))
        try:
            await b.call(FILL, sinks=[sink], timeout_ns=timeout_ms * MS)
        except EmberfsError as problem:
            if problem.code is not Code.TIMEOUT:
                raise
        snapshot = bytes(sink)
        await asyncio.sleep(0.03)
        assert bytes(sink) == snapshot
    assert (await b.call(ECHO, b"still here")).body == b"still here"


async def a_cancelled_call_leaves_memory_alone(b: Bench) -> None:
    region = Region(64 * KiB)
    for sink in (region.slice(0, 32 * KiB), memoryview(bytearray(32 * KiB))):
        view = sink.view if isinstance(sink, Slice) else sink
        before = b.cancelled
        task = asyncio.ensure_future(b.call(SCRIBBLE, sinks=[sink]))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        view[:] = b"\x55" * len(view)
        await until(lambda before=before: b.cancelled == before + 1)  # type: ignore[misc]
        await asyncio.sleep(0.03)
        assert bytes(view) == b"\x55" * len(view)
    assert not region.abandoned
    region.close()


async def a_timed_out_call_leaves_memory_alone(b: Bench) -> None:
    region = Region(64 * KiB)
    await expect(
        Code.TIMEOUT, b.call(SCRIBBLE, sinks=[region.slice(0, 32 * KiB)], timeout_ns=30 * MS)
    )
    region.view[: 32 * KiB] = b"\x55" * (32 * KiB)
    await asyncio.sleep(0.05)
    assert bytes(region.view[: 32 * KiB]) == b"\x55" * (32 * KiB)
    region.close()


# ---------------------------------------------------------------- bounds and back pressure


async def calls_in_flight_are_bounded(b: Bench) -> None:
    count = INFLIGHT_CALLS_MAX + 100
    calls = [asyncio.ensure_future(b.call(GATE)) for _ in range(count)]
    await until(lambda: b.running == INFLIGHT_CALLS_MAX)
    calls[-1].cancel()  # one that waits for its turn
    b.gate.set()
    await asyncio.wait(calls)
    assert b.running_max == INFLIGHT_CALLS_MAX
    assert sum(not call.cancelled() and call.exception() is None for call in calls) == count - 1


async def waiting_for_a_turn_has_a_deadline(b: Bench) -> None:
    calls = [asyncio.ensure_future(b.call(GATE)) for _ in range(INFLIGHT_CALLS_MAX)]
    await until(lambda: b.running == INFLIGHT_CALLS_MAX)
    await expect(Code.TIMEOUT, b.call(ECHO, timeout_ns=50 * MS))
    b.gate.set()
    await asyncio.gather(*calls)


# ---------------------------------------------------------------- death


async def server_death_fails_pending_calls(b: Bench) -> None:
    peer = await b.peer()
    calls = [asyncio.ensure_future(b.call(SLEEP, b"3000")) for _ in range(5)]
    await until(lambda: b.running == 5)
    began = asyncio.get_running_loop().time()
    await b.stop()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert asyncio.get_running_loop().time() - began < 1
    codes = {outcome.code for outcome in outcomes if isinstance(outcome, EmberfsError)}
    assert codes <= {Code.DISCONNECTED, Code.SHUTTING_DOWN}
    assert len(codes) >= 1
    await until(lambda: peer.closed)
    await expect(Code.DISCONNECTED, peer.call(ECHO, b"", timeout_ns=SECOND))
    for _ in range(3):
        began = asyncio.get_running_loop().time()
        await expect(Code.UNREACHABLE, b.call(ECHO))
        assert asyncio.get_running_loop().time() - began < 0.5
    await b.start()
    await asyncio.sleep(0.05)
    assert (await b.call(ECHO, b"again")).body == b"again"
    assert await b.peer() is not peer


async def draining_lets_calls_finish(b: Bench) -> None:
    running = asyncio.ensure_future(b.call(SLEEP, b"100"))
    await until(lambda: b.running == 1)
    stopping = asyncio.ensure_future(b.stop(drain_ns=2 * SECOND))
    await asyncio.sleep(0.01)
    await expect(Code.SHUTTING_DOWN, b.call(ECHO))
    assert (await running).body == b"slept"
    await stopping


async def closing_the_peer_fails_pending_calls(b: Bench) -> None:
    peer = await b.peer()
    call = asyncio.ensure_future(b.call(SLEEP, b"3000"))
    await until(lambda: b.running == 1)
    await peer.close()
    await expect(Code.DISCONNECTED, call)
    await until(lambda: b.cancelled == 1)  # the handler hears of it
    assert (await b.call(ECHO, b"again")).body == b"again"


async def connections_leak_nothing(b: Bench) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    region = Region(4096)
    await b.call(FILL, sinks=[region.slice(0, 16)])
    await (await b.peer()).close()
    await asyncio.sleep(0.02)
    before = descriptors()
    for _ in range(1000):
        await b.call(FILL, sinks=[region.slice(0, 16)])
        await (await b.peer()).close()
    assert not region.watchers
    await until(lambda: descriptors() <= before)
    region.close()


async def random_calls_and_a_small_pool(b: Bench) -> None:
    """Many callers with all sizes, short deadlines and cancellations: memory stays theirs."""
    await b.stop()
    pool = BufferPool(4 * MiB)
    await b.start(pool)
    dice = random.Random(3)
    outcomes: Counter[str] = Counter()

    async def one(region: Region, plain: memoryview) -> None:
        sinks: list[Buffer] = []
        at = 0
        for _ in range(dice.randrange(6)):
            size = dice.choice([10, 4096, 100_000])
            shared = dice.random() < 0.6
            sinks.append(region.slice(at, size) if shared else plain[at : at + size])
            at += size
        source = plain[: dice.choice([0, 1, 500_000])]
        method = dice.choice([HALF, FILL, SLEEP])
        timeout_ns = dice.choice([3 * MS, 20 * MS, 5 * SECOND])
        work = b.call(method, b"10", [source, region.slice(0, 5000)], sinks, timeout_ns)
        task = asyncio.ensure_future(work)
        if dice.random() < 0.15:
            await asyncio.sleep(dice.random() * 0.01)
            task.cancel()
        await asyncio.wait([task])
        problem = None if task.cancelled() else task.exception()
        name = "CANCELLED" if task.cancelled() else "OK"
        outcomes[problem.code.name if isinstance(problem, EmberfsError) else name] += 1
        if name == "OK" and problem is None and method == FILL:
            views = [s.view if isinstance(s, Slice) else s for s in sinks]
            assert all(v == bytes([i + 1]) * len(v) for i, v in enumerate(views))
        region.view[:] = plain[:] = b"\xff" * MiB
        await asyncio.sleep(0)
        assert region.view == plain == b"\xff" * MiB

    async def caller() -> None:
        region, plain = Region(MiB), memoryview(bytearray(MiB))
        for _ in range(15):
            await one(region, plain)
            if region.abandoned:
                region = Region(MiB)
        region.close()

    await asyncio.gather(*(caller() for _ in range(16)))
    assert outcomes["OK"] > 20
    assert set(outcomes) <= {"OK", "TIMEOUT", "CANCELLED", "OVERLOADED", "DISCONNECTED"}
    await until(lambda: pool.taken_bytes == 0)
    await b.stop()
    pool.close()


SCENARIOS = [
    bodies_come_back,
    sources_are_pulled,
    large_sources_are_pulled,
    sinks_are_filled,
    what_is_quick_is_answered_without_a_task,
    packed_sinks_are_filled,
    a_started_call_needs_no_coroutine,
    nothing_is_started_that_would_have_to_wait,
    many_sinks,
    sinks_may_be_filled_in_part,
    concurrent_large_reads,
    other_views_and_bad_ones,
    error_codes_pass,
    too_large_is_refused,
    deadlines_hold,
    late_data_goes_nowhere,
    a_cancelled_call_leaves_memory_alone,
    a_timed_out_call_leaves_memory_alone,
    calls_in_flight_are_bounded,
    waiting_for_a_turn_has_a_deadline,
    server_death_fails_pending_calls,
    draining_lets_calls_finish,
    closing_the_peer_fails_pending_calls,
    connections_leak_nothing,
    random_calls_and_a_small_pool,
]

BASICS = SCENARIOS[:13]
