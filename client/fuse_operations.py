"""FUSE requests translated into calls of the client; nothing is decided here but caching.

What the kernel may cache: attributes, names and missing names as kernelcache.py says, pages of a
file until it is opened again and has changed meanwhile (close-to-open). POSIX and BSD locks stay
with the kernel: they hold among the processes of one mount, not between machines.
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, RequestContext

from emberfs.client.callers import ROOT, Callers
from emberfs.client.fuse_attributes import (
    Changes,
    attributes,
    bare_entry,
    changes,
    missing_entry,
    space,
    touched,
)
from emberfs.client.fuse_kernel import FuseKernel, drop_attributes
from emberfs.client.fuse_metrics import FuseMetrics
from emberfs.client.fuse_requests import Requests, handler, looked_up_anew
from emberfs.client.handles import (
    PAGE_ROWS,
    DirectoryHandle,
    FileHandle,
    HandleTable,
    KnownInodes,
    version,
)
from emberfs.client.kernelcache import KernelCache, Timeouts
from emberfs.client.metadata import NO_SESSION, Metadata
from emberfs.client.openfile import OpenFile, OpenFiles
from emberfs.client.virtual import VirtualDirectory
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import XATTR_NAME_BYTES_MAX, Inode
from emberfs.proto.ids import SECOND, InodeId, SessionId
from emberfs.proto.meta_calls import Caller, ReaddirRow
from emberfs.runtime.env import Env

CAPABILITY = b"security.capability"
ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")


class CachePolicy(NamedTuple):
    """What the kernel may keep, and for how long."""

    attr_timeout_s: float = 1.0
    entry_timeout_s: float = 1.0
    announced_timeout_s: float = 60.0  # both, while every change is announced
    writeback: bool = False  # the kernel gathers small writes; other clients see them later
    request_timeout_ns: int = 60 * SECOND
    acl: bool = False  # the kernel enforces POSIX ACLs; mountpoint.mount_with_acl


class EmberOperations(pyfuse3.Operations):
    """The request handlers of one mount."""

    supports_dot_lookup = True

    def __init__(
        self,
        env: Env,
        metadata: Metadata,
        files: OpenFiles,
        policy: CachePolicy = CachePolicy(),  # noqa: B008 (immutable)
        metrics: FuseMetrics | None = None,
        asked_inode: Callable[[], InodeId] = lambda: InodeId(0),
    ) -> None:
        """`asked_inode` tells what the statfs request that comes first is about; 0: not known."""
        super().__init__()
        self.metrics = metrics or FuseMetrics()
        self.requests = Requests(env, self.metrics, policy.request_timeout_ns)
        self.enable_writeback_cache = policy.writeback
        self.enable_acl = policy.acl
        self._metadata = metadata
        self._files = files
        self._policy = policy
        self._asked_inode = asked_inode
        self.virtual = VirtualDirectory(env.wall_ns())
        self._callers = Callers(env)
        self._known = KnownInodes()
        self.kernel = FuseKernel(env, self._known)
        self.cache = KernelCache(
            self.kernel,
            Timeouts(policy.attr_timeout_s, policy.announced_timeout_s),
            Timeouts(policy.entry_timeout_s, policy.announced_timeout_s),
        )
        # Nobody tells us of our own changes, and the kernel takes a failed request for undone.
        self.requests.on_doubt = self.cache.lost
        self._open: HandleTable[FileHandle] = HandleTable()
        self._listing: HandleTable[DirectoryHandle] = HandleTable()

    # ------------------------------------------------------------ names and inodes

    @handler
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name. That there is none is cached only while changes are announced."""
        caller, mark = self._callers.of(ctx), self.cache.mark()
        if (virtual := self.virtual.lookup(parent, name)) is not None:
            return self._entry(virtual, parent, name, mark)
        try:
            found = await self._metadata.lookup(caller, InodeId(parent), name)
        except EmberfsError as problem:
            if problem.code != Code.NOT_FOUND:
                raise
            return self._missing(parent, name, mark)
        return self._entry(found, parent, name, mark)

    async def forget(self, inodes: Sequence[tuple[int, int]]) -> None:
        """Let go of inodes; never waits, never fails."""
        for inode, count in inodes:
            self._known.forget(inode, count)

    @handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Attributes, with the length of our own writes that meta has not heard of yet."""
        mark, found = self.cache.mark(), await self._inode(inode)
        stored_bytes = await self._files.stored_bytes(found) if found.sparse else None
        return self._attributes(found, mark, stored_bytes)

    @handler
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """chmod, chown, truncate, ftruncate, utimens."""
        wanted, mark = changes(attr, fields), self.cache.mark()
        if not wanted:
            return self._attributes(await self._inode(inode), mark)
        if "length" in wanted or "mtime_ns" in wanted:
            self._known.of(inode).cached = None
        caller = self._callers.of(ctx)
        if self._policy.writeback and fields.update_ctime and wanted.keys() == {"mtime_ns"}:
            caller = ROOT  # the time of gathered writes, told by the kernel in whoever's name
        session = NO_SESSION
        if fh is not None and "length" in wanted:
            session = self._open.get(fh).file.session
        try:
            with looked_up_anew():
                found = await self._set(caller, inode, wanted, session)
        except EmberfsError as problem:
            now = touched(wanted, self.requests.env.wall_ns())
            if problem.code != Code.NOT_PERMITTED or now is None:
                raise
            found = await self._set(caller, inode, now, session)
        return self._attributes(found, mark)

    @handler
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Target of a symlink, which never changes."""
        known = self._known.of(inode)
        if not known.symlink:
            known.symlink = (await self._metadata.getattr(InodeId(inode))).symlink
        if not known.symlink:
            raise pyfuse3.FUSEError(errno.EINVAL)
        return known.symlink

    @handler
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a fifo, socket, device or empty file."""
        caller, mark = self._callers.of(ctx), self.cache.mark()
        found = await self._metadata.mknod(
            caller, InodeId(parent), name, mode, rdev, umask=ctx.umask
        )
        return self._entry(found, parent, name, mark)

    @handler
    async def mkdir(
        self, parent: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a directory."""
        caller, mark = self._callers.of(ctx), self.cache.mark()
        mode = stat.S_IFDIR | stat.S_IMODE(mode)
        found = await self._metadata.mknod(caller, InodeId(parent), name, mode, umask=ctx.umask)
        return self._entry(found, parent, name, mark)

    @handler
    async def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name; whoever has the file open keeps it."""
        caller = self._callers.of(ctx)
        await self._metadata.remove(caller, InodeId(parent), name, directory=False)

    @handler
    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        caller = self._callers.of(ctx)
        await self._metadata.remove(caller, InodeId(parent), name, directory=True)

    @handler
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symbolic link."""
        caller, mark = self._callers.of(ctx), self.cache.mark()
        found = await self._metadata.symlink(caller, InodeId(parent), name, target)
        return self._entry(found, parent, name, mark)

    @handler
    async def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """renameat2(2): plain, NOREPLACE or EXCHANGE."""
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise pyfuse3.FUSEError(errno.EINVAL)
        caller = self._callers.of(ctx)
        await self._metadata.rename(
            caller, InodeId(parent), name, InodeId(new_parent), new_name, flags
        )

    @handler
    async def link(
        self, inode: int, new_parent: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a hard link."""
        caller, mark = self._callers.of(ctx), self.cache.mark()
        found = await self._metadata.link(caller, InodeId(inode), InodeId(new_parent), new_name)
        return self._entry(found, new_parent, new_name, mark)

    @handler
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Never refused here: the mount has default_permissions, so the kernel has checked."""
        return True

    # ------------------------------------------------------------ files

    @handler
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a regular file; O_TRUNC comes along (FUSE_CAP_ATOMIC_O_TRUNC)."""
        read, write = self._access_mode(flags)
        with looked_up_anew():
            found, file = await self._files.open(
                self._callers.of(ctx),
                InodeId(inode),
                read=read,
                write=write,
                truncate=bool(flags & os.O_TRUNC),
                direct=bool(flags & os.O_DIRECT),
            )
        return self._handle(found, file, flags, ctx.uid)

    @handler
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Create and open in one go; without O_EXCL an existing file is opened."""
        read, write = self._access_mode(flags)
        mark = self.cache.mark()
        found, file = await self._files.create(
            self._callers.of(ctx),
            InodeId(parent),
            name,
            stat.S_IMODE(mode),
            umask=ctx.umask,
            read=read,
            write=write,
            exclusive=bool(flags & os.O_EXCL),
            truncate=bool(flags & os.O_TRUNC),
            direct=bool(flags & os.O_DIRECT),
        )
        entry = self._entry(found, parent, name, mark)
        if file.is_new:
            self._known.of(found.id).no_capability = True
        return self._handle(found, file, flags, ctx.uid), entry

    @handler
    async def read(  # type: ignore[override]  # pyfuse3 takes any buffer
        self, fh: int, offset: int, size: int
    ) -> memoryview:
        """Read; short only at the end of the file."""
        handle = self._open.get(fh)
        data = await handle.file.read(offset, size, direct=handle.direct)
        self.metrics.read_bytes += len(data)
        return data

    @handler
    async def write(self, fh: int, offset: int, data: bytes) -> int:
        """Write all of it, or raise."""
        handle = self._open.get(fh)
        handle.known.cached = None
        if handle.strip_mode is not None:
            await self._strip(handle)
        # The kernel may write back pages of a mapping through any descriptor, an appending one too.
        append = handle.append and (not handle.known.mappable or offset >= handle.known.length())
        count = await handle.file.write(offset, data, direct=handle.direct, append=append)
        if handle.sync:
            await handle.file.fsync(handle.data_sync)
        self.metrics.written_bytes += count
        return count

    @handler
    async def flush(self, fh: int) -> None:
        """One close(2) of a descriptor: what was written is stable and visible to others."""
        await self._open.get(fh).file.flush()

    @handler
    async def release(self, fh: int) -> None:
        """The last reference is gone."""
        handle = self._open.take(fh)
        if handle is not None:
            handle.known.mappable -= handle.mappable
            await handle.file.close()

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make the file's data (and attributes) stable."""
        await self._open.get(fh).file.fsync(datasync)

    # ------------------------------------------------------------ directories

    @handler
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Begin a listing; nothing is fetched yet."""
        return self._listing.add(DirectoryHandle(InodeId(inode), self._callers.of(ctx)))

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """One buffer of entries with attributes (readdirplus), continued behind a cookie."""
        handle = self._listing.get(fh)
        cookie = start_id
        if cookie == 0:
            handle.rewind()
        for number, name, inode in ((1, b".", handle.inode), (2, b"..", self._above(handle))):
            if cookie < number:
                entry = bare_entry(inode, stat.S_IFDIR)
                if not pyfuse3.readdir_reply(token, name, entry, number):
                    return
                cookie = number
        while rows := handle.rest(cookie) or await self._fetch(handle, cookie):
            if self._emit(token, handle, rows) or cookie != start_id:
                return
            cookie = rows[-1][0]  # all of them have vanished, and an empty reply means the end

    @handler
    async def releasedir(self, fh: int) -> None:
        """End of a listing."""
        self._listing.take(fh)

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make every change of names so far stable."""
        await self._metadata.stable()

    # ------------------------------------------------------------ the rest

    @handler
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        """Space after replication; below a directory with a quota, of that quota."""
        return space(await self._metadata.statfs(self._asked_inode()))

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set one; pyfuse3 has checked XATTR_CREATE and XATTR_REPLACE by a getxattr."""
        self._check_xattr_name(name)
        self._forget_xattr(inode, name)
        await self._metadata.setxattr(self._callers.of(ctx), InodeId(inode), name, value)
        self._forget_xattr(inode, name)  # an answer from before may have arrived meanwhile

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Value of one.

        The kernel asks for security.capability before every write; that it is absent is remembered
        (it would have no effect: the mount is nosuid). It asks for ACLs once for every time that it
        has asked for attributes, and those tell when there are none.
        """
        self._check_xattr_name(name)
        if name in ACLS and self._known.of(inode).no_acl:
            raise pyfuse3.FUSEError(errno.ENODATA)
        known = self._known.of(inode) if name == CAPABILITY else None
        if known is not None and known.no_capability:
            raise pyfuse3.FUSEError(errno.ENODATA)
        try:
            return await self._metadata.getxattr(self._callers.of(ctx), InodeId(inode), name)
        except EmberfsError as problem:
            if known is not None and problem.code == Code.NO_ATTRIBUTE:
                known.no_capability = True
            raise

    @handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> tuple[bytes, ...]:
        """Names of all."""
        return await self._metadata.listxattr(self._callers.of(ctx), InodeId(inode))

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove one."""
        self._check_xattr_name(name)
        await self._metadata.setxattr(self._callers.of(ctx), InodeId(inode), name, None)
        self._forget_xattr(inode, name)

    # ------------------------------------------------------------ pieces

    def _check_xattr_name(self, name: bytes) -> None:
        if name in ACLS and not self._policy.acl:  # the kernel would not enforce them
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        if len(name) > XATTR_NAME_BYTES_MAX:
            raise pyfuse3.FUSEError(errno.ERANGE)

    def _forget_xattr(self, inode: int, name: bytes) -> None:
        """What is remembered of an attribute may be wrong from now on."""
        known = self._known.of(inode)
        if name == CAPABILITY:
            known.no_capability = False
        elif name in ACLS:
            known.no_acl = False

    async def _set(self, caller: Caller, inode: int, wanted: Changes, session: SessionId) -> Inode:
        return await self._files.setattr(caller, InodeId(inode), session=session, **wanted)

    async def _inode(self, inode: int) -> Inode:
        """Attributes now. A directory that was removed while somebody stands in it has no names."""
        if (virtual := self.virtual.inode(inode)) is not None:
            return virtual
        try:
            return self._files.merged(await self._metadata.getattr(InodeId(inode)))
        except EmberfsError as problem:
            directory = self._known.of(inode).directory
            if problem.code == Code.NOT_FOUND and directory is not None:
                return msgspec.structs.replace(directory, nlink=0)
            with looked_up_anew():
                raise

    def _attributes(
        self, inode: Inode, mark: int, stored_bytes: int | None = None
    ) -> EntryAttributes:
        self._known.tell(inode)
        timeout_s = self.cache.attribute_timeout_s(inode.id, mark)
        return attributes(inode, timeout_s, 0, stored_bytes)

    def _entry(self, found: Inode, parent: int, name: bytes, mark: int) -> EntryAttributes:
        """Attributes for an answer that counts as a lookup."""
        inode = self._files.merged(found)
        self._known.tell(inode).lookups += 1
        cache = self.cache
        name_s = cache.name_timeout_s(parent, name, mark)
        return attributes(inode, cache.attribute_timeout_s(inode.id, mark), name_s)

    def _missing(self, parent: int, name: bytes, mark: int) -> EntryAttributes:
        """The answer that there is no such name; without announcements it is not cached."""
        timeout_s = self.cache.name_timeout_s(parent, name, mark)
        if timeout_s <= self._policy.entry_timeout_s:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return missing_entry(timeout_s)

    def _access_mode(self, flags: int) -> tuple[bool, bool]:
        mode = flags & os.O_ACCMODE
        # To gather writes, the kernel reads pages through whatever descriptor is at hand.
        read = mode != os.O_WRONLY or self._policy.writeback
        return read, mode != os.O_RDONLY

    def _handle(self, found: Inode, file: OpenFile, flags: int, uid: int) -> FileInfo:
        """Register an open file and tell the kernel what it may cache of it."""
        known = self._known.of(found.id)
        handle = FileHandle(file, known)
        handle.sync = bool(flags & os.O_DSYNC)  # O_SYNC contains it
        handle.data_sync = flags & os.O_SYNC != os.O_SYNC
        handle.direct = bool(flags & os.O_DIRECT) or handle.sync
        # With the writeback cache the kernel itself knows where the end is.
        handle.append = bool(flags & os.O_APPEND) and not self._policy.writeback
        if file.writable and uid != 0 and _privilege(found.mode):
            handle.strip_mode = stat.S_IMODE(found.mode) & ~_privilege(found.mode)
        current = version(found)
        keep = known.cached == current and not flags & os.O_TRUNC
        known.cached = current
        if known.sent != current:
            # The kernel's idea of the length may be a second old: too old for close-to-open.
            known.sent = current
            drop_attributes(found.id)
        # An append lands where the file ends then, which the page cache cannot foresee.
        bypass = bool(flags & os.O_DIRECT) or handle.append
        handle.mappable = file.readable and file.writable and not bypass
        known.mappable += handle.mappable
        return FileInfo(fh=self._open.add(handle), direct_io=bypass, keep_cache=keep)

    async def _strip(self, handle: FileHandle) -> None:
        """A write by another than root takes suid and sgid away (FUSE_CAP_HANDLE_KILLPRIV)."""
        mode, handle.strip_mode = handle.strip_mode, None
        assert mode is not None
        await self._files.setattr(ROOT, handle.file.inode_id, mode=mode)

    def _above(self, handle: DirectoryHandle) -> int:
        directory = self._known.of(handle.inode).directory
        return directory.parent if directory is not None else pyfuse3.ROOT_INODE

    def _emit(
        self,
        token: pyfuse3.ReaddirToken,
        handle: DirectoryHandle,
        rows: list[tuple[int, ReaddirRow]],
    ) -> bool:
        """Put rows into the reply until it is full; False if there was nothing to put."""
        cache, mark = self.cache, handle.mark
        some = False
        for number, row in rows:
            if row.inode is None:  # it vanished between the scan and its attributes
                continue
            found = self._files.merged(row.inode)
            name_s = cache.name_timeout_s(handle.inode, row.name, mark, listed=True)
            entry = attributes(found, cache.attribute_timeout_s(found.id, mark), name_s)
            some = True
            if not pyfuse3.readdir_reply(token, row.name, entry, number):
                break
            self._known.tell(found).lookups += 1
        return some

    async def _fetch(self, handle: DirectoryHandle, cookie: int) -> list[tuple[int, ReaddirRow]]:
        """Fetch the page behind a cookie. A directory that was removed meanwhile is empty."""
        if handle.ended(cookie):
            return []
        if (virtual := self.virtual.rows(handle.inode)) is not None:
            return handle.take_page(cookie, b"", virtual, more=False)
        after, skip = handle.position(cookie)
        handle.mark = self.cache.mark()
        try:
            answer = await self._metadata.readdir(
                handle.caller, handle.inode, after, PAGE_ROWS + skip
            )
        except EmberfsError as problem:
            if problem.code != Code.NOT_FOUND:
                raise
            return handle.take_page(cookie, after, (), more=False)
        if skip:
            after = answer.rows[min(skip, len(answer.rows)) - 1].name if answer.rows else after
        return handle.take_page(cookie, after, answer.rows[skip:], answer.more)


def _privilege(mode: int) -> int:
    """Bits that a write must take away; sgid without group execute means something else."""
    bits = mode & stat.S_ISUID
    return bits | stat.S_ISGID if mode & _SET_GROUP == _SET_GROUP else bits


_SET_GROUP = stat.S_ISGID | stat.S_IXGRP
