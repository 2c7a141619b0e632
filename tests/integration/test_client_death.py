"""A client dies with SIGKILL: what it was told is written stays readable for others."""

import os
import subprocess
import sys
import time

from emberfs.client.blocking import Client
from integration.harness import LocalCluster, wait_until

EXPIRY_S = 60.0  # lease 5 s, grace 30 s, and the sweeper's own period

DIRECT_WRITER = """
import asyncio, os, sys
from emberfs.client.file import connect
async def main():
    async with connect(sys.argv[1], cluster=sys.argv[2]) as system:
        file = await system.open("/f", "x", direct=True)
        await file.write(b"1234" * 1024)
        await file.close()
        file = await system.open("/f", "r+", direct=True)
        await file.pwrite(b"abcd" * 4096, 3 << 20)
        os.kill(os.getpid(), 9)
asyncio.run(main())
"""


def test_o2_c9_direct_writes_behind_the_old_end_outlive_their_client(fresh: LocalCluster) -> None:
    """When a client dies after a direct write that extended a file, the file has the new length."""
    plan = fresh.plan
    done = subprocess.run(
        [sys.executable, "-c", DIRECT_WRITER, plan.mgmtd_address, plan.cluster],
        check=False,
        timeout=30,
    )
    assert done.returncode == -9
    length = (3 << 20) + 16384
    wait_until(lambda: os.stat(fresh.mount / "f").st_size == length, EXPIRY_S, pause_s=0.5)
    with Client(plan.mgmtd_address, cluster=plan.cluster) as client, client.open("/f") as file:
        memory = bytearray(16384)
        assert file.pread(memory, 3 << 20) == len(memory)
        assert bytes(memory) == b"abcd" * 4096
    assert "clean:" in fresh.fsck()


GONE_S = 12.0  # the lease of 5 s has run out, and routing says so; the grace of 30 s has not


def test_a_file_that_grows_keeps_what_a_dead_client_was_told_is_written(
    fresh: LocalCluster,
) -> None:
    """It is part of the file before the end of its session tells; all else are zeros."""
    plan = fresh.plan
    done = subprocess.run(
        [sys.executable, "-c", DIRECT_WRITER, plan.mgmtd_address, plan.cluster],
        check=False,
        timeout=30,
    )
    assert done.returncode == -9
    path = fresh.mount / "f"
    assert os.stat(path).st_size == 4096
    time.sleep(GONE_S)
    os.truncate(path, 4 << 20)
    content = path.read_bytes()
    written = {0: b"1234" * 1024, 3 << 20: b"abcd" * 4096}
    expected = bytearray(4 << 20)
    for offset, data in written.items():
        expected[offset : offset + len(data)] = data
    assert content == expected
