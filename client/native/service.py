"""The daemon's socket: applications connect to it, hand over memory and files, and use rings."""

import asyncio
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from emberfs.client.native.application import Application
from emberfs.client.native.holdings import Holdings
from emberfs.client.native.performer import Performer
from emberfs.client.native.scheduler import Scheduler
from emberfs.client.openfile import OpenFiles
from emberfs.proto.errors import Code, EmberfsError

log = logging.getLogger("emberfs.client.native")

APPLICATIONS_MAX = 1024
_BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")  # ucred of unix(7)


class RingService:
    """Everything that applications share with one mount."""

    def __init__(self, files: OpenFiles, performer: Performer, device: int) -> None:
        """`device` is the mount's st_dev."""
        self._files = files
        self._performer = performer
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._scheduler = Scheduler()
        self._applications: set[Application] = set()
        self._listener: socket.socket | None = None
        self._path = ""

    def start(self, path: str, mode: int) -> None:
        """Accept applications at a path, replacing a dead daemon's socket. Raises EmberfsError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            if _is_dead(path):
                os.unlink(path)
            listener.bind(path)
            os.chmod(path, mode)
            listener.listen(_BACKLOG)
        except OSError as problem:
            listener.close()
            raise EmberfsError(Code.CONFIG, f"the rings' socket {path}: {problem}") from None
        self._listener, self._path = listener, path
        self._loop.add_reader(listener.fileno(), self._accept)

    def __len__(self) -> int:
        """How many applications are connected."""
        return len(self._applications)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again, or no descriptor is left: it waits in the backlog
            return
        if len(self._applications) >= APPLICATIONS_MAX:
            log.warning("an application is refused: %d are connected", APPLICATIONS_MAX)
            connection.close()
            return
        holdings = Holdings(self._files, self._device, _process_of(connection))
        application = Application(
            connection,
            holdings,
            self._scheduler,
            self._performer,
            self._watch,
            self._unwatch,
            self._applications.discard,
        )
        self._applications.add(application)

    def _watch(self, sock: socket.socket, readable: Callable[[], None]) -> None:
        self._loop.add_reader(sock.fileno(), readable)

    def _unwatch(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_reader(sock.fileno())

    async def close(self) -> None:
        """Cut every application off."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            try:
                os.unlink(self._path)
            except OSError:
                pass
        for application in list(self._applications):
            application.close("")
        await self._scheduler.close()


def _process_of(connection: socket.socket) -> int:
    """The pid of an application; 0 if it has none here, or if that is another's by now."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, uid, _ = _CREDENTIALS.unpack(raw)
    try:
        return int(process) if os.stat(f"/proc/{process}").st_uid == uid else 0
    except OSError:
        return 0


def _is_dead(path: str) -> bool:
    """Tell whether a socket is there that nobody listens at."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def socket_directory(uid: int, environment: Mapping[str, str]) -> Path:
    """Where the sockets of this user's mounts are: a directory that only he can change.

    /run/emberfs of root, else below XDG_RUNTIME_DIR, else a directory of his own in /tmp.
    """
    if uid == 0:
        place = Path("/run/emberfs")
    elif runtime := environment.get("XDG_RUNTIME_DIR"):
        place = Path(runtime) / "emberfs"
    else:
        place = Path(f"/tmp/emberfs-{uid}")
    place.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = os.lstat(place)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o022:
        raise EmberfsError(
            Code.CONFIG, f"{place}: others could put their socket there; remove it, or set `rings`"
        )
    return place
