"""What the clients of a simulation with a metadata server do: names by everybody, files by owners.

Every client process has three lanes: one changes a tiny tree in which all clients meet
(names_lane.py), one writes files of its own and reads those of all (file_lane.py), one writes a
small file together with all others (share_lane.py). They go through the file library; the calls
below it are recorded as well.
"""

import asyncio
import random
from typing import NamedTuple

from emberfs.client.file import FileSystem
from emberfs.proto.ids import MS
from emberfs.proto.meta_calls import Caller
from sim.check_lives import Cut
from sim.cluster import World
from sim.file_lane import FileLane
from sim.history import History
from sim.machine import Machine
from sim.names_lane import NamesLane
from sim.names_record import record_calls
from sim.share_lane import ShareLane
from sim.workload import LAST_READERS

PAUSE_NS = 250 * MS  # on average, between the operations of one lane
ROOT = Caller(0, 0)


class Via(NamedTuple):
    """How a file operation was made."""

    life: int  # number of the client process
    opened: int  # number of the operation that opened the file
    direct: bool = False


class FilesLoad:
    """Runs the clients until `stop`; their history is in `history`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.history = History()
        self.requests: dict[int, tuple[int, int]] = {}  # request ids, by number of the operation
        self.via: dict[int, Via] = {}  # by number of the operation
        self.cuts: list[Cut] = []  # power cuts of the metadata server
        self.lives: dict[int, int] = {}  # client id -> number of the life
        self.stopping = False
        self.errors: list[tuple[int, str]] = []  # what clients were told: when, what
        self.pause_ns = PAUSE_NS
        self.hot_share = self.sweep_share = 0.0
        self.cut_ns = 0
        self._dice = world.dice_of("load")
        self._count = 0
        self._lanes: list[tuple[Machine, int, asyncio.Task[None]]] = []

    def now_ns(self) -> int:
        """Virtual time."""
        return self.world.loop.now_ns()

    def note(self, what: str) -> None:
        """A client was told an error that no correct program expects."""
        self.errors.append((self.now_ns(), what))

    def start(self, index: int) -> None:
        """Let a client work; to be called whenever its process was started."""
        machine = self.world.clients[index]
        process = machine.process
        assert process is not None
        dice = random.Random(self._dice.random())
        task = process.context.run(self.world.loop.create_task, self._work(machine, index, dice))
        self._lanes.append((machine, machine.lives, task))

    async def _work(self, machine: Machine, index: int, dice: random.Random) -> None:
        fs, number = await self.open(machine)
        names = NamesLane(self, fs, random.Random(dice.random()))
        files = FileLane(self, number, index, fs, random.Random(dice.random()))
        share = ShareLane(self, number, index, fs, random.Random(dice.random()))
        await asyncio.gather(names.run(), files.run(), share.run())

    async def open(self, machine: Machine, last: int = -1) -> tuple[FileSystem, int]:
        """Return the file library of a client process, recorded, and the number of its life."""
        while machine.service is None:
            await asyncio.sleep(0.05)
        cluster = machine.service
        if cluster.client_id in self.lives:
            return FileSystem(cluster, ROOT, 0o022), self.lives[cluster.client_id]
        self._count += 1
        number = self.lives[cluster.client_id] = self._count
        record_calls(cluster.metadata, self.history, number, self.requests, self.now_ns, self.note)
        return FileSystem(cluster, ROOT, 0o022), number

    def working(self) -> list[str]:
        """Living clients whose lanes have not come to their end."""
        return [
            machine.name
            for machine, life, task in self._lanes
            if machine.running and machine.lives == life and not task.done()
        ]

    def failures(self) -> list[str]:
        """What lanes died of: a fault of the load itself."""
        return [
            f"{machine.name}: {task.exception()!r}"
            for machine, _, task in self._lanes
            if task.done() and not task.cancelled() and task.exception() is not None
        ]

    async def read_all(self, index: int) -> None:
        """Look at every name and read every file; at the end of a simulation."""
        machine = self.world.clients[index]
        process = machine.process
        assert process is not None

        async def everything() -> None:
            fs, _ = await self.open(machine)
            lane = FileLane(self, LAST_READERS + index, index, fs, self._dice)
            await lane.walk("/")

        await process.context.run(self.world.loop.create_task, everything())
