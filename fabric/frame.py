"""The bytes of a fabric frame: a fixed header, packed descriptors, the body; payload follows.

    header (48 bytes) | sources | sinks or filled | body | payload

Invariants: all integers are little-endian. The header carries a checksum of itself, so that its
lengths can be trusted before anything is read by them, and one of the descriptors, so that a
flipped bit cannot move data to another place in the caller's memory. The payload is covered by the
end-to-end checksums of the layers above. Every size is bounded before memory is taken for it.
"""

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from zlib import crc32

import msgspec

from emberfs.proto.bounds import UNDECODABLE
from emberfs.proto.errors import Code, EmberfsError, code_of
from emberfs.proto.ids import KiB, MiB

PROTOCOL_VERSION = 1
MAGIC = 0x42464D45  # "EMFB"

BODY_BYTES_MAX = 4 * MiB
PAYLOAD_BYTES_MAX = 64 * MiB
SINKS_MAX = 1024
SOURCES_MAX = 64
MESSAGE_BYTES_MAX = 4 * KiB
NAME_CHARACTERS_MAX = 255

STREAMED = 0  # region id of a buffer that travels in the stream itself
ALL_FILLED = 1  # flag of a REPLY: every sink is full, so no array of lengths follows

_HEADER = struct.Struct("<IBBHQIHHIQHHII")
HEADER_BYTES = _HEADER.size
_CHECKED = struct.Struct("<I")
_BEFORE_CHECK = HEADER_BYTES - _CHECKED.size
_PREFIX = struct.Struct("<IB")
DESCRIPTOR_BYTES = 16  # region, offset and bytes of a source or sink
_DESCRIPTOR = struct.Struct("<IQI")
_REGISTRATION = struct.Struct("<IQQ")
_CODE = struct.Struct("<i")
_TIMEOUT_MS_MAX = 0xFFFF_FFFF


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1  # first frame of each side; body: Hello
    REQUEST = 2  # body: the method's request; sources and sinks described
    REPLY = 3  # body: the method's answer; payload: the filled parts of streamed sinks, in order
    ERROR = 4  # body: code and message; request 0 speaks of the whole connection
    CANCEL = 5  # the caller does not want the answer any more
    CANCELLED = 6  # nothing of that request touches the caller's memory any more
    REGISTER = 7  # body: a region; its descriptor travels beside the frame (SCM_RIGHTS)
    UNREGISTER = 8  # body: a region that the caller closed


_KINDS = {int(kind): kind for kind in Kind}
_NO_DESCRIPTORS = {
    Kind.HELLO,
    Kind.ERROR,
    Kind.CANCEL,
    Kind.CANCELLED,
    Kind.REGISTER,
    Kind.UNREGISTER,
}


class Header(msgspec.Struct, frozen=True, gc=False):
    """The fixed part of a frame. Counts and bytes are within their bounds."""

    kind: Kind
    request: int = 0  # u64, chosen by the caller; 0 for frames that belong to no call
    method: int = 0
    sources: int = 0
    sinks: int = 0  # of a REQUEST: sinks; of a REPLY: lengths in the array of filled bytes
    body_bytes: int = 0
    payload_bytes: int = 0
    timeout_ms: int = 0
    flags: int = 0
    descriptors_check: int = 0

    @property
    def descriptor_bytes(self) -> int:
        """Length of what stands between header and body."""
        if self.kind is Kind.REPLY:
            return 4 * self.sinks
        return DESCRIPTOR_BYTES * (self.sources + self.sinks)

    @property
    def tail_bytes(self) -> int:
        """Length of descriptors and body."""
        return self.descriptor_bytes + self.body_bytes


class Hello(msgspec.Struct, frozen=True):
    """Who is at the other end. Unknown fields are ignored, so that later versions may add some."""

    version: int
    host_key: str  # equal on both sides when they can share memory
    name: str = ""  # for logs


class Registration(msgspec.Struct, frozen=True, gc=False):
    """A region that the caller shares."""

    region: int
    size_bytes: int
    inode: int  # of the memfd: ties the descriptor that arrives beside the frame to it


def malformed(what: str) -> EmberfsError:
    """Return the error of bytes that no honest peer sends."""
    return EmberfsError(Code.MALFORMED, f"malformed frame: {what}")


def encode_header(
    kind: Kind,
    request: int,
    *,
    method: int = 0,
    body_bytes: int = 0,
    sources: int = 0,
    sinks: int = 0,
    timeout_ms: int = 0,
    payload_bytes: int = 0,
    flags: int = 0,
    descriptors: bytes = b"",
) -> bytes:
    """Return the 48 bytes of a header."""
    raw = _HEADER.pack(
        MAGIC,
        PROTOCOL_VERSION,
        kind,
        method,
        request,
        body_bytes,
        sources,
        sinks,
        timeout_ms,
        payload_bytes,
        flags,
        0,
        crc32(descriptors),
        0,
    )[:_BEFORE_CHECK]
    return raw + _CHECKED.pack(crc32(raw))


def decode_header(raw: memoryview) -> Header:
    """Parse the first 48 bytes. MALFORMED or TOO_LARGE; UNSUPPORTED for another version."""
    magic, version = _PREFIX.unpack_from(raw)
    if magic != MAGIC:
        raise malformed("wrong magic: the peer does not speak the emberfs fabric")
    if version != PROTOCOL_VERSION:
        raise EmberfsError(
            Code.UNSUPPORTED,
            f"peer speaks fabric protocol {version}, this side {PROTOCOL_VERSION}: upgrade one",
        )
    fields = _HEADER.unpack_from(raw)
    if fields[13] != crc32(raw[:_BEFORE_CHECK]):
        raise malformed("checksum of the header is wrong")
    kind = _KINDS.get(fields[2])
    if kind is None:
        raise malformed(f"unknown kind {fields[2]}")
    header = Header(
        kind,
        fields[4],
        fields[3],
        fields[6],
        fields[7],
        fields[5],
        fields[9],
        fields[8],
        fields[10],
        fields[12],
    )
    _check_bounds(header)
    return header


def _check_bounds(header: Header) -> None:
    if header.body_bytes > BODY_BYTES_MAX:
        raise _too_large("body", header.body_bytes, BODY_BYTES_MAX)
    if header.payload_bytes > PAYLOAD_BYTES_MAX:
        raise _too_large("payload", header.payload_bytes, PAYLOAD_BYTES_MAX)
    if header.sources > SOURCES_MAX:
        raise _too_large("number of sources", header.sources, SOURCES_MAX)
    if header.sinks > SINKS_MAX:
        raise _too_large("number of sinks", header.sinks, SINKS_MAX)
    if header.kind in _NO_DESCRIPTORS and (
        header.sources or header.sinks or header.payload_bytes or header.flags
    ):
        raise malformed(f"{header.kind.name} with descriptors or payload")
    if header.kind is Kind.REPLY and header.sources:
        raise malformed("REPLY with sources")


def _too_large(what: str, found: int, limit: int) -> EmberfsError:
    return EmberfsError(Code.TOO_LARGE, f"{what} is {found}, the limit is {limit}")


def check_request(
    body_bytes: int, sources: int, source_bytes: int, sinks: int, sink_bytes: int
) -> None:
    """Refuse a call that no server would take. Raises TOO_LARGE."""
    if body_bytes > BODY_BYTES_MAX:
        raise _too_large("body", body_bytes, BODY_BYTES_MAX)
    if sources > SOURCES_MAX:
        raise _too_large("number of sources", sources, SOURCES_MAX)
    if sinks > SINKS_MAX:
        raise _too_large("number of sinks", sinks, SINKS_MAX)
    if max(source_bytes, sink_bytes) > PAYLOAD_BYTES_MAX:
        raise _too_large("payload", max(source_bytes, sink_bytes), PAYLOAD_BYTES_MAX)


# ---------------------------------------------------------------- descriptors


@lru_cache(maxsize=256)
def _descriptor_struct(count: int) -> struct.Struct:
    return struct.Struct("<" + "IQI" * count)


@lru_cache(maxsize=256)
def _lengths_struct(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}I")


def pack_descriptors(flat: Sequence[int]) -> bytes:
    """Pack (region, offset, bytes, region, offset, bytes, ...)."""
    return _descriptor_struct(len(flat) // 3).pack(*flat)


def iter_descriptors(packed: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Region, offset and bytes of each."""
    return _DESCRIPTOR.iter_unpack(packed)


def split_descriptors(header: Header, tail: bytes) -> tuple[tuple[int, ...], bytes]:
    """Return the flat descriptors of sources, and those of sinks as they are.

    MALFORMED when they are damaged.
    """
    assert len(tail) == header.tail_bytes
    first_sink, end = DESCRIPTOR_BYTES * header.sources, header.descriptor_bytes
    if crc32(memoryview(tail)[:end]) != header.descriptors_check:
        raise malformed("checksum of the descriptors is wrong")
    sources = _descriptor_struct(header.sources).unpack_from(tail) if header.sources else ()
    return sources, tail[first_sink:end]


def pack_filled(lengths: Sequence[int]) -> bytes:
    """Pack the filled bytes of each sink."""
    return _lengths_struct(len(lengths)).pack(*lengths)


def unpack_filled(header: Header, tail: bytes, sinks: Sequence[int]) -> Sequence[int]:
    """Return the filled bytes of each sink of the given sizes. MALFORMED if they do not fit."""
    if all_filled(header, tail):
        return sinks
    if header.sinks != len(sinks):
        raise malformed(f"REPLY fills {header.sinks} sinks of {len(sinks)}")
    filled = _lengths_struct(header.sinks).unpack_from(tail)
    if any(map(int.__gt__, filled, sinks)):
        raise malformed("REPLY fills more than a sink holds")
    return filled


def all_filled(header: Header, tail: bytes) -> bool:
    """Tell whether a REPLY says that every sink is full. MALFORMED if it says more."""
    assert len(tail) == header.tail_bytes
    if crc32(memoryview(tail)[: header.descriptor_bytes]) != header.descriptors_check:
        raise malformed("checksum of the filled lengths is wrong")
    if header.flags & ALL_FILLED and header.sinks:
        raise malformed("REPLY fills all sinks and some")
    return bool(header.flags & ALL_FILLED)


# ---------------------------------------------------------------- whole small frames


def encode_request(
    request: int,
    method: int,
    body: bytes,
    *,
    sources: int,
    sinks: int,
    descriptors: bytes,
    payload_bytes: int,
    timeout_ms: int,
) -> bytes:
    """Return a REQUEST without its payload."""
    header = encode_header(
        Kind.REQUEST,
        request,
        method=method,
        body_bytes=len(body),
        sources=sources,
        sinks=sinks,
        timeout_ms=max(1, min(timeout_ms, _TIMEOUT_MS_MAX)),
        payload_bytes=payload_bytes,
        descriptors=descriptors,
    )
    return header + descriptors + body


def encode_reply(
    request: int, body: bytes, filled: Sequence[int] | None, payload_bytes: int
) -> bytes:
    """Return a REPLY without its payload; `filled` None says that every sink is full."""
    lengths = b"" if filled is None else pack_filled(filled)
    header = encode_header(
        Kind.REPLY,
        request,
        body_bytes=len(body),
        sinks=0 if filled is None else len(filled),
        payload_bytes=payload_bytes,
        flags=ALL_FILLED if filled is None else 0,
        descriptors=lengths,
    )
    return header + lengths + body


def encode_error(request: int, error: EmberfsError) -> bytes:
    """Return an ERROR frame; a very long message is cut."""
    message = error.message.encode("utf-8", "replace")[:MESSAGE_BYTES_MAX]
    body = _CODE.pack(error.code) + message
    return encode_header(Kind.ERROR, request, body_bytes=len(body)) + body


def decode_error(body: bytes) -> EmberfsError:
    """Parse the body of an ERROR frame."""
    if len(body) < _CODE.size:
        raise malformed("ERROR without a code")
    message = body[_CODE.size :].decode("utf-8", "replace")
    return EmberfsError(code_of(_CODE.unpack_from(body)[0]), message)


def encode_hello(hello: Hello) -> bytes:
    """Return a HELLO frame."""
    body = msgspec.msgpack.encode(hello)
    return encode_header(Kind.HELLO, 0, body_bytes=len(body)) + body


_HELLO = msgspec.msgpack.Decoder(Hello)


def decode_hello(body: bytes) -> Hello:
    """Parse the body of a HELLO frame."""
    try:
        hello = _HELLO.decode(body)
    except UNDECODABLE as problem:
        raise malformed(f"HELLO: {problem}") from None
    if len(hello.name) > NAME_CHARACTERS_MAX or not hello.name.isprintable():
        raise malformed("HELLO with a name that does not fit in a line of a log")
    return hello


def encode_register(registration: Registration) -> bytes:
    """Return a REGISTER frame; the region's descriptor is sent beside it."""
    body = _REGISTRATION.pack(registration.region, registration.size_bytes, registration.inode)
    return encode_header(Kind.REGISTER, 0, body_bytes=len(body)) + body


def decode_register(body: bytes) -> Registration:
    """Parse the body of a REGISTER frame."""
    if len(body) != _REGISTRATION.size:
        raise malformed(f"REGISTER of {len(body)} bytes")
    registration = Registration(*_REGISTRATION.unpack(body))
    if registration.region == STREAMED or registration.size_bytes == 0:
        raise malformed("REGISTER of an impossible region")
    return registration


def encode_unregister(region: int) -> bytes:
    """Return an UNREGISTER frame."""
    body = _CHECKED.pack(region)
    return encode_header(Kind.UNREGISTER, 0, body_bytes=len(body)) + body


def decode_unregister(body: bytes) -> int:
    """Parse the body of an UNREGISTER frame: the region's id."""
    if len(body) != _CHECKED.size:
        raise malformed(f"UNREGISTER of {len(body)} bytes")
    region: int = _CHECKED.unpack(body)[0]
    return region
