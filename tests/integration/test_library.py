"""The Python library on a real cluster, beside a mount of the same cluster."""

import asyncio
import os
import random

import pytest

from emberfs.client.blocking import Client
from emberfs.client.file import connect
from emberfs.runtime.real import RealEnv
from integration.harness import LocalCluster

DATA = random.Random(5).randbytes(3_300_000)


def env_of(transport: str) -> RealEnv:
    env = RealEnv()
    if transport == "tcp":
        env.host_key = "another-host"  # then no memory can be shared
    return env


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_async_files_and_the_mount_see_each_other(shared: LocalCluster, transport: str) -> None:
    async def story() -> None:
        plan = shared.plan
        async with connect(
            plan.mgmtd_address, cluster=plan.cluster, env=env_of(transport)
        ) as files:
            await files.mkdir(f"/{transport}")
            async with await files.open(f"/{transport}/a", "w") as file:
                await file.write(DATA)
                await file.fsync()
            region = files.allocate(len(DATA))
            async with await files.open(f"/{transport}/a", "r") as file:
                assert await file.pread(region.slice(0, len(DATA)), 0) == len(DATA)
                assert region.view[: len(DATA)] == DATA
                plain = bytearray(70_000)
                assert await file.pread(plain, 1_000_001) == len(plain)
                assert plain == DATA[1_000_001:1_070_001]
            peers = files.cluster.peers.choices()
            assert {choice.transport for choice in peers} == {transport}
            region.close()

    asyncio.run(story())
    path = shared.mount / transport / "a"
    assert path.read_bytes() == DATA
    path.write_bytes(DATA[::-1])

    async def again() -> None:
        plan = shared.plan
        async with connect(
            plan.mgmtd_address, cluster=plan.cluster, env=env_of(transport)
        ) as files:
            async with await files.open(f"/{transport}/a") as file:
                assert await file.read() == DATA[::-1]
            await files.rename(f"/{transport}/a", f"/{transport}/b")
            assert await files.listdir(f"/{transport}") == ["b"]
            with pytest.raises(FileNotFoundError):
                await files.stat(f"/{transport}/a")

    asyncio.run(again())
    assert os.listdir(shared.mount / transport) == ["b"]


def test_blocking_client(shared: LocalCluster) -> None:
    with Client(shared.plan.mgmtd_address, cluster=shared.plan.cluster) as client:
        with client.open("/blocking", "w") as file:
            file.write(DATA)
        with client.open("/blocking", "r") as file:
            assert file.read() == DATA
            assert file.stat().st_size == len(DATA)
        client.rename("/blocking", "/moved")
        assert "moved" in client.listdir("/")
        client.remove("/moved")
        with pytest.raises(FileNotFoundError):
            client.open("/moved")


def test_a_wrong_cluster_name_is_said(shared: LocalCluster) -> None:
    with pytest.raises(OSError, match="cluster"):
        Client(shared.plan.mgmtd_address, cluster="another")
