"""Situations of the management services: takeovers, late writes to their store, old news."""

import asyncio

from emberfs.proto.cluster import PublicState
from sim.disk import Fate
from sim.machine import Machine
from sim.scenario import BURIED_S, Scene
from sim.situations import situation
from sim.tap import Message

NOTHING = Fate(data=False, rows=False)  # is left of what was not synced


def _leader(scene: Scene) -> Machine:
    return next(m for m in scene.world.mgmtd if m.running and m.service and m.service.leads)


async def _leads_again(scene: Scene) -> None:
    await scene.until(lambda: scene.world.primary_snapshot() is not None, 20)


@situation()
async def the_leader_dies_after_a_change_and_a_client_is_new(scene: Scene) -> None:
    """Two terms, chains that change in both, and a client that hears only of the second."""
    hand, client = scene.hand(0), scene.world.clients[2]
    assert await hand.write(hand.place(), 0, 4096) == "ok"
    await scene.bury(scene.tail)
    leader = _leader(scene)
    leader.kill()
    await asyncio.sleep(0.3)
    client.kill()
    scene.revive(client)
    await _leads_again(scene)
    scene.revive(leader)
    scene.revive(scene.tail)
    await scene.all_serve()
    assert await hand.write(hand.place(), 0, 4096) == "ok"


@situation(errors=True)
async def a_decision_of_a_former_leader_is_stored_late(scene: Scene) -> None:
    """It was on its way to the store while another led, and the chain has changed since."""
    hand, tail, leader = scene.hand(), scene.tail, _leader(scene)
    assert await hand.write(hand.place(), 0, 4096) == "ok"
    tail.kill()
    await asyncio.sleep(4)
    late = scene.tap("store", [leader], [scene.world.kv])
    await asyncio.sleep(BURIED_S)
    other = _leader(scene)
    assert other is not leader
    await asyncio.sleep(5)
    scene.revive(tail)
    await scene.all_serve()
    late.release()
    await asyncio.sleep(1)
    other.kill()
    await asyncio.sleep(5)
    await _leads_again(scene)
    await asyncio.sleep(5)
    scene.revive(other)
    assert await hand.write(hand.place(), 0, 4096) == "ok"


@situation(errors=True)
async def news_of_before_arrive_after_those_of_now(scene: Scene) -> None:
    """A storage node starts; what it asked for first comes last."""
    tail, middle = scene.tail, scene.world.storage[1]
    tail.kill()
    await asyncio.sleep(0.3)
    streams: list[int] = []
    earlier = scene.world.network.next_number()

    def second(message: Message) -> bool:
        """Tell whether it is of the second stream of this life."""
        if message.stream > earlier and message.stream not in streams:
            streams.append(message.stream)
        return message.stream in streams[1:]

    tap = scene.tap("routing", scene.world.mgmtd, [tail], answers=True, only=second)
    scene.revive(tail)
    await scene.until(lambda: bool(tap.held), 5)
    middle.kill()
    await asyncio.sleep(0.2)
    scene.revive(middle)  # its registration is published
    await asyncio.sleep(1)
    tap.release()
    await asyncio.sleep(1)
    assert PublicState.SERVING in scene.states().values()


@situation(errors=True)
async def the_leader_cannot_reach_the_store(scene: Scene) -> None:
    """Another leads after a lease: by then the first one must have stopped."""
    leader, hand = _leader(scene), scene.hand()
    async with scene.cut([leader], [scene.world.kv]):
        await asyncio.sleep(6)
        assert _leader(scene) is not leader
        assert await hand.write(hand.place(), 0, 4096) == "ok"


@situation(errors=True)
async def power_of_the_store_fails_while_a_candidate_stands_still(scene: Scene) -> None:
    """It last saw the record that a power cut brings back, and has seen no other since."""
    world, leader = scene.world, _leader(scene)
    candidate = next(machine for machine in world.mgmtd if machine is not leader)
    rows = world.kv.disk.stores["/kv"]

    def seen() -> bool:
        record = candidate.service._election.record
        return record is not None and record == leader.service._election.record

    await scene.until(seen, 5)
    rows.sync()  # as a commit of anybody who shares the store
    candidate.process.pause()
    await asyncio.sleep(4)
    world.kv.disk.fate = NOTHING
    world.kv.power_cut()
    await asyncio.sleep(0.1)
    world.kv.power_on()
    scene.revive(world.kv)
    candidate.process.resume()
    await asyncio.sleep(1)
