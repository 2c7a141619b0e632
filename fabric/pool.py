"""Connections of one process to its servers: chosen, kept, and made again after a loss."""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from emberfs.fabric.call import Peer
from emberfs.fabric.endpoint import Transport
from emberfs.fabric.transports import TRANSPORTS
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND
from emberfs.runtime.env import Env
from emberfs.runtime.retry import Backoff
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.fabric.pool")

CONNECT_NS = 1 * SECOND  # for all endpoints of a server together
RETRY_FIRST_NS = 5 * MS
RETRY_MAX_NS = 250 * MS


class PeerChoice(NamedTuple):
    """Which transport carries the calls to one server, and why."""

    endpoints: tuple[str, ...]
    transport: str  # "" while there is no connection
    reason: str


@dataclass(slots=True, eq=False)
class _Entry:
    """One server."""

    endpoints: tuple[str, ...]
    backoff: Backoff
    peer: Peer | None = None
    dialling: asyncio.Task[Peer | EmberfsError] | None = None
    reason: str = "not connected yet"
    failure: EmberfsError | None = None
    retry_ns: int = 0  # until then `failure` stands


class PeerPool:
    """At most one connection to each server.

    Measured on loopback: further connections gained nothing (both ends are bound by one core of
    Python), so there is one.
    """

    def __init__(self, env: Env, transports: Mapping[str, Transport] = TRANSPORTS) -> None:
        self._env = env
        self._transports = transports
        self._entries: dict[tuple[str, ...], _Entry] = {}
        self._tasks = TaskSet()
        self._closed = False

    def ready(self, endpoints: tuple[str, ...]) -> Peer | None:
        """Return the connection to a server if there is one."""
        entry = self._entries.get(endpoints)
        return None if entry is None or entry.peer is None or entry.peer.closed else entry.peer

    async def get(self, endpoints: Sequence[str]) -> Peer:
        """Return a connection to the server with these endpoints, making one if needed.

        Raises UNREACHABLE (with the cause for every endpoint) within `CONNECT_NS`; after a failure
        at once for some milliseconds, so that a dead server costs its callers little.
        """
        key = tuple(endpoints)
        entry = self._entries.get(key)
        if entry is not None and entry.peer is not None and not entry.peer.closed:
            return entry.peer
        if self._closed:
            raise EmberfsError(Code.SHUTTING_DOWN, "the connection pool is closed")
        if entry is None:
            entry = self._entries[key] = _Entry(key, Backoff(RETRY_FIRST_NS, RETRY_MAX_NS))
        if entry.dialling is None:
            if entry.failure is not None and self._env.now_ns() < entry.retry_ns:
                raise EmberfsError(entry.failure.code, entry.failure.message)
            entry.dialling = self._tasks.spawn(self._connect(entry), name="fabric-connect")
        dialling = entry.dialling
        try:
            # One caller may be cancelled, the others still want the connection.
            outcome = await asyncio.shield(dialling)
        except asyncio.CancelledError:
            if self._closed and dialling.cancelled():
                raise EmberfsError(Code.SHUTTING_DOWN, "the pool was closed meanwhile") from None
            raise
        if isinstance(outcome, EmberfsError):
            raise EmberfsError(outcome.code, outcome.message)
        return outcome

    def choices(self) -> list[PeerChoice]:
        """Return what was chosen for each server, for `status`."""
        return [
            PeerChoice(
                entry.endpoints,
                entry.peer.transport if entry.peer is not None and not entry.peer.closed else "",
                entry.reason,
            )
            for entry in self._entries.values()
        ]

    async def close(self) -> None:
        """Close all connections; pending calls fail with DISCONNECTED."""
        self._closed = True
        await self._tasks.close()
        for entry in self._entries.values():
            if entry.peer is not None:
                await entry.peer.close()
        self._entries.clear()

    async def _connect(self, entry: _Entry) -> Peer | EmberfsError:
        """Dial; the failure is a result, since it may be that nobody waits for it any more."""
        reasons: list[str] = []
        try:
            async with asyncio.timeout(CONNECT_NS / 1e9):
                peer = await self._dial_any(entry, reasons)
        except TimeoutError:
            reasons.append(f"no answer within {CONNECT_NS // MS} ms")
            peer = None
        finally:
            entry.dialling = None
        if peer is None:
            entry.reason = "; ".join(reasons)
            names = ", ".join(entry.endpoints) or "a server without endpoints"
            entry.failure = EmberfsError(
                Code.UNREACHABLE, f"cannot connect to {names}: {entry.reason}"
            )
            entry.retry_ns = self._env.now_ns() + entry.backoff.next_ns(self._env.random)
            return entry.failure
        entry.backoff.reset()
        entry.failure = None
        entry.peer = peer
        entry.reason = "; ".join([self._transports[peer.transport].merit, *reasons])
        log.info("connected to %s (%s)", peer.endpoint, entry.reason)
        return peer

    async def _dial_any(self, entry: _Entry, reasons: list[str]) -> Peer | None:
        """Try the endpoints, those of the best transport first."""
        for scheme, transport in self._transports.items():
            for endpoint in entry.endpoints:
                if endpoint.partition("://")[0] != scheme:
                    continue
                try:
                    refusal = transport.refusal(self._env, endpoint)
                    if not refusal:
                        return await transport.dial(self._env, endpoint)
                except EmberfsError as problem:
                    refusal = str(problem)
                except OSError as problem:
                    refusal = os.strerror(problem.errno) if problem.errno else str(problem)
                reasons.append(f"{scheme}: {refusal}")
        known = [e for e in entry.endpoints if e.partition("://")[0] in self._transports]
        if not known:
            reasons.append("no endpoint of a transport that this side has")
        return None
