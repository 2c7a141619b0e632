"""Who makes the faults: one after another or overlapping, by dice; everything is healed at last."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol

from emberfs.proto.cluster import PublicState
from emberfs.proto.ids import MS, SECOND
from emberfs.proto.storage_calls import FLUSH, LIST, READ_BATCH, SYNC, UPDATE, VERSION
from sim.cluster import World
from sim.disk import Fate
from sim.machine import Machine
from sim.moods import Mood
from sim.tap import CONTROL, ROUTING, STORE, Message, Tap

HOUR_NS = 3600 * SECOND
CUT_REST_S = 6.0  # longer than a forwarded write waits for its lost answer
HEIR_SHARE = 0.8
HOT_SHARE = 0.4
HOT_PAUSE_NS = 60 * MS
HOT_SWEEP_SHARE = 0.3
FATES = (None, *(Fate(data, rows) for data in (False, True) for rows in (False, True)))
# (kind, answers): what may be held back of a storage node.
HELD = (
    (UPDATE.number, False),
    (UPDATE.number, True),
    (SYNC.number, False),
    (SYNC.number, True),
    (LIST.number, False),
    (LIST.number, True),
    (VERSION.number, True),
    (READ_BATCH, True),
    (FLUSH.number, True),
    (ROUTING, True),
    (CONTROL, True),
)


class Load(Protocol):
    """What a nemesis needs of the load: workload.Workload, files_load.FilesLoad."""

    hot_share: float
    pause_ns: int
    cut_ns: int
    sweep_share: float

    def start(self, index: int) -> None:
        """Let a client work."""
        ...


class Nemesis:
    """Injects the faults of a mood until told to stop; counts them by kind."""

    def __init__(self, world: World, load: Load, mood: Mood) -> None:
        self.world = world
        self.load = load
        self.mood = mood
        self.counts: Counter[str] = Counter()
        self.story: list[str] = []
        self.dice = world.dice_of("nemesis")
        self._rotting: Machine | None = None
        self._broken: set[str] = set()  # machines that have a fault just now
        for machine in world.storage:
            machine.heir_share = HEIR_SHARE if mood.heirs else 0.0

    async def rage(self, duration_s: float) -> None:
        """Make faults for some time, then heal everything."""
        end_s = self.world.loop.time() + duration_s
        self._messages(on=self.mood.messages)
        pause_ns = self.load.pause_ns
        if self.mood.hot:
            self.load.hot_share, self.load.pause_ns = HOT_SHARE, HOT_PAUSE_NS
            self.load.sweep_share = HOT_SWEEP_SHARE
        running: set[asyncio.Task[None]] = set()
        while self.world.loop.time() < end_s and self.mood.faults:
            await asyncio.sleep(self.dice.uniform(0.1, 4.0))
            if running and not self.mood.overlap:
                await asyncio.wait(running)
                await self.world.until_complete(40 * SECOND)
            running = {task for task in running if not task.done()}
            if len(running) < 3:
                kind = self.dice.choice(self.mood.faults)
                task = asyncio.get_running_loop().create_task(self._one(kind))
                running.add(task)
        if running:
            await asyncio.wait(running)
        for task in running:
            task.result()
        left_s = end_s - self.world.loop.time()
        if left_s > 0:
            await asyncio.sleep(left_s)
        self._messages(on=False)
        self.load.hot_share, self.load.pause_ns = 0.0, pause_ns
        self.load.sweep_share = 0.0
        self.heal()

    def heal(self) -> None:
        """End every fault; start what is down."""
        world = self.world
        world.network.deadly.clear()
        for tap in world.network.taps:
            tap.release()
        for link in world.network.links.values():
            link.cut, link.slow_factor = False, 1.0
        for machine in world.machines.values():
            faults, machine.stalled = machine.disk.faults, ""
            faults.full, faults.slow_factor, faults.die_after = False, 1.0, -1
            faults.write_error_share = faults.read_error_share = faults.sync_error_share = 0.0
            if machine.process is not None and machine.process.paused:
                machine.process.resume()
            if machine.name in world.network.down:
                machine.power_on()
            self.revive(machine)

    def revive(self, machine: Machine) -> None:
        """Start a machine's process if it does not run."""
        if not machine.running:
            self.world.start(machine)
            if machine in self.world.clients:
                self.load.start(self.world.clients.index(machine))

    def _messages(self, *, on: bool) -> None:
        network, dice = self.world.network, self.dice
        network.loss_share = dice.choice((0, 0.002, 0.02)) if on else 0
        network.duplicate_share = dice.choice((0, 0.02, 0.1)) if on else 0
        network.late_duplicate_share = dice.choice((0, 0.01, 0.05)) if on else 0
        network.delay_share = dice.choice((0, 0.02, 0.1)) if on else 0

    # ------------------------------------------------------------ faults

    async def _one(self, kind: str) -> None:
        group = [machine for machine in self.victims(kind) if machine.name not in self._broken]
        victim = self.dice.choice(group) if group else None
        if victim is None:
            return
        self.counts[kind] += 1
        self._broken.add(victim.name)
        self._tell(f"{kind}: {victim.name}")
        try:
            await self.actions()[kind](victim)
        finally:
            self._broken.discard(victim.name)
            self._tell(f"{kind}: {victim.name} is over")

    def actions(self) -> dict[str, Callable[[Machine], Awaitable[None]]]:
        """What each kind of fault does to its victim."""
        return {
            "kill storage": self._kill,
            "kill mgmtd": self._kill,
            "kill client": self._kill,
            "freeze storage": self._freeze,
            "freeze mgmtd": self._freeze,
            "pause kv": self._freeze,
            "die between disk operations": self._die_soon,
            "partition": self._partition,
            "one-way partition": self._one_way,
            "isolate storage": self._isolate,
            "isolate mgmtd": self._isolate,
            "reset": self._reset,
            "slow machine": self._slow_machine,
            "wall clock step": self._step_wall,
            "power cut of one": self._cut_power,
            "blank disk": self._blank,
            "rot": self._rot,
            "disk full": self._full,
            "disk errors": self._disk_errors,
            "slow disk": self._slow_disk,
            "kill all storage": self._kill_all,
            "die at an answer": self._die_at_answer,
            "strike at recovery": self._strike_at_recovery,
            "client and server": self._kill_both,
            "blackout": self._blackout,
            "long death": self._long_death,
            "cut off with a client": self._cut_off_with_client,
            "cut between two": self._cut_between_two,
            "cut off and deaf": self._cut_off_and_deaf,
            "quick restart": self._restart_quickly,
            "hold messages": self._hold,
            "hold messages of mgmtd": self._hold,
            "power cut of kv": self._cut_power,
        }

    def _tell(self, what: str) -> None:
        self.story.append(f"{self.world.loop.time():10.6f} nemesis: {what}")

    def victims(self, kind: str) -> list[Machine]:
        """Whom a kind of fault may hit."""
        world = self.world
        if kind in ("pause kv", "power cut of kv"):
            return [world.kv]
        if "mgmtd" in kind:
            return world.mgmtd
        if "client" in kind:
            return world.clients
        if kind == "wall clock step":
            return list(world.machines.values())
        return world.storage

    def _some_seconds(self) -> float:
        """Sometimes shorter than half a lease, sometimes longer than a whole one."""
        return self.dice.choice((0.05, 0.5, 2.0, 3.5, 6.0, 12.0)) * self.dice.uniform(0.7, 1.3)

    async def _kill(self, victim: Machine) -> None:
        victim.kill()
        await asyncio.sleep(self._some_seconds())
        self.revive(victim)

    async def _kill_all(self, victim: Machine) -> None:
        for machine in self.world.storage:
            machine.kill()
            if self.dice.random() < 0.5:
                await asyncio.sleep(self._some_seconds() / 4)
        order = list(self.world.storage)
        self.dice.shuffle(order)
        for machine in order:
            await asyncio.sleep(self._some_seconds() / 2)
            self.revive(machine)

    async def _freeze(self, victim: Machine) -> None:
        process = victim.process
        if process is None or not process.alive:
            return
        process.pause()
        await asyncio.sleep(self._some_seconds())
        if process.alive:
            process.resume()

    async def _die_soon(self, victim: Machine) -> None:
        victim.disk.faults.die_after = self.dice.randrange(40)
        for _ in range(20):
            await asyncio.sleep(0.1)
            if not victim.running:
                break
        else:
            victim.kill()
        victim.disk.faults.die_after = -1
        await asyncio.sleep(self._some_seconds())
        self.revive(victim)

    async def _cut_power(self, victim: Machine) -> None:
        victim.disk.fate = self.dice.choice(FATES)
        victim.power_cut()
        await asyncio.sleep(self._some_seconds())
        victim.power_on()
        self.revive(victim)

    async def _blackout(self, victim: Machine) -> None:
        """Once in a run: the power of all storage nodes fails in the same instant."""
        if self.load.cut_ns:
            return
        self.load.cut_ns = self.world.loop.now_ns()
        for machine in self.world.storage:
            machine.disk.fate = self.dice.choice(FATES)
            machine.power_cut()
        order = list(self.world.storage)
        self.dice.shuffle(order)
        for machine in order:
            await asyncio.sleep(self._some_seconds() / 3)
            machine.power_on()
            self.revive(machine)

    async def _die_at_answer(self, victim: Machine) -> None:
        """It dies with an update done and not answered; often back before anybody notices."""
        self.world.network.deadly[victim.name] = self.dice.randint(1, 8)
        for _ in range(30):
            await asyncio.sleep(0.1)
            if not victim.running:
                break
        self.world.network.deadly.pop(victim.name, None)
        victim.kill()
        await asyncio.sleep(self._some_seconds() / 2)
        self.revive(victim)

    async def _strike_at_recovery(self, victim: Machine) -> None:
        """Kill a member of a chain while one of its targets is being filled."""
        if victim.running:
            victim.kill()
            await asyncio.sleep(7)  # longer than a lease: it will have to be filled
            self.revive(victim)
        for _ in range(100):
            await asyncio.sleep(0.02)
            snapshot = self.world.primary_snapshot()
            chains = snapshot.chains.values() if snapshot is not None else ()
            if any(t.state == PublicState.SYNCING for chain in chains for t in chain.targets):
                break
        other = self.dice.choice(self.world.storage)
        other.kill()
        await asyncio.sleep(self._some_seconds() / 2)
        self.revive(other)

    async def _long_death(self, victim: Machine) -> None:
        """So long that it has to be filled."""
        victim.kill()
        await asyncio.sleep(6.5)
        self.revive(victim)

    async def _cut_off_with_client(self, victim: Machine) -> None:
        side = {victim.name, self.dice.choice(self.world.clients).name}
        names = list(self.world.machines)
        pairs = [(a, b) for a in names for b in names if (a in side) != (b in side)]
        await self._cut_links(pairs, 9.0)

    async def _cut_between_two(self, victim: Machine) -> None:
        """Two storage nodes that do not reach each other, or one not the other; all others do."""
        others = [machine for machine in self.world.storage if machine is not victim]
        other = self.dice.choice(others).name
        pairs = [(victim.name, other), (other, victim.name)]
        cut = self.dice.choice((pairs, pairs[:1], pairs[1:]))
        seconds = self.dice.choice((2.0, 6.0, 25.0))
        await self._cut_links(cut, seconds)
        if seconds == 2.0:  # too short to be acted on: they must not add up for one write
            await asyncio.sleep(CUT_REST_S)

    async def _cut_off_and_deaf(self, victim: Machine) -> None:
        """Nobody in its chains reaches it; a little later it does not hear mgmtd for a while."""
        others = [machine.name for machine in self.world.storage if machine is not victim]
        cut = self._cut_links([(other, victim.name) for other in others], 9.0)
        links = asyncio.get_running_loop().create_task(cut)
        await asyncio.sleep(self.dice.uniform(2.5, 4.0))
        await self._cut_links([(m.name, victim.name) for m in self.world.mgmtd], 2.0)
        await links

    async def _restart_quickly(self, victim: Machine) -> None:
        """It is back before its death is known, or reported."""
        victim.kill()
        await asyncio.sleep(self.dice.uniform(0.01, 0.1))
        self.revive(victim)

    async def _kill_both(self, victim: Machine) -> None:
        """A client dies together with the server of what it writes."""
        client = self.dice.choice(self.world.clients)
        victim.kill()
        client.kill()
        await asyncio.sleep(self._some_seconds() / 2)
        self.revive(client)
        self.revive(victim)

    async def _blank(self, victim: Machine) -> None:
        """Only while everybody is complete: what nobody else has would be lost, and may be."""
        while not self.world.complete():
            await asyncio.sleep(0.5)
        victim.kill()
        victim.disk.wipe()
        await asyncio.sleep(self._some_seconds())
        self.revive(victim)

    async def _cut_links(self, pairs: list[tuple[str, str]], duration_s: float = 0) -> None:
        links = [self.world.network.link(*pair) for pair in pairs]
        for link in links:
            link.cut = True
        await asyncio.sleep(duration_s or self._some_seconds())
        for link in links:
            link.cut = False

    async def _hold(self, victim: Machine) -> None:
        """Messages of one kind, to or from the victim, wait; then they come in any order."""
        dice, network = self.dice, self.world.network
        kind, answers = dice.choice(HELD if victim in self.world.storage else ((STORE, False),))
        share = dice.choice((0.3, 1.0))

        def wanted(message: Message) -> bool:
            ours = victim.name in (message.source, message.destination)
            return ours and (message.kind, message.answer) == (kind, answers) and (
                dice.random() < share
            )  # fmt: skip

        tap = Tap(wanted, copies=dice.random() < 0.2)
        network.taps.append(tap)
        await asyncio.sleep(self._some_seconds())
        dice.shuffle(tap.held)
        network.counts["message held"] += len(tap.held)
        if dice.random() < 0.3:
            kept = tap.held[: len(tap.held) // 2]
            del tap.held[: len(tap.held) // 2]
            tap.lose()
            tap.held = kept
        tap.release()
        network.taps.remove(tap)

    async def _partition(self, victim: Machine) -> None:
        """The machines fall into two groups."""
        names = list(self.world.machines)
        side = {name for name in names if self.dice.random() < 0.5} | {victim.name}
        pairs = [(a, b) for a in names for b in names if (a in side) != (b in side)]
        await self._cut_links(pairs)

    async def _one_way(self, victim: Machine) -> None:
        """The victim is heard by nobody, or hears nobody; perhaps not all of them."""
        others = [n for n in self.world.machines if n != victim.name and self.dice.random() < 0.7]
        if self.dice.random() < 0.5:
            await self._cut_links([(victim.name, other) for other in others])
        else:
            await self._cut_links([(other, victim.name) for other in others])

    async def _isolate(self, victim: Machine) -> None:
        """Cut off from the management services only, or from everybody."""
        names = [m.name for m in (*self.world.mgmtd, self.world.kv) if m is not victim]
        if self.dice.random() < 0.4:
            names = [name for name in self.world.machines if name != victim.name]
        await self._cut_links([p for n in names for p in ((victim.name, n), (n, victim.name))])

    async def _reset(self, victim: Machine) -> None:
        for name in self.world.machines:
            if self.dice.random() < 0.5:
                self.world.network.reset(victim.name, name)

    async def _slow_machine(self, victim: Machine) -> None:
        links = [
            self.world.network.link(*pair)
            for name in self.world.machines
            for pair in ((victim.name, name), (name, victim.name))
        ]
        factor = self.dice.choice((10, 100, 1000))
        for link in links:
            link.slow_factor = factor
        await asyncio.sleep(self._some_seconds())
        for link in links:
            link.slow_factor = 1.0

    async def _step_wall(self, victim: Machine) -> None:
        victim.wall_step_ns += self.dice.choice((-HOUR_NS, HOUR_NS))

    async def _rot(self, victim: Machine) -> None:
        """Always on the same machine: what has rotted everywhere is lost, and may be."""
        self._rotting = self._rotting or victim
        self._rotting.disk.rot()

    async def _full(self, victim: Machine) -> None:
        victim.disk.faults.full = True
        await asyncio.sleep(self._some_seconds())
        victim.disk.faults.full = False

    async def _disk_errors(self, victim: Machine) -> None:
        faults = victim.disk.faults
        faults.read_error_share = self.dice.choice((0, 0.05, 0.5))
        faults.write_error_share = self.dice.choice((0, 0.02, 0.3))
        faults.sync_error_share = self.dice.choice((0, 0, 0.5))
        await asyncio.sleep(self._some_seconds())
        faults.read_error_share = faults.write_error_share = faults.sync_error_share = 0.0
        victim.kill()  # what stands on a disk that failed is started again by its operator
        await asyncio.sleep(0.1)
        self.revive(victim)

    async def _slow_disk(self, victim: Machine) -> None:
        victim.disk.faults.slow_factor = self.dice.choice((10, 1000, 5000))
        await asyncio.sleep(self._some_seconds())
        victim.disk.faults.slow_factor = 1.0
