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
| REPLY, REPLY_AGE | Reply, nothing | both or neither |

Values are msgpack, maps for what may grow fields and arrays for small hot records.
"""  # noqa: E501

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


class Deleted(msgspec.Struct, frozen=True, gc=False):
    """A file without names and sessions whose chunks are to be removed."""

    layout: Layout


class Trim(msgspec.Struct, frozen=True, gc=False):
    """A file that shrank: nothing may remain of its chunks at or beyond `length` bytes."""

    length: int
    layout: Layout


class Reply(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The remembered answer of a mutating call."""

    method: int
    body: bytes


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
