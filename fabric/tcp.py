"""The tcp transport: sources follow the request, filled sinks follow the reply."""

import asyncio
import socket
import struct

from emberfs.fabric import endpoint as endpoints
from emberfs.fabric.acceptor import Acceptor
from emberfs.fabric.endpoint import Listener
from emberfs.fabric.peer import StreamPeer
from emberfs.fabric.session import Host, Session
from emberfs.fabric.stream import Stream
from emberfs.proto.ids import MiB
from emberfs.runtime.env import Env

SOCKET_BUFFER_BYTES = 4 * MiB  # the kernel caps it at net.core.[rw]mem_max
DEAD_MS = 10_000  # a host that acknowledges nothing for so long is gone (tcp(7))
_KEEPALIVE_S = 5


class TcpTransport:
    """See endpoint.Transport."""

    scheme = "tcp"
    merit = "the server offers it to every host"

    def refusal(self, env: Env, endpoint: str) -> str:
        """TCP works from everywhere."""
        return ""

    async def dial(self, env: Env, endpoint: str) -> StreamPeer:
        """Connect to tcp://ADDRESS:PORT and shake hands."""
        parts = endpoints.parse(endpoint)
        family, address = await _resolve(parts.host, parts.port)
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            _tune(sock)
            await asyncio.get_running_loop().sock_connect(sock, address)
            if sock.getsockname() == sock.getpeername():
                # A free port of our own range connected to itself (RFC 793 simultaneous open).
                raise ConnectionRefusedError("nobody listens there")
        except BaseException:
            sock.close()
            raise
        return await shake_hands(env, sock, endpoint, "tcp", shares_memory=False)

    async def listen(self, host: Host, endpoint: str) -> Listener:
        """Accept on tcp://ADDRESS:PORT; port 0 takes a free one."""
        parts = endpoints.parse(endpoint)
        family, address = await _resolve(parts.host, parts.port)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _set_buffers(sock)  # inherited, and in time for the window scale of the handshake
            sock.bind(address)
        except OSError as problem:
            sock.close()
            raise OSError(problem.errno, f"cannot listen on {endpoint}: {problem}") from None
        actual = _format(sock.getsockname())

        def take(connection: socket.socket) -> None:
            try:
                _tune(connection)
                label = _format(connection.getpeername())
            except OSError:  # gone before it was accepted
                connection.close()
                return
            session = Session(host, "tcp", label, shares_memory=False)
            session.attach(Stream(connection, session))

        return Acceptor(sock, actual, take)


async def shake_hands(
    env: Env, sock: socket.socket, endpoint: str, transport: str, *, shares_memory: bool
) -> StreamPeer:
    """Make a peer of a connected socket: HELLO both ways."""
    peer = StreamPeer(env, endpoint, transport, shares_memory=shares_memory)
    peer.attach(Stream(sock, peer))
    try:
        await asyncio.shield(peer.hello)
    except BaseException:
        await peer.close()
        raise
    return peer


async def _resolve(host: str, port: int) -> tuple[int, tuple[str, int]]:
    """Return (family, address); a name costs a thread, an address nothing."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family, (host, port)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    return family, (str(address[0]), port)


def _set_buffers(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)


def _tune(sock: socket.socket) -> None:
    _set_buffers(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, struct.pack("i", DEAD_MS))


def _format(address: tuple[str, int]) -> str:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"tcp://{host}:{address[1]}"
