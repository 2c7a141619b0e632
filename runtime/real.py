"""The production Env: the only file that touches the OS clock, files and threads."""

import asyncio
import ctypes
import errno
import fcntl
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

BLOCKING_THREADS = 8
_RWF_NOWAIT = os.RWF_NOWAIT
_PUNCH_KEEPING_SIZE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
# The os module knows posix_fallocate only.
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_WOULD_BLOCK = {errno.EAGAIN, errno.EOPNOTSUPP}
# Reads its input to the end, which comes when our last thread has gone, then executes what it was
# told last. A shell, because a waiting Python would cost tens of megabytes.
_HEIR = """trap '' HUP INT TERM
will=
while read -r line; do will=$line; done
[ -z "$will" ] || exec "$@" "$will"
"""


class RealFile:
    """A file descriptor with positional I/O (see env.DiskFile)."""

    def __init__(self, path: str, *, create: bool) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        self._fd = os.open(path, flags, 0o600)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view`; short only at the end of the file."""
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def read_cached_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from the page cache or return -1; short only at the end of the file."""
        try:
            count = os.preadv(self._fd, [view], offset, _RWF_NOWAIT)
        except OSError as problem:
            if problem.errno in _WOULD_BLOCK:
                return -1
            raise
        if count == len(view) or offset + count >= self.size():
            return count
        return -1

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write everything, in order."""
        pending = [view for view in views if len(view)]
        while pending:
            count = os.pwritev(self._fd, pending, offset)
            offset += count
            while pending and count >= len(pending[0]):
                count -= len(pending.pop(0))
            if pending and count:
                pending[0] = pending[0][count:]

    def allocate(self, offset: int, length: int) -> None:
        """Reserve space; file systems without fallocate get a plain extension."""
        try:
            os.posix_fallocate(self._fd, offset, length)
        except OSError as problem:
            if problem.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._fd, max(self.size(), offset + length))

    def punch(self, offset: int, length: int) -> None:
        """Give a range back to the file system (fallocate(2) with FALLOC_FL_PUNCH_HOLE)."""
        if offset + length >= self.size():
            os.ftruncate(self._fd, offset)
        elif _fallocate(self._fd, _PUNCH_KEEPING_SIZE, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def drop_cached(self, offset: int, length: int) -> None:
        """Drop the clean pages of a range from the page cache (posix_fadvise(2))."""
        try:
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass  # it is advice

    def size(self) -> int:
        """Length in bytes."""
        return os.fstat(self._fd).st_size

    def datasync(self) -> None:
        """fdatasync(2)."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class RealSpace(NamedTuple):
    """Room on a file system."""

    total_bytes: int
    free_bytes: int


class RealDisk:
    """Directories and files of this machine (see env.Disk)."""

    def open(self, path: str, *, create: bool = False) -> RealFile:
        """Open for reading and writing."""
        return RealFile(path, create=create)

    def make_directory(self, path: str) -> None:
        """Create with parents."""
        os.makedirs(path, exist_ok=True)

    def names(self, path: str) -> list[str]:
        """Sorted names; empty if there is no such directory."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def exists(self, path: str) -> bool:
        """Tell whether the path exists."""
        return os.path.exists(path)

    def read_small(self, path: str) -> bytes:
        """Whole content."""
        return Path(path).read_bytes()

    def replace_small(self, path: str, content: bytes) -> None:
        """Write beside, sync, rename over, sync the directory."""
        beside = path + ".new"
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        Path(path).unlink(missing_ok=True)

    def space(self, path: str) -> RealSpace:
        """statvfs(3), as an unprivileged user may use it."""
        found = os.statvfs(path)
        return RealSpace(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def lock(self, path: str) -> Callable[[], None]:
        """flock(2) on a file; the kernel releases it when the process dies."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return lambda: os.close(fd)


class RealEnv:
    """Clock, randomness, disk and threads of this machine (see env.Env)."""

    def __init__(self) -> None:
        self.random = random.Random(os.urandom(16))
        self.disk = RealDisk()
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Memory can be shared between processes that see the same sockets and the same boot.
        self.host_key = self.boot_id.replace("-", "")[:16]
        self._threads: ThreadPoolExecutor | None = None
        self._heir: int | None = None  # the pipe to who speaks after our death

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        """CLOCK_REALTIME."""
        return time.time_ns()

    async def sleep_ns(self, duration_ns: int) -> None:
        """Pause this task."""
        await asyncio.sleep(duration_ns / 1e9)

    async def run_blocking(self, work: Callable[[], T]) -> T:
        """Run `work` in one of a few threads; a cancelled caller leaves only when it has ended.

        The thread may be writing into memory that is reused as soon as the caller is gone.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(BLOCKING_THREADS, "blocking")
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                try:
                    await asyncio.wait({running})
                except asyncio.CancelledError:
                    continue  # once is enough
            if not running.cancelled():
                running.exception()  # nobody is left to be told
            raise

    def bequeath(self, module: str, words: str) -> None:
        """A shell waits for the end of a pipe that only we hold; see env.Env."""
        if self._heir is None:
            if not words:
                return
            self._heir = _spawn_heir(module)
        try:
            os.write(self._heir, words.encode() + b"\n")
        except BrokenPipeError:
            os.close(self._heir)
            self._heir = None  # somebody has killed it: leases are what counts, it only hurries


def _spawn_heir(module: str) -> int:
    """Start the shell in a session of its own, without our descriptors; return its input."""
    source, sink = os.pipe()
    try:
        os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", _HEIR, "emberfs-heir", sys.executable, "-m", module],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, source, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setsid=True,
        )
    finally:
        os.close(source)
    return sink
