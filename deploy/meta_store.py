"""`emberfs meta dump` and `emberfs meta load`: backups of metadata, and moves between engines."""

import os
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from emberfs.deploy.plan import Plan
from emberfs.kv import dump as rows
from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.kv.url import open_engine
from emberfs.meta import schema
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND
from emberfs.runtime.env import Env

OPEN_TIMEOUT_NS = 10 * SECOND
CLEAR_ROWS = 500  # of each part, per transaction


class Stores(NamedTuple):
    """Where metadata and the state of mgmtd lie, as URLs."""

    store: str
    mgmtd: str = ""  # a store of its own; empty: in the same


def stores_of(plan: Plan) -> Stores:
    """Return those of a local cluster."""
    if plan.store:
        return Stores(plan.store)
    meta, mgmtd = plan.path("data", "meta", "kv"), plan.path("data", "mgmtd", "state")
    return Stores(f"rocks://{meta}", f"rocks://{mgmtd}")


async def dump(env: Env, stores: Stores, path: Path, *, stopped: bool) -> int:
    """Write a new file; returns the number of rows. The file appears only when it is whole."""
    if path.exists():
        raise EmberfsError(Code.EXISTS, f"{path} exists; name another file")
    part = path.with_name(path.name + ".part")
    try:
        async with AsyncExitStack() as held:
            engine, mgmtd = await _open(env, stores, held)
            file = held.enter_context(part.open("wb"))
            count = await rows.dump(engine, file, stopped=stopped, mgmtd=mgmtd)
        os.rename(part, path)
        return count
    finally:
        part.unlink(missing_ok=True)


async def load(env: Env, stores: Stores, path: Path) -> int:
    """Fill empty stores; returns the number of rows."""
    async with AsyncExitStack() as held:
        file = held.enter_context(path.open("rb"))
        engine, mgmtd = await _open(env, stores, held)
        return await rows.load(engine, file, mgmtd=mgmtd)


async def clear(env: Env, store: str, cluster: str) -> None:
    """Delete all rows of a cluster in a store, whose servers are stopped. WRONG_CLUSTER."""
    async with AsyncExitStack() as held:
        engine, _ = await _open(env, Stores(store), held)
        await engine.run(partial(_check_cluster, cluster=cluster), read_only=True)
        while await engine.run(_clear_some):
            pass


async def _check_cluster(txn: Transaction, cluster: str) -> None:
    value = await txn.get(keys.FILE_SYSTEM_KEY)
    found = schema.FILE_SYSTEM.decode(value).cluster if value else cluster
    if found != cluster:
        raise EmberfsError(
            Code.WRONG_CLUSTER, f'the store holds cluster "{found}", not "{cluster}"; it is kept'
        )


async def _clear_some(txn: Transaction) -> int:
    """Delete some rows, the name of the cluster last; returns how many."""
    first, last = keys.FILE_SYSTEM_KEY, keys.FILE_SYSTEM_KEY + b"\0"
    rows_of = txn.get_range
    found = await rows_of(b"\1", first, limit=CLEAR_ROWS)
    found += await rows_of(last, rows.END, limit=CLEAR_ROWS)
    found = found or await rows_of(first, last)
    for key, _ in found:
        txn.clear(key)
    return len(found)


async def _open(env: Env, stores: Stores, held: AsyncExitStack) -> tuple[Engine, Engine | None]:
    engine = await open_engine(env, stores.store, timeout_ns=OPEN_TIMEOUT_NS)
    held.push_async_callback(engine.close)
    mgmtd = None
    if stores.mgmtd:
        mgmtd = await open_engine(env, stores.mgmtd, timeout_ns=OPEN_TIMEOUT_NS)
        held.push_async_callback(mgmtd.close)
    return engine, mgmtd
