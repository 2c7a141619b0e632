"""The real meta and the real library in one process, with deaths of the server wherever wanted.

A call may find the server dead before it (nothing was done), be performed and lose its answer, or
arrive twice. Whoever called tries again with the same request id, as client.metadata does.
"""

import stat
from collections import deque
from typing import Any

from msgspec.structs import replace

from emberfs.client.file import FileSystem
from emberfs.client.metadata import Metadata
from emberfs.client.openfile import OpenFiles
from emberfs.client.quotaroom import QuotaRooms
from emberfs.kv import keys
from emberfs.meta import dispatch, schema
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import IMMUTABLE, Inode
from emberfs.proto.ids import ROOT_INODE, ClientId
from emberfs.proto.meta_calls import CREATE, OPEN, Caller
from unit.meta_world import World, make_snapshot
from unit.posix_model import Tree

CLIENTS = (71, 72)
FATES = ("die before", "die after", "repeat")
KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
}
FLAGS = "trusted.emberfs.flags"


class _Call:
    """A call as a handler sees it."""

    peer = "test"

    def __init__(self, body: bytes) -> None:
        self.body = memoryview(body)


class Server:
    """One meta server that dies and comes back on the same store."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.fates: deque[str] = deque()
        self.deaths = 0
        self._handlers = dispatch.handlers(world.context)

    async def _die(self) -> None:
        self.deaths += 1
        await self.world.close()
        self.world.boot()
        await self.world.context.load()
        self._handlers = dispatch.handlers(self.world.context)

    async def call(self, method: int, body: bytes) -> bytes:
        while True:
            fate = self.fates.popleft() if self.fates else ""
            if fate == "die before":
                await self._die()
            answer = await self._perform(method, body)
            if fate == "repeat":
                again = await self._perform(method, body)
                assert _same(method, again, answer), f"a copy: {again!r} instead of {answer!r}"
            if fate == "die after":
                await self._die()
                continue
            if isinstance(answer, EmberfsError):
                raise answer
            return answer

    async def _perform(self, method: int, body: bytes) -> bytes | EmberfsError:
        try:
            return await self._handlers[method](_Call(body))  # type: ignore[arg-type]
        except EmberfsError as problem:
            return problem


def _same(method: int, one: bytes | EmberfsError, two: bytes | EmberfsError) -> bool:
    if isinstance(one, EmberfsError) or isinstance(two, EmberfsError):
        return (
            isinstance(one, EmberfsError) and isinstance(two, EmberfsError) and one.code == two.code
        )
    if method in (OPEN.number, CREATE.number):  # a copy is answered without content: see meta.files
        codec = OPEN if method == OPEN.number else CREATE
        answers = (codec.decode_answer(one), codec.decode_answer(two))
        first, second = (replace(answer, content=None) for answer in answers)
        return bool(first == second)
    return one == two


class LocalMetadata(Metadata):
    """The client's calls, without a network: the server is tried until it answers."""

    def __init__(self, server: Server, client_id: int) -> None:
        self.deadline_ns = 0
        self._env = server.world.env
        self._client_id = ClientId(client_id)
        self._sequence = 0
        self._since = lambda: 0
        self.rooms = QuotaRooms()
        self._server = server

    async def _call(self, method: Any, request: Any) -> Any:
        return method.decode_answer(
            await self._server.call(method.number, method.encode_request(request))
        )


class NoChunks:
    """Storage that does not answer."""

    async def stored_bytes(self, inode: int, layout: Any) -> int | None:
        return None


class ModelWorld:
    """The store, the server and the two clients."""

    def __init__(self) -> None:
        self.now = 1
        self.world = World()
        self.world.env.wall_ns = lambda: self.now  # type: ignore[method-assign]
        self.world.routing = make_snapshot(clients=dict.fromkeys(CLIENTS, True))

    async def open(self) -> None:
        await self.world.open()
        self.server = Server(self.world)
        self.files = [
            OpenFiles(self.world.env, NoChunks(), LocalMetadata(self.server, client))  # type: ignore[arg-type]
            for client in CLIENTS
        ]

    def keep_small_files(self, inline_bytes_max: int) -> None:
        """Files up to that have no chunks; in later lives of the server as well."""
        self.world.inline_bytes_max = inline_bytes_max
        context = self.world.context
        context.policy = replace(context.policy, inline_bytes_max=inline_bytes_max)

    async def close(self) -> None:
        self.server.fates.clear()
        for files in self.files:
            await files.close()
        await self.world.close()
        self.world.check()

    def library(self, client: int, who: Caller, umask: int) -> FileSystem:
        """The path API of one user at one client."""
        files = self.files[client]
        cluster = type("Cluster", (), {"metadata": files.metadata, "files": files})
        return FileSystem(cluster, who, umask)  # type: ignore[arg-type]

    # ------------------------------------------------------------ the whole tree

    def inode(self, number: int) -> Inode | None:
        value = self.world.store.get(keys.inode_key(number))  # type: ignore[arg-type]
        return None if value is None else schema.INODE.decode(value)

    def tree(self) -> dict[str, tuple[Any, ...]]:
        """Everything by path, from the raw records; `show_model` shows the model's the same."""
        found: dict[str, tuple[Any, ...]] = {}
        first: dict[int, str] = {}
        self._walk(ROOT_INODE, "", found, first)
        return found

    def _walk(
        self, number: int, path: str, found: dict[str, tuple[Any, ...]], first: dict[int, str]
    ) -> None:
        inode = self.inode(number)
        assert inode is not None, f"{path} leads to nothing"
        found[path] = (first.setdefault(number, path), *self.attributes(inode))
        if not inode.is_directory():
            return
        rows = self.world.store.scan(*keys.entry_span(inode.id))
        for key, value in sorted(rows):
            entry = schema.ENTRY.decode(value)
            self._walk(entry.inode, f"{path}/{keys.entry_name(key).decode()}", found, first)

    def attributes(self, inode: Inode) -> tuple[Any, ...]:
        xattrs = self.world.store.scan(*keys.xattr_span(inode.id))
        return (
            KINDS[stat.S_IFMT(inode.mode)],
            oct(stat.S_IMODE(inode.mode)),
            (inode.uid, inode.gid),
            inode.nlink,
            inode.length,
            (inode.atime_ns, inode.mtime_ns, inode.ctime_ns),
            inode.symlink.decode(),
            bool(inode.flags & IMMUTABLE),
            {keys.xattr_name(key).decode(): value for key, value in xattrs},
        )


def model_attributes(tree: Tree, node: Any, links: int) -> tuple[Any, ...]:
    return (
        node.kind,
        oct(node.mode),
        (node.uid, node.gid),
        links,
        node.length,
        (node.atime, node.mtime, node.ctime),
        node.target,
        node.immutable,
        dict(node.xattrs),
    )


def show_model(tree: Tree) -> dict[str, tuple[Any, ...]]:
    """The model as ModelWorld.tree shows the real one."""
    found: dict[str, tuple[Any, ...]] = {}
    first: dict[int, str] = {}
    for path, node in [("", tree.root), *tree.walk()]:
        same = first.setdefault(id(node), path)
        found[path] = (same, *model_attributes(tree, node, tree.links(node)))
    return found
