"""How soon the cluster goes on: deaths that are reported, replicas that do not reach each other."""

import asyncio

import pytest

from emberfs.proto.cluster import PublicState
from emberfs.proto.ids import SECOND
from sim.cluster import Shape
from sim.moods import PATIENT_NS
from sim.scenario import Scene, play

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
            await asyncio.sleep(20)
            assert len(scene.since(scene.now_ns - 5 * SECOND, "write")) > 10, "nobody writes"
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
            await asyncio.sleep(20)
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
        scene.load.pause_ns *= 5
        victim.disk.faults.slow_factor = 300_000  # up to two minutes for one operation

        def out() -> bool:
            return list(scene.states().values()).count(PublicState.SERVING) == 2

        await scene.until(out, 45)
        victim.disk.faults.slow_factor = 1.0
        assert longest_ns(scene, began_ns) < 40 * SECOND
        await scene.all_serve(200)

    play(script)
