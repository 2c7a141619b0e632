"""One client's changes below a directory with quotas, whose subtrees everybody removes.

No file has a name outside: its link count would tell of a removed one until the server has come to
it, which check_tree.py does not model.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from emberfs.client.file import FileSystem
from emberfs.client.oserrors import FileSystemError

if TYPE_CHECKING:
    from sim.files_load import FilesLoad

TOP = "/r"
PLACES = (TOP, "/r/s", "/r/t", "/r/s/u", "/r/t/u")
NAMES = ("s", "t", "u", "v", "w")
FILES_MAX, BYTES_MAX = 12, 40_000


class TreesLane:
    """See the module."""

    def __init__(self, load: "FilesLoad", fs: FileSystem, dice: random.Random) -> None:
        self._load = load
        self._fs = fs
        self._dice = dice
        self._choices: list[tuple[int, Callable[[], Awaitable[object]]]] = [
            (16, lambda: fs.mkdir(self._path())),
            (24, self._write),
            (10, lambda: fs.remove_tree(self._path())),
            (10, lambda: fs.rename(self._path(), self._path())),
            (8, lambda: fs.remove(self._path())),
            (5, lambda: fs.listdir(dice.choice(PLACES))),
            (5, lambda: fs.truncate(self._path(), dice.randrange(20_000))),
            (6, self._set_quota),
            (3, lambda: fs.remove_quota(dice.choice(PLACES))),
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
            except FileSystemError:
                continue  # recorded below the library
            except Exception as problem:
                load.note(f"trees: {problem!r}")

    def _path(self) -> str:
        return self._dice.choice(PLACES) + "/" + self._dice.choice(NAMES)

    async def _set_quota(self) -> None:
        dice = self._dice
        files, length = dice.randrange(FILES_MAX), dice.randrange(BYTES_MAX)
        await self._fs.set_quota(dice.choice(PLACES), files_max=files, bytes_max=length)

    async def _write(self) -> None:
        """Write a file, sometimes hold it open: its tree may be removed meanwhile."""
        dice = self._dice
        async with await self._fs.open(self._path(), dice.choice(("x", "w", "a"))) as file:
            for _ in range(dice.randrange(3)):
                await file.write(bytes(dice.randrange(8000)))
            if dice.random() < 0.3:
                await asyncio.sleep(dice.uniform(0, 2))
