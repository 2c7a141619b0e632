"""How long single writes and reads of a mount take while a storage service is killed."""

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from emberfs.proto.ids import KiB, MiB
from integration.harness import LocalCluster

AFTER_S = 8.0  # the longest that is waited for the writes to go on
BLOCK = b"w" * 4 * KiB
FILES = 4
STOP_S = 60.0


class Waits(NamedTuple):
    """The longest call of each kind."""

    write_s: float
    read_s: float


class Caller:
    """A thread that calls again and again, and remembers the longest call."""

    def __init__(self, call: Callable[[int], object]) -> None:
        self.longest_s = 0.0
        self.began = 0.0  # of the call under way
        self.problem: OSError | None = None
        self._call = call
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        try:
            while not self._over.is_set():
                self.began = time.perf_counter()
                self._call(number)
                number += 1
                self.longest_s = max(self.longest_s, time.perf_counter() - self.began)
                time.sleep(0.002)
        except OSError as problem:
            self.problem = problem

    def stop(self) -> float:
        """The longest call; infinite if one failed or does not end."""
        self._over.set()
        self._thread.join(STOP_S)
        if self.problem is not None or self._thread.is_alive():
            print(f"  a call failed: {self.problem or 'it does not end'}")
            return math.inf
        return self.longest_s


def outage(cluster: LocalCluster, service: str, quiet: Path, calm_s: float) -> Waits:
    """Kill a service under writes to several chunks and reads of `quiet`, which nobody writes."""
    block = 4 * KiB
    fds = [
        os.open(cluster.mount / f"outage{n}", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        for n in range(FILES)
    ]
    read_fd, blocks = os.open(quiet, os.O_RDONLY | os.O_DIRECT), quiet.stat().st_size // block
    try:
        for fd in fds:  # more than what lies beside the inode
            os.pwrite(fd, BLOCK, MiB)
        callers = [Caller(lambda n: os.pread(read_fd, block, n * 37 % blocks * block))]
        callers += [Caller(lambda n, fd=fd: os.pwrite(fd, BLOCK, n % 256 * block)) for fd in fds]  # type: ignore[misc]
        time.sleep(min(calm_s, 1.0))
        cluster.kill(service)
        killed = time.perf_counter()
        # A call that began before the kill, or soon after, may still wait for the new chain.
        while time.perf_counter() < killed + AFTER_S:
            time.sleep(0.1)
            now = time.perf_counter()
            if now > killed + 1.0 and all(now - caller.began < 0.1 for caller in callers):
                break
        reading, *writing = [caller.stop() for caller in callers]
    finally:
        for fd in (*fds, read_fd):
            os.close(fd)
    return Waits(max(writing), reading)
