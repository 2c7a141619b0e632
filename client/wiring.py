"""How a process reaches the others: the seam between the services and the network.

Production has the transports of the fabric and gRPC to mgmtd; the simulator passes a network of
its own, so that the very same services run on it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from emberfs.client.control import Control
from emberfs.fabric.endpoint import Transport
from emberfs.fabric.transports import TRANSPORTS


class Wiring(NamedTuple):
    """What a process dials with."""

    transports: Mapping[str, Transport]
    control: Callable[[Sequence[str], str], Control]  # addresses of mgmtd, cluster


REAL = Wiring(TRANSPORTS, Control)
