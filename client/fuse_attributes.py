"""Inodes and space as the kernel wants them, and what it wants changed."""

from typing import TypedDict

import pyfuse3

from emberfs.proto.files import NAME_BYTES_MAX, Inode
from emberfs.proto.ids import SECOND, KiB
from emberfs.proto.meta_calls import SERVER_CLOCK, StatfsAnswer, explicit_time

BLOCK_BYTES = 4 * KiB
IO_BYTES = 128 * KiB  # st_blksize: what cp, Python and stdio take as their buffer
NOW_AGE_NS = 60 * SECOND  # how long a request may have waited
FREE_INODES = 1 << 32  # there is no limit; programs want to see a number

_SECTOR_BYTES = 512


class Changes(TypedDict, total=False):
    """Keyword arguments of a setattr; what is absent stays."""

    mode: int
    uid: int
    gid: int
    length: int
    atime_ns: int
    mtime_ns: int


def attributes(
    inode: Inode, attr_timeout_s: float, entry_timeout_s: float, stored_bytes: int | None = None
) -> pyfuse3.EntryAttributes:
    """Translate an inode; `stored_bytes` if it was asked for, see OpenFiles.stored_bytes.

    Of a sparse file whose blocks are not known here the kernel asks again before it tells them.
    """
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode.id
    entry.generation = inode.generation
    entry.attr_timeout = 0 if inode.sparse and stored_bytes is None else attr_timeout_s
    entry.entry_timeout = entry_timeout_s
    entry.st_mode = inode.mode
    entry.st_nlink = inode.nlink
    entry.st_uid = inode.uid
    entry.st_gid = inode.gid
    entry.st_rdev = inode.rdev
    entry.st_size = inode.length
    entry.st_blksize = IO_BYTES
    taken_bytes = inode.length if stored_bytes is None else stored_bytes
    entry.st_blocks = -(-taken_bytes // _SECTOR_BYTES)
    entry.st_atime_ns = inode.atime_ns
    entry.st_mtime_ns = inode.mtime_ns
    entry.st_ctime_ns = inode.ctime_ns
    return entry


def missing_entry(timeout_s: float) -> pyfuse3.EntryAttributes:
    """That a name leads nowhere, believed for a time (inode 0 in fuse_reply_entry of libfuse)."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = timeout_s
    return entry


def bare_entry(inode: int, mode: int) -> pyfuse3.EntryAttributes:
    """Number and type only, as "." and ".." of a listing need."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.st_mode = mode
    entry.attr_timeout = 0
    entry.entry_timeout = 0
    return entry


def changes(wanted: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields) -> Changes:
    """What a setattr request asks for. A ctime of one's own is not supported, as in POSIX."""
    found = Changes()
    if fields.update_mode:
        found["mode"] = wanted.st_mode & 0o7777
    if fields.update_uid:
        found["uid"] = wanted.st_uid
    if fields.update_gid:
        found["gid"] = wanted.st_gid
    if fields.update_size:
        found["length"] = wanted.st_size
    if fields.update_atime:
        found["atime_ns"] = explicit_time(wanted.st_atime_ns)
    if fields.update_mtime and not fields.update_size:  # beside a length it is the kernel's own
        found["mtime_ns"] = explicit_time(wanted.st_mtime_ns)
    return found


def touched(wanted: Changes, now_ns: int) -> Changes | None:
    """The same with the server's clock, if it can be UTIME_NOW for both times.

    pyfuse3 replaces UTIME_NOW by the time of its clock, the same for both. Whoever may write may
    ask for that, for a time of one's own only the owner may.
    """
    atime_ns, mtime_ns = wanted.get("atime_ns"), wanted.get("mtime_ns")
    if wanted.keys() != {"atime_ns", "mtime_ns"} or atime_ns is None or atime_ns != mtime_ns:
        return None
    if not now_ns - NOW_AGE_NS <= atime_ns <= now_ns:
        return None
    return Changes(atime_ns=SERVER_CLOCK, mtime_ns=SERVER_CLOCK)


def space(answer: StatfsAnswer) -> pyfuse3.StatvfsData:
    """Translate space and inodes."""
    data = pyfuse3.StatvfsData()
    data.f_bsize = data.f_frsize = BLOCK_BYTES
    data.f_blocks = answer.total_bytes // BLOCK_BYTES
    data.f_bfree = data.f_bavail = answer.free_bytes // BLOCK_BYTES
    free = max(0, answer.inodes_max - answer.inodes) if answer.inodes_max else FREE_INODES
    data.f_files = max(answer.inodes_max, answer.inodes) if answer.inodes_max else 0
    data.f_files = data.f_files or answer.inodes + FREE_INODES
    data.f_ffree = data.f_favail = free
    data.f_namemax = NAME_BYTES_MAX
    return data
