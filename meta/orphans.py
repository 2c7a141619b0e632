"""Chunks of files that a power cut took from the metadata: found after a start, and removed.

A file may be written before its creation is stable, so a power cut can lose the inode and keep its
chunks. Ids are reserved in blocks, durably and before use, and never given twice: the lost inodes
have ids of the blocks that earlier lives of the server have reserved since the last search. What
has chunks there and no inode never will have one. The search waits for the clients that have such
files open; they learn that the file is gone when they tell its length.

Data ids of small files that grew are of the same blocks (meta/promote.py): chunks of one that no
inode has are what an attempt has left. Other servers may be at one: their blocks are searched as
well. So what is to be searched is barred before, and whoever has such an id takes another.
"""

import logging
from collections.abc import Callable

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, pack_counter, unpack_counter
from emberfs.kv.transactions import Engine
from emberfs.meta.inode_ids import BLOCK_IDS
from emberfs.meta.promote import barred_block
from emberfs.meta.trims import Chunks, make_stable
from emberfs.proto.cluster import RoutingSnapshot
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import Layout
from emberfs.proto.ids import CHUNK_BYTES_MAX, SECOND, ChainId, InodeId
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.meta.orphans")

CHUNK_TIMEOUT_NS = 30 * SECOND
RETRY_NS = 10 * SECOND


class Orphans:
    """One search per life of the server."""

    def __init__(
        self,
        env: Env,
        engine: Engine,
        chunks: Chunks,
        routing: Callable[[], RoutingSnapshot],
        grace_ns: int,
    ) -> None:
        """`grace_ns`: how long clients may go on writing what is lost."""
        self._env = env
        self._engine = engine
        self._chunks = chunks
        self._routing = routing
        self._grace_ns = grace_ns
        self._first, self._last = 0, -1  # blocks of ids to search

    async def load(self) -> None:
        """Note what earlier lives reserved. Before the first id is taken."""

        async def read(txn: Transaction) -> tuple[int, int]:
            last = unpack_counter(await txn.get(keys.INODE_BLOCK_KEY))
            searched = await txn.get(keys.SEARCHED_BLOCK_KEY)
            if searched is None:  # ids of the last block and of the one before may be in use
                searched = pack_counter(last - 2)
                txn.set(keys.SEARCHED_BLOCK_KEY, searched)
            if last > await barred_block(txn):
                txn.set(keys.BARRED_BLOCK_KEY, pack_counter(last))
            return unpack_counter(searched) + 1, last

        first, self._last = await self._engine.run(read, durable=True)
        self._first = max(0, first)

    async def live(self) -> None:
        """Search once, again until it succeeds."""
        await self._env.sleep_ns(self._grace_ns)
        while self._first <= self._last:
            try:
                await self.search()
            except EmberfsError as problem:
                log.warning("looking for chunks of lost files: %s", problem)
                await self._env.sleep_ns(RETRY_NS)

    async def search(self) -> int:
        """Remove the chunks of lost files; returns how many files that were."""
        await self._engine.sync()  # what has no inode now has none after a power cut either
        chains = tuple(sorted(self._routing().chains))
        lost = await self._lost(await self._with_chunks(chains))
        for inode in lost:
            layout = Layout(CHUNK_BYTES_MAX, chains)
            stable = False
            while not stable:
                done = await self._chunks.remove_chunks(inode, layout, 0, CHUNK_TIMEOUT_NS)
                stable = await make_stable(self._chunks, CHUNK_TIMEOUT_NS, done)
            log.info("removed the chunks of inode %d, which a power cut had taken", inode)
        await self._engine.run(self._note_searched, durable=True)
        self._first = self._last + 1
        return len(lost)

    async def _with_chunks(self, chains: tuple[ChainId, ...]) -> list[InodeId]:
        first = InodeId(self._first * BLOCK_IDS)
        stop = InodeId((self._last + 1) * BLOCK_IDS)
        found: set[InodeId] = set()
        for chain in chains:
            found.update(await self._chunks.inodes_on(chain, first, stop, CHUNK_TIMEOUT_NS))
        return sorted(found)

    async def _lost(self, inodes: list[InodeId]) -> list[InodeId]:
        async def missing(txn: Transaction) -> list[InodeId]:
            values = await txn.get_many([keys.inode_key(inode) for inode in inodes])
            owners = await txn.get_many([keys.owner_key(inode) for inode in inodes])
            known = zip(inodes, values, owners, strict=True)
            return [inode for inode, v, owner in known if v is None and owner is None]

        return await self._engine.run(missing, read_only=True)

    async def _note_searched(self, txn: Transaction) -> None:
        known = unpack_counter(await txn.get(keys.SEARCHED_BLOCK_KEY))
        txn.set(keys.SEARCHED_BLOCK_KEY, pack_counter(max(known, self._last)))
