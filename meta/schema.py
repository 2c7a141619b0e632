"""What the metadata records hold, and how they become values.

| key (kv/keys.py) | record | invariants |
|---|---|---|
| INODE | proto Inode | nlink counts the entries that name it (directories: 2 + subdirectories); with nlink 0 it exists only while a session does |
| ENTRY | Entry | names an existing inode; its type bits are the inode's |
| SESSION | Session | its inode exists |
| XATTR | raw bytes | its inode exists |
| DELETED | Deleted | no inode of that id exists; its chunks may |
| TRIM | Trim | its inode exists; chunks at or beyond `length` may still be there |
| INLINE | raw bytes | its inode exists and is inline; not longer than it, no zeros at its end |
| OWNER | inode, 8 bytes | the inode exists, and its layout has this data id |
| REPLY | Reply | it has an age |
| MARK | Mark | it has an age |
| REPLY_AGE | nothing | what it is the age of exists |
| QUOTA | Quota | USAGE holds the sums over all inodes that count for it or for a quota inside it |
| WALK | Walk | its quota is not active |
| REMOVED | Removed | its inode is a directory with `parent` 0, and no name leads to it |
| TRASH | Trashed | the inode has one name, that of the key, in the directory of the trash |

Values are msgpack, maps for what may grow fields and arrays for small hot records.
"""  # noqa: E501

from enum import IntEnum
from typing import Generic, TypeVar

import msgspec

from emberfs.proto.bounds import UNDECODABLE
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode, Layout
from emberfs.proto.ids import InodeId

FORMAT = 2  # 1: without inline files, which a server of that time would show empty
FORMATS_READ = (1, FORMAT)

R = TypeVar("R", bound=msgspec.Struct)
_ENCODE = msgspec.msgpack.Encoder().encode


class FileSystem(msgspec.Struct, frozen=True, gc=False):
    """Whose metadata this is: a store of another cluster is refused."""

    cluster: str
    format: int = FORMAT


class Entry(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What a name in a directory leads to."""

    inode: InodeId
    mode: int  # file type bits only


class Session(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One open file description at one client."""

    client: int
    write: bool
    privileged: bool  # opened by uid 0: its writes leave set-id bits alone
    since: int = 0  # routing of this version, or newer, shows whether the client lives; 0: unknown


class Owner(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A metadata server in one tenure, see tenure.py."""

    node: int
    incarnation: int
    since: int  # routing version that the tenure began with


class Deleted(msgspec.Struct, frozen=True, gc=False):
    """A file without names and sessions whose chunks are to be removed."""

    layout: Layout
    cutter: Owner | None = None  # who may still be cutting it


class Trim(msgspec.Struct, frozen=True, gc=False):
    """A file that shrank: nothing may remain of its chunks at or beyond `length` bytes."""

    length: int
    layout: Layout
    owner: Owner | None = None  # the server that cuts


class Reply(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The remembered answer of a mutating call."""

    method: int
    body: bytes  # of the answer, or why it failed
    code: int = 0  # of the error, if it failed


class Mark(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Up to which call of a client replies may be forgotten: an earlier one comes too late."""

    sequence: int
    server: int  # whose clock `age_ns` is
    age_ns: int  # when the mark itself may be forgotten


class QuotaState(IntEnum):
    """What a quota is worth."""

    ACTIVE = 0  # its counters are exact
    COUNTING = 1  # what was in the directory when it was set is being counted
    REMOVING = 2  # limits nothing any more; what counts for it is handed to the one above


class Quota(msgspec.Struct, frozen=True, gc=False):
    """Limits of everything below a directory, itself included; 0 means none."""

    above: InodeId  # the quota that encloses it, 0 if none does
    bytes_max: int = 0
    files_max: int = 0
    state: QuotaState = QuotaState.ACTIVE


class Walk(msgspec.Struct, frozen=True, gc=False):
    """How far a directory has been gone through."""

    after: bytes = b""
    search: bool = False  # the directories are done; what is left is looked for among all inodes


class Removed(msgspec.Struct, frozen=True, gc=False):
    """A directory that was taken out of the name space with everything below it."""

    uid: int  # on whose behalf


class Trashed(msgspec.Struct, frozen=True, gc=False):
    """Something in the trash."""

    uid: int  # who put it there
    parent: InodeId  # where it was
    name: bytes
    path: bytes  # the same, as it was called then
    mode: int  # file type bits


class Codec(Generic[R]):
    """Encodes one kind of record."""

    def __init__(self, record: type[R]) -> None:
        self.record = record
        self._name = record.__name__
        self._decoder = msgspec.msgpack.Decoder(record)

    def encode(self, record: R) -> bytes:
        """Return the value to store."""
        return _ENCODE(record)

    def decode(self, value: bytes) -> R:
        """Parse a stored value; INTERNAL if it is not what was once written."""
        try:
            return self._decoder.decode(value)
        except UNDECODABLE as problem:
            raise EmberfsError(
                Code.INTERNAL, f"a stored {self._name} record is corrupt: {problem}"
            ) from None


FILE_SYSTEM = Codec(FileSystem)
INODE = Codec(Inode)
ENTRY = Codec(Entry)
SESSION = Codec(Session)
DELETED = Codec(Deleted)
TRIM = Codec(Trim)
REPLY = Codec(Reply)
MARK = Codec(Mark)
QUOTA = Codec(Quota)
WALK = Codec(Walk)
REMOVED = Codec(Removed)
TRASHED = Codec(Trashed)
