"""Frames survive the way there and back, and nothing malformed gets through as something else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberfs.fabric import call, frame
from emberfs.fabric.frame import HEADER_BYTES, Header, Hello, Kind, Registration
from emberfs.proto.errors import Code, EmberfsError

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
descriptor = st.tuples(u32, u64, u32)


def parse(raw: bytes) -> tuple[Header, bytes]:
    header = frame.decode_header(memoryview(raw)[:HEADER_BYTES])
    return header, raw[HEADER_BYTES:]


def test_bounds_are_those_of_the_contract() -> None:
    for name in ("BODY_BYTES_MAX", "PAYLOAD_BYTES_MAX", "SINKS_MAX", "SOURCES_MAX"):
        assert getattr(frame, name) == getattr(call, name)


def test_header_has_the_documented_size() -> None:
    assert HEADER_BYTES == 48


@given(
    st.integers(1, 2**64 - 1),
    st.integers(0, 65535),
    st.binary(max_size=300),
    st.lists(descriptor, max_size=5),
    st.lists(descriptor, max_size=40),
    st.integers(0, frame.PAYLOAD_BYTES_MAX),
    st.integers(-5, 2**40),
)
def test_request_comes_back(
    request: int,
    method: int,
    body: bytes,
    sources: list[tuple[int, int, int]],
    sinks: list[tuple[int, int, int]],
    payload: int,
    timeout_ms: int,
) -> None:
    flat = [field for one in sources + sinks for field in one]
    raw = frame.encode_request(
        request,
        method,
        body,
        sources=len(sources),
        sinks=len(sinks),
        descriptors=frame.pack_descriptors(flat),
        payload_bytes=payload,
        timeout_ms=timeout_ms,
    )
    header, tail = parse(raw)
    assert (header.kind, header.request, header.method) == (Kind.REQUEST, request, method)
    assert (header.sources, header.sinks, header.payload_bytes) == (
        len(sources),
        len(sinks),
        payload,
    )
    assert header.timeout_ms == max(1, min(timeout_ms, 2**32 - 1))
    assert header.tail_bytes == len(tail)
    pulled, filled = frame.split_descriptors(header, tail)
    assert list(pulled) == [field for one in sources for field in one]
    assert list(frame.iter_descriptors(filled)) == sinks
    assert tail[header.descriptor_bytes :] == body


@given(st.lists(st.integers(0, 5000), max_size=30), st.binary(max_size=50))
def test_reply_comes_back(filled: list[int], body: bytes) -> None:
    sizes = [count + 3 for count in filled]
    header, tail = parse(frame.encode_reply(7, body, filled, sum(filled)))
    assert list(frame.unpack_filled(header, tail, sizes)) == filled
    assert tail[header.descriptor_bytes :] == body
    header, tail = parse(frame.encode_reply(7, body, None, sum(sizes)))
    assert frame.unpack_filled(header, tail, sizes) is sizes


def test_reply_that_does_not_fit_its_sinks_is_malformed() -> None:
    header, tail = parse(frame.encode_reply(7, b"", [10, 20], 30))
    for sizes in ([10], [10, 19], [9, 20], [10, 20, 0], []):
        with pytest.raises(EmberfsError, match="REPLY fills"):
            frame.unpack_filled(header, tail, sizes)


def test_small_frames_come_back() -> None:
    header, tail = parse(frame.encode_error(9, EmberfsError(Code.NO_SPACE, "disk full: é")))
    problem = frame.decode_error(tail)
    assert (header.kind, problem.code, problem.message) == (
        Kind.ERROR,
        Code.NO_SPACE,
        "disk full: é",
    )
    _, tail = parse(frame.encode_error(9, EmberfsError(Code.DISK, "x" * 100_000)))
    assert len(tail) <= frame.MESSAGE_BYTES_MAX + 4
    hello = Hello(1, "0123", "storage 7")
    assert frame.decode_hello(parse(frame.encode_hello(hello))[1]) == hello
    registration = Registration(5, 4096, 77)
    assert frame.decode_register(parse(frame.encode_register(registration))[1]) == registration
    assert frame.decode_unregister(parse(frame.encode_unregister(5))[1]) == 5


def test_other_version_is_told_apart_from_noise() -> None:
    raw = bytearray(frame.encode_header(Kind.CANCEL, 1))
    raw[4] = 9
    with pytest.raises(EmberfsError, match="protocol 9, this side 1") as caught:
        parse(bytes(raw))
    assert caught.value.code is Code.UNSUPPORTED


@pytest.mark.parametrize(
    "fields",
    [
        {"body_bytes": frame.BODY_BYTES_MAX + 1},
        {"payload_bytes": frame.PAYLOAD_BYTES_MAX + 1},
        {"sources": frame.SOURCES_MAX + 1},
        {"sinks": frame.SINKS_MAX + 1},
    ],
)
def test_oversized_header_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(EmberfsError) as caught:
        parse(frame.encode_header(Kind.REQUEST, 1, **fields))  # type: ignore[arg-type]
    assert caught.value.code is Code.TOO_LARGE


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.ERROR, Kind.CANCEL, Kind.REGISTER])
def test_small_kinds_carry_nothing_else(kind: Kind) -> None:
    with pytest.raises(EmberfsError, match="descriptors or payload"):
        parse(frame.encode_header(kind, 1, payload_bytes=1))


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_every_flipped_bit_of_a_header_is_noticed(bit: int) -> None:
    raw = bytearray(frame.encode_header(Kind.REQUEST, 12, method=3, body_bytes=5, timeout_ms=7))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(EmberfsError):
        parse(bytes(raw))


@given(st.integers(0, 32 * 8 - 1))
def test_every_flipped_bit_of_a_descriptor_is_noticed(bit: int) -> None:
    packed = frame.pack_descriptors([1, 2, 3, 4, 5, 6])
    raw = frame.encode_request(
        1, 1, b"", sources=1, sinks=1, descriptors=packed, payload_bytes=0, timeout_ms=1
    )
    header, tail = parse(raw)
    damaged = bytearray(tail)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(EmberfsError, match="checksum of the descriptors"):
        frame.split_descriptors(header, bytes(damaged))


@settings(max_examples=300)
@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_raises_nothing_but_our_error(raw: bytes) -> None:
    with pytest.raises(EmberfsError):
        parse(raw)


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_noise_in_bodies_raises_nothing_but_our_error(body: bytes) -> None:
    for decode in (
        frame.decode_hello,
        frame.decode_error,
        frame.decode_register,
        frame.decode_unregister,
    ):
        try:
            decode(body)
        except EmberfsError as problem:
            if problem.code is not Code.MALFORMED:
                raise
