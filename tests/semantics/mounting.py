"""Mounts of the in-memory cluster for tests, in a process of their own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent

needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK) or shutil.which("fusermount3") is None,
    reason="needs /dev/fuse and fusermount3",
)


class Daemon:
    """A running memory_mount."""

    def __init__(self, place: Path, *words: str) -> None:
        place.mkdir(exist_ok=True) if not os.path.ismount(place) else None
        self.place = place
        self.process = subprocess.Popen(
            [sys.executable, "-m", "semantics.memory_mount", str(place), *words],
            cwd=TESTS,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "mounted\n":
            raise AssertionError(self.finish())

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end."""
        return self.process.wait(timeout=10)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(timeout=10)

    def finish(self) -> str:
        """End it, whatever it does, and return what it logged."""
        if self.process.poll() is None:
            self.process.kill()
        _, said = self.process.communicate(timeout=10)
        subprocess.run(["umount", "-l", str(self.place)], capture_output=True, check=False)
        return said


@contextlib.contextmanager
def mounted(place: Path, *words: str) -> Iterator[Daemon]:
    """A mount for the time of a block."""
    daemon = Daemon(place, *words)
    try:
        yield daemon
    finally:
        daemon.finish()
