"""The path API for programs without an event loop: one loop in one background thread.

    with Client("127.0.0.1:9000", cluster="demo") as client:
        with client.open("/data/a") as file:
            file.pread(buffer, 0)

Every method blocks its caller only; any number of threads may share a Client. Buffers of the caller
are filled by the loop's thread directly.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Self, TypeVar

import uvloop

from emberfs.client.file import DirEntry, File, FileSystem, Memory, Path, connect
from emberfs.client.oserrors import FileSystemError
from emberfs.fabric.region import Region
from emberfs.proto.ids import SECOND
from emberfs.proto.meta_calls import Caller
from emberfs.proto.quota_calls import QuotaReport

T = TypeVar("T")


class LoopThread:
    """An event loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="emberfs-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait; an interrupt of the caller cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Stop the loop and wait for the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


class BlockingFile:
    """An open file; see client.file.File."""

    def __init__(self, thread: LoopThread, file: File) -> None:
        self._run = thread.run
        self._file = file

    @property
    def name(self) -> str:
        """The path it was opened by."""
        return self._file.name

    @property
    def closed(self) -> bool:
        """True once close was called."""
        return self._file.closed

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes from the position, all that is left if negative."""
        return self._run(self._file.read(size))

    def readinto(self, memory: Memory) -> int:
        """Fill the caller's memory from the position."""
        return self._run(self._file.readinto(memory))

    def pread(self, memory: Memory, offset: int) -> int:
        """Fill the caller's memory from `offset`; returns the byte count. No copy in between."""
        return self._run(self._file.pread(memory, offset))

    @property
    def file(self) -> File:
        """The file of the event loop."""
        return self._file

    def write(self, data: Memory) -> int:
        """Write all at the position, or at the end in mode "a"."""
        return self._run(self._file.write(data))

    def pwrite(self, data: Memory, offset: int) -> int:
        """Write all at `offset`."""
        return self._run(self._file.pwrite(data, offset))

    def flush(self) -> None:
        """Make it visible to other clients."""
        self._run(self._file.flush())

    def fsync(self) -> None:
        """Make it stable on every replica."""
        self._run(self._file.fsync())

    def fdatasync(self) -> None:
        """As fsync, without the times."""
        self._run(self._file.fdatasync())

    def truncate(self, size: int | None = None) -> int:
        """Set the length (default: the position)."""
        return self._run(self._file.truncate(size))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position."""
        return self._run(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def stat(self) -> os.stat_result:
        """Attributes."""
        return self._run(self._file.stat())

    def close(self) -> None:
        """Flush and end."""
        self._run(self._file.close())


class Client:
    """A cluster's tree; see client.file.FileSystem."""

    def __init__(
        self,
        mgmtd: str | Sequence[str],
        *,
        cluster: str,
        caller: Caller | None = None,
        timeout_ns: int = 10 * SECOND,
    ) -> None:
        """Connect to a cluster by the "ip:port" of its management service."""
        self._thread = LoopThread()
        self._run = self._thread.run
        self._connection = connect(mgmtd, cluster=cluster, caller=caller, timeout_ns=timeout_ns)
        try:
            self._fs: FileSystem = self._run(self._connection.__aenter__())
        except BaseException:
            self._thread.close()
            raise

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Flush everything and disconnect."""
        try:
            self._run(self._leave())
        finally:
            self._thread.close()

    async def _leave(self) -> None:
        await self._connection.__aexit__(None, None, None)

    def allocate(self, size_bytes: int) -> Region:
        """Shared memory: reads into slices of it and writes out of them are never copied."""
        return self._fs.allocate(size_bytes)

    def open(
        self, path: Path, mode: str = "r", *, permissions: int = 0o666, direct: bool = False
    ) -> BlockingFile:
        """Open as builtins.open in binary mode."""
        file = self._run(self._fs.open(path, mode, permissions=permissions, direct=direct))
        return BlockingFile(self._thread, file)

    def stat(self, path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        """As os.stat."""
        return self._run(self._fs.stat(path, follow_symlinks=follow_symlinks))

    def batch_stat(
        self, paths: Sequence[Path], *, follow_symlinks: bool = True
    ) -> list[os.stat_result | FileSystemError | None]:
        """As stat of each path, in few calls: None where nothing is, other errors in place."""
        return self._run(self._fs.batch_stat(paths, follow_symlinks=follow_symlinks))

    def batch_create(
        self,
        items: Sequence[tuple[Path, Memory]],
        *,
        exclusive: bool = False,
        permissions: int = 0o666,
    ) -> list[FileSystemError | None]:
        """Make small files, (path, content) each, durably: None for each that is there."""
        work = self._fs.batch_create(items, exclusive=exclusive, permissions=permissions)
        return self._run(work)

    def read_many(
        self, wanted: Sequence[tuple[BlockingFile, int, Memory]]
    ) -> list[int | FileSystemError]:
        """Fill many pieces of memory, (file, offset, memory) each: bytes or the error of each."""
        items = [(file.file, offset, memory) for file, offset, memory in wanted]
        return self._run(self._fs.read_many(items))

    def write_many(
        self, wanted: Sequence[tuple[BlockingFile, int, Memory]]
    ) -> list[int | FileSystemError]:
        """Write many pieces of memory, (file, offset, memory) each, past the buffers."""
        items = [(file.file, offset, memory) for file, offset, memory in wanted]
        return self._run(self._fs.write_many(items))

    def exists(self, path: Path) -> bool:
        """True if the path leads to something."""
        return self._run(self._fs.exists(path))

    def chmod(self, path: Path, mode: int) -> None:
        """Set the permission bits."""
        self._run(self._fs.chmod(path, mode))

    def chown(self, path: Path, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """Set owner and group; -1 leaves one alone."""
        self._run(self._fs.chown(path, uid, gid, follow_symlinks=follow_symlinks))

    def utime(self, path: Path, ns: tuple[int, int] | None = None) -> None:
        """Set (atime, mtime) in ns since 1970; None: now."""
        self._run(self._fs.utime(path, ns))

    def truncate(self, path: Path, length: int) -> None:
        """Set the length of a file."""
        self._run(self._fs.truncate(path, length))

    def getxattr(self, path: Path, name: str) -> bytes:
        """Value of an extended attribute."""
        return self._run(self._fs.getxattr(path, name))

    def setxattr(self, path: Path, name: str, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute."""
        self._run(self._fs.setxattr(path, name, value, flags))

    def removexattr(self, path: Path, name: str) -> None:
        """Remove an extended attribute."""
        self._run(self._fs.removexattr(path, name))

    def listxattr(self, path: Path) -> list[str]:
        """Names of the extended attributes."""
        return self._run(self._fs.listxattr(path))

    def statvfs(self, path: Path = "/") -> os.statvfs_result:
        """Space after replication, of the quota that the path is under, if any."""
        return self._run(self._fs.statvfs(path))

    def remove_tree(self, path: Path) -> None:
        """Remove a directory with everything in it, in one step for the caller."""
        self._run(self._fs.remove_tree(path))

    def trash(self, path: Path) -> None:
        """Put a file, or a directory with everything in it, into the trash."""
        self._run(self._fs.trash(path))

    def set_quota(
        self, path: Path, *, bytes_max: int | None = None, files_max: int | None = None
    ) -> None:
        """Limit a directory with all below it; None leaves a limit as it is, 0 lifts it."""
        self._run(self._fs.set_quota(path, bytes_max=bytes_max, files_max=files_max))

    def remove_quota(self, path: Path) -> None:
        """Lift the quota of a directory."""
        self._run(self._fs.remove_quota(path))

    def quotas_of(self, path: Path) -> tuple[QuotaReport, ...]:
        """The quotas that a path counts for, innermost first, with what is used."""
        return self._run(self._fs.quotas_of(path))

    def scandir(self, path: Path = "/") -> list[DirEntry]:
        """All entries of a directory."""

        async def collect() -> list[DirEntry]:
            return [entry async for entry in self._fs.scandir(path)]

        return self._run(collect())

    def listdir(self, path: Path = "/") -> list[str]:
        """Names in a directory."""
        return self._run(self._fs.listdir(path))

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        """Make a directory."""
        self._run(self._fs.mkdir(path, mode))

    def makedirs(self, path: Path, mode: int = 0o777, *, exist_ok: bool = False) -> None:
        """Make a directory and what is missing above it."""
        self._run(self._fs.makedirs(path, mode, exist_ok=exist_ok))

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        self._run(self._fs.rmdir(path))

    def remove(self, path: Path) -> None:
        """Remove a file."""
        self._run(self._fs.remove(path))

    def rmtree(self, path: Path) -> None:
        """Remove a directory with everything in it."""
        self._run(self._fs.rmtree(path))

    def rename(self, source: Path, target: Path, *, flags: int = 0) -> None:
        """Rename, replacing the target."""
        self._run(self._fs.rename(source, target, flags=flags))

    def symlink(self, target: Path, path: Path) -> None:
        """Make a symbolic link at `path` that says `target`."""
        self._run(self._fs.symlink(target, path))

    def readlink(self, path: Path) -> str:
        """What a symbolic link says."""
        return self._run(self._fs.readlink(path))

    def link(self, source: Path, target: Path) -> None:
        """Make a hard link `target` to the file `source`."""
        self._run(self._fs.link(source, target))
