"""The data-plane methods of the metadata service.

Every mutating request carries a RequestId: the server remembers its reply for some time, so a
retry after a lost reply answers the same and does nothing twice.
"""

from enum import IntEnum

import msgspec

from emberfs.proto.bounds import I64, U32, U63, U64, BoundedInode, BoundedSession, Groups
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId, SessionId
from emberfs.proto.method import Method

SERVER_CLOCK = -1  # as a time: now, by the clock of the server


def explicit_time(stamp_ns: int) -> int:
    """A time as it is sent: the last nanosecond before 1970 means the clock, so one earlier."""
    return stamp_ns if stamp_ns != SERVER_CLOCK else SERVER_CLOCK - 1


class Caller(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """On whose behalf: permission checks are the server's. uid 0 passes them all."""

    uid: U32
    gid: U32
    groups: Groups = ()


class RequestId(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Names one mutating call; a retry carries the same."""

    client: U64
    sequence: U64
    elsewhere: bool = False  # an earlier try went to another server, or to an earlier life of it


class InodeAnswer(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """An inode as it is now.

    `room`, of an open file: by how many bytes it may grow before the caller settles again; None: it
    is under no quota.
    """

    inode: Inode
    room: int | None = None


class OpenAnswer(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """An inode, and the content of an inline file as of its `inline_version`.

    Behind `content` an inline file is zeros. None: the file has chunks, or ask for the content.
    `room`: see InodeAnswer.
    """

    inode: Inode
    content: bytes | None = None
    inline_bytes_max: int = 0  # how much content a client may settle
    room: int | None = None
    is_new: bool = False  # this very request has made the file: it has no extended attributes


class Nothing(msgspec.Struct, frozen=True, gc=False):
    """An answer without content."""


class LookupRequest(msgspec.Struct, frozen=True, gc=False):
    """Find a name ("." and ".." too) in a directory. NOT_FOUND, NOT_DIRECTORY, ACCESS."""

    caller: Caller
    parent: BoundedInode
    name: bytes


class ResolveRequest(msgspec.Struct, frozen=True, gc=False):
    """Walk a path from the root, following symlinks (the last one only if `follow`).

    Raises NOT_FOUND, NOT_DIRECTORY, ACCESS, LOOP (40 links), NAME_TOO_LONG.
    """

    caller: Caller
    path: bytes
    follow: bool = True
    parent: bool = False  # stop at the directory that holds the last name


class ResolveAnswer(msgspec.Struct, frozen=True, gc=False):
    """The inode, or with `parent` the directory's inode and the remaining name."""

    inode: Inode
    name: bytes = b""


class GetattrRequest(msgspec.Struct, frozen=True, gc=False):
    """Attributes by id. NOT_FOUND once the inode is gone."""

    inode: BoundedInode


class SetattrRequest(msgspec.Struct, frozen=True, gc=False):
    """Change attributes; None leaves one alone. A new length truncates (server-side, chunks too).

    Times may be SERVER_CLOCK. Both of them: whoever may write may ask for that (utimensat(2)).
    `written`: with a new length, the highest end of this client's writes since `truncate_version`;
    meta may have been told and forgotten it since.
    """

    caller: Caller
    request: RequestId
    inode: BoundedInode
    mode: U32 | None = None
    uid: U32 | None = None
    gid: U32 | None = None
    length: I64 | None = None
    atime_ns: I64 | None = None
    mtime_ns: I64 | None = None
    session: BoundedSession = SessionId(0)  # a write session skips the permission check of truncate
    written: I64 = 0
    truncate_version: U63 = 0


class CreateRequest(msgspec.Struct, frozen=True, gc=False):
    """Create, open or create-and-open a regular file in one transaction.

    EXISTS if the name exists and `exclusive`; otherwise an existing regular file is opened
    (truncated if `truncate`). The answer's session is 0 if `session` was 0 (mknod only).
    """

    caller: Caller
    request: RequestId
    parent: BoundedInode
    name: bytes
    mode: U32  # permission bits
    session: BoundedSession
    write: bool
    exclusive: bool = False
    truncate: bool = False
    since: U63 = 0  # see OpenRequest
    umask: U32 = 0  # of the caller; a default ACL takes its place
    read: bool = False  # an existing file must be readable, too; implied without write and truncate


class MknodRequest(msgspec.Struct, frozen=True, gc=False):
    """Make a directory (S_IFDIR), fifo, socket, device or empty regular file."""

    caller: Caller
    request: RequestId
    parent: BoundedInode
    name: bytes
    mode: U32  # type and permission bits
    rdev: U64 = 0
    umask: U32 = 0  # of the caller; a default ACL takes its place


class SymlinkRequest(msgspec.Struct, frozen=True, gc=False):
    """Make a symbolic link."""

    caller: Caller
    request: RequestId
    parent: BoundedInode
    name: bytes
    target: bytes


class LinkRequest(msgspec.Struct, frozen=True, gc=False):
    """Make a hard link to a non-directory."""

    caller: Caller
    request: RequestId
    inode: BoundedInode
    parent: BoundedInode
    name: bytes


class RemoveRequest(msgspec.Struct, frozen=True, gc=False):
    """unlink, or rmdir with `directory`. IS_DIRECTORY / NOT_DIRECTORY / NOT_EMPTY as in POSIX."""

    caller: Caller
    request: RequestId
    parent: BoundedInode
    name: bytes
    directory: bool


class RenameRequest(msgspec.Struct, frozen=True, gc=False):
    """rename(2) with all overwrite rules; flags as renameat2: 1 NOREPLACE, 2 EXCHANGE."""

    caller: Caller
    request: RequestId
    parent: BoundedInode
    name: bytes
    new_parent: BoundedInode
    new_name: bytes
    flags: U32 = 0


class OpenRequest(msgspec.Struct, frozen=True, gc=False):
    """Open a regular file: checks permission and records a session, so that unlink keeps it.

    `since`: routing of this version, or newer, shows the client alive until its lease has run out.
    """

    caller: Caller
    request: RequestId
    inode: BoundedInode
    session: BoundedSession
    read: bool
    write: bool
    truncate: bool = False
    since: U63 = 0


class SettleRequest(msgspec.Struct, frozen=True, gc=False):
    """Report a file's length (and times) while it is open, at fsync, and at close.

    `length` is the highest end of any write of this session since `truncate_version`; the file's
    length becomes max(current, length) if the truncate version is still the current one, and is
    left alone otherwise. With `close` the session ends (and an unlinked file may be collected), but
    not if the length has to be told again, under the truncate version of the answer.
    With `durable` the answer comes only after the transaction is on stable storage. `torn`: a write
    failed, and may have left bytes behind the end. `want`: bytes behind the end that are about to
    be written, for which there must be room in the quota. `sparse`: a write began behind the end.

    An inline file is written by `content`: it replaces all of it, and `length` is the new length,
    if `inline_version`, which it is based on, is current (or newer: a power cut took that version,
    and nobody has written since). SUPERSEDED otherwise; then nothing has happened.
    """

    request: RequestId
    inode: BoundedInode
    session: BoundedSession
    length: I64 | None = None
    truncate_version: U63 = 0
    mtime_ns: I64 | None = None
    atime_ns: I64 | None = None
    close: bool = False
    durable: bool = False
    torn: bool = False
    want: U63 = 0
    sparse: bool = False
    content: bytes | None = None
    inline_version: U63 = 0


class ContentRequest(msgspec.Struct, frozen=True, gc=False):
    """Fetch the content of an inline file together with its inode. NOT_FOUND."""

    inode: BoundedInode


class PromoteRequest(msgspec.Struct, frozen=True, gc=False):
    """Move the content of an inline file into chunks, for good; done already if it has chunks."""

    request: RequestId
    inode: BoundedInode


class ReaddirRequest(msgspec.Struct, frozen=True, gc=False):
    """List a directory after a name, with the inodes if `plus`."""

    caller: Caller
    inode: BoundedInode
    after: bytes  # b"" from the beginning; names come in byte order
    limit: I64
    plus: bool = True


class ReaddirRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One entry; `inode` only with plus (None if it vanished in between)."""

    name: bytes
    id: InodeId
    mode: int
    inode: Inode | None


class ReaddirAnswer(msgspec.Struct, frozen=True, gc=False):
    """A page; `more` tells whether another follows. "." and ".." are not listed."""

    rows: tuple[ReaddirRow, ...]
    more: bool


class XattrRequest(msgspec.Struct, frozen=True, gc=False):
    """Get, or with an empty name list, extended attributes. NO_ATTRIBUTE if absent."""

    caller: Caller
    inode: BoundedInode
    name: bytes


class XattrAnswer(msgspec.Struct, frozen=True, gc=False):
    """The value, or the names."""

    value: bytes = b""
    names: tuple[bytes, ...] = ()


class SetXattrRequest(msgspec.Struct, frozen=True, gc=False):
    """Set (or with value None remove) one; flags 1 XATTR_CREATE, 2 XATTR_REPLACE."""

    caller: Caller
    request: RequestId
    inode: BoundedInode
    name: bytes
    value: bytes | None
    flags: U32 = 0


class StatfsRequest(msgspec.Struct, frozen=True, gc=False):
    """Ask for space and inodes: of what `inode` counts for, 0: of the whole file system."""

    inode: BoundedInode = InodeId(0)


class StatfsAnswer(msgspec.Struct, frozen=True, gc=False):
    """Capacity after replication, as an application can use it; of a quota, what is left of it."""

    total_bytes: int
    free_bytes: int
    inodes: int
    inodes_max: int = 0  # 0: no limit


class StableRequest(msgspec.Struct, frozen=True, gc=False):
    """Make every metadata transaction so far stable (fsync of a directory, syncfs)."""


# ---------------------------------------------------------------- caches of clients


class Change(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Attributes of an inode have changed; with a name, what it leads to in that directory."""

    inode: InodeId
    name: bytes = b""


class ListenRequest(msgspec.Struct, frozen=True, gc=False):
    """Wait for changes of names and attributes that this server has made since `after`.

    Answered at once if there are any, else after `hold_ns`, empty. Changes by `client` itself are
    left out where its own call tells as much.
    """

    client: U64
    life: U64 = 0  # of the server, as it said in its last answer; 0: nothing was heard yet
    after: U64 = 0
    hold_ns: U63 = 0


class ListenAnswer(msgspec.Struct, frozen=True, gc=False):
    """Changes up to number `last`; `missed`: others came before, nobody knows them any more."""

    life: int
    last: int
    missed: bool
    changes: tuple[Change, ...]


# ---------------------------------------------------------------- for fsck


class ScanRecordsRequest(msgspec.Struct, frozen=True, gc=False):
    """A page of stored records in key order, as they are (kv/keys.py, meta/schema.py)."""

    start: bytes  # inclusive
    stop: bytes  # exclusive
    limit: I64
    values: bool = True  # False: keys only


class RecordRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One stored record."""

    key: bytes
    value: bytes


class ScanRecordsAnswer(msgspec.Struct, frozen=True, gc=False):
    """A page of one moment; `more` tells whether the range goes on behind it."""

    rows: tuple[RecordRow, ...]
    more: bool


class FetchRecordsRequest(msgspec.Struct, frozen=True, gc=False):
    """Stored records by key, all of one moment."""

    keys: tuple[bytes, ...]


class FetchRecordsAnswer(msgspec.Struct, frozen=True, gc=False):
    """Their values in the order of the keys; None for what is not there."""

    values: tuple[bytes | None, ...]


class CensusRequest(msgspec.Struct, frozen=True, gc=False):
    """Count the inodes of one moment and compare with the counter that `df` shows."""


class CensusAnswer(msgspec.Struct, frozen=True, gc=False):
    """Truth and counter; and the clients whose sessions should have ended long ago."""

    inodes: int
    counter: int
    overdue: tuple[int, ...]


class MendKind(IntEnum):
    """One repair of the metadata. Each is one transaction and looks again before it acts."""

    DROP_ENTRY = 1  # a name that leads nowhere, lies in no directory, or is a directory's second
    FIX_ENTRY = 2  # the type in a directory entry becomes the inode's
    SET_LINKS = 3  # the link count becomes `number`
    SET_PARENT = 4  # ".." of a directory becomes `parent`, which names it as `name`
    ATTACH = 5  # under /lost+found; a name in `parent` that is part of a cycle goes
    DESTROY = 6  # a file without names and sessions: its chunks go to the collector
    DROP_RECORD = 7  # the record `name` (a key) that belongs to nothing
    END_SESSION = 8  # session `number` of a client that is gone
    SET_COUNTER = 9  # the counter of inodes becomes the truth
    TRIM = 10  # chunks beyond the end of a file that nobody writes are cut
    OWN_DATA = 11  # the owner record of the data id that the inode names is made again
    SET_USAGE = 20  # the counters of the quota of directory `inode` become the truth
    RECOUNT = 21  # an inode counts for the quota of `parent`, which names it as `name`
    DROP_QUOTA = 22  # a quota without a directory


class Mend(msgspec.Struct, frozen=True, gc=False):
    """A repair and its evidence: if the record is not `expected` any more, nothing happens."""

    kind: MendKind
    inode: BoundedInode = InodeId(0)
    parent: BoundedInode = InodeId(0)
    name: bytes = b""
    number: U63 = 0
    expected: bytes = b""  # the record as it was when the damage was seen


class MendRequest(msgspec.Struct, frozen=True, gc=False):
    """Perform a repair. STALE if what was seen has changed: look again."""

    request: RequestId
    mend: Mend


LOOKUP = Method(32, "lookup", LookupRequest, InodeAnswer)
RESOLVE = Method(33, "resolve", ResolveRequest, ResolveAnswer)
GETATTR = Method(34, "getattr", GetattrRequest, InodeAnswer)
SETATTR = Method(35, "setattr", SetattrRequest, InodeAnswer)
CREATE = Method(36, "create", CreateRequest, OpenAnswer)
MKNOD = Method(37, "mknod", MknodRequest, InodeAnswer)
SYMLINK = Method(38, "symlink", SymlinkRequest, InodeAnswer)
LINK = Method(39, "link", LinkRequest, InodeAnswer)
REMOVE = Method(40, "remove", RemoveRequest, Nothing)
RENAME = Method(41, "rename", RenameRequest, Nothing)
OPEN = Method(42, "open", OpenRequest, OpenAnswer)
SETTLE = Method(43, "settle", SettleRequest, InodeAnswer)
READDIR = Method(44, "readdir", ReaddirRequest, ReaddirAnswer)
XATTR = Method(45, "xattr", XattrRequest, XattrAnswer)
SET_XATTR = Method(46, "set_xattr", SetXattrRequest, Nothing)
STATFS = Method(47, "statfs", StatfsRequest, StatfsAnswer)
STABLE = Method(48, "stable", StableRequest, Nothing)
SCAN_RECORDS = Method(49, "scan_records", ScanRecordsRequest, ScanRecordsAnswer)
FETCH_RECORDS = Method(50, "fetch_records", FetchRecordsRequest, FetchRecordsAnswer)
CENSUS = Method(51, "census", CensusRequest, CensusAnswer)
MEND = Method(52, "mend", MendRequest, Nothing)
LISTEN = Method(60, "listen", ListenRequest, ListenAnswer)
CONTENT = Method(61, "content", ContentRequest, OpenAnswer)
PROMOTE = Method(62, "promote", PromoteRequest, InodeAnswer)
