"""Situations of removed chunks: what a retry finds of those who wrote them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from emberfs.proto.storage_calls import UPDATE
from sim.hand import Hand
from sim.scenario import BlameError, Scene
from sim.situations import situation
from sim.workload import Place


@asynccontextmanager
async def _unanswered(scene: Scene, slow: Hand, place: Place) -> AsyncIterator[None]:
    """A write is done; its client hears of it after the block only, when it tries again."""
    answers = scene.tap(UPDATE.number, [scene.head], [slow.machine], answers=True)
    writing = asyncio.ensure_future(slow.write(place, 0, 4096, 60))
    await scene.until(lambda: bool(answers.held), 5)
    answers.lose()
    async with scene.cut([slow.machine], scene.world.storage):
        yield
    assert await writing == "ok"


async def _seen_and_removed(other: Hand, place: Place) -> None:
    assert await other.read(place) == "ok"
    assert await other.remove(place) == "ok"
    assert await other.read(place) == "ok"


@situation(errors=True)
async def a_write_is_tried_again_after_a_removal_and_a_restart(scene: Scene) -> None:
    """Seen, removed, and not answered; all servers were restarted since."""
    slow, other = scene.hand(0), scene.hand(1)
    place = slow.place()
    async with _unanswered(scene, slow, place):
        await _seen_and_removed(other, place)
        for machine in scene.world.storage:
            machine.kill()
            await asyncio.sleep(0.2)
            scene.revive(machine)
        await asyncio.sleep(1)
    assert await other.read(place) == "ok"


@situation(errors=True)
async def a_replica_was_away_when_a_chunk_came_and_went(scene: Scene) -> None:
    """It has never heard of the chunk, and is alone when the write is tried again."""
    slow, other = scene.hand(0), scene.hand(1)
    place = slow.place()
    await scene.bury(scene.tail)
    async with _unanswered(scene, slow, place):
        await _seen_and_removed(other, place)
        await _only_the_tail(scene)
    assert await other.read(place) == "ok"


@situation(errors=True)
async def a_replica_has_a_chunk_that_was_written_and_removed_without_it(scene: Scene) -> None:
    """It removes what it has, and is alone when the write is tried again."""
    slow, other = scene.hand(0), scene.hand(1)
    place = slow.place()
    assert await other.write(place, 0, 4096) == "ok"
    await scene.bury(scene.tail)
    async with _unanswered(scene, slow, place):
        await _seen_and_removed(other, place)
        await _only_the_tail(scene)
    assert await other.read(place) == "ok"


async def _only_the_tail(scene: Scene) -> None:
    """It comes back and is filled; then the others go."""
    scene.revive(scene.tail)
    await scene.all_serve()
    await scene.bury(*scene.world.storage[:2])


@situation(errors=True)
async def a_write_comes_after_its_client_has_removed_the_absent_chunk(scene: Scene) -> None:
    """It was given up, and the removal that followed found nothing."""
    hand = scene.hand()
    place = hand.place()
    tap = scene.tap(UPDATE.number, [hand.machine], [scene.head])
    assert await hand.write(place, 0, 4096, 0.5) == "unknown"
    tap.open = True
    assert await hand.remove(place) == "ok"
    tap.release()
    await asyncio.sleep(0.5)
    if any(scene.contents(place).values()):
        raise BlameError("late write", "a write that was given up has made a removed chunk anew")
