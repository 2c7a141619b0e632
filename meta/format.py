"""First start: whose file system this is, and its root directory."""

import stat

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.meta import schema
from emberfs.meta.tree import add_inode
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE


async def open_file_system(
    engine: Engine, cluster: str, *, uid: int, gid: int, now_ns: int
) -> bool:
    """Check that the store belongs to `cluster`, or make an empty file system in an empty store.

    A store of an older format becomes one of this. Returns True when it was made. Raises
    WRONG_CLUSTER, or UNSUPPORTED for a newer format.
    """

    async def work(txn: Transaction) -> bool:
        if await txn.get(keys.LOADING_KEY) is not None:
            raise EmberfsError(
                Code.CONFIG, "a load into the metadata store did not finish; clear it, load again"
            )
        value = await txn.get(keys.FILE_SYSTEM_KEY)
        if value is not None:
            found = schema.FILE_SYSTEM.decode(value)
            _check(found, cluster)
            if found.format != schema.FORMAT:
                now = schema.FileSystem(cluster)
                txn.set(keys.FILE_SYSTEM_KEY, schema.FILE_SYSTEM.encode(now))
            return False
        txn.set(keys.FILE_SYSTEM_KEY, schema.FILE_SYSTEM.encode(schema.FileSystem(cluster)))
        root = Inode(
            id=ROOT_INODE,
            mode=stat.S_IFDIR | 0o755,
            uid=uid,
            gid=gid,
            nlink=2,
            length=0,
            atime_ns=now_ns,
            mtime_ns=now_ns,
            ctime_ns=now_ns,
            parent=ROOT_INODE,
        )
        await add_inode(txn, root)
        return True

    return await engine.run(work, durable=True)


def _check(found: schema.FileSystem, cluster: str) -> None:
    if found.cluster != cluster:
        raise EmberfsError(
            Code.WRONG_CLUSTER,
            f'the metadata store belongs to cluster "{found.cluster}", not to "{cluster}"; '
            "correct `cluster` or `data` in the configuration",
        )
    if found.format not in schema.FORMATS_READ:
        raise EmberfsError(
            Code.UNSUPPORTED,
            f"the metadata store has format {found.format}, this server knows {schema.FORMAT}; "
            "use the version of emberfs that wrote it",
        )
