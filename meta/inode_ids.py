"""Inode ids: handed out from blocks that are reserved durably, so none is ever used twice.

A power cut may take unsynced inodes away but not chunks that were written for them; a reused id
would show those chunks in a new file. Hence the reservation is on stable storage before use.
"""

import asyncio

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, pack_counter, unpack_counter
from emberfs.kv.transactions import Engine
from emberfs.proto.ids import InodeId

BLOCK_IDS = 1024


class InodeIds:
    """The ids of one server process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next = 0
        self._stop = 0
        self._reserving = asyncio.Lock()

    async def take(self, above: int = -1) -> InodeId:
        """Return an id that nobody ever had, of a block above `above`."""
        if self._next < self._stop and self._next // BLOCK_IDS <= above:
            self._next = self._stop
        if self._next == self._stop:
            async with self._reserving:
                if self._next == self._stop:
                    await self._reserve()
        taken = self._next
        self._next += 1
        return InodeId(taken)

    async def _reserve(self) -> None:
        async def advance(txn: Transaction) -> int:
            block = unpack_counter(await txn.get(keys.INODE_BLOCK_KEY)) + 1
            txn.set(keys.INODE_BLOCK_KEY, pack_counter(block))
            return block

        block = await self._engine.run(advance, durable=True)
        self._next, self._stop = block * BLOCK_IDS, (block + 1) * BLOCK_IDS
