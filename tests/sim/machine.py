"""A simulated machine: a clock of its own, a disk, and one process at a time."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from emberfs.proto.ids import MS, SECOND, US
from emberfs.runtime.env import Env
from sim.disk import SimDisk
from sim.loop import Process, SimLoop
from sim.network import Network

T = TypeVar("T")

DRIFT_PPM = 200  # clocks of machines run at slightly different speeds
THREAD_NS = (20 * US, 400 * US)
HEIR_NS = (20 * MS, 600 * MS)  # from a death to the moment at which its heir speaks
WALL_NS = 1_700_000_000 * SECOND


class Machine:
    """Where processes run. Faults: kill, pause and resume, power cut, disk faults, clock steps."""

    def __init__(self, name: str, loop: SimLoop, network: Network, dice: random.Random) -> None:
        self.name = name
        self.loop = loop
        self.network = network
        self.dice = dice
        self.disk = SimDisk(random.Random(dice.random()))
        self.process: Process | None = None
        self.service: Any = None  # what runs in the process
        self.boots = 1
        self.lives = 0
        self.drift = 1 + dice.randint(-DRIFT_PPM, DRIFT_PPM) / 1e6
        self.offset_ns = dice.randint(1, 10**6) * SECOND
        self.wall_step_ns = 0
        self.failure: str = ""
        self.will = ""  # of the process, see env.Env.bequeath
        self.heir: Callable[[SimEnv, str], Coroutine[Any, Any, None]] | None = None
        self.heir_share = 0.0  # of the deaths after which the will is carried out
        self.stalled = ""  # name of the disk work that stands still, where a script stops it

    @property
    def running(self) -> bool:
        """Tell whether a process lives here."""
        return self.process is not None and self.process.alive

    def start(self, begin: Callable[["SimEnv"], Coroutine[Any, Any, None]]) -> None:
        """Start a process; `begin` runs in it and keeps `service` up to date."""
        assert not self.running, f"{self.name} runs already"
        self.lives += 1
        self.will = ""
        process = self.process = Process(f"{self.name}.{self.lives}")
        process.watchers.append(lambda: self._died(process))
        env = SimEnv(self, process)

        async def life() -> None:
            try:
                await begin(env)
            except Exception as problem:
                self.failure = f"{process.name}: {problem!r}"
                raise

        process.context.run(self._spawn, life(), process)

    def _spawn(self, work: Coroutine[Any, Any, None], process: Process) -> None:
        task = self.loop.create_task(work, name=process.name)
        task.add_done_callback(lambda t: t.cancelled() or t.exception())

    def _died(self, process: Process) -> None:
        silent = self.name in self.network.down
        self.network.process_died(process, self.name, silent=silent)
        if self.will and self.heir and not silent and self.dice.random() < self.heir_share:
            self._inherit(process, self.heir, self.will)

    def _inherit(
        self,
        dead: Process,
        heir: Callable[["SimEnv", str], Coroutine[Any, Any, None]],
        will: str,
    ) -> None:
        """Carry out the will of a dead process, in one of its own."""
        process = Process(f"{dead.name}.heir")
        env = SimEnv(self, process)

        async def speak() -> None:
            await env.sleep_ns(self.dice.randint(*HEIR_NS))
            await heir(env, will)

        process.context.run(self._spawn, speak(), process)

    def kill(self) -> None:
        """SIGKILL."""
        self.disk.faults.die_after = -1
        if self.process is not None:
            self.process.kill()

    def power_cut(self) -> None:
        """The machine goes down without a word; unsynced data is lost."""
        self.network.down.add(self.name)
        self.kill()
        self.disk.power_cut()
        self.boots += 1

    def power_on(self) -> None:
        """The machine is back, its processes are not."""
        self.network.down.discard(self.name)
        self.network.machine_back(self.name)


class SimEnv:
    """See runtime.env.Env."""

    def __init__(self, machine: Machine, process: Process) -> None:
        self.machine = machine.name
        self.process = process
        self.random = random.Random(machine.dice.random())
        self.boot_id = f"{machine.name}-boot-{machine.boots}"
        self.host_key = machine.name
        self._machine = machine
        self._loop = machine.loop

    @property
    def disk(self) -> SimDisk:
        """The disk of the machine."""
        return self._machine.disk

    def now_ns(self) -> int:
        """Monotonic, at the speed of this machine."""
        return self._machine.offset_ns + int(self._loop.time() * 1e9 * self._machine.drift)

    def wall_ns(self) -> int:
        """May be stepped."""
        return WALL_NS + self._loop.now_ns() + self._machine.wall_step_ns

    async def sleep_ns(self, duration_ns: int) -> None:
        """Pause this task."""
        await asyncio.sleep(duration_ns / 1e9)

    def bequeath(self, module: str, words: str) -> None:
        """See Machine.heir."""
        self._machine.will = words

    async def run_blocking(self, work: Callable[[], T]) -> T:
        """Run `work` at some instant soon; a cancelled caller leaves only when it has ended."""
        machine = self._machine
        delay_ns = machine.dice.randint(*THREAD_NS) * machine.disk.faults.slow_factor
        if machine.dice.random() < 0.02:
            delay_ns += machine.dice.randint(0, 20 * MS)
        first = machine.dice.random()
        cancelled = await self._pause(delay_ns * first)
        name = getattr(getattr(work, "func", work), "__name__", "")
        while machine.stalled == name:
            cancelled = await self._pause(10 * MS) or cancelled
        try:
            return work()
        finally:
            again = await self._pause(delay_ns * (1 - first))
            if cancelled or again:
                raise asyncio.CancelledError

    async def _pause(self, duration_ns: float) -> bool:
        """Sleep; tell whether a cancellation came meanwhile."""
        until_s = self._loop.time() + duration_ns / 1e9
        cancelled = False
        while (left_s := until_s - self._loop.time()) > 0:
            try:
                await asyncio.sleep(left_s)
            except asyncio.CancelledError:
                cancelled = True
        return cancelled


def as_env(env: SimEnv) -> Env:
    """Let the type checker see that a SimEnv is an Env."""
    return env
