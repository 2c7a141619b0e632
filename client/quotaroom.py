"""How far open files under a quota may grow before meta is asked again.

Meta tells with the answers of open and settle by how much a file may grow. A write beyond that
settles first, and fails with QUOTA when there is no more room then: at once, not when the file is
closed. What is allowed becomes old: others use the same quota.
"""

from typing import NamedTuple

from emberfs.proto.files import Inode
from emberfs.proto.ids import SECOND, InodeId

ROOM_AGE_NS = 5 * SECOND


class QuotaRoom(NamedTuple):
    """What meta has allowed."""

    stop: int  # bytes: the file may grow to this length
    told_ns: int

    def allows(self, stop: int, now_ns: int) -> bool:
        """Tell whether a write may go on up to `stop` without asking."""
        return stop <= self.stop and now_ns - self.told_ns <= ROOM_AGE_NS


class QuotaRooms:
    """The rooms of all files that this client writes under a quota."""

    def __init__(self) -> None:
        self._rooms: dict[InodeId, QuotaRoom] = {}

    def of(self, inode: InodeId) -> QuotaRoom | None:
        """Return what is allowed; None: there is no limit."""
        return self._rooms.get(inode)

    def note(self, inode: Inode, room: int | None, now_ns: int) -> None:
        """Learn from the answer to a writer's call."""
        if room is None:
            self._rooms.pop(inode.id, None)
        else:
            self._rooms[inode.id] = QuotaRoom(inode.length + room, now_ns)

    def forget(self, inode: InodeId) -> None:
        """The file is open no more."""
        self._rooms.pop(inode, None)
