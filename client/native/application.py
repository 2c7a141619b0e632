"""One application of the daemon: its connection, what it has given, and its rings."""

import logging
import socket
from collections.abc import Awaitable, Callable

from emberfs.client.native import messages
from emberfs.client.native.batch import Tell
from emberfs.client.native.holdings import Holdings, errno_of
from emberfs.client.native.messages import Answer, Kind, Request, RingTerms
from emberfs.client.native.performer import Performer
from emberfs.client.native.scheduler import PRIORITIES, Scheduler
from emberfs.client.native.sharedring import SharedRing
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND

log = logging.getLogger("emberfs.client.native")

RINGS_MAX = 256
GATHER_US_MAX = SECOND // 1000
_BELL_BYTES = 4096  # more than one ring of the bell at a time is taken off the socket


class AttachedRing:
    """A ring that is served (see scheduler.Served), with its bell: one end of a socket pair."""

    def __init__(
        self,
        ring: SharedRing,
        terms: RingTerms,
        bell: socket.socket,
        perform: Callable[[bytes, Tell], Awaitable[None]],
        broken: Callable[[str], None],
    ) -> None:
        self.terms = terms
        self.bell = bell
        self._ring = ring
        self._perform = perform
        self._broken = broken
        self.closed = False

    def waiting(self) -> int:
        """How many entries can be taken; 0 when the ring is of no use any more."""
        if self.closed:
            return 0
        try:
            return self._ring.waiting()
        except EmberfsError as problem:
            self._broken(problem.message)
            return 0

    def take(self, count: int) -> bytes:
        """Take up to so many entries."""
        if not self.waiting():
            return b""
        self._ring.wake()
        return self._ring.take(count)

    async def perform(self, entries: bytes) -> None:
        """Do what they say; tell as they are done."""
        await self._perform(entries, self._tell)

    def sleep(self) -> bool:
        """Ask for the bell; False if entries wait already."""
        try:
            return self.closed or self._ring.sleep()
        except EmberfsError as problem:
            self._broken(problem.message)
            return True

    def _tell(self, completions: bytes) -> None:
        if not self.closed and self._ring.tell(completions):
            ring_bell(self.bell)

    def heard(self) -> bool:
        """Take the rings of the bell off the socket; False when its other end is gone."""
        try:
            return bool(self.bell.recv(_BELL_BYTES, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Tell nothing any more."""
        if not self.closed:
            self.closed = True
            self._ring.close()
            self.bell.close()


def ring_bell(bell: socket.socket) -> None:
    """Wake the other side. A full socket wakes it as well, and one that is gone needs nothing."""
    try:
        bell.send(b"\1", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        pass


class Application:
    """Answers the requests of one connection. The event loop calls; nothing here waits."""

    def __init__(
        self,
        connection: socket.socket,
        holdings: Holdings,
        scheduler: Scheduler,
        performer: Performer,
        watch: Callable[[socket.socket, Callable[[], None]], None],
        unwatch: Callable[[socket.socket], None],
        gone: Callable[["Application"], None],
    ) -> None:
        """`watch` has a function called when a socket is readable, `unwatch` ends that."""
        self._connection = connection
        self._holdings = holdings
        self._scheduler = scheduler
        self._performer = performer
        self._watch = watch
        self._unwatch = unwatch
        self._gone = gone
        self._rings: dict[int, AttachedRing] = {}
        self._last = 0
        self._greeted = False
        self._passed: socket.socket | None = None  # the bell's other end, until it is sent
        self.closed = False
        watch(connection, self._readable)

    def _readable(self) -> None:
        try:  # without room for descriptors the kernel drops them
            message = self._connection.recv(messages.MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if message:
            self._answer(message)
        else:
            self.close("")

    def _answer(self, message: bytes) -> None:
        shared: list[int] = []  # descriptors that go with the answer
        try:
            request = messages.decode_request(message)
            if not self._greeted and request.kind != Kind.HELLO:
                raise EmberfsError(Code.INVALID, "HELLO comes first")
            answer = Answer(0, self._perform(request, shared))
        except EmberfsError as problem:
            answer = Answer(errno_of(problem), 0, problem.message)
        self._send(answer, shared)

    def _perform(self, request: Request, shared: list[int]) -> int:
        holdings, number = self._holdings, request.first
        match request.kind:
            case Kind.HELLO:
                self._greeted = True
                return messages.VERSION
            case Kind.REGION:
                number, region = holdings.add_region(request.first)
                shared.append(region.fd)
                return number
            case Kind.FORGET_REGION:
                holdings.remove_region(number)
            case Kind.FILE:
                return holdings.add_file(request.first)
            case Kind.FORGET_FILE:
                holdings.remove_file(number)
            case Kind.RING:
                return self._add_ring(messages.unpack_terms(request), shared)
            case Kind.FORGET_RING:
                self._remove_ring(number)
        return 0

    # ------------------------------------------------------------ rings

    def _add_ring(self, terms: RingTerms, shared: list[int]) -> int:
        if len(self._rings) >= RINGS_MAX:
            raise EmberfsError(Code.INVALID, f"at most {RINGS_MAX} rings")
        if not (terms.priority < PRIORITIES and terms.gather_us <= GATHER_US_MAX):
            text = f"priority 0 to {PRIORITIES - 1}, gather at most {GATHER_US_MAX} us"
            raise EmberfsError(Code.INVALID, text)
        try:
            ring = SharedRing(terms.entries)
            bell, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as problem:
            raise EmberfsError(Code.NO_SPACE, f"no room for a ring: {problem}") from None
        self._passed = theirs
        shared += [ring.fd, theirs.fileno()]
        self._last += 1
        attached = AttachedRing(ring, terms, bell, self._performed, self.close)
        self._rings[self._last] = attached
        self._watch(bell, lambda: self._rang(attached))
        if not attached.sleep():
            self._scheduler.rang(attached)
        return self._last

    async def _performed(self, entries: bytes, tell: Tell) -> None:
        await self._performer.perform(entries, self._holdings, tell)

    def _remove_ring(self, number: int) -> None:
        ring = self._rings.pop(number, None)
        if ring is None:
            raise EmberfsError(Code.INVALID, f"ring {number} is not known")
        self._drop(ring)

    def _drop(self, ring: AttachedRing) -> None:
        self._scheduler.forget(ring)
        if not ring.closed:
            self._unwatch(ring.bell)
        ring.close()

    def _rang(self, ring: AttachedRing) -> None:
        if ring.heard():
            self._scheduler.rang(ring)
        else:
            self._unwatch(ring.bell)

    # ------------------------------------------------------------ the end

    def _send(self, answer: Answer, shared: list[int]) -> None:
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            socket.send_fds(self._connection, [messages.encode_answer(answer)], shared, flags)
        except OSError as problem:  # it does not read what it has asked for
            self.close(f"does not take its answers: {problem}")
        finally:
            if self._passed is not None:
                self._passed.close()
                self._passed = None

    def close(self, why: str) -> None:
        """End it; `why` is logged. What is under way ends by itself and is told nobody."""
        if self.closed:
            return
        self.closed = True
        if why:
            log.warning("an application is cut off: %s", why)
        self._unwatch(self._connection)
        for ring in self._rings.values():
            self._drop(ring)
        self._rings.clear()
        self._holdings.close()
        self._connection.close()
        self._gone(self)
