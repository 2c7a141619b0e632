"""Situations of a chain whose members are all there: updates and reads in flight, deaths."""

import asyncio

from emberfs.proto.storage_calls import UPDATE, VERSION
from sim.scenario import BlameError, Scene
from sim.situations import situation


@situation()
async def a_write_waits_between_head_and_middle(scene: Scene) -> None:
    """The head has the update, the others do not: reads at the head, then at the tail."""
    head, middle, tail = scene.world.storage
    writer, reader = scene.hand(0), scene.hand(1)
    place = writer.place()
    assert await writer.write(place, 0, 4096) == "ok"
    tap = scene.tap(UPDATE.number, [head], [middle])
    writing = asyncio.ensure_future(writer.write(place, 0, 4096))
    await scene.until(lambda: bool(tap.held), 5)
    for machine in (head, tail, middle, head, tail):
        assert await reader.read(place, at=machine) == "ok"
    tap.release()
    assert await writing == "ok"
    assert await reader.read(place, at=tail) == "ok"


@situation(errors=True)
async def the_head_dies_before_it_hears_of_the_commit(scene: Scene) -> None:
    """The others have committed; the head is back at once, and nobody writes the chunk again."""
    head, middle, tail = scene.world.storage
    writer, reader = scene.hand(0), scene.hand(1)
    place = writer.place()
    assert await writer.write(place, 0, 4096) == "ok"
    tap = scene.tap(UPDATE.number, [middle], [head], answers=True)
    assert await writer.write(place, 0, 4096, 0.5) == "unknown"
    assert tap.held
    assert await reader.read(place, at=tail) == "ok"
    head.kill()
    tap.lose()
    await asyncio.sleep(0.3)
    scene.revive(head)
    await asyncio.sleep(1)
    assert await reader.read(place, at=head) == "ok"
    assert await reader.read(place, at=tail) == "ok"


@situation()
async def a_chunk_grows_again_after_it_was_cut(scene: Scene) -> None:
    """What lies between the old end and the new one is zeros, whoever makes the gap."""
    hand = scene.hand()
    cut, written = hand.place(0), hand.place(1)
    for place in (cut, written):
        assert await hand.write(place, 0, 8192) == "ok"
        assert await hand.truncate(place, 1000) == "ok"
    assert await hand.truncate(cut, 6000) == "ok"
    assert await hand.write(written, 5000, 500) == "ok"
    for place in (cut, written):
        for machine in scene.world.storage:
            assert await hand.read(place, at=machine) == "ok"


@situation(errors=True)
async def a_byte_rots_at_the_head(scene: Scene) -> None:
    """A read finds it; the head repairs itself from another replica."""
    hand, head = scene.hand(), scene.head
    place = hand.place()
    assert await hand.write(place, 0, 8192) == "ok"
    assert await hand.flush(place) == "ok"
    assert head.disk.rot()
    for _ in range(4):
        assert await hand.read(place, at=head) == "ok"
        await asyncio.sleep(1)


@situation(errors=True)
async def a_client_knows_only_the_chain_of_before(scene: Scene) -> None:
    """The head of before is the tail now; a client without news still sends it its writes."""
    head, client = scene.head, scene.world.clients[0]
    late, other = scene.hand(0), scene.hand(1)
    place = late.place()
    assert await late.write(place, 0, 4096) == "ok"
    news = scene.tap("routing", scene.world.mgmtd, [client], answers=True)
    async with scene.cut([head], scene.world.mgmtd):
        await asyncio.sleep(9)
    await scene.all_serve()
    assert await other.write(place, 0, 4096) == "ok"
    writing = asyncio.ensure_future(late.write(place, 100, 1000))
    await asyncio.sleep(0.5)
    assert await other.read(place, at=head) == "ok"
    assert await other.read(place, at=scene.tail) == "ok"
    news.release()
    assert await writing == "ok"


@situation(errors=True)
async def a_forward_is_done_and_its_answer_lost(scene: Scene) -> None:
    """The connection breaks under the answer: readers of the tail have seen the write."""
    head, middle, tail = scene.world.storage
    writer, reader = scene.hand(0), scene.hand(1)
    place = writer.place()
    assert await writer.write(place, 0, 4096) == "ok"
    answer = scene.tap(UPDATE.number, [middle], [head], answers=True)
    writing = asyncio.ensure_future(writer.write(place, 0, 4096))
    await scene.until(lambda: bool(answer.held), 5)
    again = scene.tap(UPDATE.number, [writer.machine], [head])
    assert await reader.read(place, at=tail) == "ok"
    answer.held.clear()
    scene.world.network.reset(head.name, middle.name)
    await asyncio.sleep(0.02)
    assert await reader.read(place, at=head) == "ok"
    answer.release()
    again.release()
    assert await writing == "ok"


@situation()
async def a_write_is_lost_with_its_connection(scene: Scene) -> None:
    """Nobody has it, and the client is told no more than that the connection has gone."""
    hand, head = scene.hand(), scene.head
    place = hand.place()
    assert await hand.write(place, 0, 4096) == "ok"
    tap = scene.tap(UPDATE.number, [hand.machine], [head])
    writing = asyncio.ensure_future(hand.write(place, 0, 4096))
    await scene.until(lambda: bool(tap.held), 5)
    tap.lose()
    scene.world.network.reset(hand.machine.name, head.name)
    assert await writing == "ok"
    assert await hand.read(place) == "ok"


@situation()
async def a_write_comes_again_after_the_next_one(scene: Scene) -> None:
    """The network repeats a write when its client has long written something else."""
    hand = scene.hand()
    place = hand.place()
    copies = scene.tap(UPDATE.number, [hand.machine], [scene.head], copies=True)
    for _ in range(2):
        assert await hand.write(place, 0, 4096) == "ok"
        assert await hand.read(place) == "ok"
    copies.held[0][1]()
    copies.lose()
    await asyncio.sleep(0.2)
    assert await hand.read(place) == "ok"


@situation(errors=True)
async def a_write_is_tried_again_after_a_restart(scene: Scene) -> None:
    """It was done and not answered; others have written since, and all servers were restarted."""
    slow, other = scene.hand(0), scene.hand(1)
    place = slow.place()
    answers = scene.tap(UPDATE.number, [scene.head], [slow.machine], answers=True)
    writing = asyncio.ensure_future(slow.write(place, 0, 4096, 60))
    await scene.until(lambda: bool(answers.held), 5)
    answers.lose()
    async with scene.cut([slow.machine], scene.world.storage):
        assert await other.read(place) == "ok"
        assert await other.write(place, 0, 4096) == "ok"
        assert await other.read(place) == "ok"
        for machine in scene.world.storage:
            machine.kill()
            await asyncio.sleep(0.2)
            scene.revive(machine)
        await asyncio.sleep(1)
    assert await writing == "ok"
    assert await other.read(place) == "ok"


@situation()
async def a_chunk_is_made_anew_while_the_tail_answers(scene: Scene) -> None:
    """Its versions begin anew: the number in a late answer is that of a write in flight."""
    head, middle, tail = scene.world.storage
    writer, reader, other = scene.hand(0), scene.hand(1), scene.hand(2)
    place = writer.place()
    assert await writer.write(place, 0, 4096) == "ok"
    answer = scene.tap(VERSION.number, [tail], [head], answers=True)
    forward = scene.tap(UPDATE.number, [head], [middle])
    removing = asyncio.ensure_future(writer.remove(place))
    await scene.until(lambda: bool(forward.held), 5)
    reading = asyncio.ensure_future(reader.read(place, at=head))
    await scene.until(lambda: bool(answer.held), 5)
    forward.send_held()
    assert await removing == "ok"
    writing = asyncio.ensure_future(writer.write(place, 0, 2000))
    await scene.until(lambda: bool(forward.held), 5)
    answer.release()
    assert await reading == "ok"
    assert await other.read(place, at=tail) == "ok"
    forward.release()
    assert await writing == "ok"


@situation()
async def a_write_comes_again_after_a_removal(scene: Scene) -> None:
    """The network repeats the write of a chunk that is gone, and of one that was made anew."""
    hand = scene.hand()
    gone, anew = hand.place(0), hand.place(1)
    copies = scene.tap(UPDATE.number, [hand.machine], [scene.head], copies=True)
    for place in (gone, anew):
        assert await hand.write(place, 0, 4096) == "ok"
        assert await hand.read(place) == "ok"
        assert await hand.remove(place) == "ok"
    assert await hand.write(anew, 0, 100) == "ok"
    for message, send in copies.held:
        if UPDATE.decode_request(message.body).length == 4096:
            send()
    copies.lose()
    await asyncio.sleep(0.2)
    for place in (gone, anew):
        assert await hand.read(place) == "ok"


@situation(errors=True)
async def a_write_comes_after_its_client_has_given_it_up(scene: Scene) -> None:
    """The same client has written something else since, which must stay."""
    hand = scene.hand()
    place = hand.place()
    assert await hand.write(place, 0, 4096) == "ok"
    tap = scene.tap(UPDATE.number, [hand.machine], [scene.head])
    assert await hand.write(place, 0, 4096, 0.5) == "unknown"
    tap.open = True
    assert await hand.write(place, 0, 4096) == "ok"
    before = scene.contents(place)
    tap.release()
    await asyncio.sleep(0.5)
    if scene.contents(place) != before:
        raise BlameError("late write", "a write that was given up has overwritten a newer one")


@situation(errors=True)
async def the_middle_has_no_room_to_commit(scene: Scene) -> None:
    """The tail has committed already: nobody may give the update up."""
    head, middle, tail = scene.world.storage
    writer, reader = scene.hand(0), scene.hand(1)
    place = writer.place()
    assert await writer.write(place, 0, 4096) == "ok"
    tap = scene.tap(UPDATE.number, [tail], [middle], answers=True)
    writing = asyncio.ensure_future(writer.write(place, 0, 4096, 15))
    await scene.until(lambda: bool(tap.held), 5)
    middle.disk.faults.full = True
    tap.release()
    await asyncio.sleep(0.5)
    assert await reader.read(place, at=tail) == "ok"
    await reader.read(place, 3, at=head)
    middle.disk.faults.full = False
    await writing
    assert await reader.read(place, at=head) == "ok"


@situation(errors=True)
async def a_head_is_back_with_a_write_and_gets_another(scene: Scene) -> None:
    """What it finds pending was committed and seen: the new write goes on top of it."""
    head, middle, tail = scene.world.storage
    writer, reader = scene.hand(0), scene.hand(1)
    place = writer.place()
    assert await writer.write(place, 0, 4096) == "ok"
    tap = scene.tap(UPDATE.number, [middle], [head], answers=True)
    assert await writer.write(place, 0, 4096, 0.5) == "unknown"
    assert await reader.read(place, at=tail) == "ok"
    head.kill()
    tap.lose()
    await asyncio.sleep(0.3)
    scene.revive(head)
    await asyncio.sleep(1)
    assert await reader.write(place, 2000, 100) == "ok"
    for machine in (head, middle, tail):
        assert await reader.read(place, at=machine) == "ok"
