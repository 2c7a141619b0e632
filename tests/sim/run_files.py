"""One simulation with a metadata server: names and files instead of bare chunks.

sim.run calls `play_files` for the moods that have `files`; what is judged in the end is here.
"""

import asyncio
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from emberfs.client.oserrors import FileSystemError
from emberfs.deploy.fsck import Fsck, Options
from emberfs.deploy.fsck_stores import ClusterStores
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import SECOND
from sim import loop as simloop
from sim.check_files import check_files
from sim.check_lives import check_lives
from sim.check_versions import check_versions
from sim.cluster import Shape, World
from sim.file_lane import HOME
from sim.files_load import FilesLoad
from sim.meta_view import leftovers, rows_of, seen_of
from sim.moods import Mood
from sim.nemesis_files import FilesNemesis
from sim.violation import Violation
from sim.workload import LAST_READERS

if TYPE_CHECKING:
    from sim.run import Outcome

LANES_END_S = 150.0  # every call ends within its deadline
SETTLED_S = 25.0  # lease, grace time, sweeps, collection
ERRORS_END_NS = 40 * SECOND  # after the heal


async def play_files(
    loop: simloop.SimLoop, outcome: "Outcome", mood: Mood, seconds: float, shape: Shape
) -> None:
    """Boot, load, rage, heal, judge."""
    shape = replace(shape, meta=mood.metas, shared=mood.metas > 1)
    world = World(loop, outcome.seed, shape)
    await world.boot()
    found = outcome.violations
    if not await world.until_serving(30 * SECOND):
        found.append(Violation("no start", ""))
    load = FilesLoad(world)
    outcome.history = load.history
    await prepare(load)
    for index in range(len(world.clients)):
        load.start(index)
    nemesis = FilesNemesis(world, load, mood)
    outcome.story = nemesis.story
    await nemesis.rage(seconds)
    healed_ns = loop.now_ns()
    if not await world.until_serving(90 * SECOND):
        found.append(Violation("no exit", "a replica does not serve"))
    await finish(load, outcome)
    await judge(load, outcome, mood, healed_ns)
    outcome.faults = nemesis.counts + world.network.counts
    for machine in world.machines.values():
        outcome.faults.update(machine.disk.faults.counts)


async def prepare(load: FilesLoad) -> None:
    """Make the directory of the files, stable."""
    machine = load.world.clients[0]

    async def make() -> None:
        fs, _ = await load.open(machine)
        while True:
            try:
                await fs.mkdir(HOME)
                await fs.cluster.metadata.stable()
                return
            except FileExistsError:
                return
            except FileSystemError:
                await asyncio.sleep(0.2)

    assert machine.process is not None
    await machine.process.context.run(load.world.loop.create_task, make())


async def finish(load: FilesLoad, outcome: "Outcome") -> None:
    """Let every lane come to its end, wait until all is settled, look at everything."""
    load.stopping = True
    end_s = load.world.loop.time() + LANES_END_S
    while (working := load.working()) and load.world.loop.time() < end_s:
        await asyncio.sleep(0.1)
    if working:
        outcome.violations.append(Violation("hangs", f"lanes of {', '.join(working)}"))
    await asyncio.sleep(SETTLED_S)
    for index in range(len(load.world.clients)):
        try:
            await load.read_all(index)
        except FileSystemError as problem:
            outcome.violations.append(Violation("unreadable", str(problem)))


async def judge(
    load: FilesLoad,
    outcome: "Outcome",
    mood: Mood,
    healed_ns: int,
    *,
    names: bool = True,
    contents: bool = True,
) -> None:
    """Put everything to the checkers; not `contents` where writes were not recorded."""
    world, history, found = load.world, load.history, outcome.violations
    if names:
        last = seen_of(rows_of(world))
        calls = list(history)
        verdict = check_lives(calls, load.requests, load.cuts, last, world.loop.now_ns())
        found += verdict.violations
        outcome.undecided += len(verdict.undecided)
    if contents:
        cuts_ns = [cut.at_ns for cut in load.cuts]
        found += check_files(history, load.via, LAST_READERS, load.cut_ns, cuts_ns)
    found += check_versions(world.seen)
    found += _left_over(load)
    found += await _fsck(load)
    found += [Violation("internal error", text) for text in world.network.internal_errors]
    found += [Violation("load failed", text) for text in load.failures()]
    found += [
        Violation("service died", machine.failure)
        for machine in world.machines.values()
        if machine.failure
    ]
    late_ns = -1 if mood.gentle else healed_ns + ERRORS_END_NS
    for at_ns, what in load.errors:
        if at_ns > late_ns:
            found.append(Violation("error at a client", f"{at_ns / 1e9:.6f}: {what}"))
    outcome.operations = len(history)
    outcome.errors = len(load.errors)
    state = blake2b(history.digest().encode(), digest_size=16)
    state.update(repr(world.seen).encode())
    outcome.digest = state.hexdigest()


def _left_over(load: FilesLoad) -> list[Violation]:
    """All files are closed: nobody has a session, nothing waits to be removed.

    A power cut may bring the session of a closed file back, as it may undo any call; its client
    keeps it as long as it lives.
    """
    clients = load.world.clients
    alive = {c.service.client_id for c in clients if c.service is not None} if load.cuts else set()
    return [
        Violation("left over", f"{left.kind} of inode {left.inode} ({left.client:x})")
        for left in leftovers(rows_of(load.world))
        if left.client not in alive
    ]


async def _fsck(load: FilesLoad) -> list[Violation]:
    """The real fsck, run by a client: nothing is wrong in a quiet cluster."""
    machine = load.world.clients[0]

    async def look() -> list[str]:
        cluster = machine.service
        stores = ClusterStores(cluster)
        options = Options(grace_ns=0, pause_ns=SECOND)
        fsck = Fsck(cluster.env, cluster.metadata, stores, lambda _: None, options, None)
        try:
            report = await fsck.run()
        except EmberfsError as problem:
            return [f"fsck failed: {problem}"]
        finally:
            stores.close()
        return [finding.text for finding in report.findings]

    assert machine.process is not None
    texts = await machine.process.context.run(load.world.loop.create_task, look())
    return [Violation("fsck", text) for text in texts]
