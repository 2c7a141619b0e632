"""Situations of several metadata servers on one store: late copies, late cuts, servers apart."""

import asyncio
from typing import NamedTuple

from emberfs.client.file import File, FileSystem
from emberfs.client.oserrors import FileSystemError
from emberfs.proto.meta_calls import MKNOD, REMOVE
from emberfs.proto.storage_calls import LIST, UPDATE
from sim.machine import Machine
from sim.scenario import BlameError
from sim.scenario_files import Stage
from sim.situation_files import NEW, OLD, expect, read, write
from sim.situations import metas_situation
from sim.tap import CONTROL, ROUTING


def server_of(stage: Stage, client: int) -> Machine:
    """The metadata server that a client asks first."""
    return stage.home(stage.client(client).service.client_id)


def other_than(stage: Stage, machine: Machine) -> Machine:
    """The other metadata server."""
    return next(other for other in stage.world.meta if other is not machine)


class Places(NamedTuple):
    """A file whose lengths are told to `home`, and a client of the other server."""

    path: str
    home: Machine
    other: Machine
    client: int


async def places(stage: Stage) -> Places:
    """Make such a file, with old content."""
    for number in range(16):
        path = f"/f/{number}"
        await stage.at(0, lambda fs, p=path: write(fs, OLD, p))
        status = await stage.at(0, lambda fs, p=path: fs.stat(p))
        home = stage.home(status.st_ino)
        for client in (1, 2):
            if server_of(stage, client) is not home:
                return Places(path, home, other_than(stage, home), client)
    raise AssertionError("all clients have one server")


@metas_situation
async def a_copy_of_a_failed_removal_waits_at_another_server(stage: Stage) -> None:
    """Its client was told by the other one that the directory is full, and has gone on."""
    await stage.at(0, lambda fs: fs.mkdir("/d"))
    await stage.at(0, lambda fs: fs.mkdir("/d/full"))
    calls = stage.tap(REMOVE, 0, at=server_of(stage, 0))

    async def remove(fs: FileSystem) -> None:
        try:
            await fs.rmdir("/d")
        except FileSystemError:
            return
        raise BlameError("names", "a full directory was removed")

    await stage.at(0, remove)
    assert calls.held
    await stage.at(1, lambda fs: fs.rmdir("/d/full"))
    calls.release()
    await asyncio.sleep(0.5)


@metas_situation
async def a_copy_of_a_call_waits_longer_than_its_reply_is_remembered(stage: Stage) -> None:
    """The other server has performed it; what it made is removed, and its reply forgotten."""
    calls = stage.tap(MKNOD, 0, at=server_of(stage, 0))
    await stage.at(0, lambda fs: fs.mkdir("/d"))
    assert calls.held
    await stage.at(0, lambda fs: fs.rmdir("/d"))
    for machine in stage.world.meta:
        assert machine.process is not None
        sweep = machine.service._context.replies.forgetting.sweep(0)
        await machine.process.context.run(stage.world.loop.create_task, sweep)
    calls.release()
    await asyncio.sleep(0.5)
    if await stage.at(1, lambda fs: fs.listdir("/")) != ["f"]:
        raise BlameError("names", "a directory was made twice")


@metas_situation
async def a_server_is_frozen_amid_a_truncation(stage: Stage) -> None:
    """Another has finished it, and the file was written again: the first must not go on."""
    path, home, _, client = await places(stage)
    lists = stage.hold(LIST.number, stage.world.storage, [home], answers=True)
    cutting = stage.begin(client, lambda fs: fs.truncate(path, 10))
    await stage.until(lambda: bool(lists.held), 5)
    assert home.process is not None
    home.process.pause()
    await cutting

    async def grow(fs: FileSystem) -> None:
        file = await fs.open(path, "r+", direct=True)
        await file.pwrite(NEW, len(OLD))
        await file.close()

    await stage.at(client, grow)
    lists.release()
    await asyncio.sleep(0.01)
    home.process.resume()
    await asyncio.sleep(1)
    expect(await stage.at(0, read_of(path)), OLD[:10] + bytes(len(OLD) - 10) + NEW)


def read_of(path: str):
    """All of a file, for `Stage.at`."""
    return lambda fs: read(fs, path)


@metas_situation
async def a_file_is_opened_while_another_server_cuts_it(stage: Stage) -> None:
    """What is written after the open must not be cut off."""
    path, home, _, client = await places(stage)
    lists = stage.hold(LIST.number, stage.world.storage, [home], answers=True)
    cutting = stage.begin(0, lambda fs: fs.truncate(path, 10))
    await stage.until(lambda: bool(lists.held), 5)

    async def append(fs: FileSystem) -> None:
        file = await fs.open(path, "a", direct=True)
        await file.write(NEW)
        await file.close()

    appending = stage.begin(client, append)
    await asyncio.sleep(1)
    lists.release()
    await asyncio.gather(cutting, appending)
    expect(await stage.at(0, read_of(path)), OLD[:10] + NEW)


@metas_situation
async def a_file_is_deleted_while_another_server_cuts_it(stage: Stage) -> None:
    """The end of the cut must not bring a chunk back."""
    path, home, _, client = await places(stage)
    updates = stage.hold(UPDATE.number, [home], stage.world.storage, answers=False)
    cutting = stage.begin(0, lambda fs: fs.truncate(path, 10))
    await stage.until(lambda: bool(updates.held), 5)
    await stage.at(client, lambda fs: fs.remove(path))
    await asyncio.sleep(2)
    updates.release()
    await asyncio.gather(cutting, return_exceptions=True)


@metas_situation
async def a_server_dies_amid_a_truncation_and_stays_away(stage: Stage) -> None:
    """The other one finishes it, as soon as it is certain that the first is dead."""
    path, home, _, client = await places(stage)
    for machine in stage.world.storage:
        machine.process.pause()
    cutting = stage.begin(0, lambda fs: fs.truncate(path, 10))
    await stage.until(lambda: any(left.kind == "trim" for left in stage.leftovers), 5)
    stage.client(0).kill()
    home.kill()
    cutting.cancel()
    for machine in stage.world.storage:
        machine.process.resume()

    async def grow(fs: FileSystem) -> None:
        file = await fs.open(path, "r+")
        await file.pwrite(NEW, len(OLD))
        await file.close()

    try:
        await stage.at(client, grow)
    except FileSystemError as problem:
        raise BlameError("error at a client", str(problem)) from problem
    expect(await stage.at(client, read_of(path)), OLD[:10] + bytes(len(OLD) - 10) + NEW)
    stage.revive(home)
    stage.revive(stage.client(0))


@metas_situation
async def a_client_does_not_reach_its_server(stage: Stage) -> None:
    """All others do, so routing shows it alive: the client turns to another one by itself."""
    server, client = server_of(stage, 0), stage.client(0)
    link = stage.world.network.link(server.name, client.name)
    link.cut = True
    for number in range(3):
        try:
            await stage.at(0, lambda fs, n=number: fs.mkdir(f"/{n}"))
        except FileSystemError as problem:
            raise BlameError("error at a client", str(problem)) from problem
    link.cut = False


@metas_situation
async def a_client_is_back_and_one_server_has_not_heard_of_it(stage: Stage) -> None:
    """It has opened its file anew at the other one: the session is not that of a dead client."""
    path, home, _, client = await places(stage)
    holder = stage.client(client)

    async def hold(fs: FileSystem) -> File:
        file = await fs.open(path)
        await fs.remove(path)
        return file

    file = await stage.at(client, hold)
    assert holder.process is not None
    holder.process.pause()
    sweeper = overdue_of(home)
    await stage.until(lambda: bool(sweeper._absent_since_ns), 20)
    (since_ns,) = sweeper._absent_since_ns.values()
    await stage.until(lambda: sweeper._env.now_ns() - since_ns > 9.3e9, 20)
    # The grace time is over at the next sweep; until then `home` hears no news and knows it not.
    news = stage.hold(ROUTING, stage.world.mgmtd, [home], answers=True)
    holder.process.resume()
    await stage.until(lambda: bool(holder.service._agent.is_member()), 0.5)
    beats = stage.hold(CONTROL, stage.world.mgmtd, [home], answers=True)

    async def look(_: FileSystem) -> bytes:
        await file.seek(0)
        return await file.read()

    try:
        expect(await stage.at(client, look), OLD)
        await asyncio.sleep(1)
        news.release()
        beats.release()
        await asyncio.sleep(3)
        expect(await stage.at(client, look), OLD)
        if not any(left.kind == "session" for left in stage.leftovers):
            raise BlameError("file content", "the session of a living client was ended")
    except FileSystemError as problem:
        raise BlameError("file content", str(problem)) from problem
    await stage.at(client, lambda _: file.close())


def overdue_of(machine: Machine):
    """The part of a metadata server that ends sessions."""
    return machine.service._context.overdue.__self__
