"""One connection of a process to a cluster, shared by all who ask for it, and forks.

A session has an event loop in a thread of its own. A forked child inherits neither the thread nor
a gRPC that works: it makes sessions of its own and reaches mgmtd through `relay`. What it has
inherited is kept and never touched: closing it would take sockets out of the epoll set that it
shares with its parent.
"""

import os
import threading
from collections.abc import Coroutine
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, TypeVar

from emberfs.client.blocking import LoopThread
from emberfs.client.cluster import Cluster
from emberfs.client.control import Control
from emberfs.client.ecosystem.locate import Place
from emberfs.client.ecosystem.relay import RelayedConnection
from emberfs.client.file import File, FileSystem, process_caller, process_umask
from emberfs.client.lending import Lender
from emberfs.client.oserrors import os_error, translated
from emberfs.client.wiring import REAL
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, MiB
from emberfs.runtime.real import RealEnv
from emberfs.runtime.tasks import TaskSet

T = TypeVar("T")

TIMEOUT_NS = 10 * SECOND
LENT_BYTES_MAX = 256 * MiB  # of shared memory that bytes are read into
_GRPC_THREADS = ("event_engine", "grpc", "lifeguard")


class Session:
    """A connection that any number of threads may use. Ends with the process."""

    def __init__(self, place: Place) -> None:
        """Connect. OSError with what to do about it."""
        self.place = place
        self.pid = os.getpid()
        self.closed = False
        self._thread = LoopThread()
        try:
            self.files: FileSystem = self._thread.run(self._open())
        except BaseException:
            self._thread.close()
            raise
        # multiprocessing runs these at the end of its own children too, which atexit does not see.
        Finalize(None, self.close, exitpriority=5)

    async def _open(self) -> FileSystem:
        self._ident = threading.get_ident()
        self._tasks = TaskSet()
        self.lender = Lender(LENT_BYTES_MAX)
        wiring = REAL
        if _table.grpc_lost:
            wiring = REAL._replace(control=lambda to, name: Control(to, name, RelayedConnection))
        with translated():
            self._cluster = await Cluster.open(
                RealEnv(), *self.place, timeout_ns=TIMEOUT_NS, wiring=wiring
            )
        return FileSystem(self._cluster, process_caller(), process_umask())

    @property
    def identity(self) -> int:
        """Of the cluster: no two have one."""
        return self._cluster.control.identity

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the session's loop and wait for it."""
        if self.pid != os.getpid() or self.closed or threading.get_ident() == self._ident:
            work.close()
            raise os_error(
                EmberfsError(
                    Code.BAD_HANDLE,
                    "this connection belongs to another process, or has been closed; open the file "
                    "again in this one",
                )
            )
        return self._thread.run(work)

    def release(self, file: File) -> None:
        """Close a file; errors of its writes are raised. From the loop's own thread: later."""
        if self.pid != os.getpid() or self.closed:
            return  # its owner flushes it
        if threading.get_ident() == self._ident:  # the garbage collector runs anywhere
            self._tasks.spawn(file.close(), name=f"close {file.name}")
        else:
            self.run(file.close())

    def close(self) -> None:
        """Flush everything and disconnect."""
        if self.closed or self.pid != os.getpid():
            return
        try:
            self.run(self._leave())
        finally:
            self.closed = True
            self._thread.close()

    async def _leave(self) -> None:
        await self._tasks.drain()
        await self._cluster.close()
        self.lender.close()


class _Table:
    """The sessions of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sessions: dict[Place, Session] = {}
        self.inherited: list[dict[Place, Session]] = []
        self.grpc_used = False  # by this process, as seen before a fork
        self.grpc_lost = False  # a process that had used it was forked into this one

    def before_fork(self) -> None:
        self.grpc_used = bool(self.sessions) or _speaks_grpc()

    def after_fork(self) -> None:
        self.lock = threading.Lock()
        if self.sessions:
            self.inherited.append(self.sessions)
        self.sessions = {}
        self.grpc_lost = self.grpc_lost or self.grpc_used


def _speaks_grpc() -> bool:
    """Tell whether gRPC runs in this process, for whoever else uses it."""
    try:
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    except OSError:
        return True
    return any(name.startswith(_GRPC_THREADS) for name in names)


_table = _Table()
os.register_at_fork(before=_table.before_fork, after_in_child=_table.after_fork)


def session(place: Place) -> Session:
    """The session of this process with a cluster; made by the first who asks."""
    found = _table.sessions.get(place)
    if found is None or found.closed:
        with _table.lock:
            found = _table.sessions.get(place)
            if found is None or found.closed:
                found = _table.sessions[place] = Session(place)
    return found
