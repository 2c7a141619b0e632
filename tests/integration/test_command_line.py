"""The command `emberfs` and its services: start, repeat, stop, and every kind of bad input."""

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emberfs.client.control import Control
from emberfs.client.mountpoint import is_ours
from emberfs.deploy.plan import STORAGE_NODE_FIRST, Plan, write_plan
from emberfs.deploy.processes import resident_bytes
from emberfs.proto.cluster import RoutingSnapshot
from emberfs.proto.ids import NodeId
from integration.harness import BIN, LocalCluster, run, wait_until


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_up_twice_down_up_keeps_data(unstarted: LocalCluster) -> None:
    first = unstarted.up()
    assert "started mgmtd, meta, storage1, storage2, storage3" in first
    assert "Try next" in first
    (unstarted.mount / "kept").write_text("data")
    assert "running already" in unstarted.up()
    assert "unmounted" in unstarted.emberfs("down").stdout
    assert not is_ours(str(unstarted.mount))
    assert not (unstarted.mount / "kept").exists()
    unstarted.up()
    assert (unstarted.mount / "kept").read_text() == "data"
    unstarted.emberfs("down")
    unstarted.emberfs("clean-data")
    assert not unstarted.directory.exists()


def test_status_shows_nodes_chains_targets_and_transports(shared: LocalCluster) -> None:
    text = shared.status()
    assert text.count("serving") >= 9
    assert "shm:" in text
    assert "processes" in text


def test_bench_says_what_the_limit_is(shared: LocalCluster) -> None:
    said = " ".join(shared.emberfs("bench", "--seconds", "0.2").stdout.split())
    for stage in ("memory copy", "disk", "network", "write 1 MiB", "read 1024 KiB", "read 4 KiB"):
        assert stage in said
    assert "limit" in said.rsplit("│", 1)[-1]
    assert ".emberfs-bench" not in os.listdir(shared.mount)


def test_memory_of_all_processes(shared: LocalCluster) -> None:
    names = [*shared.plan.service_names(), "fuse"]
    assert sum(resident_bytes(shared.pid(name)) for name in names) < 600 << 20


def test_metrics_of_every_process(shared: LocalCluster) -> None:
    from urllib.request import urlopen

    for name in [*shared.plan.service_names(), "fuse"]:
        url = f"http://127.0.0.1:{shared.plan.metrics_port(name)}/metrics"
        with urlopen(url, timeout=5) as answer:
            assert b"emberfs_" in answer.read(), name


def test_doctor_finds_nothing_fatal(shared: LocalCluster) -> None:
    assert "/dev/fuse" in shared.emberfs("doctor").stdout


def test_a_port_in_use_is_named(unstarted: LocalCluster) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", unstarted.base_port))
        taken.listen()
        done = unstarted.emberfs(
            "up", "--mount", unstarted.mount, "--base-port", unstarted.base_port, check=False
        )
    assert f"port {unstarted.base_port}" in one_line(done)
    assert "--base-port" in done.stderr


def test_a_file_as_mount_point_is_refused(unstarted: LocalCluster) -> None:
    wrong = unstarted.root / "file"
    wrong.write_text("")
    port = unstarted.base_port
    done = unstarted.emberfs("up", "--mount", wrong, "--base-port", port, check=False)
    assert "file" in one_line(done)


def test_more_replicas_than_services_is_refused(unstarted: LocalCluster) -> None:
    done = unstarted.emberfs("up", "--replicas", 4, "--base-port", unstarted.base_port, check=False)
    assert "4 replicas" in one_line(done)


def test_no_cluster_here(unstarted: LocalCluster) -> None:
    assert "emberfs up" in one_line(unstarted.emberfs("status", check=False))


@pytest.mark.parametrize("command", ["mgmtd", "meta", "storage", "fuse"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cluster = ", "not valid TOML"),
        ('cluster = "x"\nclustr = "y"\n', 'did you mean "cluster"'),
        ("cluster = 5\n", "cluster"),
    ],
)
def test_bad_configuration(tmp_path: Path, command: str, text: str, says: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    done = run(BIN / f"emberfs-{command}", "--config", path, check=False, timeout_s=20)
    assert done.returncode == 2
    assert says in one_line(done)


def test_o4_an_unreachable_cluster_is_said_and_not_waited_for(tmp_path: Path) -> None:
    """Commands on an unreachable cluster say so and end."""
    mount = tmp_path / "m"
    mount.mkdir()
    path = tmp_path / "fuse.toml"
    path.write_text(f'cluster = "x"\nmgmtd = ["127.0.0.1:1"]\nmountpoint = "{mount}"\n')
    began = time.monotonic()
    done = run(BIN / "emberfs-fuse", "--config", path, check=False, timeout_s=40)
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr.strip().splitlines()[-1]
    assert time.monotonic() - began < 30


async def routing_of(cluster: LocalCluster) -> RoutingSnapshot:
    control = Control((cluster.plan.mgmtd_address,), cluster.plan.cluster)
    try:
        return await control.routing()
    finally:
        await control.close()


def test_o23_garbage_on_the_data_port_is_refused_and_harms_nobody(shared: LocalCluster) -> None:
    """Garbage on the data port is refused and harms nobody."""
    endpoints = asyncio.run(routing_of(shared)).nodes[NodeId(STORAGE_NODE_FIRST)].endpoints
    port = next(int(e.rsplit(":", 1)[1]) for e in endpoints if e.startswith("tcp://"))
    with socket.create_connection(("127.0.0.1", port), timeout=5) as wire:
        wire.sendall(os.urandom(4096))
        wire.settimeout(5)
        try:
            while wire.recv(4096):
                pass
        except ConnectionResetError:
            pass
    (shared.mount / "still-works").write_text("yes")
    assert (shared.mount / "still-works").read_text() == "yes"


@pytest.fixture
def small_disks(unstarted: LocalCluster) -> Iterator[list[Path]]:
    """Three little ext4 file systems on loop devices."""
    places = []
    try:
        for number in range(3):
            image = unstarted.root / f"disk{number}"
            with image.open("wb") as file:
                file.truncate(160 << 20)
            run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image)
            place = unstarted.root / f"d{number}"
            place.mkdir()
            done = run("mount", "-o", "loop", image, place, check=False)
            if done.returncode:
                pytest.skip(f"no loop devices here: {done.stderr.strip()}")
            places.append(place)
        yield places
    finally:
        if unstarted.directory.exists():
            unstarted.emberfs("down", "--force", check=False)
        for place in places:
            run("umount", "-l", place, check=False)


def test_s11_a_full_disk_says_so_and_keeps_old_data(
    unstarted: LocalCluster, small_disks: list[Path]
) -> None:
    """A really full disk is ENOSPC at the application; old data stays, and room helps."""
    plan = Plan(
        directory=str(unstarted.directory),
        mountpoint=str(unstarted.mount),
        base_port=unstarted.base_port,
        storage_directories=tuple(str(place / "data") for place in small_disks),
        targets_per_storage=1,
    )
    unstarted.directory.mkdir()
    write_plan(plan)
    unstarted.up()
    old = os.urandom(5 << 20)
    (unstarted.mount / "old").write_bytes(old)
    with pytest.raises(OSError, match="No space"):  # noqa: PT012
        for number in range(300):
            with (unstarted.mount / f"fill{number}").open("wb") as file:
                file.write(os.urandom(1 << 20))
                file.flush()
                os.fsync(file.fileno())
    assert (unstarted.mount / "old").read_bytes() == old
    for path in unstarted.mount.glob("fill*"):
        path.unlink()

    def room() -> bool:
        try:
            with (unstarted.mount / "again").open("wb") as file:
                file.write(old)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return False
        return True

    wait_until(room, 40, pause_s=1)
    assert (unstarted.mount / "again").read_bytes() == old


def test_o14_o7_a_corrupted_block_is_served_by_another_replica_and_repaired(
    fresh: LocalCluster,
) -> None:
    """A corrupted block on disk is served by another replica and repaired."""
    data = os.urandom(3 << 20)
    path = fresh.mount / "precious"
    path.write_bytes(data)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    damaged = flip_bytes(fresh.directory / "data" / "storage1", data)
    assert damaged
    for _ in range(12):
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb", buffering=0) as file:
            seen = b"".join(iter(lambda: file.read(1 << 20), b""))
        assert seen == data
    # Reads repair what they meet, at whatever replica they are. The rest the scrubber would find in
    # its next pass, if nobody asks for it.
    if fresh.emberfs("fsck", check=False).returncode:
        fresh.emberfs("fsck", "--repair", check=False)
    fresh.emberfs("fsck")


def flip_bytes(directory: Path, data: bytes) -> int:
    """Damage every stored copy of some block of `data` under a directory; returns how many."""
    needles = [data[at : at + 64] for at in range(0, len(data), 1 << 20)]
    found = 0
    for path in directory.rglob("*"):
        if not path.is_file() or path.stat().st_size < 4096:
            continue
        content = path.read_bytes()
        with path.open("r+b") as file:
            for needle in needles:
                at = content.find(needle)
                if at >= 0:
                    file.seek(at)
                    file.write(bytes(byte ^ 0xFF for byte in needle))
                    found += 1
    return found


def test_r10_a_busy_mount_is_not_torn_from_its_user(fresh: LocalCluster) -> None:
    """A mount in use is not torn from its user."""
    path = fresh.mount / "held"
    path.write_text("x")
    with path.open() as file:
        holder = subprocess.Popen(["sleep", "60"], stdin=file)
    try:
        assert "in use" in one_line(fresh.emberfs("down", check=False))
        assert path.read_text() == "x"
        assert "unmounted" in fresh.emberfs("down", "--force").stdout
    finally:
        holder.kill()
        holder.wait()
