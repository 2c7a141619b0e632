"""Situations of the contents and lengths of files: cuts, buffers, prefetched bytes, reused ids."""

import asyncio

from emberfs.client.file import File, FileSystem
from emberfs.client.oserrors import FileSystemError
from emberfs.proto.meta_calls import OPEN, SETTLE
from sim.disk import Fate
from sim.scenario import BlameError
from sim.scenario_files import Stage
from sim.situations import file_situation

UNSYNCED_IS_LOST = Fate(data=False, rows=False)
PATH = "/f/x"
OLD, NEW = b"o" * 9000, b"n" * 100


async def write(fs: FileSystem, content: bytes, path: str = PATH) -> None:
    """Make a file in one go; its close makes it stable."""
    file = await fs.open(path, "w")
    await file.write(content)
    await file.close()


async def read(fs: FileSystem, path: str = PATH) -> bytes:
    """All of a file."""
    file = await fs.open(path)
    content = await file.read()
    await file.close()
    return content


def expect(found: bytes, wanted: bytes) -> None:
    """Blame what a file must not contain."""
    if len(found) != len(wanted):
        raise BlameError("file length", f"{len(found)} instead of {len(wanted)}")
    if found != wanted:
        at = next(i for i, (one, two) in enumerate(zip(found, wanted, strict=True)) if one != two)
        raise BlameError("file content", f"{found[at : at + 8]!r} at {at} of {len(found)}")


@file_situation
async def a_writer_goes_on_after_another_client_has_cut_its_file(stage: Stage) -> None:
    """It tells the length that it has written since, not the one of before."""

    async def begin(fs: FileSystem) -> File:
        file = await fs.open(PATH, "w")
        await file.write(OLD)
        await file.fsync()
        return file

    file = await stage.at(0, begin)
    await stage.at(1, lambda fs: fs.truncate(PATH, 10))

    async def go_on(_: FileSystem) -> None:
        await file.pwrite(NEW[:5], 0)
        await file.close()

    await stage.at(0, go_on)
    expect(await stage.at(2, read), NEW[:5] + OLD[5:10])


@file_situation
async def a_writer_cuts_its_file_after_another_client_has_cut_it(stage: Stage) -> None:
    """What it has written since lies below the length that it believes in, behind that of meta.

    Seed 7000363, metas: meta was not told and took it for left behind by a dead writer.
    """

    async def begin(fs: FileSystem) -> File:
        file = await fs.open(PATH, "w")
        await file.write(OLD)
        await file.fsync()
        return file

    file = await stage.at(0, begin)
    await stage.at(1, lambda fs: fs.truncate(PATH, 0))

    async def go_on(_: FileSystem) -> None:
        await file.pwrite(NEW, 0)
        await file.truncate(len(NEW) - 1)
        await file.close()

    await stage.at(0, go_on)
    expect(await stage.at(2, read), NEW[:-1])


@file_situation
async def a_file_is_cut_and_grows_while_its_writer_closes_it(stage: Stage) -> None:
    """The length has to be told twice, as another client has cut the file before the writes.

    Until it is told the writer lives on for meta: it would take the bytes for nobody's.
    """

    async def begin(fs: FileSystem) -> File:
        file = await fs.open(PATH, "w", direct=True)
        await file.write(OLD)
        await file.fsync()
        return file

    file = await stage.at(0, begin)
    await stage.at(1, lambda fs: fs.truncate(PATH, 10))
    await stage.at(0, lambda _: file.pwrite(NEW * 90, 0))
    settling = stage.tap(SETTLE, 0)
    closing = stage.begin(0, lambda _: file.close())
    await stage.until(lambda: bool(settling.held), 5)
    settling.send_held()
    await stage.until(lambda: bool(settling.held), 5)
    await stage.at(1, lambda fs: fs.truncate(PATH, 2 * len(OLD)))
    settling.release()
    await closing
    expect(await stage.at(2, read), NEW * 90 + bytes(len(OLD)))


@file_situation
async def a_close_is_not_answered_in_time(stage: Stage) -> None:
    """Its caller gives up; the session ends all the same, and what was at storage is told."""
    settlements = stage.tap(SETTLE, 0)

    async def work(fs: FileSystem) -> None:
        file = await fs.open(PATH, "w")
        await file.write(OLD)
        try:
            await file.close()
        except FileSystemError:
            return
        raise BlameError("script", "the close was answered")

    await stage.at(0, work)
    settlements.lose()
    await asyncio.sleep(5)
    expect(await stage.at(1, read), OLD)


@file_situation
async def a_file_is_opened_anew_while_it_is_closed(stage: Stage) -> None:
    """The session that came back must not end before what the close tells has arrived.

    Meta would take the bytes for nobody's when another client sets the length. If the name was
    gone, the file was collected, and the close found none (seed 20000029, gentle files).
    """

    async def begin(fs: FileSystem) -> File:
        file = await fs.open(PATH, "w", direct=True)
        await file.write(OLD)  # storage has it, meta does not know of it
        return file

    file = await stage.at(0, begin)
    opened = stage.tap(OPEN, 0, answers=True)
    stage.meta.kill()
    stage.revive(stage.meta)
    await stage.until(lambda: bool(opened.held), 20)
    settling = stage.tap(SETTLE, 0)
    closing = stage.begin(0, lambda _: file.close())
    await stage.until(lambda: bool(settling.held), 5)
    settling.open = True  # what comes now overtakes the one that is held
    opened.release()
    await asyncio.sleep(0.5)
    await stage.at(1, lambda fs: fs.truncate(PATH, 2 * len(OLD)))
    settling.release()
    await closing
    expect(await stage.at(2, read), OLD + bytes(len(OLD)))


@file_situation
async def a_file_is_cut_beyond_the_end_that_meta_knows(stage: Stage) -> None:
    """Its writer, who is alive, has written there and not told yet: it goes, whoever tells it."""

    async def begin(fs: FileSystem) -> File:
        file = await fs.open(PATH, "w", direct=True)
        await file.write(OLD)
        return file

    file = await stage.at(0, begin)
    await stage.at(1, lambda fs: fs.truncate(PATH, 10))
    await stage.at(0, lambda _: file.close())
    found = await stage.at(2, read)
    expect(found, OLD[:10] + bytes(len(found) - 10))


@file_situation
async def a_writer_dies_before_it_has_told_a_length(stage: Stage) -> None:
    """It was told that its bytes are written: they are there when its session has ended."""

    async def leave_open(fs: FileSystem) -> None:
        file = await fs.open(PATH, "w", direct=True)
        await file.write(OLD)

    await stage.at(1, leave_open)
    stage.client(1).kill()
    await stage.until(lambda: not stage.leftovers, 25)
    expect(await stage.at(0, read), OLD)


@file_situation
async def a_file_is_cut_while_its_bytes_are_buffered(stage: Stage) -> None:
    """They were written before: they must not come behind the new end afterwards."""

    async def work(fs: FileSystem) -> None:
        file = await fs.open(PATH, "w+")
        await file.write(OLD)
        await fs.truncate(PATH, 10)
        await asyncio.sleep(3)
        await file.pwrite(NEW, len(OLD))
        await file.close()

    await stage.at(0, work)
    expect(await stage.at(1, read), OLD[:10] + bytes(len(OLD) - 10) + NEW)


@file_situation
async def bytes_are_written_after_they_were_read_ahead(stage: Stage) -> None:
    """Through another description of the same client: who reads on must see them."""
    old = b"o" * 50_000

    async def work(fs: FileSystem) -> bytes:
        reader, writer = await fs.open(PATH), await fs.open(PATH, "r+", direct=True)
        head = await reader.read(4096)
        await asyncio.sleep(0.1)  # the rest is here by now
        await writer.pwrite(NEW, 20_000)
        content = head + await reader.read()
        await reader.close()
        await writer.close()
        return content

    await stage.at(0, lambda fs: write(fs, old))
    expect(await stage.at(0, work), old[:20_000] + NEW + old[20_100:])


@file_situation
async def meta_and_a_client_die_amid_a_truncation(stage: Stage) -> None:
    """Nobody asks again: the next life of the server finishes what this one has begun."""
    await stage.at(1, lambda fs: write(fs, OLD))
    for machine in stage.world.storage:
        machine.process.pause()
    cutting = stage.begin(0, lambda fs: fs.truncate(PATH, 10))
    await stage.until(lambda: any(left.kind == "trim" for left in stage.leftovers), 5)
    stage.client(0).kill()
    stage.meta.kill()
    for machine in stage.world.storage:
        machine.process.resume()
    cutting.cancel()
    await asyncio.sleep(0.2)
    stage.revive(stage.meta)
    stage.revive(stage.client(0))

    async def grow(fs: FileSystem) -> None:
        file = await fs.open(PATH, "r+")
        await file.pwrite(NEW, len(OLD))
        await file.close()

    await stage.at(1, grow)
    expect(await stage.at(2, read), OLD[:10] + bytes(len(OLD) - 10) + NEW)


@file_situation
async def power_of_meta_fails_after_a_file_was_collected(stage: Stage) -> None:
    """The removal is not on stable storage: the name may be back, but then with its data."""
    await stage.at(0, lambda fs: write(fs, OLD))
    await stage.at(0, lambda fs: fs.remove(PATH))
    await stage.until(lambda: not stage.leftovers, 5)
    stage.cut_meta(UNSYNCED_IS_LOST)
    stage.power_on()
    try:
        expect(await stage.at(1, read), OLD)
    except FileNotFoundError:
        return


@file_situation
async def a_file_is_set_to_a_length_after_its_writer_has_died(stage: Stage) -> None:
    """What the writer was told is written stays, as far as the file reaches."""

    async def leave(fs: FileSystem) -> None:
        file = await fs.open(PATH, "w", direct=True)
        await file.write(OLD)

    await stage.at(1, leave)
    stage.client(1).kill()
    await asyncio.sleep(7)  # its lease is over, its session is not
    assert stage.leftovers
    await stage.at(0, lambda fs: fs.truncate(PATH, 505))
    expect(await stage.at(2, read), OLD[:505])
    stage.revive(stage.client(1))


@file_situation
async def power_of_meta_fails_before_a_writer_cuts_its_file(stage: Stage) -> None:
    """Meta has forgotten how long the file was; its writer has not, and its bytes stay."""

    async def leave(fs: FileSystem) -> File:
        file = await fs.open(PATH, "w", direct=True)
        await file.write(OLD)  # it has chunks from here on
        await file.truncate(0)
        await fs.cluster.metadata.stable()
        await file.truncate(2 * len(OLD))
        await file.pwrite(OLD, 0)
        await asyncio.sleep(6)  # it is told by itself, and not made stable
        return file

    file = await stage.at(0, leave)
    stage.cut_meta(UNSYNCED_IS_LOST)
    stage.power_on()

    async def cut(_: FileSystem) -> None:
        await file.truncate(len(OLD) - 7)
        await file.close()

    await stage.at(0, cut)
    expect(await stage.at(1, read), OLD[:-7])
