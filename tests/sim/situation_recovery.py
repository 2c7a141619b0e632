"""Situations of a replica that was away: what it is filled with, and when it may serve."""

import asyncio

from emberfs.proto.cluster import PublicState
from emberfs.proto.storage_calls import LIST, SYNC, UPDATE, UpdateKind
from sim.disk import Fate
from sim.hand import Hand
from sim.machine import Machine
from sim.scenario import BURIED_S, Scene
from sim.situations import situation
from sim.tap import Message, Tap
from sim.workload import Place


def _replaces(message: Message) -> bool:
    return UPDATE.decode_request(message.body).kind == UpdateKind.REPLACE


def _syncing(scene: Scene) -> bool:
    return PublicState.SYNCING in scene.states().values()


async def _tail_misses(scene: Scene, hand: Hand, *places: Place) -> None:
    """Write places while the tail is away."""
    for place in places:
        assert await hand.write(place, 0, 4096) == "ok"
    await scene.bury(scene.tail)
    for place in places:
        assert await hand.write(place, 0, 4096) == "ok"


async def _filled_but_not_told(scene: Scene) -> Tap:
    """Bring the tail back and fill it; that it is complete does not reach it."""
    told = scene.tap(SYNC.number, [scene.world.storage[1]], [scene.tail])
    scene.revive(scene.tail)
    await scene.until(lambda: any(_done(message) for message, _ in told.held), 10)
    return told


def _done(message: Message) -> bool:
    return SYNC.decode_request(message.body).done


@situation(errors=True)
async def a_replica_is_back_and_not_filled_yet(scene: Scene) -> None:
    """Whoever reads meanwhile reads elsewhere."""
    writer, reader = scene.hand(0), scene.hand(1)
    place = writer.place()
    await _tail_misses(scene, writer, place)
    tap = scene.tap(LIST.number, [scene.world.storage[1]], [scene.tail])
    scene.revive(scene.tail)
    await scene.until(lambda: bool(tap.held), 10)
    for _ in range(4):
        await asyncio.sleep(0.6)
        assert await reader.read(place, at=scene.tail) == "ok"
    tap.release()


@situation(errors=True)
async def a_replica_is_written_while_it_is_filled(scene: Scene) -> None:
    """What comes after the comparison must reach it, too."""
    writer, reader = scene.hand(0), scene.hand(1)
    place, new = writer.place(0), writer.place(1)
    await _tail_misses(scene, writer, place)
    told = await _filled_but_not_told(scene)
    assert await writer.write(place, 0, 4096) == "ok"
    assert await writer.write(new, 0, 4096) == "ok"
    told.release()
    await scene.all_serve()
    assert await reader.read(place, at=scene.tail) == "ok"


@situation(errors=True)
async def a_chunk_is_to_be_sent_while_an_update_of_it_is_in_flight(scene: Scene) -> None:
    """The target has the update already and its predecessor does not know: it must not go back."""
    middle, hand, reader = scene.world.storage[1], scene.hand(0), scene.hand(1)
    place = hand.place()
    await _tail_misses(scene, hand, place)
    comparison = scene.tap(LIST.number, [middle], [scene.tail])
    answer = scene.tap(UPDATE.number, [scene.tail], [middle], answers=True)
    scene.revive(scene.tail)
    await scene.until(lambda: bool(comparison.held), 10)
    writing = asyncio.ensure_future(hand.write(place, 0, 4096))
    await scene.until(lambda: bool(answer.held), 10)
    answer.open = True
    comparison.release()
    await asyncio.sleep(0.5)
    answer.release()
    assert await writing == "ok"
    await scene.all_serve()
    assert await reader.read(place, at=scene.tail) == "ok"


@situation(errors=True)
async def a_whole_chunk_comes_again_after_a_newer_one(scene: Scene) -> None:
    """The network repeats what a recovery sent, when an update has overtaken it."""
    middle, hand, reader = scene.world.storage[1], scene.hand(0), scene.hand(1)
    place = hand.place()
    await _tail_misses(scene, hand, place)
    copies = scene.tap(UPDATE.number, [middle], [scene.tail], copies=True, only=_replaces)
    told = await _filled_but_not_told(scene)
    first = copies.held[0]
    assert await hand.write(place, 0, 4096) == "ok"
    first[1]()
    copies.lose()
    await asyncio.sleep(0.2)
    told.release()
    await scene.all_serve()
    assert await reader.read(place, at=scene.tail) == "ok"


@situation(errors=True)
async def the_tail_has_a_write_that_a_former_tail_must_wait_for(scene: Scene) -> None:
    """The new tail has committed and shows it; head and former tail know of neither."""
    head, middle, tail = scene.world.storage
    writer, reader = scene.hand(0), scene.hand(1)
    place = writer.place()
    await _tail_misses(scene, writer, place)
    told = await _filled_but_not_told(scene)
    late = [head, middle, scene.world.clients[0]]
    news = scene.tap("routing", scene.world.mgmtd, late, answers=True)
    answer = scene.tap(UPDATE.number, [tail], [middle], answers=True)
    writing = asyncio.ensure_future(writer.write(place, 0, 4096))
    await scene.until(lambda: bool(answer.held), 5)
    told.release()
    await scene.all_serve()
    await asyncio.sleep(0.1)
    assert await reader.read(place, at=tail) == "ok"
    await writer.read(place, 1.5, at=middle)
    await writer.read(place, 1.5, at=head)
    news.release()
    answer.release()
    assert await writing == "ok"


@situation(errors=True)
async def a_former_tail_is_asked_what_is_committed(scene: Scene) -> None:
    """It has the update pending, and the tail of today not at all."""
    head, middle, tail = scene.world.storage
    writer, reader = scene.hand(0), scene.hand(1)
    place = writer.place()
    await _tail_misses(scene, writer, place)
    told = await _filled_but_not_told(scene)
    news = scene.tap("routing", scene.world.mgmtd, [head, scene.world.clients[0]], answers=True)
    forward = scene.tap(UPDATE.number, [middle], [tail])
    writing = asyncio.ensure_future(writer.write(place, 0, 4096))
    await scene.until(lambda: bool(forward.held), 5)
    told.release()
    await scene.all_serve()
    await asyncio.sleep(0.1)
    await writer.read(place, 1.5, at=head)
    assert await reader.read(place, at=tail) == "ok"
    news.release()
    forward.release()
    assert await writing == "ok"


@situation(errors=True)
async def two_replicas_return_with_a_write_that_nobody_answered(scene: Scene) -> None:
    """They hold it as pending, equal otherwise to the tail, which has never heard of it."""
    head, middle, tail = scene.world.storage
    hand = scene.hand()
    place = hand.place()
    assert await hand.write(place, 0, 4096) == "ok"
    tap = scene.tap(UPDATE.number, [middle], [tail])
    assert await hand.write(place, 0, 4096, 1) == "unknown"
    assert tap.held
    await scene.bury(head, middle)
    tap.lose()
    assert await hand.read(place) == "ok"
    scene.revive(middle)
    await scene.all_serve_but(1101)
    scene.revive(head)
    await scene.all_serve()
    for machine in (head, middle, tail):
        assert await hand.read(place, at=machine) == "ok"


@situation(errors=True)
async def a_new_head_that_was_filled_is_asked_again(scene: Scene) -> None:
    """A write was done and not answered; the head of then is gone, others have written since."""
    head, middle, tail = scene.world.storage
    slow, other = scene.hand(0), scene.hand(1)
    place = slow.place()
    await _tail_misses(scene, other, place)
    answers = scene.tap(UPDATE.number, [head], [scene.world.clients[0]], answers=True)
    writing = asyncio.ensure_future(slow.write(place, 0, 4096, 60))
    await scene.until(lambda: bool(answers.held), 5)
    answers.lose()
    async with scene.cut([scene.world.clients[0]], [head, middle]):
        assert await other.read(place) == "ok"
        scene.revive(tail)
        await scene.all_serve()
        assert await other.write(place, 0, 4096) == "ok"
        assert await other.read(place) == "ok"
        await scene.bury(head, middle)
        assert await writing == "ok"
    assert await other.read(place) == "ok"


@situation(errors=True)
async def replicas_hold_different_contents_under_one_version(scene: Scene) -> None:
    """Two have lost versions in a power cut; one of these numbers goes to another write."""
    head, middle, tail = scene.world.storage
    hand = scene.hand()
    place, ahead = hand.place(0), hand.place(1)
    for one in (place, ahead):
        assert await hand.write(one, 0, 4096) == "ok"
    await scene.after_a_flush(hand)
    for one in (place, ahead):
        assert await hand.write(one, 0, 4096) == "ok"
    await scene.blackout(Fate(data=False, rows=False), stor3=Fate(data=True, rows=True))
    await _one_returns(scene, head)
    assert await hand.write(place, 0, 4096) == "ok"
    scene.power_on(middle, tail)
    await scene.all_serve()
    for machine in (head, middle, tail):
        assert await hand.read(place, at=machine) == "ok"
        assert await hand.read(ahead, at=machine) == "ok"


async def _one_returns(scene: Scene, machine: Machine) -> None:
    await asyncio.sleep(BURIED_S)
    scene.power_on(machine)
    await scene.until(lambda: PublicState.SERVING in scene.states().values(), 20)


@situation(errors=True)
async def a_replica_that_missed_writes_returns_first(scene: Scene) -> None:
    """All die one after the other; the first to return is the one that died first."""
    hand = scene.hand()
    place = hand.place()
    for machine in scene.world.storage:
        assert await hand.write(place, 0, 4096) == "ok"
        await scene.bury(machine)
    for machine in scene.world.storage:
        scene.revive(machine)
        await asyncio.sleep(7)
        await hand.read(place, 1)


@situation(errors=True)
async def a_chunk_is_removed_while_a_replica_is_away(scene: Scene) -> None:
    """When it is back it has no such chunk either."""
    hand = scene.hand()
    place = hand.place()
    assert await hand.write(place, 0, 4096) == "ok"
    await scene.bury(scene.tail)
    assert await hand.remove(place) == "ok"
    scene.revive(scene.tail)
    await scene.all_serve()
    assert await hand.read(place, at=scene.tail) == "ok"


@situation(errors=True)
async def an_empty_disk_returns_first_of_all(scene: Scene) -> None:
    """All have died; one disk was replaced, and its machine is back before the others."""
    hand, head = scene.hand(), scene.head
    place = hand.place()
    assert await hand.write(place, 0, 4096) == "ok"
    await scene.bury(*scene.world.storage)
    head.disk.wipe()
    scene.revive(head)
    await asyncio.sleep(BURIED_S)
    await hand.read(place, 1)
    for machine in scene.world.storage[1:]:
        scene.revive(machine)
    await asyncio.sleep(1)
    await scene.all_serve()
    assert await hand.read(place) == "ok"


@situation(errors=True)
async def an_empty_disk_returns_twice(scene: Scene) -> None:
    """Its process was restarted before it was filled: it is as empty as before."""
    hand, head = scene.hand(), scene.head
    place = hand.place()
    assert await hand.write(place, 0, 4096) == "ok"
    await scene.bury(*scene.world.storage)
    head.disk.wipe()
    for _ in range(2):
        scene.revive(head)
        await asyncio.sleep(4)
        head.kill()
    scene.revive(head)
    await asyncio.sleep(4)
    for machine in scene.world.storage[1:]:
        scene.revive(machine)
    await asyncio.sleep(1)
    await scene.all_serve()
    assert await hand.read(place) == "ok"


@situation(errors=True)
async def a_recovery_begins_while_a_slow_disk_writes(scene: Scene) -> None:
    """The tail began an update when it had no successor: it forwards it to nobody."""
    middle, hand, reader = scene.world.storage[1], scene.hand(0), scene.hand(1)
    place = hand.place(0)
    assert await hand.write(place, 0, 4096) == "ok"
    await _tail_misses(scene, hand, hand.place(1))
    middle.stalled = "prepare_and_commit"
    writing = asyncio.ensure_future(hand.write(place, 0, 1000))  # merged with old content
    await asyncio.sleep(0.1)
    scene.revive(scene.tail)
    await asyncio.sleep(3)
    middle.stalled = ""
    assert await writing == "ok"
    await scene.all_serve()
    assert await reader.read(place, at=scene.tail) == "ok"


@situation()
async def a_replica_is_away_for_long(scene: Scene) -> None:
    """The others go on without it after a lease, and fill it when it is back."""
    hand, middle = scene.hand(), scene.world.storage[1]
    place = hand.place()
    assert await hand.write(place, 0, 4096) == "ok"
    middle.kill()
    assert await hand.write(place, 0, 4096, 15) == "ok"
    scene.revive(middle)
    await scene.all_serve()
    assert await hand.read(place, at=middle) == "ok"
