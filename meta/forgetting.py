"""Forgetting of remembered replies, when no retry can ask for them any more.

Every server notes ages on a clock of its own, which runs while its process lives and never steps,
and forgets what it has remembered itself: a wrong time of day makes nothing forgotten, nor does a
server whose clock differs. What a server that is gone has remembered is forgotten by those that
live, when they have not seen it for that long.

A reply leaves a mark when it goes: up to which call its client's replies may be gone. A copy of one
of those calls, wherever it was held up, is refused then. Marks go much later.
"""

import logging

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.meta import schema
from emberfs.meta.tenure import Tenure
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import SECOND
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.meta.forgetting")

KEPT_NS = 600 * SECOND  # far longer than any client tries a call
MARK_KEPT_NS = 24 * 3600 * SECOND
SWEEP_NS = 15 * SECOND
BATCH_ROWS = 512


class Forgetting:
    """The ages of replies, as one server sees them."""

    def __init__(self, env: Env, engine: Engine, tenure: Tenure) -> None:
        self._env = env
        self._engine = engine
        self._tenure = tenure
        self._born_ns = env.now_ns()
        self._swept = b""  # no older one of our own is left: saves scanning over deleted rows
        self._gone_since_ns: dict[int, int] = {}  # servers that have left something behind

    def _now_ns(self) -> int:
        return self._env.now_ns() - self._born_ns

    def age_of(self, client: int, sequence: int) -> bytes:
        """Key that says how old a reply of this moment is."""
        return keys.reply_age_key(
            keys.ReplyAge(self._tenure.incarnation, self._now_ns(), client, sequence)
        )

    async def sweep(self, kept_ns: int = KEPT_NS) -> int:
        """Forget one batch of replies older than `kept_ns`; returns how many rows that were."""
        start, stop = keys.reply_age_span(
            self._tenure.incarnation, max(0, self._now_ns() - kept_ns)
        )
        gone = await self._forget(max(start, self._swept), stop)
        if gone:
            self._swept = gone[-1]
        if len(gone) < BATCH_ROWS:
            gone += await self._sweep_gone(kept_ns)
        return min(len(gone), BATCH_ROWS)

    async def live(self) -> None:
        """Sweep for ever, in small batches, so that callers hardly notice."""
        while True:
            await self._env.sleep_ns(SWEEP_NS)
            try:
                while await self.sweep() == BATCH_ROWS:
                    await self._env.sleep_ns(SECOND // 100)
            except EmberfsError as problem:
                log.warning("cannot forget old replies: %s", problem)

    async def _sweep_gone(self, kept_ns: int) -> list[bytes]:
        """The same for servers that are gone."""
        now_ns, since_ns = self._env.now_ns(), {}
        chosen: list[int] = []
        for server in await self._servers():
            if not self._tenure.is_gone(server):
                continue
            since_ns[server] = self._gone_since_ns.get(server, now_ns)
            if now_ns - since_ns[server] > kept_ns and self._tenure.is_mine(server):
                chosen.append(server)
        self._gone_since_ns = since_ns
        gone: list[bytes] = []
        while chosen and len(gone) < BATCH_ROWS:
            gone += await self._forget(*keys.reply_ages_of(chosen.pop()))
        return gone

    async def _servers(self) -> list[int]:
        """Whose replies are remembered, found by leaps."""
        start, stop = keys.span_of(keys.Prefix.REPLY_AGE.value)

        async def leap(txn: Transaction) -> list[int]:
            found: list[int] = []
            at = start
            while len(found) < BATCH_ROWS:
                rows = await txn.get_range(at, stop, limit=1)
                if not rows:
                    break
                found.append(keys.unpack_reply_age_key(rows[0][0]).server)
                at = keys.reply_ages_of(found[-1]).stop
            return found

        return await self._engine.run(leap, read_only=True)

    async def _forget(self, start: bytes, stop: bytes) -> list[bytes]:
        """Forget a batch of what these ages belong to; returns the ages."""

        async def forget(txn: Transaction) -> list[bytes]:
            rows = await txn.get_range(start, stop, limit=BATCH_ROWS, snapshot=True)
            ages = [keys.unpack_reply_age_key(key) for key, _ in rows]
            marks = await _marks_of(txn, sorted({age.client for age in ages}))
            highest: dict[int, int] = {}
            for (key, _), age in zip(rows, ages, strict=True):
                txn.clear(key)
                if age.sequence:
                    txn.clear(keys.reply_key(age.client, age.sequence))
                    highest[age.client] = max(age.sequence, highest.get(age.client, 0))
                elif _age_of_mark(age.client, marks[age.client]) == age:  # not raised since
                    txn.clear(keys.mark_key(age.client))
            for client, sequence in sorted(highest.items()):
                self._raise_mark(txn, client, sequence, marks[client])
            return [key for key, _ in rows]

        return await self._engine.run(forget)

    def _raise_mark(
        self, txn: Transaction, client: int, sequence: int, known: schema.Mark | None
    ) -> None:
        if known is not None:
            if known.sequence >= sequence:
                return
            txn.clear(keys.reply_age_key(keys.ReplyAge(known.server, known.age_ns, client, 0)))
        age_ns = self._now_ns() + MARK_KEPT_NS
        mark = schema.Mark(sequence, self._tenure.incarnation, age_ns)
        txn.set(keys.mark_key(client), schema.MARK.encode(mark))
        txn.set(keys.reply_age_key(keys.ReplyAge(mark.server, age_ns, client, 0)), b"")


async def _marks_of(txn: Transaction, clients: list[int]) -> dict[int, schema.Mark | None]:
    values = await txn.get_many([keys.mark_key(client) for client in clients])
    marks = [None if value is None else schema.MARK.decode(value) for value in values]
    return dict(zip(clients, marks, strict=True))


def _age_of_mark(client: int, mark: schema.Mark | None) -> keys.ReplyAge | None:
    return None if mark is None else keys.ReplyAge(mark.server, mark.age_ns, client, 0)
