"""LMCache's connector for 3FS as released, on a mount: DIRECTORY MOUNT_POINT.

Chunks of several sizes are put, found and got through its own adapter, by several of its threads.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector import CreateConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

SHAPE = (4, 2, 256, 8, 64)  # layers, keys and values, tokens, heads, size of a head
CHUNKS = 24


def key(number: int) -> CacheEngineKey:
    return CacheEngineKey("model", 1, 0, number, torch.bfloat16)


async def use(connector: Any, backend: LocalCPUBackend, place: Path) -> None:
    chunks, contents = {}, {}
    for number in range(CHUNKS):
        tokens = 256 if number % 3 else 31 + number  # the last chunk of a text is shorter
        shape = torch.Size((2, 4, tokens, 512))
        made = backend.allocate(shape, torch.bfloat16, MemoryFormat.KV_2LTD)
        assert made is not None
        made.tensor.copy_(torch.randn(shape))
        chunks[number], contents[number] = made, made.tensor.clone()
    assert not await connector.exists(key(0))
    assert await connector.get(key(0)) is None
    await asyncio.gather(*(connector.put(key(n), made) for n, made in chunks.items()))  # takes them
    names = [path.name for path in place.rglob("*") if path.is_file()]
    assert len(names) == CHUNKS, names
    assert not [name for name in names if "tmp" in name], "every file has its final name"
    for number in contents:
        assert await connector.exists(key(number))
    found = await asyncio.gather(*(connector.get(key(number)) for number in contents))
    for number, got in enumerate(found):
        assert got is not None, f"chunk {number} was not read"
        assert torch.equal(got.tensor, contents[number]), f"chunk {number} differs"
        got.ref_count_down()
    await connector.close()


def main() -> None:
    place, mount_point = Path(sys.argv[1]), sys.argv[2]
    config = LMCacheEngineConfig.from_defaults(
        remote_url=f"hf3fs://{place}",
        remote_serde="naive",
        local_cpu=False,
        max_local_cpu_size=0.5,
        extra_config={
            "hf3fs_mount_point": mount_point,
            "hf3fs_iov_size": 100 << 20,
            "hf3fs_ior_entries": 128,
            "save_chunk_meta": True,
        },
    )
    metadata = LMCacheMetadata("model", 1, 1, 0, 0, torch.bfloat16, SHAPE)
    backend = LocalCPUBackend(config, metadata, dst_device="cpu")
    loop = asyncio.new_event_loop()
    connector = CreateConnector(config.remote_url, loop, backend, config, metadata)
    loop.run_until_complete(use(connector, backend, place))
    loop.close()


main()
