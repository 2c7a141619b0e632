"""Files: inodes, directory entries, and the arithmetic from file offset to chunk and chain.

A file is cut into chunks of `chunk_bytes`; chunk i lives on chain `chains[i % len(chains)]`.
A small file has no chunks: its content is kept by the metadata service (meta/inline.py).
"""

import stat
from typing import NamedTuple

import msgspec

from emberfs.proto.ids import ChainId, ChunkId, InodeId, KiB, pack_chunk_id

NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 4095
SYMLINK_BYTES_MAX = 4095
XATTR_NAME_BYTES_MAX = 255
XATTR_VALUE_BYTES_MAX = 65_536
LINK_COUNT_MAX = 65_535
IMMUTABLE = 1  # a flag of an inode: nobody changes, renames, links or removes it
FILE_BYTES_MAX = (1 << 63) - 1
INLINE_BYTES_MAX = 64 * KiB  # that a small file can be set to hold


class Layout(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Where a file's chunks live. Fixed when the file is created, `data` when it gets chunks."""

    chunk_bytes: int  # power of two
    chains: tuple[ChainId, ...]
    data: InodeId = InodeId(0)  # what its chunks are named by; 0: the id of the inode


class Inode(msgspec.Struct, frozen=True, gc=False):
    """Attributes of one file, directory, symlink or special file."""

    id: InodeId
    mode: int  # type and permission bits as in st_mode
    uid: int
    gid: int
    nlink: int
    length: int  # bytes; for a symlink the length of its target
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int = 0
    generation: int = 0
    # Rises when the file shrinks: a length hint of an older truncate version is ignored.
    truncate_version: int = 0
    layout: Layout | None = None  # regular files only
    parent: InodeId = InodeId(0)  # directories only: what ".." is
    symlink: bytes = b""
    torn: bool = False  # a write that failed may have left bytes behind the end
    quota: InodeId = InodeId(0)  # the quota that it counts for: of a directory above, or its own
    sparse: bool = False  # it may have holes: what it takes is to be asked from storage
    flags: int = 0
    acl: bytes = (
        b""  # access list in the kernel's form, if it says more than the mode (meta/acl.py)
    )
    default_acl: bytes = b""  # directories only: what new names in it inherit
    inline: bool = False  # the content lies beside the inode, not in chunks
    # Rises with every change of an inline file's content or length; 0: it never was inline.
    inline_version: int = 0

    def is_directory(self) -> bool:
        """Tell a directory."""
        return stat.S_ISDIR(self.mode)

    def is_file(self) -> bool:
        """Tell a regular file."""
        return stat.S_ISREG(self.mode)

    def is_symlink(self) -> bool:
        """Tell a symbolic link."""
        return stat.S_ISLNK(self.mode)


class DirectoryEntry(msgspec.Struct, frozen=True, gc=False):
    """A name in a directory. `mode` holds the file type bits only."""

    name: bytes
    inode: InodeId
    mode: int


class Piece(NamedTuple):
    """The part of a file range that lies in one chunk."""

    chunk: ChunkId
    chain: ChainId
    chunk_index: int  # in the file
    offset: int  # bytes from the start of the chunk
    length: int  # bytes
    start: int  # bytes from the start of the range


def chunks_of(inode: InodeId, layout: Layout) -> InodeId:
    """Return what the chunks of a file are named by."""
    return layout.data or inode


def pieces(inode: InodeId, layout: Layout, offset: int, length: int) -> list[Piece]:
    """Cut the file range [offset, offset + length) at chunk borders, in file order."""
    assert min(offset, length) >= 0
    found: list[Piece] = []
    chunk_bytes, chains, data = layout.chunk_bytes, layout.chains, chunks_of(inode, layout)
    position, end = offset, offset + length
    while position < end:
        index, within = divmod(position, chunk_bytes)
        count = min(chunk_bytes - within, end - position)
        chain = chains[index % len(chains)]
        found.append(
            Piece(pack_chunk_id(data, index), chain, index, within, count, position - offset)
        )
        position += count
    return found
