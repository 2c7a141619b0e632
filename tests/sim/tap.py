"""Taps: chosen messages are held back, until a script lets them go.

Any delay and any order of messages belong to the fault model (network.py); a tap only makes one of
them certain. A message that is held is not lost with its connection, so it may come very late.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

STORE = "store"  # calls of mgmtd to its key-value store
ROWS = "rows"  # calls of metadata servers to the store that they share
CONTROL = "control"  # calls to mgmtd
ROUTING = "routing"  # streams of snapshots from mgmtd


class Message(NamedTuple):
    """One that is on its way."""

    source: str  # machine
    destination: str
    kind: int | str  # method of the data plane, or a name from above
    answer: bool
    stream: int = 0  # number of a stream of routing
    body: bytes = b""  # of a request of the data plane


class Tap:
    """Holds what it wants; with `copies` it lets everything pass and keeps a copy to send later."""

    def __init__(self, wanted: Callable[[Message], bool], *, copies: bool = False) -> None:
        self.held: list[tuple[Message, Callable[[], None]]] = []
        self.open = False  # lets everything pass
        self._wanted = wanted
        self._copies = copies

    def take(self, message: Message, send: Callable[[], None]) -> bool:
        """Tell whether the message must not be sent now."""
        if self.open or not self._wanted(message):
            return False
        self.held.append((message, send))
        return not self._copies

    def send_held(self) -> None:
        """Let go what is held; what comes from now on is held again."""
        held, self.held = self.held, []
        for _, send in held:
            send()

    def release(self) -> None:
        """Let go what is held, and everything from now on."""
        self.open = True
        self.send_held()

    def lose(self) -> None:
        """Lose what is held; everything else passes from now on.

        Nothing is missing from a stream: it ends where something is lost, and its pings tell.
        """
        self.held = [held for held in self.held if held[0].stream]
        self.release()


def between(
    kind: int | str, sources: Collection[str], destinations: Collection[str], *, answers: bool
) -> Callable[[Message], bool]:
    """Return what is wanted by machines, kind and direction."""

    def wanted(message: Message) -> bool:
        return (
            message.kind == kind
            and message.answer == answers
            and message.source in sources
            and message.destination in destinations
        )

    return wanted
