"""A server of keys that fails on purpose: refusals, lost answers, commits that arrive late."""

import asyncio
import random
from collections.abc import Sequence

from emberfs.kv.backend import AwayError, Limits
from emberfs.kv.history import ReadSet, WriteSet
from emberfs.kv.memory import MemoryStore
from emberfs.kv.remote import RemoteEngine
from emberfs.kv.store import Row
from emberfs.kv.transaction import Engine
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.real import RealEnv


class FaultyBackend:
    """The engine of this process behind a bad network. Fits kv.backend.Backend."""

    limits = Limits(2048, 1 << 20, 4 << 20, 4000)

    def __init__(self, faults: float = 0.0, seed: int = 1) -> None:
        self.dice = random.Random(seed)
        self.faults = faults  # share of calls that fail
        self.engine = Engine(RealEnv(), MemoryStore())
        self.injected: dict[str, int] = {}
        self.down = False  # nothing arrives
        self.late: list[asyncio.Task[None]] = []
        self.changed = asyncio.Event()

    async def open(self) -> None:
        self.meet("away", AwayError("injected"))

    def attempt(self, *, read_only: bool) -> "FaultyAttempt":
        return FaultyAttempt(self)

    def happens(self, what: str, share: float = 1.0) -> bool:
        if self.dice.random() >= self.faults * share:
            return False
        self.injected[what] = self.injected.get(what, 0) + 1
        return True

    def meet(self, what: str, problem: EmberfsError, share: float = 1.0) -> None:
        if self.down:
            raise AwayError("down")
        if self.happens(what, share):
            raise problem

    async def await_write(self, key: bytes, version: int) -> None:
        await asyncio.sleep(0.001)

    async def close(self) -> None:
        await asyncio.gather(*self.late)
        await self.engine.close()


class FaultyAttempt:
    """Fits kv.backend.Attempt."""

    def __init__(self, backend: FaultyBackend) -> None:
        self._backend = backend
        self._txn = backend.engine.begin()
        self._held = False  # a late commit still needs it

    @property
    def version(self) -> int:
        return self._txn._version

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        await asyncio.sleep(0)
        self._backend.meet("away", AwayError("injected"), 0.2)
        return await self._txn.get_many(keys, snapshot=True)

    async def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool) -> list[Row]:
        await asyncio.sleep(0)
        self._backend.meet("away", AwayError("injected"), 0.2)
        return await self._txn.get_range(start, stop, limit, reverse, snapshot=True)

    async def finish(self) -> None:
        pass

    def _apply(self, read: ReadSet, written: WriteSet) -> int:
        if not self._txn._viewing:
            self._txn._begin()
        read = ReadSet(self._txn._version, read.keys, read.ranges)
        return self._backend.engine.apply(read, written)

    async def commit(self, read: ReadSet, written: WriteSet) -> int:
        await asyncio.sleep(0)
        backend = self._backend
        backend.meet("away", AwayError("injected"))
        backend.meet("conflict", EmberfsError(Code.CONFLICT, "injected"))
        backend.meet("too old", EmberfsError(Code.TOO_OLD, "injected"))
        if not backend.happens("maybe"):
            return self._apply(read, written)
        if backend.dice.random() < 0.5:
            self._apply(read, written)
            backend.happens("committed all the same", 1 / backend.faults)
        elif backend.dice.random() < 0.7:
            if not self._txn._viewing:
                self._txn._begin()
            self._held = True
            backend.late.append(asyncio.ensure_future(self._arrive_late(read, written)))
        raise EmberfsError(Code.MAYBE_COMMITTED, "injected")

    async def _arrive_late(self, read: ReadSet, written: WriteSet) -> None:
        await asyncio.sleep(self._backend.dice.random() * 0.01)
        try:
            self._apply(read, written)
            self._backend.injected["late"] = self._backend.injected.get("late", 0) + 1
        except EmberfsError:
            pass  # it was fenced off, as it must be
        self._held = False
        self.cancel()

    def cancel(self) -> None:
        if not self._held:
            self._txn.cancel()


def faulty_engine(faults: float, seed: int = 1, patience_s: float = 15) -> RemoteEngine:
    backend = FaultyBackend(faults, seed)
    return RemoteEngine(RealEnv(), backend, patience_ns=int(patience_s * 1e9))
