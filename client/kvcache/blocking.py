"""The KV cache for programs without an event loop; any number of threads may share one.

with BlockingKVCache("127.0.0.1:9000", "/kv", cluster="demo", namespace=("llama", 0),
                     byte_cap=64 << 30) as cache:
    lengths = cache.get_many(keys, buffers)
"""

from collections.abc import Sequence
from typing import Self

from emberfs.client.blocking import LoopThread
from emberfs.client.file import FileSystem, Memory, connect
from emberfs.client.kvcache.cache import (
    BLOCK_BYTES_MAX,
    DEADLINE_NS,
    REFRESH_NS,
    SNAPSHOT_EVERY_BYTES,
    KVCache,
)
from emberfs.fabric.region import Region
from emberfs.proto.ids import SECOND
from emberfs.proto.meta_calls import Caller


class BlockingKVCache:
    """See kvcache.cache.KVCache; it has a connection and an event loop of its own."""

    def __init__(
        self,
        mgmtd: str | Sequence[str],
        directory: str,
        *,
        cluster: str,
        namespace: tuple[str, int] | str,
        byte_cap: int,
        segment_bytes: int | None = None,
        block_bytes_max: int = BLOCK_BYTES_MAX,
        deadline_ns: int = DEADLINE_NS,
        refresh_ns: int = REFRESH_NS,
        snapshot_every_bytes: int = SNAPSHOT_EVERY_BYTES,
        caller: Caller | None = None,
        timeout_ns: int = 10 * SECOND,
    ) -> None:
        """Connect to a cluster by the "ip:port" of its management service, open a namespace."""
        self._thread = LoopThread()
        self._run = self._thread.run
        self._connection = connect(mgmtd, cluster=cluster, caller=caller, timeout_ns=timeout_ns)

        async def begin() -> tuple[FileSystem, KVCache]:
            fs = await self._connection.__aenter__()
            try:
                cache = await KVCache.open(
                    fs,
                    directory,
                    namespace=namespace,
                    byte_cap=byte_cap,
                    segment_bytes=segment_bytes,
                    block_bytes_max=block_bytes_max,
                    deadline_ns=deadline_ns,
                    refresh_ns=refresh_ns,
                    snapshot_every_bytes=snapshot_every_bytes,
                )
            except BaseException:
                await self._connection.__aexit__(None, None, None)
                raise
            return fs, cache

        try:
            self._fs, self._cache = self._run(begin())
        except BaseException:
            self._thread.close()
            raise

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __len__(self) -> int:
        """How many blocks this process knows of."""
        return len(self._cache)

    def close(self) -> None:
        """End the log of this process and disconnect."""
        try:
            self._run(self._leave())
        finally:
            self._thread.close()

    async def _leave(self) -> None:
        try:
            await self._cache.close()
        finally:
            await self._connection.__aexit__(None, None, None)

    def allocate(self, size_bytes: int) -> Region:
        """Shared memory for buffers; any other memory serves as well."""
        return self._fs.allocate(size_bytes)

    def get_many(
        self, keys: Sequence[bytes], buffers: Sequence[Memory], *, deadline_ns: int | None = None
    ) -> list[int]:
        """Read blocks into the caller's buffers; returns the length of each, 0 for a miss."""
        return self._run(self._cache.get_many(keys, buffers, deadline_ns=deadline_ns))

    def put_many(
        self, keys: Sequence[bytes], buffers: Sequence[Memory], *, deadline_ns: int | None = None
    ) -> list[bool]:
        """Store blocks; True for each that is published."""
        return self._run(self._cache.put_many(keys, buffers, deadline_ns=deadline_ns))

    def exists_many(self, keys: Sequence[bytes], *, deadline_ns: int | None = None) -> list[bool]:
        """Tell which blocks can be found."""
        return self._run(self._cache.exists_many(keys, deadline_ns=deadline_ns))

    def remove_many(self, keys: Sequence[bytes], *, deadline_ns: int | None = None) -> list[bool]:
        """Remove blocks; True for each that was there and is gone."""
        return self._run(self._cache.remove_many(keys, deadline_ns=deadline_ns))
