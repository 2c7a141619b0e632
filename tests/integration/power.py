"""Disks of their own for every service, and what a power cut may leave on them.

Each disk is ext4 on a loop device over a file of power_shim.py, which records all block writes and
flushes. `image_at` makes what a disk may hold after a cut at an instant: all writes before the
last flush that was complete by then, and of the later ones any subset, each of them possibly torn
between two sectors.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from integration import power_shim
from integration.harness import run, wait_until
from integration.power_shim import FLUSH, WRITE, Record, read_log

DISK_BYTES = 768 << 20
SECTOR_BYTES = 512


class Recorder:
    """Mounted disks whose writes are recorded."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.names = list(names)
        self.log = root / "disks" / "log"
        self.mounts = {name: root / "power" / name for name in names}


@contextmanager
def recorded_disks(root: Path, names: Sequence[str]) -> Iterator[Recorder]:
    """Make and mount the disks; everything is undone at the end."""
    recorder = Recorder(root, names)
    shim, disks = root / "shim", root / "disks"
    shim.mkdir()
    disks.mkdir()
    with ExitStack() as stack:
        process = subprocess.Popen(
            [
                sys.executable, power_shim.__file__, str(shim), str(disks),
                *(f"{name}={DISK_BYTES}" for name in names),
            ]
        )  # fmt: skip
        stack.callback(_end, process, shim)
        wait_until(lambda: os.path.ismount(shim), 10)
        for name in names:
            stack.enter_context(mounted(shim / name, recorder.mounts[name], make=True))
        yield recorder


def _end(process: "subprocess.Popen[bytes]", shim: Path) -> None:
    subprocess.run(["umount", "-l", str(shim)], check=False)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def mounted(image: Path, place: Path, *, make: bool = False) -> Iterator[None]:
    """Mount an image over a loop device; also writes a file system on it with `make`."""
    place.mkdir(parents=True, exist_ok=True)
    device = run("losetup", "--find", "--show", image).stdout.strip()
    try:
        if make:
            lazy = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
            run("mkfs.ext4", "-q", "-J", "size=8", "-E", lazy, device)
        run("mount", "-o", "noatime", device, place)
        try:
            yield
        finally:
            for _ in range(100):
                done = subprocess.run(["umount", str(place)], check=False, capture_output=True)
                if done.returncode == 0:
                    break
                time.sleep(0.1)
            else:
                subprocess.run(["umount", "-l", str(place)], check=False)
    finally:
        subprocess.run(["losetup", "--detach", device], check=False)


def write_times(log: Path) -> list[int]:
    """Return when each write of any disk was recorded (CLOCK_MONOTONIC, ns)."""
    return [record.time_ns for record in read_log(log) if record.kind == WRITE]


def image_at(log: Path, disk: int, cut_ns: int, path: Path, choose: random.Random) -> int:
    """Write what a disk may hold after a power cut; returns how many writes it has lost."""
    waiting: list[Record] = []
    lost = 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(fd, DISK_BYTES)
        for record in read_log(log):
            if record.time_ns > cut_ns:
                break
            if record.disk != disk:
                continue
            if record.kind == WRITE:
                waiting.append(record)
            elif record.kind == FLUSH:
                for one in waiting:
                    os.pwrite(fd, one.data, one.offset)
                waiting.clear()
        keep = choose.choice([0.0, 0.5, 0.9])  # a cache that writes nothing back, some, most
        for one in choose.sample(waiting, len(waiting)):
            if choose.random() >= keep:
                lost += 1
                continue
            sectors = len(one.data) // SECTOR_BYTES
            whole = sectors if choose.random() < 0.8 else choose.randrange(sectors + 1)
            os.pwrite(fd, one.data[: whole * SECTOR_BYTES], one.offset)
    finally:
        os.close(fd)
    return lost
