"""The index of a KV cache: which key lies where, which segments there are, which were used last.

Batches of several logs may be applied in any order among the logs and more than once: of two that
contradict each other the higher order wins. What was removed or evicted leaves a grave with its
order, because an older put may be read later; graves are dropped after two rounds, since a whole
round that began after a removal was read has read every put that the remover knew of.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from itertools import repeat
from operator import add
from typing import NamedTuple, TypeAlias

from emberfs.client.kvcache.records import (
    KEYS_MAX,
    Batch,
    Entries,
    Evicted,
    FileId,
    Graves,
    Message,
    Opened,
    Put,
    Remove,
    Sealed,
    SegmentState,
    Touched,
    order_of,
)

DEAD_MAX = 65_536  # segments remembered as gone, so that late puts into them are refused
EVICTED_IN_BATCH = 4096

_Row: TypeAlias = tuple[int, int, int, int, int]  # order, segment handle, offset, length, checksum


class Location(NamedTuple):
    """Where a block is."""

    segment: FileId
    offset: int  # bytes in the segment
    length: int  # bytes
    checksum: int
    order: int


class Segment:
    """What is known of one segment."""

    __slots__ = ("capacity", "handle", "id", "keys", "live", "sealed", "used")

    def __init__(self, name: FileId, handle: int, capacity: int) -> None:
        self.id = name
        self.handle = handle
        self.capacity = capacity
        self.used = 0  # bytes, up to the end of the last block
        self.sealed = False
        self.live = 0  # blocks that can be found
        self.keys: list[bytes] = []  # all that were ever put into it

    @property
    def charge(self) -> int:
        """Bytes that count for the cap: what may still be written counts as well."""
        return self.used if self.sealed else max(self.used, self.capacity)


class Index:
    """All blocks of one namespace, as far as this process has heard of them."""

    def __init__(self) -> None:
        self.sequence = 0  # the highest that was seen
        self._rows: dict[bytes, _Row] = {}
        self._segments: OrderedDict[FileId, Segment] = OrderedDict()  # least recently used first
        self._by_handle: dict[int, Segment] = {}
        self._handles = 0
        self._dead: OrderedDict[FileId, None] = OrderedDict()
        self._graves: dict[bytes, int] = {}  # of this round: key -> order
        self._old_graves: dict[bytes, int] = {}

    def __len__(self) -> int:
        """How many blocks can be found."""
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        """Tell whether a block can be found."""
        return key in self._rows

    # ------------------------------------------------------------ questions

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Tell which blocks can be found."""
        rows = self._rows
        return [key in rows for key in keys]

    def find(self, key: bytes) -> Location | None:
        """Where a block is."""
        row = self._rows.get(key)
        if row is None:
            return None
        order, handle, offset, length, checksum = row
        return Location(self._by_handle[handle].id, offset, length, checksum, order)

    def segments(self) -> list[Segment]:
        """All segments, the least recently used first."""
        return list(self._segments.values())

    def is_dead(self, segment: FileId) -> bool:
        """Tell whether a segment was evicted."""
        return segment in self._dead

    def knows(self, segment: FileId) -> bool:
        """Tell whether a segment is there, as far as is known."""
        return segment in self._segments

    def total_bytes(self) -> int:
        """What counts for the cap."""
        return sum([segment.charge for segment in self._segments.values()])

    def victims(self, cap_bytes: int, keep: Collection[FileId | None]) -> list[FileId]:
        """Segments to evict so that the rest fits: empty ones, then the least used."""
        excess = self.total_bytes() - cap_bytes
        empty = [s for s in self._segments.values() if s.sealed and not s.live]
        others = [s for s in self._segments.values() if not (s.sealed and not s.live)]
        chosen: list[FileId] = []
        for segment in empty + others:
            if excess <= 0:
                break
            if segment.id not in keep:
                chosen.append(segment.id)
                excess -= segment.charge
        return chosen

    # ------------------------------------------------------------ changes

    def apply(self, writer: int, batch: Batch) -> None:
        """Learn from a batch of a log of `writer`, or of a snapshot."""
        sequence, message = batch
        self.sequence = max(self.sequence, sequence)
        self._apply(order_of(sequence, writer), message)

    def _apply(self, order: int, message: Message) -> None:
        match message:
            case Put():
                self._put(repeat(order), message)
            case Remove(keys):
                self._remove(order, keys)
            case Opened(segment, capacity):
                if segment not in self._dead:
                    self._segment(segment).capacity = capacity
            case Sealed(segment, used):
                if segment not in self._dead:
                    found = self._segment(segment)
                    found.sealed, found.used = True, max(found.used, used)
            case Evicted(segments):
                for segment in segments:
                    self.drop(segment)
            case Touched(segments):
                self.touch(segments)
            case SegmentState(segment, capacity, used, sealed):
                if segment not in self._dead:
                    found = self._segment(segment)
                    found.capacity, found.used = capacity, max(found.used, used)
                    found.sealed |= sealed
            case Entries(put, orders):
                self._put(iter(orders), put)
            case Graves(keys, orders):
                for key, one in zip(keys, orders, strict=True):
                    self._remove(one, (key,))

    def touch(self, segments: Sequence[FileId]) -> None:
        """These were used now."""
        for segment in segments:
            if segment in self._segments:
                self._segments.move_to_end(segment)

    def drop(self, segment: FileId) -> None:
        """A segment is gone with all its blocks."""
        self._dead[segment] = None
        if len(self._dead) > DEAD_MAX:
            self._dead.popitem(last=False)
        found = self._segments.pop(segment, None)
        if found is None:
            return
        rows, graves, handle = self._rows, self._graves, found.handle
        for key in found.keys:
            row = rows.get(key)
            if row is not None and row[1] == handle:
                del rows[key]
                graves[key] = row[0]
        del self._by_handle[handle]

    def end_round(self) -> None:
        """Every log was read to its end, from after the last call on."""
        self._old_graves, self._graves = self._graves, {}

    def _segment(self, name: FileId) -> Segment:
        found = self._segments.get(name)
        if found is None:
            self._handles += 1
            found = self._segments[name] = Segment(name, self._handles, 0)
            self._by_handle[found.handle] = found
        return found

    def _put(self, orders: Iterator[int], put: Put) -> None:
        if put.segment in self._dead:  # read late; it has replaced others all the same
            for key, order in zip(put.keys, orders, strict=False):
                self._remove(order, (key,))
            return
        segment = self._segment(put.segment)
        rows, by_handle, handle = self._rows, self._by_handle, segment.handle
        buried = bool(self._graves or self._old_graves)
        columns = zip(orders, repeat(handle), put.offsets, put.lengths, put.checksums, strict=False)
        for key, row in zip(put.keys, columns, strict=False):
            if buried and self._buried(key) > row[0]:
                continue
            old = rows.get(key)
            if old is not None:
                if old[0] >= row[0]:
                    continue
                by_handle[old[1]].live -= 1
            rows[key] = row
            segment.live += 1
            segment.keys.append(key)
        if put.keys:
            segment.used = max(segment.used, *map(add, put.offsets, put.lengths))
        self._segments.move_to_end(put.segment)

    def _buried(self, key: bytes) -> int:
        return max(self._graves.get(key, 0), self._old_graves.get(key, 0))

    def _remove(self, order: int, keys: Sequence[bytes]) -> None:
        rows = self._rows  # whole columns at a time: keys are removed by the million
        popped = list(map(rows.pop, keys, repeat(None)))
        gone = [row[1] for row in popped if row is not None and row[0] < order]
        for handle, count in Counter(gone).items():
            self._by_handle[handle].live -= count
        if len(gone) < len(keys):
            pairs = zip(keys, popped, strict=True)
            rows.update([(k, row) for k, row in pairs if row is not None and row[0] >= order])
        graves = self._graves
        if not graves.keys().isdisjoint(keys):
            keys = [key for key in keys if graves.get(key, 0) < order]
        graves.update(zip(keys, repeat(order), strict=False))

    # ------------------------------------------------------------ snapshots

    def copy(self) -> "Index":
        """What is known now, for `dump`: it costs a hundredth of that."""
        made = Index()
        made.sequence = self.sequence
        made._rows = self._rows.copy()
        for name, segment in self._segments.items():
            clone = Segment(name, segment.handle, segment.capacity)
            clone.used, clone.sealed, clone.live = segment.used, segment.sealed, segment.live
            clone.keys = segment.keys.copy()
            made._segments[name] = made._by_handle[clone.handle] = clone
        made._handles = self._handles
        made._dead = self._dead.copy()
        made._graves, made._old_graves = self._graves.copy(), self._old_graves.copy()
        return made

    def dump(self) -> Iterator[Message]:
        """All of it, as messages of a snapshot; it must not change meanwhile."""
        dead = list(self._dead)
        for at in range(0, len(dead), EVICTED_IN_BATCH):
            yield Evicted(dead[at : at + EVICTED_IN_BATCH])
        for segment in self._segments.values():
            yield SegmentState(segment.id, segment.capacity, segment.used, segment.sealed)
        for segment in self._segments.values():
            yield from self._dump_segment(segment)
        buried = list((self._old_graves | self._graves).items())
        for at in range(0, len(buried), KEYS_MAX):
            keys, orders = zip(*buried[at : at + KEYS_MAX], strict=True)
            yield Graves(keys, orders)
        # Blocks have moved their segments to the end: this is the order that counts.
        order = list(self._segments)
        for at in range(0, len(order), EVICTED_IN_BATCH):
            yield Touched(order[at : at + EVICTED_IN_BATCH])

    def _dump_segment(self, segment: Segment) -> Iterator[Message]:
        rows = self._rows
        keys = [
            k for k in dict.fromkeys(segment.keys) if k in rows and rows[k][1] == segment.handle
        ]
        for at in range(0, len(keys), KEYS_MAX):
            part = keys[at : at + KEYS_MAX]
            orders, _, offsets, lengths, checksums = zip(*(rows[k] for k in part), strict=True)
            yield Entries(Put(segment.id, part, offsets, lengths, checksums), orders)
