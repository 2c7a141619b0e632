"""A verifying load as a process of its own: random operations with stamped payloads, recorded.

usage: history_load.py JOB.json      (a Job, below; SIGTERM ends it: exit 0, the history written)

What is recorded may be compared with the linearizability of chunk reads and writes, because
nothing between the application and the storage services remembers data: the native library opens
with `direct`, the mount with O_DIRECT. (Through the page cache of a mount only close-to-open is
promised, which is another, weaker thing.) The shared files have their full length before the load
begins and nobody cuts them, since the length of a file is eventual between clients. Files that one
client has to itself are cut, too. File s0 is only read once it is made: its chunks never have a
write under way, so that a replica's death must not delay its reads. (A chunk whose tail died with
a write under way cannot be read before the chain has closed: the tail may have committed it, and
shown it to somebody.) No operation crosses a chunk: two chunks are two registers.

The clock is CLOCK_MONOTONIC, one for all processes of a host (also across network namespaces), so
the histories of several processes are merged by time. An operation without an answer when the load
ends is unknown. A failed write is unknown, too: the late half of it may still arrive.
"""

import asyncio
import json
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from emberfs.client.file import File, connect
from sim.history import History, Key
from sim.stamps import stamp_fill

CHUNK_BYTES = 1 << 20
CHUNKS = 3
QUIET = "s0"
FILE_BYTES = CHUNKS * CHUNK_BYTES
SLOT_BYTES = 4096
SLOTS = 6  # of every chunk; few, so that clients meet
DRAIN_S = 15.0  # at the end, operations that have begun get this long


class Job(msgspec.Struct, frozen=True):
    """What one load process does."""

    number: int  # of the process: makes client numbers and stamps unique
    seed: int
    output: str  # the history; OUTPUT.progress has "operations errors"
    mgmtd: str = ""
    cluster: str = ""
    mount: str = ""  # through the mount if given, else through the library
    directory: str = "h"
    files: int = 3  # shared ones, the quiet one among them
    clients: int = 3
    pause_s: float = 0.02  # between two operations of a client, on average
    fsync_share: float = 0.05
    write_share: float = 0.45


class Handle(Protocol):
    """An open file, however it is reached."""

    async def read(self, offset: int, length: int) -> bytes:
        """Return what is there, short at the end of the file."""
        ...

    async def write(self, offset: int, data: bytes) -> None:
        """Write all of it."""
        ...

    async def fsync(self) -> None:
        """Make it stable."""
        ...

    async def truncate(self, size: int) -> None:
        """Set the length."""
        ...

    async def close(self) -> None:
        """End it: the length becomes exact for everybody."""
        ...


Open = Callable[[str], Awaitable[Handle]]


class NativeHandle:
    """A file of the library."""

    def __init__(self, file: File) -> None:
        self._file = file

    async def read(self, offset: int, length: int) -> bytes:
        """See Handle."""
        memory = bytearray(length)
        count = await self._file.pread(memory, offset)
        return bytes(memory[:count])

    async def write(self, offset: int, data: bytes) -> None:
        """See Handle."""
        await self._file.pwrite(data, offset)

    async def fsync(self) -> None:
        """See Handle."""
        await self._file.fsync()

    async def truncate(self, size: int) -> None:
        """See Handle."""
        await self._file.truncate(size)

    async def close(self) -> None:
        """See Handle."""
        await self._file.close()


class MountHandle:
    """A file of a mount, O_DIRECT; the system calls run in threads."""

    def __init__(self, path: Path, threads: ThreadPoolExecutor) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
        self._threads = threads

    async def _run(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def read(self, offset: int, length: int) -> bytes:
        """See Handle."""

        def work() -> bytes:
            with mmap.mmap(-1, length) as memory:  # page-aligned, as O_DIRECT wants it
                return memory[: os.preadv(self._fd, [memory], offset)]

        return bytes(await self._run(work))

    async def write(self, offset: int, data: bytes) -> None:
        """See Handle."""

        def work() -> None:
            with mmap.mmap(-1, len(data)) as memory:
                memory[:] = data
                count = os.pwritev(self._fd, [memory], offset)
                if count != len(data):
                    raise OSError(f"short write: {count} of {len(data)}")

        await self._run(work)

    async def fsync(self) -> None:
        """See Handle."""
        await self._run(lambda: os.fsync(self._fd))

    async def truncate(self, size: int) -> None:
        """See Handle."""
        await self._run(lambda: os.ftruncate(self._fd, size))

    async def close(self) -> None:
        """See Handle."""
        await self._run(lambda: os.close(self._fd))


class Range(NamedTuple):
    """Where an operation goes."""

    offset: int
    length: int


class Load:
    """The clients of one process."""

    def __init__(self, job: Job, open_file: Open) -> None:
        self._job = job
        self._open = open_file
        self._choose = random.Random(job.seed * 1_000 + job.number)
        self._stamp = job.number << 32
        self._operations = self._errors = 0
        self.history = History()
        self.stopping = False

    async def run(self) -> None:
        """Let every client work until `stopping`."""
        job = self._job
        async with asyncio.TaskGroup() as group:
            for number in range(job.clients):
                group.create_task(self._client(job.number * 100 + number))

    async def _client(self, client: int) -> None:
        job = self._job
        shared = [(f"s{place}", True) for place in range(job.files)]
        names = [*shared, (f"p{client}", False)]
        files = {name: await self._open(f"{job.directory}/{name}") for name, _ in names}
        while not self.stopping:
            name, is_shared = self._choose.choice(names)
            await self._step(client, name, files[name], is_shared)
            await asyncio.sleep(self._choose.random() * 2 * job.pause_s)
        for file in files.values():
            await file.close()

    async def _step(self, client: int, name: str, file: Handle, shared: bool) -> None:
        dice, key = self._choose.random(), ("f", name)
        if name == QUIET:
            dice = 0.9
        if dice < self._job.fsync_share:
            await self._record(client, "flush", key, Range(0, 0), file.fsync)
        elif dice < self._job.fsync_share + self._job.write_share:
            where = self._range()
            self._stamp += 1
            data = stamp_fill(self._stamp, *where)
            await self._record(
                client, "write", key, where, lambda: file.write(where.offset, data), data
            )
        elif not shared and dice > 0.97:
            size = self._range().offset
            await self._record(client, "truncate", key, Range(size, 0), lambda: file.truncate(size))
        else:
            where = self._range()
            await self._record(client, "read", key, where, lambda: file.read(*where))

    def _range(self) -> Range:
        """One to three slots of one chunk; the library also gets odd offsets and lengths."""
        chunk, slot = self._choose.randrange(CHUNKS), self._choose.randrange(SLOTS - 2)
        offset = chunk * CHUNK_BYTES + slot * SLOT_BYTES
        length = self._choose.choice([1, 1, 2, 3]) * SLOT_BYTES
        if self._job.mount or self._choose.random() < 0.5:
            return Range(offset, length)
        cut = self._choose.choice([8, 512, 1000])
        return Range(offset + cut, length - 2 * cut)

    async def _record(
        self,
        client: int,
        kind: str,
        key: Key,
        where: Range,
        work: Callable[[], Awaitable[bytes | None]],
        data: bytes = b"",
    ) -> None:
        op = self.history.begin(client, kind, key, *where, time.monotonic_ns(), data)
        try:
            found = await work() or b""
        except OSError as problem:
            outcome = "fail" if kind in ("read", "flush") else "unknown"
            self.history.end(op, time.monotonic_ns(), outcome, result=f"error: {problem}")
            self._errors += 1
        else:
            self.history.end(op, time.monotonic_ns(), "ok", found)
        self._operations += 1
        beside = Path(self._job.output + ".new")
        beside.write_text(f"{self._operations} {self._errors}")
        beside.rename(self._job.output + ".progress")


async def prepare(open_file: Open, directory: str, files: int) -> None:
    """Give the shared files their full length (as zeros, which every reader may see)."""
    for place in range(files):
        handle = await open_file(f"{directory}/s{place}")
        await handle.truncate(FILE_BYTES)
        await handle.fsync()


async def _work(load: Load) -> None:
    """Run until SIGTERM; what has not ended some time later is left unknown."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    running = asyncio.ensure_future(load.run())
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    load.stopping = True
    await asyncio.wait({running}, timeout=DRAIN_S)
    if running.done():
        running.result()  # a bug of the load itself
        if not stopped.done():
            raise AssertionError("the load ended by itself")


async def _native(job: Job) -> Load:
    async with connect(job.mgmtd, cluster=job.cluster) as system:

        async def open_file(path: str) -> Handle:
            if not await system.exists("/" + path):
                await (await system.open("/" + path, "a")).close()
            return NativeHandle(await system.open("/" + path, "r+", direct=True))

        load = Load(job, open_file)
        await _work(load)
        load.history.dump(Path(job.output))
        os._exit(0)  # closing would wait for servers that a test has taken away


async def _mounted(job: Job) -> Load:
    threads = ThreadPoolExecutor(4 * job.clients)

    async def open_file(path: str) -> Handle:
        return MountHandle(Path(job.mount, path), threads)

    load = Load(job, open_file)
    await _work(load)
    load.history.dump(Path(job.output))
    os._exit(0)  # threads may still wait for the mount


def main() -> None:
    """Do the job that the argument names."""
    job = msgspec.convert(json.loads(Path(sys.argv[1]).read_text()), Job)
    asyncio.run(_mounted(job) if job.mount else _native(job))


if __name__ == "__main__":
    main()
