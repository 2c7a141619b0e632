"""Situations of names: calls whose copies come late."""

from emberfs.client.file import FileSystem
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
