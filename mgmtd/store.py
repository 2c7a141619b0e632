"""The state of the cluster on disk: one store of mgmtd's own.

Keys: "cluster", "lease" (nanoseconds), "reserved" (version of the snapshot), "node/" + u32,
"chain/" + u32. Values are msgpack, the first two text. A change of a chain is on stable storage
before it is published; node records only survive the death of the process, since nodes register
again after a power cut.
"""

import struct
from collections.abc import Callable

import msgspec

from emberfs.kv.store import Change, OrderedStore
from emberfs.mgmtd.events import Loaded, Persist
from emberfs.proto.cluster import Chain, Node
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import RoutingVersion

_CLUSTER = b"cluster"
_LEASE = b"lease"
_RESERVED = b"reserved"
_NODE = b"node/"
_CHAIN = b"chain/"
_NUMBER = struct.Struct(">I")
_ENCODE = msgspec.msgpack.Encoder().encode
_NODES = msgspec.msgpack.Decoder(Node)
_CHAINS = msgspec.msgpack.Decoder(Chain)
_INTEGER = msgspec.msgpack.Decoder(int)


class ClusterStore:
    """Loads and stores what Membership wants to survive. All methods block."""

    def __init__(self, open_store: Callable[[], OrderedStore]) -> None:
        self._open = open_store
        self._store = open_store()

    def reopen(self) -> None:
        """Begin anew after an error: a store whose sync failed stays broken until then."""
        self._store.close()
        self._store = self._open()

    def load(self, cluster: str, lease_ns: int) -> Loaded:
        """Return what is stored, and note the lease that is promised from now on.

        The first start gives the store its cluster id. EmberfsError: WRONG_CLUSTER if the store
        belongs to another cluster, DISK if a record cannot be read.
        """
        known = self._store.get(_CLUSTER)
        if known is not None and known.decode() != cluster:
            raise EmberfsError(
                Code.WRONG_CLUSTER,
                f'the data directory belongs to cluster "{known.decode()}", the configuration says '
                f'"{cluster}": set another "data" or the right "cluster"',
            )
        try:
            loaded = self._read()
        except msgspec.MsgspecError as problem:
            raise EmberfsError(
                Code.DISK, f"a stored record of mgmtd is damaged ({problem}); restore a backup"
            ) from None
        self._store.write([(_CLUSTER, cluster.encode()), (_LEASE, _ENCODE(lease_ns))])
        self._store.sync()
        return loaded

    def _read(self) -> Loaded:
        reserved, lease = self._store.get(_RESERVED), self._store.get(_LEASE)
        return Loaded(
            nodes=tuple(_NODES.decode(value) for _, value in self._records(_NODE)),
            chains=tuple(_CHAINS.decode(value) for _, value in self._records(_CHAIN)),
            reserved=RoutingVersion(_INTEGER.decode(reserved) if reserved else 0),
            lease_ns=_INTEGER.decode(lease) if lease else 0,
        )

    def _records(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        return self._store.scan(prefix, prefix + b"\xff" * (_NUMBER.size + 1))

    def persist(self, effect: Persist) -> None:
        """Store one effect atomically; on stable storage if it says so."""
        changes: list[Change] = [(_key(_NODE, n.id), _ENCODE(n)) for n in effect.nodes]
        changes += [(_key(_NODE, number), None) for number in effect.dropped]
        changes += [(_key(_CHAIN, chain.id), _ENCODE(chain)) for chain in effect.chains]
        if effect.reserved:
            changes.append((_RESERVED, _ENCODE(effect.reserved)))
        self._store.write(changes)
        if effect.durable:
            self._store.sync()

    def close(self) -> None:
        """Release the store."""
        self._store.close()


def _key(prefix: bytes, number: int) -> bytes:
    return prefix + _NUMBER.pack(number)
