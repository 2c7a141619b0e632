"""The fault list on the simulated cluster: one directed scenario per row."""

import asyncio
from itertools import permutations

import pytest

from emberfs.proto.cluster import PublicState
from emberfs.proto.ids import SECOND
from emberfs.proto.storage_calls import UPDATE
from sim.cluster import Shape
from sim.disk import Fate
from sim.scenario import Scene, play

ROLES = ("head", "middle", "tail")


@pytest.mark.parametrize("role", range(3), ids=ROLES)
def test_r1_r9_a_replica_dies_at_every_disk_operation_of_a_write(role: int) -> None:
    """Death at any disk operation of an update, also between commit and answer: it converges."""
    deaths = 0

    async def script(scene: Scene) -> None:
        nonlocal deaths
        hand, victim = scene.hand(), scene.world.storage[role]
        place = hand.place()
        for step in range(40):
            victim.disk.faults.die_after = step
            assert await hand.write(place, step * 100, 4096) == "ok"
            await asyncio.sleep(0.05)
            if victim.running:
                break
            deaths += 1
            await asyncio.sleep(0.2 if step % 2 else 7)
            scene.revive(victim)
            await scene.all_serve()
            assert await hand.read(place) == "ok"
            assert len(set(scene.contents(place).values())) == 1
        victim.disk.faults.die_after = -1

    play(script, load=False)
    assert 2 <= deaths < 40


def test_r2_replicas_that_are_ahead_take_the_content_of_whoever_returns_first() -> None:
    """Power cuts of all leave replicas at different versions: the chain converges each time."""

    async def script(scene: Scene) -> None:
        machines = scene.world.storage
        for turn in range(4):
            await asyncio.sleep(1.5)
            for machine in machines:
                machine.power_cut()
            await asyncio.sleep(1)
            for machine in machines[turn % 3 :] + machines[: turn % 3]:
                machine.power_on()
                scene.revive(machine)
                await asyncio.sleep(turn)
            await scene.all_serve()

    play(script, errors=True, judged=False)


def test_r3_cuts_and_short_writes_while_a_replica_is_being_filled() -> None:
    """Every chunk is cut and written in small pieces while a replica fills: all end up equal."""
    while_syncing = 0

    async def script(scene: Scene) -> None:
        nonlocal while_syncing
        hand = scene.hand()
        places = [hand.place(number) for number in range(12)]
        for place in places:
            assert await hand.write(place, 0, 8192) == "ok"
        scene.tail.kill()
        await asyncio.sleep(8)
        for place in places:
            await hand.write(place, 4096, 6000)
        scene.tail.disk.faults.slow_factor = 300
        scene.revive(scene.tail)
        turn = 0
        while not scene.world.serving():
            syncing = PublicState.SYNCING in scene.states().values()
            place = places[turn % 12]
            if turn % 3 == 0:
                assert await hand.truncate(place, 100 * turn % 9000) == "ok"
            else:
                assert await hand.write(place, 70 * turn % 9000, 100) == "ok"
            while_syncing += syncing and PublicState.SYNCING in scene.states().values()
            turn += 1
        for place in places:
            assert len(set(scene.contents(place).values())) == 1

    play(script)
    assert while_syncing > 10


def test_r4_o16_versions_rise_while_managers_die_and_freeze() -> None:
    """Managers die, freeze and wake in turn while replicas come and go: versions only rise."""

    async def script(scene: Scene) -> None:
        for turn in range(6):
            managers = scene.world.mgmtd
            leader = next((m for m in managers if m.running and m.service.leads), managers[0])
            victim = scene.world.storage[turn % 3]
            victim.kill()
            if turn % 2:
                leader.kill()
            else:
                assert leader.process is not None
                leader.process.pause()
            await asyncio.sleep(9)
            scene.revive(victim)
            if turn % 2:
                scene.revive(leader)
            else:
                leader.process.resume()
            await scene.all_serve()

    play(script, shape=Shape(mgmtd=3, chains=2))


def test_r5_reads_go_on_during_a_rolling_restart() -> None:
    """Every storage service is restarted in turn under load: no error, and reads stay short."""
    reads: list[float] = []

    async def script(scene: Scene) -> None:
        start_ns = scene.now_ns
        for machine in scene.world.storage * 2:
            machine.kill()
            await asyncio.sleep(0.5)
            scene.revive(machine)
            await scene.all_serve()
            await asyncio.sleep(1)
        await asyncio.sleep(1)
        done = [op for op in scene.since(start_ns, "read") if op.end_ns is not None]
        reads.extend(sorted((op.end_ns - op.start_ns) / 1e9 for op in done))

    play(script)
    assert len(reads) > 50
    assert reads[int(len(reads) * 0.99)] < 2.5
    assert reads[-1] < 6


def test_r6_every_disk_in_turn_is_replaced_by_an_empty_one() -> None:
    """An empty disk is filled without anybody's help, one node after the other."""

    async def script(scene: Scene) -> None:
        for machine in scene.world.storage:
            machine.kill()
            machine.disk.wipe()
            await asyncio.sleep(0.3)
            scene.revive(machine)
            await asyncio.sleep(1)  # until it is known to be empty
            await scene.all_serve()

    play(script, shape=Shape(chains=2))


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=lambda o: "".join(map(str, o)))
def test_r7_all_replicas_die_one_by_one_and_return_in_every_order(order: tuple[int, ...]) -> None:
    """Whichever replica returns first, nothing older than what was acknowledged is served."""

    async def script(scene: Scene) -> None:
        machines, hand = scene.world.storage, scene.hand()
        place = hand.place()
        for machine in machines:
            assert await hand.write(place, 0, 6000) == "ok"
            machine.kill()
            await asyncio.sleep(9)
        assert await hand.write(place, 0, 100, 3) == "unknown"
        for number in order:
            scene.revive(machines[number])
            await asyncio.sleep(7)
        assert await hand.read(place) == "ok"
        await scene.all_serve()

    play(script, errors=True)


def test_r7_all_replicas_die_at_once_and_return_in_turn() -> None:
    """All processes of a chain die at once: nothing is lost, whoever returns first."""

    async def script(scene: Scene) -> None:
        for first in range(3):
            machines = scene.world.storage[first:] + scene.world.storage[:first]
            for machine in machines:
                machine.kill()
            await asyncio.sleep(7 * (first % 2))
            for machine in machines:
                scene.revive(machine)
                await asyncio.sleep(2)
            await scene.all_serve()

    play(script, errors=True)


def test_r8_after_overload_everything_is_well_without_a_restart() -> None:
    """A minute of timeouts everywhere; then the cluster serves without a restart and errors end."""
    lives: list[int] = []

    async def script(scene: Scene) -> None:
        network = scene.world.network
        for machine in scene.world.storage:
            machine.disk.faults.slow_factor = 3000
        network.delay_share, network.loss_share = 0.5, 0.1
        await asyncio.sleep(60)
        network.delay_share = network.loss_share = 0.0
        for machine in scene.world.storage:
            machine.disk.faults.slow_factor = 1.0
        lives.extend(machine.lives for machine in scene.world.storage)

    play(script, errors=True)
    assert lives == [1, 1, 1]


def test_r10_the_store_of_the_managers_stands_still_for_a_minute() -> None:
    """The managers' store pauses for 60 s: a manager leads again and everything is served."""

    async def script(scene: Scene) -> None:
        process = scene.world.kv.process
        assert process is not None
        process.pause()
        await asyncio.sleep(60)
        process.resume()
        healed_ns = scene.now_ns
        await scene.all_serve(30)
        await asyncio.sleep(10)
        late = [op for op in scene.since(healed_ns + 10 * SECOND) if not op.ok and op.result]
        assert not late

    play(script, errors=True)


def test_r10_wall_clocks_jump_by_an_hour() -> None:
    """Wall clocks of all machines jump an hour ahead and back: nobody notices."""

    async def script(scene: Scene) -> None:
        chains = scene.world.primary_snapshot().chains
        for hours in (1, -2, 1):
            for machine in scene.world.machines.values():
                machine.wall_step_ns += hours * 3600 * SECOND
                await asyncio.sleep(1)
        await asyncio.sleep(6)
        assert scene.world.primary_snapshot().chains == chains

    play(script)


def test_r12_o6_power_fails_at_each_machine_in_turn() -> None:
    """Power fails at one machine amid writes, with torn sectors: nothing acknowledged is lost."""

    async def script(scene: Scene) -> None:
        for turn, machine in enumerate(scene.world.storage * 2):
            await asyncio.sleep(1)
            machine.power_cut()
            await asyncio.sleep(1 + turn * 2)
            machine.power_on()
            scene.revive(machine)
            await scene.all_serve()

    play(script)


def test_r12_a_power_cut_of_all_keeps_what_was_flushed() -> None:
    """Power fails everywhere at once: everything that was flushed is there afterwards."""

    async def script(scene: Scene) -> None:
        hand = scene.hand()
        for turn in range(4):
            place = hand.place(turn)
            assert await hand.write(place, 0, 9000) == "ok"
            assert await hand.write(place, 3000, 4096) == "ok"
            assert await hand.flush(place) == "ok"
            before = set(scene.contents(place).values())
            assert len(before) == 1
            others = asyncio.ensure_future(hand.write(hand.place(90), 0, 5000, 60))
            await asyncio.sleep(0.001 * turn)
            for machine in scene.world.storage:
                machine.power_cut()
            await asyncio.sleep(1)
            for machine in scene.world.storage:
                machine.power_on()
                scene.revive(machine)
            await asyncio.sleep(3)  # until it is known who came back
            await scene.all_serve()
            await others
            assert set(scene.contents(place).values()) == before

    play(script, load=False, errors=True)


def test_r12_an_answer_on_its_way_when_the_power_fails_is_no_promise() -> None:
    """A write that was not flushed may be lost, also if its writer hears of it after the cut."""

    async def script(scene: Scene) -> None:
        hand = scene.hand()
        place = hand.place()
        assert await hand.write(place, 0, 8192) == "ok"
        assert await hand.flush(place) == "ok"
        await scene.after_a_flush(hand)
        before = set(scene.contents(place).values())
        tap = scene.tap(UPDATE.number, scene.world.storage, [hand.machine], answers=True)
        writing = asyncio.ensure_future(hand.write(place, 0, 8192))
        await scene.until(lambda: bool(tap.held), 5)
        await scene.blackout(Fate(data=False, rows=False))
        tap.release()
        assert await writing == "ok"
        assert not any(machine.running for machine in scene.world.storage)
        scene.power_on(*scene.world.storage)
        await asyncio.sleep(3)  # until it is known who came back
        await scene.all_serve()
        assert set(scene.contents(place).values()) == before
        for machine in scene.world.storage:
            assert await hand.read(place, at=machine) == "ok"

    play(script, load=False, errors=True)


def test_s11_disks_are_full_for_a_while() -> None:
    """A full disk costs errors, never content; with room again everything is well."""

    async def script(scene: Scene) -> None:
        hand = scene.hand()
        for number, machine in enumerate(scene.world.storage):
            place = hand.place(number)
            assert await hand.write(place, 0, 8192) == "ok"
            machine.disk.faults.full = True
            await hand.write(place, 0, 4096, 5)
            await hand.write(hand.place(50 + number), 0, 60000, 5)
            assert await hand.read(place) == "ok"
            machine.disk.faults.full = False
            await scene.all_serve()
            assert await hand.write(place, 4096, 8192) == "ok"

    play(script, errors=True)


def test_c10_late_and_repeated_messages_change_nothing() -> None:
    """Messages come twice, seconds late, or not at all: every write takes effect once or never."""

    async def script(scene: Scene) -> None:
        network = scene.world.network
        network.duplicate_share = network.late_duplicate_share = 0.3
        network.delay_share, network.loss_share = 0.2, 0.02
        await asyncio.sleep(40)
        network.duplicate_share = network.late_duplicate_share = 0.0
        network.delay_share = network.loss_share = 0.0

    play(script, errors=True, shape=Shape(chains=2))


def test_c11_a_client_behind_a_dead_link_is_back_within_seconds() -> None:
    """A link is down for a minute; within 5 s of its return the client works as before."""

    async def script(scene: Scene) -> None:
        client = scene.world.clients[0]
        hand = scene.hand()
        async with scene.cut([client], scene.everyone_but(client)):
            await asyncio.sleep(60)
        await asyncio.sleep(5)
        start_ns = scene.now_ns
        for number in range(20):
            assert await hand.write(hand.place(number), 0, 4096, 1) == "ok"
        assert scene.now_ns - start_ns < SECOND

    play(script, errors=True, load=False)


def test_o2_c10_a_frozen_client_wakes_and_writes() -> None:
    """A client wakes after a minute in the middle of its writes: nothing newer is overwritten."""

    async def script(scene: Scene) -> None:
        for machine in scene.world.clients[:2]:
            process = machine.process
            assert process is not None
            process.pause()
            await asyncio.sleep(12)
            process.resume()
            await asyncio.sleep(2)

    play(script, errors=True, shape=Shape(chains=3))


@pytest.mark.parametrize("role", range(3), ids=ROLES)
def test_o2_o15_a_storage_accepts_and_never_answers_then_wakes(role: int) -> None:
    """A server freezes past its lease: clients go on without errors, what it says late is void."""
    waits: list[float] = []

    async def script(scene: Scene) -> None:
        process = scene.world.storage[role].process
        assert process is not None
        start_ns = scene.now_ns
        process.pause()
        await asyncio.sleep(20)
        done = [op for op in scene.since(start_ns) if op.end_ns is not None]
        waits.extend((op.end_ns - op.start_ns) / 1e9 for op in done)
        process.resume()
        await scene.all_serve()

    play(script)
    assert len(waits) > 50
    assert max(waits) < 11  # a lease, the noticing of its end, and a try of the new chain


def test_o7_acknowledged_means_committed_on_every_replica() -> None:
    """At the instant of an acknowledgement every serving replica has the write."""

    async def script(scene: Scene) -> None:
        network, hand = scene.world.network, scene.hand()
        place = hand.place()
        network.delay_share, network.loss_share, network.duplicate_share = 0.2, 0.01, 0.1
        for turn in range(60):
            if await hand.write(place, turn * 37, 1000 + turn) == "ok":
                states = scene.states()  # none while no mgmtd leads
                if states and all(s == PublicState.SERVING for s in states.values()):
                    found = scene.contents(place)
                    assert len(found) == 3
                    assert len(set(found.values())) == 1
        network.delay_share = network.loss_share = network.duplicate_share = 0.0

    play(script, load=False, errors=True)


@pytest.mark.parametrize("way", ["both", "out", "in"])
@pytest.mark.parametrize("role", [0, 2], ids=["head", "tail"])
def test_o12_at_most_one_side_of_a_partition_accepts_writes(role: int, way: str) -> None:
    """A replica is cut off with a client, in one direction or both: one side takes writes."""

    async def script(scene: Scene) -> None:
        apart = [scene.world.storage[role], scene.world.clients[0]]
        inside, outside = scene.hand(0), scene.hand(1)
        place = inside.place()
        assert await inside.write(place, 0, 4096) == "ok"
        async with scene.cut(apart, scene.everyone_but(*apart), way):
            await asyncio.sleep(12)
            assert await inside.write(place, 0, 4096, 5) == "unknown"
            assert await inside.read(place, 5) == "fail"
            if way != "in":  # see the next test
                assert await outside.write(place, 100, 4096, 5) == "ok"
                assert await outside.read(place, 5) == "ok"

    play(script, errors=True)


@pytest.mark.xfail(reason="its heartbeats arrive, hence mgmtd keeps it although it is fenced")
def test_o12_a_replica_that_is_heard_and_hears_nothing_leaves_its_chain() -> None:
    """A replica that hears nobody but is heard by all does not stop the writes to its chain."""

    async def script(scene: Scene) -> None:
        hand = scene.hand()
        async with scene.cut([scene.head], scene.everyone_but(scene.head), "in"):
            await asyncio.sleep(12)
            assert await hand.write(hand.place(), 0, 4096, 5) == "ok"

    play(script, errors=True)
