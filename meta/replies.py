"""Remembered replies: a retried mutating call answers the same and does nothing twice.

The record is written in the transaction of the call itself, so both exist or neither. A call that
failed or had nothing to change leaves no record. Its answer is remembered in memory only, so that a
copy of the request that was held up on its way cannot take effect when the caller has gone on: what
was sent to an earlier life of the server cannot arrive any more.
"""

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.meta import schema
from emberfs.proto.errors import Code, EmberfsError, Reaction
from emberfs.proto.ids import SECOND
from emberfs.proto.meta_calls import SETTLE, RequestId
from emberfs.proto.method import Method
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.meta.replies")

A = TypeVar("A", bound=msgspec.Struct)

KEPT_NS = 600 * SECOND
SWEEP_NS = 15 * SECOND
BATCH_ROWS = 512
# Methods whose answer does not reach the kernel of the client: it hears of them as the others do.
_TOLD_NOBODY = frozenset({SETTLE.number})
FRUITLESS_MAX = 65_536  # answers of calls without effect; the oldest go first


class _OvertakenError(Exception):
    """A copy of the call has ended without effect meanwhile."""


class Replies:
    """The remembered replies of one file system.

    Their age is measured on a clock that only runs while a server does and never steps: it
    continues from the youngest record. A wrong time of day cannot make them forgotten.
    """

    def __init__(self, env: Env, engine: Engine) -> None:
        self._env = env
        self._engine = engine
        self._base_ns = -env.now_ns()
        self._swept = b""  # nothing older is left: saves scanning over deleted rows
        # What calls without effect were answered: a failure, or an encoded answer.
        self._fruitless: OrderedDict[RequestId, EmberfsError | bytes] = OrderedDict()

    async def load(self) -> None:
        """Continue the clock of the records in the store."""
        span = keys.span_of(keys.Prefix.REPLY_AGE.value)

        async def youngest(txn: Transaction) -> int:
            rows = await txn.get_range(*span, limit=1, reverse=True)
            return keys.unpack_reply_age_key(rows[0][0])[0] if rows else 0

        self._base_ns = await self._engine.run(youngest, read_only=True) - self._env.now_ns()

    def _now_ns(self) -> int:
        return self._base_ns + self._env.now_ns()

    async def run(
        self,
        method: Method[Any, A],
        request: RequestId,
        work: Callable[[Transaction], Awaitable[A]],
        *,
        durable: bool = False,
    ) -> A:
        """Run `work` in a transaction unless this request was answered before."""
        key = _key(request)

        async def once(txn: Transaction) -> tuple[A, bool]:
            value = await txn.get(key)
            if value is not None:
                return _recall(method, request, value), True
            if method.number not in _TOLD_NOBODY:
                txn.origin = request.client
            answer = await work(txn)
            if request in self._fruitless:  # its caller has this answer and has gone on
                raise _OvertakenError
            if txn.changes_something:
                reply = schema.Reply(method.number, method.encode_answer(answer))
                txn.set(key, schema.REPLY.encode(reply))
                age = keys.reply_age_key(self._now_ns(), request.client, request.sequence)
                txn.set(age, b"")
                return answer, True
            return answer, False

        try:
            answer, remembered = await self._engine.run(once, durable=durable)
        except _OvertakenError:
            return _repeat(method, self._fruitless[request])
        except EmberfsError as problem:
            if problem.reaction != Reaction.GIVE_UP:
                raise
            return await self._end_without_effect(method, request, problem)
        if remembered:
            return answer
        return await self._end_without_effect(method, request, method.encode_answer(answer))

    async def _end_without_effect(
        self, method: Method[Any, A], request: RequestId, answer: EmberfsError | bytes
    ) -> A:
        """From here on no copy of the call has an effect; if one had, that is the answer."""
        if request not in self._fruitless:
            self._note(request, answer)

        async def recall(txn: Transaction) -> bytes | None:
            return await txn.get(keys.reply_key(request.client, request.sequence))

        value = await self._engine.run(recall, read_only=True)
        if value is None:
            return _repeat(method, self._fruitless.get(request, answer))
        self._fruitless.pop(request, None)
        return _recall(method, request, value)

    def _note(self, request: RequestId, answer: EmberfsError | bytes) -> None:
        self._fruitless[request] = answer
        if len(self._fruitless) > FRUITLESS_MAX:
            self._fruitless.popitem(last=False)

    async def is_known(self, txn: Transaction, request: RequestId) -> bool:
        """Tell whether this request was answered before: what comes now is a late copy of it."""
        return await txn.get(_key(request)) is not None

    async def sweep(self, kept_ns: int = KEPT_NS) -> int:
        """Forget one batch of replies older than `kept_ns`; returns how many."""
        start, stop = keys.reply_age_span(max(0, self._now_ns() - kept_ns))
        start = max(start, self._swept)

        async def forget(txn: Transaction) -> list[bytes]:
            rows = await txn.get_range(start, stop, limit=BATCH_ROWS, snapshot=True)
            for key, _ in rows:
                _, client, sequence = keys.unpack_reply_age_key(key)
                txn.clear(key)
                txn.clear(keys.reply_key(client, sequence))
            return [key for key, _ in rows]

        gone = await self._engine.run(forget)
        if gone:
            self._swept = gone[-1]
        return len(gone)

    async def live(self) -> None:
        """Sweep for ever, in small batches, so that callers hardly notice."""
        while True:
            await self._env.sleep_ns(SWEEP_NS)
            try:
                while await self.sweep() == BATCH_ROWS:
                    await self._env.sleep_ns(SECOND // 100)
            except EmberfsError as problem:
                log.warning("cannot forget old replies: %s", problem)


def _key(request: RequestId) -> bytes:
    return keys.reply_key(request.client, request.sequence)


def _recall(method: Method[Any, A], request: RequestId, value: bytes) -> A:
    reply = schema.REPLY.decode(value)
    if reply.method != method.number:
        raise EmberfsError(
            Code.INVALID,
            f"request {request.client}/{request.sequence} was used before for another method",
        )
    return method.decode_answer(reply.body)


def _repeat(method: Method[Any, A], answer: EmberfsError | bytes) -> A:
    if isinstance(answer, EmberfsError):
        raise EmberfsError(answer.code, answer.message)
    return method.decode_answer(answer)
