"""Situations of small files, whose content the metadata server keeps: writers that meet, growth."""

import asyncio

from emberfs.client.file import File, FileSystem
from emberfs.proto.storage_calls import UPDATE
from sim.cluster import INLINE_BYTES
from sim.disk import Fate
from sim.machine import Machine
from sim.scenario_files import Stage
from sim.situation_files import expect, read, write
from sim.situations import file_situation, metas_situation
from sim.tap import Tap, between

UNSYNCED_IS_LOST = Fate(data=False, rows=False)
PATH = "/f/x"
OLD = b"o" * 100
GRACE_S = 10.0  # after the start of a server, until it searches
BEHIND = INLINE_BYTES + 1000  # a write there makes the file grow over the limit


def patched(content: bytes, *writes: tuple[int, bytes]) -> bytes:
    """The content after some writes."""
    made = bytearray(content)
    for offset, data in writes:
        made.extend(bytes(max(0, offset + len(data) - len(made))))
        made[offset : offset + len(data)] = data
    return bytes(made)


async def _open(stage: Stage, client: int) -> File:
    return await stage.at(client, lambda fs: fs.open(PATH, "r+"))


async def _write(stage: Stage, client: int, file: File, offset: int, data: bytes) -> None:
    await stage.at(client, lambda _: file.pwrite(data, offset))


def _chunk_writes_of_meta(
    stage: Stage, server: Machine | None = None, *, answers: bool = False
) -> Tap:
    """Hold what the metadata server writes to chunks, or that it was written."""
    here, there = {(server or stage.meta).name}, {machine.name for machine in stage.world.storage}
    if answers:
        here, there = there, here
    tap = Tap(between(UPDATE.number, here, there, answers=answers))
    stage.world.network.taps.append(tap)
    return tap


@file_situation
async def two_clients_write_one_small_file(stage: Stage) -> None:
    """Both have it open, each writes its own bytes: none are undone."""
    await stage.at(0, lambda fs: write(fs, OLD))
    one, two = await _open(stage, 0), await _open(stage, 1)
    await _write(stage, 0, one, 0, b"1" * 10)
    await _write(stage, 1, two, 50, b"2" * 10)
    await stage.at(0, lambda _: one.close())
    await stage.at(1, lambda _: two.close())
    expect(await stage.at(2, read), patched(OLD, (0, b"1" * 10), (50, b"2" * 10)))


@file_situation
async def a_small_file_is_written_while_it_gets_chunks(stage: Stage) -> None:
    """The content that was copied is not the content any more: it is copied again."""
    await stage.at(0, lambda fs: write(fs, OLD))
    one, two = await _open(stage, 0), await _open(stage, 1)
    tap = _chunk_writes_of_meta(stage)
    growing = stage.begin(0, lambda _: one.pwrite(b"1" * 10, BEHIND))
    await stage.until(lambda: bool(tap.held), 5)
    await _write(stage, 1, two, 50, b"2" * 10)
    await stage.at(1, lambda _: two.close())
    tap.release()
    await growing
    await stage.at(0, lambda _: one.close())
    expect(await stage.at(2, read), patched(OLD, (50, b"2" * 10), (BEHIND, b"1" * 10)))


@file_situation
async def a_small_file_is_cut_while_it_gets_chunks(stage: Stage) -> None:
    """What was copied before must not show behind the new end, when the file grows over it."""
    await stage.at(0, lambda fs: write(fs, OLD))
    file = await _open(stage, 0)
    tap = _chunk_writes_of_meta(stage, answers=True)
    growing = stage.begin(0, lambda _: file.pwrite(b"1" * 10, BEHIND))
    await stage.until(lambda: bool(tap.held), 5)
    await stage.at(1, lambda fs: fs.truncate(PATH, 10))
    tap.release()
    await growing
    await stage.at(0, lambda _: file.close())
    expect(await stage.at(2, read), patched(OLD[:10], (BEHIND, b"1" * 10)))


@file_situation
async def a_small_file_has_grown_before_meta_starts_anew(stage: Stage) -> None:
    """Meta looks for chunks of lost files: those of this one are named by another id than its."""
    await stage.at(0, lambda fs: write(fs, OLD))
    file = await _open(stage, 0)
    await _write(stage, 0, file, BEHIND, b"1" * 10)
    await stage.at(0, lambda _: file.close())
    stage.meta.kill()
    await asyncio.sleep(0.2)
    stage.revive(stage.meta)
    await asyncio.sleep(15)
    expect(await stage.at(1, read), patched(OLD, (BEHIND, b"1" * 10)))


@file_situation
async def power_of_meta_fails_after_it_wrote_its_first_chunk(stage: Stage) -> None:
    """Its name is the first id of this life, which is lost: no new file may have that one."""
    await stage.at(0, lambda fs: write(fs, OLD))
    stage.meta.kill()
    await asyncio.sleep(0.2)
    stage.revive(stage.meta)
    file = await _open(stage, 0)
    tap = _chunk_writes_of_meta(stage, answers=True)
    stage.begin(0, lambda _: file.pwrite(b"1" * 10, BEHIND))
    await stage.until(lambda: bool(tap.held), 5)
    stage.client(0).kill()
    stage.cut_meta(UNSYNCED_IS_LOST)
    tap.lose()
    stage.power_on()
    stage.revive(stage.client(0))

    async def make(fs: FileSystem) -> None:
        file = await fs.open("/f/new", "w")
        await file.pwrite(b"2" * 10, BEHIND)
        await file.close()

    await stage.at(1, make)
    expect(await stage.at(2, lambda fs: read(fs, "/f/new")), patched(b"", (BEHIND, b"2" * 10)))


@file_situation
async def power_of_meta_fails_after_a_content_was_told(stage: Stage) -> None:
    """It was told in passing, which is not stable; the fsync that follows must tell it again."""
    await stage.at(0, lambda fs: write(fs, OLD))
    file = await _open(stage, 0)
    await _write(stage, 0, file, 0, b"1" * 10)
    await asyncio.sleep(3)
    stage.cut_meta(UNSYNCED_IS_LOST)
    stage.power_on()
    await stage.at(0, lambda _: file.fsync())
    expect(await stage.at(1, read), patched(OLD, (0, b"1" * 10)))
    await stage.at(0, lambda _: file.close())


@file_situation
async def power_of_meta_fails_before_a_writer_cuts_its_small_file(stage: Stage) -> None:
    """Meta has forgotten the content; its writer has not, and tells what the cut has left of it."""

    async def leave(fs: FileSystem) -> File:
        file = await fs.open(PATH, "w")
        await fs.cluster.metadata.stable()
        await file.truncate(2 * len(OLD))
        await file.pwrite(OLD, 0)
        return file

    file = await stage.at(0, leave)
    await asyncio.sleep(3)  # it is told, not durably
    stage.cut_meta(UNSYNCED_IS_LOST)
    stage.power_on()

    async def cut(_: FileSystem) -> None:
        await file.truncate(len(OLD) - 7)
        await file.close()

    await stage.at(0, cut)
    expect(await stage.at(1, read), OLD[:-7])


@metas_situation
async def a_small_file_gets_chunks_while_another_server_starts(stage: Stage) -> None:
    """It searches for chunks without owner where the ids of the living are; this has none yet."""
    await stage.at(0, lambda fs: write(fs, OLD))
    home = stage.home((await stage.at(0, lambda fs: fs.stat(PATH))).st_ino)
    file = await _open(stage, 0)
    other = next(machine for machine in stage.world.meta if machine is not home)
    other.kill()
    await asyncio.sleep(0.2)
    stage.revive(other)
    await asyncio.sleep(GRACE_S - 1.5)
    tap = _chunk_writes_of_meta(stage, home, answers=True)
    growing = stage.begin(0, lambda _: file.pwrite(b"1" * 10, BEHIND))
    await stage.until(lambda: bool(tap.held), 5)
    await asyncio.sleep(5)
    tap.release()
    await growing
    await stage.at(0, lambda _: file.close())
    expect(await stage.at(1, read), patched(OLD, (BEHIND, b"1" * 10)))


@file_situation
async def a_small_file_is_written_after_power_of_meta_failed(stage: Stage) -> None:
    """Who had told something before knows a content that is no more, and must not bring it back."""
    await stage.at(0, lambda fs: write(fs, OLD))
    one = await _open(stage, 0)
    await _write(stage, 0, one, 0, b"1" * 10)
    await asyncio.sleep(3)
    stage.cut_meta(UNSYNCED_IS_LOST)
    stage.power_on()
    two = await _open(stage, 1)
    await _write(stage, 1, two, 50, b"2" * 10)
    await stage.at(1, lambda _: two.close())
    await _write(stage, 0, one, 20, b"3" * 10)
    await stage.at(0, lambda _: one.close())
    wanted = patched(OLD, (0, b"1" * 10), (50, b"2" * 10), (20, b"3" * 10))
    expect(await stage.at(2, read), wanted)


@file_situation
async def a_small_file_is_opened_again_after_it_was_written(stage: Stage) -> None:
    """By a client that has it open all the time: it sees what was closed before."""
    await stage.at(0, lambda fs: write(fs, OLD))

    async def begin(fs: FileSystem) -> File:
        file = await fs.open(PATH)
        expect(await file.read(), OLD)
        return file

    kept = await stage.at(1, begin)
    file = await _open(stage, 0)
    await _write(stage, 0, file, 0, b"1" * 10)
    await stage.at(0, lambda _: file.close())
    expect(await stage.at(1, read), patched(OLD, (0, b"1" * 10)))
    await stage.at(1, lambda _: kept.close())
