"""Drops what the kernel has cached of a mount (fuse_lowlevel_notify_inval_* of libfuse)."""

import errno
from collections.abc import Collection

import pyfuse3

from emberfs.client.handles import KnownInodes
from emberfs.client.kernelcache import KernelCache
from emberfs.proto.ids import MS, InodeId
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

LOOK_NS = 100 * MS
AT_ONCE = 500  # inodes between two looks at other work


class FuseKernel:
    """See kernelcache.Kernel."""

    def __init__(self, env: Env, known: KnownInodes) -> None:
        self._env = env
        self._known = known
        self._tasks = TaskSet()

    def start(self, cache: KernelCache) -> None:
        """Begin what is to be done from time to time."""
        self._tasks.spawn(self._look_again(cache), name="fuse cache")

    async def close(self) -> None:
        """End it."""
        await self._tasks.close()

    def drop_attributes(self, inode: int) -> bool:
        """Takes no lock, so it may be called from a handler."""
        self._known.of(inode).no_capability = False
        return drop_attributes(inode)

    def drop_all_attributes(self, inodes: Collection[int]) -> None:
        """In pieces, so that requests are answered meanwhile."""
        self._tasks.spawn(self._drop(list(inodes)), name="fuse cache drop")

    async def _drop(self, inodes: list[int]) -> None:
        for at, inode in enumerate(inodes):
            if inode in self._known.held():
                self.drop_attributes(inode)
            if at % AT_ONCE == AT_ONCE - 1:
                await self._env.sleep_ns(0)

    async def _look_again(self, cache: KernelCache) -> None:
        while True:
            await self._env.sleep_ns(LOOK_NS)
            cache.look_again()

    def drop_name(self, directory: int, name: bytes) -> None:
        """In another thread: the kernel waits for what is under way in the directory."""
        pyfuse3.invalidate_entry_async(directory, name, ignore_enoent=True)

    async def drop_contents(self, inodes: Collection[InodeId]) -> None:
        """Drop pages and attributes of files that were written past the kernel.

        In another thread: the kernel waits for pages that are being read, by us.
        """

        def drop() -> None:
            for inode in inodes:
                _invalidate(inode, attr_only=False)

        await self._env.run_blocking(drop)

    def held(self) -> Collection[int]:
        """Inodes with lookups that were not forgotten."""
        return self._known.held()


def drop_attributes(inode: int) -> bool:
    """Let the kernel ask anew; False if it does not have the inode. Takes no lock."""
    return _invalidate(inode, attr_only=True)


def _invalidate(inode: int, *, attr_only: bool) -> bool:
    try:
        pyfuse3.invalidate_inode(inode, attr_only=attr_only)
    except OSError as problem:
        if problem.errno != errno.ENOENT:
            raise
        return False
    return True
