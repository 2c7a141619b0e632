"""How soon the cluster goes on: deaths that are reported, replicas that do not reach each other."""

import asyncio

import pytest

from emberfs.client.chunkread import jobs_of
from emberfs.proto.cluster import PublicState
from emberfs.proto.ids import SECOND
from sim.cluster import Shape
from sim.mutate_failover import deaths_of_earlier_lives_count, unwanted_members_are_put_out
from sim.mutations import Patch
from sim.scenario import FASTER, Hand, Scene, play
from sim.workload import PATIENT_NS, Place

SOON_NS = 9 * SECOND  # well behind a lease; the lease alone never ends these


def longest_ns(scene: Scene, since_ns: int) -> int:
    """How long the slowest operation took that began after `since_ns`, or has taken so far."""
    return max((op.end_ns or scene.now_ns) - op.start_ns for op in scene.since(since_ns))


@pytest.mark.parametrize("way", ["both", "out", "in"])
@pytest.mark.parametrize("pair", [(0, 1), (1, 2)], ids=["head", "middle"])
def test_r8_o15_writes_go_on_while_two_replicas_do_not_reach_each_other(
    pair: tuple[int, int], way: str
) -> None:
    """The link between two replicas alone is cut: one leaves until it heals, writes go on."""

    async def script(scene: Scene) -> None:
        one, other = (scene.world.storage[place] for place in pair)
        began_ns = scene.now_ns
        async with scene.cut([one], [other], way):
            await asyncio.sleep(40)
            assert len(scene.since(scene.now_ns - 10 * SECOND, "write")) > 20, "nobody writes"
            serving = list(scene.states().values()).count(PublicState.SERVING)
        assert longest_ns(scene, began_ns) < SOON_NS
        # Where it can be filled from another side it comes back before the link does.
        assert serving == (2 if pair == (1, 2) else 3)

    play(script)


def test_r8_who_reaches_nobody_leaves_instead_of_the_others() -> None:
    """A head that cannot send leaves the chain to the two that can."""

    async def script(scene: Scene) -> None:
        began_ns = scene.now_ns
        async with scene.cut([scene.head], scene.world.storage[1:], "out"):
            await asyncio.sleep(30)
            serving = [t for t, s in scene.states().items() if s == PublicState.SERVING]
            assert len(serving) >= 2
            assert serving[0] // 100 != 11, "it still takes the writes that it cannot pass on"
        assert longest_ns(scene, began_ns) < 2 * SOON_NS

    play(script)


def test_r8_the_last_serving_replica_is_asked_for_nothing() -> None:
    """Two replicas that do not reach each other: one serves alone until they do."""

    async def script(scene: Scene) -> None:
        began_ns = scene.now_ns
        async with scene.cut([scene.head], [scene.world.storage[1]]):
            await asyncio.sleep(60)
            serving = list(scene.states().values()).count(PublicState.SERVING)
            assert serving == 1
        assert longest_ns(scene, began_ns) < SOON_NS

    play(script, shape=Shape(storage=2, chains=1, replicas=2))


@pytest.mark.parametrize("role", range(3), ids=["head", "middle", "tail"])
def test_r9_a_reported_death_costs_no_lease(role: int) -> None:
    """When its host reports the death of a replica, reads and writes wait for that only."""

    async def script(scene: Scene) -> None:
        victim = scene.world.storage[role]
        victim.heir_share = 1.0
        began_ns = scene.now_ns
        victim.kill()
        await asyncio.sleep(10)
        assert longest_ns(scene, began_ns) < 2 * SECOND
        scene.revive(victim)
        await scene.all_serve()

    play(script)


async def restarts(scene: Scene) -> None:
    """Every replica in turn is back before its death is reported."""
    for victim in scene.world.storage:
        victim.heir_share = 1.0
        victim.kill()
        await asyncio.sleep(0.01)
        scene.revive(victim)
        await asyncio.sleep(6)


def test_the_report_of_an_earlier_life_ends_no_later_one() -> None:
    play(restarts)
    patch = Patch()
    deaths_of_earlier_lives_count(patch)
    try:
        with pytest.raises(AssertionError, match="never served"):
            play(restarts)
    finally:
        patch.undo()


def place_at(hand: Hand, replica: int) -> Place:
    """A chunk that clients read at a certain place of the chain."""
    for number in range(100):
        place = hand.place(number)
        (job,) = jobs_of(place.inode, place.layout, 0, memoryview(bytearray(4096)))
        if job.spread % FASTER.replicas == replica:
            return place
    raise AssertionError("no such chunk")


async def deaf_reader(scene: Scene) -> None:
    """The middle replica is cut from the head; then it and a client do not hear mgmtd."""
    world, middle = scene.world, scene.world.storage[1]
    reader, writer = scene.hand(0), scene.hand(1)
    place = place_at(reader, 1)
    over = False

    async def keep(hand: Hand, what: str) -> None:
        while not over:
            if what == "read":
                await hand.read(place, 1)
            else:
                await hand.write(place, 0, 4096, 10)
            await asyncio.sleep(0.02)

    loop = asyncio.get_running_loop()
    assert await writer.write(place, 0, 4096) == "ok"
    tasks = [loop.create_task(keep(reader, "read")), loop.create_task(keep(writer, "write"))]
    async with scene.cut([scene.head], [middle]):
        await asyncio.sleep(2.2)
        async with scene.cut(world.mgmtd, [middle, world.clients[0]], "out"):
            await asyncio.sleep(2.4)
        await asyncio.sleep(8)
    over = True
    await asyncio.gather(*tasks)


def test_o12_who_is_asked_to_leave_leaves_by_itself_before_others_go_on() -> None:
    """Put out without its knowledge, it would answer reads with what was true before."""
    play(deaf_reader, errors=True)
    patch = Patch()
    unwanted_members_are_put_out(patch)
    try:
        with pytest.raises(AssertionError, match=r"stale|future"):
            play(deaf_reader, errors=True)
    finally:
        patch.undo()


@pytest.mark.parametrize("how", ["freeze", "kill", "cut"])
@pytest.mark.parametrize("seed", range(4))
def test_r10_o15_another_mgmtd_is_found_in_about_half_a_lease(seed: int, how: str) -> None:
    """Storage nodes fence themselves then; clients wait for less than a second and a half."""

    async def script(scene: Scene) -> None:
        (leader,) = (m for m in scene.world.mgmtd if m.service and m.service.leads)
        assert leader.process is not None
        await asyncio.sleep(scene.world.dice_of("when").random())
        began_ns = scene.now_ns
        if how == "freeze":
            leader.process.pause()
        elif how == "kill":
            leader.kill()
        else:
            scene.world.network.down.add(leader.name)
        await asyncio.sleep(10)
        worst_ns = longest_ns(scene, began_ns)
        print("WORST", worst_ns / 1e9)
        if how == "freeze":
            leader.process.resume()
        scene.world.network.down.discard(leader.name)

    play(script, seed=seed)


@pytest.mark.parametrize("role", range(3), ids=["head", "middle", "tail"])
def test_o15_s11_a_disk_that_hangs_puts_its_target_out_and_in_again(role: int) -> None:
    """It fails nothing and ends nothing; its process lives and keeps its lease."""

    async def script(scene: Scene) -> None:
        victim = scene.world.storage[role]
        began_ns, scene.load.timeout_ns = scene.now_ns, PATIENT_NS
        victim.disk.faults.slow_factor = 300_000  # up to two minutes for one operation
        await asyncio.sleep(2)
        victim.disk.faults.slow_factor = 1.0
        await asyncio.sleep(28)
        serving = list(scene.states().values()).count(PublicState.SERVING)
        assert serving == 2, "it should have left"
        assert longest_ns(scene, began_ns) < 30 * SECOND
        await scene.all_serve(200)

    play(script)
