"""The state of the cluster in a transactional store that several mgmtd may share.

Keys behind a prefix: "cluster" (name), "identity" (u64), "leader" (LeaseRecord), "written" (epoch
and number of the last Persist), "lease" (nanoseconds), "reserved" (version of the snapshot),
"node/" + u32, "chain/" + u32. Values are msgpack, the name is text. A change of a chain is on
stable storage before it is published; node records only survive the death of the process, since
nodes register again after a power cut.

Fencing: every write of a primary depends on "leader" being its own. It also depends on "written",
which counts its writes: one whose outcome is unknown can be repeated, and if the first attempt
arrives late, after the repetition or even after the next write, it conflicts instead of undoing it.
"""

import struct

import msgspec

from emberfs.kv.keys import LOADING_KEY, span_of
from emberfs.kv.transactions import ReadWrite, Transactions
from emberfs.mgmtd.election import LeaseRecord, Stored
from emberfs.mgmtd.events import Loaded, Persist
from emberfs.proto.cluster import Chain, Node
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import RoutingVersion

_NUMBER = struct.Struct(">I")
_ENCODE = msgspec.msgpack.Encoder().encode
_NODES = msgspec.msgpack.Decoder(Node)
_CHAINS = msgspec.msgpack.Decoder(Chain)
_INTEGER = msgspec.msgpack.Decoder(int)
_LEADERS = msgspec.msgpack.Decoder(LeaseRecord)
_POSITIONS = msgspec.msgpack.Decoder(tuple[int, int])


class ClusterStore:
    """Loads and stores what the machines want to survive. EmberfsError as the engine.

    WRONG_CLUSTER: the store belongs to another cluster. DISK: a record cannot be read.
    """

    def __init__(self, engine: Transactions, cluster: str, prefix: bytes) -> None:
        self._engine = engine
        self._cluster_name = cluster
        self._cluster = prefix + b"cluster"
        self._identity = prefix + b"identity"
        self._leader = prefix + b"leader"
        self._written = prefix + b"written"
        self._lease = prefix + b"lease"
        self._reserved = prefix + b"reserved"
        self._node = prefix + b"node/"
        self._chain = prefix + b"chain/"

    # The lease record.

    async def look(self) -> Stored:
        """Read the record."""

        async def work(transaction: ReadWrite) -> Stored:
            await self._check_name(transaction)
            return Stored(await self._read_leader(transaction), written=False)

        return await self._engine.run(work, read_only=True)

    async def identity(self) -> int:
        """Read the identity of the cluster, 0 if there is none yet."""

        async def work(transaction: ReadWrite) -> int:
            value = await transaction.get(self._identity)
            identity: int = _INTEGER.decode(value) if value else 0
            return identity

        return await self._engine.run(work, read_only=True)

    async def claim(
        self, expected: LeaseRecord | None, record: LeaseRecord, identity: int
    ) -> Stored:
        """Replace the record if it is as expected; the first claim names the cluster."""

        async def work(transaction: ReadWrite) -> Stored:
            named = await self._check_name(transaction)
            stored = await self._read_leader(transaction)
            if stored != expected:
                return Stored(stored, written=False)
            if not named:
                transaction.set(self._cluster, self._cluster_name.encode())
            if await transaction.get(self._identity) is None:
                transaction.set(self._identity, _ENCODE(identity))
            transaction.set(self._leader, _ENCODE(record))
            return Stored(record, written=True)

        return await self._engine.run(work, durable=True)

    async def renew(self, mine: LeaseRecord) -> Stored:
        """Raise the counter if the record is of this holder and epoch."""

        async def work(transaction: ReadWrite) -> Stored:
            stored = await self._read_leader(transaction)
            if stored is None or not _same(stored, mine):
                return Stored(stored, written=False)
            renewed = msgspec.structs.replace(stored, renewals=stored.renewals + 1)
            transaction.set(self._leader, _ENCODE(renewed))
            return Stored(renewed, written=True)

        return await self._engine.run(work)

    # The cluster.

    async def load(self, mine: LeaseRecord) -> Loaded:
        """Return what is stored. NOT_PRIMARY if another has taken over."""

        async def work(transaction: ReadWrite) -> Loaded:
            await self._fence(transaction, mine)
            try:
                return await self._read(transaction)
            except msgspec.MsgspecError as problem:
                raise _damaged(problem) from None

        return await self._engine.run(work, read_only=True)

    async def persist(self, mine: LeaseRecord, number: int, effect: Persist) -> None:
        """Store one effect atomically; on stable storage if it says so. NOT_PRIMARY as `load`.

        `number` counts the effects of one epoch from 1; a repeated one changes nothing.
        """

        async def work(transaction: ReadWrite) -> None:
            await self._fence(transaction, mine)
            value = await transaction.get(self._written)
            epoch, last = _POSITIONS.decode(value) if value else (0, 0)
            if epoch == mine.epoch and last >= number:
                return
            transaction.set(self._written, _ENCODE((mine.epoch, number)))
            self._write(transaction, effect)

        await self._engine.run(work, durable=effect.durable)

    def _write(self, transaction: ReadWrite, effect: Persist) -> None:
        for node in effect.nodes:
            transaction.set(self._node + _NUMBER.pack(node.id), _ENCODE(node))
        for number in effect.dropped:
            transaction.clear(self._node + _NUMBER.pack(number))
        for chain in effect.chains:
            transaction.set(self._chain + _NUMBER.pack(chain.id), _ENCODE(chain))
        if effect.reserved:
            transaction.set(self._reserved, _ENCODE(effect.reserved))
        if effect.lease_ns:
            transaction.set(self._lease, _ENCODE(effect.lease_ns))

    async def _read(self, transaction: ReadWrite) -> Loaded:
        reserved = await transaction.get(self._reserved)
        lease = await transaction.get(self._lease)
        identity = await transaction.get(self._identity)
        nodes = await transaction.get_range(*span_of(self._node))
        chains = await transaction.get_range(*span_of(self._chain))
        return Loaded(
            nodes=tuple(_NODES.decode(value) for _, value in nodes),
            chains=tuple(_CHAINS.decode(value) for _, value in chains),
            reserved=RoutingVersion(_INTEGER.decode(reserved) if reserved else 0),
            lease_ns=_INTEGER.decode(lease) if lease else 0,
            identity=_INTEGER.decode(identity) if identity else 0,
        )

    async def _read_leader(self, transaction: ReadWrite) -> LeaseRecord | None:
        value = await transaction.get(self._leader)
        try:
            return _LEADERS.decode(value) if value else None
        except msgspec.MsgspecError as problem:
            raise _damaged(problem) from None

    async def _check_name(self, transaction: ReadWrite) -> bool:
        """Tell whether the store has a name already; refuse that of another cluster."""
        if await transaction.get(LOADING_KEY) is not None:
            raise EmberfsError(
                Code.WRONG_CLUSTER, "a load into the store did not finish; clear it and load again"
            )
        known = await transaction.get(self._cluster)
        if known is not None and known.decode("utf-8", "replace") != self._cluster_name:
            raise EmberfsError(
                Code.WRONG_CLUSTER,
                f'the store belongs to cluster "{known.decode("utf-8", "replace")}", the '
                f'configuration says "{self._cluster_name}": set another "data" or "store", or '
                'the right "cluster"',
            )
        return known is not None

    async def _fence(self, transaction: ReadWrite, mine: LeaseRecord) -> None:
        stored = await self._read_leader(transaction)
        if stored is None or not _same(stored, mine):
            raise EmberfsError(Code.NOT_PRIMARY, not_primary(mine.node, stored))


def not_primary(own: int, record: LeaseRecord | None) -> str:
    """Say that this mgmtd does not lead, and who does as far as is known."""
    message = f"mgmtd {own} does not lead"
    if record is None or record.node == own:
        return f"{message}; no other is known to"
    return f"{message}; mgmtd {record.node} at {record.address} did when last seen"


def _same(stored: LeaseRecord, mine: LeaseRecord) -> bool:
    return (stored.epoch, stored.incarnation) == (mine.epoch, mine.incarnation)


def _damaged(problem: msgspec.MsgspecError) -> EmberfsError:
    return EmberfsError(
        Code.DISK, f"a stored record of mgmtd is damaged ({problem}); restore a backup"
    )
