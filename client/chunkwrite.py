"""Updating chunks through the head of their chain, exactly once.

Rules: (1) at most one update of a chunk is in flight in this client, in the order of the calls;
(2) every try of an update carries the same tag; (3) a channel serves one update at a time and its
sequences only rise; (4) after an update that failed or was cancelled the chunk keeps that channel,
so that the next update of the chunk, with a higher sequence on it, makes a late duplicate void.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from emberfs.client import metrics
from emberfs.client.nodecalls import NodeCalls, RoutingView
from emberfs.client.patience import Patience
from emberfs.fabric.region import Buffer, view_of
from emberfs.proto.cluster import ChainTarget, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import (
    SECOND,
    ChainId,
    ChainVersion,
    ChunkId,
    InodeId,
    NodeId,
    TargetId,
)
from emberfs.proto.storage_calls import (
    FLUSH,
    FLUSH_TARGETS_MAX,
    LIST,
    UPDATE,
    ChunkRow,
    FlushAnswer,
    FlushRequest,
    ListRequest,
    UpdateAnswer,
    UpdateKind,
    UpdateRequest,
    WriteTag,
)
from emberfs.runtime.checksum import crc32c
from emberfs.runtime.env import Env

UPDATES_MAX = 64  # in flight in this client
# The head answers when the tail has committed; a dead member delays that by mgmtd's lease.
ATTEMPT_NS = 8 * SECOND
FLUSH_ATTEMPT_NS = 20 * SECOND
CHANNELS_MAX = 65_535
TAINTED_MAX = 4_096  # chunks whose channel is kept; far fewer give up at the same time


@dataclass(frozen=True, slots=True)
class Update:
    """What to do to a chunk."""

    chain: ChainId
    chunk: ChunkId
    kind: UpdateKind
    offset: int
    length: int
    chunk_bytes: int
    source: Buffer | None = None
    inode: InodeId | None = None  # of the file that is written: asked about before each try


@dataclass(slots=True)
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Channels:
    """Channel numbers for tags (rules 3 and 4)."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 1
        self._kept: dict[ChunkId, int] = {}
        self._sequence = itertools.count(1)

    def take(self, chunk: ChunkId) -> tuple[int, int]:
        """Return (channel, sequence) for one update of this chunk."""
        channel = self._kept.pop(chunk, 0)
        if not channel:
            channel = self._free.pop() if self._free else self._next
            if channel == self._next:
                self._next += 1
        assert channel <= CHANNELS_MAX
        return channel, next(self._sequence)

    def give(self, channel: int) -> None:
        """The update has ended with a known outcome."""
        self._free.append(channel)

    def keep(self, chunk: ChunkId, channel: int) -> None:
        """The update may still arrive: reserve the channel for the next update of this chunk."""
        self._kept[chunk] = channel
        if len(self._kept) > TAINTED_MAX:
            self._free.append(self._kept.pop(next(iter(self._kept))))


class ChunkWriter:
    """Performs updates, listings and flushes."""

    def __init__(self, env: Env, routing: RoutingView, nodes: NodeCalls, client_id: int) -> None:
        self._env = env
        self._routing = routing
        self._nodes = nodes
        self._client_id = client_id
        self._channels = Channels()
        self._turns: dict[ChunkId, _Turn] = {}
        self._slots = asyncio.Semaphore(UPDATES_MAX)
        self.before_write: Callable[[InodeId], Awaitable[None]] | None = None  # at every try

    # ------------------------------------------------------------ updates

    async def update(self, update: Update, timeout_ns: int) -> UpdateAnswer:
        """Perform one update. Order among updates of one chunk is the order of the calls.

        Raises NO_SPACE and other final errors, INTERNAL when a newer write of this client has
        replaced it, TIMEOUT with the last cause (the outcome is then unknown).
        """
        began_ns = self._env.now_ns()
        patience = Patience(
            self._env,
            self._routing,
            _describer(update),
            timeout_ns=timeout_ns,
            attempt_ns=ATTEMPT_NS,
        )
        async with self._turn_on(update.chunk, timeout_ns):
            channel, sequence = self._channels.take(update.chunk)
            try:
                tag = WriteTag(self._client_id, channel, sequence)
                answer = await self._until_done(update, tag, patience)
            except BaseException:  # also when cancelled: some try of it may still be on its way
                self._channels.keep(update.chunk, channel)
                raise
            self._channels.give(channel)
        metrics.UPDATE_SECONDS.observe((self._env.now_ns() - began_ns) / SECOND)
        metrics.UPDATE_BYTES.inc(update.length if update.source is not None else 0)
        return answer

    async def _until_done(self, update: Update, tag: WriteTag, patience: Patience) -> UpdateAnswer:
        source = update.source
        checksum = crc32c(view_of(source)) if source is not None else 0
        while True:
            snapshot = self._routing.snapshot
            try:
                if self.before_write is not None and update.inode is not None:
                    await self.before_write(update.inode)
                version, head = _head_of(snapshot, update.chain)
                request = UpdateRequest(
                    target=head.target,
                    chain_version=version,
                    chunk=update.chunk,
                    kind=update.kind,
                    offset=update.offset,
                    length=update.length,
                    tag=tag,
                    chunk_bytes=update.chunk_bytes,
                    checksum=checksum,
                )
                reply = await self._nodes.call(
                    head.node,
                    UPDATE.number,
                    UPDATE.encode_request(request),
                    sources=() if source is None else (source,),
                    timeout_ns=patience.attempt_ns(),
                    still_good=_still_head(update.chain, head.target),
                )
                return UPDATE.decode_answer(reply.body)
            except EmberfsError as problem:
                if problem.code == Code.SUPERSEDED:
                    raise EmberfsError(
                        Code.INTERNAL, f"update of chunk {update.chunk.hex()} came too late"
                    ) from problem
                metrics.RETRIES.labels(problem.code.name).inc()
                patience.note(problem)
                await patience.pause(problem, snapshot.version)

    @asynccontextmanager
    async def _turn_on(self, chunk: ChunkId, timeout_ns: int) -> AsyncIterator[None]:
        """First come, first served, per chunk (asyncio.Lock is fair); then one of the slots.

        TIMEOUT when those before take too long: nothing has been sent then.
        """
        turn = self._turns.get(chunk)
        if turn is None:
            turn = self._turns[chunk] = _Turn()
        turn.users += 1
        try:
            if turn.lock.locked() or self._slots.locked():
                await self._wait_for(turn.lock, timeout_ns)
            else:  # at once: neither waits
                await self._enter(turn.lock)
            try:
                yield
            finally:
                self._slots.release()
                turn.lock.release()
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[chunk]

    async def _wait_for(self, lock: asyncio.Lock, timeout_ns: int) -> None:
        try:
            async with asyncio.timeout(timeout_ns / SECOND):
                await self._enter(lock)
        except TimeoutError:
            text = f"earlier updates have not ended for {timeout_ns / SECOND:.1f} s"
            raise EmberfsError(Code.TIMEOUT, f"{text}; this one was not sent") from None

    async def _enter(self, lock: asyncio.Lock) -> None:
        await lock.acquire()
        try:
            await self._slots.acquire()
        except BaseException:
            lock.release()
            raise

    # ------------------------------------------------------------ listing

    async def rows(
        self, chain: ChainId, start: bytes, stop: bytes, limit: int, timeout_ns: int
    ) -> tuple[ChunkRow, ...]:
        """The first chunks of a range as the head has them, pending ones included."""
        patience = Patience(
            self._env,
            self._routing,
            lambda: f"list of chunks on chain {chain}",
            timeout_ns=timeout_ns,
            attempt_ns=ATTEMPT_NS,
        )
        while True:
            snapshot = self._routing.snapshot
            try:
                _, head = _head_of(snapshot, chain)
                request = ListRequest(
                    target=head.target, start=start, stop=stop, limit=limit, serving_only=True
                )
                reply = await self._nodes.call(
                    head.node,
                    LIST.number,
                    LIST.encode_request(request),
                    timeout_ns=patience.attempt_ns(),
                    still_good=_still_head(chain, head.target),
                )
                answer = LIST.decode_answer(reply.body)
                if not answer.rows and answer.next:  # a page of nothing: go on behind it
                    start = answer.next
                    continue
                return answer.rows
            except EmberfsError as problem:
                metrics.RETRIES.labels(problem.code.name).inc()
                patience.note(problem)
                await patience.pause(problem, snapshot.version)

    # ------------------------------------------------------------ flush

    async def flush(
        self, chains: Sequence[ChainId], timeout_ns: int
    ) -> dict[ChainId, ChainVersion]:
        """Flush every writable target of the chains; again those whose chain changed meanwhile.

        Returns at which version each chain last lost what was not flushed, as a target knows best.
        """
        patience = Patience(
            self._env,
            self._routing,
            lambda: f"flush of {len(chains)} chains",
            timeout_ns=timeout_ns,
            attempt_ns=FLUSH_ATTEMPT_NS,
        )
        left, lost = set(chains), dict.fromkeys(chains, ChainVersion(0))
        while left:
            snapshot = self._routing.snapshot
            problem = await self._flush_once(snapshot, left, patience, lost)
            now = self._routing.snapshot
            if problem is not None:
                metrics.RETRIES.labels(problem.code.name).inc()
                patience.note(problem)
                await patience.pause(problem, snapshot.version)
            elif now.version != snapshot.version:
                left = {c for c in left if now.chains.get(c) != snapshot.chains.get(c)}
            else:
                break
        return lost

    async def _flush_once(
        self,
        snapshot: RoutingSnapshot,
        left: set[ChainId],
        patience: Patience,
        lost: dict[ChainId, ChainVersion],
    ) -> EmberfsError | None:
        """One FLUSH per node; takes the chains that are flushed everywhere out of `left`.

        Chains that moved while it ran stay in. Returns a cause if one failed. Raises in `lost` what
        targets have told.
        """
        chain_of: dict[TargetId, ChainId] = {}
        by_node: dict[NodeId, list[TargetId]] = {}
        for chain_id in left:
            try:
                _head_of(snapshot, chain_id)
            except EmberfsError as problem:
                return problem
            for place in snapshot.chains[chain_id].writable():
                by_node.setdefault(place.node, []).append(place.target)
                chain_of[place.target] = chain_id

        def unmoved(now: RoutingSnapshot) -> bool:
            # A chain that moves is flushed again; whoever has left it may not answer for long.
            return all(now.chains.get(chain) == snapshot.chains[chain] for chain in left)

        def heard(answer: FlushAnswer) -> None:
            # A target of before `lost` was known names none: it has been told of none either.
            for target, version in zip(answer.targets, answer.lost, strict=False):
                chain = chain_of.get(target)
                if chain is not None:
                    lost[chain] = max(lost[chain], version)

        outcomes = await asyncio.gather(
            *(
                self._flush_node(node, targets, patience, unmoved, heard)
                for node, targets in by_node.items()
            )
        )
        problems = {n: p for n, p in zip(by_node, outcomes, strict=True) if p is not None}
        if not problems:
            return None
        for chain_id in list(left):
            chain = snapshot.chains[chain_id]
            clean = all(place.node not in problems for place in chain.writable())
            if clean and self._routing.snapshot.chains.get(chain_id) == chain:
                left.discard(chain_id)
        return next(iter(problems.values()))

    async def _flush_node(
        self,
        node: NodeId,
        targets: list[TargetId],
        patience: Patience,
        still_good: Callable[[RoutingSnapshot], bool],
        heard: Callable[[FlushAnswer], None],
    ) -> EmberfsError | None:
        for first in range(0, len(targets), FLUSH_TARGETS_MAX):
            part = tuple(sorted(targets)[first : first + FLUSH_TARGETS_MAX])
            body = FLUSH.encode_request(FlushRequest(targets=part))
            metrics.FLUSHES.inc()
            try:
                reply = await self._nodes.call(
                    node,
                    FLUSH.number,
                    body,
                    timeout_ns=patience.attempt_ns(),
                    still_good=still_good,
                )
                heard(FLUSH.decode_answer(reply.body))
            except EmberfsError as problem:
                return problem
        return None


def _head_of(snapshot: RoutingSnapshot, chain_id: ChainId) -> tuple[ChainVersion, ChainTarget]:
    """Return (chain version, head). NOT_SERVING while nothing serves."""
    chain = snapshot.chains.get(chain_id)
    if chain is None:
        raise EmberfsError(Code.NOT_SERVING, f"chain {chain_id} is not known to mgmtd")
    head = chain.head()
    if head is None:
        raise EmberfsError(Code.NOT_SERVING, f"no replica of chain {chain_id} serves")
    return chain.version, head


def _still_head(chain_id: ChainId, target: TargetId) -> Callable[[RoutingSnapshot], bool]:
    def still_head(snapshot: RoutingSnapshot) -> bool:
        chain = snapshot.chains.get(chain_id)
        head = chain.head() if chain is not None else None
        return head is not None and head.target == target

    return still_head


def _describer(update: Update) -> Callable[[], str]:
    return lambda: f"{update.kind.name} of chunk {update.chunk.hex()} on chain {update.chain}"
