"""The FUSE daemon: mounts the cluster, serves the kernel until it is told to stop, unmounts."""

# isort: off
from emberfs.client.fuse_statfs import asked_inode  # before pyfuse3: see there

# isort: on
import asyncio
import logging
import os
import signal

import msgspec
import pyfuse3

from emberfs.client import mountpoint, readable
from emberfs.client.cluster import Cluster
from emberfs.client.fuse_metrics import FuseMetrics
from emberfs.client.fuse_operations import CachePolicy, EmberOperations
from emberfs.client.kernelcache import KernelCache
from emberfs.client.metadata import Metadata
from emberfs.client.native.performer import Performer
from emberfs.client.native.service import RingService, socket_directory
from emberfs.client.openfile import OpenFiles
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, MiB
from emberfs.runtime.env import Env
from emberfs.runtime.service import run_service
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.client.fuse")

WORKERS_MIN = 8  # workers that stay parked; fewer means starting tasks all the time
WORKERS_MAX = 256  # requests in progress at once; each holds a buffer of 1 MiB once it was used
ANSWER_TIMEOUT_S = 10.0
# Together with unmounting these bound a stop to 20 s, what the CLI and systemd units wait for.
FLUSH_TIMEOUT_S = 8.0
END_TIMEOUT_S = 1.0
PART_TIMEOUT_S = 5.0


class FuseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a mount."""

    cluster: str
    mgmtd: tuple[str, ...]  # "10.0.0.1:9000"
    mountpoint: str
    attr_timeout_s: float = 1.0  # how long the kernel believes attributes ...
    entry_timeout_s: float = 1.0  # ... and names that exist
    announced_timeout_s: float = 60.0  # both, and missing names, while changes are announced
    request_timeout_s: float = 60.0  # then the application gets ETIMEDOUT
    connect_timeout_s: float = 10.0
    read_ahead_bytes: int = 8 * MiB  # of the kernel, per open file
    durable_close: bool = True  # close makes written data safe from a power cut, as fsync does
    writeback: bool = False  # the kernel gathers small writes; other clients see them later
    allow_other: bool = True  # other users may enter the mount; only where root mounts
    acl: bool = True  # POSIX ACLs; only where root mounts
    rings: str = "auto"  # the socket of the native API; "" for none; auto: see native/service.py
    metrics_port: int = 0
    log_level: str = "INFO"


class Mount:
    """A mounted session: pyfuse3's workers on the running event loop."""

    def __init__(self, env: Env, operations: EmberOperations, place: str) -> None:
        self._env = env
        self._operations = operations
        self._place = place
        self._tasks = TaskSet()
        self.session: asyncio.Task[None] | None = None

    async def start(self, options: set[str], read_ahead_bytes: int) -> None:
        """Mount and wait until the mount answers. Raises EmberfsError."""
        place = self._place
        if self._operations.enable_acl:
            device = await self._env.run_blocking(lambda: mountpoint.mount_with_acl(place, options))
            place = f"/dev/fd/{device}"  # libfuse takes it as mounted already
        try:
            pyfuse3.init(self._operations, place, options)
        except RuntimeError as problem:
            raise EmberfsError(
                Code.CONFIG, f"{self._place}: mounting failed ({problem}); see the line above"
            ) from None
        readable.enable()
        self.session = self._tasks.spawn(
            pyfuse3.main(min_tasks=WORKERS_MIN, max_tasks=WORKERS_MAX), name="fuse session"
        )
        self._tasks.spawn(self._operations.requests.sweep(), name="fuse deadlines")
        self._operations.kernel.start(self._operations.cache)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._env.run_blocking(lambda: os.statvfs(self._place))
        except (TimeoutError, OSError) as problem:
            raise EmberfsError(
                Code.TIMEOUT, f"{self._place}: mounted, but it does not answer: {problem}"
            ) from None
        await self._env.run_blocking(lambda: mountpoint.tune(self._place, read_ahead_bytes))

    async def stop(self) -> None:
        """Unmount (detach if it is busy), let running requests finish for a moment, end.

        Ends within a bounded time even if the servers are gone.
        """
        if self.session is None:
            return
        gone = await self._env.run_blocking(self._unmount)
        if not self.session.done():
            pyfuse3.terminate()
            await asyncio.wait({self.session}, timeout=END_TIMEOUT_S)
        await self._tasks.close()
        await self._operations.kernel.close()
        if not gone and self._operations.enable_acl:  # libfuse detaches only what it has mounted
            await self._env.run_blocking(lambda: mountpoint.unmount(self._place, lazy=True))
        # Closing the descriptor answers what still waits in the kernel with ECONNABORTED; a busy
        # mount is detached.
        pyfuse3.close(unmount=not gone)
        self.session = None

    def _unmount(self) -> bool:
        if mountpoint.unmount(self._place):
            return True
        mountpoint.write_back(self._place)
        return False


class FuseService:
    """The process: cluster connection, mount, metrics."""

    def __init__(self, config: FuseConfig, env: Env) -> None:
        self._config = config
        self._env = env
        self._metrics = FuseMetrics()
        self._cluster: Cluster | None = None
        self._mount: Mount | None = None
        self._rings: RingService | None = None

    async def start(self) -> None:
        """Check the mount point, connect, mount."""
        config = self._config
        place = await self._env.run_blocking(lambda: mountpoint.prepare(config.mountpoint))
        self._cluster = await self._connect()
        operations = self._operations(self._cluster.metadata, self._cluster.files)
        socket = self._socket()
        if socket:
            operations.virtual.add(b"ring", os.fsencode(socket))
        self._mount = Mount(self._env, operations, place)
        await self._mount.start(mount_options(config), config.read_ahead_bytes)
        self._listen(self._cluster, operations.cache)
        if socket:
            await self._serve_rings(self._cluster, operations, place, socket)
        assert self._mount.session is not None
        self._mount.session.add_done_callback(_leave)
        self._metrics.register()
        log.info("mounted at %s", place)

    def _socket(self) -> str:
        """Where the rings are; empty for nowhere."""
        if self._config.rings != "auto":
            return self._config.rings
        try:
            return str(socket_directory(os.geteuid(), os.environ) / f"{os.getpid()}.sock")
        except (OSError, EmberfsError) as problem:
            log.warning("no rings (set `rings` to a path for their socket): %s", problem)
            return ""

    async def _serve_rings(
        self, cluster: Cluster, operations: EmberOperations, place: str, socket: str
    ) -> None:
        device = await self._env.run_blocking(lambda: os.stat(place).st_dev)
        performer = Performer(cluster.chunkio, operations.kernel.drop_contents)
        self._rings = RingService(cluster.files, performer, device)
        others = self._config.allow_other and os.geteuid() == 0
        self._rings.start(socket, 0o666 if others else 0o600)

    def _listen(self, cluster: Cluster, cache: KernelCache) -> None:
        if self._config.announced_timeout_s > 0:
            cache.is_current = cluster.listening.is_current
            cluster.listening.start(cache)

    async def stop(self) -> None:
        """Push everything to the servers, unmount, say goodbye."""
        try:
            if self._rings is not None:
                await self._rings.close()
            if self._cluster is not None:
                await self._cluster.listening.close()
            if self._cluster is not None and self._mount is not None:
                await self._flush(self._cluster.files)
            if self._mount is not None:
                await self._mount.stop()
        finally:
            if self._cluster is not None:
                await self._part(self._cluster)

    async def _connect(self) -> Cluster:
        config = self._config
        timeout_ns = int(config.connect_timeout_s * SECOND)
        where = ", ".join(config.mgmtd)
        try:
            async with asyncio.timeout(config.connect_timeout_s + 1):
                return await Cluster.open(
                    self._env,
                    config.mgmtd,
                    config.cluster,
                    durable_close=config.durable_close,
                    timeout_ns=timeout_ns,
                )
        except TimeoutError:
            raise EmberfsError(
                Code.UNREACHABLE,
                f"cluster {config.cluster!r}: no answer from mgmtd at {where} within "
                f"{config.connect_timeout_s:.0f} s; is it running?",
            ) from None
        except EmberfsError as problem:
            if any(address in problem.message for address in config.mgmtd):
                raise
            raise EmberfsError(problem.code, f"mgmtd at {where}: {problem.message}") from None

    def _operations(self, metadata: Metadata, files: OpenFiles) -> EmberOperations:
        config = self._config
        policy = CachePolicy(
            attr_timeout_s=config.attr_timeout_s,
            entry_timeout_s=config.entry_timeout_s,
            announced_timeout_s=config.announced_timeout_s,
            writeback=config.writeback,
            request_timeout_ns=int(config.request_timeout_s * SECOND),
            acl=config.acl and os.geteuid() == 0,
        )
        return EmberOperations(self._env, metadata, files, policy, self._metrics, asked_inode)

    async def _part(self, cluster: Cluster) -> None:
        try:
            async with asyncio.timeout(PART_TIMEOUT_S):
                await cluster.close()
        except TimeoutError:
            log.error("the servers did not answer at the end; open files expire with the lease")

    async def _flush(self, files: OpenFiles) -> None:
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await files.flush_all()
        except (TimeoutError, EmberfsError) as problem:
            log.error("not everything could be written: %s", str(problem) or "no answer in time")


def mount_options(config: FuseConfig) -> set[str]:
    """Options of the mount (mount.fuse3(8))."""
    # No max_read: libfuse wants it in the INIT reply too, out of pyfuse3's reach; 1 MiB anyway.
    options = {"default_permissions", "fsname=emberfs", "subtype=emberfs"}
    if config.allow_other and os.geteuid() == 0:
        options.add("allow_other")
    return options


def _leave(session: asyncio.Task[None]) -> None:
    """Somebody unmounted it (umount, fusermount3 -u): the process has nothing left to do."""
    if not session.cancelled():
        os.kill(os.getpid(), signal.SIGTERM)


async def build(config: FuseConfig, env: Env) -> FuseService:
    """Make the service of a configuration."""
    return FuseService(config, env)


def main() -> None:
    """Run emberfs-fuse."""
    run_service("emberfs-fuse", FuseConfig, build)


if __name__ == "__main__":
    main()
