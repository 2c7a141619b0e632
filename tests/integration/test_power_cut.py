"""A power cut of the whole cluster: what was fsynced is there, everything opens, fsck is clean.

Why it is sound. Every service has a disk of its own: a real ext4 with its journal on a loop device
whose backing file is served by power_shim.py. The loop driver passes block writes on as WRITE, and
cache flushes (also those of FUA writes) as FSYNC; each is logged with its time before the kernel
is told that it is done. So the log is the disk's view of the run, below RocksDB, the block files,
the page cache and the file system. A power cut at T may leave: all writes before the last flush
that the log has by T, and any subset of the rest, in any order, torn at sectors. Images for many
instants are made from one recording, all disks cut at the same T (CLOCK_MONOTONIC), half of
them amid the writes before a flush; the stores are told of another boot, as after a restart. An
fsync whose answer reached the application by T began and ended its flushes by T, so it must
be covered.

What it does not cover. Disks that lie about flushes; torn sectors; bit rot; other file systems
than ext4 in its default mode (data=ordered); a cut of some machines only; a write that the device
has and the log has not (there is none: it is logged first). Within one disk the subset is random,
not exhaustive.
"""

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from emberfs.client.blocking import Client
from emberfs.deploy.plan import Plan, write_plan
from integration.harness import LocalCluster, local_cluster
from integration.history_load import CHUNK_BYTES, CHUNKS, SLOT_BYTES, SLOTS, Job
from integration.loads import loading, make_shared_files
from integration.power import Recorder, image_at, mounted, recorded_disks, write_times
from sim.check_durable import check_durable
from sim.history import History
from sim.violation import report

CUTS = int(os.environ.get("POWER_CUTS", "3"))
SEED = int(os.environ.get("POWER_SEED", "1"))
LOAD_S = 6.0
DISKS = ("mgmtd", "meta", "storage1", "storage2", "storage3")

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(),
    reason="loop devices and mounts need root and /dev/loop-control",
)


@contextmanager
def cluster_on(places: dict[str, Path]) -> Iterator[LocalCluster]:
    """A cluster without a mount; DIRECTORY/data/NAME leads to its disk."""
    with local_cluster() as cluster:
        plan = Plan(
            directory=str(cluster.directory),
            mountpoint=str(cluster.mount),
            base_port=cluster.base_port,
            targets_per_storage=1,
        )
        write_plan(plan)
        for name, place in places.items():
            cluster.plan.path("data", name).symlink_to(place / "data")
        cluster.up("--no-mount")
        yield cluster


def record(cluster: LocalCluster) -> tuple[History, int, int]:
    """Load the cluster; returns the history and between which instants cuts make sense."""
    plan = cluster.plan
    make_shared_files(plan.mgmtd_address, plan.cluster, "h")
    jobs = [
        Job(
            number=number, seed=SEED, output=str(cluster.root / f"h{number}"),
            mgmtd=plan.mgmtd_address, cluster=plan.cluster, fsync_share=0.2, pause_s=0.01,
        )
        for number in (1, 2)
    ]  # fmt: skip
    with loading(jobs) as loads:
        began_ns = time.monotonic_ns()
        time.sleep(LOAD_S)
        ended_ns = time.monotonic_ns()
        return loads.finish(), began_ns, ended_ns


def read_all(cluster: LocalCluster, history: History) -> None:
    """Read every slot of every file of the history into it."""
    plan = cluster.plan
    names = sorted({op.key for op in history}, key=str)
    with Client(plan.mgmtd_address, cluster=plan.cluster) as client:
        for key in names:
            with client.open(f"/h/{key[1]}", "r") as file:
                for chunk in range(CHUNKS):
                    _read_chunk(file, history, key, chunk)


def _read_chunk(file: object, history: History, key: tuple[object, ...], chunk: int) -> None:
    for slot in range(SLOTS + 2):
        offset = chunk * CHUNK_BYTES + slot * SLOT_BYTES
        memory = bytearray(SLOT_BYTES)
        op = history.begin(9, "read", key, offset, SLOT_BYTES, time.monotonic_ns())  # type: ignore[arg-type]
        count = file.pread(memory, offset)  # type: ignore[attr-defined]
        history.end(op, time.monotonic_ns(), "ok", bytes(memory[:count]))


def cut(recorder: Recorder, history: History, cut_ns: int, seed: int) -> None:
    """Start from what a cut at that instant may leave, and compare."""
    choose, lost = random.Random(seed), {}
    root = recorder.log.parent.parent / f"cut{seed}"
    root.mkdir()
    with ExitStack() as stack:
        places = {}
        for number, name in enumerate(recorder.names):
            image, places[name] = root / f"{name}.img", root / name
            lost[name] = image_at(recorder.log, number, cut_ns, image, choose)
            stack.callback(image.unlink)
            stack.enter_context(mounted(image, places[name]))
            reboot(places[name])
        cluster = stack.enter_context(cluster_on(places))
        cluster.wait_serving()
        # What was flushed later was so in a life without this cut.
        seen = History(
            op
            for op in history
            if op.start_ns <= cut_ns and (op.kind != "flush" or (op.end_ns or 0) <= cut_ns)
        )
        before = len(seen)
        read_all(cluster, seen)
        # Each process flushes what it wrote itself: the other's fsync promises nothing for it.
        found = check_durable(seen, cut_ns, any_client=False)
        print(f"cut {seed}: writes lost {lost}, {before} operations before, {len(found)} bad")
        assert not found, report(found)
        assert "clean:" in cluster.fsck()


def reboot(data: Path) -> None:
    """Make the stores of a disk remember another boot: the machine of a test cannot restart."""
    now = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for path in data.rglob("format"):
        path.write_text(path.read_text().replace(now, "the boot before the power cut"))


@needs_root
def test_r12_s1_o6_power_cut_keeps_what_was_fsynced(tmp_path: Path) -> None:
    """After a power cut at any instant all that was fsynced is there and every store opens."""
    with recorded_disks(tmp_path, DISKS) as recorder:
        for name in DISKS:
            (recorder.mounts[name] / "data").mkdir()
        os.sync()
        with cluster_on(recorder.mounts) as cluster:
            history, began_ns, ended_ns = record(cluster)
        flushes = [op for op in history if op.kind == "flush" and op.ok]
        assert len(flushes) > 10, "hardly anything was fsynced"
        choose = random.Random(SEED)
        busy_ns = [
            time_ns for time_ns in write_times(recorder.log) if began_ns < time_ns < ended_ns
        ]
        for number in range(CUTS):
            at_ns = choose.choice(busy_ns) if number % 2 else choose.randrange(began_ns, ended_ns)
            cut(recorder, history, at_ns, SEED * 1000 + number)
