"""POSIX access control lists: the kernel's form of them, and what they mean. See acl(5).

An inode keeps a list as setxattr gave it (linux/posix_acl_xattr.h). The rights of owner, mask and
others are those of the mode, whatever the kept list says: so chmod has nothing to update.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

from emberfs.proto.errors import Code, EmberfsError

ACL_BYTES_MAX = 4096  # what the kernel passes through FUSE: one page, 511 entries

_HEAD = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_VERSION = 2
_NO_ID = 0xFFFF_FFFF

OWNER, USER, OWNING_GROUP, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
# What may stand before each tag: entries come in this order, each of the named ones any number of
# times, the others once.
_BEFORE = {
    OWNER: {0},
    USER: {OWNER, USER},
    OWNING_GROUP: {OWNER, USER},
    GROUP: {OWNING_GROUP, GROUP},
    MASK: {OWNING_GROUP, GROUP},
    OTHER: {OWNING_GROUP, GROUP, MASK},
}


class Entry(NamedTuple):
    """One line of a list."""

    tag: int
    rights: int  # rwx as in a mode
    id: int  # of a named user or group


def parse(value: bytes) -> list[Entry]:
    """Read a list and check it; INVALID or UNSUPPORTED. Without entries it means none at all."""
    if len(value) < _HEAD.size or (len(value) - _HEAD.size) % _ENTRY.size:
        raise EmberfsError(Code.INVALID, f"an access control list of {len(value)} bytes")
    if _HEAD.unpack_from(value)[0] != _VERSION:
        raise EmberfsError(Code.UNSUPPORTED, "an access control list of an unknown version")
    if len(value) > ACL_BYTES_MAX:
        raise EmberfsError(
            Code.NO_SPACE, f"an access control list has at most {ACL_BYTES_MAX} bytes"
        )
    found = _entries(value)
    before, named = 0, False
    for entry in found:
        named |= entry.tag in (USER, GROUP)
        if before not in _BEFORE.get(entry.tag, ()) or entry.rights & ~7:
            raise EmberfsError(Code.INVALID, f"{entry} is out of place in an access control list")
        before = entry.tag
    if found and (before != OTHER or (named and found[-2].tag != MASK)):
        raise EmberfsError(Code.INVALID, "an access control list without its mask or others")
    return found


def pack(entries: list[Entry]) -> bytes:
    """Return the kernel's form."""
    return _HEAD.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)


def _entries(value: bytes) -> list[Entry]:
    return [Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEAD.size :])]


def is_minimal(entries: list[Entry]) -> bool:
    """Tell a list that says no more than a mode."""
    return len(entries) <= 3  # owner, owning group, others


def with_rights(mode: int, entries: list[Entry]) -> int:
    """Return the mode of a file whose list is set."""
    rights = {entry.tag: entry.rights for entry in entries}
    group = rights.get(MASK, rights[OWNING_GROUP])
    return mode & ~0o777 | rights[OWNER] << 6 | group << 3 | rights[OTHER]


def current(value: bytes, mode: int) -> bytes:
    """Return a kept access list as it is now, with the rights that are the mode's."""
    shown = {OWNER: mode >> 6 & 7, MASK: mode >> 3 & 7, OTHER: mode & 7}
    return pack([e._replace(rights=shown.get(e.tag, e.rights)) for e in _entries(value)])


def allows(
    value: bytes, mode: int, group: int, uid: int, in_group: Callable[[int], bool], want: int
) -> bool:
    """Tell whether a kept list grants all of `want` to somebody who is not the owner.

    As the kernel's posix_acl_permission: a named user's entry decides; else some entry of one of
    the caller's groups must grant it; else, if none of the groups is listed, the others' rights.
    """
    mask, listed = mode >> 3, False
    for tag, rights, number in _entries(value):
        if tag == USER and number == uid:
            return rights & mask & want == want
        if (tag == OWNING_GROUP and in_group(group)) or (tag == GROUP and in_group(number)):
            listed = True
            if rights & want == want:
                return mask & want == want
    return not listed and mode & want == want


def inherited(default: bytes, mode: int) -> tuple[int, bytes]:
    """Return mode and access list of a new file; its directory's default list replaces the umask.

    See acl(5), object creation and default ACLs.
    """
    entries = _entries(default)
    allowed = with_rights(0, entries)
    kept = b"" if is_minimal(entries) else default
    return mode & (~0o777 | allowed), kept
