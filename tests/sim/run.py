"""One simulation from its seed: a cluster, a load, faults, the end state, the checkers.

python -m sim.run SEED [--mood NAME] [--seconds 30] [--trace]; many of them: sim.many.
"""

import argparse
import asyncio
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from emberfs.proto.cluster import PublicState
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND
from sim import loop as simloop
from sim.check_blocks import check_findings
from sim.check_durable import after_cut, check_durable
from sim.check_linear import check_linear
from sim.check_replicas import ChunkState, Replica, check_replicas
from sim.check_versions import check_versions
from sim.cluster import Shape, World, scrub_findings
from sim.history import History, Op
from sim.lastwords import last_words
from sim.moods import MOODS, Mood
from sim.nemesis import Nemesis
from sim.nemesis_files import FILE_MOODS
from sim.run_files import play_files
from sim.violation import Violation, report
from sim.workload import LAST_READERS, TIMEOUT_NS, Workload

BOOT_NS = 30 * SECOND
ALL_MOODS = MOODS | FILE_MOODS
_UNREADABLE = (Code.CHECKSUM.name, Code.DISK.name)
EXIT_NS = 90 * SECOND  # from the end of all faults until every replica must serve
QUIET_S = 3.0
SECONDS = 30.0


@dataclass
class Outcome:
    """What a simulation showed."""

    seed: int
    mood: str
    seconds: float = SECONDS
    digest: str = ""
    virtual_s: float = 0.0
    operations: int = 0
    errors: int = 0
    undecided: int = 0
    steps: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    history: History = field(default_factory=History)
    again: str = ""  # the command that repeats it, if it is not `make sim`

    @property
    def command(self) -> str:
        """How to repeat it."""
        return self.again or (
            f"make sim SEED={self.seed} MOOD='{self.mood}' SECONDS={self.seconds:g}"
        )


def mood_of(seed: int, files: bool = False) -> Mood:
    """Seeds take the moods in turn: those of bare chunks, or those of names and files."""
    moods = list((FILE_MOODS if files else MOODS).values())
    return moods[seed % len(moods)]


def shape_of(seed: int) -> Shape:
    """Mostly three nodes; sometimes more nodes than replicas, or two replicas."""
    turn = random.Random(f"shape {seed}").randrange(4)
    if turn == 2:
        return Shape(storage=4, chains=2)
    if turn == 3:
        return Shape(storage=3, chains=3, replicas=2)
    return Shape()


def simulate(seed: int, mood: Mood | None = None, seconds: float = SECONDS) -> Outcome:
    """Run one seed to its end."""
    mood = mood or mood_of(seed)
    outcome = Outcome(seed, mood.name, seconds)

    async def main(loop: simloop.SimLoop) -> None:
        if mood.files:
            await play_files(loop, outcome, mood, seconds, shape_of(seed))
        else:
            await _play(loop, outcome, mood, seconds)
        outcome.steps = loop.steps
        outcome.virtual_s = loop.time()

    try:
        simloop.run(main)
    except simloop.StuckError:
        outcome.violations.append(Violation("stuck", "nobody is ready and no timer runs"))
    return outcome


async def _play(loop: simloop.SimLoop, outcome: Outcome, mood: Mood, seconds: float) -> None:
    world = World(loop, outcome.seed, shape_of(outcome.seed))
    await world.boot()
    found = outcome.violations
    if not await world.until_serving(BOOT_NS):
        found.append(Violation("no start", _states(world)))
    load = Workload(world)
    load.timeout_ns = mood.patience_ns if mood.gentle else TIMEOUT_NS
    outcome.history = load.history
    for index in range(len(world.clients)):
        load.start(index)
    nemesis = Nemesis(world, load, mood)
    outcome.story = nemesis.story
    await nemesis.rage(seconds)
    healed_ns = loop.now_ns()
    if not await world.until_serving(EXIT_NS):
        found.append(Violation("no exit", _states(world)))
    load.stopping = True
    await asyncio.sleep(QUIET_S + 16)
    for index in range(len(world.clients)):
        await load.read_all(index)
    await asyncio.sleep(QUIET_S)
    _judge(world, load, outcome, mood, healed_ns)
    outcome.faults = nemesis.counts + world.network.counts
    for machine in world.machines.values():
        outcome.faults.update(machine.disk.faults.counts)


def _states(world: World) -> str:
    snapshot = world.primary_snapshot()
    if snapshot is None:
        return "no mgmtd leads: " + ", ".join(m.failure or "alive" for m in world.mgmtd)
    lines = [
        f"chain {chain.id} version {chain.version}: "
        + ", ".join(f"{t.target} {t.state.name}" for t in chain.targets)
        for chain in snapshot.chains.values()
    ]
    for machine in world.storage:
        if machine.service is not None:
            reports = (hosted.report() for hosted in machine.service.service.targets.values())
            lines += [f"{machine.name} {report}" for report in reports]
        lines.append(f"{machine.name} {machine.failure}")
    return "; ".join(lines)


def _judge(world: World, load: Workload, outcome: Outcome, mood: Mood, healed_ns: int) -> None:
    found, history = outcome.violations, load.history
    for some in _spans(history, load.cut_ns):
        verdict = check_linear(some)
        found += verdict.violations
        outcome.undecided += len(verdict.undecided)
    if load.cut_ns:
        found += check_durable(history, load.cut_ns)
    found += check_versions(world.seen) + world.managers.violations()
    replicas = _replicas(world)
    if "rot" in mood.faults:
        _leave_out_damaged(replicas)
    found += check_replicas(replicas) + _damaged(replicas) + _failed_at_last(history, mood)
    found += check_findings(_findings(world)) + _scrubbed(world, mood)
    found += [Violation("internal error", text) for text in world.network.internal_errors]
    found += [
        Violation("service died", machine.failure)
        for machine in world.machines.values()
        if machine.failure
    ]
    if not world.complete():
        found.append(Violation("no exit", f"a target thinks otherwise: {_states(world)}"))
    late_ns = healed_ns if not mood.gentle else 0
    for at_ns, what in load.errors:
        if mood.gentle or at_ns > late_ns + 30 * SECOND:
            found.append(Violation("error at a client", f"{at_ns / 1e9:.6f}: {what}"))
    outcome.operations = len(history)
    outcome.errors = len(load.errors)
    state = blake2b(history.digest().encode(), digest_size=16)
    state.update(repr(world.seen).encode())
    outcome.digest = state.hexdigest()


def _spans(history: History, cut_ns: int) -> list[list[Op]]:
    """What check_linear has to see: all, or what came before and after a power cut."""
    if not cut_ns:
        return [list(history)]
    before = [
        op
        for op in history
        if op.start_ns < cut_ns and (op.kind != "read" or (op.end_ns or cut_ns) < cut_ns)
    ]
    return [before, after_cut(history, cut_ns)]


def _replicas(world: World) -> list[Replica]:
    snapshot = world.primary_snapshot()
    if snapshot is None:
        return []
    states = {t.target: (c.id, t.state) for c in snapshot.chains.values() for t in c.targets}
    found = []
    for machine in world.storage:
        if machine.service is None:
            continue
        for target, hosted in machine.service.service.targets.items():
            chain, state = states.get(target, (0, PublicState.OFFLINE))
            if hosted.store is None:
                continue
            serving = state == PublicState.SERVING
            pending = hosted.store.pending_chunks()
            found.append(Replica(chain, target, serving, _chunks(hosted.store), pending))
    return found


def _failed_at_last(history: History, mood: Mood) -> list[Violation]:
    """At the end everybody can read everything, save what has rotten everywhere."""
    allowed = ("CHECKSUM",) if "rot" in mood.faults else ()
    return [
        Violation("unreadable", "nothing is broken any more", (op,))
        for op in history
        if op.client >= LAST_READERS and not op.ok and op.result not in allowed
    ]


def _scrubbed(world: World, mood: Mood) -> list[Violation]:
    """Replicas that serve do not differ, hence scrubbers find nothing on disks that do not rot.

    They mend what they find, so that check_replicas sees nothing of it in the end.
    """
    if {"rot", "disk errors"} & set(mood.faults):
        return []
    servers = [machine.service for machine in world.storage if machine.running and machine.service]
    count = world.scrub_findings + sum(map(scrub_findings, servers))
    return [Violation("scrub finding", f"{count} chunks were found to be wrong")] if count else []


def _leave_out_damaged(replicas: list[Replica]) -> None:
    """Nobody may have read it since it rotted."""
    bad = {
        (r.chain, chunk)
        for r in replicas
        for chunk, state in r.chunks.items()
        if state.digest in _UNREADABLE
    }
    for replica in replicas:
        replica.chunks = {
            chunk: state
            for chunk, state in replica.chunks.items()
            if (replica.chain, chunk) not in bad
        }


def _damaged(replicas: list[Replica]) -> list[Violation]:
    """Nothing rots in most moods: whatever does not verify was written or recovered wrongly."""
    return [
        Violation("damaged", f"target {replica.target} chunk {chunk.hex()}: {state}")
        for replica in replicas
        if replica.serving
        for chunk, state in replica.chunks.items()
        if state.digest in _UNREADABLE
    ]


def _chunks(store: object) -> dict[bytes, ChunkState]:
    rows, _ = store.list(b"", b"\xff" * 20, 1000)  # type: ignore[attr-defined]
    found = {}
    for row in rows:
        content = memoryview(bytearray(row.length))
        try:
            if row.length:
                store.read_into(row.chunk, version=0, offset=0, length=row.length, sink=content)  # type: ignore[attr-defined]
            digest = blake2b(content, digest_size=8).hexdigest()
        except EmberfsError as problem:
            digest = problem.code.name
        if row.version:
            found[bytes(row.chunk)] = ChunkState(row.version, row.length, digest)
    return found


def _findings(world: World) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for machine in world.storage:
        if machine.service is None:
            continue
        for target, hosted in machine.service.service.targets.items():
            if hosted.store is not None:
                found[f"{machine.name} {target}"] = list(hosted.store.check().findings)
    return found


# ---------------------------------------------------------------- command line


def tell(outcome: Outcome, words: Sequence[str] = ()) -> str:
    """Everything that helps to understand a failing seed; `words`: see lastwords.py."""
    lines = [
        f"seed {outcome.seed} ({outcome.mood}) fails:",
        report(outcome.violations),
        "the last faults:",
        *outcome.story[-30:],
        "the last operations:",
        *outcome.history.tail(20),
        *(["what every machine said last:", *words] if words else []),
        f"again: {outcome.command}",
    ]
    return "\n".join(lines)


class VirtualTime(logging.Formatter):
    """Log lines with virtual time and the process that speaks."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        process = simloop.PROCESS.get()
        name = process.name if process is not None else "simulation"
        try:
            now_s = asyncio.get_running_loop().time()
        except RuntimeError:
            now_s = 0.0
        return f"{now_s:10.6f} {name}: {record.getMessage()}"


def fix_hashes(module: str) -> None:
    """Start this program again with fixed string hashes: one seed, one history."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="sim.run", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--mood", choices=sorted(ALL_MOODS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of faults, virtual")
    parser.add_argument("--trace", action="store_true", help="show the services' logs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO if options.trace else logging.CRITICAL)
    logging.getLogger().handlers[0].setFormatter(VirtualTime())
    mood = ALL_MOODS[options.mood] if options.mood else None

    def play() -> Outcome:
        return simulate(options.seed, mood, options.seconds)

    outcome = play()
    if outcome.violations:
        print(tell(outcome, last_words(play)))
        return 1
    print(
        f"seed {outcome.seed} ({outcome.mood}): {outcome.operations} operations, "
        f"{outcome.virtual_s:.1f} virtual seconds, {outcome.steps} steps, digest "
        f"{outcome.digest}: no violation"
    )
    return 0


if __name__ == "__main__":
    fix_hashes("sim.run")
    sys.exit(main())
