"""What the kernel may believe of one mount, and for how long.

While every change is announced (client/listening.py), names, missing names and attributes are
believed for long, and dropped from the kernel when they change; otherwise for a second, as always.

An answer that was on its way while its subject changed is believed for the short time only: the
kernel may take it in after the drop. What Linux does about the rest (fs/fuse/dir.c, inode.c):
dropping attributes makes answers that were asked for earlier invalid, and dropping a name waits for
lookups under way in its directory. An inode that was answered a moment ago may not be there yet
when its attributes are to be dropped; that is tried again until it is.

Names that were told for long are remembered, so that all can be dropped; there is a bound.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

from emberfs.proto.meta_calls import Change

NAMES_MAX = 200_000
EVICTED = NAMES_MAX // 8  # of the oldest, to make room
RECENT_MAX = 20_000  # changes that answers under way are compared with one by one


class Kernel(Protocol):
    """Drops what the kernel has cached."""

    def drop_attributes(self, inode: int) -> bool:
        """Let it ask anew for an inode's attributes. False if it does not have the inode (yet)."""
        ...

    def drop_all_attributes(self, inodes: Collection[int]) -> None:
        """As drop_attributes, for many; it may take a while."""
        ...

    def drop_name(self, directory: int, name: bytes) -> None:
        """Let it ask anew for a name, soon. Harmless if it is not cached."""
        ...

    def held(self) -> Collection[int]:
        """The inodes that it may have."""
        ...


class Timeouts(NamedTuple):
    """In seconds."""

    short_s: float
    long_s: float


class KernelCache:
    """Keeps the promise that what the kernel believes is right, or old by a short time."""

    def __init__(self, kernel: Kernel, attributes: Timeouts, names: Timeouts) -> None:
        self.is_current: Callable[[], bool] = lambda: False  # set by who listens to changes
        self.dropped = 0  # names and attributes, because they had changed
        self._kernel = kernel
        self._attributes = attributes
        self._names = names
        self._told: dict[tuple[int, bytes], None] = {}  # names that are believed for long
        self._believed = False  # anything was told for long since everything was dropped
        self._number = 0  # rises with whatever is heard
        self._recent: dict[tuple[int, bytes], int] = {}  # change, see Change -> number
        self._floor = 0  # what was asked for before this is old in any case
        self._again: set[int] = set()

    def mark(self) -> int:
        """This moment, to be noted before a server is asked."""
        return self._number

    def attribute_timeout_s(self, inode: int, mark: int) -> float:
        """How long attributes that were asked for after `mark` may be believed."""
        short_s, long_s = self._attributes
        if long_s <= short_s or not self._is_good(inode, b"", mark):
            return short_s
        self._believed = True
        return long_s

    def name_timeout_s(
        self, directory: int, name: bytes, mark: int, *, listed: bool = False
    ) -> float:
        """How long it may be believed what a name leads to, or that it leads nowhere.

        `listed`: one of very many, perhaps; they do not push out what was asked for by name.
        """
        short_s, long_s = self._names
        if long_s <= short_s or not self._is_good(directory, name, mark):
            return short_s
        key = (directory, name)
        if key not in self._told:
            if len(self._told) >= NAMES_MAX:
                if listed:
                    return short_s
                self._drop_names(list(islice(self._told, EVICTED)))
            self._told[key] = None
            self._believed = True
        return long_s

    def _is_good(self, inode: int, name: bytes, mark: int) -> bool:
        if mark < self._floor or not self.is_current():
            return False
        return self._recent.get((inode, name), 0) <= mark

    def heard(self, changes: Sequence[Change]) -> None:
        """Drop what has changed (see Listening)."""
        self._number += 1
        for inode, name in {(change.inode, change.name) for change in changes}:
            self._recent[inode, name] = self._number
            if not name:
                self._drop_attributes(inode)
            elif (inode, name) in self._told:
                self._drop_names([(inode, name)])
        if len(self._recent) > RECENT_MAX:
            self._recent.clear()
            self._floor = self._number

    def _drop_attributes(self, inode: int) -> None:
        if inode not in self._kernel.held():
            return
        self.dropped += 1
        if not self._kernel.drop_attributes(inode):
            self._again.add(inode)

    def _drop_names(self, names: Iterable[tuple[int, bytes]]) -> None:
        for directory, name in names:
            del self._told[directory, name]
            self.dropped += 1
            self._kernel.drop_name(directory, name)

    def look_again(self) -> None:
        """To be called several times a second: the kernel has taken in what it was answered."""
        again, self._again = self._again, set()
        for inode in again:
            self._drop_attributes(inode)

    def lost(self) -> None:
        """Drop everything: something may have changed unheard."""
        self._number += 1
        self._floor = self._number
        self._recent.clear()
        if self._believed:
            self._believed = False
            self._drop_names(list(self._told))
            self._kernel.drop_all_attributes(self._kernel.held())
