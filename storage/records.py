"""The rows of a chunk store: records and their keys.

    M chunk                    the committed version (ChunkRecord)
    P chunk                    the pending version (PendingRecord)
    R chunk position version   redo data: what a small update writes over a block (RedoRecord)
    U chunk epoch              undo: the committed version before the first commit of a flush epoch;
                               empty when the chunk was absent
    G class group              recorded allocation bitmap; no row when no block is owned
    T chunk                    who wrote a chunk that was removed (TombstoneRecord)

R names the block that it belongs to, because versions of a chunk that is removed and written again
start at 1 while the old block's redo data may still be needed to undo the removal. T stays when the
chunk is written anew (tombstones.py).
"""

import struct
from typing import TypeVar

import msgspec

from emberfs.proto.bounds import UNDECODABLE
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import CHECKSUM_BLOCK_BYTES, CHUNK_ID_BYTES, ChunkId, KiB, MiB
from emberfs.proto.storage_calls import RememberedWrite, UpdateKind
from emberfs.storage.allocator import NO_BLOCK, GroupBits, block_bytes, is_position

UNIT_BYTES = CHECKSUM_BLOCK_BYTES  # granularity of redo data
_COARSE_ABOVE_BYTES = 4 * MiB
_COARSE_BYTES = 64 * KiB
CHECKSUM_BYTES = 4
NO_TRIM = (1 << 32) - 1
_MS_MAX = 1 << 60  # far beyond any clock of a store

_POSITION_VERSION = struct.Struct(">QQ")
_EPOCH = struct.Struct(">Q")
_GROUP = struct.Struct(">BQ")
_REDO = struct.Struct("<II")


def grain_of(length: int) -> int:
    """Return the bytes that one checksum covers in a chunk of this length.

    It depends on nothing but the length, so that replicas with different histories agree.
    """
    return CHECKSUM_BLOCK_BYTES if length <= _COARSE_ABOVE_BYTES else _COARSE_BYTES


def count_of(length: int) -> int:
    """Return how many checksums a chunk of this length has."""
    return -(-length // grain_of(length))


class ChunkRecord(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A committed version."""

    version: int
    block: int  # NO_BLOCK when empty
    length: int
    checksums: bytes  # u32 LE CRC32C per grain; the last covers its valid bytes only
    remembered: tuple[RememberedWrite, ...]


class PendingRecord(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A version that is prepared and neither committed nor discarded."""

    version: int
    kind: UpdateKind
    removes: bool  # the chunk is absent once this is committed
    fresh: bool  # the block is its own, not the committed version's
    redo: bool  # there is an R row of this version
    block: int
    length: int
    first: int  # grain that the first of `checksums` belongs to; all others are as committed
    checksums: bytes
    remembered: tuple[RememberedWrite, ...]


class RedoRecord(msgspec.Struct, frozen=True, gc=False):
    """Bytes that belong over a block, after older redo data was cut to `trim` bytes."""

    trim: int  # NO_TRIM: nothing is cut
    first: int  # unit that the data begins at
    data: bytes  # whole units, the last one up to the chunk's end


class TombstoneRecord(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What is left of a removed chunk."""

    at_ms: int  # when it was removed, in time during which the store was open
    remembered: tuple[RememberedWrite, ...]


def committed_from(pending: PendingRecord, before: ChunkRecord | None) -> ChunkRecord | None:
    """Return the record that a pending version becomes; None if it removes the chunk."""
    if pending.removes:
        return None
    checksums = pending.checksums
    if not pending.fresh and before is not None:
        old, stop = before.checksums, count_of(pending.length) * CHECKSUM_BYTES
        start = pending.first * CHECKSUM_BYTES
        checksums = (old[:start] + checksums + old[start + len(checksums) :])[:stop]
    assert len(checksums) == count_of(pending.length) * CHECKSUM_BYTES
    return ChunkRecord(
        pending.version, pending.block, pending.length, checksums, pending.remembered
    )


# ---------------------------------------------------------------- keys


def record_key(chunk: bytes) -> bytes:
    """Key of the committed record."""
    return b"M" + chunk


def pending_key(chunk: bytes) -> bytes:
    """Key of the pending record."""
    return b"P" + chunk


def redo_key(chunk: bytes, block: int, version: int) -> bytes:
    """Key of the redo data of one version over one block."""
    return b"R" + chunk + _POSITION_VERSION.pack(block, version)


def undo_key(chunk: bytes, epoch: int) -> bytes:
    """Key of what was committed when a flush epoch first changed the chunk."""
    return b"U" + chunk + _EPOCH.pack(epoch)


def tombstone_key(chunk: bytes) -> bytes:
    """Key of what is left of a removed chunk."""
    return b"T" + chunk


def group_key(size_class: int, group: int) -> bytes:
    """Key of a group's bitmap."""
    return b"G" + _GROUP.pack(size_class, group)


def prefix_range(prefix: bytes) -> tuple[bytes, bytes]:
    """All keys of one kind."""
    return prefix, bytes([prefix[0] + 1])


def record_range(start: bytes, stop: bytes) -> tuple[bytes, bytes]:
    """Keys of the committed records of chunks [start, stop); b"" is open."""
    return b"M" + start, b"M" + stop if stop else b"N"


def tombstone_range(start: bytes, stop: bytes) -> tuple[bytes, bytes]:
    """Keys of the tombstones of chunks [start, stop); b"" is open."""
    return b"T" + start, b"T" + stop if stop else b"U"


def chunk_of_key(key: bytes) -> ChunkId:
    """Return the chunk that an M, P, R, U or T row belongs to."""
    return ChunkId(key[1 : 1 + CHUNK_ID_BYTES])


def parse_redo_key(key: bytes) -> tuple[ChunkId, int, int]:
    """Return (chunk, position, version)."""
    if len(key) != 1 + CHUNK_ID_BYTES + _POSITION_VERSION.size:
        raise _damaged(key, "its key has a wrong size")
    block, version = _POSITION_VERSION.unpack_from(key, 1 + CHUNK_ID_BYTES)
    return chunk_of_key(key), block, version


def parse_undo_key(key: bytes) -> tuple[ChunkId, int]:
    """Return (chunk, epoch)."""
    if len(key) != 1 + CHUNK_ID_BYTES + _EPOCH.size:
        raise _damaged(key, "its key has a wrong size")
    return chunk_of_key(key), _EPOCH.unpack_from(key, 1 + CHUNK_ID_BYTES)[0]


# ---------------------------------------------------------------- values

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode  # of ChunkRecord, PendingRecord and TombstoneRecord
_chunk_decoder = msgspec.msgpack.Decoder(ChunkRecord)
_pending_decoder = msgspec.msgpack.Decoder(PendingRecord)
_tombstone_decoder = msgspec.msgpack.Decoder(TombstoneRecord)
T = TypeVar("T", ChunkRecord, PendingRecord)


def decode_record(key: bytes, value: bytes) -> ChunkRecord:
    """Parse an M or U value. Raises DISK when it cannot be one."""
    record = _decode(_chunk_decoder, key, value)
    if len(record.checksums) != count_of(record.length) * CHECKSUM_BYTES:
        raise _damaged(key, "its checksums do not fit its length")
    return record


def decode_pending(key: bytes, value: bytes) -> PendingRecord:
    """Parse a P value. Raises DISK when it cannot be one."""
    return _decode(_pending_decoder, key, value)


def decode_tombstone(key: bytes, value: bytes) -> TombstoneRecord:
    """Parse a T value. Raises DISK when it cannot be one."""
    if len(key) != 1 + CHUNK_ID_BYTES:
        raise _damaged(key, "its key has a wrong size")
    try:
        record = _tombstone_decoder.decode(value)
    except UNDECODABLE as problem:
        raise _damaged(key, str(problem)) from None
    if not 0 <= record.at_ms < _MS_MAX:
        raise _damaged(key, "no such time")
    return record


def _decode(decoder: "msgspec.msgpack.Decoder[T]", key: bytes, value: bytes) -> T:
    try:
        record = decoder.decode(value)
    except UNDECODABLE as problem:
        raise _damaged(key, str(problem)) from None
    if record.length < 0 or record.version < 0:
        raise _damaged(key, "negative number")
    if record.block == NO_BLOCK:
        if record.length:
            raise _damaged(key, "content without a block")
    elif not 0 <= record.block < NO_BLOCK or not is_position(record.block):
        raise _damaged(key, "no such block")
    elif record.length > block_bytes(record.block):
        raise _damaged(key, "longer than its block")
    return record


def encode_redo(redo: RedoRecord) -> bytes:
    """Value of an R row."""
    return _REDO.pack(redo.trim, redo.first) + redo.data


def decode_redo(key: bytes, value: bytes) -> RedoRecord:
    """Parse an R value. Raises DISK when it is too short."""
    if len(value) < _REDO.size:
        raise _damaged(key, "too short")
    trim, first = _REDO.unpack_from(value)
    return RedoRecord(trim, first, value[_REDO.size :])


def group_row(bits: GroupBits) -> tuple[bytes, bytes | None]:
    """Row of a group's bitmap; a deletion when no block of it is owned."""
    value = bits.bits.to_bytes(-(-bits.bits.bit_length() // 8), "little")
    return group_key(bits.size_class, bits.group), value or None


def parse_group_row(key: bytes, value: bytes) -> GroupBits:
    """Parse a G row."""
    if len(key) != 1 + _GROUP.size:
        raise _damaged(key, "its key has a wrong size")
    size_class, group = _GROUP.unpack_from(key, 1)
    return GroupBits(size_class, group, int.from_bytes(value, "little"))


def _damaged(key: bytes, why: str) -> EmberfsError:
    return EmberfsError(
        Code.DISK,
        f"chunk store row {key.hex()} is damaged ({why}); "
        "move this target's directory away, it is refilled from its replicas",
    )
