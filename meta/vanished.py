"""How long a file is whose writer vanished: what it was told is written must stay readable.

A writer settles the length at fsync and close. One that died between a write and that has left
chunks behind the end that meta knows; they are looked for before its session ends. Bytes whose
write was never acknowledged may be among them: they were written as well.
"""

from typing import NamedTuple

from emberfs.kv.transaction import Engine, Transaction
from emberfs.meta.tree import find_inode
from emberfs.meta.trims import Chunks, Trims
from emberfs.proto.files import Inode
from emberfs.proto.ids import SECOND, InodeId

TIMEOUT_NS = 10 * SECOND


class Measured(NamedTuple):
    """Where the chunks of a file end, in bytes, as of a truncate version."""

    truncate_version: int
    end: int


async def measure(
    engine: Engine, chunks: Chunks, trims: Trims, inode_id: InodeId
) -> Measured | None:
    """Look at the chunks behind the known end; None if there is no such file.

    A cut that is still to be made comes first: what it removes is not part of the file. Raises what
    hinders either.
    """
    await trims.finish(inode_id)

    async def find(txn: Transaction) -> Inode | None:
        return await find_inode(txn, inode_id)

    inode = await engine.run(find, read_only=True)
    if inode is None or inode.layout is None:
        return None
    first = inode.length // inode.layout.chunk_bytes
    end = await chunks.end_of(inode_id, inode.layout, first, TIMEOUT_NS)
    return Measured(inode.truncate_version, end)
