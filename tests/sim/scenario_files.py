"""Directed scenarios with a metadata server: one chosen fault amid names and files.

`play_files(script)` boots a cluster, awaits `script(stage)`, heals everything, lets all settle, and
gives the history to the checkers, fsck among them.
"""

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from emberfs.client.file import FileSystem
from sim import loop as simloop
from sim import run
from sim.check_lives import Cut
from sim.cluster import Shape, World
from sim.files_load import FilesLoad
from sim.machine import Machine
from sim.meta_view import Leftover, leftovers, seen_of, store_of
from sim.moods import Mood
from sim.nemesis_files import FilesNemesis
from sim.run_files import finish, judge, prepare
from sim.scenario import quiet_burial
from sim.violation import report

T = TypeVar("T")


class Stage:
    """What a script has at hand."""

    def __init__(self, world: World, load: FilesLoad, nemesis: FilesNemesis) -> None:
        self.world = world
        self.load = load
        self.nemesis = nemesis
        self.revive = nemesis.revive

    @property
    def meta(self) -> Machine:
        """The metadata server."""
        return self.world.meta[0]

    @property
    def leftovers(self) -> list[Leftover]:
        """Sessions, deletions and trims that are recorded."""
        return leftovers(store_of(self.meta))

    def client(self, index: int) -> Machine:
        """A client's machine."""
        return self.world.clients[index]

    async def at(self, index: int, call: Callable[[FileSystem], Awaitable[T]]) -> T:
        """Run `call` in the process of a client; its metadata calls are recorded."""
        return await self.begin(index, call)

    def begin(self, index: int, call: Callable[[FileSystem], Awaitable[T]]) -> "asyncio.Task[T]":
        """As `at`, without waiting."""
        machine = self.client(index)
        process = machine.process
        assert process is not None

        async def work() -> T:
            fs, _ = await self.load.open(machine)
            return await call(fs)

        return process.context.run(self.world.loop.create_task, work())

    def cut_meta(self) -> None:
        """The power of the metadata server fails."""
        before, at_ns = seen_of(store_of(self.meta)), self.world.loop.now_ns()
        self.meta.power_cut()
        self.load.cuts.append(Cut(at_ns, before, seen_of(store_of(self.meta))))

    def power_on(self) -> None:
        """It is back."""
        self.meta.power_on()
        self.revive(self.meta)

    async def until(self, condition: Callable[[], bool], bound_s: float) -> None:
        """Wait for something, `bound_s` virtual seconds at most."""
        end_s = self.world.loop.time() + bound_s
        while not condition():
            assert self.world.loop.time() < end_s, f"not within {bound_s} virtual seconds"
            await asyncio.sleep(0.02)


def play_files(
    script: Callable[[Stage], Coroutine[Any, Any, None]],
    *,
    seed: int = 1,
    load: bool = False,
    names: bool = True,
) -> None:
    """Run a script; fails on any violation. Contents that it writes itself it must compare."""
    mood = Mood("scenario", (), files=True)
    outcome, failure = run.Outcome(seed, mood.name), ""

    async def main(loop: simloop.SimLoop) -> None:
        nonlocal failure
        try:
            await perform(loop)
        except Exception:  # as text: its frames would keep the dead alive
            failure = traceback.format_exc()

    async def perform(loop: simloop.SimLoop) -> None:
        world = World(loop, seed, Shape(meta=1, chains=1))
        await world.boot()
        assert await world.until_serving(run.BOOT_NS), "no start"
        work = FilesLoad(world)
        outcome.history = work.history
        nemesis = FilesNemesis(world, work, mood)
        await prepare(work)
        if load:
            for index in range(len(world.clients)):
                work.start(index)
        else:
            work.stopping = True  # clients that are revived do nothing by themselves
        await script(Stage(world, work, nemesis))
        nemesis.heal()
        healed_ns = loop.now_ns()
        assert await world.until_serving(run.EXIT_NS), "a replica never served"
        await finish(work, outcome)
        await judge(work, outcome, mood, healed_ns, names=names, contents=load)

    with quiet_burial():
        simloop.run(main)
    assert not failure, failure
    assert not outcome.violations, report(outcome.violations)
