"""The store that several metadata servers share: on a machine of its own, behind the network.

Fault model: every reading and every commit is a message and its answer, either of which may be late
or lost. Commits are strictly serializable and on stable storage before they are answered. A commit
whose answer does not come has happened or not, and its transaction fails with MAYBE_COMMITTED; with
`maybe_share` that is said of any commit, half of which have happened. It never happens later.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from emberfs.kv.memory import MemoryStore
from emberfs.kv.store import Row
from emberfs.kv.transaction import Engine, Transaction
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND
from emberfs.runtime.retry import Backoff
from sim.machine import Machine, SimEnv
from sim.network import remote
from sim.tap import ROWS

if TYPE_CHECKING:
    from sim.cluster import World

T = TypeVar("T")

STORE = "/rows"
TIMEOUT_NS = 2 * SECOND
TRIES_MAX = 50
RETRYABLE = (Code.CONFLICT, Code.TOO_OLD)


class SharedRows:
    """What runs on the machine of the store: the engine of its present life."""

    def __init__(self, env: SimEnv, rows: MemoryStore) -> None:
        self.rows = rows
        self.engine = Engine(env, rows)


class SharedTransaction:
    """See Transaction. `inner` lies at the store; own writes reach it with the commit."""

    def __init__(self, engine: "SharedEngine", *, read_only: bool) -> None:
        self._engine = engine
        self._read_only = read_only
        self._rows: SharedRows | None = None
        self._inner: Transaction | None = None
        self._given_up = False

    def __getattr__(self, name: str) -> Any:
        """Writing needs no message before the commit."""
        return getattr(self._begun(), name)

    def _begun(self) -> Transaction:
        if self._inner is None:
            rows = self._engine.world.rows.service
            if rows is None:
                raise EmberfsError(Code.UNREACHABLE, "the store starts")
            self._rows, self._inner = rows, rows.engine.begin(read_only=self._read_only)
        return self._inner

    async def _there(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        async def perform() -> T:
            inner = self._begun()
            if self._rows is not self._engine.world.rows.service or self._given_up:
                raise EmberfsError(Code.CONFLICT, "the store was started anew")
            return await work(inner)

        return await self._engine.ask(perform)

    async def get(self, key: bytes, snapshot: bool = False) -> bytes | None:
        """See Transaction."""
        return await self._there(lambda inner: inner.get(key, snapshot))

    async def get_many(self, keys: Sequence[bytes], snapshot: bool = False) -> list[bytes | None]:
        """See Transaction."""
        return await self._there(lambda inner: inner.get_many(keys, snapshot))

    async def get_range(
        self,
        start: bytes,
        stop: bytes,
        limit: int = 0,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[Row]:
        """See Transaction."""
        return await self._there(
            lambda inner: inner.get_range(start, stop, limit, reverse, snapshot)
        )

    async def commit(self) -> int:
        """See Transaction."""
        inner, engine = self._inner, self._engine
        if inner is None or not inner.changes_something:
            return 0
        network = engine.world.network
        doubtful = network.dice.random() < engine.world.maybe_share
        if doubtful:
            network.counts["maybe committed"] += 1
        if doubtful and network.dice.random() < 0.5:
            raise EmberfsError(Code.MAYBE_COMMITTED, "nobody knows; it has not")

        async def apply(inner: Transaction) -> int:
            version = inner.commit_now()
            assert self._rows is not None
            self._rows.rows.sync()
            return version

        try:
            version = await self._there(apply)
        except EmberfsError as problem:
            if problem.code != Code.UNREACHABLE:
                raise
            self._given_up = True
            raise EmberfsError(Code.MAYBE_COMMITTED, "no answer of the store") from None
        if doubtful:
            raise EmberfsError(Code.MAYBE_COMMITTED, "nobody knows; it has")
        return version

    def cancel(self) -> None:
        """See Transaction."""
        self._given_up = True
        if self._inner is not None:
            self._inner.cancel()


class SharedEngine:
    """See kv.transactions.Engine: one metadata server's way to the store."""

    def __init__(self, world: "World", machine: Machine, env: SimEnv) -> None:
        self.world = world
        self.conflicts = 0
        self._machine = machine
        self._env = env
        assert machine.process is not None
        self._alive: set[SharedTransaction] = set()
        machine.process.watchers.append(self._forget)

    def _forget(self) -> None:
        for transaction in list(self._alive):
            transaction.cancel()

    async def ask(self, work: Callable[[], Awaitable[T]]) -> T:
        """Have something done at the store. UNREACHABLE if it does not answer."""
        world, there = self.world, self.world.rows
        return await remote(
            world.network,
            self._machine.name,
            there.name,
            lambda: there.process,
            work,
            TIMEOUT_NS,
            ROWS,
        )

    def begin(self, *, read_only: bool = False) -> Any:
        """See Engine."""
        return SharedTransaction(self, read_only=read_only)

    async def run(
        self,
        work: Callable[[Any], Awaitable[T]],
        *,
        read_only: bool = False,
        durable: bool = False,
    ) -> T:
        """See Engine."""
        backoff = Backoff(1 * MS, 200 * MS)
        for _ in range(TRIES_MAX):
            transaction = SharedTransaction(self, read_only=read_only)
            self._alive.add(transaction)
            try:
                result = await work(transaction)
                await transaction.commit()
                return result
            except EmberfsError as problem:
                if problem.code not in RETRYABLE:
                    raise
                self.conflicts += 1
            finally:
                self._alive.discard(transaction)
                transaction.cancel()
            await self._env.sleep_ns(backoff.next_ns(self._env.random))
        raise EmberfsError(Code.CONFLICT, "a transaction conflicted again and again")

    async def watch(self, key: bytes, seen: bytes | None) -> bytes | None:
        """Nobody here does."""
        raise NotImplementedError

    async def sync(self) -> None:
        """Every commit is on stable storage."""
        await asyncio.sleep(0)

    async def close(self) -> None:
        """Nothing to release here."""
