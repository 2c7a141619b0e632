"""Scripts by dice: a few hands on one chunk, and faults between their operations, step by step.

Where a mood (moods.py) has seconds of load between its faults, here nearly every step is a fault or
meets one, and a history is short: many fit into the time of one simulation.

python -m sim.improvise [--first 0] [--count 200] [--theme NAME]
"""

import argparse
import asyncio
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from emberfs.proto.ids import KiB
from emberfs.proto.storage_calls import UPDATE
from sim.hand import Hand
from sim.machine import Machine
from sim.nemesis import FATES, HELD
from sim.run import Outcome, fix_hashes
from sim.scenario import Scene, stage
from sim.situations import QUIET
from sim.tap import Tap
from sim.violation import report

STEPS = 45
PAUSES_S = (0, 0, 0.001, 0.005, 0.05, 0.3, 1.5)
PATIENCE_S = 6.0
UPDATES = tuple(held for held in HELD if held[0] == UPDATE.number)
STALLS = ("prepare", "prepare_and_commit", "_flush_store")

# Steps by theme.
_USE = ("write", "write", "write", "truncate", "read", "read", "sweep", "sweep", "flush")
_FAULTS = ("bounce", "away", "out of sight", "alone", "stall", "long stall")
_ANEW = ("restart", "restart", "away")
_LATE = ("hold", "hold", "let go", "let go", "copy", "reset")
THEMES: dict[str, tuple[str, ...]] = {
    "messages": (*_USE, *_LATE, "remove"),
    "deaths": (*_USE, *_LATE, "bounce", "away", "kill", "revive", "restart", "remove"),
    # What was done and not answered is tried again when all servers are others.
    "removals": ("write", "remove", "remove", "sweep", "sweep", "deaf", "deaf", *_ANEW),
    "partitions": (*_USE, *_LATE, "out of sight", "alone", "stall", "remove"),
    # In the end the power of all fails; what was flushed must be there.
    "blackout": (*_USE, "flush", "flush", *_LATE, "stall", "bounce", "away"),
    "losses": (*_USE, *_LATE, "power", "blank", "remove"),
    "all": (*_USE, *_LATE, *_FAULTS, "restart", "remove"),
}


class Improvisation:
    """One script."""

    def __init__(self, scene: Scene, dice: random.Random, theme: str) -> None:
        self._scene = scene
        self._dice = dice
        self._theme = theme
        self._steps = THEMES[theme]
        self._hands = [scene.hand(number) for number in range(3)]
        self._place = self._hands[0].place()
        self._taps: list[Tap] = []
        self._using: list[asyncio.Future[Any]] = []
        self._going: list[asyncio.Future[Any]] = []  # faults that end by themselves
        self._losing = False

    async def run(self) -> None:
        """All steps, then the end of all faults."""
        for _ in range(STEPS):
            await self._step(self._dice.choice(self._steps))
            await asyncio.sleep(self._dice.choice(self._pauses()))
        if self._theme == "blackout":
            await self._blackout()
        for tap in self._taps:
            tap.release()
        await asyncio.gather(*self._going)
        for machine in self._scene.world.storage:
            machine.stalled = ""
            self._scene.revive(machine)
        await asyncio.gather(*self._using)
        await asyncio.sleep(1)  # until it is known who is back
        await self._scene.all_serve()
        await self._sweep(self._hands[0])

    def _pauses(self) -> tuple[float, ...]:
        """Let nobody be overwhelmed: a hand's operations wait for each other."""
        self._using = [task for task in self._using if not task.done()]
        return PAUSES_S if len(self._using) < 8 else (1.0,)

    async def _step(self, kind: str) -> None:
        dice, hand, machine = self._dice, self._dice.choice(self._hands), self._any()
        low, place = dice.randrange(12 * KiB), self._place
        size = dice.choice((100, 4096, 8000))
        use: dict[str, Callable[[], Awaitable[Any]]] = {
            "write": lambda: hand.write(place, low, size, PATIENCE_S),
            "truncate": lambda: hand.truncate(place, low, PATIENCE_S),
            "remove": lambda: hand.remove(place, PATIENCE_S),
            "read": lambda: hand.read(place, PATIENCE_S, at=machine),
            "sweep": lambda: self._sweep(hand),
            "flush": lambda: hand.flush(place, PATIENCE_S),
        }
        act: dict[str, Callable[[], Any]] = {
            "hold": lambda: self._hold(copies=False),
            "copy": lambda: self._hold(copies=True),
            "let go": self._let_go,
            "reset": lambda: self._scene.world.network.reset(machine.name, self._anyone().name),
            "kill": machine.kill,
            "revive": lambda: self._scene.revive(machine),
        }
        last: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "bounce": lambda: self._bounce(machine, 0.2),
            "away": lambda: self._bounce(machine, 7),
            "restart": self._restart,
            "deaf": lambda: self._deaf(hand),
            "out of sight": lambda: self._apart([machine], self._scene.world.mgmtd),
            "alone": lambda: self._alone(machine, hand),
            "power": lambda: self._lose(machine, blank=False),
            "blank": lambda: self._lose(machine, blank=True),
            "stall": lambda: self._stall(machine, 0.5),
            "long stall": lambda: self._stall(machine, 6),
        }
        if kind in use:
            self._using.append(asyncio.ensure_future(use[kind]()))
        elif kind in act:
            act[kind]()
        else:
            self._going.append(asyncio.ensure_future(last[kind]()))

    def _any(self) -> Machine:
        return self._dice.choice(self._scene.world.storage)

    def _anyone(self) -> Machine:
        return self._dice.choice([*self._scene.world.storage, *self._scene.world.clients])

    def _hold(self, *, copies: bool) -> None:
        world, dice = self._scene.world, self._dice
        kind, answers = dice.choice(UPDATES if dice.random() < 0.6 else HELD)
        one, others = self._any(), list(world.machines.values())
        if dice.random() < 0.5:
            others = [self._anyone()]
        pair = (others, [one]) if dice.random() < 0.5 else ([one], others)
        self._taps.append(self._scene.tap(kind, *pair, answers=answers, copies=copies))

    def _let_go(self) -> None:
        if not self._taps:
            return
        tap = self._taps.pop(self._dice.randrange(len(self._taps)))
        self._dice.shuffle(tap.held)
        fate = self._dice.random()
        if fate < 0.2:
            tap.lose()
        elif fate < 0.5:
            tap.send_held()
            self._taps.append(tap)
        else:
            tap.release()

    async def _bounce(self, machine: Machine, pause_s: float) -> None:
        machine.kill()
        await asyncio.sleep(pause_s)
        self._scene.revive(machine)

    async def _deaf(self, hand: Hand) -> None:
        """A client's write is done, and it does not hear of that."""
        storage = list(self._scene.world.storage)
        tap = self._scene.tap(UPDATE.number, storage, [hand.machine], answers=True)
        writing = hand.write(self._place, 0, 4096, 3 * PATIENCE_S)
        self._using.append(asyncio.ensure_future(writing))
        await asyncio.sleep(self._dice.choice((0.3, 1, 3)))
        tap.lose()

    async def _restart(self) -> None:
        """All replicas, at once or one after the other: no memory of any process is left."""
        machines, together = list(self._scene.world.storage), self._dice.random() < 0.5
        self._dice.shuffle(machines)
        pause_s = self._dice.choice((0.01, 0.2, 1))
        for machine in machines:
            machine.kill()
            if not together:
                await asyncio.sleep(pause_s)
                self._scene.revive(machine)
        if together:
            await asyncio.sleep(pause_s)
            for machine in machines:
                self._scene.revive(machine)

    async def _lose(self, machine: Machine, *, blank: bool) -> None:
        """One at a time: two that lose what was not flushed may lose it for good."""
        scene, dice = self._scene, self._dice
        if self._losing or not scene.world.complete():
            return
        self._losing = True
        if blank:
            machine.kill()
            machine.disk.wipe()
        else:
            machine.disk.fate = dice.choice(FATES)
            machine.power_cut()
        await asyncio.sleep(dice.choice((0.3, 1, 7)))
        scene.power_on(machine)
        await asyncio.sleep(1)
        await scene.until(scene.world.complete, 120)
        self._losing = False

    async def _blackout(self) -> None:
        scene, dice, hand = self._scene, self._dice, self._hands[0]
        machines = list(scene.world.storage)
        if dice.random() < 0.3:  # something that nobody has flushed by chance
            await hand.write(self._place, dice.randrange(12 * KiB), 4096, 2)
            await hand.flush(self._place, 2)
        fates = {machine.name: dice.choice(FATES[1:]) for machine in machines}
        await scene.blackout(FATES[1], **fates)
        await asyncio.sleep(dice.choice((0.5, 8)))
        dice.shuffle(machines)
        for machine in machines:
            scene.power_on(machine)
            await asyncio.sleep(dice.choice((0.1, 1, 4)))

    async def _apart(self, side: list[Machine], others: list[Machine]) -> None:
        way = self._dice.choice(("both", "in", "out"))
        async with self._scene.cut(side, others, way):
            await asyncio.sleep(self._dice.choice((1, 3, 7)))

    async def _sweep(self, hand: Hand) -> None:
        """Read one replica after the other."""
        machines = list(self._scene.world.storage)
        self._dice.shuffle(machines)
        for machine in machines:
            await hand.read(self._place, 2, at=machine)

    async def _alone(self, machine: Machine, hand: Hand) -> None:
        """A replica and a client see nobody else; it is read there, and written elsewhere."""
        apart = [machine, hand.machine]
        other = next(one for one in self._hands if one is not hand)
        async with self._scene.cut(apart, self._scene.everyone_but(*apart)):
            end_s = self._scene.world.loop.time() + self._dice.choice((3, 7))
            while self._scene.world.loop.time() < end_s:
                await other.write(self._place, 0, 4096, 0.5)
                await hand.read(self._place, 0.5, at=machine)

    async def _stall(self, machine: Machine, pause_s: float) -> None:
        machine.stalled = self._dice.choice(STALLS)
        await asyncio.sleep(pause_s)
        machine.stalled = ""


def improvise(seed: int, theme: str) -> Outcome:
    """Play one script."""

    async def script(scene: Scene) -> None:
        dice = scene.world.dice_of("improvisation")
        await Improvisation(scene, dice, theme).run()

    outcome = stage(script, seed=seed, shape=QUIET, load=False, errors=True)
    outcome.mood = f"improvised {theme}"
    outcome.again = f"cd tests && python -m sim.improvise --first {seed} --count 1 --theme {theme}"
    return outcome


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="sim.improvise", description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--theme", choices=sorted(THEMES))
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    began_s, bad, count = time.process_time(), 0, 0
    for seed in range(options.first, options.first + options.count):
        for theme in [options.theme] if options.theme else THEMES:
            outcome = improvise(seed, theme)
            count += 1
            if outcome.violations:
                bad += 1
                rules = sorted({violation.rule for violation in outcome.violations})
                print(f"seed {seed} {theme}: {rules}\n{report(outcome.violations, 2)}", flush=True)
    took_s = time.process_time() - began_s
    print(f"{count} scripts, {bad} violate something, {took_s:.1f} s of CPU")
    return 1 if bad else 0


if __name__ == "__main__":
    fix_hashes("sim.improvise")
    sys.exit(main())
