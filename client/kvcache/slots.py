"""Where blocks go in a segment, which neighbours are read together, and what files are called."""

from collections.abc import Sequence

from emberfs.client.kvcache.index import Location
from emberfs.client.kvcache.records import SLOT_BYTES, FileId

RUN_BYTES_MAX = 4 << 20  # of neighbours that are read or written together
GAP_BYTES_MAX = 64 << 10  # that a read may carry along uselessly between two blocks
LOG, SNAPSHOT, BESIDE = "log-", "snapshot-", "new-"


class Slots:
    """The free end of a segment. Blocks are never moved and their slots never used again."""

    def __init__(self, capacity: int, chunk_bytes: int) -> None:
        """Both in bytes; `chunk_bytes` is the unit in which the file is stored."""
        self.capacity = capacity
        self.end = 0
        self._chunk_bytes = chunk_bytes

    def take(self, length: int) -> int | None:
        """The offset for a block of `length` bytes; None when it does not fit any more.

        A block does not lie across two chunks if it can be helped: it would be read in two parts.
        """
        start = self.end
        room = self._chunk_bytes - start % self._chunk_bytes
        if room < length <= self._chunk_bytes:
            start += room
        if start + length > self.capacity:
            return None
        self.end = -(-(start + length) // SLOT_BYTES) * SLOT_BYTES
        return start


class Run:
    """Neighbouring blocks of one segment, read in one go."""

    __slots__ = ("items", "segment", "start", "stop")

    def __init__(self, segment: FileId, start: int, stop: int) -> None:
        self.segment = segment
        self.start = start  # bytes in the segment
        self.stop = stop
        self.items: list[tuple[int, Location]] = []  # (position in the call, where it is)


def runs_of(places: Sequence[tuple[int, Location]]) -> list[Run]:
    """Group blocks into reads."""
    runs: list[Run] = []
    last: Run | None = None
    for item in sorted(places, key=_by_place):
        segment, offset, length, _, _ = item[1]
        stop = offset + length
        near = last is not None and last.segment == segment and offset - last.stop <= GAP_BYTES_MAX
        if last is None or not near or stop - last.start > RUN_BYTES_MAX:
            last = Run(segment, offset, stop)
            runs.append(last)
        last.items.append(item)
        last.stop = max(last.stop, stop)
    return runs


def _by_place(item: tuple[int, Location]) -> tuple[FileId, int]:
    return item[1].segment, item[1].offset


def file_name(file: FileId) -> str:
    """The name of a segment."""
    return f"{file.writer:016x}-{file.number:08x}"


def log_name(file: FileId) -> str:
    """The name of a log."""
    return LOG + file_name(file)


def snapshot_name(number: int) -> str:
    """The name of a snapshot."""
    return f"{SNAPSHOT}{number:016x}"


def parse_file(name: str) -> FileId | None:
    """The segment of a name; None if it is something else."""
    head, _, tail = name.partition("-")
    try:
        found = FileId(int(head, 16), int(tail, 16))
    except ValueError:
        return None
    return found if file_name(found) == name else None


def parse_log(name: str) -> FileId | None:
    """The log of a name; None if it is something else."""
    return parse_file(name.removeprefix(LOG)) if name.startswith(LOG) else None


def parse_snapshot(name: str) -> int | None:
    """The number of a snapshot; None if it is something else."""
    if not name.startswith(SNAPSHOT):
        return None
    try:
        return int(name.removeprefix(SNAPSHOT), 16)
    except ValueError:
        return None
