"""Frames over real sockets: any bytes cost one connection, and nobody else notices."""

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberfs.fabric import frame
from emberfs.fabric.frame import Header, Hello, Kind, Registration
from emberfs.proto import batch_calls, meta_calls, storage_calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.method import Method
from fuzz.profile import budget
from fuzz.strategies import ANY_INT, U16, U32, U63, U64, damaged
from unit.fabric_conformance import ECHO, FILL, TRANSPORTS, Bench, bench, until
from unit.test_fabric_hostile import HELLO, RawCaller, memfd, register, send_with_fd

DEEP = b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0"  # an unknown field, nested
NOT_UTF8 = b"\x83\xa7version\x01\xa8host_key\xa1h\xa4name\xa1\x82"
EXPECTED = (Code.MALFORMED, Code.TOO_LARGE, Code.UNSUPPORTED)


@st.composite
def frames(draw: Any) -> bytes:
    """A frame whose header is sound, with any contents."""
    body = draw(st.binary(max_size=40))
    flat = draw(st.lists(st.tuples(st.sampled_from((0, 3, 7)), U64, U32), max_size=3))
    numbers = [number for one in flat for number in one]
    sources = draw(st.integers(0, len(flat)))
    descriptors = frame.pack_descriptors(numbers)
    payload = draw(st.sampled_from((0, 10, 4096)))
    header = frame.encode_header(
        draw(st.sampled_from(list(Kind))),
        draw(st.sampled_from((0, 1, 2)) | U64),
        method=draw(st.sampled_from((ECHO, FILL)) | U16),
        body_bytes=draw(st.sampled_from((len(body), len(body), frame.BODY_BYTES_MAX)) | U32),
        sources=sources,
        sinks=len(flat) - sources,
        timeout_ms=draw(U32),
        payload_bytes=payload,
        flags=draw(st.sampled_from((0, 1, 2, 2**16 - 1))),
        descriptors=descriptors,
    )
    return header + descriptors + body + bytes(payload)


SMALL = st.one_of(
    frames(),
    st.builds(Registration, U32, U64, U64).map(frame.encode_register),
    U32.map(frame.encode_unregister),
    U64.map(lambda number: frame.encode_header(Kind.CANCEL, number)),
    st.just(HELLO),
    st.binary(max_size=200),
)
STREAMS = st.lists(SMALL, min_size=1, max_size=5).map(b"".join)


@budget(300)
@given(st.binary(min_size=48, max_size=48) | damaged(frames()).map(lambda raw: raw[:48].ljust(48)))
def test_o23_any_header_is_bounded_or_refused(raw: bytes) -> None:
    """A header that is accepted announces nothing beyond the limits."""
    try:
        header = frame.decode_header(memoryview(raw))
    except EmberfsError as problem:
        code = problem.code
    else:
        assert isinstance(header, Header)
        assert header.body_bytes <= frame.BODY_BYTES_MAX
        assert header.payload_bytes <= frame.PAYLOAD_BYTES_MAX
        return
    assert code in EXPECTED


METHODS = [
    method
    for module in (meta_calls, batch_calls, storage_calls)
    for method in vars(module).values()
    if isinstance(method, Method)
]


@pytest.mark.parametrize("body", [DEEP, NOT_UTF8, b"\x81\xa1\xff\xc0", b"\xc1", b""])
def test_o23_nesting_and_text_that_is_not_utf8_are_malformed(body: bytes) -> None:
    """msgspec raises RecursionError and UnicodeDecodeError for these: no decoder lets them out."""
    decoders: list[Callable[[bytes], Any]] = [frame.decode_hello]
    for method in METHODS:
        decoders += [method.decode_request, method.decode_answer]
    for decode in decoders:
        code = Code.MALFORMED
        try:
            decode(body)  # a message without required fields may skip what it does not know
        except EmberfsError as problem:
            code = problem.code
        assert code is Code.MALFORMED
    with pytest.raises(EmberfsError):
        frame.decode_hello(body)


@pytest.mark.parametrize("name", ["x" * 256, "a\nb", "\x1b[2J"])
def test_a_hello_cannot_write_into_the_log(name: str) -> None:
    """A peer's name goes into log lines: it must fit into one."""
    body = msgspec.msgpack.encode(Hello(1, "h", name))
    with pytest.raises(EmberfsError) as raised:
        frame.decode_hello(body)
    assert raised.value.code is Code.MALFORMED


def run(transport: str, scenario: Callable[[Bench, asyncio.Runner], None]) -> None:
    """Run a blocking scenario beside a server whose loop runs when the scenario asks for it."""
    with asyncio.Runner() as runner:
        made = bench(transport)
        b = runner.run(made.__aenter__())
        try:
            scenario(b, runner)
        finally:
            runner.run(made.__aexit__(None, None, None))


async def talk(b: Bench, data: bytes, chunk: int, greet: bool) -> None:
    """Send in pieces of `chunk` bytes, wait for what the server says to it, hang up."""
    caller = await RawCaller.connect(b, greet=greet)
    try:
        for at in range(0, len(data), chunk):
            await caller.send(data[at : at + chunk])
            await asyncio.sleep(0)
    except ConnectionError:
        pass
    finally:
        caller.sock.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_s11_o23_no_stream_of_bytes_hurts_others(
    transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Arbitrary and damaged conversations: the server lives, leaks nothing, logs no traceback."""

    def scenario(b: Bench, runner: asyncio.Runner) -> None:
        assert b.server is not None
        pool = b.server.pool
        runner.run(check(b))
        files, before = open_files(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        @budget(120)
        @given(STREAMS | damaged(STREAMS), st.sampled_from((7, 48, 100_000)), st.booleans())
        def tried(data: bytes, chunk: int, greet: bool) -> None:
            runner.run(within(talk(b, data, chunk, greet)))

        tried()
        runner.run(within(until(lambda: pool.taken_bytes == 0 and open_files() <= files)))
        runner.run(check(b))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 200 * 1024, f"{grown} KiB more"

    async def check(b: Bench) -> None:
        assert (await b.call(ECHO, b"fine")).body == b"fine"

    async def within(work: Awaitable[None]) -> None:
        async with asyncio.timeout(10):
            await work

    with caplog.at_level(logging.WARNING):
        run(transport, scenario)
    for record in caplog.records:
        assert record.exc_info is None, record
        assert "closing the connection" in record.getMessage()


def test_s11_hostile_regions_never_kill_the_server(tmp_path: Path) -> None:
    """Any descriptor with any announced id and size: refused or mapped, and never a SIGBUS."""

    def descriptor(kind: str) -> int:
        match kind:
            case "sealed":
                return memfd()
            case "unsealed":
                return memfd(seal=0)
            case "empty":
                return memfd(size_bytes=0)
            case "huge":
                return memfd(size_bytes=1 << 46)
            case "socket":
                return socket.socket().detach()
            case "directory":
                return os.open(tmp_path, os.O_RDONLY)
            case "pipe":
                read, write = os.pipe()
                os.close(write)
                return read
        return os.open("/dev/zero", os.O_RDWR)

    async def attack(b: Bench, kind: str, region: int, size: int, offset: int) -> None:
        caller = await RawCaller.connect(b)
        fd = descriptor(kind)
        try:
            number = max(1, region)
            send_with_fd(caller.sock, register(fd, number, max(1, size)), fd)
            if kind == "unsealed":
                os.ftruncate(fd, 0)
            sink = frame.pack_descriptors([number, offset, 4096])
            ask = frame.encode_request(
                1, FILL, b"", sources=0, sinks=1, descriptors=sink, payload_bytes=0, timeout_ms=1000
            )
            await caller.send(ask)
            async with asyncio.timeout(5):
                header, _ = await caller.receive()
            assert header.kind in (Kind.REPLY, Kind.ERROR)
        finally:
            os.close(fd)
            caller.sock.close()

    kinds = ("sealed", "unsealed", "empty", "huge", "socket", "directory", "pipe", "device")

    def scenario(b: Bench, runner: asyncio.Runner) -> None:
        files = open_files()

        @budget(100)
        @given(
            st.sampled_from(kinds),
            U32,
            st.sampled_from((8192, 8192, 4096, 1 << 46)) | U64,
            st.sampled_from((0, 4096, 4097)) | U64,
        )
        def tried(kind: str, region: int, size: int, offset: int) -> None:
            runner.run(attack(b, kind, region, size, offset))

        tried()

        async def after() -> None:
            assert (await b.call(ECHO, b"fine")).body == b"fine"
            await until(lambda: open_files() <= files + 8)

        runner.run(after())

    run("shm", scenario)


@budget(100)
@given(ANY_INT, U63, st.binary(max_size=30))
def test_o23_bodies_of_small_frames(number: int, other: int, noise: bytes) -> None:
    """Bodies of ERROR, REGISTER, UNREGISTER and HELLO: parsed or MALFORMED."""
    packed = msgspec.msgpack.encode({"version": number, "host_key": other, "name": noise})
    for body in (noise, packed):
        for decode in (
            frame.decode_error,
            frame.decode_register,
            frame.decode_unregister,
            frame.decode_hello,
        ):
            code = Code.MALFORMED
            try:
                decode(body)
            except EmberfsError as problem:
                code = problem.code
            assert code is Code.MALFORMED
