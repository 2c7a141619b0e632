"""A POSIX tree in memory, as small as it can be: what the metadata service must agree with.

Written from path_resolution(7), inode(7) and the pages of the calls. No transactions, no sessions,
nothing shared with the code under test. Time is a number that the caller sets. A call that is
refused leaves the tree as it was: rules are looked at before anything changes.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

READ, WRITE, EXECUTE = 4, 2, 1
SUID, SGID, STICKY = 0o4000, 0o2000, 0o1000
LINKS_FOLLOWED_MAX = 40
NOREPLACE, EXCHANGE = 1, 2


class User(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def is_in(self, gid: int) -> bool:
        return gid in (self.gid, *self.groups)


class Refused(Exception):  # noqa: N818
    """A call fails with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.errno = number


@dataclass(eq=False)
class Node:
    kind: str  # file, directory, link, fifo
    mode: int
    uid: int
    gid: int
    now: int
    target: str = ""
    length: int = 0
    immutable: bool = False
    above: "Node | None" = None  # directories only
    names: dict[str, "Node"] = field(default_factory=dict)
    xattrs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.atime = self.mtime = self.ctime = self.now

    def changed(self, now: int, *, content: bool) -> None:
        self.ctime = now
        if content:
            self.mtime = now


class Place(NamedTuple):
    """A name in a directory, whether it exists or not."""

    directory: Node
    name: str

    @property
    def node(self) -> Node | None:
        return self.directory.names.get(self.name)


class Tree:
    def __init__(self, now: int) -> None:
        self.root = Node("directory", 0o755, 0, 0, now)
        self.root.above = self.root
        self.now = now

    # ------------------------------------------------------------ looking

    def links(self, node: Node) -> int:
        """Of a directory 2 and one for each directory in it, else the number of its names."""
        if node.kind == "directory":
            return 2 + sum(n.kind == "directory" for n in node.names.values())
        return sum(found is node for _, found in self.walk())

    def walk(self, node: Node | None = None, path: str = "") -> Iterator[tuple[str, Node]]:
        """Every name below, with its path."""
        for name, found in sorted((node or self.root).names.items()):
            yield f"{path}/{name}", found
            if found.kind == "directory":
                yield from self.walk(found, f"{path}/{name}")

    def find(self, user: User, path: str, *, follow: bool = True) -> Node:
        at, names, links = self.root, [n for n in path.split("/") if n][::-1], 0
        while names:
            self._need_directory(at, user, EXECUTE)
            found = at.names.get(names.pop())
            if found is None:
                raise Refused(errno.ENOENT)
            if found.kind != "link" or (not names and not follow):
                at = found
                continue
            links += 1
            if links > LINKS_FOLLOWED_MAX:
                raise Refused(errno.ELOOP)
            names += [n for n in found.target.split("/") if n][::-1]
            at = self.root if found.target.startswith("/") else at
        return at

    def place(self, user: User, path: str) -> Place:
        above, _, name = path.rpartition("/")
        directory = self.find(user, above)
        if directory.kind != "directory":
            raise Refused(errno.ENOTDIR)
        return Place(directory, name)

    # ------------------------------------------------------------ rights

    def granted(self, node: Node, user: User) -> int:
        if user.uid == 0:
            dead = node.kind != "directory" and not node.mode & 0o111
            return READ | WRITE | (0 if dead else EXECUTE)
        if user.uid == node.uid:
            return node.mode >> 6 & 7
        return node.mode >> 3 & 7 if user.is_in(node.gid) else node.mode & 7

    def _need(self, node: Node, user: User, want: int) -> None:
        if want & WRITE and node.immutable:
            raise Refused(errno.EPERM)
        if want & ~self.granted(node, user):
            raise Refused(errno.EACCES)

    def _need_directory(self, node: Node, user: User, want: int) -> None:
        if node.kind != "directory":
            raise Refused(errno.ENOTDIR)
        self._need(node, user, want)

    def _need_mutable(self, node: Node) -> None:
        if node.immutable:
            raise Refused(errno.EPERM)

    def _need_owner(self, node: Node, user: User) -> None:
        if user.uid not in (0, node.uid):
            raise Refused(errno.EPERM)

    def _need_removable(self, place: Place, node: Node, user: User) -> None:
        self._need_directory(place.directory, user, WRITE | EXECUTE)
        sticky = place.directory.mode & STICKY
        if sticky and user.uid not in (0, node.uid, place.directory.uid):
            raise Refused(errno.EPERM)
        self._need_mutable(node)

    # ------------------------------------------------------------ making

    def make(
        self, user: User, path: str, kind: str, mode: int, umask: int = 0, target: str = ""
    ) -> Node:
        place = self.place(user, path)
        return self._make(user, place, kind, mode, umask, target)

    def _make(
        self, user: User, place: Place, kind: str, mode: int, umask: int, target: str = ""
    ) -> Node:
        directory = place.directory
        self._need_directory(directory, user, EXECUTE)
        if place.node is not None:
            raise Refused(errno.EEXIST)
        self._need(directory, user, WRITE)
        gid = user.gid
        if directory.mode & SGID:
            gid = directory.gid
            if kind == "directory":
                mode |= SGID
            elif mode & SGID and mode & 0o010 and user.uid and not user.is_in(gid):
                mode &= ~SGID
        node = Node(kind, 0o777 if kind == "link" else mode & ~umask, user.uid, gid, self.now)
        node.target, node.length = target, len(target)
        node.above = directory if kind == "directory" else None
        directory.names[place.name] = node
        directory.changed(self.now, content=True)
        return node

    def link(self, user: User, old: str, new: str) -> None:
        node = self.find(user, old, follow=False)
        place = self.place(user, new)
        self._need_directory(place.directory, user, EXECUTE)
        if place.node is not None:
            raise Refused(errno.EEXIST)
        self._need(place.directory, user, WRITE)
        if node.kind == "directory":
            raise Refused(errno.EPERM)
        self._need_mutable(node)
        place.directory.names[place.name] = node
        place.directory.changed(self.now, content=True)
        node.changed(self.now, content=False)

    # ------------------------------------------------------------ removing and moving

    def remove(self, user: User, path: str, *, directory: bool) -> None:
        place = self.place(user, path)
        self._need_directory(place.directory, user, EXECUTE)
        node = place.node
        if node is None:
            raise Refused(errno.ENOENT)
        self._need_removable(place, node, user)
        if directory and node.kind != "directory":
            raise Refused(errno.ENOTDIR)
        if not directory and node.kind == "directory":
            raise Refused(errno.EISDIR)
        if node.names:
            raise Refused(errno.ENOTEMPTY)
        del place.directory.names[place.name]
        place.directory.changed(self.now, content=True)
        node.changed(self.now, content=False)

    def rename(self, user: User, old: str, new: str, flags: int) -> None:
        source, target = self.place(user, old), self.place(user, new)
        self._need_directory(source.directory, user, EXECUTE)
        self._need_directory(target.directory, user, EXECUTE)
        moving, there = source.node, target.node
        if moving is None or (flags == EXCHANGE and there is None):
            raise Refused(errno.ENOENT)
        if flags == NOREPLACE and there is not None:
            raise Refused(errno.EEXIST)
        if moving is there:
            return
        self._check_move(user, source, target, moving, flags)
        if flags == EXCHANGE and there is not None:
            self._check_move(user, target, source, there, flags)
            self._check_loop(moving, target.directory)
            self._check_loop(there, source.directory)
            self._put(source, there)
        else:
            self._check_loop(moving, target.directory)
            if there is not None:
                self._check_overwrite(user, target, moving, there)
                there.changed(self.now, content=False)
            del source.directory.names[source.name]
        self._put(target, moving)
        for place in (source, target):
            place.directory.changed(self.now, content=True)

    def _check_move(self, user: User, place: Place, to: Place, node: Node, flags: int) -> None:
        self._need_removable(place, node, user)
        self._need(to.directory, user, WRITE)
        there = to.node
        if there is not None and flags != EXCHANGE:
            self._need_removable(to, there, user)
        if node.kind == "directory" and place.directory is not to.directory:
            self._need(node, user, WRITE)

    def _check_loop(self, node: Node, below: Node) -> None:
        while below is not self.root:
            if below is node:
                raise Refused(errno.EINVAL)
            assert below.above is not None
            below = below.above

    def _check_overwrite(self, user: User, place: Place, node: Node, there: Node) -> None:
        if node.kind == "directory" and there.kind != "directory":
            raise Refused(errno.ENOTDIR)
        if node.kind != "directory" and there.kind == "directory":
            raise Refused(errno.EISDIR)
        if there.names:
            raise Refused(errno.ENOTEMPTY)

    def _put(self, place: Place, node: Node) -> None:
        place.directory.names[place.name] = node
        if node.kind == "directory":
            node.above = place.directory
        node.changed(self.now, content=False)

    # ------------------------------------------------------------ attributes

    def chmod(self, user: User, path: str, mode: int) -> None:
        node = self.find(user, path)
        self._need_mutable(node)
        self._need_owner(node, user)
        if user.uid and not user.is_in(node.gid):
            mode &= ~SGID
        node.mode = mode
        node.changed(self.now, content=False)

    def chown(self, user: User, path: str, uid: int, gid: int) -> None:
        node = self.find(user, path, follow=False)
        self._need_mutable(node)
        if user.uid:
            self._need_owner(node, user)
            if uid not in (-1, node.uid) or (gid not in (-1, node.gid) and not user.is_in(gid)):
                raise Refused(errno.EPERM)
        if node.kind != "directory":
            self._drop_privilege(node)
        node.uid = node.uid if uid == -1 else uid
        node.gid = node.gid if gid == -1 else gid
        node.changed(self.now, content=False)

    def _drop_privilege(self, node: Node) -> None:
        node.mode &= ~SUID
        if node.mode & 0o010:
            node.mode &= ~SGID

    def utime(self, user: User, path: str, times: tuple[int, int] | None) -> None:
        node = self.find(user, path)
        self._need_mutable(node)
        if times is not None:
            self._need_owner(node, user)
        elif user.uid != node.uid:
            self._need(node, user, WRITE)
        node.atime, node.mtime = times or (self.now, self.now)
        node.changed(self.now, content=False)

    def truncate(self, user: User, path: str, length: int) -> None:
        node = self.find(user, path)
        if node.kind != "file":
            raise Refused(errno.EISDIR if node.kind == "directory" else errno.EINVAL)
        self._need(node, user, WRITE)
        self.set_length(user, node, length)

    def set_length(self, user: User, node: Node, length: int) -> None:
        """Also ftruncate and O_TRUNC: a right that was looked at before."""
        if user.uid:
            self._drop_privilege(node)
        node.length = length
        node.changed(self.now, content=True)

    def open(self, user: User, path: str, mode: str, umask: int) -> Node:
        """As the library's modes: r, w, a, x, each with +."""
        kind, both = mode[0], "+" in mode
        if kind != "r":
            place = self.place(user, path)
            self._need_directory(place.directory, user, EXECUTE)
            if place.node is None:
                return self._make(user, place, "file", 0o666, umask)
            if kind == "x":
                raise Refused(errno.EEXIST)
        node = self.find(user, path)
        if node.kind != "file":
            raise Refused(errno.EISDIR if node.kind == "directory" else errno.EOPNOTSUPP)
        reads, writes = kind == "r" or both, kind != "r" or both
        self._need(node, user, (READ if reads else 0) | (WRITE if writes else 0))
        if kind == "w":
            self.set_length(user, node, 0)
        return node

    # ------------------------------------------------------------ extended attributes

    def set_xattr(self, user: User, path: str, name: str, value: bytes | None) -> None:
        node = self.find(user, path)
        if name == "immutable":
            if user.uid:
                raise Refused(errno.EPERM)
            if value is None and not node.immutable:
                raise Refused(errno.ENODATA)
            if node.kind == "fifo":
                raise Refused(errno.EOPNOTSUPP)
            node.immutable = value is not None
        else:
            self._need_mutable(node)
            if node.kind == "fifo":
                raise Refused(errno.EPERM)
            if node.kind == "directory" and node.mode & STICKY:
                self._need_owner(node, user)
            self._need(node, user, WRITE)
            if value is None and name not in node.xattrs:
                raise Refused(errno.ENODATA)
            node.xattrs.pop(name, None)
            if value is not None:
                node.xattrs[name] = value
        node.changed(self.now, content=False)

    def get_xattr(self, user: User, path: str, name: str) -> bytes:
        node = self.find(user, path)
        self._need(node, user, READ)
        if name not in node.xattrs:
            raise Refused(errno.ENODATA)
        return node.xattrs[name]

    def list(self, user: User, path: str) -> list[str]:
        node = self.find(user, path)
        self._need_directory(node, user, READ)
        return sorted(node.names)
