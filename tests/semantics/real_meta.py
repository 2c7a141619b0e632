"""The real metadata handlers and the real file library in one process; only storage is a dict.

So the POSIX cases meet every rule of meta through the kernel, without starting a cluster.
"""

from functools import partial

from msgspec.structs import replace

from emberfs.client.unflushed import ChainVersions
from emberfs.kv.memory import MemoryStore
from emberfs.kv.transaction import Engine
from emberfs.meta import dispatch
from emberfs.meta.context import Context, Policy
from emberfs.meta.format import open_file_system
from emberfs.proto.cluster import LocalState, NodeKind, TargetReport, TargetStatus
from emberfs.proto.files import Layout
from emberfs.proto.ids import ChainId, InodeId, unpack_chunk_id
from unit.client_fakes import META_NODE, FakeNode, World


class DictChunks:
    """What meta asks of storage (meta.trims.Chunks), on the chunks of a fake world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _of(self, inode: InodeId, first_index: int) -> dict[int, bytes]:
        places = {chunk: unpack_chunk_id(chunk) for chunk in self._world.chunks}
        return {
            index: chunk
            for chunk, (owner, index) in places.items()
            if owner == inode and index >= first_index
        }

    async def remove_chunks(
        self, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int
    ) -> ChainVersions:
        for chunk in self._of(inode, first_index).values():
            del self._world.chunks[chunk]
        return {}

    async def truncate_chunk(
        self, inode: InodeId, layout: Layout, index: int, length: int, timeout_ns: int
    ) -> ChainVersions:
        chunk = self._of(inode, index).get(index)
        if chunk is not None:
            del self._world.chunks[chunk][length:]
        return {}

    async def flush(self, chains: object, timeout_ns: int) -> ChainVersions:
        return {}

    async def end_of(
        self, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int
    ) -> int:
        ends = [
            index * layout.chunk_bytes + len(self._world.chunks[chunk])
            for index, chunk in self._of(inode, first_index).items()
        ]
        return max(ends, default=0)

    async def inodes_on(
        self, chain: ChainId, first: InodeId, stop: InodeId, timeout_ns: int
    ) -> list[InodeId]:
        owners = {InodeId(unpack_chunk_id(chunk)[0]) for chunk in self._world.chunks}
        return sorted(inode for inode in owners if first <= inode < stop)


class RealMeta(FakeNode):
    """A meta server without a process."""

    def __init__(self, world: World) -> None:
        super().__init__(world.env, META_NODE, NodeKind.META)
        self.engine = Engine(world.env, MemoryStore())
        self.context = Context(
            world.env,
            self.engine,
            DictChunks(world),
            lambda: world.routing.snapshot,
            Policy(world.layout.chunk_bytes, 16),
        )

    async def start(self, endpoint: str = "tcp://127.0.0.1:0") -> None:
        await open_file_system(self.engine, "test", uid=0, gid=0, now_ns=self.env.wall_ns())
        await self.context.load()
        self.context.start()
        self.handlers = dispatch.handlers(self.context)
        await super().start(endpoint)


class RealMetaWorld(World):
    """A fake world whose meta is the real one."""

    def __init__(self) -> None:
        super().__init__()
        self.meta = RealMeta(self)

    async def start(self, endpoint: None = None) -> None:
        """With targets that tell of space, for statfs."""
        await super().start(endpoint)
        found = self.routing.snapshot
        report = partial(
            TargetReport, local=LocalState.UPTODATE, used_bytes=0, capacity_bytes=1 << 40
        )
        targets = {
            target.target: TargetStatus(
                target.target,
                target.node,
                chain.id,
                target.state,
                report(target.target, chain_version=chain.version),
            )
            for chain in found.chains.values()
            for target in chain.targets
        }
        self.routing.snapshot = replace(found, targets=targets)
