"""Remembered replies: a retried mutating call answers the same and does nothing twice.

The record is written in the transaction of the call itself, so both exist or neither. A call that
failed or had nothing to change leaves no record. Its answer is remembered in memory only, so that a
copy of the request that was held up on its way cannot take effect when the caller has gone on: what
was sent to an earlier life of the server cannot arrive any more.

What was sent to another server can. A call that was tried elsewhere before (its client says so)
leaves a record whatever its outcome is: from then on no copy has an effect, wherever it is. And
when records are forgotten (forgetting.py), a mark remembers for the client up to which call: a copy
that is older than that is refused.
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
from emberfs.meta.forgetting import Forgetting
from emberfs.meta.tenure import Tenure
from emberfs.proto.batch_calls import BATCH_CREATE
from emberfs.proto.errors import Code, EmberfsError, Reaction, code_of
from emberfs.proto.meta_calls import SETTLE, RequestId
from emberfs.proto.method import Method
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.meta.replies")

A = TypeVar("A", bound=msgspec.Struct)
T = TypeVar("T")

# Methods whose answer does not reach the kernel of the client: it hears of them as the others do.
_TOLD_NOBODY = frozenset({SETTLE.number, BATCH_CREATE.number})
FRUITLESS_MAX = 65_536  # answers of calls without effect; the oldest go first
DOUBTS_MAX = 4  # tries of a transaction whose outcome the store does not tell


class _OvertakenError(Exception):
    """A copy of the call has ended without effect meanwhile."""


class Replies:
    """The remembered replies of one file system, as one server keeps them."""

    def __init__(self, env: Env, engine: Engine, tenure: Tenure) -> None:
        self.forgetting = Forgetting(env, engine, tenure)
        self._engine = engine
        # What calls without effect were answered: a failure, or an encoded answer.
        self._fruitless: OrderedDict[bytes, EmberfsError | bytes] = OrderedDict()

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
            value = await self._look(txn, request)
            if value is not None:
                return _recall(method, request, value), True
            if method.number not in _TOLD_NOBODY:
                txn.origin = request.client
            answer = await work(txn)
            if key in self._fruitless:  # its caller has this answer and has gone on
                raise _OvertakenError
            if txn.changes_something:
                self._remember(txn, method, request, method.encode_answer(answer))
                return answer, True
            return answer, False

        try:
            answer, remembered = await self._run(once, durable=durable)
        except _OvertakenError:
            noted = self._fruitless[key]
            if request.elsewhere:
                return await self._end_for_all(method, request, noted)
            return _repeat(method, noted)
        except EmberfsError as problem:
            if problem.reaction != Reaction.GIVE_UP:
                raise
            return await self._end_without_effect(method, request, problem)
        if remembered:
            return answer
        return await self._end_without_effect(method, request, method.encode_answer(answer))

    async def _run(
        self, work: Callable[[Transaction], Awaitable[T]], *, durable: bool = False
    ) -> T:
        """As Engine.run; again when the store does not know what became of it: `work` looks."""
        doubts = 0
        while True:
            try:
                return await self._engine.run(work, durable=durable)
            except EmberfsError as problem:
                doubts += 1
                if problem.code != Code.MAYBE_COMMITTED or doubts == DOUBTS_MAX:
                    raise

    async def _look(self, txn: Transaction, request: RequestId) -> bytes | None:
        """Return the record of a request, if it has one. STALE if that may be forgotten."""
        value, mark = await txn.get_many((_key(request), keys.mark_key(request.client)))
        forgotten = -1 if mark is None else schema.MARK.decode(mark).sequence
        if value is None and request.sequence <= forgotten:
            raise EmberfsError(Code.STALE, "a copy of a call that was answered long ago")
        return value

    def _remember(
        self,
        txn: Transaction,
        method: Method[Any, A],
        request: RequestId,
        answer: EmberfsError | bytes,
    ) -> None:
        if isinstance(answer, EmberfsError):
            reply = schema.Reply(method.number, answer.message.encode(), answer.code)
        else:
            reply = schema.Reply(method.number, answer)
        txn.set(_key(request), schema.REPLY.encode(reply))
        txn.set(self.forgetting.age_of(request.client, request.sequence), b"")

    async def _end_without_effect(
        self, method: Method[Any, A], request: RequestId, answer: EmberfsError | bytes
    ) -> A:
        """From here on no copy of the call has an effect; if one had, that is the answer."""
        if request.elsewhere:
            return await self._end_for_all(method, request, answer)
        key = _key(request)
        if key not in self._fruitless:
            self._note(key, answer)

        async def recall(txn: Transaction) -> bytes | None:
            return await txn.get(key)

        value = await self._engine.run(recall, read_only=True)
        if value is None:
            return _repeat(method, self._fruitless.get(key, answer))
        self._fruitless.pop(key, None)
        return _recall(method, request, value)

    async def _end_for_all(
        self, method: Method[Any, A], request: RequestId, answer: EmberfsError | bytes
    ) -> A:
        """As above, at all servers."""

        async def record(txn: Transaction) -> bytes | None:
            value = await txn.get(_key(request))
            if value is None:
                self._remember(txn, method, request, answer)
            return value

        value = await self._run(record)
        if value is not None:
            return _recall(method, request, value)
        return _repeat(method, answer)

    def _note(self, key: bytes, answer: EmberfsError | bytes) -> None:
        self._fruitless[key] = answer
        if len(self._fruitless) > FRUITLESS_MAX:
            self._fruitless.popitem(last=False)

    async def is_known(self, txn: Transaction, request: RequestId) -> bool:
        """Tell whether this request was answered before: what comes now is a late copy of it."""
        try:
            return await self._look(txn, request) is not None
        except EmberfsError:
            return True


def _key(request: RequestId) -> bytes:
    return keys.reply_key(request.client, request.sequence)


def _recall(method: Method[Any, A], request: RequestId, value: bytes) -> A:
    reply = schema.REPLY.decode(value)
    if reply.method != method.number:
        raise EmberfsError(
            Code.INVALID,
            f"request {request.client}/{request.sequence} was used before for another method",
        )
    if reply.code:
        raise EmberfsError(code_of(reply.code), reply.body.decode(errors="replace"))
    return method.decode_answer(reply.body)


def _repeat(method: Method[Any, A], answer: EmberfsError | bytes) -> A:
    if isinstance(answer, EmberfsError):
        raise EmberfsError(answer.code, answer.message)
    return method.decode_answer(answer)
