"""What every machine last said before a history went wrong.

Logging costs more than simulating, so nobody listens the first time; a seed is one history, and a
failing one is played again with everybody's last lines kept.
"""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Callable

from sim.loop import PROCESS

LINES = 8  # of each machine


class _Ring(logging.Handler):
    """Keeps the last lines of every machine."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=LINES))

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        process = PROCESS.get()
        name = process.name if process is not None else "simulation"
        try:
            now_s = asyncio.get_running_loop().time()
        except RuntimeError:
            now_s = 0.0
        text = f"{now_s:10.6f} {name}: {record.getMessage()}"
        self.lines[name.partition(".")[0]].append(text)


def last_words(play_again: Callable[[], object]) -> list[str]:
    """Play a history again; return the last log lines of every machine, machine by machine."""
    ring, root = _Ring(), logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    root.handlers[:] = [ring]
    root.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    try:
        play_again()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)
    return [line for name in sorted(ring.lines) for line in ring.lines[name]]
