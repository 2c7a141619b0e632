"""Situations of names and sessions: calls whose copies come late, a server with old knowledge."""

import asyncio

from emberfs.client.file import File, FileSystem
from emberfs.client.oserrors import FileSystemError
from emberfs.proto.meta_calls import REMOVE
from sim.scenario import BlameError
from sim.scenario_files import Stage
from sim.situations import file_situation


@file_situation
async def a_copy_of_a_failed_removal_comes_late(stage: Stage) -> None:
    """By then the directory is there; its client was told that it was not, and has gone on."""
    await stage.at(0, lambda fs: fs.mkdir("/d"))
    await stage.at(0, lambda fs: fs.mkdir("/d/full"))
    copies = stage.tap(REMOVE, 0, copies=True)

    async def remove(fs: FileSystem) -> None:
        try:
            await fs.rmdir("/d")
        except FileSystemError:
            return
        raise BlameError("names", "a full directory was removed")

    await stage.at(0, remove)
    await stage.at(1, lambda fs: fs.rmdir("/d/full"))
    copies.release()
    await stage.at(1, lambda fs: fs.mkdir("/e"))
    await stage.until(lambda: not copies.held, 1)


@file_situation
async def meta_does_not_hear_that_a_client_is_back(stage: Stage) -> None:
    """It was dead for a moment. Out of touch with mgmtd, meta must not count that as for ever."""

    async def hold(fs: FileSystem) -> File:
        file = await fs.open("/f/x", "w+")
        await file.write(b"x" * 9000)
        await file.fsync()
        await fs.remove("/f/x")
        return file

    file = await stage.at(1, hold)
    client, meta = stage.client(1), stage.meta.service
    number = client.service.client_id
    assert client.process is not None
    client.process.pause()
    await stage.until(lambda: number not in (meta._context.clients.alive() or {number}), 20)
    managers = [*stage.world.mgmtd, stage.world.kv]
    links = [stage.world.network.link(m.name, stage.meta.name) for m in managers]
    links += [stage.world.network.link(stage.meta.name, m.name) for m in managers]
    for link in links:
        link.cut = True
    client.process.resume()
    await asyncio.sleep(30)

    async def look(_: FileSystem) -> bytes:
        await file.seek(0)
        return await file.read()

    try:
        content = await stage.at(1, look)
    except FileSystemError as problem:
        raise BlameError("file content", str(problem)) from problem
    if content != b"x" * 9000:
        raise BlameError("file content", "an open file was collected")
    for link in links:
        link.cut = False
    await stage.at(1, lambda _: file.close())
