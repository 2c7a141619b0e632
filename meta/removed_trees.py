"""Trees that were removed in one step, and are taken to pieces in the background.

The directory loses its name and gets a record in a queue, in one transaction; from then on nobody
reaches it or what is below it by a path, and calls that name a directory inside it find nothing
(tree.check_reachable). A batch of the work is one transaction: names are taken out of a directory
of the queue, files are unlinked (who has them open keeps them), directories join the queue. An
empty one is deleted. A server that dies leaves nothing half done, and several may share the work.
"""

import logging
import stat

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, unpack_counter
from emberfs.kv.transactions import Engine
from emberfs.meta import schema
from emberfs.meta.backlog import Backlog
from emberfs.meta.collect import Collector
from emberfs.meta.metrics import REMOVED_NAMES, REMOVED_WAITING
from emberfs.meta.tree import destroy, drop_link, find_inode, store_inode
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.meta.removed_trees")

BATCH_NAMES = 64
CHOICE_ROWS = 16  # of the queue: servers that share it hardly meet


def hide(txn: Transaction, directory: Inode, uid: int, now_ns: int) -> None:
    """Leave a directory that has just lost its name to the background."""
    store_inode(txn, replace(directory, parent=InodeId(0), nlink=0, ctime_ns=now_ns))
    record = schema.REMOVED.encode(schema.Removed(uid))
    txn.set(keys.removed_key(now_ns, directory.id), record)
    txn.add(keys.REMOVED_COUNT_KEY, 1)


class RemovedTrees(Backlog):
    """Works through the queue."""

    what = "removed trees"

    def __init__(self, env: Env, engine: Engine, collector: Collector) -> None:
        super().__init__(env)
        self._engine = engine
        self._collector = collector

    async def step(self) -> bool:
        """Take one batch of names away. False if nothing is left to do."""
        waiting, key = await self._choose()
        REMOVED_WAITING.set(waiting)
        if key is None:
            return False

        async def work(txn: Transaction) -> int:
            return await _batch(txn, key, self._env.wall_ns())

        REMOVED_NAMES.inc(await self._engine.run(work))
        self._collector.wake()
        return True

    async def _choose(self) -> tuple[int, bytes | None]:
        async def find(txn: Transaction) -> tuple[int, list[bytes]]:
            span = keys.span_of(keys.Prefix.REMOVED.value)
            rows = await txn.get_range(*span, limit=CHOICE_ROWS)
            waiting = unpack_counter(await txn.get(keys.REMOVED_COUNT_KEY, snapshot=True))
            if waiting and not rows:
                txn.add(keys.REMOVED_COUNT_KEY, -waiting)  # damage: it would cost every call a look
            return waiting, [key for key, _ in rows]

        waiting, found = await self._engine.run(find)
        return waiting, self._env.random.choice(found) if found else None


async def _batch(txn: Transaction, key: bytes, now_ns: int) -> int:
    """Take some names out of a removed directory; returns how many."""
    value = await txn.get(key)
    if value is None:
        return 0  # another server has done it
    uid = schema.REMOVED.decode(value).uid
    number = InodeId(keys.unpack_inode_suffix(key))
    rows = await txn.get_range(*keys.entry_span(number), limit=BATCH_NAMES)
    for name, stored in rows:
        txn.clear(name)
        entry = schema.ENTRY.decode(stored)
        inode = await find_inode(txn, entry.inode)
        if inode is None:
            continue  # damage, which ends here
        if not inode.is_directory():
            await drop_link(txn, inode, now_ns)
        elif stat.S_ISDIR(entry.mode) and inode.parent == number:
            hide(txn, inode, uid, now_ns)
    if len(rows) < BATCH_NAMES:
        directory = await find_inode(txn, number)
        if directory is not None:
            await destroy(txn, directory, now_ns)
        txn.clear(key)
        txn.add(keys.REMOVED_COUNT_KEY, -1)
    return len(rows)
