"""Directed scenarios with a metadata server: one chosen fault amid names and files.

`stage_files(script)` boots a cluster, awaits `script(stage)`, heals everything, lets all settle,
and gives the history to the checkers, fsck among them; `play_files(script)` also fails on what they
find.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from emberfs.client.file import FileSystem
from emberfs.proto.method import Method
from sim import loop as simloop
from sim import run
from sim.check_lives import Cut
from sim.cluster import Shape, World
from sim.disk import Fate
from sim.files_load import FilesLoad
from sim.machine import Machine
from sim.meta_view import Leftover, leftovers, rows_of, seen_of, store_of
from sim.moods import Mood
from sim.nemesis_files import FilesNemesis
from sim.run_files import finish, judge, prepare
from sim.scenario import BlameError, guarded, quiet_burial
from sim.tap import Tap, between
from sim.violation import report

T = TypeVar("T")

SHAPE = Shape(meta=1, chains=1)


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
        return leftovers(rows_of(self.world))

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

    def cut_meta(self, fate: Fate | None = None) -> None:
        """The power of the metadata server fails; `fate`: of what was not synced, None: dice."""
        before, at_ns = seen_of(store_of(self.meta)), self.world.loop.now_ns()
        self.meta.disk.fate = fate
        self.meta.power_cut()
        self.load.cuts.append(Cut(at_ns, before, seen_of(store_of(self.meta))))

    def power_on(self) -> None:
        """It is back."""
        self.meta.power_on()
        self.revive(self.meta)

    def tap(
        self,
        method: Method[Any, Any],
        client: int,
        *,
        answers: bool = False,
        copies: bool = False,
    ) -> Tap:
        """Hold calls of a client to the metadata server, or their answers; see tap.py."""
        here, there = {self.client(client).name}, {self.meta.name}
        if answers:
            here, there = there, here
        tap = Tap(between(method.number, here, there, answers=answers), copies=copies)
        self.world.network.taps.append(tap)
        return tap

    async def until(self, condition: Callable[[], bool], bound_s: float) -> None:
        """Wait for something, `bound_s` virtual seconds at most."""
        end_s = self.world.loop.time() + bound_s
        while not condition():
            assert self.world.loop.time() < end_s, f"not within {bound_s} virtual seconds"
            await asyncio.sleep(0.02)


def stage_files(
    script: Callable[[Stage], Coroutine[Any, Any, None]],
    *,
    seed: int = 1,
    shape: Shape = SHAPE,
    load: bool = False,
    names: bool = True,
) -> run.Outcome:
    """Run a script; the outcome names all violations. It must compare what it writes itself.

    An exception of the script itself violates the rule "script", unless it blames another.
    """
    mood = Mood("scenario", (), files=True)
    outcome = run.Outcome(seed, mood.name)

    async def main(loop: simloop.SimLoop) -> None:
        world = World(loop, seed, shape)
        work = FilesLoad(world)
        outcome.history = work.history
        stage = Stage(world, work, FilesNemesis(world, work, mood))
        if await guarded(outcome, _perform(stage, script, load=load)):
            healed_ns = loop.now_ns()
            ending = _rest(stage, outcome, mood, healed_ns, names=names, contents=load)
            await guarded(outcome, ending)
        outcome.virtual_s = loop.time()

    with quiet_burial():
        simloop.run(main)
    return outcome


async def _perform(
    stage: Stage, script: Callable[[Stage], Coroutine[Any, Any, None]], *, load: bool
) -> None:
    world = stage.world
    await world.boot()
    if not await world.until_serving(run.BOOT_NS):
        raise BlameError("no exit", "no start")
    await prepare(stage.load)
    stage.load.stopping = not load  # clients that are revived do nothing by themselves
    for index in range(len(world.clients) if load else 0):
        stage.load.start(index)
    try:
        await script(stage)
    finally:
        for tap in world.network.taps:
            tap.release()
        stage.nemesis.heal()


async def _rest(
    stage: Stage,
    outcome: run.Outcome,
    mood: Mood,
    healed_ns: int,
    *,
    names: bool,
    contents: bool,
) -> None:
    """Nothing is broken any more."""
    if not await stage.world.until_serving(run.EXIT_NS):
        raise BlameError("no exit", "a replica never served")
    await finish(stage.load, outcome)
    await judge(stage.load, outcome, mood, healed_ns, names=names, contents=contents)


def play_files(
    script: Callable[[Stage], Coroutine[Any, Any, None]],
    *,
    seed: int = 1,
    load: bool = False,
    names: bool = True,
) -> None:
    """Run a script as `stage_files`; fails on any violation."""
    outcome = stage_files(script, seed=seed, load=load, names=names)
    assert not outcome.violations, report(outcome.violations)
