"""Which blocks of a target are in use.

A target's data lives in blocks of eleven sizes, 64 KiB to 64 MiB. Blocks of one size form groups
of about 16 MiB, so that space is reserved from the file system in steps that even a small target
can afford. A position (class, group, index) packed in a u64 names a block.

Every group has two bitmaps. `used` is what must not be handed out; `recorded` is what the records
on disk own. Invariants: recorded is a subset of used; used_bytes is the sum of the used blocks. A
block that is used and not recorded (just taken, or dropped and not yet reusable) is free again
after a restart without any work.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from emberfs.proto.ids import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, MiB

CLASS_BYTES = tuple(CHUNK_BYTES_MIN << step for step in range(11))
assert CLASS_BYTES[-1] == CHUNK_BYTES_MAX
_GROUP_BYTES_AIM = 16 * MiB
GROUP_BLOCKS = tuple(max(1, min(256, _GROUP_BYTES_AIM // size)) for size in CLASS_BYTES)
GROUP_BYTES = tuple(size * count for size, count in zip(CLASS_BYTES, GROUP_BLOCKS, strict=True))
GROUPS_MAX = 1 << 40

NO_BLOCK = (1 << 64) - 1  # the position of an empty chunk
_INDEX_BITS = 16
_CLASS_SHIFT = 56
_GROUP_MASK = GROUPS_MAX - 1
_INDEX_MASK = (1 << _INDEX_BITS) - 1


def pack_position(size_class: int, group: int, index: int) -> int:
    """Name a block."""
    assert 0 <= size_class < len(CLASS_BYTES)
    assert 0 <= group < GROUPS_MAX
    assert 0 <= index < GROUP_BLOCKS[size_class]
    return size_class << _CLASS_SHIFT | group << _INDEX_BITS | index


def unpack_position(position: int) -> tuple[int, int, int]:
    """Return (class, group, index)."""
    return (
        position >> _CLASS_SHIFT,
        position >> _INDEX_BITS & _GROUP_MASK,
        position & _INDEX_MASK,
    )


def is_position(position: int) -> bool:
    """Tell whether a number from disk names a block that can exist."""
    size_class, _, index = unpack_position(position)
    return size_class < len(CLASS_BYTES) and index < GROUP_BLOCKS[size_class]


def class_for(length: int) -> int:
    """Return the smallest class whose blocks hold `length` bytes."""
    assert 0 <= length <= CLASS_BYTES[-1]
    return max(0, (length - 1) // CLASS_BYTES[0]).bit_length()


def block_bytes(position: int) -> int:
    """Return the size of a block."""
    return CLASS_BYTES[position >> _CLASS_SHIFT]


def place_of(position: int) -> tuple[int, int]:
    """Return (class, where the block begins in the file of its class, in bytes)."""
    size_class = position >> _CLASS_SHIFT
    group = position >> _INDEX_BITS & _GROUP_MASK
    start = group * GROUP_BYTES[size_class] + (position & _INDEX_MASK) * CLASS_BYTES[size_class]
    return size_class, start


class GroupBits(NamedTuple):
    """The recorded bitmap of one group: bit i is block i."""

    size_class: int
    group: int
    bits: int


@dataclass(slots=True)
class _Group:
    used: int
    recorded: int


class Allocator:
    """The bitmaps of one target. Not thread-safe: the owner of the lock calls it."""

    def __init__(self) -> None:
        self._groups: list[dict[int, _Group]] = [{} for _ in CLASS_BYTES]
        # Numbers of groups that may have room, lowest first: data gathers at the front of the
        # file and the end can be given back. May hold full or dropped groups; `take` skips them.
        self._roomy: list[list[int]] = [[] for _ in CLASS_BYTES]
        self.used_bytes = 0
        self.reserved_bytes = 0  # all groups, used or not

    def add_group(self, size_class: int, group: int, recorded: int = 0) -> None:
        """Make a group's blocks available except the recorded ones."""
        groups = self._groups[size_class]
        assert group not in groups
        assert recorded >> GROUP_BLOCKS[size_class] == 0
        groups[group] = _Group(recorded, recorded)
        heapq.heappush(self._roomy[size_class], group)
        self.used_bytes += recorded.bit_count() * CLASS_BYTES[size_class]
        self.reserved_bytes += GROUP_BYTES[size_class]

    def drop_group(self, size_class: int, group: int) -> None:
        """Forget an empty group."""
        dropped = self._groups[size_class].pop(group)
        assert dropped.used == 0
        assert dropped.recorded == 0
        self.reserved_bytes -= GROUP_BYTES[size_class]

    def has_group(self, size_class: int, group: int) -> bool:
        """Tell whether a group exists."""
        return group in self._groups[size_class]

    def next_group(self, size_class: int) -> int:
        """Return the lowest number that no group of this class has."""
        groups = self._groups[size_class]
        return next(number for number in range(len(groups) + 1) if number not in groups)

    def take(self, size_class: int) -> int | None:
        """Take a free block; None when every group of the class is full."""
        roomy, groups = self._roomy[size_class], self._groups[size_class]
        full = (1 << GROUP_BLOCKS[size_class]) - 1
        while roomy:
            number = roomy[0]
            group = groups.get(number)
            if group is None or group.used == full:
                heapq.heappop(roomy)
                continue
            lowest = ~group.used & (group.used + 1)
            group.used |= lowest
            self.used_bytes += CLASS_BYTES[size_class]
            return pack_position(size_class, number, lowest.bit_length() - 1)
        return None

    def give(self, position: int) -> None:
        """Make a block available again; it must not be recorded."""
        size_class, number, index = unpack_position(position)
        group = self._groups[size_class][number]
        bit = 1 << index
        assert group.used & bit, "block freed twice"
        assert not group.recorded & bit, "block still owned"
        if group.used == (1 << GROUP_BLOCKS[size_class]) - 1:
            heapq.heappush(self._roomy[size_class], number)
        group.used &= ~bit
        self.used_bytes -= CLASS_BYTES[size_class]

    def preview(self, added: Iterable[int], removed: Iterable[int]) -> list[GroupBits]:
        """Return the recorded bitmaps as they will be; nothing changes until `record`."""
        after: dict[tuple[int, int], int] = {}
        for position, sets in [(p, True) for p in added] + [(p, False) for p in removed]:
            size_class, number, index = unpack_position(position)
            group = self._groups[size_class][number]
            bits, bit = after.get((size_class, number), group.recorded), 1 << index
            assert group.used & bit, "a block that nobody took"
            assert bool(bits & bit) != sets, "two owners, or none"
            after[size_class, number] = bits ^ bit
        return [GroupBits(*key, bits) for key, bits in after.items()]

    def record(self, previewed: Iterable[GroupBits]) -> None:
        """The previewed bitmaps are in the store now."""
        for size_class, number, bits in previewed:
            group = self._groups[size_class][number]
            assert bits & ~group.used == 0
            group.recorded = bits

    def are_recorded(self, positions: Iterable[int]) -> bool:
        """Tell whether the records on disk own all these blocks, by the bitmaps."""
        for position in positions:
            size_class, number, index = unpack_position(position)
            group = self._groups[size_class].get(number)
            if group is None or not group.recorded >> index & 1:
                return False
        return True

    def idle_groups(self, size_class: int) -> list[int]:
        """Empty groups, highest first, save one that is kept for the next block."""
        groups = self._groups[size_class]
        return sorted((n for n, group in groups.items() if group.used == 0), reverse=True)[:-1]

    def groups(self) -> Iterator[tuple[GroupBits, int]]:
        """Yield every group's recorded bitmap and its used bitmap."""
        for size_class, groups in enumerate(self._groups):
            for number, group in groups.items():
                yield GroupBits(size_class, number, group.recorded), group.used

    def check(self) -> None:
        """Assert the invariants of this module."""
        used_bytes = reserved_bytes = 0
        for (size_class, _, recorded), used in self.groups():
            assert recorded & ~used == 0, "a recorded block could be handed out"
            used_bytes += used.bit_count() * CLASS_BYTES[size_class]
            reserved_bytes += GROUP_BYTES[size_class]
        assert used_bytes == self.used_bytes
        assert reserved_bytes == self.reserved_bytes
