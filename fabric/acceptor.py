"""Accepting connections on a listening socket, through full descriptor tables too."""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

log = logging.getLogger("emberfs.fabric.acceptor")

BACKLOG = 1024
_ACCEPTS_PER_WAKE = 64
_PAUSE_S = 0.1  # when descriptors run out: the listener would be readable for ever
_OUT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Acceptor:
    """Gives every new connection to `take`."""

    def __init__(
        self, sock: socket.socket, endpoint: str, take: Callable[[socket.socket], None]
    ) -> None:
        self.endpoint = endpoint
        self._sock = sock
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._closed = False
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._listen()

    def close(self) -> None:
        """Accept no more."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _listen(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._sock.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(_ACCEPTS_PER_WAKE):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as problem:
                if problem.errno in _OUT_OF:
                    log.error("%s: cannot accept: %s", self.endpoint, problem)
                    self._loop.remove_reader(self._sock.fileno())
                    self._loop.call_later(_PAUSE_S, self._listen)
                    return
                raise
            connection.setblocking(False)
            self._take(connection)
