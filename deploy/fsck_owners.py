"""fsck of chunks against metadata: every chunk belongs to a file, on its chain, within its length.

The first look only remembers what is strange, per inode. The second one, later, looks at the same
inodes again: what waits for collection, what is being written or cut is in order.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from emberfs.deploy.fsck_chunks import ChunkFinding, RemoveChunks, Replicas, Stores, merged
from emberfs.deploy.fsck_records import Records, Stored, fetch_owners, pages
from emberfs.kv import keys
from emberfs.meta import schema
from emberfs.proto.cluster import Chain
from emberfs.proto.files import Inode, chunks_of
from emberfs.proto.ids import ChainId, InodeId, unpack_chunk_id
from emberfs.proto.meta_calls import Mend, MendKind
from emberfs.proto.storage_calls import file_chunk_range
from emberfs.runtime.env import Env

ORPHAN = "orphan"  # its inode does not exist
MISPLACED = "misplaced"  # its file keeps this chunk elsewhere
BEYOND = "beyond"  # behind the end of its file
INODES_MAX = 100_000  # strange ones that are remembered; what is behind shows in the next run


class Place(NamedTuple):
    """Chunks of one name on one chain that are strange in one way."""

    chain: ChainId
    inode: InodeId  # or data id: what the chunks are named by
    kind: str


class Amount(NamedTuple):
    """How much it is."""

    chunks: int
    bytes: int


def kind_of(
    inode: Inode | None, chain: ChainId, index: int, length: int, name: InodeId | None = None
) -> str:
    """Tell what is strange about a chunk; "" if nothing is. [pure]

    `name` is what the chunk is named by, None: what those of the inode are.
    """
    if inode is None:
        return ORPHAN
    layout = inode.layout
    if layout is None or not layout.chains or inode.inline:
        return MISPLACED
    if name not in (None, chunks_of(inode.id, layout)):
        return MISPLACED
    if layout.chains[index % len(layout.chains)] != chain:
        return MISPLACED
    start = index * layout.chunk_bytes
    if start >= inode.length or start + length > inode.length or length > layout.chunk_bytes:
        return BEYOND
    return ""


class Owners:
    """Remembers strange chunks, and judges them later."""

    def __init__(self, env: Env, records: Records, stores: Stores) -> None:
        self._env = env
        self._records = records
        self._stores = stores
        self._amounts: dict[Place, Amount] = {}
        self.first_ns = 0  # when the newest of them was seen

    @property
    def strange(self) -> int:
        """How many places must be looked at again."""
        return len(self._amounts)

    async def see(self, chain: Chain, page: list[Replicas]) -> None:
        """Look at a page of chunks. A chunk counts once, however many replicas have it."""
        numbers = sorted({unpack_chunk_id(replicas.chunk)[0] for replicas in page})
        inodes = await fetch_owners(self._records, numbers)
        for place, amount in _sums(chain.id, page, inodes).items():
            known = self._amounts.get(place)
            if known is not None:
                amount = Amount(known.chunks + amount.chunks, known.bytes + amount.bytes)
            elif len(self._amounts) >= INODES_MAX:
                continue
            self._amounts[place] = amount
            self.first_ns = self._env.now_ns()

    async def judge(self) -> list[ChunkFinding]:
        """Look again at everything that was strange; call it some time after the first look."""
        queued = await self._queued()  # before the chunks: what left the queue has none any more
        found: list[ChunkFinding] = []
        for place, amount in sorted(self._amounts.items()):
            if place.kind == ORPHAN and place.inode in queued:
                continue
            finding = await self._judge(place, amount)
            if finding is not None:
                found.append(finding)
        return found

    async def _queued(self) -> set[InodeId]:
        wanted = {place.inode for place in self._amounts if place.kind == ORPHAN}
        queued: set[InodeId] = set()
        if wanted:
            span = keys.span_of(bytes(keys.Prefix.DELETED.value))
            async for page in pages(self._records, span):
                for row in page:
                    inode = InodeId(keys.unpack_inode_suffix(row.key))
                    queued.add(chunks_of(inode, schema.DELETED.decode(row.value).layout))
            queued &= wanted
        return queued

    async def _judge(self, place: Place, amount: Amount) -> ChunkFinding | None:
        """Judge one place; None when it is in order now, or has changed."""
        chain = next((c for c in self._stores.chains() if c.id == place.chain), None)
        if chain is None:
            return None
        stored = (await fetch_owners(self._records, [place.inode])).get(place.inode)
        if stored is None and await self._has_record(place.inode):
            return None  # unreadable, which is found elsewhere; its data must stay
        now = await recount(self._stores, chain, place.inode, stored)
        if now.get(place) != amount:
            return None
        where = f"chain {place.chain}: {amount.chunks} chunks, {amount.bytes} bytes"
        remove = RemoveChunks(place.chain, place.inode, place.kind, amount.chunks, amount.bytes)
        if place.kind == ORPHAN:
            text = f"{where} of inode {place.inode}, which does not exist"
            return ChunkFinding(text, "remove them", remove)
        assert stored is not None
        if place.kind == MISPLACED:
            text = f"{where} of inode {place.inode}, which keeps them elsewhere"
            return ChunkFinding(text, "remove them here", remove)
        if await self._may_be_written(stored.inode):
            return None
        text = f"{where} behind the end of inode {stored.inode.id} ({stored.inode.length} bytes)"
        trim = Mend(MendKind.TRIM, inode=stored.inode.id, expected=stored.value)
        return ChunkFinding(text, "cut them off", trim)

    async def _has_record(self, inode: InodeId) -> bool:
        return (await self._records.fetch_records((keys.inode_key(inode),)))[0] is not None

    async def _may_be_written(self, inode: Inode) -> bool:
        """Whoever writes settles the length later; a trim that is pending will cut."""
        if (await self._records.fetch_records((keys.trim_key(inode.id),)))[0] is not None:
            return True
        async for page in pages(self._records, keys.session_span(inode.id)):
            if any(schema.SESSION.decode(row.value).write for row in page):
                return True
        return False


async def recount(
    stores: Stores, chain: Chain, inode: InodeId, stored: Stored | None
) -> dict[Place, Amount]:
    """Look at all chunks of one inode on one chain."""
    total: dict[Place, Amount] = {}
    inodes = {inode: stored} if stored is not None else {}
    start, stop = file_chunk_range(inode, 0)
    async for page in merged(stores, chain, start, stop, verify=False):
        for place, amount in _sums(chain.id, page, inodes).items():
            known = total.get(place, Amount(0, 0))
            total[place] = Amount(known.chunks + amount.chunks, known.bytes + amount.bytes)
    return total


def _sums(
    chain: ChainId, page: Iterable[Replicas], inodes: dict[InodeId, Stored]
) -> dict[Place, Amount]:
    found: defaultdict[Place, list[int]] = defaultdict(list)
    for chunk, rows in page:
        number, index = unpack_chunk_id(chunk)
        stored = inodes.get(number)
        length = max(row.length for row in rows if row is not None)
        kind = kind_of(stored.inode if stored is not None else None, chain, index, length, number)
        if kind:
            found[Place(chain, number, kind)].append(length)
    return {place: Amount(len(lengths), sum(lengths)) for place, lengths in found.items()}


def file_ranges(inode: Inode, chains: dict[ChainId, Chain]) -> list[tuple[Chain, bytes, bytes]]:
    """Return where the chunks of a file are looked for: all its chains."""
    if inode.layout is None or inode.inline:
        return []
    start, stop = file_chunk_range(chunks_of(inode.id, inode.layout), 0)
    return [(chains[c], start, stop) for c in sorted(set(inode.layout.chains)) if c in chains]
