"""Every key of the key-value store: the one list of prefixes, and order-preserving encodings.

Invariants: prefixes are one byte and unique; integers inside keys are big-endian, so that byte
order is numeric order (except inode ids, which are scattered on purpose).
"""

import struct
from enum import Enum
from typing import NamedTuple

from emberfs.proto.ids import InodeId

KEY_BYTES_MAX = 2048


class Prefix(bytes, Enum):
    """First byte of a key: what kind of record it is."""

    FILE_SYSTEM = b"F"  # one record: cluster name, format
    COUNTER = b"C"  # + name: int64
    INODE = b"I"  # + scattered inode
    ENTRY = b"D"  # + parent inode + name: a directory is one range
    SESSION = b"S"  # + inode + session: who has the file open
    XATTR = b"X"  # + inode + name
    DELETED = b"G"  # + time + inode: waits for its chunks to be removed
    TRIM = b"T"  # + inode: shrunk, chunks beyond the end are still to be cut
    INLINE = b"B"  # + inode: the content of a small file
    OWNER = b"O"  # + data id: the inode whose chunks have it instead of the inode's own id
    REPLY = b"R"  # + client + sequence: the remembered reply of a mutating call
    MARK = b"W"  # + client: up to which of its calls replies may be forgotten
    REPLY_AGE = b"r"  # + server + time + client + sequence: the same in order of age
    QUOTA = b"Q"  # + inode of a directory: the limits of everything below it
    USAGE = b"q"  # + inode of a directory + kind: int64, what counts for its quota
    WALK = b"Y"  # + quota + directory: its names are still to be counted anew
    REMOVED = b"E"  # + time + inode: a directory without a name, to be emptied and deleted
    TRASH = b"Z"  # + time + inode: where something in the trash came from
    ENGINE = b"\0"  # what engines keep for themselves: never in a backup
    MGMTD = b"M"  # everything of the management service; it divides its space itself


class Span(NamedTuple):
    """A range of keys [start, stop)."""

    start: bytes
    stop: bytes


_U64 = struct.Struct(">Q")
_INODE = struct.Struct("<Q")
_TWO = struct.Struct(">QQ")
_THREE = struct.Struct(">QQQ")
_FOUR = struct.Struct(">QQQQ")

# Plain bytes: slicing and adding enum members costs ten times as much.
_P = {prefix: bytes(prefix.value) for prefix in Prefix}
_INODE_PREFIX = _P[Prefix.INODE]
_ENTRY_PREFIX = _P[Prefix.ENTRY]
_SESSION_PREFIX = _P[Prefix.SESSION]
_XATTR_PREFIX = _P[Prefix.XATTR]
_REPLY_PREFIX = _P[Prefix.REPLY]
_REPLY_AGE_PREFIX = _P[Prefix.REPLY_AGE]

FILE_SYSTEM_KEY = _P[Prefix.FILE_SYSTEM]
INODE_BLOCK_KEY = _P[Prefix.COUNTER] + b"inode-block"  # next block of ids to hand out
BARRED_BLOCK_KEY = _P[Prefix.COUNTER] + b"barred-block"  # up to it: ids become no data ids
SEARCHED_BLOCK_KEY = _P[Prefix.COUNTER] + b"searched-block"  # up to it: no lost inode has chunks
LOADING_KEY = _P[Prefix.ENGINE] + b"l"  # there while a backup is being loaded
STAMP_KEY = _P[Prefix.ENGINE] + b"n"  # last stamp given, where the engine has none of its own
LIFE_KEY = _P[Prefix.COUNTER] + b"life"  # how often a metadata server was started
INODE_COUNT_KEY = _P[Prefix.COUNTER] + b"inodes"
REMOVED_COUNT_KEY = _P[Prefix.COUNTER] + b"removed-directories"


def span_of(prefix: bytes) -> Span:
    """All keys that begin with `prefix`."""
    trimmed = prefix.rstrip(b"\xff")
    assert trimmed, "no key sorts behind a prefix of 0xff"
    return Span(prefix, trimmed[:-1] + bytes([trimmed[-1] + 1]))


def inode_key(inode: int) -> bytes:
    """Little-endian: neighbouring ids scatter over the shards of a distributed store."""
    return _INODE_PREFIX + _INODE.pack(inode)


def unpack_inode_key(key: bytes) -> InodeId:
    """Return the inode of its record's key."""
    return InodeId(_INODE.unpack(key[1:])[0])


def unpack_inode_prefix(key: bytes) -> InodeId:
    """Return the inode that an entry's (its directory) or attribute's key begins with."""
    return InodeId(_U64.unpack(key[1:9])[0])


def entry_key(parent: int, name: bytes) -> bytes:
    """Key of a name in a directory."""
    return _ENTRY_PREFIX + _U64.pack(parent) + name


def entry_span(parent: int, after: bytes = b"") -> Span:
    """All names of a directory that sort behind `after`."""
    start = _ENTRY_PREFIX + _U64.pack(parent)
    return Span(start + after + b"\0" if after else start, _ENTRY_PREFIX + _U64.pack(parent + 1))


def entry_name(key: bytes) -> bytes:
    """Return the name in an entry's key."""
    return key[9:]


def session_key(inode: int, session: int) -> bytes:
    """Key of one open file description."""
    return _SESSION_PREFIX + _TWO.pack(inode, session)


def session_span(inode: int) -> Span:
    """All sessions of a file."""
    return Span(
        _SESSION_PREFIX + _U64.pack(inode),
        _SESSION_PREFIX + _U64.pack(inode + 1),
    )


def unpack_session_key(key: bytes) -> tuple[int, int]:
    """Return (inode, session)."""
    inode, session = _TWO.unpack(key[1:])
    return inode, session


def xattr_key(inode: int, name: bytes) -> bytes:
    """Key of an extended attribute."""
    return _XATTR_PREFIX + _U64.pack(inode) + name


def xattr_span(inode: int) -> Span:
    """All extended attributes of a file."""
    return Span(_XATTR_PREFIX + _U64.pack(inode), _XATTR_PREFIX + _U64.pack(inode + 1))


def xattr_name(key: bytes) -> bytes:
    """Return the name in an attribute's key."""
    return key[9:]


def deleted_key(time_ns: int, inode: int) -> bytes:
    """Key in the deletion queue, oldest first."""
    return _P[Prefix.DELETED] + _TWO.pack(time_ns, inode)


def trim_key(inode: int) -> bytes:
    """Key of an unfinished trim."""
    return _P[Prefix.TRIM] + _U64.pack(inode)


def inline_key(inode: int) -> bytes:
    """Key of the content of a small file."""
    return _P[Prefix.INLINE] + _U64.pack(inode)


def owner_key(data: int) -> bytes:
    """Key of the inode that chunks of a data id belong to."""
    return _P[Prefix.OWNER] + _U64.pack(data)


def pack_owner(inode: int) -> bytes:
    """Return the value of an owner record."""
    return _U64.pack(inode)


def unpack_owner(value: bytes) -> int:
    """Return the inode of an owner record; 0, which no inode has, if it is none."""
    inode: int = _U64.unpack(value)[0] if len(value) == _U64.size else 0
    return inode


def unpack_inode_suffix(key: bytes) -> int:
    """Return the inode of a deletion, trim or content key, the data id of an owner key."""
    inode: int = _U64.unpack(key[-8:])[0]
    return inode


def reply_key(client: int, sequence: int) -> bytes:
    """Key of a remembered reply."""
    return _REPLY_PREFIX + _TWO.pack(client, sequence)


def mark_key(client: int) -> bytes:
    """Key of what was forgotten of a client."""
    return _P[Prefix.MARK] + _U64.pack(client)


class ReplyAge(NamedTuple):
    """Which reply is how old: `time_ns` on the clock of the server that has answered."""

    server: int
    time_ns: int
    client: int
    sequence: int  # 0: it is the age of the client's mark


def reply_age_key(age: ReplyAge) -> bytes:
    """Key of a remembered reply in order of age, among those of its server."""
    return _REPLY_AGE_PREFIX + _FOUR.pack(*age)


def reply_age_span(server: int, before_ns: int) -> Span:
    """All replies that a server has remembered before a time."""
    start = _REPLY_AGE_PREFIX + _U64.pack(server)
    return Span(start, start + _U64.pack(before_ns))


def reply_ages_of(server: int) -> Span:
    """All replies that a server has remembered, or that were before servers were told apart."""
    start = _REPLY_AGE_PREFIX + _U64.pack(server)
    return Span(start, _REPLY_AGE_PREFIX + _U64.pack(server + 1))


def unpack_reply_age_key(key: bytes) -> ReplyAge:
    """Return what the key says. Before servers were told apart, keys began with the time."""
    if len(key) == 1 + _FOUR.size:
        return ReplyAge(*_FOUR.unpack(key[1:]))
    time_ns, client, sequence = _THREE.unpack(key[1:])
    return ReplyAge(time_ns, time_ns, client, sequence)


def aged_key(age: ReplyAge) -> bytes:
    """Key of the record whose age it is."""
    return reply_key(age.client, age.sequence) if age.sequence else mark_key(age.client)


def quota_key(directory: int) -> bytes:
    """Key of a quota."""
    return _P[Prefix.QUOTA] + _U64.pack(directory)


def usage_key(directory: int, kind: bytes) -> bytes:
    """Key of a counter of a quota: b"b" bytes, b"f" files, b"w" names looked at by its walk."""
    return _P[Prefix.USAGE] + _U64.pack(directory) + kind


def usage_span(directory: int) -> Span:
    """All counters of a quota."""
    start = _P[Prefix.USAGE]
    return Span(start + _U64.pack(directory), start + _U64.pack(directory + 1))


def walk_key(quota: int, directory: int) -> bytes:
    """Key of a directory that a change of a quota has not been through."""
    return _P[Prefix.WALK] + _TWO.pack(quota, directory)


def walk_span(quota: int) -> Span:
    """All directories that a change of a quota has not been through."""
    start = _P[Prefix.WALK]
    return Span(start + _U64.pack(quota), start + _U64.pack(quota + 1))


def unpack_walk_key(key: bytes) -> tuple[int, int]:
    """Return (quota, directory)."""
    quota, directory = _TWO.unpack(key[1:])
    return quota, directory


def removed_key(time_ns: int, inode: int) -> bytes:
    """Key of a removed directory, oldest first."""
    return _P[Prefix.REMOVED] + _TWO.pack(time_ns, inode)


def trash_key(time_ns: int, inode: int) -> bytes:
    """Key of something in the trash, oldest first."""
    return _P[Prefix.TRASH] + _TWO.pack(time_ns, inode)


def unpack_time_suffix(key: bytes) -> int:
    """Return the time of a key that ends with time and inode."""
    time_ns: int = _U64.unpack(key[-16:-8])[0]
    return time_ns
