"""Situations of a partition and of old knowledge: who may still serve, and who may again."""

import asyncio

from emberfs.proto.cluster import PublicState
from emberfs.proto.storage_calls import UPDATE
from sim.scenario import BURIED_S, Scene
from sim.situations import situation


def _gone(scene: Scene) -> bool:
    return scene.states().get(1101) not in (None, PublicState.SERVING)


@situation(errors=True)
async def a_replica_is_cut_off_with_a_client(scene: Scene) -> None:
    """As soon as the others have gone on without it, it must not answer any more."""
    apart = [scene.head, scene.world.clients[0]]
    inside, outside = scene.hand(0), scene.hand(1)
    place = inside.place()
    assert await inside.write(place, 0, 4096) == "ok"
    await asyncio.sleep(5)  # nobody is declared dead in the first lease of a leader
    async with scene.cut(apart, scene.everyone_but(*apart)):
        await scene.until(lambda: _gone(scene), BURIED_S)
        assert await outside.write(place, 0, 4096, 10) == "ok"
        await inside.read(place, 3, at=scene.head)
        assert await outside.write(place, 0, 4096, 10) == "ok"
        await inside.read(place, 3, at=scene.head)


@situation(errors=True)
async def a_replica_is_heard_again_before_it_hears_the_news(scene: Scene) -> None:
    """Its lease is renewed, but the chain that it knows is the one of before."""
    client = scene.world.clients[0]
    apart = [scene.head, client]
    inside, outside = scene.hand(0), scene.hand(1)
    place = inside.place()
    assert await inside.write(place, 0, 4096) == "ok"
    news = scene.tap("routing", scene.world.mgmtd, apart, answers=True)
    async with scene.cut(apart, scene.everyone_but(*apart)):
        await asyncio.sleep(BURIED_S)
        assert await outside.write(place, 0, 4096, 10) == "ok"
    for _ in range(4):
        await asyncio.sleep(0.4)
        await inside.read(place, 1, at=scene.head)
    news.release()


@situation(errors=True)
async def a_head_wakes_up_outside_its_chain_with_a_write_in_hand(scene: Scene) -> None:
    """The others never had the write and never will: its client must not be told that they do."""
    head, client = scene.head, scene.world.clients[0]
    inside, outside = scene.hand(0), scene.hand(1)
    place = inside.place()
    assert await inside.write(place, 0, 4096) == "ok"
    forward = scene.tap(UPDATE.number, [head], scene.world.storage)
    news = scene.tap("routing", scene.world.mgmtd, [client], answers=True)
    its_news = scene.tap("routing", scene.world.mgmtd, [head], answers=True)
    async with scene.cut([head], [*scene.world.mgmtd, *scene.world.clients[1:]]):
        await asyncio.sleep(0.7)
        writing = asyncio.ensure_future(inside.write(place, 0, 4096, 7.5))
        await scene.until(lambda: bool(forward.held), 5)
        await scene.until(lambda: _gone(scene), BURIED_S)
        assert await outside.write(place, 0, 100, 10) == "ok"
    await asyncio.sleep(1.2)  # it is heard again
    its_news.release()
    await writing
    assert await outside.read(place, at=scene.tail) == "ok"
    forward.lose()
    news.release()
