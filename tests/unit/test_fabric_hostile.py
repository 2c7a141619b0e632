"""Callers and servers that misbehave: only their own connection suffers, nothing else is lost."""

import array
import asyncio
import fcntl
import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from emberfs.fabric import frame, session, shared
from emberfs.fabric.buffers import BufferPool
from emberfs.fabric.endpoint import parse
from emberfs.fabric.frame import HEADER_BYTES, Header, Hello, Kind, Registration
from emberfs.fabric.peer import StreamPeer
from emberfs.fabric.pool import PeerPool
from emberfs.fabric.region import Region
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, KiB, MiB
from emberfs.runtime.real import RealEnv
from unit.fabric_conformance import (
    ECHO,
    FILL,
    GATE,
    SCRIBBLE,
    TRANSPORTS,
    Bench,
    bench,
    expect,
    until,
)

HELLO = frame.encode_hello(Hello(frame.PROTOCOL_VERSION, "elsewhere", "attacker"))


def run(transport: str, scenario: Callable[[Bench], Awaitable[None]]) -> None:
    async def live() -> None:
        async with asyncio.timeout(20), bench(transport) as made:
            await scenario(made)

    uvloop.run(live())


class RawCaller:
    """A blocking-free socket that speaks whatever it likes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, b: Bench, *, greet: bool = True) -> "RawCaller":
        parts = parse(b.endpoint)
        if parts.scheme == "tcp":
            sock = socket.create_connection((parts.host, parts.port))
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(parts.path)
        sock.setblocking(False)
        made = cls(sock)
        if greet:
            await made.send(HELLO)
            header, _ = await made.receive()
            assert header.kind is Kind.HELLO
        return made

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    async def exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            more = await self.loop.sock_recv(self.sock, count - len(got))
            if not more:
                raise EOFError
            got += more
        return got

    async def receive(self) -> tuple[Header, bytes]:
        header = frame.decode_header(memoryview(await self.exactly(HEADER_BYTES)))
        return header, await self.exactly(header.tail_bytes + header.payload_bytes)

    async def error(self) -> EmberfsError:
        header, tail = await self.receive()
        assert header.kind is Kind.ERROR
        return frame.decode_error(tail)

    async def at_end(self) -> bool:
        try:
            return await self.loop.sock_recv(self.sock, 1) == b""
        except ConnectionError:
            return True


def request(
    method: int = ECHO,
    body: bytes = b"",
    sources: tuple[int, ...] = (),
    sinks: tuple[int, ...] = (),
    payload: int = 0,
    number: int = 1,
) -> bytes:
    return frame.encode_request(
        number,
        method,
        body,
        sources=len(sources) // 3,
        sinks=len(sinks) // 3,
        descriptors=frame.pack_descriptors(sources + sinks),
        payload_bytes=payload,
        timeout_ms=5000,
    )


MALFORMED = {
    "noise": os.urandom(200),
    "text": b"GET / HTTP/1.1\r\nHost: example.org\r\nUser-Agent: a browser\r\n\r\n",
    "oversized body": frame.encode_header(Kind.REQUEST, 1, body_bytes=1 << 31),
    "oversized payload": frame.encode_header(Kind.REQUEST, 1, payload_bytes=1 << 50),
    "payload without source": request(payload=10) + bytes(10),
    "source without payload": request(sources=(0, 0, 10)),
    "a reply to a server": frame.encode_reply(1, b"", None, 0),
    "second HELLO": HELLO,
    "HELLO of noise": frame.encode_header(Kind.HELLO, 0, body_bytes=3) + b"\xff\xff\xff",
    "request 0": request(number=0),
    "damaged descriptors": request(sinks=(0, 0, 10))[:-1] + b"\x7f",
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", MALFORMED)
def test_o23_malformed_frame_costs_one_connection_and_one_log_line(
    name: str, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A malformed frame costs its own connection and nothing else."""

    async def scenario(b: Bench) -> None:
        honest = asyncio.ensure_future(b.call(GATE))
        await until(lambda: b.running == 1)
        caller = await RawCaller.connect(b)
        await caller.send(MALFORMED[name])
        problem = await caller.error()
        assert problem.code in (Code.MALFORMED, Code.TOO_LARGE)
        assert await caller.at_end()
        caller.sock.close()
        b.gate.set()
        await honest
        assert (await b.call(ECHO, b"fine")).body == b"fine"

    with caplog.at_level(logging.WARNING):
        run(transport, scenario)
    assert len(caplog.records) == 1, caplog.text
    assert "closing the connection" in caplog.text


def test_connection_is_not_closed_while_a_handler_uses_the_callers_memory() -> None:
    """A caller takes the end of the connection for the end of all access to its memory."""

    async def scenario(b: Bench) -> None:
        caller = await RawCaller.connect(b)
        fd = memfd()
        send_with_fd(caller.sock, register(fd), fd)
        await caller.send(request(SCRIBBLE, sinks=(7, 0, 4096)))
        await asyncio.sleep(0.02)
        await caller.send(bytes(48))
        header, _ = await caller.receive()  # the handler's own end comes first
        assert (header.kind, header.request) == (Kind.ERROR, 1)
        assert (await caller.error()).code is Code.MALFORMED
        assert b.cancelled == 1
        os.pwrite(fd, bytes(4096), 0)
        assert await caller.at_end()
        assert os.pread(fd, 4096, 0) == bytes(4096)
        os.close(fd)
        caller.sock.close()

    run("shm", scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_other_protocol_version_is_told_so(transport: str) -> None:
    async def scenario(b: Bench) -> None:
        caller = await RawCaller.connect(b, greet=False)
        await caller.send(HELLO[:4] + b"\x63" + HELLO[5:])
        problem = await caller.error()
        assert problem.code is Code.UNSUPPORTED
        assert "protocol 99, this side 1" in problem.message
        caller.sock.close()

    run(transport, scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_request_before_hello_is_refused(transport: str) -> None:
    async def scenario(b: Bench) -> None:
        caller = await RawCaller.connect(b, greet=False)
        await caller.send(request())
        assert (await caller.error()).code is Code.MALFORMED
        assert b.running == 0
        caller.sock.close()

    run(transport, scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_o23_fuzzed_conversations_never_hurt_others(transport: str) -> None:
    """Damaged conversations never hurt the others' connections.

    Valid conversations, cut, spliced and damaged at random places.
    """

    async def scenario(b: Bench) -> None:
        dice = random.Random(5)
        pieces = [
            request(ECHO, b"abc", (0, 0, 100), (), 100) + bytes(100),
            request(FILL, b"", (), (0, 0, 5000, 0, 0, 0), number=2),
            request(FILL, b"", (), (77, 1 << 40, 5000), number=3),
            frame.encode_header(Kind.CANCEL, 2),
            frame.encode_register(Registration(3, 4096, 1)),
            frame.encode_unregister(3),
        ]
        for _ in range(150):
            chosen = dice.choices(pieces, k=dice.randrange(1, 6))
            data = bytearray(b"".join([HELLO, *chosen]))
            for _ in range(dice.randrange(3)):
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            del data[dice.randrange(len(data)) :]
            caller = await RawCaller.connect(b, greet=False)
            try:
                await caller.send(bytes(data))
                if dice.random() < 0.3:
                    await asyncio.sleep(0)
            except ConnectionError:
                pass
            caller.sock.close()
        assert (await b.call(ECHO, b"fine")).body == b"fine"
        assert b.server is not None
        pool = b.server.pool
        await until(lambda: pool.taken_bytes == 0)

    logging.getLogger("emberfs.fabric.session").setLevel(logging.ERROR)
    try:
        run(transport, scenario)
    finally:
        logging.getLogger("emberfs.fabric.session").setLevel(logging.NOTSET)


# ---------------------------------------------------------------- regions


def send_with_fd(sock: socket.socket, data: bytes, fd: int) -> None:
    rights = array.array("i", [fd])
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def register(fd: int, region: int = 7, size_bytes: int = 8192) -> bytes:
    return frame.encode_register(Registration(region, size_bytes, os.fstat(fd).st_ino))


def memfd(*, seal: int = fcntl.F_SEAL_SHRINK, size_bytes: int = 8192) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    return fd


@pytest.mark.parametrize(
    ("seal", "size_bytes", "why"),
    [
        (fcntl.F_SEAL_GROW, 8192, "not sealed against shrinking"),
        (fcntl.F_SEAL_SHRINK, 4096, "announced size"),
        (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE, 8192, "not permitted"),
    ],
)
def test_region_that_could_kill_the_server_is_refused(seal: int, size_bytes: int, why: str) -> None:
    async def scenario(b: Bench) -> None:
        caller = await RawCaller.connect(b)
        fd = memfd(seal=seal, size_bytes=size_bytes)
        send_with_fd(caller.sock, register(fd), fd)
        await caller.send(request(FILL, sinks=(7, 0, 100)))
        problem = await caller.error()
        assert problem.code is Code.INVALID
        assert why in problem.message
        os.close(fd)
        caller.sock.close()

    run("shm", scenario)


def test_plain_file_is_no_region(tmp_path: Path) -> None:
    async def scenario(b: Bench) -> None:
        caller = await RawCaller.connect(b)
        path = tmp_path / "file"
        path.write_bytes(bytes(8192))
        fd = os.open(path, os.O_RDWR)
        send_with_fd(caller.sock, register(fd), fd)
        os.close(fd)
        await caller.send(register(0))  # and one whose descriptor never comes
        await caller.send(request(FILL, sinks=(7, 0, 100)))
        assert (await caller.error()).code is Code.INVALID
        caller.sock.close()

    run("shm", scenario)


def test_all_regions_of_a_connection_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(b: Bench) -> None:
        caller = await RawCaller.connect(b)
        fds = [memfd() for _ in range(3)]

        for region, fd in enumerate(fds, start=1):
            send_with_fd(caller.sock, register(fd, region), fd)
        await caller.send(request(FILL, sinks=(3, 0, 100)))
        problem = await caller.error()
        assert problem.code is Code.INVALID
        assert "the limit is 16384 bytes in all regions" in problem.message
        await caller.send(request(FILL, sinks=(2, 0, 100)))
        assert (await caller.receive())[0].kind is Kind.REPLY
        await caller.send(frame.encode_unregister(1) + frame.encode_unregister(3))
        send_with_fd(caller.sock, register(fds[2], 4), fds[2])  # there is room again
        await caller.send(request(FILL, sinks=(4, 0, 100)))
        assert (await caller.receive())[0].kind is Kind.REPLY
        for fd in fds:
            os.close(fd)
        caller.sock.close()

    monkeypatch.setattr(shared, "SHARED_BYTES_MAX", 16384)
    run("shm", scenario)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 8193), (8192, 1), (1 << 63, 1), (2**64 - 1, 2), (8000, 193)]
)
def test_descriptor_outside_its_region_is_refused(offset: int, length: int) -> None:
    async def scenario(b: Bench) -> None:
        caller = await RawCaller.connect(b)
        fd = memfd()
        send_with_fd(caller.sock, register(fd), fd)
        for sources, sinks in (((7, offset, length), ()), ((), (7, offset, length))):
            await caller.send(request(FILL, sources=sources, sinks=sinks))
            problem = await caller.error()
            assert problem.code is Code.INVALID
            assert "outside region" in problem.message
        await caller.send(request(FILL, sinks=(7, 8000, 192)))  # the last bytes are fine
        assert (await caller.receive())[0].kind is Kind.REPLY
        assert os.pread(fd, 192, 8000) == b"\x01" * 192
        os.close(fd)
        caller.sock.close()

    run("shm", scenario)


def test_regions_do_not_exist_on_tcp() -> None:
    async def scenario(b: Bench) -> None:
        caller = await RawCaller.connect(b)
        await caller.send(request(FILL, sinks=(7, 0, 100)))
        assert (await caller.error()).code is Code.INVALID
        caller.sock.close()

    run("tcp", scenario)


def test_region_closed_by_the_caller_is_forgotten_by_the_server() -> None:
    async def scenario(b: Bench) -> None:
        def mapped() -> int:
            return Path("/proc/self/maps").read_text().count("memfd:emberfs")

        region = Region(64 * KiB)
        before = mapped()
        await b.call(FILL, sinks=[region.slice(0, 10)])
        assert mapped() == before + 1
        region.close()
        assert (await b.call(ECHO, b"x")).body == b"x"
        await until(lambda: mapped() == before - 1)

    run("shm", scenario)


# ---------------------------------------------------------------- back pressure


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_c3_slow_reader_is_not_read_from(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that reads no answers is not read from: its memory at the server is bounded.

    A caller that takes no replies stops being served, and is cut off in the end.
    """
    monkeypatch.setattr(session, "HELD_BYTES_MAX", 16 * MiB)
    monkeypatch.setattr(session, "STALL_NS", 300 * MS)

    async def scenario(b: Bench) -> None:
        assert b.server is not None
        pool = b.server.pool
        caller = await RawCaller.connect(b)
        asks = [request(FILL, sinks=(0, 0, MiB), number=n) for n in range(1, 101)]
        sending = asyncio.ensure_future(caller.send(b"".join(asks)))
        peak = 0
        for _ in range(20):
            await asyncio.sleep(0.01)
            peak = max(peak, pool.taken_bytes)
        assert 0 < peak <= 16 * MiB  # and not 100 MiB
        assert (await b.call(ECHO, b"fine")).body == b"fine"
        await until(lambda: pool.taken_bytes == 0, seconds=4)
        sending.cancel()
        caller.sock.close()

    run(transport, scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_slow_reader_gets_everything(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "HELD_BYTES_MAX", 4 * MiB)
    monkeypatch.setattr(session, "OUTPUT_BYTES_MAX", 2 * MiB)

    async def scenario(b: Bench) -> None:
        caller = await RawCaller.connect(b)
        asks = [request(FILL, sinks=(0, 0, MiB), number=n) for n in range(1, 31)]
        await caller.send(b"".join(asks))
        got = set()
        for _ in range(30):
            header, data = await caller.receive()
            got.add(header.request)
            assert data[-MiB:] == b"\x01" * MiB
        assert got == set(range(1, 31))
        caller.sock.close()

    run(transport, scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_c3_r8_empty_buffer_pool_makes_callers_wait_or_fail(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no buffer left callers wait or are refused; afterwards all is well."""
    monkeypatch.setattr(session, "POOL_WAIT_NS", 100 * MS)

    async def live() -> None:
        pool = BufferPool(1 * MiB)
        async with asyncio.timeout(20), bench(transport, pool) as b:
            source = memoryview(b"a" * MiB)
            first = asyncio.ensure_future(b.call(GATE, b"", [source]))
            await until(lambda: b.running == 1)
            others = PeerPool(b.env)
            other = await others.get([b.endpoint])
            work = other.call(GATE, b"", sources=[source], timeout_ns=SECOND)
            await expect(Code.OVERLOADED, work)
            second = asyncio.ensure_future(b.call(GATE, b"", [source]))
            await asyncio.sleep(0.02)
            b.gate.set()
            assert (await first).body == (await second).body == b"a"
            problem = await expect(Code.TOO_LARGE, b.call(ECHO, b"", [source, source]))
            assert "buffer pool" in problem.message
            monkeypatch.setattr(session, "POOL_WAIT_NS", SECOND)
            sinks = [memoryview(bytearray(300_000)) for _ in range(40)]
            many = [b.call(FILL, sinks=[sink]) for sink in sinks[:20]]
            many += [other.call(FILL, b"", sinks=[s], timeout_ns=SECOND) for s in sinks[20:]]
            await asyncio.gather(*many)
            assert all(sink[299_999] == 1 for sink in sinks)
            await until(lambda: pool.taken_bytes == 0)
            await others.close()
        pool.close()

    uvloop.run(live())


# ---------------------------------------------------------------- servers that misbehave


class FakeServer:
    """Accepts one connection, says HELLO, and then does what the test wants."""

    def __init__(self, transport: str, directory: Path) -> None:
        self.env = RealEnv()
        if transport == "tcp":
            self.listener = socket.create_server(("127.0.0.1", 0))
            self.endpoint = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        else:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(str(directory / "fake.sock"))
            self.listener.listen()
            self.endpoint = f"shm://{self.env.host_key}{directory}/fake.sock"
        self.listener.setblocking(False)

    async def meet(self, pool: PeerPool, *, host_key: str = "") -> tuple[StreamPeer, RawCaller]:
        dialling = asyncio.ensure_future(pool.get([self.endpoint]))
        sock, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        server = RawCaller(sock)
        assert (await server.receive())[0].kind is Kind.HELLO
        await server.send(frame.encode_hello(Hello(1, host_key or self.env.host_key)))
        peer = await dialling
        assert isinstance(peer, StreamPeer)
        return peer, server


def with_fake(
    transport: str, path: Path, scenario: Callable[[FakeServer, PeerPool], Awaitable[None]]
) -> None:
    async def live() -> None:
        fake = FakeServer(transport, path)
        pool = PeerPool(fake.env)
        async with asyncio.timeout(20):
            await scenario(fake, pool)
        await pool.close()
        fake.listener.close()

    uvloop.run(live())


def test_server_that_does_not_confirm_a_cancellation_taints_the_memory(tmp_path: Path) -> None:
    async def scenario(fake: FakeServer, pool: PeerPool) -> None:
        peer, server = await fake.meet(pool)
        region = Region(8192)
        began = asyncio.get_running_loop().time()
        sink = region.slice(0, 100)
        await expect(Code.TIMEOUT, peer.call(1, b"", sinks=[sink], timeout_ns=50 * MS))
        assert 1 <= asyncio.get_running_loop().time() - began < 2  # the grace period
        assert region.abandoned
        assert peer.closed
        server.sock.close()
        region.close()

    with_fake("shm", tmp_path, scenario)


def test_o13_c10_late_reply_does_not_reach_the_callers_memory(tmp_path: Path) -> None:
    """A reply that comes late does not reach memory its caller has taken back."""

    async def scenario(fake: FakeServer, pool: PeerPool) -> None:
        peer, server = await fake.meet(pool)
        sink = memoryview(bytearray(MiB))
        reply = frame.encode_reply(1, b"", None, MiB)
        call = asyncio.ensure_future(peer.call(1, b"", sinks=[sink], timeout_ns=100 * MS))
        await server.receive()
        await server.send(reply + b"\x11" * 300_000)
        await expect(Code.TIMEOUT, call)
        assert sink[299_999] == 0x11  # it landed directly, and before the deadline
        sink[:] = bytes(MiB)
        await server.send(b"\x11" * (MiB - 300_000))
        await server.send(frame.encode_reply(2, b"next", (), 0))
        assert (await peer.call(1, b"", timeout_ns=SECOND)).body == b"next"
        assert bytes(sink) == bytes(MiB)
        server.sock.close()

    with_fake("tcp", tmp_path, scenario)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sources_given_up_are_sent_as_they_were(transport: str, tmp_path: Path) -> None:
    """The server may not take for data what the caller put into its buffer after giving up."""

    async def scenario(fake: FakeServer, pool: PeerPool) -> None:
        peer, server = await fake.meet(pool)
        length = 40 * MiB
        source = memoryview(bytearray(b"\x22" * length))
        await expect(Code.TIMEOUT, peer.call(1, b"", sources=[source], timeout_ns=50 * MS))
        source[:] = bytes(length)
        header, data = await server.receive()
        assert header.kind is Kind.REQUEST
        assert data[-length:] == b"\x22" * length
        assert (await server.receive())[0].kind is Kind.CANCEL
        server.sock.close()

    with_fake(transport, tmp_path, scenario)


def test_server_that_takes_no_data_is_given_up(tmp_path: Path) -> None:
    async def scenario(fake: FakeServer, pool: PeerPool) -> None:
        peer, server = await fake.meet(pool)
        source = memoryview(bytearray(20 * MiB))
        await expect(Code.TIMEOUT, peer.call(1, b"", sources=[source], timeout_ns=50 * MS))
        assert not peer.closed
        await expect(Code.TIMEOUT, peer.call(1, b"", timeout_ns=1100 * MS))
        assert peer.closed
        server.sock.close()

    with_fake("tcp", tmp_path, scenario)


WRONG_ANSWERS = {
    "noise": os.urandom(100),
    "too much payload": frame.encode_reply(1, b"", None, 11) + bytes(11),
    "too many sinks": frame.encode_reply(1, b"", [1, 1], 2) + bytes(2),
    "more than a sink holds": frame.encode_reply(1, b"", [11], 11) + bytes(11),
    "a request": request(),
    "connection-level error": frame.encode_error(0, EmberfsError(Code.MALFORMED, "go away")),
    "reset": b"",
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_wrong_answer_ends_the_connection(name: str, transport: str, tmp_path: Path) -> None:
    async def scenario(fake: FakeServer, pool: PeerPool) -> None:
        peer, server = await fake.meet(pool)
        sink = memoryview(bytearray(10))
        call = asyncio.ensure_future(peer.call(1, b"", sinks=[sink], timeout_ns=5 * SECOND))
        await asyncio.sleep(0)
        if WRONG_ANSWERS[name]:
            await server.send(WRONG_ANSWERS[name])
        else:  # unread input makes the kernel send a reset
            await asyncio.sleep(0.01)
            server.sock.close()
        await expect(Code.DISCONNECTED, call)
        assert peer.closed
        assert bytes(sink) == bytes(10)
        server.sock.close()

    with_fake(transport, tmp_path, scenario)
