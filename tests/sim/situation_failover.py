"""Situations of what shortens an outage: reported deaths, members that are asked to leave."""

import asyncio

from emberfs.proto.cluster import PublicState
from sim.hand import Hand
from sim.scenario import Scene
from sim.situations import situation
from sim.workload import Place


@situation()
async def two_replicas_do_not_reach_each_other(scene: Scene) -> None:
    """Both keep their leases: only they can know, and a write between them waits."""
    hand = scene.hand()
    place = hand.place()
    async with scene.cut([scene.head], [scene.world.storage[1]]):
        assert await hand.write(place, 0, 4096, 9) == "ok"


@situation()
async def a_process_is_back_before_its_death_is_reported(scene: Scene) -> None:
    """The report is of an earlier life, and none of the present one."""
    for victim in scene.world.storage:
        victim.heir_share = 1.0
        victim.kill()
        await asyncio.sleep(0.01)
        scene.revive(victim)
        await asyncio.sleep(6)
    await scene.until(lambda: set(scene.states().values()) == {PublicState.SERVING}, 60)


@situation(errors=True)
async def who_is_to_leave_does_not_hear_of_it(scene: Scene) -> None:
    """The middle replica is cut from the head; then it and a client do not hear mgmtd."""
    world, middle = scene.world, scene.world.storage[1]
    reader, writer = scene.hand(0), scene.hand(1)
    place = reader.place()
    over = False

    async def read(hand: Hand, where: Place) -> None:
        while not over:
            await hand.read(where, 1, at=middle)
            await asyncio.sleep(0.02)

    async def write(hand: Hand, where: Place) -> None:
        while not over:
            await hand.write(where, 0, 4096, 10)
            await asyncio.sleep(0.02)

    assert await writer.write(place, 0, 4096) == "ok"
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(read(reader, place)), loop.create_task(write(writer, place))]
    async with scene.cut([scene.head], [middle]):
        await asyncio.sleep(2.2)
        async with scene.cut(world.mgmtd, [middle, world.clients[0]], "out"):
            await asyncio.sleep(2.4)
        await asyncio.sleep(8)
    over = True
    await asyncio.gather(*tasks)
