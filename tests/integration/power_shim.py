"""A FUSE file system of a few big files, which are disks: it records every write and every flush.

usage: power_shim.py MOUNTPOINT DIRECTORY NAME=BYTES...

A loop device over such a file turns each block write into a WRITE and each cache flush (and the
flush of a FUA write) into an FSYNC here. DIRECTORY/log gets them in the order of their completion:

    header (kind, disk, offset, length, CLOCK_MONOTONIC ns), then the data of a write

The disks' present contents are in DIRECTORY/NAME. Nothing is cached here: a record is in the log
before the kernel hears that the write, or the flush, is done.
"""

import asyncio
import errno
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyfuse3
import pyfuse3.asyncio

HEADER = struct.Struct("<BBQQQ")
WRITE, FLUSH = 1, 2
FIRST_INODE = pyfuse3.ROOT_INODE + 1


class Record(NamedTuple):
    """One entry of the log."""

    kind: int
    disk: int
    offset: int
    time_ns: int
    data: bytes


def read_log(path: Path) -> Iterator[Record]:
    """Yield the records of a log in order."""
    with path.open("rb") as log:
        while header := log.read(HEADER.size):
            kind, disk, offset, length, time_ns = HEADER.unpack(header)
            yield Record(kind, disk, offset, time_ns, log.read(length))


class Disks(pyfuse3.Operations):
    """The files, by inode from FIRST_INODE on."""

    def __init__(self, directory: Path, sizes: dict[str, int]) -> None:
        super().__init__()
        self._names = [name.encode() for name in sizes]
        self._sizes = list(sizes.values())
        self._log = (directory / "log").open("wb", buffering=0)
        self._disks = []
        for name, size in sizes.items():
            fd = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(fd, size)
            self._disks.append(fd)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = 0o040755 if inode == pyfuse3.ROOT_INODE else 0o100600
        entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else self._sizes[inode - FIRST_INODE]
        entry.st_nlink = 1
        entry.st_blksize = 4096
        entry.entry_timeout = entry.attr_timeout = 3600
        return entry

    async def lookup(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
        """Find a disk."""
        if name not in self._names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FIRST_INODE + self._names.index(name))

    async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
        """Sizes are fixed."""
        return self._attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):  # type: ignore[no-untyped-def]
        """Times are not kept."""
        return self._attributes(inode)

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        """The handle is the disk's number."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode - FIRST_INODE))

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        """What was written last."""
        return os.pread(self._disks[fh], size, off)

    async def write(self, fh, off, buf):  # type: ignore[no-untyped-def]
        """Record, then perform."""
        self._record(WRITE, fh, off, buf)
        return os.pwrite(self._disks[fh], buf, off)

    async def fsync(self, fh, datasync):  # type: ignore[no-untyped-def]
        """All writes that were answered are stable from here on."""
        self._record(FLUSH, fh, 0, b"")

    def _record(self, kind: int, disk: int, offset: int, data: bytes) -> None:
        header = HEADER.pack(kind, disk, offset, len(data), time.monotonic_ns())
        os.writev(self._log.fileno(), [header, data])


def main() -> None:
    """Serve until it is unmounted."""
    place, directory, *disks = sys.argv[1:]
    sizes = {name: int(size) for name, size in (disk.split("=") for disk in disks)}
    pyfuse3.asyncio.enable()
    options = {"fsname=power", "default_permissions"}
    pyfuse3.init(Disks(Path(directory), sizes), place, options)
    try:
        asyncio.run(pyfuse3.main())
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
