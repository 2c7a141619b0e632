"""A process that writes, syncs and verifies one file until it is told to stop.

It is a process of its own: a test that starts servers while it holds an open file on the mount
would wait for the mount, because the child's exec closes the inherited file, and close flushes.

usage: writer.py FILE PROGRESS [SEED]
PROGRESS gets "rounds longest_s"; SIGTERM ends it, exit 0 if all is well.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

FILE_BYTES = 4 << 20
SYNC_EACH = 8


def write(path: str, progress: Path, seed: int) -> None:
    """Overwrite random ranges; the model in memory is the oracle."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    choose, model, rounds, longest_s = random.Random(seed), bytearray(FILE_BYTES), 0, 0.0
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, model, 0)
    while not stopping:
        began = time.monotonic()
        offset = choose.randrange(FILE_BYTES - 70_000)
        data = choose.randbytes(choose.choice([512, 4096, 65_536]))
        os.pwrite(fd, data, offset)
        model[offset : offset + len(data)] = data
        rounds += 1
        if rounds % SYNC_EACH == 0:
            os.fsync(fd)
        longest_s = max(longest_s, time.monotonic() - began)
        progress.write_text(f"{rounds} {longest_s}")
    os.fsync(fd)
    assert os.pread(fd, FILE_BYTES, 0) == model, "what is read through the open file differs"
    os.close(fd)
    assert Path(path).read_bytes() == model, "what is read after close differs"


class Writer:
    """The process, as a test holds it; `script` is this one or another of the same usage."""

    def __init__(
        self, path: Path, progress: Path, seed: int = 3, script: str | Path = __file__
    ) -> None:
        self._progress = progress
        progress.write_text("0 0")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(path), str(progress), str(seed)],
            stderr=subprocess.PIPE,
            text=True,
        )

    def _seen(self) -> list[str]:
        return self._progress.read_text().split() or ["0", "0"]

    @property
    def rounds(self) -> int:
        """How many writes have returned."""
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise AssertionError(f"the writer has ended: {self._process.stderr.read()[-3000:]}")
        return int(self._seen()[0])

    @property
    def longest_s(self) -> float:
        """The longest time of one write (with its fsync)."""
        return float(self._seen()[1])

    def finish(self) -> None:
        """Stop it; fail the test if it saw an error or wrong data."""
        self._process.terminate()
        _, errors = self._process.communicate(timeout=90)
        assert self._process.returncode == 0, errors

    def kill(self) -> None:
        """End it whatever its state."""
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3)
