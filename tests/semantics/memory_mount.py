"""A process that mounts the in-memory cluster: python -m semantics.memory_mount DIR [words].

Words: stock (pyfuse3's own asyncio adapter), plain (no uvloop), workers=N, writeback, log,
hasty (deadline 1 s), real (real meta and file library, see real_meta.py). Looking up a name that
begins with "hole" never ends.
"""

import asyncio
import logging
import signal
import sys

import uvloop

from emberfs.client import fuse, mountpoint
from emberfs.client.fuse_operations import CachePolicy, EmberOperations
from emberfs.client.metadata import Metadata
from emberfs.client.openfile import OpenFiles
from emberfs.runtime.real import RealEnv
from semantics.memory_cluster import MemoryFile, MemoryFiles, MemoryMetadata
from semantics.real_meta import RealMetaWorld


async def serve(place: str, words: list[str]) -> None:
    env = RealEnv()
    metadata, files = await real_parts() if "real" in words else memory_parts(env)
    timeout_ns = 1_000_000_000 if "hasty" in words else 60_000_000_000
    operations = EmberOperations(
        env, metadata, files,
        CachePolicy(request_timeout_ns=timeout_ns, writeback="writeback" in words,
                    acl="real" in words),
    )  # fmt: skip
    for word in words:
        if word.startswith("workers="):
            fuse.WORKERS_MIN = int(word.removeprefix("workers="))
    if "log" in words:
        log_writes()
    if "stock" in words:
        stock()
    mount = fuse.Mount(env, operations, mountpoint.prepare(place))
    config = fuse.FuseConfig(cluster="memory", mgmtd=(), mountpoint=place)
    await mount.start(fuse.mount_options(config), config.read_ahead_bytes)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    assert mount.session is not None
    mount.session.add_done_callback(lambda _: stopping.set())
    print("mounted", flush=True)
    await stopping.wait()
    await mount.stop()


def memory_parts(env: RealEnv) -> tuple[MemoryMetadata, MemoryFiles]:
    """Everything in dicts."""
    metadata = MemoryMetadata(env)
    metadata.calls = Nothing()
    metadata.hole = b"hole"
    files = MemoryFiles(metadata)
    files.writes = Nothing()
    return metadata, files


async def real_parts() -> tuple[Metadata, OpenFiles]:
    """The real meta and client on storage in dicts."""
    world = RealMetaWorld()
    await world.start()
    files = world.client()
    return files.metadata, files


def log_writes() -> None:
    """Tell on stderr what arrives."""
    real = MemoryFile.write

    async def write(self, offset, data, **how):
        logging.info("wrote %d at %d", len(data), offset)
        return await real(self, offset, data, **how)

    MemoryFile.write = write


class Nothing(list):
    """A record of calls that keeps none: benchmarks must not grow."""

    def append(self, _):
        return


def stock() -> None:
    """Use pyfuse3's own asyncio adapter, for comparison."""
    import pyfuse3.asyncio

    fuse.readable.enable = pyfuse3.asyncio.enable


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    (asyncio.run if "plain" in sys.argv else uvloop.run)(serve(sys.argv[1], sys.argv[2:]))
