"""The content of one inline file as a client has it: what meta said, and its own writes over it.

Own writes are remembered as ranges, so that they can be laid over what another client has written
meanwhile: dirty until a settlement takes them up, then settling, then told until a durable one has
confirmed them. What was told and not durably a power cut of meta may have taken back.
"""

from collections.abc import Iterator

from emberfs.proto.inline import of_one_life


class Ranges:
    """A few disjoint ranges of bytes, in order."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        """True if there is any."""
        return bool(self._ranges)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Each as (start, stop)."""
        return iter(self._ranges)

    @property
    def stop(self) -> int:
        """Where the last one ends; 0 without any."""
        return self._ranges[-1][1] if self._ranges else 0

    def add(self, start: int, stop: int) -> None:
        """Add a range; what touches becomes one."""
        apart = []
        for low, high in self._ranges:
            if high < start or stop < low:
                apart.append((low, high))
            else:
                start, stop = min(start, low), max(stop, high)
        self._ranges = sorted([*apart, (start, stop)])

    def update(self, other: "Ranges") -> None:
        """Add all of another."""
        for start, stop in other:
            self.add(start, stop)

    def cut(self, length: int) -> None:
        """Drop what lies at `length` and behind."""
        self._ranges = [(a, min(b, length)) for a, b in self._ranges if a < length]


class InlineContent:
    """See the module. Behind `content` the file is zeros."""

    def __init__(self, version: int, content: bytes, limit: int) -> None:
        self.version = version  # that the content was made from
        self.content = bytearray(content)
        self.limit = limit  # bytes that may be settled
        self.newest = version  # what meta was seen to have
        self.stale = False  # the content must be fetched whatever `newest` says
        self.promoted = False  # meta was seen to have chunks for it
        self.leaving = False  # chunks are being made: no more writes
        self.dirty = Ranges()
        self.dirty_ns = 0  # when the oldest dirty byte was written
        self.settling = Ranges()
        self.told = Ranges()
        self.told_version = 0
        self.cut_told = False  # our truncation may not be on stable storage yet

    @property
    def outdated(self) -> bool:
        """True when meta has something else."""
        return self.stale or self.promoted or self.newest > self.version

    @property
    def unsettled(self) -> bool:
        """True while own writes have not been confirmed by meta."""
        return bool(self.dirty) or bool(self.settling)

    @property
    def unstable(self) -> bool:
        """True while a power cut may take own writes, or a cut."""
        return self.unsettled or bool(self.told) or self.cut_told

    @property
    def unsettled_stop(self) -> int:
        """Where the last own write that meta has not confirmed ends."""
        return max(self.dirty.stop, self.settling.stop)

    def takes(self, stop: int) -> bool:
        """Tell whether a write that ends at `stop` can be kept here."""
        return stop <= self.limit and not self.leaving and not self.promoted

    def read(self, offset: int, sink: memoryview) -> None:
        """Fill `sink` from `offset`."""
        part = self.content[offset : offset + len(sink)]
        sink[: len(part)] = part
        sink[len(part) :] = bytes(len(sink) - len(part))

    def write(self, offset: int, data: memoryview, now_ns: int) -> None:
        """Take an own write."""
        stop = offset + len(data)
        self._stretch(stop)
        self.content[offset:stop] = data
        if not self.dirty:
            self.dirty_ns = now_ns
        self.dirty.add(offset, stop)

    def _stretch(self, stop: int) -> None:
        self.content.extend(bytes(max(0, stop - len(self.content))))

    # ------------------------------------------------------------ settling

    def begin(self) -> bytes:
        """A settlement begins; returns the content that it tells."""
        self.settling, self.dirty = self.dirty, Ranges()
        return bytes(self.content)

    def fail(self) -> None:
        """It has failed: what it was to tell is dirty again."""
        self.dirty.update(self.settling)
        self.settling = Ranges()

    def succeed(self, version: int, *, durable: bool) -> None:
        """It has made the content `version`."""
        self.version = version
        self.newest = max(self.newest, version)
        if durable:
            self.told, self.cut_told = Ranges(), False
        else:
            self.told.update(self.settling)
            self.told_version = version
        self.settling = Ranges()

    # ------------------------------------------------------------ what others do

    def adopt(self, version: int, content: bytes) -> None:
        """Take what meta has now; own writes that it does not have stay over it."""
        self._reclaim(version)
        old, self.content = self.content, bytearray(content)
        for start, stop in self.dirty:
            self._stretch(stop)
            self.content[start:stop] = old[start:stop]
        self.version = version
        self.newest = max(self.newest, version)
        self.stale = False

    def _reclaim(self, version: int) -> None:
        """What was told in another life of meta may be lost: it is dirty again."""
        if self.told and not of_one_life(self.told_version, version):
            self.dirty.update(self.told)
            self.told = Ranges()

    def leave(self, version: int) -> list[tuple[int, memoryview]]:
        """Return the own writes that chunks with the content of `version` do not have."""
        self._reclaim(version)
        content = memoryview(bytes(self.content))
        return [(start, content[start:stop]) for start, stop in self.dirty]

    def cut(self, version: int, length: int) -> None:
        """Our truncation has made `version`. Somebody may have written right before it."""
        del self.content[length:]
        for ranges in (self.dirty, self.settling, self.told):
            ranges.cut(length)
        self.newest = max(self.newest, version)
        self.cut_told = True
        if not length:
            self.version = version

    def lose(self) -> None:
        """Nobody is left who would tell the own writes."""
        self.dirty, self.settling, self.told = Ranges(), Ranges(), Ranges()
        self.cut_told, self.stale = False, True
