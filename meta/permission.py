"""Who may do what: mode bits, supplementary groups, access lists, sticky directories, flags.

Follows path_resolution(7), chmod(2), chown(2), inode(7), acl(5) and ioctl_iflags(2). uid 0 passes
everything except executing what nobody may execute, and changing the immutable.
"""

import stat

from emberfs.meta import acl
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import IMMUTABLE, NAME_BYTES_MAX, Inode
from emberfs.proto.meta_calls import Caller

READ = 4
WRITE = 2
EXECUTE = 1


def allows(inode: Inode, caller: Caller, want: int) -> bool:
    """Tell whether mode bits and access list grant all of `want`."""
    mode = inode.mode
    if caller.uid == 0:
        return not (want & EXECUTE) or inode.is_directory() or bool(mode & 0o111)
    if caller.uid == inode.uid:
        mode >>= 6
    elif inode.acl and mode & 0o070:  # without any group right the kernel skips the list, too
        return acl.allows(
            inode.acl, mode, inode.gid, caller.uid, lambda gid: in_group(caller, gid), want
        )
    elif in_group(caller, inode.gid):
        mode >>= 3
    return mode & want == want


def in_group(caller: Caller, gid: int) -> bool:
    """Tell whether the caller is a member."""
    return gid == caller.gid or gid in caller.groups


def require(inode: Inode, caller: Caller, want: int) -> None:
    """Raise ACCESS unless mode bits and access list grant all of `want`.

    Writing what is immutable is NOT_PERMITTED, whoever asks.
    """
    if want & WRITE:
        require_mutable(inode)
    if not allows(inode, caller, want):
        raise EmberfsError(
            Code.ACCESS, f"uid {caller.uid} may not: inode {inode.id} has mode {inode.mode:o}"
        )


def require_mutable(inode: Inode) -> None:
    """Raise NOT_PERMITTED for what is immutable (ioctl_iflags(2), FS_IMMUTABLE_FL)."""
    if inode.flags & IMMUTABLE:
        raise EmberfsError(Code.NOT_PERMITTED, f"inode {inode.id} is immutable")


def require_owner(inode: Inode, caller: Caller) -> None:
    """Raise NOT_PERMITTED unless the caller owns the file or is uid 0."""
    if caller.uid not in (0, inode.uid):
        raise EmberfsError(
            Code.NOT_PERMITTED, f"uid {caller.uid} does not own inode {inode.id} (uid {inode.uid})"
        )


def require_removable(directory: Inode, victim: Inode, caller: Caller) -> None:
    """The right to take a name out of a directory: write permission, and the sticky bit's rule."""
    require(directory, caller, WRITE | EXECUTE)
    if directory.mode & stat.S_ISVTX and caller.uid not in (0, directory.uid, victim.uid):
        raise EmberfsError(
            Code.NOT_PERMITTED, f"directory {directory.id} is sticky; only owners may remove here"
        )
    require_mutable(victim)


def check_name(name: bytes) -> None:
    """Refuse what cannot be a name: NOT_FOUND if empty, NAME_TOO_LONG, INVALID."""
    if len(name) > NAME_BYTES_MAX:
        raise EmberfsError(
            Code.NAME_TOO_LONG, f"a name of {len(name)} bytes; the limit is {NAME_BYTES_MAX}"
        )
    if not name:
        raise EmberfsError(Code.NOT_FOUND, "an empty name")
    if b"/" in name or b"\0" in name:
        raise EmberfsError(Code.INVALID, f"a name cannot hold a slash or a zero byte: {name!r}")


def without_set_id(mode: int) -> int:
    """Mode after an unprivileged write or a change of owner of a non-directory.

    set-group-ID without group execution is not a privilege (it once meant mandatory locking).
    """
    mode &= ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return mode


def created_owner(parent: Inode, caller: Caller, mode: int) -> tuple[int, int]:
    """Return (gid, mode) of a new file: a set-group-ID directory hands its group down."""
    if not parent.mode & stat.S_ISGID:
        return caller.gid, mode
    if stat.S_ISDIR(mode):
        mode |= stat.S_ISGID
    elif mode & stat.S_IXGRP and caller.uid != 0 and not in_group(caller, parent.gid):
        mode &= ~stat.S_ISGID
    return parent.gid, mode
