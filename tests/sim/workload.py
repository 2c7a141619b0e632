"""What the clients of a simulation do: small reads and writes of a few hot chunks, recorded.

Shared keys are written by everybody; of an owned key one client alone is the writer, and it also
truncates and removes. Reads come from everybody.
"""

import asyncio
import random
from collections import defaultdict
from typing import NamedTuple

from emberfs.client.chunkio import ChunkIO
from emberfs.client.chunkread import jobs_of
from emberfs.client.cluster import Cluster
from emberfs.client.unflushed import Unflushed
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import Layout
from emberfs.proto.ids import CHUNK_BYTES_MIN, MS, SECOND, ChainId, InodeId, KiB
from sim.check_durable import LOST
from sim.cluster import World
from sim.history import History, Key
from sim.machine import Machine
from sim.stamps import stamp_fill

TIMEOUT_NS = 15 * SECOND
PAUSE_NS = 150 * MS  # on average, between the operations of one client
HOT_BYTES = 12 * KiB
FIRST_INODE = 1000
LAST_READERS = 1000  # client numbers from here on read everything at the end


class Place(NamedTuple):
    """A chunk that the clients use."""

    key: Key
    inode: InodeId
    layout: Layout
    owner: int  # index of the only writer; -1: all write


def places(chains: int, clients: int) -> list[Place]:
    """Two shared chunks and an owned one per chain."""
    found = []
    for number in range(3 * chains):
        inode = InodeId(FIRST_INODE + number)
        layout = Layout(CHUNK_BYTES_MIN, (ChainId(number % chains + 1),))
        owner = -1 if number < 2 * chains else number % clients
        found.append(Place(("chunk", inode), inode, layout, owner))
    return found


class Workload:
    """Runs the clients until `stop`; their history is in `history`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.history = History()
        self.places = places(world.shape.chains, world.shape.clients)
        self.stopping = False
        self.timeout_ns = TIMEOUT_NS
        self.cut_ns = 0  # when the power of all storage failed; 0: never
        self.errors: list[tuple[int, str]] = []  # what clients were told: when, what
        self.pause_ns = PAUSE_NS
        self.hot_share = 0.0  # of the operations that go to the first place
        self.sweep_share = 0.0  # of the changes after which every replica is read
        self._dice = world.dice_of("load")
        self._clients = 0

    def start(self, index: int) -> None:
        """Let a client work; to be called whenever its process was started."""
        machine = self.world.clients[index]
        process = machine.process
        assert process is not None
        dice = random.Random(self._dice.random())
        process.context.run(self.world.loop.create_task, self._work(machine, index, dice))

    async def _work(self, machine: Machine, index: int, dice: random.Random) -> None:
        while machine.service is None:
            await asyncio.sleep(0.05)
        self._clients += 1
        one = _Client(self, self._clients, index, machine.service, dice)
        lanes = [one.lane(), one.lane(), one.reads()]
        await asyncio.gather(*lanes)

    def choose(self, dice: random.Random) -> Place:
        """Return where the next operation goes."""
        if self.hot_share and dice.random() < self.hot_share:
            return self.places[0]
        return dice.choice(self.places)

    async def read_all(self, index: int) -> None:
        """Read every chunk as a whole; at the end of a simulation."""
        machine = self.world.clients[index]
        process = machine.process
        assert process is not None
        while machine.service is None:
            await asyncio.sleep(0.05)
        one = _Client(self, LAST_READERS + index, index, machine.service, self._dice)

        async def all_places() -> None:
            for place in self.places:
                await one.read(place, 0, CHUNK_BYTES_MIN)

        await process.context.run(self.world.loop.create_task, all_places())


class _Client:
    def __init__(
        self, load: Workload, number: int, index: int, cluster: Cluster, dice: random.Random
    ) -> None:
        self._load = load
        self._number = number
        self._index = index
        self._chunkio = cluster.chunkio
        self._dice = dice
        self._history = load.history
        self._loop = load.world.loop
        self._unflushed: defaultdict[Key, Unflushed] = defaultdict(Unflushed)
        self._changing: dict[Key, int] = {}  # changes of an owned key in flight; -1: its removal

    async def lane(self) -> None:
        """One operation after another."""
        while not self._load.stopping:
            await asyncio.sleep(self._dice.expovariate(1e9 / self._load.pause_ns))
            place = self._load.choose(self._dice)
            roll = self._dice.random()
            offset, length = self._range()
            if place.owner not in (-1, self._index) or roll < 0.45:
                await self.read(place, offset, length)
            elif place.owner == -1:
                await self._write(place, offset, length)
            else:
                await self._change_own(place, roll, offset, length)
            if roll >= 0.45 and self._dice.random() < self._load.sweep_share:
                await self._sweep(place, offset, length)
            if self._dice.random() < 0.04:
                await self._flush(place)

    async def _sweep(self, place: Place, offset: int, length: int) -> None:
        """Read what was just changed at one replica after the other."""
        first = self._dice.randrange(3)
        for turn in range(3):
            await self.read(place, offset, length, first + turn)

    async def reads(self) -> None:
        """Only reads: they go on where writes wait for a chain that cannot be reached."""
        while not self._load.stopping:
            await asyncio.sleep(self._dice.expovariate(1e9 / self._load.pause_ns))
            await self.read(self._load.choose(self._dice), *self._range())

    async def _change_own(self, place: Place, roll: float, offset: int, length: int) -> None:
        """Removing is no single update (it goes on until nothing is listed), so it goes alone."""
        busy = self._changing.get(place.key, 0)
        if roll >= 0.96 and busy == 0:
            busy = self._changing[place.key] = -1
            change = self._remove(place)
        elif busy < 0:
            return
        else:
            self._changing[place.key] = busy + 1
            change = (
                self._truncate(place, offset)
                if roll >= 0.93
                else self._write(place, offset, length)
            )
        try:
            await change
        finally:
            self._changing[place.key] = 0 if busy < 0 else self._changing[place.key] - 1

    def _range(self) -> tuple[int, int]:
        dice = self._dice
        if dice.random() < 0.04:
            return 0, CHUNK_BYTES_MIN
        offset = dice.randrange(HOT_BYTES)
        if dice.random() < 0.5:
            offset -= offset % 4096
        return offset, dice.choice((512, 4096, 4096, dice.randint(8, 8192)))

    async def read(self, place: Place, offset: int, length: int, spread: int = -1) -> None:
        """Read and record; `spread` says which replica is asked first."""
        op = self._history.begin(
            self._number, "read", place.key, offset, length, self._loop.now_ns()
        )
        sink = memoryview(bytearray(b"\xee" * length))  # what nobody fills shows
        try:
            jobs = jobs_of(place.inode, place.layout, offset, sink)
            for job in jobs:  # by itself a client reads a chunk at the same replica each time
                job.spread = spread if spread >= 0 else self._dice.randrange(6)
            await self._chunkio._reader.read(jobs, self._load.timeout_ns)
        except EmberfsError as problem:
            self._note(f"read: {problem}")
            self._history.end(op, self._loop.now_ns(), "fail", result=problem.code.name)
            return
        self._history.end(op, self._loop.now_ns(), "ok", bytes(sink))

    async def _write(self, place: Place, offset: int, length: int) -> None:
        stamp = self._history.next_stamp()
        data = stamp_fill(stamp, offset, length)
        op = self._history.begin(
            self._number, "write", place.key, offset, length, self._loop.now_ns(), data, stamp
        )
        outcome, result = "ok", ""
        try:
            acknowledged = await self._chunkio.write(
                place.inode,
                place.layout,
                offset,
                memoryview(data),
                timeout_ns=self._load.timeout_ns,
            )
            self._unflushed[place.key].note(acknowledged)
        except EmberfsError as problem:
            self._note(f"write: {problem}")
            outcome, result = "unknown", problem.code.name
        self._history.end(op, self._loop.now_ns(), outcome, result=result)

    async def _truncate(self, place: Place, size: int) -> None:
        op = self._history.begin(self._number, "truncate", place.key, size, 0, self._loop.now_ns())
        outcome, result = "ok", ""
        try:
            acknowledged = await self._chunkio.truncate_chunk(
                place.inode, place.layout, 0, size, self._load.timeout_ns
            )
            self._unflushed[place.key].note(acknowledged)
        except EmberfsError as problem:
            self._note(f"truncate: {problem}")
            outcome, result = "unknown", problem.code.name
        self._history.end(op, self._loop.now_ns(), outcome, result=result)

    async def _remove(self, place: Place) -> None:
        op = self._history.begin(self._number, "remove", place.key, 0, 0, self._loop.now_ns())
        outcome, result = "ok", ""
        try:
            acknowledged = await self._chunkio.remove_chunks(
                place.inode, place.layout, 0, self._load.timeout_ns
            )
            self._unflushed[place.key].note(acknowledged)
        except EmberfsError as problem:
            self._note(f"remove: {problem}")
            outcome, result = "unknown", problem.code.name
        self._history.end(op, self._loop.now_ns(), outcome, result=result)

    async def _flush(self, place: Place) -> None:
        op = self._history.begin(self._number, "flush", place.key, 0, 0, self._loop.now_ns())
        outcome, result = "ok", ""
        try:
            if await flush_place(self._chunkio, place, self._unflushed, self._load.timeout_ns):
                self._note("flush: what was not flushed is lost")
                outcome, result = "unknown", LOST
        except EmberfsError as problem:
            self._note(f"flush: {problem}")
            outcome, result = "unknown", problem.code.name
        self._history.end(op, self._loop.now_ns(), outcome, result=result)

    def _note(self, what: str) -> None:
        self._load.errors.append((self._loop.now_ns(), what))


async def flush_place(
    chunkio: ChunkIO, place: Place, unflushed: defaultdict[Key, Unflushed], timeout_ns: int
) -> bool:
    """Flush as an open file does (client/filestate.py); True if changes before it may be gone."""
    mine = unflushed[place.key]
    covered = mine.now()
    lost = await chunkio.flush(place.layout.chains, timeout_ns)
    return mine.flushed(covered, lost)
