"""Ending the sessions of clients that are gone, so that unlinked files do not stay for ever.

A client counts as gone when routing has not shown it alive for the grace time without a break,
counted from this server's own start too, and anew whenever it was out of touch with mgmtd: what was
before nobody here can know. Who opens a file is not gone, whatever routing shows: the session says
from which version of the routing on its client is to be seen (clients.py).

Several servers each count for themselves and divide the sessions; two that end one agree on it.
"""

import logging
from typing import TypeAlias

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.meta import schema
from emberfs.meta.attributes import after_write
from emberfs.meta.clients import Clients
from emberfs.meta.collect import Collector
from emberfs.meta.metrics import SESSIONS_ENDED
from emberfs.meta.quota import charge_growth
from emberfs.meta.tenure import Tenure
from emberfs.meta.tree import destroy, find_inode, has_sessions, store_inode
from emberfs.meta.trims import Chunks, Trims
from emberfs.meta.vanished import Measured, measure
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import SECOND, InodeId
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.meta.sessions")

BATCH_ROWS = 256

Registration: TypeAlias = tuple[int, int]  # client, and since which version it is shown


class SessionSweeper:
    """Finds sessions without a client and ends them."""

    def __init__(
        self,
        env: Env,
        engine: Engine,
        collector: Collector,
        chunks: Chunks,
        trims: Trims,
        clients: Clients,
        tenure: Tenure,
        grace_ns: int = 30 * SECOND,
    ) -> None:
        self._env = env
        self._engine = engine
        self._collector = collector
        self._chunks = chunks
        self._trims = trims
        self._clients = clients
        self._tenure = tenure
        self._grace_ns = grace_ns
        self._absent_since_ns: dict[Registration, int] = {}
        clients.on_heard = lambda client: self._absent_since_ns.pop((client, 0), None)

    async def live(self) -> None:
        """Sweep for ever."""
        while True:
            try:
                await self.sweep()
            except EmberfsError as problem:
                log.warning("looking for dead sessions: %s", problem)
            await self._env.sleep_ns(max(self._grace_ns // 6, SECOND // 10))

    async def sweep(self) -> int:
        """Look at every session once; returns how many were ended."""
        alive = self._clients.alive()
        if alive is None:
            self._absent_since_ns.clear()
            return 0
        seen: set[Registration] = set()
        ended = 0
        start, stop = keys.span_of(keys.Prefix.SESSION.value)
        while start < stop:
            rows = await self._rows(start, stop)
            for key, value in rows:
                session = schema.SESSION.decode(value)
                if session.client not in alive and self._clients.shows(session.since):
                    seen.add((session.client, session.since))
                    if self._is_gone(session) and self._tenure.is_mine(_inode_of(key)):
                        ended += await self._end_if_possible(key, value)
            start = rows[-1][0] + b"\0" if len(rows) == BATCH_ROWS else stop
            await self._env.sleep_ns(0)  # let callers in between
        self._absent_since_ns = {
            who: since_ns for who, since_ns in self._absent_since_ns.items() if who in seen
        }
        if ended:
            SESSIONS_ENDED.inc(ended)
            self._collector.wake()
        return ended

    def overdue(self) -> list[int]:
        """Clients gone for twice the grace time and more whose sessions are still there."""
        limit_ns = self._env.now_ns() - 2 * self._grace_ns
        absent = self._absent_since_ns.items()
        return sorted({client for (client, _), since_ns in absent if since_ns < limit_ns})

    def _is_gone(self, session: schema.Session) -> bool:
        now_ns = self._env.now_ns()
        who = (session.client, session.since)
        return now_ns - self._absent_since_ns.setdefault(who, now_ns) > self._grace_ns

    async def _rows(self, start: bytes, stop: bytes) -> list[tuple[bytes, bytes]]:
        async def scan(txn: Transaction) -> list[tuple[bytes, bytes]]:
            return await txn.get_range(start, stop, limit=BATCH_ROWS)

        return await self._engine.run(scan, read_only=True)

    async def _end_if_possible(self, key: bytes, value: bytes) -> bool:
        """End a session; one whose file cannot be looked at just now waits for the next sweep."""
        inode_id, session = _inode_of(key), schema.SESSION.decode(value)
        try:
            measured = None
            if session.write:
                measured = await measure(self._engine, self._chunks, self._trims, inode_id)
            return await self._end(key, value, measured)
        except EmberfsError as problem:
            log.warning("a dead session on inode %d stays for now: %s", inode_id, problem)
            return False

    async def _end(self, key: bytes, value: bytes, measured: Measured | None) -> bool:
        inode_id, number = keys.unpack_session_key(key)
        session = schema.SESSION.decode(value)

        async def work(txn: Transaction) -> bool:
            # Its client may be back, and open the file anew at this very moment.
            if await txn.get(key) != value or not self._is_gone(session):
                return False
            inode = await find_inode(txn, InodeId(inode_id))
            txn.clear(key)
            if inode is None:
                return True
            if inode.nlink == 0 and not await has_sessions(txn, inode.id):
                await destroy(txn, inode, self._env.wall_ns())
            elif measured is not None:
                if measured.truncate_version != inode.truncate_version:
                    raise EmberfsError(Code.STALE, "it was truncated meanwhile")
                await self._settle(txn, inode, measured.end, privileged=session.privileged)
            return True

        if not await self._engine.run(work):
            return False
        log.info("session %d on inode %d ended: its client is gone", number, inode_id)
        return True

    async def _settle(self, txn: Transaction, inode: Inode, end: int, *, privileged: bool) -> None:
        if end > inode.length:
            await charge_growth(txn, inode, end, forced=True)
            now_ns = self._env.wall_ns()
            grown = after_write(inode, privileged=privileged, now_ns=now_ns, mtime_ns=None)
            store_inode(txn, replace(grown, length=end))


def _inode_of(key: bytes) -> InodeId:
    return InodeId(keys.unpack_session_key(key)[0])
