"""fsck on the metadata of meta_world and on replicas that are rows in dictionaries."""

import asyncio

from msgspec.structs import replace

from emberfs.deploy.fsck import Fsck, Options, Report
from emberfs.deploy.fsck_chunks import FreeBlocks, ReplaceReplica
from emberfs.kv import keys
from emberfs.meta import mend, quota_census, records, schema
from emberfs.proto import meta_calls as calls
from emberfs.proto import quota_calls
from emberfs.proto.cluster import Chain, ChainTarget
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode, Layout
from emberfs.proto.ids import ChainId, ChunkId, TargetId, pack_chunk_id
from emberfs.proto.storage_calls import ChunkRow, FsckAnswer, Leak, ListAnswer
from unit.meta_world import CHUNK, ROOT, World

QUICK = Options(pause_ns=1, grace_ns=1)


class WorldRecords:
    """The metadata calls of fsck, without a network."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.mended: list[calls.Mend] = []

    async def scan_records(
        self, start: bytes, stop: bytes, limit: int, *, values: bool = True
    ) -> calls.ScanRecordsAnswer:
        await asyncio.sleep(0)  # others run between two pages
        request = calls.ScanRecordsRequest(start, stop, limit, values)
        return await records.scan(self.world.context, request)

    async def fetch_records(self, keys: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        await asyncio.sleep(0)
        request = calls.FetchRecordsRequest(keys)
        return (await records.fetch(self.world.context, request)).values

    async def census(self) -> calls.CensusAnswer:
        return await records.census(self.world.context, calls.CensusRequest())

    async def quota_census(self) -> quota_calls.QuotaCensusAnswer:
        request = quota_calls.QuotaCensusRequest()
        return await quota_census.census(self.world.context, request)

    async def mend(self, wanted: calls.Mend) -> None:
        await mend.mend(self.world.context, calls.MendRequest(self.world.rid(), wanted))
        self.mended.append(wanted)


class FakeStores:
    """Replicas: target -> chunk -> row."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[TargetId, dict[ChunkId, ChunkRow]] = {}
        self.blocks: dict[TargetId, tuple[str, ...]] = {}
        self.leaks: dict[TargetId, Leak] = {}
        self.removed: list[ChunkId] = []
        self.looks = 0
        for chain in self.chains():
            for member in chain.targets:
                self.rows[member.target] = {}

    def chains(self) -> list[Chain]:
        return sorted(self.world.routing.chains.values(), key=lambda c: c.id)

    def put(
        self, chain: int, inode: int, index: int, length: int = CHUNK, version: int = 1
    ) -> None:
        chunk = pack_chunk_id(inode, index)  # type: ignore[arg-type]
        for member in self.world.routing.chains[ChainId(chain)].targets:
            self.rows[member.target][chunk] = ChunkRow(chunk, 1, 0, length, 77)

    def change(self, target: int, inode: int, index: int, **fields: object) -> None:
        chunk = pack_chunk_id(inode, index)  # type: ignore[arg-type]
        rows = self.rows[TargetId(target)]
        rows[chunk] = replace(rows[chunk], **fields)

    async def list(
        self, member: ChainTarget, start: bytes, stop: bytes, limit: int, *, verify: bool
    ) -> ListAnswer:
        self.looks += 1
        found = [
            row if verify else replace(row, damaged=False)
            for chunk, row in sorted(self.rows[member.target].items())
            if start <= chunk and (not stop or chunk < stop)
        ]
        more = found[limit - 1].chunk + b"\0" if len(found) > limit else b""
        return ListAnswer(tuple(found[:limit]), more)

    async def check(self, member: ChainTarget) -> FsckAnswer:
        leaks = tuple(leak for target, leak in self.leaks.items() if target == member.target)
        texts = (*self.blocks.get(member.target, ()), *(leak.in_words() for leak in leaks))
        return FsckAnswer(0, 0, texts, leaks)

    async def free(self, order: FreeBlocks) -> None:
        if self.leaks.get(order.target.target) != order.leak:
            raise EmberfsError(Code.STALE, "it leaks otherwise now")
        del self.leaks[order.target.target]

    async def replace(self, order: ReplaceReplica) -> None:
        self.rows[order.target.target][order.chunk] = self.rows[order.source][order.chunk]

    async def remove(self, chain: ChainId, chunk: ChunkId) -> None:
        self.removed.append(chunk)
        for member in self.world.routing.chains[chain].targets:
            self.rows[member.target].pop(chunk, None)


class Scene:
    """A world, its chunks, and fsck on both."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.records = WorldRecords(world)
        self.stores = FakeStores(world)
        self.said: list[str] = []

    async def fsck(self, options: Options = QUICK) -> Report:
        root: Inode | None = None
        if options.path:
            root = (await self.world.walk(options.path)).inode
        run = Fsck(self.world.env, self.records, self.stores, self.said.append, options, root)
        return await run.run()

    async def texts(self, options: Options = QUICK) -> list[str]:
        return [finding.text for finding in (await self.fsck(options)).findings]

    async def repaired(self, **options: object) -> list[str]:
        """Repair; return what is left."""
        return await self.texts(QUICK._replace(repair=True, **options))

    # ------------------------------------------------------------ planting damage

    async def write(self, key: bytes, value: bytes | None) -> None:
        async def work(txn: object) -> None:
            if value is None:
                txn.clear(key)  # type: ignore[attr-defined]
            else:
                txn.set(key, value)  # type: ignore[attr-defined]

        await self.world.engine.run(work)

    async def write_inode(self, inode: Inode) -> None:
        await self.write(keys.inode_key(inode.id), schema.INODE.encode(inode))

    async def write_entry(self, parent: int, name: bytes, inode: int, mode: int) -> None:
        entry = schema.ENTRY.encode(schema.Entry(inode, mode))  # type: ignore[arg-type]
        await self.write(keys.entry_key(parent, name), entry)

    async def file(self, name: bytes, length: int, parent: int = 1) -> Inode:
        """A closed file of a length, its chunks in place."""
        made = await self.world.file(name, parent, ROOT)
        inode = await self.world.settle(made.id, 0, length=length, close=True)
        layout = inode.layout
        assert layout is not None
        for index in range(-(-length // layout.chunk_bytes)):
            rest = min(layout.chunk_bytes, length - index * layout.chunk_bytes)
            self.stores.put(chain_of(layout, index), inode.id, index, rest)
        return inode


def chain_of(layout: Layout | None, index: int) -> ChainId:
    assert layout is not None
    return layout.chains[index % len(layout.chains)]
