"""The path API: files of an emberfs cluster without a mount.

    async with connect("127.0.0.1:9000", cluster="demo") as fs:
        async with await fs.open("/data/a", "w") as file:
            await file.write(b"hello")

Paths are absolute in the cluster. Errors are FileSystemError, an OSError with errno and path, and
also the built-in of that errno (FileNotFoundError, ...). Files are binary.
"""

import errno
import os
import stat as st
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self, TypeAlias

from emberfs.client import manyio
from emberfs.client.administration import Administration
from emberfs.client.batch import Batches, Manner, NewFile, in_turns
from emberfs.client.cluster import Cluster
from emberfs.client.manyio import Range, Result
from emberfs.client.openfile import OpenFile
from emberfs.client.oserrors import FileSystemError, os_error, translated
from emberfs.fabric.region import Buffer, Region, Slice
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import NAME_BYTES_MAX, Inode
from emberfs.proto.ids import SECOND, MiB
from emberfs.proto.meta_calls import SERVER_CLOCK, Caller, explicit_time
from emberfs.proto.quota_calls import QuotaReport
from emberfs.runtime.env import Env
from emberfs.runtime.real import RealEnv

Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
# A Slice of a Region (zero-copy on every transport) or whatever memoryview() accepts: bytearray,
# a numpy array, ... contiguous.
Memory: TypeAlias = Any

READ_ALL_BYTES = 8 * MiB  # steps of read() to the end
PAGE_ROWS = 1000
OPEN_TRIES = 4  # a name may be replaced between looking it up and opening what it led to
_FLAGS = {
    "r": (True, False),
    "w": (False, True),
    "a": (False, True),
    "x": (False, True),
}
# What creating finds when the name is there and is not a plain file: look where it leads.
_LEADS_ELSEWHERE = {Code.EXISTS, Code.LOOP, Code.INVALID}


def buffer_of(memory: Memory) -> Buffer:
    """A fabric buffer over the caller's memory, without a copy."""
    if isinstance(memory, Slice):
        return memory
    if isinstance(memory, Region):
        return memory.slice(0, memory.size_bytes)
    return memoryview(memory).cast("B")


def clean(path: Path) -> bytes:
    """The path in bytes, absolute, without a slash at its end."""
    return b"/" + os.fsencode(path).strip(b"/")


class File:
    """An open file with a position. Not for use by several tasks at once, except pread, pwrite."""

    def __init__(self, file: OpenFile, path: bytes, caller: Caller, *, append: bool) -> None:
        self._file = file
        self._path = path
        self._caller = caller
        self._append = append
        self._position = 0

    @property
    def name(self) -> str:
        """The path it was opened by."""
        return os.fsdecode(self._path)

    @property
    def closed(self) -> bool:
        """True once close was called."""
        return self._file.closed

    async def __aenter__(self) -> Self:
        """Nothing to do."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    async def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes from the position, all that is left if negative; b"" at the end."""
        with translated(self._path):
            if size >= 0:
                found = bytes(await self._file.read(self._position, size))
                self._position += len(found)
                return found
            parts: list[bytes] = []
            while part := bytes(await self._file.read(self._position, READ_ALL_BYTES)):
                self._position += len(part)
                parts.append(part)
            return b"".join(parts)

    async def readinto(self, memory: Memory) -> int:
        """Fill the caller's memory from the position; returns the byte count."""
        count = await self.pread(memory, self._position)
        self._position += count
        return count

    async def pread(self, memory: Memory, offset: int) -> int:
        """Fill the caller's memory from `offset`; returns the byte count. No copy in between."""
        with translated(self._path):
            return await self._file.read_into(offset, buffer_of(memory))

    def range(self, offset: int, memory: Memory) -> Range:
        """Name bytes of the file from `offset` on, and the memory for them: see read_many."""
        return Range(self._file, offset, buffer_of(memory))

    async def write(self, data: Memory) -> int:
        """Write all at the position, or at the end of the file in mode "a"."""
        with translated(self._path):
            count = await self._file.write(self._position, buffer_of(data), append=self._append)
        start = self._file.append_offset if self._append else self._position
        self._position = start + count
        return count

    async def pwrite(self, data: Memory, offset: int) -> int:
        """Write all at `offset`."""
        with translated(self._path):
            return await self._file.write(offset, buffer_of(data))

    async def flush(self) -> None:
        """Make it visible to other clients that open the file."""
        with translated(self._path):
            await self._file.flush()

    async def fsync(self) -> None:
        """Make it stable on every replica."""
        with translated(self._path):
            await self._file.fsync()

    async def fdatasync(self) -> None:
        """As fsync, without the times."""
        with translated(self._path):
            await self._file.fsync(data_only=True)

    async def truncate(self, size: int | None = None) -> int:
        """Set the length (default: the position); returns it."""
        length = self._position if size is None else size
        with translated(self._path):
            await self._file.truncate(length, self._caller)
        return length

    async def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; returns it."""
        with translated(self._path):
            base = 0
            if whence == os.SEEK_CUR:
                base = self._position
            elif whence == os.SEEK_END:
                base = (await self._file.stat()).length
            elif whence != os.SEEK_SET:
                raise EmberfsError(Code.INVALID, f"whence {whence}")
            if base + offset < 0:
                raise EmberfsError(Code.INVALID, f"position {base + offset} is negative")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    async def stat(self) -> os.stat_result:
        """Attributes, as os.fstat."""
        with translated(self._path):
            return stat_of(await self._file.stat())

    async def close(self) -> None:
        """Flush and end; raises what earlier writes could not deliver."""
        with translated(self._path):
            await self._file.close()


class DirEntry(NamedTuple):
    """A name in a directory with its attributes."""

    name: str
    path: str
    mode: int  # file type bits
    inode: Inode | None  # None if it vanished meanwhile

    def is_dir(self) -> bool:
        """Tell a directory; symbolic links are not followed."""
        return st.S_ISDIR(self.mode)

    def is_file(self) -> bool:
        """Tell a regular file."""
        return st.S_ISREG(self.mode)

    def is_symlink(self) -> bool:
        """Tell a symbolic link."""
        return st.S_ISLNK(self.mode)


class FileSystem:
    """A cluster's tree, seen by one user."""

    def __init__(self, cluster: Cluster, caller: Caller, umask: int) -> None:
        self.cluster = cluster
        self._metadata = cluster.metadata
        self._files = cluster.files
        self._caller = caller
        self._umask = umask
        self.administration = Administration(cluster.metadata, caller)
        self._batches = Batches(cluster.metadata, caller, umask, self._make_ordinary)

    def allocate(self, size_bytes: int) -> Region:
        """Shared memory: reads into slices of it and writes out of them are never copied."""
        return Region(size_bytes)

    # ------------------------------------------------------------ files

    async def open(
        self, path: Path, mode: str = "r", *, permissions: int = 0o666, direct: bool = False
    ) -> File:
        """Open as builtins.open in binary mode: r, w, a, x, each with +.

        `direct` bypasses this client's buffers; `permissions` (before umask) are of a new file.
        """
        kind = mode.replace("b", "").replace("+", "")
        if kind not in _FLAGS or len(mode) != len(set(mode)):
            raise ValueError(f"mode {mode!r}: use r, w, a or x, with b and + if wanted")
        read, write = _FLAGS[kind]
        if "+" in mode:
            read = write = True
        where = clean(path)
        with translated(where):
            if kind == "r":
                file = await self._open_existing(where, read, write, False, direct)
            else:
                file = await self._create(where, permissions, read, kind, direct)
        return File(file, where, self._caller, append=kind == "a")

    async def _open_existing(
        self, path: bytes, read: bool, write: bool, truncate: bool, direct: bool
    ) -> OpenFile:
        for tries_left in reversed(range(OPEN_TRIES)):
            inode = await self._metadata.resolve(self._caller, path)
            if inode.is_directory():
                raise EmberfsError(Code.IS_DIRECTORY, "a directory is listed, not opened")
            try:
                _, file = await self._files.open(
                    self._caller, inode.id, read=read, write=write, truncate=truncate, direct=direct
                )
                return file
            except EmberfsError as problem:
                if problem.code != Code.NOT_FOUND or not tries_left:
                    raise
        raise AssertionError("unreachable")

    async def _create(
        self, path: bytes, permissions: int, read: bool, kind: str, direct: bool
    ) -> OpenFile:
        parent, name = await self._parent(path)
        try:
            _, file = await self._files.create(
                self._caller,
                parent.id,
                name,
                permissions,
                umask=self._umask,
                read=read,
                write=True,
                exclusive=kind == "x",
                truncate=kind == "w",
                direct=direct,
            )
        except EmberfsError as problem:
            if kind == "x" or problem.code not in _LEADS_ELSEWHERE:
                raise
            return await self._open_existing(path, read, True, kind == "w", direct)
        return file

    async def _parent(self, path: bytes) -> tuple[Inode, bytes]:
        if path == b"/":
            raise EmberfsError(Code.IS_DIRECTORY, "the root can be neither made nor removed")
        return await self._metadata.resolve_parent(self._caller, path)

    async def _inode(self, path: bytes, follow: bool = True) -> Inode:
        return await self._metadata.resolve(self._caller, path, follow=follow)

    async def batch_create(
        self,
        items: Sequence[tuple[Path, Memory]],
        *,
        exclusive: bool = False,
        permissions: int = 0o666,
    ) -> list[FileSystemError | None]:
        """Make small files, (path, content) each, in few calls; all that is made is durable.

        None for each that is there, else its error, in the order of the items. What exists is
        replaced, or FileExistsError if `exclusive`. A file that fits beside its inode (8 KiB) is
        made or replaced with its content in one step, and not half; others are opened, written,
        synced and closed. Of items with the same path one wins. A TimeoutError leaves open what
        became of its file.
        """
        files = [NewFile(clean(path), buffer_of(content)) for path, content in items]
        found = await self._batches.create(files, Manner(permissions, exclusive))
        return [
            None if one is None else os_error(one, file.path)
            for one, file in zip(found, files, strict=True)
        ]

    async def _make_ordinary(self, new: NewFile, manner: Manner) -> None:
        kind = "x" if manner.exclusive else "w"
        file = await self._create(new.path, manner.permissions, False, kind, False)
        try:
            await file.write(0, new.content)
            await file.fsync()
        finally:
            await file.close()

    async def read_many(
        self, wanted: Sequence[tuple[File, int, Memory]]
    ) -> list[int | FileSystemError]:
        """Fill many pieces of memory, (file, offset in it, memory) each, in few calls.

        One result for each, in their order: its bytes, short at the end of the file, or its error.
        A call of hundreds costs little more than one; Slices are filled without a copy.
        """
        return await read_many(wanted)

    async def write_many(
        self, wanted: Sequence[tuple[File, int, Memory]]
    ) -> list[int | FileSystemError]:
        """Write many pieces of memory, (file, offset in it, memory) each, at once.

        One result for each, in their order. Nothing is buffered: every chain has committed what is
        written, and fsync or close makes it stable. Pieces that overlap go in any order.
        """
        ranges = [file.range(offset, memory) for file, offset, memory in wanted]
        return _told(wanted, await manyio.write_many(ranges))

    # ------------------------------------------------------------ attributes

    async def stat(self, path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        """As os.stat."""
        where = clean(path)
        with translated(where):
            found = self._files.merged(await self._inode(where, follow_symlinks))
            return stat_of(found, await self._files.stored_bytes(found))

    async def batch_stat(
        self, paths: Sequence[Path], *, follow_symlinks: bool = True
    ) -> list[os.stat_result | FileSystemError | None]:
        """As stat of each path, in few calls: one result for each, in their order.

        None where nothing is (ENOENT, ENOTDIR), the error itself where that cannot be told (EACCES,
        ELOOP, ...). Raises FileSystemError if the metadata service does not answer.
        """
        where = [clean(path) for path in paths]
        with translated():
            found = await self._batches.inodes(where, follow=follow_symlinks)
            merged = [self._files.merged(one) if isinstance(one, Inode) else one for one in found]
            sparse = [one for one in merged if isinstance(one, Inode) and one.sparse]
            stored = await in_turns(self._files.stored_bytes, sparse)
        taken = {inode.id: size for inode, size in zip(sparse, stored, strict=True)}
        return [
            stat_of(one, taken.get(one.id))
            if isinstance(one, Inode)
            else _unless_missing(one, path)
            for one, path in zip(merged, where, strict=True)
        ]

    async def exists(self, path: Path) -> bool:
        """True if the path leads to something."""
        try:
            await self.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    async def chmod(self, path: Path, mode: int) -> None:
        """Set the permission bits."""
        await self._setattr(path, mode=st.S_IMODE(mode))

    async def chown(self, path: Path, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """Set owner and group; -1 leaves one alone."""
        await self._setattr(
            path,
            follow_symlinks,
            uid=None if uid == -1 else uid,
            gid=None if gid == -1 else gid,
        )

    async def utime(self, path: Path, ns: tuple[int, int] | None = None) -> None:
        """Set (atime, mtime) in ns since 1970; None: now."""
        atime_ns = mtime_ns = SERVER_CLOCK
        if ns is not None:
            atime_ns, mtime_ns = map(explicit_time, ns)
        await self._setattr(path, atime_ns=atime_ns, mtime_ns=mtime_ns)

    async def truncate(self, path: Path, length: int) -> None:
        """Set the length of a file."""
        await self._setattr(path, length=length)

    async def _setattr(self, path: Path, follow: bool = True, **wanted: int | None) -> None:
        where = clean(path)
        with translated(where):
            inode = await self._inode(where, follow)
            await self._files.setattr(self._caller, inode.id, **wanted)  # type: ignore[arg-type]

    async def getxattr(self, path: Path, name: str) -> bytes:
        """Value of an extended attribute."""
        where = clean(path)
        with translated(where):
            inode = await self._inode(where)
            return await self._metadata.getxattr(self._caller, inode.id, os.fsencode(name))

    async def setxattr(self, path: Path, name: str, value: bytes, flags: int = 0) -> None:
        """Set one; flags os.XATTR_CREATE, os.XATTR_REPLACE."""
        where = clean(path)
        with translated(where):
            inode = await self._inode(where)
            key = os.fsencode(name)
            await self._metadata.setxattr(self._caller, inode.id, key, bytes(value), flags)

    async def removexattr(self, path: Path, name: str) -> None:
        """Remove one."""
        where = clean(path)
        with translated(where):
            inode = await self._inode(where)
            await self._metadata.setxattr(self._caller, inode.id, os.fsencode(name), None)

    async def listxattr(self, path: Path) -> list[str]:
        """Names of the extended attributes."""
        where = clean(path)
        with translated(where):
            inode = await self._inode(where)
            names = await self._metadata.listxattr(self._caller, inode.id)
            return [os.fsdecode(name) for name in names]

    async def statvfs(self, path: Path = "/") -> os.statvfs_result:
        """Space after replication, as os.statvfs: of the quota that the path is under, if any."""
        where = clean(path)
        with translated(where):
            inode = (await self._inode(where)).id
            answer = await self._metadata.statfs(inode)
        block = 4096
        total, free = answer.total_bytes // block, answer.free_bytes // block
        spare = 1 << 32
        if answer.inodes_max:
            spare = max(0, answer.inodes_max - answer.inodes)
        files = answer.inodes + spare
        return os.statvfs_result(
            (block, block, total, free, free, files, spare, spare, 0, NAME_BYTES_MAX)
        )

    # ------------------------------------------------------------ directories

    async def scandir(self, path: Path = "/") -> AsyncIterator[DirEntry]:
        """Entries in the order of their names, a page at a time."""
        where = clean(path)
        with translated(where):
            inode = await self._inode(where)
            if not inode.is_directory():
                raise EmberfsError(Code.NOT_DIRECTORY, "not a directory")
            after, more = b"", True
            while more:
                page = await self._metadata.readdir(self._caller, inode.id, after, PAGE_ROWS)
                for row in page.rows:
                    found = None if row.inode is None else self._files.merged(row.inode)
                    full = where.rstrip(b"/") + b"/" + row.name
                    yield DirEntry(os.fsdecode(row.name), os.fsdecode(full), row.mode, found)
                more = page.more and bool(page.rows)
                after = page.rows[-1].name if page.rows else b""

    async def listdir(self, path: Path = "/") -> list[str]:
        """Names in a directory, in byte order."""
        return [entry.name async for entry in self.scandir(path)]

    async def mkdir(self, path: Path, mode: int = 0o777) -> None:
        """Make a directory."""
        where = clean(path)
        with translated(where):
            parent, name = await self._parent(where)
            wanted = st.S_IFDIR | st.S_IMODE(mode)
            await self._metadata.mknod(self._caller, parent.id, name, wanted, umask=self._umask)

    async def makedirs(self, path: Path, mode: int = 0o777, *, exist_ok: bool = False) -> None:
        """Make a directory and what is missing above it."""
        where = clean(path)
        try:
            await self.mkdir(where, mode)
        except FileNotFoundError:
            await self.makedirs(os.path.dirname(where), exist_ok=True)
            await self.makedirs(where, mode, exist_ok=exist_ok)
        except (FileExistsError, IsADirectoryError):
            if not exist_ok or not st.S_ISDIR((await self.stat(where)).st_mode):
                raise

    async def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        await self._remove(clean(path), directory=True)

    async def remove(self, path: Path) -> None:
        """Remove a file, a symbolic link or a special file."""
        await self._remove(clean(path), directory=False)

    async def _remove(self, where: bytes, *, directory: bool) -> None:
        with translated(where):
            parent, name = await self._parent(where)
            await self._metadata.remove(self._caller, parent.id, name, directory=directory)

    async def rmtree(self, path: Path) -> None:
        """Remove a directory with everything in it; what is gone already is fine."""
        where = clean(path)
        entries = [entry async for entry in self.scandir(where)]
        for entry in entries:
            try:
                await (self.rmtree(entry.path) if entry.is_dir() else self.remove(entry.path))
            except FileNotFoundError:
                continue
        await self.rmdir(where)

    async def remove_tree(self, path: Path) -> None:
        """Remove a directory with everything in it, in one step for the caller.

        Its contents are deleted by the servers afterwards. Rights: see docs/semantics.md.
        """
        where = clean(path)
        with translated(where):
            parent, name = await self._parent(where)
            await self.administration.remove_tree(parent.id, name)

    async def trash(self, path: Path) -> None:
        """Put a file, or a directory with everything in it, into the trash."""
        where = clean(path)
        with translated(where):
            parent, name = await self._parent(where)
            await self.administration.trash(parent.id, name, where)

    async def set_quota(
        self, path: Path, *, bytes_max: int | None = None, files_max: int | None = None
    ) -> None:
        """Limit a directory with all below it; None leaves a limit as it is, 0 lifts it."""
        where = clean(path)
        with translated(where):
            inode = await self._inode(where)
            await self.administration.set_quota(inode.id, bytes_max=bytes_max, files_max=files_max)

    async def remove_quota(self, path: Path) -> None:
        """Lift the quota of a directory."""
        where = clean(path)
        with translated(where):
            await self.administration.remove_quota((await self._inode(where)).id)

    async def quotas_of(self, path: Path) -> tuple[QuotaReport, ...]:
        """The quotas that a path counts for, innermost first, with what is used."""
        where = clean(path)
        with translated(where):
            return await self.administration.quotas_of((await self._inode(where)).id)

    async def rename(self, source: Path, target: Path, *, flags: int = 0) -> None:
        """Rename, replacing the target; flags as renameat2(2): 1 NOREPLACE, 2 EXCHANGE."""
        old, new = clean(source), clean(target)
        with translated(old):
            parent, name = await self._parent(old)
            new_parent, new_name = await self._parent(new)
            await self._metadata.rename(
                self._caller, parent.id, name, new_parent.id, new_name, flags
            )

    async def symlink(self, target: Path, path: Path) -> None:
        """Make a symbolic link at `path` that says `target`."""
        where = clean(path)
        with translated(where):
            parent, name = await self._parent(where)
            await self._metadata.symlink(self._caller, parent.id, name, os.fsencode(target))

    async def readlink(self, path: Path) -> str:
        """What a symbolic link says."""
        where = clean(path)
        with translated(where):
            inode = await self._inode(where, follow=False)
            if not inode.is_symlink():
                raise EmberfsError(Code.INVALID, "not a symbolic link")
            return os.fsdecode(inode.symlink)

    async def link(self, source: Path, target: Path) -> None:
        """Make a hard link `target` to the file `source`."""
        old, new = clean(source), clean(target)
        with translated(old):
            inode = await self._inode(old, follow=False)
            parent, name = await self._parent(new)
            await self._metadata.link(self._caller, inode.id, parent.id, name)


def _unless_missing(problem: EmberfsError, path: bytes) -> FileSystemError | None:
    """An error that does not just say that nothing is there."""
    return None if problem.errno in (errno.ENOENT, errno.ENOTDIR) else os_error(problem, path)


def stat_of(inode: Inode, stored_bytes: int | None = None) -> os.stat_result:
    """Attributes as os.stat returns them; without `stored_bytes` holes count as stored."""
    taken_bytes = inode.length if stored_bytes is None else stored_bytes
    times = (inode.atime_ns, inode.mtime_ns, inode.ctime_ns)
    seconds = tuple(time_ns // SECOND for time_ns in times)
    more: dict[str, Any] = {"st_blksize": 1 * MiB, "st_blocks": -(-taken_bytes // 512)}
    more["st_rdev"] = inode.rdev
    for name, time_ns in zip(("st_atime", "st_mtime", "st_ctime"), times, strict=True):
        more[name] = time_ns / SECOND
        more[name + "_ns"] = time_ns
    head = (inode.mode, inode.id, 0, inode.nlink, inode.uid, inode.gid, inode.length)
    return os.stat_result(head + seconds, more)


def process_caller() -> Caller:
    """The identity of this process."""
    return Caller(os.getuid(), os.getgid(), tuple(sorted(os.getgroups())))


def process_umask() -> int:
    """The umask of this process (there is no way to ask without setting it)."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


async def read_many(wanted: Sequence[tuple[File, int, Memory]]) -> list[int | FileSystemError]:
    """See FileSystem.read_many; all files are of one connection."""
    if not wanted:
        return []
    ranges = [file.range(offset, memory) for file, offset, memory in wanted]
    return _told(wanted, await manyio.read_many(ranges[0].file.chunkio, ranges))


def _told(
    wanted: Sequence[tuple[File, int, Memory]], results: Sequence[Result]
) -> list[int | FileSystemError]:
    return [
        result if isinstance(result, int) else os_error(result, os.fsencode(file.name))
        for result, (file, _, _) in zip(results, wanted, strict=True)
    ]


@asynccontextmanager
async def connect(
    mgmtd: str | Sequence[str],
    *,
    cluster: str,
    env: Env | None = None,
    caller: Caller | None = None,
    timeout_ns: int = 10 * SECOND,
) -> AsyncIterator[FileSystem]:
    """Connect to a cluster by the "ip:port" of its management service (one or several).

    `caller` defaults to the identity of this process. On leaving, everything is flushed.
    """
    addresses = (mgmtd,) if isinstance(mgmtd, str) else tuple(mgmtd)
    with translated():
        opened = await Cluster.open(env or RealEnv(), addresses, cluster, timeout_ns=timeout_ns)
    try:
        yield FileSystem(opened, caller or process_caller(), process_umask())
    finally:
        await opened.close()
