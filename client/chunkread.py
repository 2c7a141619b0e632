"""Reading pieces of chunks from any serving replica.

Pieces are grouped by node into READ_BATCH calls; small reads of several callers share one
(combine.py). A piece that fails at one replica goes to the next
at once; when every replica failed it waits for newer routing, until the deadline. A node that died
or did not answer is avoided for a while, as long as another replica serves.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberfs.client import metrics
from emberfs.client.combine import Combiner
from emberfs.client.gather import gather_all
from emberfs.client.nodecalls import NodeCalls, RoutingView
from emberfs.client.patience import Patience
from emberfs.fabric.call import Reply
from emberfs.fabric.region import Buffer, Slice, length_of, view_of
from emberfs.proto.cluster import ChainTarget
from emberfs.proto.errors import Code, EmberfsError, Reaction, code_of
from emberfs.proto.files import Layout, chunks_of, pieces
from emberfs.proto.ids import (
    MS,
    SECOND,
    ChainId,
    ChunkId,
    InodeId,
    KiB,
    MiB,
    NodeId,
    RoutingVersion,
    TargetId,
    pack_chunk_id,
)
from emberfs.proto.storage_calls import (
    READ_BATCH,
    ReadOp,
    pack_read_ops,
    unpack_read_results,
)
from emberfs.runtime.env import Env

OPS_MAX = 256  # per call
BYTES_MAX = 16 * MiB  # per call
PIECE_BYTES_MAX = 4 * MiB  # a larger piece of a chunk is read as several, in parallel
ATTEMPT_NS = 1 * SECOND
ATTEMPT_NS_PER_BYTE = 30  # a slow link of 33 MB/s is not a dead server
SUSPECT_FIRST_NS = 1 * SECOND
SUSPECT_MAX_NS = 15 * SECOND
SHARED_BYTES_MAX = 16 * KiB  # a read up to this size may share a call with others
LEAN = 8  # calls in flight by which a replica may be busier than another before it loses its turn

_LOST = {Code.TIMEOUT, Code.DISCONNECTED, Code.UNREACHABLE, Code.SHUTTING_DOWN}
_ZEROS = memoryview(bytes(1 * MiB))


def part_of(buffer: Buffer, start: int, length: int) -> Buffer:
    """A part of a buffer, of the same kind (a Slice stays mappable)."""
    if isinstance(buffer, Slice):
        return Slice(buffer.region, buffer.offset + start, length)
    return buffer[start : start + length]


def clear(view: memoryview) -> None:
    """Fill with zeros."""
    step = len(_ZEROS)
    for at in range(0, len(view), step):
        part = view[at : at + step]
        part[:] = _ZEROS[: len(part)]


@dataclass(slots=True)
class Job:
    """One piece to read."""

    chain: ChainId
    chunk: ChunkId
    offset: int  # bytes in the chunk
    length: int
    sink: Buffer
    spread: int  # which replica comes first
    place: ChainTarget | None = None  # the replica of the current attempt
    version: int = 0  # its chain version
    tried: frozenset[TargetId] = frozenset()  # failed since every replica was tried
    refuted: frozenset[TargetId] = frozenset()  # whose checksums refute what they hold


@dataclass(slots=True)
class _Failure:
    job: Job
    problem: EmberfsError


def jobs_of(inode: InodeId, layout: Layout, offset: int, sink: Buffer) -> list[Job]:
    """Cut one read into jobs whose sinks are parts of the caller's buffer."""
    chunk_bytes, chains, size = layout.chunk_bytes, layout.chains, length_of(sink)
    index, within = divmod(offset, chunk_bytes)
    if offset >= 0 and 0 < size <= min(PIECE_BYTES_MAX, chunk_bytes - within):
        spread = (inode * 2654435761 + index) & 0x7FFF_FFFF
        chunk, chain = pack_chunk_id(chunks_of(inode, layout), index), chains[index % len(chains)]
        return [Job(chain, chunk, within, size, sink, spread)]
    found: list[Job] = []
    for piece in pieces(inode, layout, offset, size):
        spread = (inode * 2654435761 + piece.chunk_index) & 0x7FFF_FFFF
        for at in range(0, piece.length, PIECE_BYTES_MAX):
            length = min(PIECE_BYTES_MAX, piece.length - at)
            part = part_of(sink, piece.start + at, length)
            found.append(Job(piece.chain, piece.chunk, piece.offset + at, length, part, spread))
    return found


class ChunkReader:
    """Performs read jobs."""

    def __init__(self, env: Env, routing: RoutingView, nodes: NodeCalls) -> None:
        self._env = env
        self._routing = routing
        self._nodes = nodes
        self._suspects: dict[NodeId, tuple[int, int]] = {}  # node -> (avoid until, for how long)
        self._serving: dict[ChainId, tuple[ChainTarget, ...]] = {}  # of snapshot _serving_of
        self._serving_of = -1
        self._small = 0  # small reads under way
        self._combiner: Combiner[Job] = Combiner(self._attempt_shared)

    async def read(self, jobs: Sequence[Job], timeout_ns: int) -> None:
        """Fill every sink completely. Raises TIMEOUT with the last cause, or what is final."""
        if not jobs:
            return
        if len(jobs) > 1 or jobs[0].length > SHARED_BYTES_MAX or timeout_ns <= ATTEMPT_NS:
            await self._read(jobs, timeout_ns)
            return
        self._small += 1
        try:
            if self._small > 1:
                began_ns = self._env.now_ns()
                if await self._shared(jobs[0]):
                    return
                timeout_ns -= self._env.now_ns() - began_ns
            await self._read(jobs, timeout_ns)
        finally:
            self._small -= 1

    async def _read(self, jobs: Sequence[Job], timeout_ns: int) -> None:
        began_ns = self._env.now_ns()
        batches, stuck = self._plan(jobs)
        works = [self._drive(batch, timeout_ns) for batch in batches]
        if stuck:
            works.append(self._drive([failure.job for failure in stuck], timeout_ns, stuck))
        await gather_all(works)
        metrics.READ_SECONDS.observe((self._env.now_ns() - began_ns) / SECOND)

    async def _shared(self, job: Job) -> bool:
        """Read by a call that others share; False: not done, it has to be read alone.

        Alone is also how a failure is dealt with, from the first replica on.
        """
        place = self._joined(job) or self._choose(job)
        if place is None:
            return False
        job.place, job.version = place, self._routing.snapshot.chains[job.chain].version
        return await self._combiner.share(place.node, job)

    def _joined(self, job: Job) -> ChainTarget | None:
        """A replica at a node that a call is just being gathered for."""
        for place in self.serving(job.chain):
            if self._combiner.gathers_for(place.node) and self.cost(place.node) <= LEAN:
                return place
        return None

    async def _attempt_shared(self, jobs: list[Job]) -> list[bool]:
        """One call for jobs of several readers, that were given the same node."""
        began_ns = self._env.now_ns()
        failures = await self._attempt(jobs, ATTEMPT_NS + _extra_ns(jobs))
        metrics.READ_SECONDS.observe((self._env.now_ns() - began_ns) / SECOND)
        if not failures:
            return [True] * len(jobs)
        failed = {id(failure.job) for failure in failures}
        return [id(job) not in failed for job in jobs]

    async def _drive(
        self, jobs: list[Job], timeout_ns: int, stuck: list[_Failure] | None = None
    ) -> None:
        """Try jobs that were planned as one batch (or are `stuck` yet) until all are done."""
        began_ns, seen = self._env.now_ns(), self._routing.snapshot.version
        failures = stuck
        if failures is None:
            failures = await self._attempt(jobs, min(timeout_ns, ATTEMPT_NS + _extra_ns(jobs)))
        if failures:
            patience = Patience(
                self._env,
                self._routing,
                _describer(jobs),
                timeout_ns=timeout_ns,
                attempt_ns=ATTEMPT_NS,
                began_ns=began_ns,
            )
            await self._persist(failures, patience, seen)

    async def _persist(
        self, failures: list[_Failure], patience: Patience, seen: RoutingVersion
    ) -> None:
        """Try what failed elsewhere or later until all is done."""
        while failures:
            jobs = [failure.job for failure in failures]
            if (reason := self._after(failures, patience)) is not None:
                await patience.pause(reason, seen)
            seen = self._routing.snapshot.version
            batches, failures = self._plan(jobs)
            done = await asyncio.gather(
                *(self._attempt(batch, patience.attempt_ns(_extra_ns(batch))) for batch in batches)
            )
            failures.extend(failure for part in done for failure in part)

    def _after(self, failures: list[_Failure], patience: Patience) -> EmberfsError | None:
        """Strike out the replicas that failed; return why to pause, if for some job none is left.

        Raises what is final.
        """
        reason: EmberfsError | None = None
        for job, problem in ((failure.job, failure.problem) for failure in failures):
            metrics.RETRIES.labels(problem.code.name).inc()
            patience.note(problem)
            if problem.reaction != Reaction.FAILOVER or job.place is None:
                reason = problem
                continue
            job.tried |= {job.place.target}
            serving = self.serving(job.chain)
            if problem.code == Code.CHECKSUM:
                job.refuted |= {job.place.target}
                if all(place.target in job.refuted for place in serving):
                    raise _damaged_everywhere(job)
            if all(place.target in job.tried for place in serving):
                job.tried = frozenset()
                reason = problem
        return reason

    # ------------------------------------------------------------ where to read

    def serving(self, chain_id: ChainId) -> tuple[ChainTarget, ...]:
        """The replicas of a chain that serve, as routing says now."""
        snapshot = self._routing.snapshot
        if snapshot.version != self._serving_of:
            self._serving.clear()
            self._serving_of = snapshot.version
        found = self._serving.get(chain_id)
        if found is None:
            chain = snapshot.chains.get(chain_id)
            found = self._serving[chain_id] = chain.serving() if chain is not None else ()
        return found

    def _plan(self, jobs: Sequence[Job]) -> tuple[list[list[Job]], list[_Failure]]:
        """Choose a replica for each job and group the jobs into calls."""
        chains = self._routing.snapshot.chains
        batches: list[list[Job]] = []
        room: dict[NodeId, tuple[list[Job], int]] = {}  # the batch being filled, its bytes
        chosen: dict[tuple[ChainId, int], ChainTarget | None] = {}  # for jobs that never failed
        stuck: list[_Failure] = []
        for job in jobs:
            turn = (job.chain, job.spread)
            if job.tried or turn not in chosen:
                place = self._choose(job)
                if not job.tried:
                    chosen[turn] = place
            else:
                place = chosen[turn]
            job.place = place
            if place is None:
                stuck.append(_Failure(job, _nothing_serves(job.chain)))
                continue
            job.version = chains[job.chain].version
            batch, size = room.get(place.node, ([], 0))
            if not batch or len(batch) == OPS_MAX or size + job.length > BYTES_MAX:
                batch, size = [], 0
                batches.append(batch)
            batch.append(job)
            room[place.node] = (batch, size + job.length)
        return batches, stuck

    def _choose(self, job: Job) -> ChainTarget | None:
        """The replica whose turn it is, unless it failed, is suspect, or is much busier."""
        places = self.serving(job.chain)
        if job.tried:
            places = tuple(p for p in places if p.target not in job.tried) or places
        if len(places) < 2:
            return places[0] if places else None
        first = job.spread % len(places)
        best = places[first]
        best_cost = self.cost(best.node)
        if best_cost <= LEAN:  # nobody can be so much less busy
            return best
        for step in range(1, len(places)):
            other = places[(first + step) % len(places)]
            if self.cost(other.node) + LEAN < best_cost:
                best, best_cost = other, self.cost(other.node)
        return best

    def cost(self, node: NodeId) -> int:
        """How busy a node is: calls in flight, far too many if it is suspect."""
        busy = self._nodes.in_flight.get(node, 0)
        if self._suspects:
            suspect = self._suspects.get(node)
            if suspect is not None and self._env.now_ns() < suspect[0]:
                busy += 1_000_000
        return busy

    def failed(self, node: NodeId, problem: EmberfsError) -> None:
        """A call has failed: avoid a node that is lost, for a while."""
        if problem.code not in _LOST:
            return
        _, last_ns = self._suspects.get(node, (0, SUSPECT_FIRST_NS // 2))
        for_ns = min(2 * last_ns, SUSPECT_MAX_NS)
        self._suspects[node] = (self._env.now_ns() + for_ns, for_ns)

    def answered(self, node: NodeId) -> None:
        """A call was answered: nothing is wrong with the node."""
        if self._suspects:
            self._suspects.pop(node, None)

    # ------------------------------------------------------------ one call

    async def _attempt(self, batch: list[Job], timeout_ns: int) -> list[_Failure]:
        """One READ_BATCH; returns what failed."""
        place = batch[0].place
        assert place is not None
        body = pack_read_ops(
            ReadOp(job.place.target, job.version, job.chunk, job.offset, job.length)  # type: ignore[union-attr, arg-type]
            for job in batch
        )
        try:
            reply = await self._nodes.call(
                place.node,
                READ_BATCH,
                body,
                sinks=[job.sink for job in batch],
                timeout_ns=timeout_ns,
            )
            failures = _take_results(batch, reply)
        except EmberfsError as problem:
            self.failed(place.node, problem)
            return [_Failure(job, problem) for job in batch]
        self.answered(place.node)
        metrics.READ_CALLS.inc()
        metrics.READ_BYTES.inc(sum([job.length for job in batch]))
        return failures


def _take_results(batch: list[Job], reply: Reply) -> list[_Failure]:
    """Clear what the server did not fill; return the jobs that failed. MALFORMED if it lies."""
    results = unpack_read_results(reply.body)
    if len(results) != len(batch) or len(reply.filled) != len(batch):
        raise EmberfsError(
            Code.DISCONNECTED,
            f"{len(batch)} reads got {len(results)} results and {len(reply.filled)} fills",
        )
    failures: list[_Failure] = []
    for job, result, filled in zip(batch, results, reply.filled, strict=True):
        if result.code:
            message = f"read of chunk {job.chunk.hex()} at target {job.place and job.place.target}"
            failures.append(_Failure(job, EmberfsError(code_of(result.code), message)))
        elif result.length > min(filled, job.length):
            problem = f"server claims {result.length} bytes and sent {filled} of {job.length}"
            failures.append(_Failure(job, EmberfsError(Code.DISCONNECTED, problem)))
        elif result.length < job.length:
            clear(view_of(job.sink)[result.length :])
    return failures


def _extra_ns(batch: Sequence[Job]) -> int:
    """What the bytes of a call add to the time that it may take."""
    return sum([job.length for job in batch]) * ATTEMPT_NS_PER_BYTE + 10 * MS


def _damaged_everywhere(job: Job) -> EmberfsError:
    stop = job.offset + job.length
    return EmberfsError(
        Code.CHECKSUM,
        f"chunk {job.chunk.hex()}, bytes {job.offset} to {stop}: every replica of chain "
        f"{job.chain} is damaged there; `emberfs fsck` names the file, restore it from a copy",
    )


def _nothing_serves(chain: ChainId) -> EmberfsError:
    return EmberfsError(Code.NOT_SERVING, f"no replica of chain {chain} serves")


def _describer(jobs: Sequence[Job]) -> Callable[[], str]:
    def describe() -> str:
        first = jobs[0]
        return f"read of {len(jobs)} pieces (chunk {first.chunk.hex()}, chain {first.chain})"

    return describe
