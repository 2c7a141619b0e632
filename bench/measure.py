"""What every benchmark measures with: CPU of the processes, loops that say what the limit is.

Import it before anything of `integration`: it makes the cluster harness of the tests importable.
"""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from emberfs.fabric.region import Region
from emberfs.proto.ids import KiB, MiB
from integration.harness import LocalCluster

FILE_BYTES = 64 * MiB
WRITE_BYTES = 256 * MiB
SECONDS = 2.0
IDLE_LOOK_S, IDLE_CORES = 0.5, 0.15  # heartbeats of many processes are below it
IDLE_WAIT_S = 15.0
SECTOR_BYTES = 512  # of /sys/dev/block/*/stat, whatever the disk has
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Pace(NamedTuple):
    """So many operations in so long."""

    count: int
    took_s: float

    @property
    def per_s(self) -> float:
        """Operations per second."""
        return self.count / self.took_s


def report(what: str, figure: float, unit: str, limit: float, said: str) -> None:
    figures = f"{figure:10.0f} {unit:6} limit {limit:10.0f}  ratio {figure / limit:5.2f}"
    print(f"{what:44} {figures}  ({said})", flush=True)


def random_offsets(block: int, file_bytes: int = FILE_BYTES) -> list[int]:
    """Every block of a file once, in an order that is always the same."""
    offsets = list(range(0, file_bytes, block))
    random.Random(1).shuffle(offsets)
    return offsets


# ---------------------------------------------------------------- CPU


class Cpu:
    """CPU seconds, user and system, that groups of processes have used since it was made.

    `app` is this process with all that it has started itself, fio for one.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        plan = cluster.plan
        services = {
            "daemon": ["fuse"],
            "storage": plan.storage_names(),
            "meta": plan.meta_names(),
            "mgmtd": ["mgmtd"],
        }
        self._pids = {
            group: [cluster.pid(name) for name in names] for group, names in services.items()
        }
        self._before = self.now()

    def now(self) -> dict[str, float]:
        """By group, since the processes began."""
        found = {"app": self._app_s()}
        for group, pids in self._pids.items():
            found[group] = sum(sum(_stat_s(pid)[:2]) for pid in pids)
        return found

    def _app_s(self) -> float:
        ours = {pid for pids in self._pids.values() for pid in pids}
        return sum(sum(_stat_s(pid)) for pid in _tree(os.getpid()) if pid not in ours)

    def spent(self) -> dict[str, float]:
        """By group, since this was made."""
        return {group: used - self._before[group] for group, used in self.now().items()}


def wait_idle(cluster: LocalCluster, at_most_s: float = IDLE_WAIT_S) -> None:
    """Until the services do next to nothing: scrubbing and compaction follow what was written."""
    end = time.perf_counter() + at_most_s
    while time.perf_counter() < end:
        cpu = Cpu(cluster)
        time.sleep(IDLE_LOOK_S)
        spent = cpu.spent()
        if sum(spent.values()) - spent["app"] < IDLE_CORES * IDLE_LOOK_S:
            return


def _stat_s(pid: int) -> list[float]:
    """User, system, and the same of children that were waited for. Zeros if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return [0.0] * 4
    return [int(field) / _TICKS_PER_S for field in fields[11:15]]


def _tree(pid: int) -> list[int]:
    """A process and what descends from it, as far as the kernel tells."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has just ended
            continue
        for child in children:
            found += _tree(int(child))
    return found


def memory_mib(cluster: LocalCluster) -> dict[str, int]:
    """Resident memory of every process."""
    found = {}
    for name in [*cluster.plan.service_names(), "fuse"]:
        text = Path(f"/proc/{cluster.pid(name)}/status").read_text()
        found[name] = int(text.partition("VmRSS:")[2].split()[0]) // 1024
    return found


class Written(NamedTuple):
    """Bytes written so far."""

    handed: int  # by the storage services to their kernel (a little of it to sockets)
    device: int | None  # to the block device below a directory, by everybody; None: not known


def written(cluster: LocalCluster) -> Written:
    """What was written until now, after telling the kernel to write back what is left.

    Not /proc/PID/io's write_bytes: a kernel with large folios counts a whole folio, 512 KiB for
    one, for every 4 KiB in it.
    """
    subprocess.run(["sync", "-f", cluster.directory], check=True, timeout=120)
    handed = 0
    for name in cluster.plan.storage_names():
        text = Path(f"/proc/{cluster.pid(name)}/io").read_text()
        handed += int(text.partition("wchar: ")[2].split()[0])
    number = os.stat(cluster.directory).st_dev
    stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    device = int(stat.read_text().split()[6]) * SECTOR_BYTES if stat.exists() else None
    return Written(handed, device)


# ---------------------------------------------------------------- limits


def preadv_limit(
    path: Path, block: int, seconds: float = SECONDS, file_bytes: int = FILE_BYTES
) -> float:
    """Blocks per second of a plain preadv loop over the same cached bytes."""
    fd = os.open(path, os.O_RDONLY)
    offsets = random_offsets(block, file_bytes)[:256]
    for at in range(0, file_bytes, MiB):
        os.pread(fd, MiB, at)
    region = Region(block)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for offset in offsets:
            os.preadv(fd, [region.view[:block]], offset)
        count += len(offsets)
    took_s = time.perf_counter() - began
    os.close(fd)
    region.close()
    return count / took_s


def socket_limit(path: Path, seconds: float = SECONDS) -> float:
    """MiB per second of a bare sendfile-to-recv_into loop over loopback TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = os.fork()
        if sender == 0:
            _send_for_ever(path, listener.getsockname()[1])
        wire, _ = listener.accept()
    region, received, began = Region(MiB), 0, time.perf_counter()
    with wire:
        while time.perf_counter() - began < seconds:
            received += wire.recv_into(region.view)
        took_s = time.perf_counter() - began
    os.waitpid(sender, 0)
    region.close()
    return received / MiB / took_s


def _send_for_ever(path: Path, port: int) -> NoReturn:
    try:
        with socket.create_connection(("127.0.0.1", port)) as wire, path.open("rb") as file:
            while True:
                sent = 0
                while sent < MiB:
                    sent += os.sendfile(wire.fileno(), file.fileno(), sent, MiB - sent)
    except OSError:  # nobody listens any more
        pass
    finally:
        os._exit(0)


def write_limit(directory: Path, write_bytes: int = WRITE_BYTES) -> float:
    """Logical MiB per second when every byte is written three times and synced at the end."""
    data = os.urandom(MiB)
    began = time.perf_counter()
    fd = os.open(directory / "raw", os.O_WRONLY | os.O_CREAT)
    for _ in range(3 * write_bytes // MiB):
        os.write(fd, data)
    os.fsync(fd)
    os.close(fd)
    took_s = time.perf_counter() - began
    (directory / "raw").unlink()
    return write_bytes / MiB / took_s


def repeated(seconds: float, once: Callable[[], int]) -> Pace:
    """Do it at least once, and again until the time is over; `once` returns how many it did."""
    began, count = time.perf_counter(), once()
    while time.perf_counter() - began < seconds:
        count += once()
    return Pace(count, time.perf_counter() - began)


def lay_out(path: Path, size_bytes: int) -> None:
    """A durable file of which no two MiB are equal."""
    block = os.urandom(MiB)
    with path.open("wb") as file:
        for number in range(0, size_bytes, MiB):
            file.write((number.to_bytes(8, "little") + block[8:])[: size_bytes - number])
        os.fsync(file.fileno())


def named(block: int) -> str:
    """4096 is "4 KiB"."""
    return f"{block // MiB} MiB" if block >= MiB else f"{block // KiB} KiB"
