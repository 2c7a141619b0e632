"""Open files as Python's io module wants them: a raw file, and buffers over it.

Large reads go straight into the caller's memory; small ones through a buffer, since each costs a
change of threads.
"""

import io
import os
import secrets
from typing import Any, Protocol

from emberfs.client.ecosystem.locate import Place
from emberfs.client.ecosystem.session import Session, session
from emberfs.client.file import File, Memory

READ_BUFFER_BYTES = 128 << 10
WRITE_BUFFER_BYTES = 1 << 20
NOREPLACE = 1  # of renameat2(2)


class Home(Protocol):
    """What a file needs of the file system that it lies in."""

    place: Place

    def info(self, path: str) -> dict[str, Any]:
        """Attributes."""
        ...

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        ...

    def move_into_place(self, part: str, path: str, flags: int) -> None:
        """Rename what a transaction has written; flags of renameat2(2)."""
        ...


async def open_sized(fs: Session, path: str, mode: str) -> tuple[File, int]:
    """Open a file; with its length in bytes."""
    file = await fs.files.open(path, mode)
    try:
        return file, (await file.stat()).st_size
    except BaseException:
        await file.close()
        raise


class RawFile(io.RawIOBase):
    """An open file with a position.

    One that was opened for reading works on in a forked child, which opens it anew. One that was
    opened for writing fails there with OSError (EBADF).
    """

    def __init__(self, fs: Home, path: str, mode: str) -> None:
        super().__init__()
        self.fs = fs
        self.name = path
        self.mode = mode
        self._reads = mode == "rb"
        self._position = 0
        self._session = session(fs.place)
        opened = open_sized(self._session, path, mode)
        self._file, self.size = self._session.run(opened)
        if mode == "ab":
            self._position = self.size

    def readable(self) -> bool:
        """True in mode "rb"."""
        return self._reads

    def writable(self) -> bool:
        """True in modes "wb", "ab", "xb"."""
        return not self._reads

    def seekable(self) -> bool:
        """Tell whether seek works: not where every write goes to the end."""
        return self.mode != "ab"

    def readinto(self, buffer: Memory, /) -> int:
        """Fill the caller's memory; returns the byte count, 0 at the end."""
        self._check(reads=True)
        file = self._here()
        count = self._session.run(file.pread(buffer, self._position))
        self._position += count
        return count

    def readall(self) -> bytes:
        """All that is left."""
        self._check(reads=True)
        file = self._here()
        self.size = self._session.run(file.stat()).st_size
        memory = bytearray(max(0, self.size - self._position))
        count = self.readinto(memory) if memory else 0
        return bytes(memoryview(memory)[:count])

    def write(self, data: Memory, /) -> int:
        """Write all of it."""
        self._check(reads=False)
        work = (
            self._file.write(data) if self.mode == "ab" else self._file.pwrite(data, self._position)
        )
        count = self._session.run(work)
        self._position += count
        self.size = max(self.size, self._position)
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position; returns it."""
        self._check(reads=self._reads)
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        if whence not in bases:
            raise ValueError(f"whence {whence}: use 0, 1 or 2")
        if bases[whence] + offset < 0:
            raise ValueError(f"position {bases[whence] + offset} is negative")
        self._position = bases[whence] + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        self._check(reads=self._reads)
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        """Set the length (default: the position)."""
        self._check(reads=False)
        self.size = self._session.run(self._file.truncate(self._position if size is None else size))
        return self.size

    def sync(self) -> None:
        """Make it visible to other clients."""
        if not self._reads and not self.closed:
            self._session.run(self._file.flush())

    def close(self) -> None:
        """Flush and end; raises what earlier writes could not deliver."""
        if self.closed:
            return
        try:
            super().close()
        finally:
            if "_file" in vars(self):
                self._session.release(self._file)

    def _check(self, *, reads: bool) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if reads != self._reads:
            raise io.UnsupportedOperation(f"the file is open in mode {self.mode}")

    def _here(self) -> File:
        if self._session.pid != os.getpid():
            self._session = session(self.fs.place)
            self._file, self.size = self._session.run(
                open_sized(self._session, self.name, self.mode)
            )
        return self._file


class Reader(io.BufferedReader):
    """A file that is read. It can be pickled: it is opened anew, at the same position."""

    raw: RawFile

    def __init__(self, raw: RawFile, buffer_bytes: int) -> None:
        super().__init__(raw, buffer_bytes)
        self._buffer_bytes = buffer_bytes

    @property
    def path(self) -> str:
        """The path it was opened by."""
        return self.raw.name

    @property
    def fs(self) -> Home:
        """Where it lies."""
        return self.raw.fs

    @property
    def size(self) -> int:
        """Bytes, as of the last look."""
        return self.raw.size

    @property
    def details(self) -> dict[str, Any]:
        """As info of the path."""
        return self.fs.info(self.path)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """What pickling keeps."""
        if self.closed:
            raise TypeError("a closed file cannot be pickled")
        return _reader_at, (self.fs, self.path, self._buffer_bytes, self.tell())


def _reader_at(fs: Home, path: str, buffer_bytes: int, position: int) -> Reader:
    reader = Reader(RawFile(fs, path, "rb"), buffer_bytes)
    reader.seek(position)
    return reader


class Writer(io.BufferedWriter):
    """A file that is written; with `final`, under another name until commit."""

    raw: RawFile

    def __init__(self, raw: RawFile, buffer_bytes: int, final: str, *, exclusive: bool) -> None:
        super().__init__(raw, buffer_bytes)
        self._final = final
        self._exclusive = exclusive
        self.autocommit = not final

    @property
    def path(self) -> str:
        """The path that it will have."""
        return self._final or self.raw.name

    @property
    def fs(self) -> Home:
        """Where it lies."""
        return self.raw.fs

    @property
    def size(self) -> int:
        """Bytes that were flushed."""
        return self.raw.size

    def flush(self, force: bool = False) -> None:
        """Make what was written visible to others; `force`, which fsspec has, changes nothing."""
        super().flush()
        self.raw.sync()

    def commit(self) -> None:
        """Give it its name, at the end of a transaction. FileExistsError in mode "x"."""
        self.close()
        self.fs.move_into_place(self.raw.name, self._final, NOREPLACE if self._exclusive else 0)

    def discard(self) -> None:
        """Remove it, when a transaction failed."""
        self.close()
        self.fs.rm_file(self.raw.name)


def hidden_beside(path: str) -> str:
    """A name for what is not committed yet, in the same directory."""
    parent, _, name = path.rpartition("/")
    return f"{parent}/.{name[:200]}.{secrets.token_hex(8)}.emberfs-part"
