"""When to read ahead, and how far: the policy alone, for one open file description.

A read that continues where reads have been doubles the window, up to its bound; one elsewhere
closes it, so random access reads exactly what it asks for. Reads of one stream may come slightly
out of order (the kernel sends several at once).
"""

from emberfs.proto.ids import KiB, MiB

WINDOW_BYTES_FIRST = 128 * KiB
WINDOW_BYTES_MAX = 8 * MiB


class ReadAhead:
    """Sequential detection. All values in bytes."""

    def __init__(
        self, first_bytes: int = WINDOW_BYTES_FIRST, max_bytes: int = WINDOW_BYTES_MAX
    ) -> None:
        assert 0 < first_bytes <= max_bytes
        self._first_bytes = first_bytes
        self._max_bytes = max_bytes
        self.window_bytes = 0  # 0: not a stream
        self._next = 0  # where the stream goes on; a read at 0 of a fresh file counts as one
        self._planned = 0  # end of what was asked to be prefetched

    def plan(self, offset: int, length: int, file_length: int) -> tuple[int, int] | None:
        """Note a read; return the range [start, stop) to prefetch now, or None."""
        stop = offset + length
        if not self._continues(offset):
            self.window_bytes = 0
            self._next = self._planned = stop
            return None
        if stop > self._next or not self.window_bytes:
            self._next = max(self._next, stop)
            self._grow(length)
        self._planned = max(self._planned, self._next)
        wanted = min(self._next + self.window_bytes, file_length)
        missing = wanted - self._planned
        if missing <= 0 or (missing < self.window_bytes // 2 and wanted < file_length):
            return None  # few large requests instead of many small ones
        start, self._planned = self._planned, wanted
        return start, wanted

    def _continues(self, offset: int) -> bool:
        if offset == self._next:
            return True
        return bool(self.window_bytes) and abs(offset - self._next) <= self.window_bytes

    def _grow(self, length: int) -> None:
        doubled = self.window_bytes * 2 or self._first_bytes
        self.window_bytes = min(max(doubled, 2 * length), self._max_bytes)

    def reset(self) -> None:
        """Forget what was planned: the prefetched bytes are gone."""
        self._planned = self._next
