"""A client whose every operation a script decides; recorded like the load's."""

from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from emberfs.client.chunkread import jobs_of
from emberfs.client.chunkwrite import Update
from emberfs.client.unflushed import Unflushed
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import Layout
from emberfs.proto.ids import CHUNK_BYTES_MIN, SECOND, ChainId, InodeId, NodeId, pack_chunk_id
from emberfs.proto.storage_calls import UpdateKind
from sim.check_durable import LOST
from sim.cluster import World
from sim.history import PERFORMED, Key, Op
from sim.machine import Machine
from sim.stamps import stamp_fill
from sim.workload import Place, Workload, flush_place

T = TypeVar("T")

HAND_INODE = 5000


class _LostError(Exception):
    """A flush has told that changes before it may be gone."""


class Hand:
    """See the module. Outcomes are those of history.py."""

    def __init__(self, world: World, load: Workload, machine: Machine, number: int) -> None:
        self.machine = machine
        self._world = world
        self._load = load
        self._number = number
        self._unflushed: defaultdict[Key, Unflushed] = defaultdict(Unflushed)

    def place(self, number: int = 0, chain: int = 1) -> Place:
        """Return a chunk that the load does not use."""
        inode = InodeId(HAND_INODE + number)
        return Place(("chunk", inode), inode, Layout(CHUNK_BYTES_MIN, (ChainId(chain),)), -1)

    async def write(self, place: Place, offset: int, length: int, timeout_s: float = 30) -> str:
        """Write and record; the outcome."""
        stamp = self._load.history.next_stamp()
        data = stamp_fill(stamp, offset, length)
        op = self._begin("write", place, offset, length, data, stamp)
        return await self._change(op, place, lambda io: io.write(
            place.inode, place.layout, offset, memoryview(data), timeout_ns=int(timeout_s * SECOND)
        ))  # fmt: skip

    async def _change(self, op: Op, place: Place, call: Callable[[Any], Awaitable[Any]]) -> str:
        async def work(io: Any) -> None:
            self._unflushed[place.key].note(await call(io))

        return await self._end(op, work)

    async def truncate(self, place: Place, size: int, timeout_s: float = 30) -> str:
        """Truncate and record; the outcome."""
        op = self._begin("truncate", place, size)
        return await self._change(op, place, lambda io: io.truncate_chunk(
            place.inode, place.layout, 0, size, int(timeout_s * SECOND)
        ))  # fmt: skip

    async def remove(self, place: Place, timeout_s: float = 30) -> str:
        """Remove by one update and record; the outcome."""
        op = self._begin("remove", place)
        chunk = pack_chunk_id(place.inode, 0)
        update = Update(place.layout.chains[0], chunk, UpdateKind.REMOVE, 0, 0, CHUNK_BYTES_MIN)
        return await self._change(op, place, lambda io: io._perform(
            [update], int(timeout_s * SECOND)
        ))  # fmt: skip

    async def read(self, place: Place, timeout_s: float = 30, at: Machine | None = None) -> str:
        """Read a chunk whole and record; the outcome. `at`: whom to ask first."""
        sink = memoryview(bytearray(CHUNK_BYTES_MIN))
        op = self._begin("read", place, 0, CHUNK_BYTES_MIN)

        async def call(io: Any) -> None:
            jobs = jobs_of(place.inode, place.layout, 0, sink)
            if at is not None:
                jobs[0].spread = self._turn_of(place, at)
            await io._reader.read(jobs, int(timeout_s * SECOND))

        return await self._end(op, call, sink)

    async def flush(self, place: Place, timeout_s: float = 30) -> str:
        """Make the chain of a place stable and record; the outcome."""
        op = self._begin("flush", place)

        async def work(io: Any) -> None:
            if await flush_place(io, place, self._unflushed, int(timeout_s * SECOND)):
                raise _LostError

        return await self._end(op, work)

    def _turn_of(self, place: Place, machine: Machine) -> int:
        """Return the position of a machine's replica, as this client knows the chain."""
        node = NodeId(10 + self._world.storage.index(machine) + 1)
        chain = self.machine.service.routing.snapshot.chains[place.layout.chains[0]]
        return [member.node for member in chain.targets].index(node)

    def _begin(
        self,
        kind: str,
        place: Place,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        stamp: int = 0,
    ) -> Op:
        now_ns = self._world.loop.now_ns()
        return self._load.history.begin(
            self._number, kind, place.key, offset, length, now_ns, data, stamp
        )

    async def _end(
        self, op: Op, call: Callable[[Any], Awaitable[Any]], sink: memoryview | None = None
    ) -> str:
        outcome, result = "ok", ""
        try:
            await self._inside(op, call)
        except EmberfsError as problem:
            outcome = "fail" if sink is not None else "unknown"
            result = problem.code.name
            self._load.errors.append((self._world.loop.now_ns(), f"{op.kind}: {problem}"))
        except _LostError:
            outcome, result = "unknown", LOST
            self._load.errors.append((self._world.loop.now_ns(), "flush: something is lost"))
        data = bytes(sink) if sink is not None and outcome == "ok" else b""
        self._load.history.end(op, self._world.loop.now_ns(), outcome, data, result=result)
        return outcome

    async def _inside(self, op: Op, call: Callable[[Any], Awaitable[T]]) -> T:
        """Run in the client's process."""
        process = self.machine.process
        assert process is not None

        async def work() -> T:
            PERFORMED.set(op)
            return await call(self.machine.service.chunkio)

        return await process.context.run(self._world.loop.create_task, work())
