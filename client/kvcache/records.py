"""What a KV cache writes into its logs and snapshots: batches that say whether they are whole.

A batch is a head, then columns: one call packs or unpacks a column of thousands of keys. The
checksum of a batch covers the file and the offset it was written for, so bytes of another place
are never taken for one. Nothing behind the first batch that does not verify is believed.
"""

import struct
import zlib
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

KEY_BYTES_MAX = 64
SLOT_BYTES = 4096  # offsets of blocks are multiples of it
BODY_BYTES_MAX = 1 << 20
KEYS_MAX = 8192  # in a batch

_MAGIC = 0x4C43564B
_HEAD = struct.Struct("<IHHIQI")  # magic, kind, unused, body bytes, sequence, checksum
_SEGMENT = struct.Struct("<QI")
_COUNT = struct.Struct("<I")
_OPENED = struct.Struct("<QIQ")
_STATE = struct.Struct("<QIQQB")
_LOG = struct.Struct("<QIQ")
_PLACE = struct.Struct("<QIQ")
_WRITER_BITS = 64
HEAD_BYTES = _HEAD.size


class FileId(NamedTuple):
    """A log or a segment: the writer (random, 64 bits) and its number with this writer.

    Never used twice: what a name stood for once, it never stands for anything else.
    """

    writer: int
    number: int


class Put(NamedTuple):
    """Blocks are in a segment: four columns of equal length."""

    segment: FileId
    keys: Sequence[bytes]
    offsets: Sequence[int]  # bytes, multiples of SLOT_BYTES
    lengths: Sequence[int]  # bytes
    checksums: Sequence[int]


class Remove(NamedTuple):
    """Keys are gone."""

    keys: Sequence[bytes]


class Opened(NamedTuple):
    """A segment may exist from now on; written before its file is made."""

    segment: FileId
    capacity: int  # bytes


class Sealed(NamedTuple):
    """Nothing more will be written to a segment."""

    segment: FileId
    used: int  # bytes


class Evicted(NamedTuple):
    """Segments are gone with all that is in them."""

    segments: Sequence[FileId]


class Touched(NamedTuple):
    """Segments were read lately, the most recent last."""

    segments: Sequence[FileId]


class Alive(NamedTuple):
    """The writer of this log lives."""


class End(NamedTuple):
    """Nothing more will be written to this log or snapshot; how many batches are before it."""

    batches: int


class Covered(NamedTuple):
    """A snapshot holds what these logs say before these offsets (bytes)."""

    logs: Sequence[tuple[FileId, int]]


class SegmentState(NamedTuple):
    """A segment in a snapshot; they come in the order of use, the most recent last."""

    segment: FileId
    capacity: int
    used: int
    sealed: bool


class Entries(NamedTuple):
    """Blocks in a snapshot: a Put whose every entry has an order of its own."""

    put: Put
    orders: Sequence[int]


class Graves(NamedTuple):
    """Keys in a snapshot that were removed so lately that older puts may still come to light."""

    keys: Sequence[bytes]
    orders: Sequence[int]


Message: TypeAlias = (
    Put
    | Remove
    | Opened
    | Sealed
    | Evicted
    | Touched
    | Alive
    | End
    | Covered
    | SegmentState
    | Entries
    | Graves
)


class Batch(NamedTuple):
    """A message with its sequence: of two that contradict each other the higher one counts."""

    sequence: int
    message: Message


class Found(NamedTuple):
    """What a piece of a file holds."""

    batches: list[Batch]
    used: int  # bytes of them
    wanted: int  # bytes that the next batch takes, if the piece ends within it; else 0


_KINDS: tuple[type[Message], ...] = (
    Put,
    Remove,
    Opened,
    Sealed,
    Evicted,
    Touched,
    Alive,
    End,
    Covered,
    SegmentState,
    Entries,
    Graves,
)


def order_of(sequence: int, writer: int) -> int:
    """A total order: equal sequences of different writers happened at the same time."""
    return sequence << _WRITER_BITS | writer


# ---------------------------------------------------------------- packing


def encode(file: FileId, offset: int, sequence: int, message: Message) -> bytes:
    """Pack one batch for `offset` of a log or snapshot. At most KEYS_MAX keys."""
    kind = _KINDS.index(type(message))
    body = _body(message)
    assert len(body) <= BODY_BYTES_MAX
    check = _checksum(file, offset, kind, sequence, body)
    return _HEAD.pack(_MAGIC, kind, 0, len(body), sequence, check) + body


def decode(file: FileId, offset: int, data: memoryview) -> Found:
    """Unpack what a piece of a file holds from `offset` on; never raises, whatever it is."""
    batches: list[Batch] = []
    at = 0
    while len(data) - at >= HEAD_BYTES:
        magic, kind, unused, size, sequence, check = _HEAD.unpack_from(data, at)
        if magic != _MAGIC or unused or kind >= len(_KINDS) or size > BODY_BYTES_MAX:
            return Found(batches, at, 0)
        stop = at + HEAD_BYTES + size
        if stop > len(data):
            return Found(batches, at, stop - at)
        body = bytes(data[at + HEAD_BYTES : stop])
        if check != _checksum(file, offset + at, kind, sequence, body):
            return Found(batches, at, 0)
        try:
            batches.append(Batch(sequence, _message(kind, body)))
        except (struct.error, ValueError):  # made by a later version, perhaps
            return Found(batches, at, 0)
        at = stop
    return Found(batches, at, HEAD_BYTES)


def _checksum(file: FileId, offset: int, kind: int, sequence: int, body: bytes) -> int:
    head = _PLACE.pack(*file, offset) + _HEAD.pack(_MAGIC, kind, 0, len(body), sequence, 0)
    return zlib.crc32(body, zlib.crc32(head))


def _body(message: Message) -> bytes:
    match message:
        case Put():
            return _put_body(message)
        case Remove(keys):
            return _keys(keys)
        case Opened(segment, capacity):
            return _OPENED.pack(*segment, capacity)
        case Sealed(segment, used):
            return _OPENED.pack(*segment, used)
        case Evicted(segments) | Touched(segments):
            return b"".join([_SEGMENT.pack(*segment) for segment in segments])
        case Alive():
            return b""
        case End(batches):
            return _COUNT.pack(batches)
        case Covered(logs):
            return b"".join([_LOG.pack(*log, offset) for log, offset in logs])
        case SegmentState(segment, capacity, used, sealed):
            return _STATE.pack(*segment, capacity, used, sealed)
        case Entries(put, orders):
            return _put_body(put) + _orders(orders)
        case Graves(keys, orders):
            return _keys(keys) + _orders(orders)


def _message(kind: int, body: bytes) -> Message:
    make = _KINDS[kind]
    if make is Put:
        put, at = _put(body)
        _expect(at == len(body))
        return put
    if make is Remove:
        keys, at = _unpack_keys(body, 0)
        _expect(at == len(body))
        return Remove(keys)
    if make is Entries:
        put, at = _put(body)
        return Entries(put, _unpack_orders(body, at, len(put.keys)))
    if make is Graves:
        keys, at = _unpack_keys(body, 0)
        return Graves(keys, _unpack_orders(body, at, len(keys)))
    if make is Opened or make is Sealed:
        writer, number, size = _OPENED.unpack(body)
        made = Opened if make is Opened else Sealed
        return made(FileId(writer, number), size)
    if make is Evicted or make is Touched:
        listed = [FileId(*row) for row in _SEGMENT.iter_unpack(body)]
        return Evicted(listed) if make is Evicted else Touched(listed)
    if make is Covered:
        return Covered([(FileId(w, n), offset) for w, n, offset in _LOG.iter_unpack(body)])
    if make is SegmentState:
        writer, number, capacity, used, sealed = _STATE.unpack(body)
        return SegmentState(FileId(writer, number), capacity, used, bool(sealed))
    if make is End:
        return End(*_COUNT.unpack(body))
    _expect(not body)
    return Alive()


def _expect(sound: bool) -> None:
    if not sound:
        raise ValueError("columns of unequal length")


def _put_body(put: Put) -> bytes:
    count = len(put.keys)
    slots = [offset // SLOT_BYTES for offset in put.offsets]
    numbers = struct.pack(f"<{3 * count}I", *slots, *put.lengths, *put.checksums)
    return _SEGMENT.pack(*put.segment) + _keys(put.keys) + numbers


def _put(body: bytes) -> tuple[Put, int]:
    segment = FileId(*_SEGMENT.unpack_from(body, 0))
    keys, at = _unpack_keys(body, _SEGMENT.size)
    count = len(keys)
    numbers = struct.unpack_from(f"<{3 * count}I", body, at)
    offsets = [slot * SLOT_BYTES for slot in numbers[:count]]
    put = Put(segment, keys, offsets, numbers[count : 2 * count], numbers[2 * count :])
    return put, at + 12 * count


def _keys(keys: Sequence[bytes]) -> bytes:
    assert len(keys) <= KEYS_MAX
    return b"".join((_COUNT.pack(len(keys)), bytes(map(len, keys)), *keys))


def _unpack_keys(body: bytes, at: int) -> tuple[list[bytes], int]:
    (count,) = _COUNT.unpack_from(body, at)
    start = at + _COUNT.size + count
    _expect(start <= len(body))
    stops = accumulate(body[at + _COUNT.size : start], initial=start)
    keys = [body[first:stop] for first, stop in pairwise(stops)]
    stop = start + sum(map(len, keys))
    _expect(stop <= len(body) and b"" not in keys)
    return keys, stop


def _orders(orders: Iterable[int]) -> bytes:
    return b"".join([order.to_bytes(16, "little") for order in orders])


def _unpack_orders(body: bytes, at: int, count: int) -> list[int]:
    _expect(len(body) - at == 16 * count)
    return [int.from_bytes(body[n : n + 16], "little") for n in range(at, len(body), 16)]
