"""Directed scenarios: a cluster under load, one chosen fault, then the same judgement as any seed.

`play(script)` boots a cluster, starts the load, awaits `script(scene)`, heals everything, waits
until all replicas serve, and gives the history to the checkers.
"""

import asyncio
import gc
import logging
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import product
from typing import Any, TypeVar

from emberfs.proto.cluster import PublicState
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import Layout
from emberfs.proto.ids import CHUNK_BYTES_MIN, SECOND, ChainId, InodeId, pack_chunk_id
from sim import loop as simloop
from sim import run
from sim.cluster import Shape, World
from sim.history import Op
from sim.machine import Machine
from sim.nemesis import Mood, Nemesis
from sim.stamps import stamp_fill
from sim.violation import report
from sim.workload import Place, Workload

T = TypeVar("T")

HAND_INODE = 5000
FASTER = Shape(chains=1)


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
        return Hand(self, self.world.clients[client], 500 + self._hands)

    async def until(self, condition: Callable[[], bool], bound_s: float) -> None:
        """Wait for something, `bound_s` virtual seconds at most."""
        end_s = self.world.loop.time() + bound_s
        while not condition():
            assert self.world.loop.time() < end_s, f"not within {bound_s} virtual seconds"
            await asyncio.sleep(0.02)

    async def all_serve(self, bound_s: float = 90) -> None:
        """Wait until every replica serves."""
        assert await self.world.until_serving(int(bound_s * SECOND)), "a replica never served"

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


class Hand:
    """A client whose every operation a script decides; recorded like the load's."""

    def __init__(self, scene: Scene, machine: Machine, number: int) -> None:
        self._scene = scene
        self._machine = machine
        self._number = number

    def place(self, number: int = 0, chain: int = 1) -> Place:
        """Return a chunk that the load does not use."""
        inode = InodeId(HAND_INODE + number)
        return Place(("chunk", inode), inode, Layout(CHUNK_BYTES_MIN, (ChainId(chain),)), -1)

    async def write(self, place: Place, offset: int, length: int, timeout_s: float = 30) -> str:
        """Write and record; the outcome."""
        history = self._scene.load.history
        stamp = history.next_stamp()
        data = stamp_fill(stamp, offset, length)
        op = history.begin(
            self._number, "write", place.key, offset, length, self._scene.now_ns, data, stamp
        )
        return await self._end(op, lambda io: io.write(
            place.inode, place.layout, offset, memoryview(data), timeout_ns=int(timeout_s * SECOND)
        ))  # fmt: skip

    async def truncate(self, place: Place, size: int, timeout_s: float = 30) -> str:
        """Truncate and record; the outcome."""
        op = self._scene.load.history.begin(
            self._number, "truncate", place.key, size, 0, self._scene.now_ns
        )
        return await self._end(op, lambda io: io.truncate_chunk(
            place.inode, place.layout, 0, size, int(timeout_s * SECOND)
        ))  # fmt: skip

    async def read(self, place: Place, timeout_s: float = 30) -> str:
        """Read a chunk whole and record; the outcome."""
        op = self._scene.load.history.begin(
            self._number, "read", place.key, 0, CHUNK_BYTES_MIN, self._scene.now_ns
        )
        sink = memoryview(bytearray(CHUNK_BYTES_MIN))
        return await self._end(op, lambda io: io.read(
            place.inode, place.layout, 0, sink, timeout_ns=int(timeout_s * SECOND)
        ), sink)  # fmt: skip

    async def flush(self, chain: int = 1) -> None:
        """Make the chain stable."""
        await self._inside(lambda io: io.flush((ChainId(chain),), 30 * SECOND))

    async def _end(
        self, op: Op, call: Callable[[Any], Awaitable[Any]], sink: memoryview | None = None
    ) -> str:
        outcome, result = "ok", ""
        try:
            await self._inside(call)
        except EmberfsError as problem:
            outcome = "fail" if sink is not None else "unknown"
            result = problem.code.name
        data = bytes(sink) if sink is not None and outcome == "ok" else b""
        self._scene.load.history.end(op, self._scene.now_ns, outcome, data, result=result)
        return outcome

    async def _inside(self, call: Callable[[Any], Awaitable[T]]) -> T:
        """Run in the client's process."""
        machine = self._machine
        process = machine.process
        assert process is not None

        async def work() -> T:
            return await call(machine.service.chunkio)

        return await process.context.run(self._scene.world.loop.create_task, work())


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


def play(
    script: Callable[[Scene], Coroutine[Any, Any, None]],
    *,
    seed: int = 1,
    shape: Shape = FASTER,
    load: bool = True,
    errors: bool = False,
    judged: bool = True,
) -> None:
    """Run a script; fails on any violation, and on any error at a client unless `errors`.

    `judged=False`: what was not flushed may be lost, hence only versions and replicas are judged.
    """
    mood = Mood("scenario", (), gentle=not errors)
    outcome = run.Outcome(seed, mood.name)

    failure = ""

    async def main(loop: simloop.SimLoop) -> None:
        nonlocal failure
        try:
            await perform(loop)
        except Exception:  # as text: its frames would keep the dead alive
            failure = traceback.format_exc()

    async def perform(loop: simloop.SimLoop) -> None:
        world = World(loop, seed, shape)
        await world.boot()
        assert await world.until_serving(run.BOOT_NS), "no start"
        work = Workload(world)
        outcome.history = work.history
        nemesis = Nemesis(world, work, mood)
        scene = Scene(world, work, nemesis)
        work.stopping = not load
        for index in range(len(world.clients)):
            work.start(index)
        await scene.until(lambda: all(c.service is not None for c in world.clients), 30)
        await asyncio.sleep(1)
        await script(scene)
        nemesis.heal()
        healed_ns = loop.now_ns()
        await scene.all_serve()
        work.stopping = True
        await asyncio.sleep(run.QUIET_S + 16)
        for index in range(len(world.clients)):
            await work.read_all(index)
        if not judged:
            work.history = type(work.history)()
        run._judge(world, work, outcome, mood, healed_ns)

    with quiet_burial():
        simloop.run(main)
    assert not failure, failure
    assert not outcome.violations, report(outcome.violations)
