"""Situations of quotas and removed trees: a lost answer, a server that dies in between."""

import asyncio
import stat as st
from collections.abc import Sequence

from emberfs.client.file import FileSystem
from emberfs.client.oserrors import FileSystemError
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import CREATE
from emberfs.proto.quota_calls import REMOVE_TREE, QuotaReport
from sim.files_load import ROOT
from sim.scenario import BlameError
from sim.scenario_files import Stage
from sim.situations import file_situation

NAMES = 150  # more than two batches of the work in the background


async def _quota(fs: FileSystem, files: int = 10) -> None:
    await fs.mkdir("/q")
    await fs.set_quota("/q", files_max=files, bytes_max=1 << 20)


async def _create(fs: FileSystem) -> None:
    await (await fs.open("/q/f", "x")).close()


async def _report(fs: FileSystem) -> Sequence[QuotaReport]:
    return await fs.quotas_of("/q")


async def _expect_files(stage: Stage, files: int) -> None:
    used = (await stage.at(1, _report))[0].files_used
    if used != files:
        raise BlameError("quota", f"{used} files count, there are {files}")


@file_situation
async def a_create_whose_answer_is_lost_counts_once(stage: Stage) -> None:
    """The client asks again; what it is told is what the first call did."""
    await stage.at(0, _quota)
    answers = stage.tap(CREATE, 0, answers=True)
    making = stage.begin(0, _create)
    await stage.until(lambda: bool(answers.held), 5)
    await _expect_files(stage, 2)
    answers.lose()
    await making
    await _expect_files(stage, 2)


@file_situation
async def meta_dies_between_a_create_and_its_answer(stage: Stage) -> None:
    """Counter, name and remembered reply are one transaction: all of them survive, or none."""
    await stage.at(0, _quota)
    answers = stage.tap(CREATE, 0, answers=True)
    making = stage.begin(0, _create)
    await stage.until(lambda: bool(answers.held), 5)
    stage.meta.kill()
    answers.lose()
    await asyncio.sleep(0.5)
    stage.revive(stage.meta)
    await making
    await _expect_files(stage, 2)


@file_situation
async def meta_dies_while_it_counts(stage: Stage) -> None:
    """What was in the directory when the quota was set is counted to the end, once."""

    async def fill(fs: FileSystem) -> None:
        await fs.mkdir("/q")
        await fs.mkdir("/q/d")
        for number in range(NAMES):
            await fs.mkdir(f"/q/d/{number}")
        await fs.set_quota("/q", files_max=1000)

    await stage.at(0, fill)
    stage.meta.kill()
    await asyncio.sleep(0.2)
    stage.revive(stage.meta)
    end_s = stage.world.loop.time() + 30
    while (await stage.at(1, _report))[0].state != "active":
        if stage.world.loop.time() > end_s:
            raise BlameError("quota", "counting does not come to an end")
        await asyncio.sleep(0.05)
    await _expect_files(stage, NAMES + 2)


@file_situation
async def meta_dies_while_a_tree_is_taken_to_pieces(stage: Stage) -> None:
    """It goes on after its return; who has a file of the tree open goes on reading it."""

    async def fill(fs: FileSystem) -> None:
        await fs.mkdir("/t")
        for number in range(NAMES):
            await fs.mkdir(f"/t/{number}")
        async with await fs.open("/t/held", "w") as file:
            await file.write(b"held" * 1000)

    await stage.at(0, fill)
    held = await stage.at(1, lambda fs: fs.open("/t/held"))
    answers = stage.tap(REMOVE_TREE, 0, answers=True)
    removing = stage.begin(0, lambda fs: fs.remove_tree("/t"))
    await stage.until(lambda: bool(answers.held), 5)
    stage.meta.kill()
    answers.lose()
    await asyncio.sleep(0.5)
    stage.revive(stage.meta)
    await removing
    await stage.at(0, lambda fs: fs.mkdir("/t"))  # a late copy must not remove this one
    await stage.until(lambda: not any(r.kind == "removed directory" for r in stage.leftovers), 30)

    async def read(_: FileSystem) -> bytes:
        return await held.read()

    if await stage.at(1, read) != b"held" * 1000:
        raise BlameError("file content", "an open file of a removed tree was collected")
    await stage.at(1, lambda _: held.close())
    await stage.at(1, lambda fs: fs.stat("/t"))


@file_situation
async def a_directory_of_a_removed_tree_is_used(stage: Stage) -> None:
    """Its inode is known to a client, and the server has not come to it yet."""

    async def fill(fs: FileSystem) -> int:
        await fs.makedirs("/t/u/v")
        for number in range(NAMES):
            await fs.mkdir(f"/t/{number}")
        return (await fs.stat("/t/u/v")).st_ino

    inner = InodeId(await stage.at(0, fill))
    await stage.at(0, lambda fs: fs.remove_tree("/t"))

    async def use(fs: FileSystem) -> None:
        try:
            await fs.cluster.metadata.mknod(ROOT, inner, b"x", st.S_IFDIR | 0o755)
        except EmberfsError:
            return
        raise BlameError("names", "a name was made in a removed tree")

    await stage.at(1, use)


@file_situation
async def two_writers_use_a_quota_up(stage: Stage) -> None:
    """Together they pass it by no more than what each was told that there was room for."""
    limit, step = 1 << 20, 64 << 10

    async def write(fs: FileSystem, name: str) -> int:
        done = 0
        async with await fs.open(f"/q/{name}", "x") as file:
            try:
                while done < 2 * limit:
                    await file.write(bytes(step))
                    done += step
            except FileSystemError as problem:
                if problem.code.name != "QUOTA":
                    raise
        return done

    await stage.at(0, _quota)
    first = stage.begin(0, lambda fs: write(fs, "a"))
    second = stage.begin(1, lambda fs: write(fs, "b"))
    total = await first + await second
    if not limit <= total + step <= 2 * limit + step:
        raise BlameError("quota", f"{total} bytes were written under a quota of {limit}")
    if (await stage.at(0, _report))[0].bytes_used != total:
        raise BlameError("quota", "what was written does not count")
