"""The real metadata handlers on a store in memory, with fake chunks."""

import asyncio
import stat
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from emberfs.client.unflushed import ChainVersions
from emberfs.kv import keys
from emberfs.kv.memory import MemoryStore
from emberfs.kv.store import OrderedStore
from emberfs.kv.transaction import Engine
from emberfs.meta import files, namespace, rename, resolve, schema, xattr
from emberfs.meta.context import Context, Policy
from emberfs.meta.format import open_file_system
from emberfs.proto import meta_calls as calls
from emberfs.proto.cluster import (
    Chain,
    ChainTarget,
    LocalState,
    Node,
    NodeKind,
    PublicState,
    RoutingSnapshot,
    TargetReport,
    TargetStatus,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode, Layout
from emberfs.proto.ids import ROOT_INODE, TRASH_INODE, ChainId, ChainVersion, InodeId, KiB
from emberfs.runtime.real import RealEnv

ROOT = calls.Caller(0, 0)
ALICE = calls.Caller(1000, 1000, (1000, 50))
BOB = calls.Caller(2000, 2000)
CLIENT = 77
CHUNK = 64 * KiB
ABSENT = -1


class TestEnv(RealEnv):
    """The real one, whose clock can be moved on."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self.skipped_ns = 0

    def now_ns(self) -> int:
        return super().now_ns() + self.skipped_ns


class FakeChunks:
    """Remembers the chunks of files as (inode, index) -> length, and what was asked."""

    def __init__(self) -> None:
        self.chunks: dict[tuple[int, int], int] = {}
        self.unflushed: dict[tuple[int, int], int] = {}  # what changes have replaced
        self.version = ChainVersion(1)  # of every chain
        self.lost: dict[ChainId, ChainVersion] = {}
        self.loses_next = False  # the power of all storage fails just before the next flush
        self.log: list[tuple[Any, ...]] = []
        self.error: EmberfsError | None = None
        self.gate: asyncio.Event | None = None

    def put(self, inode: int, *lengths: int) -> None:
        for index, length in enumerate(lengths):
            self.chunks[inode, index] = length

    def of(self, inode: int) -> dict[int, int]:
        return {index: n for (i, index), n in sorted(self.chunks.items()) if i == inode}

    async def _pass(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def remove_chunks(
        self, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int
    ) -> ChainVersions:
        self.log.append(("remove", inode, first_index))
        await self._pass()
        gone = [k for k in self.chunks if k[0] == (layout.data or inode) and k[1] >= first_index]
        for key in gone:
            self.unflushed[key] = self.chunks.pop(key)
        return {layout.chains[0]: self.version} if gone else {}

    async def write(
        self, inode: InodeId, layout: Layout, offset: int, data: memoryview, *, timeout_ns: int
    ) -> ChainVersions:
        self.log.append(("write", layout.data, offset, bytes(data)))
        await self._pass()
        key = (layout.data or inode, offset // layout.chunk_bytes)
        self.unflushed[key] = self.chunks.get(key, ABSENT)
        self.chunks[key] = len(data)
        return {layout.chains[0]: self.version}

    async def truncate_chunk(
        self, inode: InodeId, layout: Layout, index: int, length: int, timeout_ns: int
    ) -> ChainVersions:
        self.log.append(("truncate", inode, index, length))
        await self._pass()
        key = (layout.data or inode, index)
        if key in self.chunks:
            self.unflushed[key] = self.chunks[key]
        self.chunks[key] = length
        return {layout.chains[0]: self.version}

    async def flush(self, chains: Iterable[ChainId], timeout_ns: int) -> ChainVersions:
        await self._pass()
        if self.loses_next:
            self.loses_next = False
            self.cut_power()
        self.unflushed.clear()
        return self.lost

    def cut_power(self) -> None:
        """What was not flushed is undone."""
        for key, length in self.unflushed.items():
            self.chunks[key] = length
            if length == ABSENT:
                del self.chunks[key]
        self.unflushed.clear()
        self.version = ChainVersion(self.version + 1)
        self.lost = dict.fromkeys(map(ChainId, range(10)), self.version)

    async def end_of(
        self, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int
    ) -> int:
        self.log.append(("end", inode, first_index))
        await self._pass()
        found = {i: n for i, n in self.of(layout.data or inode).items() if i >= first_index}
        return max((i * layout.chunk_bytes + n for i, n in found.items()), default=0)

    async def inodes_on(
        self, chain: int, first: InodeId, stop: InodeId, timeout_ns: int
    ) -> list[InodeId]:
        await self._pass()
        return sorted({InodeId(inode) for inode, _ in self.chunks if first <= inode < stop})


def chain(number: int, *states: PublicState) -> Chain:
    targets = tuple(
        ChainTarget(number * 10 + i, i + 1, state)  # type: ignore[arg-type]
        for i, state in enumerate(states)
    )
    return Chain(number, 1, targets)  # type: ignore[arg-type]


def snapshot(*chains: Chain, clients: dict[int, bool] | None = None) -> RoutingSnapshot:
    targets = {
        t.target: TargetStatus(
            t.target,
            t.node,
            c.id,
            t.state,
            TargetReport(
                t.target,
                LocalState.UPTODATE,
                c.version,
                used_bytes=100 * t.node,
                capacity_bytes=1000,
            ),
        )
        for c in chains
        for t in c.targets
    }
    nodes = {
        i: Node(i, NodeKind.CLIENT, "", (), 1, alive, client=client)
        for i, (client, alive) in enumerate((clients or {CLIENT: True}).items(), start=1)
    }
    return RoutingSnapshot("test", 1, nodes, {c.id: c for c in chains}, targets)  # type: ignore[arg-type]


def make_snapshot(chains: int = 3, clients: dict[int, bool] | None = None) -> RoutingSnapshot:
    serving = PublicState.SERVING
    return snapshot(*(chain(n, serving, serving) for n in range(1, chains + 1)), clients=clients)


class World:
    """One metadata server without sockets; short names for its calls."""

    def __init__(self, store: OrderedStore | None = None, inline_bytes_max: int = 0) -> None:
        self.inline_bytes_max = inline_bytes_max
        self.env = TestEnv()
        self.store = MemoryStore() if store is None else store
        self.chunks = FakeChunks()
        self.routing = make_snapshot()
        self.sequence = 0
        self.boot()

    def boot(self) -> None:
        """Begin with what is in the store, as a restarted server does."""
        self.engine = Engine(self.env, self.store)
        self.context = Context(
            self.env,
            self.engine,
            self.chunks,
            lambda: self.routing,
            Policy(CHUNK, 16, inline_bytes_max=self.inline_bytes_max),
        )

    async def open(self) -> None:
        await open_file_system(self.engine, "test", uid=0, gid=0, now_ns=self.env.wall_ns())
        await self.context.load()

    async def close(self) -> None:
        await self.context.close()
        await self.engine.sync()

    def rid(self) -> calls.RequestId:
        self.sequence += 1
        return calls.RequestId(CLIENT, self.sequence)

    # ------------------------------------------------------------ calls

    async def lookup(self, name: bytes, parent: int = ROOT_INODE, who: Any = ROOT) -> Inode:
        request = calls.LookupRequest(who, InodeId(parent), name)
        return (await resolve.lookup(self.context, request)).inode

    async def walk(self, path: bytes, who: Any = ROOT, **options: bool) -> calls.ResolveAnswer:
        return await resolve.resolve(self.context, calls.ResolveRequest(who, path, **options))

    async def getattr(self, inode: int) -> Inode:
        request = calls.GetattrRequest(InodeId(inode))
        return (await namespace.getattr_(self.context, request)).inode

    async def mknod(
        self, name: bytes, mode: int, parent: int = ROOT_INODE, who: Any = ROOT, rdev: int = 0
    ) -> Inode:
        request = calls.MknodRequest(who, self.rid(), InodeId(parent), name, mode, rdev)
        return (await namespace.mknod(self.context, request)).inode

    async def mkdir(
        self, name: bytes, parent: int = ROOT_INODE, who: Any = ROOT, mode: int = 0o755
    ) -> Inode:
        return await self.mknod(name, stat.S_IFDIR | mode, parent, who)

    async def file(
        self, name: bytes, parent: int = ROOT_INODE, who: Any = ROOT, mode: int = 0o644
    ) -> Inode:
        return await self.mknod(name, stat.S_IFREG | mode, parent, who)

    async def create(
        self, name: bytes, parent: int = ROOT_INODE, who: Any = ROOT, **options: Any
    ) -> Inode:
        fields = {"mode": 0o644, "session": 1, "write": True} | options
        request = calls.CreateRequest(who, self.rid(), InodeId(parent), name, **fields)
        return (await files.create(self.context, request)).inode

    async def symlink(self, name: bytes, target: bytes, parent: int = ROOT_INODE) -> Inode:
        request = calls.SymlinkRequest(ROOT, self.rid(), InodeId(parent), name, target)
        return (await namespace.symlink(self.context, request)).inode

    async def link(
        self, inode: int, name: bytes, parent: int = ROOT_INODE, who: Any = ROOT
    ) -> Inode:
        request = calls.LinkRequest(who, self.rid(), InodeId(inode), InodeId(parent), name)
        return (await namespace.link(self.context, request)).inode

    async def unlink(self, name: bytes, parent: int = ROOT_INODE, who: Any = ROOT) -> None:
        request = calls.RemoveRequest(who, self.rid(), InodeId(parent), name, directory=False)
        await namespace.remove(self.context, request)

    async def rmdir(self, name: bytes, parent: int = ROOT_INODE, who: Any = ROOT) -> None:
        request = calls.RemoveRequest(who, self.rid(), InodeId(parent), name, directory=True)
        await namespace.remove(self.context, request)

    async def rename(
        self,
        name: bytes,
        new_name: bytes,
        parent: int = ROOT_INODE,
        new_parent: int = ROOT_INODE,
        flags: int = 0,
        who: Any = ROOT,
    ) -> None:
        request = calls.RenameRequest(
            who, self.rid(), InodeId(parent), name, InodeId(new_parent), new_name, flags
        )
        await rename.rename(self.context, request)

    async def open_file(self, inode: int, session: int, who: Any = ROOT, **options: Any) -> Inode:
        fields = {"read": True, "write": False} | options
        request = calls.OpenRequest(who, self.rid(), InodeId(inode), session, **fields)  # type: ignore[arg-type]
        return (await files.open_(self.context, request)).inode

    async def settle(self, inode: int, session: int = 1, **options: Any) -> Inode:
        request = calls.SettleRequest(self.rid(), InodeId(inode), session, **options)  # type: ignore[arg-type]
        return (await files.settle(self.context, request)).inode

    async def setattr(self, inode: int, who: Any = ROOT, **options: Any) -> Inode:
        request = calls.SetattrRequest(who, self.rid(), InodeId(inode), **options)
        return (await files.setattr_(self.context, request)).inode

    async def readdir(
        self, inode: int = ROOT_INODE, after: bytes = b"", limit: int = 1000, who: Any = ROOT
    ) -> calls.ReaddirAnswer:
        request = calls.ReaddirRequest(who, InodeId(inode), after, limit)
        return await namespace.readdir(self.context, request)

    async def xattr(self, inode: int, name: bytes = b"", who: Any = ROOT) -> calls.XattrAnswer:
        return await xattr.xattr(self.context, calls.XattrRequest(who, InodeId(inode), name))

    async def set_xattr(
        self, inode: int, name: bytes, value: bytes | None, flags: int = 0, who: Any = ROOT
    ) -> None:
        request = calls.SetXattrRequest(who, self.rid(), InodeId(inode), name, value, flags)
        await xattr.set_xattr(self.context, request)

    # ------------------------------------------------------------ checks

    async def names(self, inode: int = ROOT_INODE) -> list[bytes]:
        return [row.name for row in (await self.readdir(inode)).rows]

    def rows(self, prefix: keys.Prefix) -> list[tuple[bytes, bytes]]:
        return self.store.scan(*keys.span_of(bytes(prefix.value)))

    def check(self) -> None:
        """Every invariant of schema.py, from the raw records."""
        inodes = {}
        for _, value in self.rows(keys.Prefix.INODE):
            inode = schema.INODE.decode(value)
            inodes[inode.id] = inode
        names = dict.fromkeys(inodes, 0)
        subdirectories = dict.fromkeys(inodes, 0)
        for key, value in self.rows(keys.Prefix.ENTRY):
            parent = int.from_bytes(key[1:9], "big")
            entry = schema.ENTRY.decode(value)
            assert inodes[parent].is_directory(), "entry without directory"
            assert entry.inode in inodes, "entry without inode"
            assert entry.mode == stat.S_IFMT(inodes[entry.inode].mode)
            names[entry.inode] += 1
            if inodes[entry.inode].is_directory():
                subdirectories[parent] += 1
                assert inodes[entry.inode].parent == parent
        sessions = {keys.unpack_session_key(k)[0] for k, _ in self.rows(keys.Prefix.SESSION)}
        assert sessions <= set(inodes), "session without inode"
        removed = {keys.unpack_inode_suffix(key) for key, _ in self.rows(keys.Prefix.REMOVED)}
        assert removed == {i.id for i in inodes.values() if i.is_directory() and not i.parent}
        for number, inode in inodes.items():
            if number in removed:
                assert not names[number]
            elif inode.is_directory():
                assert inode.nlink == 2 + subdirectories[number]
                assert names[number] == (number not in (ROOT_INODE, TRASH_INODE))
            else:
                assert inode.nlink == names[number]
                assert inode.nlink or number in sessions, "an orphan that nobody collects"
        for prefix in (keys.Prefix.TRIM, keys.Prefix.XATTR):
            for key, _ in self.rows(prefix):
                assert int.from_bytes(key[1:9], "big") in inodes, "a record without inode"
        for key, _ in self.rows(keys.Prefix.DELETED):
            assert keys.unpack_inode_suffix(key) not in inodes
        in_trash = sum(
            int.from_bytes(key[1:9], "big") == TRASH_INODE
            for key, _ in self.rows(keys.Prefix.ENTRY)
        )
        assert len(self.rows(keys.Prefix.TRASH)) == in_trash
        for key, value in self.rows(keys.Prefix.INLINE):
            inode = inodes[int.from_bytes(key[1:9], "big")]
            assert inode.inline, "a content beside chunks"
            assert 0 < len(value) <= inode.length
        owned = {
            int.from_bytes(key[1:9], "big"): keys.unpack_owner(value)
            for key, value in self.rows(keys.Prefix.OWNER)
        }
        data = {i.layout.data: i.id for i in inodes.values() if i.layout and i.layout.data}
        assert owned == data
        count = self.store.get(keys.INODE_COUNT_KEY)
        assert int.from_bytes(count or b"", "little") == len(inodes)
        replies = self.rows(keys.Prefix.REPLY)
        marks = self.rows(keys.Prefix.MARK)
        assert len(replies) + len(marks) == len(self.rows(keys.Prefix.REPLY_AGE))


def play(
    scene: Callable[[World], Awaitable[None]],
    store: OrderedStore | None = None,
    **more: Any,
) -> World:
    """Run a test in a fresh world; all invariants hold afterwards."""

    async def main() -> World:
        world = World(store, **more)
        async with asyncio.timeout(10):
            await world.open()
            await scene(world)
            await world.close()
        world.check()
        return world

    return asyncio.run(main())


async def fails(code: Code, call: Awaitable[Any]) -> None:
    """The call must fail with this code."""
    with pytest.raises(EmberfsError) as raised:
        await call
    assert raised.value.code == code, f"{raised.value} instead of {code.name}"
    assert raised.value.message


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something in the background, 3 s at most."""
    async with asyncio.timeout(3):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
