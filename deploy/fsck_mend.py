"""The repairs of fsck, one finding at a time. What has changed since it was seen is left alone."""

from typing import Protocol

from emberfs.deploy.fsck_chunks import (
    ChunkFinding,
    FreeBlocks,
    RemoveChunks,
    ReplaceReplica,
    Stores,
    merged,
)
from emberfs.deploy.fsck_owners import ORPHAN, Amount, Place, kind_of, recount
from emberfs.deploy.fsck_records import Records, fetch_owners
from emberfs.kv import keys
from emberfs.meta.check import Finding
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChainId, ChunkId, InodeId, unpack_chunk_id
from emberfs.proto.meta_calls import Mend
from emberfs.proto.storage_calls import file_chunk_range
from emberfs.runtime.env import Env


class MendingRecords(Records, Protocol):
    """Metadata that can be repaired: client.metadata.Metadata."""

    async def mend(self, mend: Mend) -> None:
        """Perform one repair. STALE if what was seen has changed."""
        ...


class MendingStores(Stores, Protocol):
    """Storage that can be repaired: fsck_stores.ClusterStores."""

    async def replace(self, order: ReplaceReplica) -> None:
        """Make a replica equal to another."""
        ...

    async def free(self, order: FreeBlocks) -> None:
        """Free blocks of one store that nothing owns."""
        ...

    async def remove(self, chain: ChainId, chunk: ChunkId) -> None:
        """Remove one chunk from all replicas."""
        ...


class Mender:
    """Performs repairs; `strange_since_ns` is when chunks without owner were first seen."""

    def __init__(
        self, env: Env, records: MendingRecords, stores: MendingStores, *, grace_ns: int
    ) -> None:
        self._env = env
        self._records = records
        self._stores = stores
        self._grace_ns = grace_ns

    async def mend(self, finding: Finding | ChunkFinding, strange_since_ns: int) -> str:
        """Repair one finding; returns why not, or "" when it is done."""
        try:
            match finding.mend:
                case Mend() as mend:
                    await self._records.mend(mend)
                case RemoveChunks() as remove:
                    await self._wait_until(strange_since_ns + self._grace_ns)
                    await self._remove(remove)
                case FreeBlocks() as free:
                    await self._stores.free(free)
                case None:
                    return "only a person can decide"
                case orders:
                    for order in orders:
                        await self._stores.replace(order)
        except EmberfsError as problem:
            return str(problem)
        return ""

    async def _wait_until(self, when_ns: int) -> None:
        left_ns = when_ns - self._env.now_ns()
        if left_ns > 0:
            await self._env.sleep_ns(left_ns)

    async def _remove(self, order: RemoveChunks) -> None:
        """Look once more, right before; then remove exactly what is strange in this way."""
        chain = next((c for c in self._stores.chains() if c.id == order.chain), None)
        number = InodeId(order.inode)
        stored = (await fetch_owners(self._records, [number])).get(number)
        raw = (await self._records.fetch_records((keys.inode_key(number),)))[0]
        if chain is None or (raw is not None and (stored is None or order.kind == ORPHAN)):
            raise EmberfsError(Code.STALE, f"inode {number} exists now; look again")
        now = await recount(self._stores, chain, number, stored)
        place = Place(order.chain, number, order.kind)
        if now.get(place) != Amount(order.chunks, order.bytes):
            raise EmberfsError(Code.STALE, f"chunks of inode {number} have changed; look again")
        start, stop = file_chunk_range(number, 0)
        inode = stored.inode if stored is not None else None
        async for page in merged(self._stores, chain, start, stop, verify=False):
            for chunk, rows in page:
                length = max(row.length for row in rows if row is not None)
                index = unpack_chunk_id(chunk)[1]
                if kind_of(inode, chain.id, index, length, number) == order.kind:
                    await self._stores.remove(chain.id, chunk)
