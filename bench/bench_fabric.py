"""Fabric calls per second and bytes per second, each beside the limit measured in the same run.

    python bench/bench_fabric.py

The server is a process of its own that answers from memory. Limits: for empty calls a ping-pong of
the same frames over a bare blocking socket (one call at a time); for data over tcp a blocking
send / recv_into loop of the same bytes, over shm a memcpy of the same pieces in one process.
"""

import asyncio
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import uvloop

from emberfs.fabric.call import Peer, ServerCall
from emberfs.fabric.pool import PeerPool
from emberfs.fabric.region import Region
from emberfs.fabric.server import Server
from emberfs.proto.ids import SECOND, KiB, MiB
from emberfs.runtime.real import RealEnv

EMPTY, READ = 1, 2
SECONDS = 0.6
FRAME_BYTES = 100  # about a small request


def serve(endpoints: list[str], pipe: Connection) -> None:
    data = memoryview(os.urandom(4 * MiB))

    async def empty(call: ServerCall) -> bytes:
        return b""

    async def read(call: ServerCall) -> bytes:
        for index, sink in enumerate(call.sinks):
            length = len(sink)
            sink[:] = data[:length]
            call.fill(index, length)
        return b""

    async def live() -> None:
        server = Server(RealEnv(), {EMPTY: empty, READ: read}, name="bench")
        pipe.send([await server.listen(endpoint) for endpoint in endpoints])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await server.close()

    uvloop.run(live())


async def rate(one: Callable[[int], Awaitable[object]], depth: int) -> float:
    """Calls per second with `depth` callers."""
    count = 0
    end = time.perf_counter() + SECONDS

    async def caller(index: int) -> None:
        nonlocal count
        while time.perf_counter() < end:
            await one(index)
            count += 1

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for index in range(depth):
            group.create_task(caller(index))
    return count / (time.perf_counter() - began)


async def figures(peer: Peer, region: Region) -> dict[str, float]:
    found: dict[str, float] = {}

    async def empty(index: int) -> None:
        await peer.call(EMPTY, b"x" * 40, timeout_ns=10 * SECOND)

    found["empty 1"] = await rate(empty, 1)
    found["empty 64"] = await rate(empty, 64)
    batches = [[region.slice((64 * d + i) * 4 * KiB, 4 * KiB) for i in range(64)] for d in range(8)]

    async def small(index: int) -> None:
        await peer.call(READ, b"", sinks=batches[index], timeout_ns=10 * SECOND)

    found["4K x 64"] = 64 * await rate(small, 8)
    pieces = [[region.slice(d * MiB, MiB)] for d in range(8)]

    async def large(index: int) -> None:
        await peer.call(READ, b"", sinks=pieces[index], timeout_ns=10 * SECOND)

    found["1M"] = await rate(large, 8)
    return found


def socket_limits(pair: tuple[socket.socket, socket.socket]) -> tuple[float, float]:
    """(ping-pongs per second, MiB per second) of bare blocking sockets, two threads' processes."""
    ours, theirs = pair
    pid = os.fork()
    if pid == 0:
        ours.close()
        buffer = memoryview(bytearray(MiB))
        while count := theirs.recv_into(buffer, FRAME_BYTES):
            theirs.send(buffer[:count])
            if buffer[0]:
                break
        try:
            while True:
                theirs.sendall(buffer)
        except OSError:
            os._exit(0)
    theirs.close()
    buffer = memoryview(bytearray(MiB))
    end, count = time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end:
        ours.send(bytes(FRAME_BYTES))
        ours.recv_into(buffer)
        count += 1
    pings = count / SECONDS
    ours.send(b"\1" * FRAME_BYTES)
    ours.recv_into(buffer, FRAME_BYTES)
    end, total = time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end:
        total += ours.recv_into(buffer)
    ours.close()
    os.waitpid(pid, 0)
    return pings, total / SECONDS / MiB


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for one in (ours, theirs):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MiB)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MiB)
    return ours, theirs


def memcpy_limit(piece: int, region: Region) -> float:
    """Pieces per second that one process copies into a shared region."""
    data = memoryview(os.urandom(4 * MiB))
    sinks = [region.view[at : at + piece] for at in range(0, 8 * MiB, piece)]
    end, count = time.perf_counter() + SECONDS / 2, 0
    while time.perf_counter() < end:
        for sink in sinks:
            sink[:] = data[: len(sink)]
        count += len(sinks)
    return count / (SECONDS / 2)


def show(name: str, figure: float, unit: str, limit: float, of: str) -> None:
    print(
        f"{name:<34} {figure:>10,.0f} {unit:<7} limit {limit:>10,.0f} ({of})"
        f"  ratio {figure / limit:.2f}"
    )


def report(transport: str, found: dict[str, float], region: Region) -> None:
    pair = tcp_pair() if transport == "tcp" else socket.socketpair()
    pings, mib = socket_limits(pair)
    bare = f"bare {transport} socket ping-pong"
    show(f"{transport} empty calls, 1 caller", found["empty 1"], "calls/s", pings, bare)
    show(f"{transport} empty calls, 64 callers", found["empty 64"], "calls/s", pings, bare)
    small_limit, small_of = memcpy_limit(4 * KiB, region), "memcpy of 4 KiB"
    large_limit, large_of = memcpy_limit(MiB, region), "memcpy of 1 MiB"
    if transport == "tcp":
        small_limit, large_limit = mib * 256, mib
        small_of = large_of = "bare send to recv_into loop"
    show(f"{transport} 4 KiB sinks, 64 a call", found["4K x 64"], "sinks/s", small_limit, small_of)
    show(f"{transport} 1 MiB sinks, 8 callers", found["1M"], "MiB/s", large_limit, large_of)


def main() -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        endpoints = ["tcp://127.0.0.1:0", f"shm://{directory}/bench.sock"]
        process = context.Process(target=serve, args=(endpoints, theirs), daemon=True)
        process.start()
        region = Region(8 * MiB)
        region.view[:] = bytes(8 * MiB)

        async def measure(endpoint: str) -> dict[str, float]:
            pool = PeerPool(RealEnv())
            found = await figures(await pool.get([endpoint]), region)
            await pool.close()
            return found

        for endpoint in ours.recv():
            transport = endpoint.partition("://")[0]
            if len(sys.argv) < 2 or transport == sys.argv[1]:
                report(transport, uvloop.run(measure(endpoint)), region)
        ours.send(None)
        process.join(5)
    assert threading.active_count() == 1


if __name__ == "__main__":
    main()
