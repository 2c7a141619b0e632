"""One mgmtd leads at a time, and what it publishes is stored already and never goes back.

Looks at all mgmtd every few virtual milliseconds, from outside: no message and no clock of theirs
is involved.
"""

import asyncio
import struct
from typing import TYPE_CHECKING, Any

import msgspec

from emberfs.kv.keys import Prefix
from emberfs.proto.cluster import Chain, RoutingSnapshot
from sim.check_versions import Seen, check_versions
from sim.violation import Violation

if TYPE_CHECKING:
    from sim.cluster import World

LOOK_S = 0.02
_PREFIX = bytes(Prefix.MGMTD.value)
_NUMBER = struct.Struct(">I")


class ManagersWatch:
    """What was seen of the management services of one world."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._last: RoutingSnapshot | None = None
        self._seen: list[Seen] = []
        self._found: list[Violation] = []

    async def run(self) -> None:
        """Look again and again."""
        while True:
            self._look()
            await asyncio.sleep(LOOK_S)

    def violations(self) -> list[Violation]:
        """Everything that was wrong; of each kind the first."""
        first = {violation.rule: violation for violation in reversed(self._found)}
        return [*first.values(), *check_versions(self._seen, published={"published"})]

    def _look(self) -> None:
        leaders = [m for m in self._world.mgmtd if m.running and m.service and m.service.leads]
        if len(leaders) > 1:
            names = ", ".join(machine.name for machine in leaders)
            self._found.append(Violation("two primaries", f"{names} at {self._now_s():.6f} s"))
        for machine in leaders:
            snapshot = machine.service.snapshot
            if snapshot is not self._last:
                self._last = snapshot
                self._check(machine.name, snapshot)

    def _now_s(self) -> float:
        return self._world.loop.time()

    def _check(self, name: str, snapshot: RoutingSnapshot) -> None:
        content = repr(sorted(snapshot.chains.items()))
        now_ns = self._world.loop.now_ns()
        self._seen.append(Seen(name, "published", "", snapshot.version, now_ns, content))
        for chain in snapshot.chains.values():
            self._seen.append(
                Seen(name, "published", f"chain {chain.id}", chain.version, now_ns, repr(chain))
            )
            stored = self._stored(b"chain/" + _NUMBER.pack(chain.id), Chain)
            if stored is None or stored.version < chain.version:
                self._unstored(name, f"chain {chain.id} version {chain.version}")
        reserved = self._stored(b"reserved", int)
        if reserved is None or reserved < snapshot.version:
            self._unstored(name, f"routing version {snapshot.version}")

    def _stored(self, key: bytes, kind: type[Any]) -> Any:
        rows = self._world.kv.disk.stores["/kv"]
        value = rows.get(_PREFIX + key)
        return msgspec.msgpack.decode(value, type=kind) if value is not None else None

    def _unstored(self, name: str, what: str) -> None:
        text = f"{name} publishes {what} at {self._now_s():.6f} s, something older is stored"
        self._found.append(Violation("published unstored", text))
