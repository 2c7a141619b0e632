"""Directed scenarios: a cluster under load, one chosen fault, then the same judgement as any seed.

`stage(script)` boots a cluster, starts the load, awaits `script(scene)`, heals everything, waits
until all replicas serve, and gives the history to the checkers; `play(script)` also fails on what
they find.
"""

import asyncio
import gc
import logging
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import product
from typing import Any

from emberfs.proto.cluster import PublicState
from emberfs.proto.ids import CHUNK_BYTES_MIN, SECOND, pack_chunk_id
from sim import loop as simloop
from sim import run
from sim.cluster import Shape, World
from sim.disk import Fate
from sim.hand import Hand
from sim.history import Op
from sim.machine import Machine
from sim.moods import Mood
from sim.nemesis import Nemesis
from sim.tap import Message, Tap, between
from sim.violation import Violation, report
from sim.workload import Place, Workload

FASTER = Shape(chains=1)
BURIED_S = 8  # after so long without a heartbeat a node is out of its chains everywhere


class BlameError(Exception):
    """A script has seen a rule violated."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


class Scene:
    """What a script has at hand."""

    def __init__(self, world: World, load: Workload, nemesis: Nemesis) -> None:
        self.world = world
        self.load = load
        self.nemesis = nemesis
        self.revive = nemesis.revive
        self._hands = 0

    @property
    def head(self) -> Machine:
        """Head of the first chain, as it was created; `world.storage` is in its order."""
        return self.world.storage[0]

    @property
    def tail(self) -> Machine:
        """Tail of the first chain, as it was created."""
        return self.world.storage[-1]

    def hand(self, client: int = 0) -> "Hand":
        """Return a client that the script moves itself."""
        self._hands += 1
        return Hand(self.world, self.load, self.world.clients[client], 500 + self._hands)

    async def until(self, condition: Callable[[], bool], bound_s: float) -> None:
        """Wait for something, `bound_s` virtual seconds at most."""
        end_s = self.world.loop.time() + bound_s
        while not condition():
            assert self.world.loop.time() < end_s, f"not within {bound_s} virtual seconds"
            await asyncio.sleep(0.02)

    async def all_serve(self, bound_s: float = 90) -> None:
        """Wait until every replica serves."""
        if not await self.world.until_serving(int(bound_s * SECOND)):
            raise BlameError("no exit", run._states(self.world))

    async def all_serve_but(self, *targets: int) -> None:
        """Wait until every other replica serves."""

        def served() -> bool:
            states = self.states().items()
            return all(s == PublicState.SERVING for t, s in states if t not in targets)

        await asyncio.sleep(1)
        await self.until(served, 60)

    def states(self) -> dict[int, PublicState]:
        """What the leading mgmtd says of each target."""
        snapshot = self.world.primary_snapshot()
        chains = snapshot.chains.values() if snapshot is not None else ()
        return {t.target: t.state for chain in chains for t in chain.targets}

    @asynccontextmanager
    async def cut(
        self, side: list[Machine], other: list[Machine], way: str = "both"
    ) -> AsyncIterator[None]:
        """Let no message pass from `side` ("out"), to it ("in"), or either way ("both")."""
        network = self.world.network
        links = []
        for one, two in product(side, other):
            links += [network.link(one.name, two.name)] if way in ("out", "both") else []
            links += [network.link(two.name, one.name)] if way in ("in", "both") else []
        for link in links:
            link.cut = True
        try:
            yield
        finally:
            for link in links:
                link.cut = False

    def tap(
        self,
        kind: int | str,
        sources: list[Machine],
        destinations: list[Machine],
        *,
        answers: bool = False,
        copies: bool = False,
        only: Callable[[Message], bool] = lambda message: True,
    ) -> Tap:
        """Hold messages of a kind from now on; see tap.py."""
        chosen = between(
            kind, {m.name for m in sources}, {m.name for m in destinations}, answers=answers
        )
        tap = Tap(lambda message: chosen(message) and only(message), copies=copies)
        self.world.network.taps.append(tap)
        return tap

    async def bury(self, *machines: Machine) -> None:
        """Kill machines and wait until they are out of their chains."""
        for machine in machines:
            machine.kill()
        await asyncio.sleep(BURIED_S)

    async def blackout(self, fate: Fate, **others: Fate) -> None:
        """Cut the power of all storage nodes; `others`: machines that fare differently."""
        await asyncio.sleep(0.001)  # what was acknowledged has ended before
        self.load.cut_ns = self.now_ns
        for machine in self.world.storage:
            machine.disk.fate = others.get(machine.name, fate)
            machine.power_cut()

    def power_on(self, *machines: Machine) -> None:
        """Give machines their power back and start their processes."""
        for machine in machines:
            machine.power_on()
            self.revive(machine)

    async def after_a_flush(self, hand: Hand) -> None:
        """Return when every target has just been flushed: the next one is more than a second off.

        Targets flush by themselves every two seconds, if there is anything.
        """
        await asyncio.sleep(3)
        await hand.write(hand.place(99), 0, 100)
        await asyncio.sleep(0.5)

    def everyone_but(self, *side: Machine) -> list[Machine]:
        """Return all other machines."""
        return [machine for machine in self.world.machines.values() if machine not in side]

    def contents(self, place: Place) -> dict[str, bytes]:
        """What each running replica has committed of a chunk."""
        chunk = pack_chunk_id(place.inode, 0)
        snapshot = self.world.primary_snapshot()
        assert snapshot is not None
        members = snapshot.chains[place.layout.chains[0]]
        found = {}
        for machine in self.world.storage:
            targets = machine.service.service.targets if machine.service else {}
            for target, hosted in targets.items():
                if members.member(target) is None or hosted.store is None:
                    continue
                sink = memoryview(bytearray(CHUNK_BYTES_MIN))
                got = hosted.store.read_into(
                    chunk, version=0, offset=0, length=len(sink), sink=sink
                )
                found[machine.name] = bytes(sink[: got.length])
        return found

    def since(self, start_ns: int, kind: str = "", until_ns: int = 1 << 62) -> list[Op]:
        """Return the operations that began in a span of time."""
        return [
            op
            for op in self.load.history
            if start_ns <= op.start_ns < until_ns and kind in ("", op.kind)
        ]

    @property
    def now_ns(self) -> int:
        """Virtual time."""
        return self.world.loop.now_ns()


@contextmanager
def quiet_burial() -> Iterator[None]:
    """Whoever dies in a simulation closes its generators here, not amid the next test.

    No logging meanwhile: pytest keeps the records, which keep exceptions, which keep frames.
    """
    logging.disable(logging.CRITICAL)
    hook, collecting = sys.unraisablehook, gc.isenabled()
    sys.unraisablehook = lambda _: None
    gc.disable()
    try:
        yield
    finally:
        while gc.collect():
            pass
        sys.unraisablehook = hook
        logging.disable(logging.NOTSET)
        if collecting:
            gc.enable()


def stage(
    script: Callable[[Scene], Coroutine[Any, Any, None]],
    *,
    seed: int = 1,
    shape: Shape = FASTER,
    load: bool = True,
    errors: bool = False,
    judged: bool = True,
) -> run.Outcome:
    """Run a script; the outcome names all violations, and every error at a client unless `errors`.

    An exception of the script itself violates the rule "script". `judged=False`: what was not
    flushed may be lost, hence only versions and replicas are judged.
    """
    mood = Mood("scenario", (), gentle=not errors)
    outcome = run.Outcome(seed, mood.name)

    async def main(loop: simloop.SimLoop) -> None:
        world = World(loop, seed, shape)
        work = Workload(world)
        work.stopping = not load
        outcome.history = work.history
        scene = Scene(world, work, Nemesis(world, work, mood))
        going = await guarded(outcome, _perform(scene, script))
        healed_ns = loop.now_ns()
        if going:
            await guarded(outcome, _rest(scene))
        if not judged:
            work.history = type(work.history)()
        outcome.virtual_s = loop.time()
        run._judge(world, work, outcome, mood, healed_ns)

    with quiet_burial():
        simloop.run(main)
    return outcome


async def guarded(outcome: run.Outcome, work: Coroutine[Any, Any, None]) -> bool:
    """Note what goes wrong as a violation; False if there is no point in going on."""
    try:
        await work
    except BlameError as problem:
        outcome.violations.append(Violation(problem.rule, str(problem)))
        return problem.rule != "no exit"
    except Exception:  # as text: its frames would keep the dead alive
        outcome.violations.append(Violation("script", traceback.format_exc()))
    return True


async def _perform(scene: Scene, script: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    world = scene.world
    await world.boot()
    if not await world.until_serving(run.BOOT_NS):
        raise BlameError("no exit", "no start")
    for index in range(len(world.clients)):
        scene.load.start(index)
    await scene.until(lambda: all(c.service is not None for c in world.clients), 30)
    await asyncio.sleep(1)
    try:
        await script(scene)
    finally:
        for tap in world.network.taps:
            tap.release()
        scene.nemesis.heal()


async def _rest(scene: Scene) -> None:
    """Nothing is broken any more."""
    await scene.all_serve()
    scene.load.stopping = True
    await asyncio.sleep(run.QUIET_S + 16)
    for index in range(len(scene.world.clients)):
        await scene.load.read_all(index)


def play(script: Callable[[Scene], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run a script as `stage`; fails on any violation."""
    outcome = stage(script, **options)
    assert not outcome.violations, report(outcome.violations)
