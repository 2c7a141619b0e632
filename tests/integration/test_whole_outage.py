"""Every service is gone, the mount is not."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from integration.harness import LocalCluster

STORAGES = ("storage1", "storage2", "storage3")
# A process of its own: whoever starts a service must not pass on descriptors of the mount, whose
# closing waits for that service.
WRITER = """
import errno, mmap, os, sys

def is_told(fd):
    try:
        os.fsync(fd)
    except OSError as problem:
        if problem.errno != errno.EIO:
            raise
        return True
    return False

data, flags = mmap.mmap(-1, 1 << 20), os.O_RDWR | os.O_CREAT | os.O_DIRECT
one, two = os.open(sys.argv[1], flags), os.open(sys.argv[1], flags)
os.pwrite(one, data, 0)
os.fsync(one)
data[:] = b"n" * len(data)
os.pwrite(one, data, 0)  # every replica has it, in memory
print("written", flush=True)
sys.stdin.readline()
print([is_told(fd) for fd in (one, one, two, two)])
os.pwrite(two, data, 0)
os.fsync(two)
os.close(one)
os.close(two)
"""


def test_r7_up_does_not_wait_for_the_mount_that_waits_for_it(fresh: LocalCluster) -> None:
    """With every service dead and the mount alive, `up` starts them at once."""
    for name in fresh.plan.service_names():
        fresh.kill(name)
    time.sleep(1.5)  # the kernel has forgotten the attributes of the mount point
    began = time.monotonic()
    fresh.up()
    took_s = time.monotonic() - began
    fresh.wait_serving()
    assert "clean:" in fresh.fsck()
    assert took_s < 40  # it stood still for the 60 s of the mount's request deadline


@pytest.mark.parametrize("power", [True, False])
def test_r12_fsync_after_all_storage_was_away(fresh: LocalCluster, power: bool) -> None:
    """It fails once per descriptor if the machines were off in between, else not at all."""
    path = fresh.mount / "f"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        for name in STORAGES:
            fresh.kill(name)
        if power:
            for name in STORAGES:
                _forget_boot(Path(fresh.plan.path("data", name)))
        for name in STORAGES:
            fresh.start(name)
        told, _ = writer.communicate("go on\n", timeout=90)
    assert told == f"[{power}, False, {power}, False]\n"
    fresh.wait_serving()
    assert path.read_bytes() == b"n" * (1 << 20)
    assert "clean:" in fresh.fsck()


def _forget_boot(data: Path) -> None:
    """Let a stopped service find that its machine has started anew since it ran."""
    now = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = list(data.rglob("format"))
    assert found
    for path in found:
        path.write_text(path.read_text().replace(now, "the boot before"))
