"""Stages of `emberfs bench`: what the machine can do, and what a cluster makes of it.

Every figure is bytes or operations per second over at least the time that is asked for; the
limits of the machine are measured in the same minute as what is compared with them.
"""

import asyncio
import os
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from emberfs.client.file import File, FileSystem
from emberfs.fabric.region import Region
from emberfs.proto.ids import SECOND, KiB, MiB
from emberfs.runtime.env import Env

BLOCK_BYTES = 1 * MiB
SMALL_BYTES = 4 * KiB
BATCH, SMALL_BATCH = 8, 128
FILE_BYTES = 64 * MiB
_STAT = Path("/proc/stat")


class Figure(NamedTuple):
    """What a stage has measured."""

    name: str
    per_s: float
    unit_bytes: int  # of one operation; 0: it is not about bytes
    idle_share: float = 1.0  # of all cores meanwhile

    @property
    def bytes_per_s(self) -> float:
        """Bytes moved."""
        return self.per_s * self.unit_bytes


class _Idle:
    """The share of the machine's cores that is idle."""

    def __init__(self) -> None:
        self._before = self._read()

    @staticmethod
    def _read() -> tuple[int, int]:
        fields = [int(field) for field in _STAT.read_text().splitlines()[0].split()[1:9]]
        return fields[3] + fields[4], sum(fields)

    def share(self) -> float:
        """Since it was made."""
        idle, total = self._read()
        return (idle - self._before[0]) / max(total - self._before[1], 1)


def _repeated(env: Env, seconds: float, work: Callable[[], None]) -> float:
    """How often a second `work` can be done."""
    work()
    began_ns, end_ns = env.now_ns(), env.now_ns() + int(seconds * SECOND)
    count = 0
    while (now_ns := env.now_ns()) < end_ns:
        work()
        count += 1
    return count * SECOND / (now_ns - began_ns)


# ---------------------------------------------------------------- the machine


def memory(env: Env, seconds: float) -> Figure:
    """One core copies memory that is not in its cache."""
    source, target = (memoryview(bytearray(FILE_BYTES)) for _ in range(2))
    source[:] = b"\1" * FILE_BYTES

    def copy() -> None:
        target[:] = source

    return Figure("memory copy, one core", _repeated(env, seconds, copy), FILE_BYTES)


def disk(env: Env, seconds: float, directory: Path) -> Figure:
    """Write and sync a file in a directory. Raises OSError."""
    data = env.random.randbytes(BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, FILE_BYTES)

        def write() -> None:
            for at in range(0, FILE_BYTES, BLOCK_BYTES):
                os.pwrite(file.fileno(), data, at)
            os.fdatasync(file.fileno())

        return Figure("disk, write and sync", _repeated(env, seconds, write), FILE_BYTES)


def network(env: Env, seconds: float) -> Figure:
    """One loopback TCP connection, sendfile to recv_into."""
    with tempfile.TemporaryFile() as file, socket.create_server(("127.0.0.1", 0)) as listener:
        file.write(bytes(BLOCK_BYTES))
        file.flush()
        wire = socket.create_connection(listener.getsockname())
        sender, _ = listener.accept()
        over = threading.Event()

        def send() -> None:
            try:
                while not over.is_set():
                    os.sendfile(sender.fileno(), file.fileno(), 0, BLOCK_BYTES)
            except OSError:
                pass

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        sink = memoryview(bytearray(BLOCK_BYTES))
        received = 0

        def receive() -> None:
            nonlocal received
            at = 0
            while at < BLOCK_BYTES:
                at += wire.recv_into(sink[at:])

        try:
            rate = _repeated(env, seconds, receive)
        finally:
            over.set()
            wire.close()
            sender.close()
            thread.join(5)
        return Figure("network, one TCP stream on loopback", rate, BLOCK_BYTES)


# ---------------------------------------------------------------- the cluster


async def _rounds(
    env: Env, name: str, seconds: float, work: Callable[[], Awaitable[int]], unit_bytes: int
) -> Figure:
    await work()
    idle, began_ns, count = _Idle(), env.now_ns(), 0
    while env.now_ns() - began_ns < seconds * SECOND:
        count += await work()
    rate = count * SECOND / (env.now_ns() - began_ns)
    return Figure(name, rate, unit_bytes, idle.share())


async def write(fs: FileSystem, env: Env, seconds: float, path: str) -> Figure:
    """Write a file of 64 MiB in blocks of 1 MiB, and sync it, again and again."""
    region = fs.allocate(FILE_BYTES)
    region.view[:] = env.random.randbytes(BLOCK_BYTES) * (FILE_BYTES // BLOCK_BYTES)

    async def once() -> int:
        async with await fs.open(path, "w") as file:
            parts = range(0, FILE_BYTES, BLOCK_BYTES)
            found = await fs.write_many([(file, at, region.slice(at, BLOCK_BYTES)) for at in parts])
            for result in found:
                if isinstance(result, OSError):
                    raise result
            await file.fsync()
        return FILE_BYTES // BLOCK_BYTES

    try:
        return await _rounds(env, "write 1 MiB and sync", seconds, once, BLOCK_BYTES)
    finally:
        region.close()


async def read(
    fs: FileSystem, env: Env, seconds: float, path: str, size: int, batch: int
) -> Figure:
    """Read blocks of a file at random, two batches at a time."""
    region = fs.allocate(2 * batch * size)
    name = f"read {size // KiB} KiB at random, batches of {batch}"
    try:
        async with await fs.open(path) as file:

            async def once() -> int:
                halves = [_batch(env, file, region, lane, size, batch) for lane in (0, 1)]
                for found in await asyncio.gather(*map(fs.read_many, halves)):
                    for result in found:
                        if isinstance(result, OSError):
                            raise result
                return 2 * batch

            return await _rounds(env, name, seconds, once, size)
    finally:
        region.close()


def _batch(
    env: Env, file: File, region: Region, lane: int, size: int, batch: int
) -> list[tuple[File, int, object]]:
    return [
        (
            file,
            env.random.randrange(FILE_BYTES // size) * size,
            region.slice((lane * batch + i) * size, size),
        )
        for i in range(batch)
    ]


async def names(fs: FileSystem, env: Env, seconds: float, directory: str) -> Figure:
    """Create files of 4 KiB, one after another, each durable."""
    data, number = b"x" * SMALL_BYTES, 0

    async def once() -> int:
        nonlocal number
        number += 1
        async with await fs.open(f"{directory}/{number}", "x") as file:
            await file.write(data)
        return 1

    return await _rounds(env, "create and write 4 KiB, one at a time", seconds, once, 0)


def verdict(found: dict[str, Figure], replicas: int) -> str:
    """One sentence: what limits this cluster, as far as these figures tell."""
    reads, writes = found["read"], found["write"]
    on_disk = writes.bytes_per_s * replicas / found["disk"].bytes_per_s
    in_memory = reads.bytes_per_s / found["memory"].bytes_per_s
    if on_disk > 0.6:
        return (
            f"Writes are limited by the disk: {replicas} copies of them are {on_disk:.0%} of what "
            "one sequential writer reaches there."
        )
    if min(reads.idle_share, writes.idle_share) < 0.1:
        return (
            "The limit is the CPU: all cores are busy while the cluster works; more cores, or "
            "services on other hosts, will help."
        )
    if in_memory > 0.6:
        return f"Reads are limited by memory: {in_memory:.0%} of what one core can copy."
    return (
        f"Neither disk ({on_disk:.0%} used by writes) nor CPU ({reads.idle_share:.0%} idle) nor "
        "memory is at its limit: one client waits for answers; run several, or larger batches."
    )
