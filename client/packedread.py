"""Reads that were planned by compiled code: one attempt each, at the replicas whose turn it is.

A table tells the compiled code for every chain of a layout who serves it (see `table`), `costs` how
busy the nodes are. What fails is left to the caller, who reads it in the common way (chunkread.py):
that one has the patience and the reasons.
"""

import asyncio
import struct
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from emberfs.client import metrics
from emberfs.client.chunkread import ATTEMPT_NS, ATTEMPT_NS_PER_BYTE, BYTES_MAX, ChunkReader
from emberfs.client.nodecalls import NodeCalls, RoutingView, StartedCall
from emberfs.fabric.call import Reply
from emberfs.fabric.sinks import PackedSinks
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Layout
from emberfs.proto.ids import MS, SECOND, ChainId, NodeId
from emberfs.proto.storage_calls import READ_BATCH
from emberfs.runtime.env import Env

__all__ = ["BYTES_MAX", "PackedReader"]

_HEAD = struct.Struct("<II")  # chains, places for replicas of each
_COUNT = struct.Struct("<I")  # replicas that serve
_REPLICA = struct.Struct("<III")  # target, chain version, number of its node here
_WIDTH_MAX = 16
_COST_MAX = (1 << 32) - 1
_TABLES_MAX = 4096
_CANCELLED = EmberfsError(Code.CANCELLED, "cancelled by the caller")

Done: TypeAlias = Callable[[Reply | None], None]  # None: it failed


class PackedReader:
    """Performs packed READ_BATCH calls."""

    def __init__(
        self, env: Env, routing: RoutingView, nodes: NodeCalls, reader: ChunkReader
    ) -> None:
        self._env = env
        self._routing = routing
        self._calls = nodes
        self._reader = reader
        self._nodes: list[NodeId] = []
        self._numbers: dict[NodeId, int] = {}
        self._tables: dict[tuple[ChainId, ...], bytes] = {}
        self._turn = 0
        self._tables_of = -1  # the version of the routing that they are of

    def table(self, layout: Layout) -> bytes:
        """Who serves the chains of a layout, as compiled code reads it."""
        version = self._routing.snapshot.version
        if version != self._tables_of or len(self._tables) >= _TABLES_MAX:
            self._tables.clear()
            self._tables_of = version
        found = self._tables.get(layout.chains)
        if found is None:
            found = self._tables[layout.chains] = self._make(layout.chains)
        return found

    def _make(self, chains: tuple[ChainId, ...]) -> bytes:
        serving = [self._reader.serving(chain)[:_WIDTH_MAX] for chain in chains]
        width = max(map(len, serving))
        parts = [_HEAD.pack(len(chains), width)]
        for chain, places in zip(chains, serving, strict=True):
            parts.append(_COUNT.pack(len(places)))
            for place in places:
                version = self._routing.snapshot.chains[chain].version
                parts.append(_REPLICA.pack(place.target, version, self._number(place.node)))
            parts.append(bytes((width - len(places)) * _REPLICA.size))
        return b"".join(parts)

    def _number(self, node: NodeId) -> int:
        number = self._numbers.get(node)
        if number is None:
            number = self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return number

    def next_turn(self) -> int:
        """Which node is asked first by a batch, of those that serve as much of it."""
        self._turn = (self._turn + 1) & 0xFFFF_FFFF
        return self._turn

    def costs(self) -> bytes:
        """How busy each node is, by its number (packed u32)."""
        cost = self._reader.cost
        return array("I", [min(cost(node), _COST_MAX) for node in self._nodes]).tobytes()

    def start(
        self, number: int, operations: bytes, sinks: PackedSinks, done: Done
    ) -> tuple[asyncio.Future[Any], Callable[[], object]]:
        """Begin one call at the node of that number; `done` is called when it has ended.

        Returns a future that is done by then, and what makes it end soon. The memory is at rest
        only then.
        """
        node, began_ns = self._nodes[number], self._env.now_ns()
        timeout_ns = ATTEMPT_NS + sinks.length * ATTEMPT_NS_PER_BYTE + 10 * MS
        try:
            call = self._calls.start(
                node, READ_BATCH, operations, sinks=sinks, timeout_ns=timeout_ns
            )
        except EmberfsError:  # of no use for anybody: who reads it one by one hears why
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda _: done(None))
            future.set_result(None)
            return future, lambda: None
        if call is None:
            working = asyncio.ensure_future(
                self._calls.call(node, READ_BATCH, operations, sinks=sinks, timeout_ns=timeout_ns)
            )
            working.add_done_callback(partial(self._ended, node, began_ns, sinks.length, done))
            return working, working.cancel
        call.future.add_done_callback(
            partial(self._started_ended, call, began_ns, sinks.length, done)
        )
        return call.future, partial(call.give_up, _CANCELLED)

    def _started_ended(
        self,
        call: StartedCall,
        began_ns: int,
        length: int,
        done: Done,
        future: asyncio.Future[Reply],
    ) -> None:
        self._calls.release(call)
        self._ended(call.node, began_ns, length, done, future)

    def _ended(
        self, node: NodeId, began_ns: int, length: int, done: Done, future: asyncio.Future[Reply]
    ) -> None:
        problem = None if future.cancelled() else future.exception()
        if problem is not None or future.cancelled():
            if isinstance(problem, EmberfsError):
                self._reader.failed(node, problem)
            done(None)
            return
        self._reader.answered(node)
        metrics.READ_CALLS.inc()
        metrics.READ_BYTES.inc(length)
        metrics.READ_SECONDS.observe((self._env.now_ns() - began_ns) / SECOND)
        done(future.result())
