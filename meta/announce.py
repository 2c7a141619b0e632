"""Tells clients which names and attributes have changed, so that they can believe them for long.

Every transaction of this server goes through `Announced`; after its commit, and before its caller
is answered, the keys that it wrote become numbered changes. Clients ask for those behind the last
number that they have (ListenRequest), and wait for the next. Each server announces what it has
committed itself; a client listens to all of them. The numbers begin anew with every life of the
server, and whoever missed some of them is told so: it forgets everything then.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple, TypeVar

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.proto.ids import SECOND
from emberfs.proto.meta_calls import Change, ListenAnswer, ListenRequest
from emberfs.runtime.env import Env

T = TypeVar("T")

KEPT_MAX = 65_536  # changes that are remembered; who lags behind more of them starts anew
ANSWER_MAX = 4096  # changes in one answer
HOLD_MAX_NS = 2 * SECOND

_INODE = keys.Prefix.INODE.value[0]
_ENTRY = keys.Prefix.ENTRY.value[0]
_XATTR = keys.Prefix.XATTR.value[0]


class _Noted(NamedTuple):
    origin: int  # the client that made the change and knows of it
    change: Change


class Announcer:
    """The last changes of one server, by number."""

    def __init__(self, env: Env) -> None:
        self.life = env.random.getrandbits(63) | 1
        self.last = 0
        self._env = env
        self._kept: deque[_Noted] = deque(maxlen=KEPT_MAX)
        self._more = asyncio.Event()  # set and replaced with every change

    def note(self, written: Iterable[bytes], origin: int) -> None:
        """Number what the keys of a commit mean to clients."""
        before = self.last
        for key in written:
            change = change_of(key)
            if change is not None:
                self.last += 1
                self._kept.append(_Noted(origin, change))
        if self.last != before:
            self._more.set()
            self._more = asyncio.Event()

    async def listen(self, request: ListenRequest) -> ListenAnswer:
        """Answer with what comes behind `after`, soon or when the time is up."""
        if request.life != self.life:
            return ListenAnswer(self.life, self.last, missed=True, changes=())
        if request.after >= self.last:
            await self._wait(min(request.hold_ns, HOLD_MAX_NS))
        first = self.last - len(self._kept)  # the number before the oldest that is kept
        if request.after < first:
            return ListenAnswer(self.life, self.last, missed=True, changes=())
        begin = request.after - first
        end = min(len(self._kept), begin + ANSWER_MAX)
        noted = (self._kept[at] for at in range(begin, end))
        changes = tuple(one.change for one in noted if one.origin != request.client)
        return ListenAnswer(self.life, first + end, missed=False, changes=changes)

    async def _wait(self, hold_ns: int) -> None:
        try:
            async with asyncio.timeout(hold_ns / SECOND):
                await self._more.wait()
        except TimeoutError:
            pass


def change_of(key: bytes) -> Change | None:
    """Return what a client may have cached of a record, None if nothing."""
    kind = key[0]
    if kind == _INODE:
        return Change(keys.unpack_inode_key(key))
    if kind == _ENTRY:
        return Change(keys.unpack_inode_prefix(key), keys.entry_name(key))
    if kind == _XATTR:
        return Change(keys.unpack_inode_prefix(key))
    return None


class Announced:
    """An engine whose commits are announced."""

    def __init__(self, engine: Engine, announcer: Announcer) -> None:
        self._engine = engine
        self._note = announcer.note
        self.sync = engine.sync
        self.close = engine.close
        self.begin = engine.begin
        self.watch = engine.watch

    @property
    def conflicts(self) -> int:
        """See Engine."""
        return self._engine.conflicts

    async def run(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        read_only: bool = False,
        durable: bool = False,
    ) -> T:
        """See Transactions."""
        if read_only:
            return await self._engine.run(work, read_only=True, durable=durable)
        last: Transaction | None = None

        async def kept(txn: Transaction) -> T:
            nonlocal last
            last = txn
            return await work(txn)

        try:
            result = await self._engine.run(kept, durable=durable)
        except BaseException:
            # It may have taken effect: its answer was lost, its sync has failed, or its caller was
            # cancelled while it waited for that. A change that was none does no harm.
            if last is not None:
                self._note(last.written_keys, 0)
            raise
        if last is not None and last.written_keys:
            self._note(last.written_keys, last.origin)
        return result
