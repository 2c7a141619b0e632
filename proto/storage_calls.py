"""The data-plane methods of the storage service.

Reads travel as packed arrays, so that a batch of 256 costs one decode; everything else is a
msgspec struct. A payload is never in a body: it is a source (the server pulls it) or a sink (the
server fills it) of the fabric call.
"""

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec

from emberfs.proto.bounds import BoundedTarget
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChainVersion, ChunkId, InodeId, TargetId
from emberfs.proto.method import Method

# ---------------------------------------------------------------- batched reads (method 1)

READ_BATCH = 1  # raw body: packed ReadOp; operation i fills sink i. Reply: packed ReadResult.
READ_OPS_MAX = 1024

_READ_OP = struct.Struct("<II12sIII")
_READ_RESULT = struct.Struct("<iIQ")


class ReadOp(NamedTuple):
    """Read [offset, offset + length) of one chunk from one target."""

    target: TargetId
    chain_version: ChainVersion
    chunk: ChunkId
    offset: int  # u32, bytes in the chunk
    length: int  # u32, bytes, equals the size of the sink
    flags: int = 0  # none defined yet


class ReadResult(NamedTuple):
    """Outcome of one ReadOp. A missing chunk is success with length 0 and version 0."""

    code: int  # 0 or a Code
    length: int  # bytes filled; short when the chunk ends earlier: what is missing reads as zeros
    version: int  # committed version that was read


def pack_read_ops(operations: Iterable[ReadOp]) -> bytes:
    """Return the body of a READ_BATCH request."""
    pack = _READ_OP.pack
    return b"".join([pack(*operation) for operation in operations])


def count_read_ops(body: bytes | memoryview) -> int:
    """How many operations a READ_BATCH request has. MALFORMED on a wrong size or too many."""
    count, rest = divmod(len(body), _READ_OP.size)
    if rest or not 0 < count <= READ_OPS_MAX:
        raise EmberfsError(Code.MALFORMED, f"read batch of {len(body)} bytes")
    return count


def unpack_read_ops(body: bytes | memoryview) -> list[ReadOp]:
    """Parse a READ_BATCH request. Raises MALFORMED as `count_read_ops`."""
    count_read_ops(body)
    make = ReadOp._make
    return [make(fields) for fields in _READ_OP.iter_unpack(body)]


def pack_read_results(results: Iterable[ReadResult]) -> bytes:
    """Return the body of a READ_BATCH reply."""
    pack = _READ_RESULT.pack
    return b"".join([pack(*result) for result in results])


def unpack_read_results(body: bytes | memoryview) -> list[ReadResult]:
    """Parse a READ_BATCH reply. Raises MALFORMED on a wrong size."""
    if len(body) % _READ_RESULT.size:
        raise EmberfsError(Code.MALFORMED, f"read results of {len(body)} bytes")
    make = ReadResult._make
    return [make(fields) for fields in _READ_RESULT.iter_unpack(body)]


# ---------------------------------------------------------------- updates


class UpdateKind(IntEnum):
    """What an update does to a chunk."""

    WRITE = 1  # source 0 goes to [offset, offset + length); a gap before offset reads as zeros
    TRUNCATE = 2  # the chunk's length becomes exactly `length`, zeros when it grows
    REMOVE = 3  # the chunk disappears
    REPLACE = 4  # between replicas only: source 0 is the whole content, `version` is its version


class WriteTag(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Names one client write for exactly-once: retries carry the same tag.

    A client uses one channel for one update at a time, and sequences on a channel only rise.
    """

    client: int
    channel: int
    sequence: int


class RememberedWrite(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The last write of one (client, channel) to a chunk, kept with the chunk."""

    client: int
    channel: int
    sequence: int
    version: int  # what it became


NO_ORDER = WriteTag(0, 0, 0)


class UpdateRequest(msgspec.Struct, frozen=True, gc=False):
    """One update of one chunk, from a client to the head or from a hop to its successor."""

    target: TargetId  # receiver
    chain_version: ChainVersion
    chunk: ChunkId
    kind: UpdateKind
    offset: int
    length: int  # bytes; the size of source 0 for WRITE and REPLACE
    tag: WriteTag
    chunk_bytes: int  # the file's chunk size: bound of offset + length
    checksum: int  # CRC32C of source 0; 0 without a source
    version: int = 0  # 0 from a client; from a predecessor the version this update creates
    # REPLACE only: what the chunk remembers of its writers (exactly-once survives recovery).
    remembered: tuple[RememberedWrite, ...] = ()
    exists: bool = True  # REPLACE only: False says that the chunk is to be absent
    # REPLACE only, of a chunk whose only complete copy is damaged: the checksums (u32 LE CRC32C per
    # grain) of what the content should be. The receiver keeps them, so that whoever reads the
    # damaged part is refused there too.
    checksums: bytes = b""
    # From a predecessor: (life, sending target, rising number), so that what was sent earlier, or
    # twice, is not taken up later (storage/hoporder.py). NO_ORDER from a client.
    order: WriteTag = NO_ORDER


class UpdateAnswer(msgspec.Struct, frozen=True, gc=False):
    """An update is committed on every replica from the answering one to the tail."""

    version: int  # committed version (of REMOVE: the version that removed it)
    length: int  # chunk length in bytes afterwards
    chain_version: ChainVersion


class VersionRequest(msgspec.Struct, frozen=True, gc=False):
    """Ask the tail which version of a chunk is committed."""

    target: TargetId
    chain_version: ChainVersion
    chunk: ChunkId


class VersionAnswer(msgspec.Struct, frozen=True, gc=False):
    """The tail's committed version; 0 when the chunk is absent."""

    version: int


FLUSH_TARGETS_MAX = 1024  # of one call; a process has one target per disk
FlushTargets = Annotated[tuple[TargetId, ...], msgspec.Meta(max_length=FLUSH_TARGETS_MAX)]


class FlushRequest(msgspec.Struct, frozen=True, gc=False):
    """Make everything that these targets have committed stable (fsync)."""

    targets: FlushTargets


class FlushAnswer(msgspec.Struct, frozen=True, gc=False):
    """All targets are stable; an error is raised otherwise.

    `lost` tells for each target, in the same order, Chain.lost of its chain as it knows it: what
    was acknowledged at an older version of the chain and not flushed then may not be there.
    """

    targets: tuple[TargetId, ...]
    lost: tuple[ChainVersion, ...] = ()


class ListRequest(msgspec.Struct, frozen=True, gc=False):
    """List chunks of a target in chunk order: recovery, fsck, collection of deleted files."""

    target: TargetId
    start: bytes  # first chunk id, inclusive; b"" for the beginning
    stop: bytes  # exclusive; b"" for the end
    limit: int
    verify: bool = False  # read the data and compare its checksums
    serving_only: bool = False  # refuse with NOT_SERVING unless the target serves
    with_writers: bool = False  # fill in ChunkRow.remembered
    heal: bool = True  # with verify: repair what is damaged from another replica
    with_tombstones: bool = False  # list absent chunks, too, whose writers are known: recovery


class ChunkRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One chunk on one target."""

    chunk: ChunkId
    version: int  # 0: absent, or being created
    pending: int  # pending version, 0 if none
    length: int
    digest: int  # CRC32C over the chunk's block checksums and length
    damaged: bool = False  # verify found data that its checksums refute
    remembered: tuple[RememberedWrite, ...] = ()  # if asked for; of an absent chunk: its tombstone


class ListAnswer(msgspec.Struct, frozen=True, gc=False):
    """A page; `next` is the start of the following page, b"" at the end."""

    rows: tuple[ChunkRow, ...]
    next: bytes


class SyncRequest(msgspec.Struct, frozen=True, gc=False):
    """From a predecessor: recovery of this target begins, goes on, or is complete."""

    target: TargetId
    chain_version: ChainVersion
    done: bool
    done_bytes: int = 0
    total_bytes: int = 0
    done_chunks: int = 0
    total_chunks: int = 0
    bytes_per_s: int = 0  # what is sent at present
    source: TargetId = TargetId(0)  # who fills
    problem: str = ""  # why the last session failed; empty once this one has come further


class SyncAnswer(msgspec.Struct, frozen=True, gc=False):
    """Acknowledges a SyncRequest."""

    accepted: bool


class Leak(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Blocks of one size that are marked and that no record names."""

    block_bytes: int
    count: int

    def in_words(self) -> str:
        """How a finding says it."""
        return f"{self.count} blocks of {self.block_bytes >> 10} KiB are marked and have no owner"


class FsckRequest(msgspec.Struct, frozen=True, gc=False):
    """Compare a target's allocation bitmaps with its chunk records.

    `free`: free what leaks, if it still is as an earlier answer said; STALE if not.
    """

    target: TargetId
    free: Leak | None = None


class FsckAnswer(msgspec.Struct, frozen=True, gc=False):
    """Findings in words; empty when every block has exactly one owner and none leaks."""

    chunks: int
    blocks: int
    findings: tuple[str, ...]
    leaks: tuple[Leak, ...] = ()  # they are in `findings`, too


class RepairRequest(msgspec.Struct, frozen=True, gc=False):
    """From fsck: make a target's replica of a chunk equal to another replica's.

    STALE if the source does not hold this version and length, BUSY while a version is pending.
    """

    target: TargetId  # receiver
    chain_version: ChainVersion
    chunk: ChunkId
    source: BoundedTarget
    version: int
    length: int


class RepairAnswer(msgspec.Struct, frozen=True, gc=False):
    """The replica is equal now."""

    version: int


UPDATE = Method(2, "update", UpdateRequest, UpdateAnswer)
VERSION = Method(3, "version", VersionRequest, VersionAnswer)
FLUSH = Method(4, "flush", FlushRequest, FlushAnswer)
LIST = Method(5, "list", ListRequest, ListAnswer)
SYNC = Method(6, "sync", SyncRequest, SyncAnswer)
FSCK = Method(7, "fsck", FsckRequest, FsckAnswer)
REPAIR = Method(8, "repair", RepairRequest, RepairAnswer)


def file_chunk_range(inode: InodeId, first_index: int) -> tuple[bytes, bytes]:
    """Return (start, stop) for ListRequest: all chunks of a file from an index on."""
    return struct.pack(">QI", inode, first_index), struct.pack(">Q", inode + 1)
