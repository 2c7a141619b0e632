"""A process that creates, renames, links and removes names until it is told to stop.

Every operation is checked against a model in memory. An acknowledged one must be there afterwards;
one that was applied twice shows as EEXIST or ENOENT where the model has it otherwise.

usage: names.py DIRECTORY PROGRESS [SEED]
PROGRESS gets "rounds longest_s"; SIGTERM ends it, exit 0 if all is well.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

NAMES_MAX = 60


class Names:
    """A tree of two directories with files, and what it must look like."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._choose = random.Random(seed)
        self._model: dict[str, str] = {}  # name -> its file's first name
        self._made = 0
        for side in ("a", "b"):
            (root / side).mkdir(parents=True)

    def _fresh(self) -> str:
        self._made += 1
        return f"{self._choose.choice('ab')}/{self._made}"

    def _some(self) -> str:
        return self._choose.choice(list(self._model))

    def step(self) -> None:
        """One operation, chosen at random."""
        if len(self._model) < 5:
            return self._create()
        kinds = [self._rename, self._replace, self._link, self._unlink, self._directory]
        if len(self._model) < NAMES_MAX:
            kinds += [self._create] * 3
        return self._choose.choice(kinds)()

    def _create(self) -> None:
        name = self._fresh()
        fd = os.open(self._root / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, name.encode())
        os.close(fd)
        self._model[name] = name

    def _rename(self) -> None:
        old, new = self._some(), self._fresh()
        os.rename(self._root / old, self._root / new)
        self._model[new] = self._model.pop(old)

    def _replace(self) -> None:
        old, new = self._some(), self._some()
        os.rename(self._root / old, self._root / new)
        if self._model[old] != self._model[new]:  # names of one file: nothing happens (POSIX)
            self._model[new] = self._model.pop(old)

    def _link(self) -> None:
        old, new = self._some(), self._fresh()
        os.link(self._root / old, self._root / new)
        self._model[new] = self._model[old]

    def _unlink(self) -> None:
        name = self._some()
        os.unlink(self._root / name)
        del self._model[name]

    def _directory(self) -> None:
        name = self._fresh()
        os.mkdir(self._root / name)
        os.rmdir(self._root / name)

    def check(self) -> None:
        """Compare everything with the model."""
        found = {f"{side}/{name}" for side in "ab" for name in os.listdir(self._root / side)}
        assert found == set(self._model), f"names differ: {found ^ set(self._model)}"
        for name, first in self._model.items():
            assert (self._root / name).read_text() == first, f"{name} is another file"
        for name, first in self._model.items():
            links = list(self._model.values()).count(first)
            assert os.stat(self._root / name).st_nlink == links, f"{name}: links"


def churn(root: Path, progress: Path, seed: int) -> None:
    """Work until SIGTERM, then compare."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    names, rounds, longest_s = Names(root, seed), 0, 0.0
    while not stopping:
        began = time.monotonic()
        names.step()
        rounds += 1
        longest_s = max(longest_s, time.monotonic() - began)
        progress.write_text(f"{rounds} {longest_s}")
    names.check()


if __name__ == "__main__":
    churn(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 7)
