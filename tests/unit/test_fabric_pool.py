"""Which connection is chosen, that it is made once, and what a dead server costs."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from emberfs.fabric.endpoint import parse
from emberfs.fabric.pool import PeerPool
from emberfs.fabric.region import Region
from emberfs.fabric.server import Server
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND
from emberfs.runtime.real import RealEnv
from unit.fabric_conformance import ECHO, TRANSPORTS, Bench, bench, expect


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def live() -> None:
        async with asyncio.timeout(20):
            await scenario()

    uvloop.run(live())


async def both(b: Bench, directory: Path) -> list[str]:
    """Make the server listen on shm beside tcp; returns its endpoints."""
    assert b.server is not None
    return [b.endpoint, await b.server.listen(f"shm://{directory}/x.sock")]


def test_shared_memory_is_preferred_and_said_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench("tcp") as b:
            endpoints = await both(b, tmp_path)
            peer = await b.peers.get(endpoints)
            assert peer.transport == "shm"
            (choice,) = b.peers.choices()
            assert choice.endpoints == tuple(endpoints)
            assert choice.transport == "shm"

    run(scenario)


@pytest.mark.parametrize(
    ("shm", "reason"),
    [
        ("shm://ffffffffffffffff/tmp/x.sock", "shm: another host"),
        ("shm://{key}/nowhere/x.sock", "shm: No such file or directory"),
        ("rdma://10.0.0.1:5", "the server offers it"),
    ],
)
def test_tcp_is_taken_when_memory_cannot_be_shared(shm: str, reason: str) -> None:
    async def scenario() -> None:
        async with bench("tcp") as b:
            endpoints = [shm.format(key=b.env.host_key), b.endpoint]
            peer = await b.peers.get(endpoints)
            assert peer.transport == "tcp"
            assert (await peer.call(ECHO, b"hi", timeout_ns=SECOND)).body == b"hi"
            (choice,) = b.peers.choices()
            assert reason in choice.reason

    run(scenario)


def test_server_that_shares_no_memory_behind_a_local_socket_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        elsewhere = RealEnv()
        elsewhere.host_key = "another container"
        server = Server(elsewhere, {}, name="far")
        await server.listen(f"shm://{tmp_path}/x.sock")
        pool = PeerPool(RealEnv())
        near = f"shm://{RealEnv().host_key}{tmp_path}/x.sock"
        problem = await expect(Code.UNREACHABLE, pool.get([near]))
        assert "another host" in problem.message
        await pool.close()
        await server.close()

    run(scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_connection_for_many_callers_at_once(transport: str) -> None:
    async def scenario() -> None:
        async with bench(transport) as b:
            first = asyncio.ensure_future(b.peer())
            await asyncio.sleep(0)
            first.cancel()  # the others still get theirs
            peers = await asyncio.gather(*(b.peer() for _ in range(50)))
            assert len(set(map(id, peers))) == 1
            assert b.server is not None
            assert len(b.server._sessions) == 1

    run(scenario)


def test_unreachable_names_every_cause() -> None:
    async def scenario() -> None:
        pool = PeerPool(RealEnv())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        endpoints = [f"tcp://127.0.0.1:{port}", "shm://0/x"]
        problem = await expect(Code.UNREACHABLE, pool.get(endpoints))
        assert "tcp: " in problem.message
        assert "refused" in problem.message.lower()
        assert "shm: another host" in problem.message
        await expect(Code.UNREACHABLE, pool.get([]))
        await expect(Code.UNREACHABLE, pool.get(["nonsense"]))
        (choice, *_) = pool.choices()
        assert choice.transport == ""
        await pool.close()
        await expect(Code.SHUTTING_DOWN, pool.get(endpoints))

    run(scenario)


def test_o15_silent_server_costs_a_second_once() -> None:
    """A server that accepts and is silent costs one timeout, not one per call."""

    async def scenario() -> None:
        pool = PeerPool(RealEnv())
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:  # never accepts
            endpoints = [f"tcp://127.0.0.1:{listener.getsockname()[1]}"]
            began = loop.time()
            calls = [expect(Code.UNREACHABLE, pool.get(endpoints)) for _ in range(20)]
            await asyncio.gather(*calls)
            assert 0.9 < loop.time() - began < 1.5
            await asyncio.sleep(0.02)  # until the failure is forgotten
            dialling = asyncio.ensure_future(pool.get(endpoints))
            await asyncio.sleep(0.3)
            await pool.close()
            await expect(Code.SHUTTING_DOWN, dialling)

    run(scenario)


def test_dead_server_is_not_stormed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        pool = PeerPool(RealEnv())
        dials = 0
        original = PeerPool._dial_any

        async def counted(self: PeerPool, *arguments: object) -> object:
            nonlocal dials
            dials += 1
            return await original(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(PeerPool, "_dial_any", counted)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            endpoints = [f"tcp://127.0.0.1:{listener.getsockname()[1]}"]
        end = asyncio.get_running_loop().time() + 0.3
        attempts = 0
        while asyncio.get_running_loop().time() < end:
            await expect(Code.UNREACHABLE, pool.get(endpoints))
            attempts += 1
            await asyncio.sleep(0.001)
        assert attempts > 50
        assert 3 <= dials <= 20
        await pool.close()

    run(scenario)


@pytest.mark.parametrize(
    "endpoint", ["", "tcp://", "tcp://host", "tcp://host:99999", "shm://key", "127.0.0.1:80"]
)
def test_what_is_no_endpoint_is_said_to_be_none(endpoint: str) -> None:
    with pytest.raises(EmberfsError) as caught:
        parse(endpoint)
    assert caught.value.code is Code.CONFIG


def test_ipv6_endpoints() -> None:
    assert parse("tcp://[::1]:80")[:3] == ("tcp", "::1", 80)

    async def scenario() -> None:
        server = Server(RealEnv(), {}, name="six")
        try:
            endpoint = await server.listen("tcp://[::1]:0")
        except OSError:
            pytest.skip("no IPv6 here")
        pool = PeerPool(RealEnv())
        assert not (await pool.get([endpoint])).closed
        await pool.close()
        await server.close()

    run(scenario)


def test_address_in_use_is_a_clear_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench("tcp") as b:
            assert b.server is not None
            with pytest.raises(OSError, match="cannot listen on"):
                await b.server.listen(b.endpoint)
            path = f"shm://{tmp_path}/x.sock"
            await b.server.listen(path)
            with pytest.raises(OSError, match="another server listens"):
                await b.server.listen(path)
            await expect(Code.CONFIG, b.server.listen(f"shm:///{'x' * 200}"))
            await expect(Code.CONFIG, b.server.listen("ftp://127.0.0.1:1"))
            (tmp_path / "file").write_text("precious")
            with pytest.raises(OSError, match="something else has this name"):
                await b.server.listen(f"shm://{tmp_path}/file")

    run(scenario)
    assert (tmp_path / "file").read_text() == "precious"
    assert not (tmp_path / "x.sock").exists()


# ---------------------------------------------------------------- a real process that dies


SERVER = """
import asyncio, sys
import uvloop
from emberfs.fabric.server import Server
from emberfs.runtime.real import RealEnv

async def stare(call):
    await asyncio.Event().wait()

async def echo(call):
    return bytes(call.body)

async def live():
    server = Server(RealEnv(), {1: echo, 2: stare}, name="victim")
    print(await server.listen(sys.argv[1]), flush=True)
    await asyncio.Event().wait()

uvloop.run(live())
"""


def start(endpoint: str) -> tuple["subprocess.Popen[str]", str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, endpoint], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate(timeout=5)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_c11_killed_server_is_noticed_at_once_and_found_again(
    transport: str, tmp_path: Path
) -> None:
    """A killed server is noticed at once, and found again when it is back."""
    listen_on = "tcp://127.0.0.1:0" if transport == "tcp" else f"shm://{tmp_path}/x.sock"
    process, endpoint = start(listen_on)
    started = [process]

    async def scenario() -> None:
        pool = PeerPool(RealEnv())
        peer = await pool.get([endpoint])
        region = Region(8192)
        sink = region.slice(0, 4096)
        calls = [
            asyncio.ensure_future(peer.call(2, b"", sinks=[sink], timeout_ns=10 * SECOND))
            for _ in range(3)
        ]
        assert (await peer.call(ECHO, b"a", timeout_ns=SECOND)).body == b"a"
        os.kill(process.pid, signal.SIGKILL)
        began = asyncio.get_running_loop().time()
        for call in calls:
            await expect(Code.DISCONNECTED, call)
        assert asyncio.get_running_loop().time() - began < 0.5
        assert not region.abandoned  # the kernel has taken its mapping down
        await expect(Code.UNREACHABLE, pool.get([endpoint]))
        started.append((await asyncio.to_thread(start, endpoint))[0])
        await asyncio.sleep(0.02)
        again = await pool.get([endpoint])
        assert (await again.call(ECHO, b"b", timeout_ns=SECOND)).body == b"b"
        region.close()
        await pool.close()

    try:
        run(scenario)
    finally:
        for one in started:
            end(one)


def test_stopped_server_is_a_timeout_and_taints_shared_memory(tmp_path: Path) -> None:
    process, endpoint = start(f"shm://{tmp_path}/x.sock")
    pid = process.pid

    async def scenario() -> None:
        pool = PeerPool(RealEnv())
        peer = await pool.get([endpoint])
        region, other = Region(8192), Region(8192)
        assert (await peer.call(ECHO, b"a", timeout_ns=SECOND)).body == b"a"
        os.kill(pid, signal.SIGSTOP)
        sink = region.slice(0, 10)
        await expect(Code.TIMEOUT, peer.call(2, b"", sinks=[sink], timeout_ns=50 * MS))
        assert region.abandoned
        assert peer.closed
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.02)
        peer = await pool.get([endpoint])
        await expect(Code.INVALID, peer.call(ECHO, b"", sinks=[sink], timeout_ns=SECOND))
        # A write that is repeated carries the same memory: refused, its bytes would be lost.
        assert (await peer.call(ECHO, b"w", sources=[sink], timeout_ns=SECOND)).body == b"w"
        sink = other.slice(0, 10)
        assert (await peer.call(ECHO, b"b", sinks=[sink], timeout_ns=SECOND)).body == b"b"
        region.close()
        other.close()
        await pool.close()

    try:
        run(scenario)
    finally:
        end(process)
