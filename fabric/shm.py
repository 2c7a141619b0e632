"""The shm transport: the same frames over a Unix socket, and memory shared instead of sent.

A caller's regions are memfds whose descriptors travel beside REGISTER frames (SCM_RIGHTS), in
order with the requests that use them. The server maps them: it fills sinks in place and copies
sources into buffers of its own, so that nothing changes under a handler. Plain memory is streamed
as on tcp.
"""

import asyncio
import errno
import os
import socket
import stat
import struct

from emberfs.fabric import endpoint as endpoints
from emberfs.fabric.acceptor import Acceptor
from emberfs.fabric.endpoint import Listener
from emberfs.fabric.peer import StreamPeer
from emberfs.fabric.session import Host, Session
from emberfs.fabric.stream import Stream
from emberfs.fabric.tcp import shake_hands
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MiB
from emberfs.runtime.env import Env

PATH_BYTES_MAX = 107  # sun_path, unix(7)
SOCKET_BUFFER_BYTES = 1 * MiB
_CREDENTIALS = struct.Struct("3i")


class ShmTransport:
    """See endpoint.Transport."""

    scheme = "shm"
    merit = "same host, memory is shared"

    def refusal(self, env: Env, endpoint: str) -> str:
        """Memory is shared on one host only."""
        return "" if endpoints.parse(endpoint).host == env.host_key else "another host"

    async def dial(self, env: Env, endpoint: str) -> StreamPeer:
        """Connect to shm://HOST_KEY/path and shake hands."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            _tune(sock)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, endpoints.parse(endpoint).path)
        except BaseException:
            sock.close()
            raise
        peer = await shake_hands(env, sock, endpoint, "shm", shares_memory=True)
        if peer.hello.result().host_key != env.host_key:
            await peer.close()
            raise EmberfsError(
                Code.UNREACHABLE, f"{endpoint}: the server behind the socket is on another host"
            )
        return peer

    async def listen(self, host: Host, endpoint: str) -> Listener:
        """Accept on shm:///path, for processes of the same user."""
        path = endpoints.parse(endpoint).path
        if len(os.fsencode(path)) > PATH_BYTES_MAX:
            raise EmberfsError(
                Code.CONFIG, f"{endpoint}: a socket's path has at most {PATH_BYTES_MAX} bytes"
            )
        sock = _bind(path)

        def take(connection: socket.socket) -> None:
            try:
                _tune(connection)
                label = f"shm pid {_pid_of(connection)}"
            except OSError:  # gone before it was accepted
                connection.close()
                return
            session = Session(host, "shm", label, shares_memory=True)
            session.attach(Stream(connection, session, takes_fds=True))

        return _ShmListener(sock, path, Acceptor(sock, f"shm://{host.env.host_key}{path}", take))


class _ShmListener:
    """An acceptor whose socket has a name to be removed."""

    def __init__(self, sock: socket.socket, path: str, acceptor: Acceptor) -> None:
        self.endpoint = acceptor.endpoint
        self._path = path
        self._inode = os.stat(path).st_ino
        self._acceptor = acceptor

    def close(self) -> None:
        """Accept no more; the name goes unless someone else has taken it over."""
        self._acceptor.close()
        try:
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass


def _bind(path: str) -> socket.socket:
    """Bind, replacing the socket of a dead server but not that of a living one."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
    except OSError as problem:
        sock.close()
        raise OSError(problem.errno, f"cannot listen on {path}: {problem.strerror}") from None
    return sock


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, "something else has this name")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except BlockingIOError:  # a full backlog: somebody lives
            raise OSError(errno.EADDRINUSE, "another server listens there") from None
        else:
            raise OSError(errno.EADDRINUSE, "another server listens there")


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)


def _pid_of(sock: socket.socket) -> int:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(raw)[0]
    return pid
