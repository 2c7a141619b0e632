"""The fake network: machines, links between them, calls that cross them.

Fault model. What a correct cluster must survive, in any combination:
- any delay of any message, and any order of messages, also on one connection (as between the queue
  pairs of RDMA, or the handler tasks of a server);
- loss of any message: the call ends with TIMEOUT at its deadline;
- a request delivered twice, the second time up to seconds later, when its caller has gone on;
- a connection reset at any instant: pending calls end with DISCONNECTED, whether or not they were
  carried out; the server's handlers are cancelled some time later;
- partitions, in one direction or both, between any machines, for any time;
- a machine that is slow by any factor, and a process that is frozen: it accepts and never answers;
- a machine that is gone without a word: its connections stay open until it is back.

What it need not survive: content that was changed under way (TCP and the frames of the fabric have
checksums), a message that arrives at another machine than it was sent to, and forged messages.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from emberfs.fabric.call import Handler, Reply
from emberfs.fabric.endpoint import parse
from emberfs.fabric.region import Buffer, Slice, view_of
from emberfs.fabric.sinks import PackedSinks, SinkTable
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, US
from sim.history import PERFORMED
from sim.loop import PROCESS, Killed, Process, SimLoop
from sim.tap import ROUTING, Message, Tap

T = TypeVar("T")

LATENCY_NS = (50 * US, 500 * US)
REFUSAL_NS = 200 * US
CANCEL_SLACK_NS = 50 * MS
LATE_NS = 8 * SECOND  # a late duplicate comes within this time


class Link:
    """One direction between two machines."""

    def __init__(self) -> None:
        self.cut = False
        self.slow_factor = 1.0


class Network:
    """Links by (source, destination) machine; who listens; what goes wrong in general."""

    def __init__(self, loop: SimLoop, dice: random.Random) -> None:
        self.loop = loop
        self.dice = dice
        self.loss_share = 0.0
        self.duplicate_share = 0.0
        self.late_duplicate_share = 0.0
        self.delay_share = 0.0  # of messages that take up to a second
        self.links: dict[tuple[str, str], Link] = {}
        self.listeners: dict[str, SimListener] = {}  # by endpoint
        self.peers: dict[int, SimPeer] = {}
        self.counts: Counter[str] = Counter()
        self.internal_errors: list[str] = []
        self.down: set[str] = set()  # machines without power
        self.deadly: dict[str, int] = {}  # machine -> answers to writes until it dies before one
        self.taps: list[Tap] = []
        self._ports = 0
        self._numbers = 0

    def link(self, source: str, destination: str) -> Link:
        """Return the link, making it at its first use."""
        key = (source, destination)
        found = self.links.get(key)
        if found is None:
            found = self.links[key] = Link()
        return found

    def transit_ns(self, source: str, destination: str) -> int | None:
        """How long the next message takes; None if it is lost."""
        link = self.link(source, destination)
        if link.cut or destination in self.down or source in self.down:
            self.counts["message into a partition"] += 1
            return None
        dice = self.dice
        if self.loss_share and dice.random() < self.loss_share:
            self.counts["message lost"] += 1
            return None
        low, high = LATENCY_NS
        delay_ns = dice.randint(low, high)
        if self.delay_share and dice.random() < self.delay_share:
            self.counts["message delayed"] += 1
            delay_ns += dice.randint(0, 10 ** dice.randint(6, 9))
        return int(delay_ns * link.slow_factor)

    def later(self, delay_ns: int, owner: Process, work: Callable[..., object], *args: Any) -> None:
        """Run `work` in a process after some time, if it lives then."""
        at_s = self.loop.time() + delay_ns / 1e9
        self.loop.call_at(at_s, work, *args, context=owner.context)

    def send(
        self,
        message: Message,
        delay_ns: int,
        owner: Process,
        work: Callable[..., object],
        *args: Any,
    ) -> None:
        """As `later`, unless a tap holds the message."""

        def go() -> None:
            self.later(delay_ns, owner, work, *args)

        if not any(tap.take(message, go) for tap in self.taps):
            go()

    def next_number(self) -> int:
        """Return a number for a connection."""
        self._numbers += 1
        return self._numbers

    def next_port(self) -> int:
        """Return a free port."""
        self._ports += 1
        return 9000 + self._ports

    def reset(self, one: str, other: str) -> None:
        """Reset all connections between two machines."""
        for peer in list(self.peers.values()):
            if {peer.here, peer.there} == {one, other}:
                self.counts["connection reset"] += 1
                peer.break_now("connection reset by the network")

    def process_died(self, process: Process, machine: str, *, silent: bool) -> None:
        """Its kernel resets the connections of a dead process; not if the machine is gone."""
        for endpoint, listener in list(self.listeners.items()):
            if listener.process is process:
                del self.listeners[endpoint]
        for peer in list(self.peers.values()):
            if peer.owner is process:
                del self.peers[peer.number]
                peer.caller_gone(silent=silent)
            elif peer.listener.process is process and not silent:
                delay_ns = self.transit_ns(machine, peer.here)
                if delay_ns is not None:
                    self.later(delay_ns, peer.owner, peer.break_now, "connection reset by peer")

    def machine_back(self, machine: str) -> None:
        """A machine that was without power answers old connections with a reset."""
        for peer in list(self.peers.values()):
            if peer.there == machine:
                self.later(SECOND, peer.owner, peer.break_now, "connection reset by peer")


class SimTransport:
    """See fabric.endpoint.Transport; endpoints are sim://MACHINE:PORT."""

    scheme = "sim"
    merit = "there is no other"

    def __init__(self, network: Network) -> None:
        self._network = network

    def refusal(self, env: Any, endpoint: str) -> str:
        """It works from everywhere."""
        return ""

    async def dial(self, env: Any, endpoint: str) -> "SimPeer":
        """Connect: a round trip; refused where nobody listens, silence where nobody is."""
        network = self._network
        here, there = env.machine, parse(endpoint).host
        for source, destination in ((here, there), (there, here)):
            delay_ns = network.transit_ns(source, destination)
            if delay_ns is None:
                await asyncio.sleep(60)
                raise ConnectionError("no answer")
            await asyncio.sleep(delay_ns / 1e9)
        listener = network.listeners.get(endpoint)
        if listener is None:
            raise ConnectionRefusedError(111, "Connection refused")
        owner = PROCESS.get()
        assert owner is not None
        peer = SimPeer(network, env, owner, here, listener, endpoint)
        network.peers[peer.number] = peer
        return peer

    async def listen(self, host: Any, endpoint: str) -> "SimListener":
        """Accept callers."""
        parts = parse(endpoint)
        port = parts.port or self._network.next_port()
        process = PROCESS.get()
        assert process is not None
        listener = SimListener(self._network, f"sim://{parts.host}:{port}", host, process)
        self._network.listeners[listener.endpoint] = listener
        return listener


class SimListener:
    """A server at an endpoint."""

    def __init__(self, network: Network, endpoint: str, host: Any, process: Process) -> None:
        self.endpoint = endpoint
        self.host = host
        self.process = process
        self._network = network

    def close(self) -> None:
        """Accept no more."""
        self._network.listeners.pop(self.endpoint, None)


class FakeRegion:
    """As much of a fabric Region as a Slice needs."""

    def __init__(self, content: bytes) -> None:
        self.id = 0
        self.fd = -1
        self.size_bytes = len(content)
        self.abandoned = False
        self.watchers: set[Callable[[int], None]] = set()
        self.view = memoryview(bytearray(content))


class SimCall:
    """See fabric.call.ServerCall."""

    def __init__(
        self,
        method: int,
        body: bytes,
        peer: str,
        deadline_ns: int,
        sources: list[bytes],
        sizes: list[int],
    ) -> None:
        self.method = method
        self.body = memoryview(body)
        self.peer = peer
        self.deadline_ns = deadline_ns
        self.sources = [Slice(FakeRegion(s), 0, len(s)) for s in sources]  # type: ignore[arg-type]
        self.sinks = [memoryview(bytearray(size)) for size in sizes]
        self.sink_table = SinkTable.of(self.sinks)
        self.sink_bytes = sum(sizes)
        self.filled = [0] * len(sizes)

    def fill(self, sink: int, length: int) -> None:
        """Declare bytes valid."""
        assert 0 <= length <= len(self.sinks[sink])
        self.filled[sink] = length

    def fill_all(self) -> None:
        """Declare all bytes valid."""
        self.filled = [len(sink) for sink in self.sinks]


class _Request(NamedTuple):
    number: int
    method: int
    body: bytes
    sources: list[bytes]
    sizes: list[int]
    timeout_ns: int


class _Answer(NamedTuple):
    body: bytes
    filled: list[int]
    contents: list[bytes]
    sent_ns: int


class SimPeer:
    """See fabric.call.Peer: a connection from one process to one server."""

    transport = "sim"

    def __init__(
        self,
        network: Network,
        env: Any,
        owner: Process,
        here: str,
        listener: SimListener,
        endpoint: str,
    ) -> None:
        self.number = network.next_number()
        self.endpoint = endpoint
        self.owner = owner
        self.here = here
        self.there = parse(endpoint).host
        self.listener = listener
        self._network = network
        self._env = env
        self._calls = 0
        self._pending: dict[int, asyncio.Future[_Answer]] = {}
        self._handling: dict[int, list[asyncio.Task[None]]] = {}  # at the server
        self._closed = False

    @property
    def closed(self) -> bool:
        """True once the connection is gone."""
        return self._closed

    def start(self, *_: object, **__: object) -> None:
        """Nothing is started here: the caller uses `call`."""

    async def call(
        self,
        method: int,
        body: bytes,
        *,
        sources: Sequence[Buffer] = (),
        sinks: Sequence[Buffer] | PackedSinks = (),
        timeout_ns: int,
    ) -> Reply:
        """Perform one call."""
        if self._closed:
            raise EmberfsError(Code.DISCONNECTED, f"{self.endpoint}: the connection is closed")
        if timeout_ns <= 0:
            raise EmberfsError(Code.TIMEOUT, f"{self.endpoint}: no time left")
        self._calls += 1
        if isinstance(sinks, PackedSinks):
            sinks = sinks.slices()
        views = [view_of(sink) for sink in sinks]
        request = _Request(
            self._calls,
            method,
            bytes(body),
            [bytes(view_of(source)) for source in sources],
            [len(view) for view in views],
            timeout_ns,
        )
        future = self._pending[request.number] = self._network.loop.create_future()
        self._send(request)
        try:
            async with asyncio.timeout(timeout_ns / 1e9):
                answer = await future
        except TimeoutError:
            self._cancel(request.number)
            raise EmberfsError(
                Code.TIMEOUT, f"{self.endpoint}: no answer within {timeout_ns // MS} ms"
            ) from None
        except asyncio.CancelledError:
            self._cancel(request.number)
            raise
        finally:
            self._pending.pop(request.number, None)
        for view, content in zip(views, answer.contents, strict=True):
            view[: len(content)] = content
        operation = PERFORMED.get()
        if operation is not None:
            operation.heard(answer.sent_ns)
        return Reply(answer.body, answer.filled)

    async def close(self) -> None:
        """End the connection."""
        self._network.peers.pop(self.number, None)
        self._fail("closed")
        self._server_forgets()

    # ------------------------------------------------------------ there

    def _send(self, request: _Request) -> None:
        network, dice = self._network, self._network.dice
        delays = [network.transit_ns(self.here, self.there)]
        if network.duplicate_share and dice.random() < network.duplicate_share:
            network.counts["request duplicated"] += 1
            delays.append(network.transit_ns(self.here, self.there))
        if network.late_duplicate_share and dice.random() < network.late_duplicate_share:
            network.counts["request duplicated late"] += 1
            delays.append(dice.randint(MS, LATE_NS))
        message = Message(self.here, self.there, request.method, False, body=request.body)
        for delay_ns in delays:
            if delay_ns is not None:
                network.send(message, delay_ns, self.listener.process, self._arrive, request)

    def _arrive(self, request: _Request) -> None:
        """In the server's process."""
        if self._closed:
            return
        task = self._network.loop.create_task(self._handle(request))
        self._handling.setdefault(request.number, []).append(task)
        task.add_done_callback(lambda _: self._handled(request.number, task))

    def _handled(self, number: int, task: asyncio.Task[None]) -> None:
        tasks = self._handling.get(number, [])
        if task in tasks:
            tasks.remove(task)
        if not tasks:
            self._handling.pop(number, None)

    async def _handle(self, request: _Request) -> None:
        host = self.listener.host
        deadline_ns = host.env.now_ns() + request.timeout_ns
        name = f"{self.owner.name} at {self.here}"
        call = SimCall(
            request.method, request.body, name, deadline_ns, request.sources, request.sizes
        )
        answer: bytes | _Answer | EmberfsError
        try:
            async with asyncio.timeout(request.timeout_ns / 1e9):
                answer = await self._perform(host, call)
        except TimeoutError:
            answer = EmberfsError(Code.TIMEOUT, f"{host.name}: not done in time")
        if request.sources:
            self._die_perhaps()
        contents = [bytes(s[:n]) for s, n in zip(call.sinks, call.filled, strict=True)]
        delay_ns = self._network.transit_ns(self.there, self.here)
        if delay_ns is not None:
            message = Message(self.there, self.here, request.method, True, body=request.body)
            if not isinstance(answer, EmberfsError):
                now_ns = self._network.loop.now_ns()
                answer = _Answer(answer, call.filled, contents, now_ns)
            self._network.send(
                message, delay_ns, self.owner, self._answered, request.number, answer
            )

    def _die_perhaps(self) -> None:
        """At the worst moment: all is done, and nobody is told."""
        deadly = self._network.deadly
        if self.there not in deadly:
            return
        deadly[self.there] -= 1
        if deadly[self.there] <= 0:
            del deadly[self.there]
            self._network.counts["death before an answer"] += 1
            self.listener.process.kill()
            raise Killed

    async def _perform(self, host: Any, call: SimCall) -> bytes | EmberfsError:
        if host.draining:
            return EmberfsError(Code.SHUTTING_DOWN, f"{host.name} is shutting down")
        handler: Handler | None = host.handlers.get(call.method)
        if handler is None:
            return EmberfsError(Code.UNSUPPORTED, f"{host.name} has no method {call.method}")
        try:
            return await handler(call)
        except EmberfsError as problem:
            return problem
        except Exception as problem:
            self._network.internal_errors.append(f"{host.name}: {problem!r}")
            raise

    # ------------------------------------------------------------ and back

    def _answered(self, number: int, answer: _Answer | EmberfsError) -> None:
        future = self._pending.get(number)
        if future is None or future.done():
            return
        if isinstance(answer, EmberfsError):
            future.set_exception(EmberfsError(answer.code, answer.message))
        else:
            future.set_result(answer)

    # ------------------------------------------------------------ the end

    def _cancel(self, number: int) -> None:
        if not self._closed:
            delay_ns = self._network.transit_ns(self.here, self.there)
            if delay_ns is not None:
                self._network.later(delay_ns, self.listener.process, self._stop, number)

    def _stop(self, number: int) -> None:
        for task in list(self._handling.get(number, [])):
            task.cancel()

    def break_now(self, why: str) -> None:
        """The caller's end learns that the connection is gone; the server's a little later."""
        self._network.peers.pop(self.number, None)
        self._fail(why)
        self._server_forgets()

    def caller_gone(self, *, silent: bool) -> None:
        """The calling process is dead."""
        self._closed = True
        self._server_forgets(10 * SECOND if silent else 0)

    def _fail(self, why: str) -> None:
        self._closed = True
        for future in self._pending.values():
            if not future.done():
                future.set_exception(EmberfsError(Code.DISCONNECTED, f"{self.endpoint}: {why}"))

    def _server_forgets(self, after_ns: int = 0) -> None:
        server = self.listener.process
        after_ns += self._network.dice.randint(*LATENCY_NS)
        for number in list(self._handling):
            self._network.later(after_ns, server, self._stop, number)


async def remote(
    network: Network,
    here: str,
    there: str,
    server: Callable[[], Process | None],
    work: Callable[[], Awaitable[T]],
    timeout_ns: int,
    kind: str,
) -> T:
    """Run `work` in a process of another machine and return what it returns (control plane).

    UNREACHABLE when nobody answers in time; the work may have been done all the same.
    """
    loop = network.loop
    caller = PROCESS.get()
    assert caller is not None
    future: asyncio.Future[T] = loop.create_future()

    def arrive(process: Process) -> None:
        async def perform() -> None:
            try:
                outcome: Any = await work()
                problem = None
            except EmberfsError as found:
                outcome, problem = None, found
            delay_ns = network.transit_ns(there, here)
            if delay_ns is not None:
                message = Message(there, here, kind, answer=True)
                network.send(message, delay_ns, caller, answered, outcome, problem)

        loop.create_task(perform())

    def answered(outcome: Any, problem: EmberfsError | None) -> None:
        if future.done():
            return
        if problem is not None:
            future.set_exception(EmberfsError(problem.code, problem.message))
        else:
            future.set_result(outcome)

    process = server()
    delay_ns = network.transit_ns(here, there)
    if delay_ns is not None:
        if process is None or not process.alive:
            await asyncio.sleep(REFUSAL_NS / 1e9)
            raise EmberfsError(Code.UNREACHABLE, f"{there} refuses connections")
        network.send(Message(here, there, kind, False), delay_ns, process, arrive, process)
    try:
        async with asyncio.timeout(timeout_ns / 1e9):
            return await future
    except TimeoutError:
        raise EmberfsError(Code.UNREACHABLE, f"{there} does not answer") from None


async def remote_stream(
    network: Network,
    here: str,
    there: str,
    server: Callable[[], Process | None],
    begin: Callable[[], AsyncGenerator[T, None]],
    silence_ns: int,
) -> AsyncGenerator[T, None]:
    """As `remote`, for a stream; pings notice within `silence_ns` that the other side is gone."""
    process = server()
    if process is None or not process.alive:
        await asyncio.sleep(REFUSAL_NS / 1e9)
        raise EmberfsError(Code.UNREACHABLE, f"{there} refuses connections")
    loop = network.loop
    caller = PROCESS.get()
    assert caller is not None
    queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    number = network.next_number()
    ended = False
    arrival_ns = 0  # of the last thing sent: a stream keeps its order, and ends at a loss

    sent = 0
    early: dict[int, tuple[str, Any]] = {}  # what a tap let go before what was sent earlier
    taken = 0

    def deliver(place: int, kind: str, item: object) -> None:
        nonlocal taken
        early[place] = (kind, item)
        while taken in early:
            queue.put_nowait(early.pop(taken))
            taken += 1

    def send(kind: str, item: object) -> None:
        nonlocal arrival_ns, ended, sent
        delay_ns = network.transit_ns(there, here)
        if delay_ns is None:
            ended = True
            return
        arrival_ns = max(loop.now_ns() + delay_ns, arrival_ns + 1)
        delay_ns = arrival_ns - loop.now_ns()
        if kind == "ping":  # passes what a tap holds: the stream is not silent
            network.later(delay_ns, caller, queue.put_nowait, (kind, item))
            return
        message = Message(there, here, ROUTING, answer=True, stream=number)
        network.send(message, delay_ns, caller, deliver, sent, kind, item)
        sent += 1

    async def serve() -> None:
        stream = None
        try:
            stream = begin()
            async for item in stream:
                if ended:
                    return
                send("item", item)
            send("end", None)
        except EmberfsError as problem:
            send("error", problem)
        finally:
            if stream is not None:
                await stream.aclose()

    async def ping() -> None:
        while not ended:
            send("ping", None)
            await asyncio.sleep(silence_ns / 4e9)

    def arrive() -> None:
        loop.create_task(serve())
        loop.create_task(ping())

    delay_ns = network.transit_ns(here, there)
    if delay_ns is not None:
        network.later(delay_ns, process, arrive)
    try:
        while True:
            try:
                async with asyncio.timeout(silence_ns / 1e9):
                    kind, item = await queue.get()
            except TimeoutError:
                raise EmberfsError(Code.UNREACHABLE, f"{there} is silent") from None
            if kind == "item":
                yield item
            elif kind == "error":
                raise EmberfsError(item.code, item.message)
            elif kind == "end":
                return
    finally:
        ended = True
