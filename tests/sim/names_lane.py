"""One client's changes of a tiny tree: everybody makes, moves, links and removes the same names."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from emberfs.client.file import FileSystem
from emberfs.client.oserrors import FileSystemError

if TYPE_CHECKING:
    from sim.files_load import FilesLoad

DIRECTORIES = ("", "/a", "/b", "/a/c", "/b/c")
NAMES = ("a", "b", "c", "x", "y")
STABLE_SHARE = 0.06


class NamesLane:
    """See the module."""

    def __init__(self, load: "FilesLoad", fs: FileSystem, dice: random.Random) -> None:
        self._load = load
        self._fs = fs
        self._dice = dice
        self._choices: list[tuple[int, Callable[[], Awaitable[object]]]] = [
            (14, lambda: fs.mkdir(self._path())),
            (16, self._create),
            (14, lambda: fs.rename(self._path(), self._path())),
            (8, lambda: fs.link(self._path(), self._path())),
            (12, lambda: fs.remove(self._path())),
            (8, lambda: fs.rmdir(self._path())),
            (12, lambda: fs.stat(self._path())),
            (10, lambda: fs.listdir(self._directory())),
        ]

    async def run(self) -> None:
        """One operation after another."""
        load, dice = self._load, self._dice
        weights = [weight for weight, _ in self._choices]
        while not load.stopping:
            await asyncio.sleep(dice.expovariate(1e9 / load.pause_ns))
            _, choice = dice.choices(self._choices, weights)[0]
            try:
                await choice()
                if dice.random() < STABLE_SHARE:
                    await self._fs.cluster.metadata.stable()
            except FileSystemError:
                continue  # recorded below the library
            except Exception as problem:
                load.note(f"names: {problem!r}")

    def _directory(self) -> str:
        return self._dice.choice(DIRECTORIES) or "/"

    def _path(self) -> str:
        return self._dice.choice(DIRECTORIES) + "/" + self._dice.choice(NAMES)

    async def _create(self) -> None:
        """Make a file, sometimes hold it open for a while: it may lose its name meanwhile."""
        mode = self._dice.choice(("x", "x", "w", "a"))
        file = await self._fs.open(self._path(), mode)
        if self._dice.random() < 0.3:
            await asyncio.sleep(self._dice.uniform(0, 2))
        await file.close()
