"""What every transport offers, and how endpoints are written.

    tcp://127.0.0.1:9101     tcp://[::1]:9101     shm://HOST_KEY/absolute/path.sock

A further transport (rdma) is one more file with a class that fits `Transport`, and one line in
transports.py.
"""

from typing import NamedTuple, Protocol

from emberfs.fabric.call import Peer
from emberfs.fabric.session import Host
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.env import Env


class Listener(Protocol):
    """A place where callers are accepted."""

    endpoint: str  # to be published

    def close(self) -> None:
        """Accept no more."""
        ...


class Transport(Protocol):
    """One way to move frames and memory."""

    scheme: str
    merit: str  # why it is chosen, for people

    def refusal(self, env: Env, endpoint: str) -> str:
        """Say why this endpoint cannot work from here; "" if it may."""
        ...

    async def dial(self, env: Env, endpoint: str) -> Peer:
        """Connect. EmberfsError (UNREACHABLE, UNSUPPORTED, ...) or OSError; may be cancelled."""
        ...

    async def listen(self, host: Host, endpoint: str) -> Listener:
        """Accept callers for a server. OSError when the address cannot be had."""
        ...


class Parts(NamedTuple):
    """An endpoint taken apart."""

    scheme: str
    host: str  # name or address; of shm: the host key, may be empty when listening
    port: int  # 0 for shm
    path: str  # "" for tcp


def parse(endpoint: str) -> Parts:
    """Take an endpoint apart. CONFIG when it is not one."""
    scheme, separator, rest = endpoint.partition("://")
    if separator and scheme == "shm":
        host, _, path = rest.partition("/")
        if path:
            return Parts(scheme, host, 0, "/" + path)
    elif separator:
        host, _, port = rest.rpartition(":")
        if host and port.isdecimal() and int(port) < 1 << 16:
            return Parts(scheme, host.removeprefix("[").removesuffix("]"), int(port), "")
    raise EmberfsError(
        Code.CONFIG,
        f"{endpoint!r} is no endpoint: write tcp://ADDRESS:PORT or shm:///absolute/path.sock",
    )
