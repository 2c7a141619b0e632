"""Calls to the management services: which address to ask, and what to make of the answer.

Several addresses are tried in turn, beginning with the one that answered last. One that does not
lead, does not answer, stops, or manages another cluster is left for the next one; only when none
has answered does the caller hear of it. How one address is spoken to is the business of a
client.connection.Connection: client/control_grpc.py, or the simulator.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import NoReturn, TypeVar

from emberfs.client.connection import CALL_TIMEOUT_NS, Connect, Connection, Lease
from emberfs.client.control_grpc import GrpcConnection
from emberfs.proto.cluster import ClusterId, Node, NodeKind, RoutingSnapshot, TargetReport
from emberfs.proto.errors import Code, EmberfsError, Reaction
from emberfs.proto.ids import MS, SECOND, ChainId, NodeId, RoutingVersion, TargetId

T = TypeVar("T")

# Where others could answer: half a lease must suffice for one that hangs and the election of the
# next.
HEARTBEAT_TIMEOUT_NS = 500 * MS

_NOTHING_SEEN = RoutingVersion(0)


class Control:
    """A client of mgmtd. Must be created, used and closed on one event loop."""

    def __init__(
        self, mgmtd: Sequence[str], cluster: str, connect: Connect = GrpcConnection
    ) -> None:
        """`mgmtd`: "host:port" of each management service."""
        if not mgmtd:
            raise EmberfsError(Code.CONFIG, 'no address of mgmtd given; set "mgmtd"')
        self.addresses = tuple(mgmtd)
        self.cluster = cluster
        self.identity = 0  # of the cluster, learnt from the first answer
        self._connect = connect
        self._current = 0
        self._watched = ""  # where the last stream of routing came from
        self._connections: dict[str, Connection] = {}
        self._closed = False

    async def register(self, node: Node, reports: Sequence[TargetReport] = ()) -> Lease:
        """Announce a process. UNREACHABLE, WRONG_CLUSTER, NODE_ID_TAKEN, INVALID."""
        return await self._call(
            lambda connection: self._leased(connection.register(self._id(), node, reports))
        )

    async def heartbeat(
        self,
        node_id: NodeId,
        kind: NodeKind,
        incarnation: int,
        reports: Sequence[TargetReport] = (),
        client: int = 0,
    ) -> Lease:
        """Renew the lease. UNREACHABLE, WRONG_CLUSTER, NOT_REGISTERED, INVALID."""

        async def beat(connection: Connection) -> Lease:
            patience_s = HEARTBEAT_TIMEOUT_NS / SECOND if len(self.addresses) > 1 else None
            try:
                async with asyncio.timeout(patience_s):
                    return await self._leased(
                        connection.heartbeat(
                            self._id(), node_id, kind, incarnation, reports, client
                        )
                    )
            except TimeoutError:
                text = f"mgmtd at {self._address()} does not answer"
                raise EmberfsError(Code.UNREACHABLE, text) from None

        return await self._call(beat)

    async def report_death(self, node_id: NodeId, incarnation: int) -> None:
        """Say that no thread of this process is left: its lease ends now. May be repeated."""
        await self._call(
            lambda connection: connection.report_death(self._id(), node_id, incarnation)
        )

    async def create_chains(
        self, chains: Sequence[tuple[ChainId, tuple[TargetId, ...]]]
    ) -> list[ChainId]:
        """Create chains, head first, all or none; return the new ones. EXISTS, INVALID."""
        return await self._call(lambda connection: connection.create_chains(self._id(), chains))

    async def routing(self) -> RoutingSnapshot:
        """Return the newest snapshot, asked for now. UNREACHABLE, WRONG_CLUSTER."""

        async def first(connection: Connection) -> RoutingSnapshot:
            stream = connection.watch(self._id(), _NOTHING_SEEN)
            try:
                async with asyncio.timeout(CALL_TIMEOUT_NS / SECOND):
                    async for snapshot in stream:
                        self._learn(ClusterId(snapshot.cluster, snapshot.identity))
                        return snapshot
            except TimeoutError:
                raise EmberfsError(Code.TIMEOUT, f"mgmtd at {self._address()} is silent") from None
            finally:
                await stream.aclose()
            raise EmberfsError(Code.UNREACHABLE, f"mgmtd at {self._address()} stops")

        return await self._call(first)

    async def watch(
        self, have_version: RoutingVersion = _NOTHING_SEEN
    ) -> AsyncGenerator[RoutingSnapshot, None]:
        """Yield every snapshot newer than `have_version` as it is published.

        Ends when mgmtd stops in an orderly way. UNREACHABLE, WRONG_CLUSTER; NOT_PRIMARY when the
        one that was followed has lost the lead; TOO_OLD when this mgmtd has never published a
        version as high as `have_version`. Watching again goes on at the next address.
        """
        problems: list[EmberfsError] = []
        for _ in self.addresses:
            address = self._watched = self._address()
            stream = self._connection(address).watch(self._id(), have_version)
            answered = False
            try:
                async for snapshot in stream:
                    self._learn(ClusterId(snapshot.cluster, snapshot.identity))
                    answered = True
                    yield snapshot
            except EmberfsError as problem:
                self._leave(address)
                if answered or not _elsewhere(problem):
                    raise
                problems.append(problem)
            else:
                self._leave(address)
                return
            finally:
                await stream.aclose()
        _raise_all(problems)

    @property
    def watches_another(self) -> bool:
        """Tell whether the stream comes from another mgmtd than the one that answers calls."""
        return self._watched not in ("", self._address())

    async def close(self) -> None:
        """End all calls and connections."""
        self._closed = True
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()

    def _id(self) -> ClusterId:
        return ClusterId(self.cluster, self.identity)

    def _address(self) -> str:
        return self.addresses[self._current % len(self.addresses)]

    def _leave(self, address: str) -> None:
        """Go on to the next address, unless another call has done so."""
        if self._address() == address:
            self._current += 1

    def _connection(self, address: str) -> Connection:
        if self._closed:
            raise EmberfsError(Code.SHUTTING_DOWN, "the connection to mgmtd is closed")
        connection = self._connections.get(address)
        if connection is None:
            connection = self._connections[address] = self._connect(address)
        return connection

    async def _call(self, call: Callable[[Connection], Awaitable[T]]) -> T:
        """Call one address after another until one answers."""
        problems: list[EmberfsError] = []
        alive = ""
        for _ in self.addresses:
            address = self._address()
            connection = self._connection(address)
            try:
                return await call(connection)
            except EmberfsError as problem:
                if not _elsewhere(problem):
                    raise
                problems.append(problem)
                self._leave(address)
            if problems[-1].code == Code.NOT_PRIMARY:
                alive = address
        if alive:  # it will hear first of who leads; a silent one costs its time-out again
            self._current = self.addresses.index(alive)
        _raise_all(problems)

    async def _leased(self, reply: Awaitable[Lease]) -> Lease:
        lease = await reply
        self._learn(ClusterId(self.cluster, lease.identity))
        return lease

    def _learn(self, found: ClusterId) -> None:
        """Remember the identity of the cluster; refuse what comes from another."""
        ours = self._id()
        if found.differs(ours):
            raise EmberfsError(
                Code.WRONG_CLUSTER,
                f"mgmtd at {self._address()} serves cluster {found.beside(ours)}, not "
                f"{ours.beside(found)}: all "
                'addresses in "mgmtd" must share one store; correct them',
            )
        self.identity = self.identity or found.identity


def _elsewhere(problem: EmberfsError) -> bool:
    """Tell whether another address may do better."""
    return problem.reaction is Reaction.FAILOVER or problem.code == Code.WRONG_CLUSTER


def _raise_all(problems: list[EmberfsError]) -> NoReturn:
    """Raise for a whole round without an answer; WRONG_CLUSTER is what trying again cannot mend."""
    codes = {problem.code for problem in problems}
    code = Code.WRONG_CLUSTER if Code.WRONG_CLUSTER in codes else Code.UNREACHABLE
    raise EmberfsError(code, "; ".join(problem.message for problem in problems))
