"""An open emberfs file as Python's io module wants it."""

import io
import os
from collections.abc import Callable
from typing import Any

from emberfs.client.blocking import BlockingFile


class RawFile(io.RawIOBase):
    """Unbuffered; io.BufferedReader and its relatives go on top. Not for several threads."""

    def __init__(self, file: BlockingFile, mode: str) -> None:
        """`mode` as it was opened with."""
        super().__init__()
        self._file = file
        self._reads = "r" in mode or "+" in mode
        self._writes = mode[0] in "wax" or "+" in mode

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        return self._reads

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writes

    def seekable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the caller's memory from the position, without a copy on the way."""
        if not self._reads:
            raise io.UnsupportedOperation("not open for reading")
        view = memoryview(buffer).cast("B")
        return self._file.readinto(view) if len(view) else 0

    def write(self, data: Any) -> int:
        """Write all at the position, or at the end in mode "a"."""
        if not self._writes:
            raise io.UnsupportedOperation("not open for writing")
        return self._file.write(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; returns it."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        """Set the length (default: the position)."""
        return self._file.truncate(size)

    def close(self) -> None:
        """Flush and end; raises what could not be delivered."""
        if not self.closed:
            try:
                self._file.close()
            finally:
                super().close()


class _Pending:
    """A file that gets its name when it is committed."""

    _publish: Callable[[], None]
    _drop: Callable[[], None]

    def attach(self, publish: Callable[[], None], drop: Callable[[], None]) -> None:
        """What `commit` and `discard` do."""
        self._publish, self._drop = publish, drop

    def commit(self) -> None:
        """Give it its name; what had it before is replaced."""
        self._publish()

    def discard(self) -> None:
        """Remove it."""
        self._drop()


class PendingWriter(io.BufferedWriter, _Pending):
    """A writer of fsspec's transactions."""


def buffered(file: BlockingFile, mode: str, size_bytes: int, *, pending: bool) -> Any:
    """The buffered file of a mode; a PendingWriter if it is `pending`."""
    raw = RawFile(file, mode)
    if pending:
        return PendingWriter(raw, size_bytes)
    if "+" in mode:
        return io.BufferedRandom(raw, size_bytes)
    return io.BufferedReader(raw, size_bytes) if "r" in mode else io.BufferedWriter(raw, size_bytes)
