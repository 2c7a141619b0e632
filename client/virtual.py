"""The virtual directory of a mount: names that are in no cluster, not listed in the root.

`.emberfs/ring` is a symbolic link to the socket of the rings (client/native).
"""

import os
import stat

from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import ReaddirRow

NAME = b".emberfs"
ROOT = InodeId(1)
# Metadata servers count up from 1.
_DIRECTORY, _FIRST = InodeId((1 << 60) - 4096), InodeId((1 << 60) - 4095)


class VirtualDirectory:
    """Symbolic links below a directory in the root. Without links there is no directory."""

    def __init__(self, wall_ns: int) -> None:
        """`wall_ns`: the times of everything here."""
        self._wall_ns = wall_ns
        self._inodes: dict[InodeId, Inode] = {}
        self._names: dict[tuple[InodeId, bytes], Inode] = {}

    def add(self, name: bytes, target: bytes) -> None:
        """Put a link there; to be called before the mount is used."""
        if not self._inodes:
            self._put(ROOT, NAME, self._made(_DIRECTORY, stat.S_IFDIR | 0o555, parent=ROOT))
        number = InodeId(_FIRST + len(self._inodes))
        self._put(_DIRECTORY, name, self._made(number, stat.S_IFLNK | 0o777, symlink=target))

    def _put(self, parent: InodeId, name: bytes, inode: Inode) -> None:
        self._inodes[inode.id] = self._names[parent, name] = inode

    def _made(
        self, number: InodeId, mode: int, *, parent: InodeId = ROOT, symlink: bytes = b""
    ) -> Inode:
        now_ns = self._wall_ns
        return Inode(
            number,
            mode,
            os.geteuid(),
            os.getegid(),
            nlink=2 if stat.S_ISDIR(mode) else 1,
            length=len(symlink),
            atime_ns=now_ns,
            mtime_ns=now_ns,
            ctime_ns=now_ns,
            parent=parent,
            symlink=symlink,
        )

    def lookup(self, parent: int, name: bytes) -> Inode | None:
        """What a name leads to, if it is one of these."""
        return self._names.get((InodeId(parent), name)) if self._names else None

    def inode(self, number: int) -> Inode | None:
        """Attributes, if it is one of these."""
        return self._inodes.get(InodeId(number)) if self._inodes else None

    def rows(self, directory: InodeId) -> list[ReaddirRow] | None:
        """What is in the directory, if it is this one."""
        if directory != _DIRECTORY or not self._inodes:
            return None
        return [
            ReaddirRow(name, inode.id, inode.mode, inode)
            for (parent, name), inode in self._names.items()
            if parent == _DIRECTORY
        ]
