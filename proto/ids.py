"""Identifiers and sizes.

Every identifier is a NewType, so that mixing two of them is a type error. Packed forms live beside
the type. All are unsigned; 0 is never a valid id except where a comment says so.
"""

import struct
from typing import NewType

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

US = 1_000  # nanoseconds
MS = 1_000_000
SECOND = 1_000_000_000

NodeId = NewType("NodeId", int)  # u32, given by the operator in the service's TOML
TargetId = NewType("TargetId", int)  # u32, node id * 100 + position on the node
ChainId = NewType("ChainId", int)  # u32
ChainVersion = NewType("ChainVersion", int)  # u32, rises with every change of the chain
RoutingVersion = NewType("RoutingVersion", int)  # u64, rises with every published snapshot
ClientId = NewType("ClientId", int)  # u63, random per client process
InodeId = NewType("InodeId", int)  # u63
ChunkId = NewType("ChunkId", bytes)  # 12 bytes, see pack_chunk_id
SessionId = NewType("SessionId", int)  # u63, one open file description at one client

ROOT_INODE = InodeId(1)  # as FUSE has it
TRASH_INODE = InodeId(2)  # a directory without a name, made when something is put into the trash

CHUNK_ID_BYTES = 12
CHUNK_BYTES_MIN = 64 * KiB
CHUNK_BYTES_MAX = 64 * MiB
CHUNK_BYTES_DEFAULT = 1 * MiB
CHUNKS_PER_FILE_MAX = 1 << 32
CHECKSUM_BLOCK_BYTES = 4 * KiB

_CHUNK_ID = struct.Struct(">QI")


def pack_chunk_id(inode: InodeId, index: int) -> ChunkId:
    """Order-preserving: the chunks of one file are neighbours, in file order."""
    return ChunkId(_CHUNK_ID.pack(inode, index))


def unpack_chunk_id(chunk: bytes) -> tuple[InodeId, int]:
    """Return (inode, index of the chunk in the file)."""
    inode, index = _CHUNK_ID.unpack(chunk)
    return InodeId(inode), index


def target_node(target: TargetId) -> NodeId:
    """Return the node that holds a target (the id encodes it)."""
    return NodeId(target // 100)
