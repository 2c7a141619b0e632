"""What the FUSE daemon remembers: open files, directory listings, and what the kernel knows."""

import errno
from bisect import bisect_right
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

import pyfuse3

from emberfs.client.openfile import OpenFile
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import Caller, ReaddirRow

PAGE_ROWS = 256  # entries fetched at once: about what one getdents of 32 KiB takes
EXACT_PAGES = 256  # pages whose every name is kept, so that any of their cookies is exact
FIRST_COOKIE = 3  # 1 and 2 are "." and ".."

H = TypeVar("H")


class KnownInode:
    """An inode that the kernel holds. Dropped when the kernel forgets it."""

    __slots__ = (
        "cached",
        "directory",
        "lookups",
        "mappable",
        "no_acl",
        "no_capability",
        "sent",
        "symlink",
    )

    def __init__(self) -> None:
        self.lookups = 0
        self.sent: tuple[int, int] | None = None  # mtime, length that the kernel was told last
        self.cached: tuple[int, int] | None = None  # mtime, length that its page cache belongs to
        self.no_capability = False  # it has no security.capability, which every write asks for
        self.no_acl = False  # it has no ACLs, which the kernel asks for after every attributes
        self.symlink = b""  # a link's target never changes
        self.directory: Inode | None = None  # of a directory: it outlives its last name
        self.mappable = 0  # handles of it that can be mapped shared and writable

    def length(self) -> int:
        """The length that the kernel was told last."""
        return self.sent[1] if self.sent else 0


class KnownInodes:
    """Lookup counts and what goes with them (see forget in fuse_lowlevel.h)."""

    def __init__(self) -> None:
        self._inodes: dict[int, KnownInode] = {}

    def __len__(self) -> int:
        """How many inodes the kernel holds."""
        return len(self._inodes)

    def held(self) -> Collection[int]:
        """The inodes that the kernel may hold."""
        return self._inodes.keys()

    def of(self, inode: int) -> KnownInode:
        """What is remembered of an inode. Unknown ones (the root) are added."""
        known = self._inodes.get(inode)
        if known is None:
            known = self._inodes[inode] = KnownInode()
        return known

    def tell(self, inode: Inode) -> KnownInode:
        """Note the attributes that go to the kernel now."""
        known = self.of(inode.id)
        known.sent = version(inode)
        known.no_acl = not (inode.acl or inode.default_acl)
        if inode.symlink:
            known.symlink = inode.symlink
        if inode.is_directory():
            known.directory = inode
        return known

    def forget(self, inode: int, count: int) -> None:
        """The kernel gives up `count` references."""
        known = self._inodes.get(inode)
        if known is not None:
            known.lookups -= count
            if known.lookups <= 0:
                del self._inodes[inode]


def version(inode: Inode) -> tuple[int, int]:
    """What must be equal for cached pages to be the file's contents."""
    return inode.mtime_ns, inode.length


class FileHandle:
    """One open file description as the kernel sees it."""

    __slots__ = (
        "append",
        "data_sync",
        "direct",
        "file",
        "known",
        "mappable",
        "strip_mode",
        "sync",
    )

    def __init__(self, file: OpenFile, known: KnownInode) -> None:
        self.file = file
        self.known = known
        self.append = False
        self.mappable = False  # pages of a shared mapping may come back as writes
        self.direct = False  # O_DIRECT, or O_SYNC: writes go through at once
        self.sync = False  # every write is followed by an fsync
        self.data_sync = False  # that fsync may skip attributes (O_DSYNC)
        self.strip_mode: int | None = None  # mode without suid/sgid, to be set at the first write


class HandleTable(Generic[H]):
    """Numbers that stand for open things."""

    def __init__(self) -> None:
        self._handles: dict[int, H] = {}
        self._last = 0

    def __len__(self) -> int:
        """How many are open."""
        return len(self._handles)

    def add(self, thing: H) -> int:
        """Return a fresh number for `thing`."""
        self._last += 1
        self._handles[self._last] = thing
        return self._last

    def get(self, number: int) -> H:
        """What the number stands for; EBADF if nothing."""
        try:
            return self._handles[number]
        except KeyError:
            raise pyfuse3.FUSEError(errno.EBADF) from None

    def take(self, number: int) -> H | None:
        """Remove and return it; None if there is none."""
        return self._handles.pop(number, None)


class _Page:
    """Rows with consecutive cookies; `after` is the name that they were listed behind."""

    __slots__ = ("after", "first", "names")

    def __init__(self, first: int, after: bytes, names: list[bytes]) -> None:
        self.first = first  # cookie of the first row
        self.after = after
        self.names = names


class DirectoryHandle:
    """One open directory: cookies that stay right while names come and go.

    The server lists by name ("after X"), the kernel asks by cookie. Every row that is fetched gets
    a fresh cookie, and a cookie stands for its name until rewinddir: so a seek continues exactly
    behind that name, whatever was inserted or removed meanwhile. Names are kept for the last pages
    only; of an older page we keep what it was listed behind, and a seek back into it counts rows.
    """

    def __init__(self, inode: InodeId, caller: Caller) -> None:
        self.inode = inode
        self.caller = caller
        self.mark = 0  # of the page at hand; see kernelcache.py
        self.rewind()

    def rewind(self) -> None:
        """Begin anew, seeing the directory as it is now."""
        self._pages: list[_Page] = []
        self._rows: list[tuple[int, ReaddirRow]] = []  # of the last page, with their cookies
        self._rows_behind = -1  # the cookie that this page continues
        self._end = -1  # the cookie behind which there is nothing
        self._next = FIRST_COOKIE

    def ended(self, cookie: int) -> bool:
        """Nothing comes behind this cookie."""
        return cookie == self._end

    def rest(self, cookie: int) -> list[tuple[int, ReaddirRow]]:
        """Rows at hand that come behind a cookie; empty if they must be fetched."""
        rows = self._rows
        if cookie == self._rows_behind:
            return rows
        if rows and rows[0][0] <= cookie < rows[-1][0]:
            return rows[cookie + 1 - rows[0][0] :]
        return []

    def position(self, cookie: int) -> tuple[bytes, int]:
        """Name to list after, and how many rows to skip then, to continue behind a cookie."""
        if cookie < FIRST_COOKIE:
            return b"", 0
        place = bisect_right(self._pages, cookie, key=lambda page: page.first) - 1
        if place < 0:
            return b"", 0
        page = self._pages[place]
        index = cookie - page.first
        return (page.names[index], 0) if page.names else (page.after, index + 1)

    def take_page(
        self, cookie: int, after: bytes, rows: Sequence[ReaddirRow], more: bool
    ) -> list[tuple[int, ReaddirRow]]:
        """Number the rows that were listed behind `cookie`."""
        first = self._next
        self._next += len(rows)
        self._rows = [(first + index, row) for index, row in enumerate(rows)]
        self._rows_behind = cookie
        if not more:
            self._end = self._rows[-1][0] if rows else cookie
        if rows:
            self._pages.append(_Page(first, after, [row.name for row in rows]))
        if len(self._pages) > EXACT_PAGES:
            self._pages[-EXACT_PAGES - 1].names = []
        return self._rows
