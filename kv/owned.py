"""One metadata server at a time on a store that many processes can reach.

A server keeps things in its memory that another would not know. So it claims the store: a row holds
the token of its life, and every writing transaction depends on it. Whatever an earlier life has
still on its way then fails. A second row is renewed while the owner lives; whoever sees it renewed
does not claim. An owner that was silent for a lease is replaced, and finds out at its next write.
"""

import logging
import struct
from collections.abc import Awaitable, Callable
from typing import TypeVar

from emberfs.kv.keys import OWNER_KEY
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.kv.owned")

T = TypeVar("T")

LEASE_NS = 4 * SECOND
BEAT_NS = 1 * SECOND
LOOK_NS = 250 * MS
BEAT_KEY = OWNER_KEY + b"beat"

_OWNER = struct.Struct(">16sI")  # token, node
_BEAT = struct.Struct(">Q")


class OwnedEngine:
    """The owner's way to the store. Fits transactions.Engine."""

    def __init__(self, env: Env, engine: Engine, node: int) -> None:
        self._env = env
        self._engine = engine
        self._owner = _OWNER.pack(env.random.getrandbits(128).to_bytes(16, "big"), node)
        self._beats = 0
        self.lost = False

    @property
    def conflicts(self) -> int:
        """See Engine."""
        return self._engine.conflicts

    async def claim(self) -> None:
        """Become the owner. EmberfsError(CONFIG) if another one lives."""
        began_ns = self._env.now_ns()
        first = await self._engine.run(_read, read_only=True)
        found = first
        while found[0] is not None:
            if found != first:
                node = _OWNER.unpack(found[0])[1]
                raise EmberfsError(
                    Code.CONFIG,
                    f"metadata server {node} is using this store; stop it first, or give this one "
                    'another "store"',
                )
            if self._env.now_ns() - began_ns > LEASE_NS:
                break
            await self._env.sleep_ns(LOOK_NS)
            found = await self._engine.run(_read, read_only=True)

        async def take(txn: Transaction) -> bool:
            if await _read(txn) != found:
                return False
            txn.set(OWNER_KEY, self._owner)
            txn.set(BEAT_KEY, _BEAT.pack(0))
            return True

        if not await self._engine.run(take, durable=True):
            raise EmberfsError(
                Code.CONFIG, "another metadata server has claimed this store at the same time"
            )

    async def live(self) -> None:
        """Renew until another has taken over; then return."""
        while not self.lost:
            await self._env.sleep_ns(BEAT_NS)
            self._beats += 1
            beats = self._beats

            async def beat(txn: Transaction, beats: int = beats) -> None:
                txn.set(BEAT_KEY, _BEAT.pack(beats))

            try:
                await self.run(beat)
            except EmberfsError as problem:
                log.warning("the claim on the store cannot be renewed: %s", problem)

    async def release(self) -> None:
        """Let the next one in at once."""

        async def leave(txn: Transaction) -> None:
            txn.clear(OWNER_KEY)
            txn.clear(BEAT_KEY)

        try:
            await self.run(leave)
        except EmberfsError as problem:
            log.info("the claim on the store is left to run out: %s", problem)

    async def run(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        read_only: bool = False,
        durable: bool = False,
    ) -> T:
        """See Engine. SHUTTING_DOWN once another has taken over."""
        if self.lost:
            raise self._deposed()
        if read_only:
            return await self._engine.run(work, read_only=True)

        async def owned(txn: Transaction) -> T:
            if await txn.get(OWNER_KEY) != self._owner:
                self.lost = True
                raise self._deposed()
            return await work(txn)

        return await self._engine.run(owned, durable=durable)

    def begin(self, *, read_only: bool = False) -> Transaction:
        """See Engine. Not for writing: it would not depend on the claim."""
        assert read_only, "a writing transaction of an owner is made by run"
        return self._engine.begin(read_only=True)

    async def watch(self, key: bytes, seen: bytes | None) -> bytes | None:
        """See Engine."""
        return await self._engine.watch(key, seen)

    async def sync(self) -> None:
        """See Engine."""
        await self._engine.sync()

    async def close(self) -> None:
        """See Engine."""
        await self._engine.close()

    def _deposed(self) -> EmberfsError:
        return EmberfsError(
            Code.SHUTTING_DOWN, "another metadata server has taken over the store of this one"
        )


async def _read(txn: Transaction) -> tuple[bytes | None, bytes | None]:
    owner, beat = await txn.get_many([OWNER_KEY, BEAT_KEY])
    return owner, beat
