"""Writing a snapshot of the index, and removing the logs that it replaces and files without owner.

Any process may do it at any time: a snapshot gets its name by an exclusive rename when it is on
stable storage, and logs go only afterwards. Files of segments that no log tells of are left over
by a crash: a log tells of a segment before its file is made.
"""

import logging

from emberfs.client.file import FileSystem
from emberfs.client.gather import gather_all
from emberfs.client.kvcache import metrics
from emberfs.client.kvcache.index import Index
from emberfs.client.kvcache.ownlog import DEAD_NS, OwnLog, close_quietly
from emberfs.client.kvcache.records import Covered, End, FileId, Message, encode
from emberfs.client.kvcache.slots import (
    BESIDE,
    file_name,
    log_name,
    parse_file,
    parse_snapshot,
    snapshot_name,
)
from emberfs.client.kvcache.view import View

log = logging.getLogger("emberfs.client.kvcache")

RENAME_NOREPLACE = 1
PIECE_BYTES = 4 << 20


class Snapshots:
    """Writes snapshots and tidies up."""

    def __init__(
        self, fs: FileSystem, logs: str, segments: str, view: View, own: OwnLog, writer: int
    ) -> None:
        self._fs = fs
        self._env = fs.cluster.env
        self._logs = logs
        self._segments = segments
        self._view = view
        self._own = own
        self._writer = writer
        self._beside: dict[str, int] = {}  # unfinished files of others -> when first seen

    async def write(self) -> None:
        """Write one from what all logs say now. Raises OSError."""
        self._own.appended_bytes = 0
        there = await self._fs.listdir(self._segments)
        # Twice: the second look reads every put that a removal seen in the first one knew of.
        await self._view.look_now()
        await self._view.look_now()
        path = f"{self._logs}/{BESIDE}{self._writer:016x}-{self._env.random.getrandbits(32):08x}"
        file = await self._fs.open(path, "x")
        try:
            async with self._view.lock, self._own.lock:
                number, covered = self._view.snapshot + 1, self._covered()
                index = self._view.index.copy()  # calls go on while it is packed
            pieces = await self._encode(number, covered, index)
            for piece in pieces:
                await file.write(piece)
            await file.fsync()
        finally:
            await close_quietly(file)
        try:
            target = f"{self._logs}/{snapshot_name(number)}"
            await self._fs.rename(path, target, flags=RENAME_NOREPLACE)
        except FileExistsError:  # somebody was faster
            await self._fs.remove(path)
            return
        self._view.covered_by(number, covered)
        metrics.SNAPSHOTS.inc()
        await self._tidy(number, covered, there)

    def _covered(self) -> dict[FileId, int]:
        covered = {name: follower.offset for name, follower in self._view.followers.items()}
        if self._own.current is not None:
            covered[self._own.current] = self._own.offset
        return covered

    async def _encode(self, number: int, covered: dict[FileId, int], index: Index) -> list[bytes]:
        name = FileId(number, 0)
        parts: list[list[bytes]] = [[]]
        offset = size = count = 0

        def add(message: Message) -> None:
            nonlocal offset, size, count
            data = encode(name, offset, index.sequence, message)
            if size + len(data) > PIECE_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(data)
            offset, size, count = offset + len(data), size + len(data), count + 1

        add(Covered(list(covered.items())))
        for message in index.dump():
            add(message)
            await self._env.sleep_ns(0)
        add(End(count))
        return [b"".join(part) for part in parts]

    async def _tidy(self, number: int, covered: dict[FileId, int], there: list[str]) -> None:
        index, now_ns = self._view.index, self._env.now_ns()
        gone = [
            f"{self._logs}/{log_name(name)}"
            for name in self._view.finished() & covered.keys()
            if self._view.followers[name].offset == covered[name]
        ]
        for entry in await self._fs.listdir(self._logs):
            old = parse_snapshot(entry)
            if old is not None and old < number - 1:
                gone.append(f"{self._logs}/{entry}")
            if entry.startswith(BESIDE):
                first_ns = self._beside.setdefault(entry, now_ns)
                if now_ns - first_ns > DEAD_NS:
                    gone.append(f"{self._logs}/{entry}")
        for entry in there:
            segment = parse_file(entry)
            if segment is not None and not index.knows(segment):
                gone.append(f"{self._segments}/{file_name(segment)}")
        await gather_all([remove_quietly(self._fs, path) for path in gone])


async def remove_quietly(fs: FileSystem, path: str) -> None:
    """Remove a file that others may have removed; what fails now is found by a later snapshot."""
    try:
        await fs.remove(path)
    except FileNotFoundError:
        pass
    except OSError as problem:
        log.warning("removing %s: %s", path, problem)
