"""One file that all clients write at once, each its own bytes: nobody's may be undone.

Most of it fits beside the inode; now and then somebody writes behind the limit, and it gets chunks,
until somebody removes it. Nobody cuts it: of every byte there is one writer, as check_files.py
wants it.
"""

import asyncio

from emberfs.client.oserrors import FileSystemError
from emberfs.proto.ids import KiB
from sim.file_lane import HOME, NO_FILE, READ_BYTES, FileLane

PATH = f"{HOME}/shared"
SLOT_BYTES = 600
FAR_BYTES = 8 * KiB


class ShareLane(FileLane):
    """See the module."""

    async def run(self) -> None:
        """One open file after another."""
        dice = self._dice
        while not self._load.stopping:
            await asyncio.sleep(dice.expovariate(1e9 / self._load.pause_ns))
            roll = dice.random()
            try:
                if roll < 0.7:
                    await self._write_session(PATH)
                elif roll < 0.94:
                    await self._read_session()
                else:
                    await self._fs.remove(PATH)
            except FileSystemError as problem:
                if problem.code not in NO_FILE:
                    self._load.note(f"share: {problem.code.name}: {problem}")

    def _any(self) -> str:
        return PATH

    def _range(self) -> tuple[int, int]:
        """A part of the own slot, or of the one behind the limit."""
        dice = self._dice
        start = self._index * SLOT_BYTES + dice.choice((0, 0, 100, 512))
        stop = (self._index + 1) * SLOT_BYTES
        far = FAR_BYTES if dice.random() < 0.06 else 0
        return far + start, stop - start

    async def _write_session(self, path: str) -> None:
        dice = self._dice
        opened = await self._open(path, "r+", direct=dice.random() < 0.3)
        if opened is None:
            opened = await self._open(path, "x+", direct=False)
        if opened is None:
            return
        going = True
        for _ in range(dice.randint(1, 4)):
            if self._load.stopping or not going:
                break
            roll = dice.random()
            if roll < 0.6:
                going = await self._write(opened, append=False)
            elif roll < 0.75:
                going = await self._flush(opened, opened.file.fsync())
            else:
                going = await self.read(opened, 0, READ_BYTES)
            await self._pause()
        await self._flush(opened, opened.file.close())

    async def _read_session(self) -> None:
        opened = await self._open(PATH, "r", direct=self._dice.random() < 0.2)
        if opened is not None:
            await self.read(opened, 0, READ_BYTES)
            await self._pause()
            await self.read(opened, 0, READ_BYTES)
            await opened.file.close()
