"""Extended attributes that are no records of their own but part of the inode: ACLs and flags.

    system.posix_acl_access, system.posix_acl_default   acl(5), in the kernel's form
    trusted.emberfs.flags                               letters as chattr(1) knows them: "i"

The flags have a name here because ioctl does not pass through pyfuse3.
"""

import stat

from msgspec.structs import replace

from emberfs.meta import acl
from emberfs.meta.permission import in_group, require_owner
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import IMMUTABLE, Inode
from emberfs.proto.meta_calls import Caller

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"
FLAGS = b"trusted.emberfs.flags"
NAMES = (ACCESS, DEFAULT, FLAGS)

_LETTERS = {b"": 0, b"i": IMMUTABLE}


def value_of(inode: Inode, name: bytes) -> bytes | None:
    """Return the attribute, None if the inode has none."""
    if name == ACCESS:
        return acl.current(inode.acl, inode.mode) if inode.acl else None
    if name == DEFAULT:
        return inode.default_acl or None
    return b"i" if inode.flags & IMMUTABLE else None


def names_of(inode: Inode) -> list[bytes]:
    """Return the names of those that the inode has."""
    return [name for name in NAMES if value_of(inode, name) is not None]


def with_value(inode: Inode, caller: Caller, name: bytes, value: bytes | None) -> Inode:
    """Return the inode with the attribute set, or with None removed; ctime is the caller's care."""
    if name == FLAGS:
        return _with_flags(inode, value or b"")
    require_owner(inode, caller)
    if inode.is_symlink():
        raise EmberfsError(Code.UNSUPPORTED, "a symbolic link has no access control list")
    entries = [] if value is None else acl.parse(value)
    if name == ACCESS:
        return _with_access(inode, caller, entries)
    if entries and not inode.is_directory():
        raise EmberfsError(Code.ACCESS, "only a directory has a default access control list")
    return replace(inode, default_acl=acl.pack(entries) if entries else b"")


def _with_access(inode: Inode, caller: Caller, entries: list[acl.Entry]) -> Inode:
    if not entries:
        return replace(inode, acl=b"")
    mode = acl.with_rights(inode.mode, entries)
    if caller.uid != 0 and not in_group(caller, inode.gid):
        mode &= ~stat.S_ISGID  # as chmod
    return replace(inode, mode=mode, acl=b"" if acl.is_minimal(entries) else acl.pack(entries))


def _with_flags(inode: Inode, letters: bytes) -> Inode:
    if letters not in _LETTERS:
        raise EmberfsError(Code.INVALID, f'flags {letters!r}: "i" (immutable) or nothing')
    if not (inode.is_file() or inode.is_directory()):
        raise EmberfsError(Code.UNSUPPORTED, "only files and directories have flags")
    return replace(inode, flags=_LETTERS[letters])
