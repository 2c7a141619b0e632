"""The log that this process writes: what it appends is published, whole or not at all.

One writer per log, since records of two clients in one file might overlap. The file has its full
length from the beginning and is written directly, so that others see a batch as soon as storage
has committed it, without any call to the metadata service. After an append whose outcome is not
known nothing more goes to that log: the lost batch may still arrive there.
"""

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence

from emberfs.client.file import File, FileSystem
from emberfs.client.kvcache.records import Alive, Batch, End, FileId, Message, encode
from emberfs.client.kvcache.slots import log_name
from emberfs.proto.ids import SECOND, MiB
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.kvcache")

LOG_BYTES = 8 * MiB
APPEND_BYTES_MAX = 2 * MiB
ALIVE_NS = 60 * SECOND  # a log grows at least so often while its writer lives
# A log that has not grown for DEAD_NS may be removed by others, so its writer leaves it before.
LEAVE_NS = 300 * SECOND
DEAD_NS = 900 * SECOND


async def close_quietly(file: File) -> None:
    """Close a file whose errors concern nobody any more."""
    try:
        await file.close()
    except OSError as problem:
        log.info("closing %s: %s", file.name, problem)


class OwnLog:
    """Appends batches; makes the next log when one is full, old, or uncertain."""

    def __init__(
        self,
        fs: FileSystem,
        directory: str,
        writer: int,
        tasks: TaskSet,
        *,
        sequence: Callable[[], int],
        apply: Callable[[Batch], None],
        left: Callable[[FileId, int, bool], None],
    ) -> None:
        """`apply` is told what was published, in order; `sequence` is the highest one seen.

        `left` is told of logs that are not written any more, where they end, and whether that is
        certain: an append of unknown outcome may still add to it.
        """
        self._fs = fs
        self._env = fs.cluster.env
        self._directory = directory
        self._writer = writer
        self._tasks = tasks
        self._sequence = sequence
        self._apply = apply
        self._left = left
        self._file: File | None = None
        self._number = 0
        self._sound = True
        self._closed = False
        self._grew_ns = 0
        self.offset = 0  # bytes in the current log
        self.appended_bytes = 0  # since whoever writes snapshots has set it to 0
        self.lock = asyncio.Lock()  # held while anything is appended

    @property
    def current(self) -> FileId | None:
        """The log that is written now."""
        return None if self._file is None else FileId(self._writer, self._number)

    async def append(self, messages: Sequence[Message]) -> None:
        """Publish messages, in order. Raises OSError; then nothing is known of them."""
        if not messages:
            return
        async with self.lock:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "the KV cache is closed")
            await self._append(messages)

    async def keep_alive(self) -> None:
        """Let the current log grow if it has not for long."""
        if self._file is not None and self._env.now_ns() - self._grew_ns > ALIVE_NS:
            await self.append([Alive()])

    async def close(self) -> None:
        """End the log; nothing can be appended any more."""
        async with self.lock:
            self._closed = True
            if self._file is None:
                return
            if self._sound:
                await self._append([End(0)])
            if self._file is not None:
                await close_quietly(self._file)
                self._file = None

    async def _append(self, messages: Sequence[Message]) -> None:
        await self._leave_if_unfit()
        batches, data = self._encode(messages)
        if self._file is None or self.offset + len(data) > LOG_BYTES:
            await self._begin()
            batches, data = self._encode(messages)
        assert self._file is not None
        self._sound = False
        await self._file.pwrite(data, self.offset)
        self._sound = True
        self._grew_ns = self._env.now_ns()
        self.offset += len(data)
        self.appended_bytes += len(data)
        for batch in batches:
            self._apply(batch)

    def _encode(self, messages: Sequence[Message]) -> tuple[list[Batch], bytes]:
        name = FileId(self._writer, self._number)
        sequence, at, batches, parts = self._sequence(), self.offset, [], []
        for message in messages:
            sequence += 1
            parts.append(encode(name, at, sequence, message))
            at += len(parts[-1])
            batches.append(Batch(sequence, message))
        assert at - self.offset <= APPEND_BYTES_MAX
        return batches, b"".join(parts)

    async def _leave_if_unfit(self) -> None:
        if self._file is None:
            return
        old = self._env.now_ns() - self._grew_ns > LEAVE_NS
        if self._sound and not old:
            return
        self._leave()

    def _leave(self) -> None:
        if self._file is not None:
            self._left(FileId(self._writer, self._number), self.offset, self._sound)
            self._tasks.spawn(close_quietly(self._file), name=f"close {self._file.name}")
        self._file, self._sound = None, True

    async def _begin(self) -> None:
        self._leave()
        self._number += 1
        self.offset = 0
        path = f"{self._directory}/{log_name(FileId(self._writer, self._number))}"
        file = await self._fs.open(path, "x", direct=True)
        try:
            await file.truncate(LOG_BYTES)
        except BaseException:
            self._tasks.spawn(close_quietly(file), name=f"close {path}")
            raise
        self._file, self._grew_ns = file, self._env.now_ns()
