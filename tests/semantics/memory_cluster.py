"""Metadata and OpenFiles in memory, with the methods that FUSE uses: one client, nothing remote."""

import asyncio
import stat

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import LINK_COUNT_MAX, NAME_BYTES_MAX, Inode
from emberfs.proto.ids import ROOT_INODE, InodeId, SessionId
from emberfs.proto.meta_calls import Caller, ReaddirAnswer, ReaddirRow, StatfsAnswer


class Node:
    """An inode and what hangs on it."""

    def __init__(self, number, mode, uid, gid, now_ns):
        self.number = number
        self.mode, self.uid, self.gid = mode, uid, gid
        self.nlink = 2 if stat.S_ISDIR(mode) else 1
        self.times = [now_ns, now_ns, now_ns]
        self.data = bytearray()
        self.names: dict[bytes, Node] = {}
        self.xattrs: dict[bytes, bytes] = {}
        self.symlink = b""
        self.rdev = 0
        self.parent = 0
        self.opened = 0

    def inode(self) -> Inode:
        length = len(self.symlink) if self.symlink else len(self.data)
        atime, mtime, ctime = self.times
        return Inode(
            id=InodeId(self.number), mode=self.mode, uid=self.uid, gid=self.gid, nlink=self.nlink,
            length=length, atime_ns=atime, mtime_ns=mtime, ctime_ns=ctime, rdev=self.rdev,
            symlink=self.symlink, parent=InodeId(self.parent),
        )  # fmt: skip


class MemoryMetadata:
    """As client.metadata.Metadata."""

    def __init__(self, env):
        self.env = env
        root = Node(ROOT_INODE, stat.S_IFDIR | 0o755, 0, 0, env.wall_ns())
        root.parent = ROOT_INODE
        self.nodes = {ROOT_INODE: root}
        self.last = 1
        self.calls: list[str] = []
        self.stalls = 0  # calls that never return
        self.hole: bytes | None = None  # names that begin so are never found nor refused
        self.faults: dict[str, BaseException] = {}

    async def enter(self, name):
        self.calls.append(name)
        if self.stalls:
            self.stalls -= 1
            await asyncio.Event().wait()
        if name in self.faults:
            raise self.faults[name]

    def node(self, number):
        try:
            return self.nodes[number]
        except KeyError:
            raise EmberfsError(Code.NOT_FOUND) from None

    def child(self, parent, name):
        if len(name) > NAME_BYTES_MAX:
            raise EmberfsError(Code.NAME_TOO_LONG)
        directory = self.node(parent)
        if not stat.S_ISDIR(directory.mode):
            raise EmberfsError(Code.NOT_DIRECTORY)
        if name == b".":
            return directory
        if name == b"..":
            return self.node(directory.parent)
        return directory.names.get(name)

    def make(self, caller, parent, name, mode):
        if self.child(parent, name) is not None:
            raise EmberfsError(Code.EXISTS)
        directory = self.node(parent)
        if not directory.nlink:
            raise EmberfsError(Code.NOT_FOUND)
        self.last += 1
        gid = directory.gid if directory.mode & stat.S_ISGID else caller.gid
        if stat.S_ISDIR(mode):
            mode |= directory.mode & stat.S_ISGID
            directory.nlink += 1
        node = Node(self.last, mode, caller.uid, gid, self.env.wall_ns())
        node.parent = parent if stat.S_ISDIR(mode) else 0
        self.nodes[node.number] = directory.names[name] = node
        self.changed(directory)
        return node

    def changed(self, node, data=True):
        now_ns = self.env.wall_ns()
        node.times[2] = now_ns
        if data:
            node.times[1] = now_ns

    def drop(self, node):
        if not node.nlink and not node.opened:
            self.nodes.pop(node.number, None)

    async def lookup(self, caller, parent, name):
        await self.enter("lookup")
        if self.hole and name.startswith(self.hole):
            await asyncio.Event().wait()
        node = self.child(parent, name)
        if node is None:
            raise EmberfsError(Code.NOT_FOUND)
        return node.inode()

    async def getattr(self, inode):
        await self.enter("getattr")
        return self.node(inode).inode()

    async def mknod(self, caller, parent, name, mode, rdev=0, *, umask=0):
        await self.enter("mknod")
        node = self.make(caller, parent, name, mode & ~umask)
        node.rdev = rdev
        return node.inode()

    async def symlink(self, caller, parent, name, target):
        await self.enter("symlink")
        node = self.make(caller, parent, name, stat.S_IFLNK | 0o777)
        node.symlink = bytes(target)
        return node.inode()

    async def link(self, caller, inode, parent, name):
        await self.enter("link")
        node = self.node(inode)
        if self.child(parent, name) is not None:
            raise EmberfsError(Code.EXISTS)
        if node.nlink >= LINK_COUNT_MAX:
            raise EmberfsError(Code.TOO_MANY_LINKS)
        self.node(parent).names[name] = node
        node.nlink += 1
        self.changed(node, data=False)
        self.changed(self.node(parent))
        return node.inode()

    async def remove(self, caller, parent, name, *, directory):
        await self.enter("remove")
        node = self.child(parent, name)
        if node is None:
            raise EmberfsError(Code.NOT_FOUND)
        self._check_sticky(caller, self.node(parent), node)
        if directory and not stat.S_ISDIR(node.mode):
            raise EmberfsError(Code.NOT_DIRECTORY)
        if not directory and stat.S_ISDIR(node.mode):
            raise EmberfsError(Code.IS_DIRECTORY)
        self._unlink(self.node(parent), name, node)

    def _check_sticky(self, caller, directory, node):
        if directory.mode & stat.S_ISVTX and caller.uid not in (0, node.uid, directory.uid):
            raise EmberfsError(Code.NOT_PERMITTED)

    def _unlink(self, parent, name, node):
        if stat.S_ISDIR(node.mode):
            if node.names:
                raise EmberfsError(Code.NOT_EMPTY)
            parent.nlink -= 1
            node.nlink = 0
        else:
            node.nlink -= 1
        del parent.names[name]
        self.changed(parent)
        self.changed(node, data=False)
        self.drop(node)

    async def rename(self, caller, parent, name, new_parent, new_name, flags=0):
        await self.enter("rename")
        node, other = self.child(parent, name), self.child(new_parent, new_name)
        if node is None or (flags & 2 and other is None):
            raise EmberfsError(Code.NOT_FOUND)
        if flags & 1 and other is not None:
            raise EmberfsError(Code.EXISTS)
        if node is other:
            return
        source, target = self.node(parent), self.node(new_parent)
        above = target
        while above.number != ROOT_INODE:
            if above is node:
                raise EmberfsError(Code.INVALID)
            above = self.node(above.parent)
        if flags & 2:
            source.names[name], target.names[new_name] = other, node
            self._move(other, target, source)
        elif other is not None:
            if stat.S_ISDIR(node.mode) and not stat.S_ISDIR(other.mode):
                raise EmberfsError(Code.NOT_DIRECTORY)
            if stat.S_ISDIR(other.mode) and not stat.S_ISDIR(node.mode):
                raise EmberfsError(Code.IS_DIRECTORY)
            self._unlink(target, new_name, other)
        if not flags & 2:
            del source.names[name]
            target.names[new_name] = node
        self._move(node, source, target)
        self.changed(source)
        self.changed(target)

    def _move(self, node, source, target):
        if stat.S_ISDIR(node.mode):
            node.parent = target.number
            source.nlink -= 1
            target.nlink += 1
        self.changed(node, data=False)

    async def setattr(self, caller, inode, *, mode=None, uid=None, gid=None, length=None,
                      atime_ns=None, mtime_ns=None, session=SessionId(0)):  # fmt: skip  # noqa: B008
        await self.enter("setattr")
        node = self.node(inode)
        if uid is not None or gid is not None:
            node.uid = node.uid if uid is None else uid
            node.gid = node.gid if gid is None else gid
            if caller.uid and not stat.S_ISDIR(node.mode):
                node.mode &= ~(stat.S_ISUID | stat.S_ISGID)
        if mode is not None:
            node.mode = stat.S_IFMT(node.mode) | mode
        if length is not None:
            old = len(node.data)
            if length < old:
                del node.data[length:]
            else:
                node.data.extend(bytes(length - old))
        self.changed(node, data=length is not None)
        if atime_ns is not None:
            node.times[0] = atime_ns
        if mtime_ns is not None:
            node.times[1] = mtime_ns
        return node.inode()

    async def readdir(self, caller, inode, after, limit, *, plus=True):
        await self.enter("readdir")
        names = self.node(inode).names
        found = sorted(name for name in names if name > after)
        rows = tuple(
            ReaddirRow(
                name,
                InodeId(names[name].number),
                stat.S_IFMT(names[name].mode),
                names[name].inode(),
            )
            for name in found[:limit]
        )
        return ReaddirAnswer(rows=rows, more=len(found) > limit)

    async def getxattr(self, caller, inode, name):
        await self.enter("getxattr")
        try:
            return self.node(inode).xattrs[name]
        except KeyError:
            raise EmberfsError(Code.NO_ATTRIBUTE) from None

    async def listxattr(self, caller, inode):
        await self.enter("listxattr")
        return tuple(sorted(self.node(inode).xattrs))

    async def setxattr(self, caller, inode, name, value, flags=0):
        await self.enter("setxattr")
        xattrs = self.node(inode).xattrs
        if value is None:
            if name not in xattrs:
                raise EmberfsError(Code.NO_ATTRIBUTE)
            del xattrs[name]
        else:
            xattrs[name] = bytes(value)
        self.changed(self.node(inode), data=False)

    async def statfs(self, inode=0):
        await self.enter("statfs")
        return StatfsAnswer(total_bytes=1 << 40, free_bytes=1 << 39, inodes=len(self.nodes))

    async def stable(self):
        await self.enter("stable")


class MemoryFile:
    """As client.openfile.OpenFile."""

    def __init__(self, files, node, read, write, direct):
        self.files, self.node = files, node
        self.inode_id = InodeId(node.number)
        self.session = SessionId(1)
        self.readable, self.writable, self.direct = read, write, direct
        node.opened += 1

    async def read(self, offset, length, *, direct=False):
        await self.files.metadata.enter("read")
        return memoryview(bytes(memoryview(self.node.data)[offset : offset + length]))

    async def write(self, offset, data, *, direct=False, append=False):
        await self.files.metadata.enter("write")
        content = self.node.data
        self.files.writes.append((direct, append))
        offset = len(content) if append else offset
        if offset > len(content):
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data
        self.files.metadata.changed(self.node)
        return len(data)

    async def flush(self):
        await self.files.metadata.enter("flush")

    async def fsync(self, data_only=False):
        await self.files.metadata.enter("fdatasync" if data_only else "fsync")

    async def close(self):
        self.files.metadata.calls.append("close")
        self.node.opened -= 1
        self.files.metadata.drop(self.node)


class MemoryFiles:
    """As client.openfile.OpenFiles."""

    def __init__(self, metadata):
        self.metadata = metadata
        self.writes: list[tuple[bool, bool]] = []

    async def open(self, caller: Caller, inode, *, read=True, write=False, truncate=False,
                   direct=False):  # fmt: skip
        await self.metadata.enter("open")
        node = self.metadata.node(inode)
        if truncate:
            node.data.clear()
            self.metadata.changed(node)
        return node.inode(), MemoryFile(self, node, read, write, direct)

    async def create(self, caller, parent, name, mode, *, read=True, write=True, exclusive=False,
                     truncate=False, direct=False, umask=0):  # fmt: skip
        await self.metadata.enter("create")
        node = self.metadata.child(parent, name)
        is_new = node is None
        if node is not None and exclusive:
            raise EmberfsError(Code.EXISTS)
        if node is None:
            node = self.metadata.make(caller, parent, name, stat.S_IFREG | mode & ~umask)
        elif truncate:
            node.data.clear()
        file = MemoryFile(self, node, read, write, direct)
        file.is_new = is_new
        return node.inode(), file

    async def setattr(self, caller, inode, **changes):
        return await self.metadata.setattr(caller, inode, **changes)

    def merged(self, inode):
        return inode

    async def flush_all(self):
        self.metadata.calls.append("flush_all")

    async def close(self):
        return
