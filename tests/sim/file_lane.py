"""One client's files: it alone writes them; everybody reads them.

Every operation is recorded with the key ("file", inode); `FilesLoad.via` tells through which
description it went.
"""

import asyncio
import random
from typing import TYPE_CHECKING

from emberfs.client.file import File, FileSystem
from emberfs.client.oserrors import FileSystemError, translated
from emberfs.proto.errors import Code
from emberfs.proto.ids import InodeId, KiB
from emberfs.proto.meta_calls import Caller
from sim.history import Key, Op
from sim.stamps import stamp_fill

if TYPE_CHECKING:
    from sim.files_load import FilesLoad

CALLER = Caller(0, 0)
HOME = "/f"
OWN = "pq"
READ_BYTES = 96 * KiB
NO_FILE = (Code.NOT_FOUND, Code.EXISTS, Code.NOT_DIRECTORY)


class _Opened:
    """An open file and the operation that opened it."""

    def __init__(self, file: File, op: Op, direct: bool) -> None:
        self.file = file
        self.op = op
        self.key: Key = op.key
        self.direct = direct


class FileLane:
    """See the module."""

    def __init__(
        self, load: "FilesLoad", number: int, index: int, fs: FileSystem, dice: random.Random
    ) -> None:
        self._load = load
        self._history = load.history
        self._number = number
        self._index = index
        self._fs = fs
        self._dice = dice

    async def run(self) -> None:
        """One open file after another."""
        dice = self._dice
        while not self._load.stopping:
            await asyncio.sleep(dice.expovariate(2e9 / self._load.pause_ns))
            roll = dice.random()
            try:
                if roll < 0.5:
                    await self._write_session(self._own())
                elif roll < 0.84:
                    await self._read_session()
                elif roll < 0.92:
                    await self._replace()
                elif roll < 0.97:
                    await self._cut_by_path()
                else:
                    await self._fs.remove(self._any())
            except FileSystemError as problem:
                if problem.code not in NO_FILE:
                    self._load.note(f"files: {problem.code.name}: {problem}")

    def _own(self) -> str:
        return f"{HOME}/{self._index}{self._dice.choice(OWN)}"

    def _any(self) -> str:
        client = self._dice.randrange(len(self._load.world.clients))
        return f"{HOME}/{client}{self._dice.choice(OWN)}"

    async def _pause(self) -> None:
        if self._dice.random() < 0.6:
            await asyncio.sleep(self._dice.expovariate(4))
        elif self._dice.random() < 0.1:
            await asyncio.sleep(self._dice.uniform(1, 7))

    # ------------------------------------------------------------ whole stories

    async def _write_session(self, path: str) -> None:
        dice = self._dice
        mode = dice.choice(("w+", "r+", "r+", "r+", "a+"))
        opened = await self._open(path, mode, direct=dice.random() < 0.3)
        if opened is None and mode == "r+":
            opened = await self._open(path, "w+", direct=False)
        if opened is None:
            return
        if dice.random() < 0.12:
            await self._unlink(path)
        going = True
        for _ in range(dice.randint(1, 6)):
            if self._load.stopping or not going:
                break
            going = await self._change(opened, append=mode == "a+")
            await self._pause()
        await self._flush(opened, opened.file.close())

    async def _unlink(self, path: str) -> None:
        """Somebody may have been faster; the open file must be closed nonetheless."""
        try:
            await self._fs.remove(path)
        except FileSystemError as problem:
            if problem.code not in NO_FILE:
                self._load.note(f"remove {path}: {problem.code.name}: {problem}")

    async def _change(self, opened: _Opened, *, append: bool) -> bool:
        """One step of a writer; False if it failed."""
        roll = self._dice.random()
        if roll < 0.5:
            return await self._write(opened, append=append)
        if roll < 0.6:
            return await self._flush(opened, opened.file.fsync())
        if roll < 0.75:
            return await self._truncate(opened)
        return await self.read(opened, *self._range())

    async def _read_session(self) -> None:
        dice = self._dice
        opened = await self._open(self._any(), "r", direct=dice.random() < 0.2)
        if opened is None:
            return
        for _ in range(dice.randint(1, 3)):
            await self.read(opened, *self._range())
            await self._pause()
            if self._load.stopping:
                break
        await opened.file.close()

    async def _replace(self) -> None:
        """Write a new file and put it in place of the old one."""
        temporary, path = f"{HOME}/{self._index}t", self._own()
        opened = await self._open(temporary, "w+", direct=False)
        if opened is None:
            return
        wrote = await self._write(opened, append=False)
        if await self._flush(opened, opened.file.close()) and wrote:
            await self._fs.rename(temporary, path)

    async def _cut_by_path(self) -> None:
        """Truncate anybody's file, whether it is open or not."""
        path, size = self._any(), self._range()[0]
        op = await self._begin_cut(path, size)
        if op is None:
            return
        inode = op.key[1]
        assert isinstance(inode, int)
        try:
            with translated(path.encode()):
                await self._fs.cluster.files.truncate(CALLER, InodeId(inode), size)
        except FileSystemError as problem:
            self._end(op, "fail" if problem.code in NO_FILE else "unknown", problem)
            raise
        self._end(op, "ok")

    async def walk(self, path: str) -> None:
        """List a directory and everything below; read all files to their ends."""
        for name in await self._fs.listdir(path):
            below = path.rstrip("/") + "/" + name
            status = await self._fs.stat(below)
            if status.st_mode & 0o040000:
                await self.walk(below)
                continue
            opened = await self._open(below, "r", direct=False)
            if opened is not None:
                await self.read(opened, 0, max(status.st_size + 8, READ_BYTES))
                await opened.file.close()

    def _range(self) -> tuple[int, int]:
        dice = self._dice
        if dice.random() < 0.3:
            return 0, READ_BYTES
        base = 0 if dice.random() < 0.7 else 62 * KiB
        return base + dice.randrange(8 * KiB), dice.choice((512, 4096, dice.randint(8, 6000)))

    # ------------------------------------------------------------ single operations

    def _begin(self, opened: _Opened, kind: str, offset: int = 0, length: int = 0) -> Op:
        from sim.files_load import Via

        data, stamp = b"", 0
        if kind == "write":
            stamp = self._history.next_stamp()
            data = stamp_fill(stamp, offset, length)
        now_ns = self._load.now_ns()
        op = self._history.begin(
            self._number, kind, opened.key, offset, length, now_ns, data, stamp
        )
        self._load.via[op.number] = Via(self._number, opened.op.number, opened.direct)
        return op

    async def _open(self, path: str, mode: str, *, direct: bool) -> _Opened | None:
        """Open; what "w" cuts off is recorded as a truncation of its own."""
        from sim.files_load import Via

        now_ns, cut = self._load.now_ns(), None
        if mode.startswith("w"):
            cut = await self._begin_cut(path)
        op = self._history.begin(self._number, "open", ("path", path), 0, 0, now_ns)
        self._load.via[op.number] = Via(self._number, op.number, direct)
        try:
            file = await self._fs.open(path, mode, direct=direct)
        except FileSystemError as problem:
            outcome = "fail" if problem.code in NO_FILE else "unknown"
            self._end(op, outcome, problem)
            if cut is not None:
                self._end(cut, outcome, problem)
            if problem.code not in NO_FILE:
                self._load.note(f"open {path}: {problem.code.name}: {problem}")
            return None
        op.key = ("file", int(file._file.inode_id))
        self._end(op, "ok")
        if cut is not None:
            cut.key = op.key  # the name led elsewhere if a power cut of meta undid a rename
            self._end(cut, "ok")
        return _Opened(file, op, direct)

    async def _begin_cut(self, path: str, size: int = 0) -> Op | None:
        from sim.files_load import Via

        try:
            inode = (await self._fs.stat(path)).st_ino
        except FileSystemError:
            return None
        now_ns = self._load.now_ns()
        op = self._history.begin(self._number, "truncate", ("file", inode), size, 0, now_ns)
        self._load.via[op.number] = Via(self._number, -1)
        return op

    def _end(self, op: Op, outcome: str, problem: FileSystemError | None = None) -> None:
        result = problem.code.name if problem is not None else ""
        self._history.end(op, self._load.now_ns(), outcome, result=result)

    async def _write(self, opened: _Opened, *, append: bool) -> bool:
        offset, length = self._range()
        file = opened.file
        try:
            if append:
                offset = (await file.stat()).st_size
            length = min(length, 16 * KiB)
            op = self._begin(opened, "write", offset, length)
        except FileSystemError as problem:
            return self._failed(opened, "stat", problem)
        try:
            if append:
                try:
                    await file.write(op.payload)
                finally:  # somebody may have set another length since
                    self._history.moved(op, file._file.append_offset)
            else:
                await file.pwrite(op.payload, offset)
        except FileSystemError as problem:
            self._end(op, "unknown", problem)
            return self._failed(opened, "write", problem)
        self._end(op, "ok")
        return True

    async def _truncate(self, opened: _Opened) -> bool:
        size = self._range()[0]
        op = self._begin(opened, "truncate", size)
        try:
            await opened.file.truncate(size)
        except FileSystemError as problem:
            self._end(op, "unknown", problem)
            return self._failed(opened, "truncate", problem)
        self._end(op, "ok")
        return True

    async def _flush(self, opened: _Opened, call: object) -> bool:
        """Await fsync or close."""
        op = self._begin(opened, "flush")
        try:
            await call  # type: ignore[misc]
        except FileSystemError as problem:
            self._end(op, "unknown", problem)
            return self._failed(opened, "flush", problem)
        self._end(op, "ok")
        return True

    async def read(self, opened: _Opened, offset: int, length: int) -> bool:
        """Read and record; the bytes that came."""
        op = self._begin(opened, "read", offset, length)
        sink = bytearray(b"\xee" * length)  # what nobody fills shows
        try:
            count = await opened.file.pread(sink, offset)
        except FileSystemError as problem:
            self._end(op, "fail", problem)
            return self._failed(opened, "read", problem)
        self._history.end(op, self._load.now_ns(), "ok", bytes(sink[: max(0, count)]))
        return True

    def _failed(self, opened: _Opened, what: str, problem: FileSystemError) -> bool:
        self._load.note(f"{what} of inode {opened.key[1]}: {problem.code.name}: {problem}")
        return False
