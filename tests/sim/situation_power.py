"""Situations of a power cut: what is on the disks afterwards is chosen, not thrown."""

import asyncio

from emberfs.client.file import File, FileSystem
from emberfs.client.oserrors import FileSystemError
from emberfs.proto.ids import KiB
from emberfs.proto.storage_calls import FLUSH, UPDATE
from sim.disk import Fate
from sim.hand import Hand
from sim.scenario import BURIED_S, Scene
from sim.scenario_files import Stage
from sim.situation_files import PATH, expect, read
from sim.situations import file_situation, situation
from sim.tap import CONTROL
from sim.workload import Place

ROWS_ONLY = Fate(data=False, rows=True)
DATA_ONLY = Fate(data=True, rows=False)
NOTHING = Fate(data=False, rows=False)
ALL = Fate(data=True, rows=True)
OLD, NEW = b"o" * (100 * KiB), b"n" * (70 * KiB)


async def _flushed(scene: Scene, hand: Hand) -> Place:
    """A chunk that was written and flushed; nothing else is flushed for a second."""
    place = hand.place()
    assert await hand.write(place, 0, 8192) == "ok"
    assert await hand.flush(place) == "ok"
    await scene.after_a_flush(hand)
    return place


async def _cut(scene: Scene, fate: Fate) -> None:
    """The power of all fails, and is back after a while."""
    await scene.blackout(fate)
    await asyncio.sleep(1)
    scene.power_on(*scene.world.storage)
    await asyncio.sleep(3)  # until it is known who came back
    await scene.all_serve()


@situation(errors=True)
async def power_fails_before_the_data_and_after_the_rows(scene: Scene) -> None:
    """Rows of an overwritten chunk are there, its data is not."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    assert await hand.write(place, 0, 8192) == "ok"
    await _cut(scene, ROWS_ONLY)
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"


@situation(errors=True)
async def a_write_is_tried_again_after_its_data_was_lost(scene: Scene) -> None:
    """It was done, and its writer has not heard of it: whoever is asked again must not say so."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    tap = scene.tap(UPDATE.number, scene.world.storage, [hand.machine], answers=True)
    writing = asyncio.ensure_future(hand.write(place, 0, 8192))
    await scene.until(lambda: bool(tap.held), 5)
    tap.lose()
    await _cut(scene, ROWS_ONLY)
    assert await writing == "ok"
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"


@situation(errors=True)
async def power_fails_when_a_block_has_a_new_owner(scene: Scene) -> None:
    """A chunk was rewritten elsewhere and others came; only their data has reached the disks."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    assert await hand.write(place, 0, 8192) == "ok"
    for number in range(1, 5):
        assert await hand.write(hand.place(number), 0, 8192) == "ok"
    await _cut(scene, DATA_ONLY)
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"


@situation(errors=True)
async def power_fails_after_a_chunk_was_cut_and_has_grown(scene: Scene) -> None:
    """What was cut off is needed again: the rows of before are what is left."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    assert await hand.truncate(place, 4096) == "ok"
    assert await hand.write(place, 4096, 3000) == "ok"
    await _cut(scene, DATA_ONLY)
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"


@situation(errors=True)
async def power_fails_just_after_a_replica_was_filled(scene: Scene) -> None:
    """It serves, and brings the chain back alone: it must have on its disk what was flushed."""
    hand, tail = scene.hand(), scene.tail
    place = hand.place()
    assert await hand.write(place, 0, 8192) == "ok"
    await scene.bury(tail)
    assert await hand.write(place, 0, 8192) == "ok"
    assert await hand.flush(place) == "ok"
    scene.revive(tail)
    await asyncio.sleep(0.5)
    await scene.all_serve()
    await scene.blackout(ALL, stor3=NOTHING)
    await asyncio.sleep(BURIED_S)
    scene.power_on(tail)
    await asyncio.sleep(4)
    scene.power_on(*scene.world.storage[:2])
    await scene.all_serve()
    assert await hand.read(place) == "ok"


@situation(errors=True)
async def power_fails_after_a_flush_and_the_head_returns_first(scene: Scene) -> None:
    """Any replica may bring the chain back: the flush has made each of them stable."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    assert await hand.write(place, 0, 8192) == "ok"
    assert await hand.flush(place) == "ok"
    await scene.blackout(NOTHING)
    await asyncio.sleep(BURIED_S)
    scene.power_on(scene.head)
    await asyncio.sleep(4)
    scene.power_on(*scene.world.storage[1:])
    await scene.all_serve()
    assert await hand.read(place) == "ok"


@situation()
async def power_fails_at_one_machine_for_a_moment(scene: Scene) -> None:
    """It is back before anybody has missed it, without what it had not flushed."""
    hand, tail = scene.hand(), scene.tail
    place = await _flushed(scene, hand)
    assert await hand.write(place, 0, 8192) == "ok"
    tail.disk.fate = NOTHING
    tail.power_cut()
    await asyncio.sleep(0.3)
    scene.power_on(tail)
    await asyncio.sleep(0.3)
    for _ in range(3):
        assert await hand.read(place, at=tail) == "ok"
        await asyncio.sleep(1)


@situation(errors=True)
async def power_fails_after_a_flush(scene: Scene) -> None:
    """Written small and large, flushed: all is there."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    assert await hand.write(place, 4096, 512) == "ok"
    assert await hand.write(hand.place(1), 0, 6000) == "ok"
    assert await hand.flush(place) == "ok"
    await _cut(scene, NOTHING)
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"
        assert await hand.read(hand.place(1), at=machine) == "ok"


@situation(errors=True)
async def power_fails_when_logged_data_is_put_in_place(scene: Scene) -> None:
    """A flush has deleted what it could from the log, and what it wrote is not stable yet."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    assert await hand.write(place, 4096, 512) == "ok"
    assert await hand.flush(place) == "ok"
    await _cut(scene, ROWS_ONLY)
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"


@situation(errors=True)
async def power_fails_between_a_write_and_its_flush(scene: Scene) -> None:
    """The flush comes when all are back: it must not say that the write is there. Told once."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    assert await hand.write(place, 0, 4096) == "ok"
    await _cut(scene, NOTHING)
    told = await hand.flush(place)
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"
    assert await hand.write(place, 4096, 512) == "ok"
    assert await hand.flush(place) == "ok"
    assert await hand.read(place) == "ok"
    assert told == "unknown"


@situation(errors=True)
async def a_flush_is_under_way_when_power_fails(scene: Scene) -> None:
    """Two replicas have flushed; the third has not, and it is the one that comes back first."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    assert await hand.write(place, 0, 4096) == "ok"
    tap = scene.tap(FLUSH.number, [hand.machine], [scene.head])
    flushing = asyncio.ensure_future(hand.flush(place))
    await scene.until(lambda: bool(tap.held), 5)
    await scene.blackout(NOTHING)
    tap.lose()
    await asyncio.sleep(BURIED_S)
    scene.power_on(scene.head)
    await asyncio.sleep(4)
    scene.power_on(*scene.world.storage[1:])
    await scene.all_serve()
    told = await flushing
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"
    assert told == "unknown"


@situation(errors=True)
async def power_fails_and_the_first_to_return_dies_before_it_is_heard(scene: Scene) -> None:
    """It comes back in the same boot: it is still not what was acknowledged."""
    hand, head = scene.hand(), scene.head
    place = await _flushed(scene, hand)
    assert await hand.write(place, 0, 4096) == "ok"
    await scene.blackout(NOTHING)
    await asyncio.sleep(1)
    calls = scene.tap(CONTROL, [head], scene.world.mgmtd)
    scene.power_on(head)
    await scene.until(lambda: bool(calls.held), 5)
    await asyncio.sleep(0.5)
    head.kill()
    calls.lose()
    scene.revive(head)
    await asyncio.sleep(1)
    scene.power_on(*scene.world.storage[1:])
    await scene.all_serve()
    told = await hand.flush(place)
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"
    assert told == "unknown"


@situation()
async def processes_die_between_a_write_and_its_flush(scene: Scene) -> None:
    """All replicas, with the power on: nothing is lost, and the flush says so."""
    hand = scene.hand()
    place = await _flushed(scene, hand)
    assert await hand.write(place, 0, 4096) == "ok"
    await scene.bury(*scene.world.storage)
    for machine in scene.world.storage:
        scene.revive(machine)
    await scene.all_serve()
    assert await hand.flush(place) == "ok"
    assert await hand.read(place) == "ok"


@situation()
async def power_fails_at_one_replica_between_a_write_and_its_flush(scene: Scene) -> None:
    """The others have what it lost, and fill it: the flush may say that the write is there."""
    hand, tail = scene.hand(), scene.tail
    place = await _flushed(scene, hand)
    assert await hand.write(place, 0, 4096) == "ok"
    tail.disk.fate = NOTHING
    tail.power_cut()
    await asyncio.sleep(0.3)
    scene.power_on(tail)
    await asyncio.sleep(3)
    await scene.all_serve()
    assert await hand.flush(place) == "ok"
    for machine in scene.world.storage:
        assert await hand.read(place, at=machine) == "ok"
    tail.kill()
    await asyncio.sleep(0.3)
    scene.revive(tail)
    await scene.until(lambda: tail.service is not None, 5)
    for hosted in tail.service.service.targets.values():
        assert not hosted.store.power_cut_possible, "it was filled: nothing is missing any more"


@file_situation
async def power_fails_between_a_write_and_its_fsync(stage: Stage) -> None:
    """Each description of the file is told once; what is written again is there."""

    async def begin(fs: FileSystem) -> tuple[File, File]:
        file = await fs.open(PATH, "w", direct=True)
        other = await fs.open(PATH, "r+")
        await file.write(OLD)
        await file.fsync()
        await asyncio.sleep(3)  # storage flushes by itself, every two seconds
        await file.pwrite(OLD[:100], 0)
        await asyncio.sleep(0.5)
        await file.pwrite(NEW, 0)
        return file, other

    async def is_told(file: File) -> bool:
        try:
            await file.fsync()
        except FileSystemError as problem:
            if "write it again" not in str(problem):
                raise
            return True
        return False

    file, other = await stage.at(0, begin)
    for machine in stage.world.storage:
        machine.disk.fate = NOTHING
        machine.power_cut()
    await asyncio.sleep(1)
    for machine in stage.world.storage:
        machine.power_on()
        stage.revive(machine)
    told = [await stage.at(0, lambda _, one=one: is_told(one)) for one in (file, other, file)]
    if True not in told:
        expect(await stage.at(1, read), NEW + OLD[len(NEW) :])
    assert told == [True, True, False], told

    async def again(_: FileSystem) -> None:
        await file.pwrite(NEW, 0)
        await file.close()
        await other.close()

    await stage.at(0, again)
    expect(await stage.at(1, read), NEW + OLD[len(NEW) :])
