"""What an application and the client daemon say over the socket: one request, one answer.

A SOCK_SEQPACKET socket keeps messages whole and in order. Bytes of the application are hostile
until decoded, and it sends no descriptors: it is the daemon that makes what is shared and passes it
with the answer (SCM_RIGHTS, unix(7)). A descriptor that the daemon was given could be of its own
mount; to close that it would have to wait for itself, and a daemon that dies would do so for ever.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

from emberfs.proto.errors import Code, EmberfsError

VERSION = 1
MESSAGE_BYTES_MAX = 1024
FDS_MAX = 2  # of one answer


class Kind(IntEnum):
    """What is asked for; in brackets what `first` and `second` are."""

    HELLO = 1  # [VERSION, 0] the answer's value is the daemon's VERSION
    REGION = 2  # [size in bytes, 0] value: the region's number; with a memfd
    FORGET_REGION = 3  # [its number, 0]
    FILE = 4  # [a descriptor of the application, 0] value: the file's number
    FORGET_FILE = 5  # [its number, 0]
    RING = 6  # [entries | priority << 32, depth | gather us << 32] its number; memfd, bell
    FORGET_RING = 7  # [its number, 0]


_REQUEST = struct.Struct("<IIQQ")  # kind, reserved, first, second
_ANSWER = struct.Struct("<iIQ")  # errno or 0, reserved, value; then words about an error


class Request(NamedTuple):
    """From the application."""

    kind: Kind
    first: int = 0
    second: int = 0


class Answer(NamedTuple):
    """From the daemon."""

    error: int  # errno, 0 if all is well
    value: int = 0
    words: str = ""


def encode_request(request: Request) -> bytes:
    """Return the bytes of a request."""
    return _REQUEST.pack(request.kind, 0, request.first, request.second)


def decode_request(message: bytes) -> Request:
    """Parse; MALFORMED if it is none."""
    try:
        kind, _, first, second = _REQUEST.unpack(message)
        return Request(Kind(kind), first, second)
    except (struct.error, ValueError) as problem:
        raise EmberfsError(Code.MALFORMED, f"not a request: {problem}") from None


def encode_answer(answer: Answer) -> bytes:
    """Return the bytes of an answer."""
    words = answer.words.encode()[: MESSAGE_BYTES_MAX - _ANSWER.size]
    return _ANSWER.pack(answer.error, 0, answer.value) + words


def decode_answer(message: bytes) -> Answer:
    """Parse; MALFORMED if it is none."""
    if len(message) < _ANSWER.size:
        raise EmberfsError(Code.MALFORMED, f"an answer of {len(message)} bytes")
    error, _, value = _ANSWER.unpack_from(message)
    return Answer(error, value, message[_ANSWER.size :].decode(errors="replace"))


class RingTerms(NamedTuple):
    """How a ring is served."""

    entries: int  # a power of two
    priority: int = 1  # 0 before 1 before 2
    depth: int = 0  # begin when so many entries wait ...
    gather_us: int = 0  # ... or the first of them has waited so long


def pack_terms(terms: RingTerms) -> tuple[int, int]:
    """Return `first` and `second` of a RING request."""
    return terms.entries | terms.priority << 32, terms.depth | terms.gather_us << 32


def unpack_terms(request: Request) -> RingTerms:
    """Read them again."""
    low = (1 << 32) - 1
    first, second = request.first, request.second
    return RingTerms(first & low, first >> 32, second & low, second >> 32)
