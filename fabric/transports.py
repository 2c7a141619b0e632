"""The transports there are, the best one first."""

from collections.abc import Mapping

from emberfs.fabric.endpoint import Transport
from emberfs.fabric.shm import ShmTransport
from emberfs.fabric.tcp import TcpTransport
from emberfs.proto.errors import Code, EmberfsError

TRANSPORTS: dict[str, Transport] = {
    "shm": ShmTransport(),
    "tcp": TcpTransport(),
}


def transport_of(endpoint: str, transports: Mapping[str, Transport] = TRANSPORTS) -> Transport:
    """Return the transport of an endpoint. CONFIG when its scheme is unknown."""
    scheme = endpoint.partition("://")[0]
    found = transports.get(scheme)
    if found is None:
        known = ", ".join(transports)
        raise EmberfsError(Code.CONFIG, f"{endpoint!r}: no such transport (there are {known})")
    return found
