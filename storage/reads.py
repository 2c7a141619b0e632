"""Batched reads: from the page cache at once, the rest in threads, disputed chunks by the tail.

A read of the committed version takes effect when the chunk was found undisputed, even where the
bytes come from a thread later; a read of a disputed chunk when the tail answered (readrule.py).
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from emberfs.client.gather import gather_all
from emberfs.fabric.call import ServerCall
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChainVersion, ChunkId, TargetId
from emberfs.proto.storage_calls import (
    ReadOp,
    ReadResult,
    count_read_ops,
    pack_read_results,
    unpack_read_ops,
    unpack_read_results,
)
from emberfs.runtime.env import Env
from emberfs.storage.lasting import run_thread_to_end
from emberfs.storage.links import Links
from emberfs.storage.metrics import (
    READ_BYTES,
    READ_SECONDS,
    READS_FAILED,
    READS_OK,
    TAIL_QUESTIONS,
)
from emberfs.storage.plainread import DISPUTED, DONE, REFUSED, Readable, read_plainly
from emberfs.storage.readrule import ABSENT, AGAIN, ReadPlan, plan_read, settle_read
from emberfs.storage.replica import TargetReplica
from emberfs.storage.storeface import Plain

DISPUTE_NS_MAX = 2 * SECOND  # then the client is sent to another replica
COLD_LANES = 4  # threads that one call may keep busy, half of those there are
_AGAIN_PAUSE_NS = 1 * MS
_NOTHING = ReadResult(0, 0, 0)


class Reader:
    """Answers READ_BATCH and VERSION for all targets of this process."""

    def __init__(
        self,
        env: Env,
        replicas: Mapping[TargetId, TargetReplica],
        links: Links,
        lease_ok: Callable[[], bool],
        damaged: Callable[[TargetReplica, ChunkId], None],
    ) -> None:
        self._env = env
        self._replicas = replicas
        self._links = links
        self._lease_ok = lease_ok
        self._damaged = damaged

    async def read_batch(self, call: ServerCall) -> bytes:
        """The handler of READ_BATCH."""
        started_ns = self._env.now_ns()
        self._check_count(call)
        found, states = self._read_plainly(call)
        if not any(states):
            return self._all_read(call, found, started_ns)
        results = await self._read_the_rest(call, found, states, started_ns)
        self._note(self._account(call, results), started_ns)
        return pack_read_results(results)

    def read_now(self, call: ServerCall) -> bytes | None:
        """The quick handler of READ_BATCH: None if there is anything that is not plain."""
        started_ns = self._env.now_ns()
        self._check_count(call)
        found, states = self._read_plainly(call)
        return None if any(states) else self._all_read(call, found, started_ns)

    def _all_read(self, call: ServerCall, found: bytes, started_ns: int) -> bytes:
        call.fill_all()
        READS_OK.inc(call.sink_table.number)
        self._note(call.sink_bytes, started_ns)
        return found

    def _check_count(self, call: ServerCall) -> None:
        count = count_read_ops(call.body)
        if count != call.sink_table.number:
            text = f"{count} reads with {call.sink_table.number} sinks"
            raise EmberfsError(Code.MALFORMED, text)

    def _note(self, total: int, started_ns: int) -> None:
        READ_BYTES.inc(total)
        READ_SECONDS.observe((self._env.now_ns() - started_ns) / SECOND)

    async def version(self, target: TargetId, chain_version: ChainVersion, chunk: ChunkId) -> int:
        """Tell the committed version, as the tail. NOT_SERVING if we are not the tail."""
        replica = self._opened(target)
        await replica.catch_up(chain_version)
        while True:
            self._check(replica, chain_version)
            if not replica.view.tail_here:
                raise EmberfsError(Code.NOT_SERVING, f"target {target} is not the tail")
            state = replica.store.state(chunk)
            plan = plan_read(state, replica.is_exposed(chunk), replica.view)
            if plan == ReadPlan.COMMITTED:
                return state.version if state is not None else 0
            await replica.finish(chunk)

    def _opened(self, target: TargetId) -> TargetReplica:
        """Look it up anew after every wait: a failed target is closed and opened again."""
        replica = self._replicas.get(target)
        if replica is None:
            raise EmberfsError(Code.NOT_SERVING, f"target {target} is not open here")
        return replica

    # -------------------------------------------------------- the fast path

    def _read_plainly(self, call: ServerCall) -> tuple[bytes, bytes]:
        """Read what is in memory and undisputed: packed results, and what became of each."""
        tokens: dict[Plain, int] = {}

        def admit(target: int, chain_version: int) -> Readable | None:
            # Nothing is awaited here, so what holds for a target goes on to hold.
            replica = self._replicas.get(TargetId(target))
            if replica is None or not self._may_read(replica, ChainVersion(chain_version)):
                return None
            plain = replica.store.plain
            if plain not in tokens:
                tokens[plain] = plain.begin()
            return plain.readable(*replica.in_work)

        try:
            return read_plainly(call.body, call.sink_table, admit)
        finally:
            for plain, token in tokens.items():
                plain.end(token)

    def _may_read(self, replica: TargetReplica, chain_version: ChainVersion) -> bool:
        try:
            self._check(replica, chain_version)
        except EmberfsError:
            return False
        return True

    # -------------------------------------------------------- the long way

    async def _read_the_rest(
        self, call: ServerCall, found: bytes, states: bytes, started_ns: int
    ) -> list[ReadResult]:
        """Read what is not plain, by what is in the way."""
        operations, sinks = unpack_read_ops(call.body), call.sinks
        results: list[ReadResult | None] = list(unpack_read_results(found))
        places: dict[bool, list[int]] = {True: [], False: []}  # to be looked at with the chain?
        for i, state in enumerate(states):
            if state != DONE:
                results[i] = None
                places[state in (REFUSED, DISPUTED)].append(i)
        cold = self._look_closer(places[False], operations, sinks, results)
        if cold:
            await self._read_in_threads(cold, operations, sinks, results)
            self._still_ours(cold, operations, results)
        disputed = places[True]
        if disputed:
            await self._catch_up([operations[i] for i in disputed])
            deadline_ns = min(call.deadline_ns, started_ns + DISPUTE_NS_MAX)
            answers = await asyncio.gather(
                *(self._read_disputed(operations[i], sinks[i], deadline_ns) for i in disputed)
            )
            for i, result in zip(disputed, answers, strict=True):
                results[i] = result
        return [result or _NOTHING for result in results]

    async def _catch_up(self, operations: Sequence[ReadOp]) -> None:
        for target, chain_version in {operation[:2] for operation in operations}:
            replica = self._replicas.get(target)
            if replica is not None and chain_version > replica.view.chain_version:
                await replica.catch_up(chain_version)

    def _look_closer(
        self,
        places: Sequence[int],
        operations: Sequence[ReadOp],
        sinks: Sequence[memoryview],
        results: list[ReadResult | None],
    ) -> list[int]:
        """Read one by one what is not plain, or what was not read; return what is cold."""
        cold: list[int] = []
        for i in places:
            operation = operations[i]
            try:
                outcome = self._opened(operation.target).store.try_read_into(
                    operation.chunk,
                    version=0,
                    offset=operation.offset,
                    length=operation.length,
                    sink=sinks[i],
                )
            except EmberfsError as problem:
                results[i] = self._failed(operation, problem)
                continue
            if outcome is None:
                cold.append(i)
            else:
                results[i] = ReadResult(0, outcome.length, outcome.version)
        return cold

    async def _read_in_threads(
        self,
        places: Sequence[int],
        operations: Sequence[ReadOp],
        sinks: Sequence[memoryview],
        results: list[ReadResult | None],
    ) -> None:
        """Read from the disk: several at a time, as the readers would that share this call."""
        lanes = min(len(places), COLD_LANES)

        def lane(number: int) -> Callable[[], None]:
            return lambda: self._read_cold(places[number::lanes], operations, sinks, results)

        await gather_all([run_thread_to_end(self._env, lane(number)) for number in range(lanes)])

    def _read_cold(
        self,
        places: Sequence[int],
        operations: Sequence[ReadOp],
        sinks: Sequence[memoryview],
        results: list[ReadResult | None],
    ) -> None:
        """Read from the disk, in a thread."""
        for i in places:
            operation = operations[i]
            try:
                outcome = self._opened(operation.target).store.read_into(
                    operation.chunk,
                    version=0,
                    offset=operation.offset,
                    length=operation.length,
                    sink=sinks[i],
                )
                results[i] = ReadResult(0, outcome.length, outcome.version)
            except EmberfsError as problem:
                results[i] = ReadResult(problem.code, 0, 0)

    def _still_ours(
        self,
        places: Sequence[int],
        operations: Sequence[ReadOp],
        results: list[ReadResult | None],
    ) -> None:
        """Take back what was read while we lost our place: a target that is filled again shows
        writes that its chain has not committed.
        """
        for i in places:
            operation, result = operations[i], results[i]
            if result is not None and not result.code:
                try:
                    self._check(self._opened(operation.target), operation.chain_version)
                except EmberfsError as problem:
                    results[i] = self._failed(operation, problem)

    def _account(self, call: ServerCall, results: Sequence[ReadResult]) -> int:
        """Say what is filled, look into what failed; returns the bytes that were read."""
        total = failed = 0
        operations = unpack_read_ops(call.body)
        for i, result in enumerate(results):
            if result.code:
                failed += 1
                self._look_into(operations[i], result.code)
            elif result.length:
                total += result.length
                call.fill(i, result.length)
        READS_OK.inc(len(results) - failed)
        if failed:
            READS_FAILED.inc(failed)
        return total

    # -------------------------------------------------------- disputed chunks

    async def _read_disputed(
        self, operation: ReadOp, sink: memoryview, deadline_ns: int
    ) -> ReadResult:
        try:
            while True:
                replica = self._replica(operation, sink)
                version = await self._agree(replica, operation, deadline_ns)
                if version == ABSENT:
                    return _NOTHING
                if version == AGAIN:
                    await self._env.sleep_ns(_AGAIN_PAUSE_NS)
                    continue
                result = await self._read_version(replica, operation, version, sink)
                if result is not None:
                    return result
        except EmberfsError as problem:
            return self._failed(operation, problem)

    async def _agree(self, replica: TargetReplica, operation: ReadOp, deadline_ns: int) -> int:
        """Find the version to read: 0 for the committed one, ABSENT, AGAIN or a number."""
        chunk = ChunkId(operation.chunk)
        if self._env.now_ns() > deadline_ns:
            raise EmberfsError(Code.BUSY, "the chunk's update takes too long")
        plan = plan_read(replica.store.state(chunk), replica.is_exposed(chunk), replica.view)
        if plan == ReadPlan.COMMITTED:
            return 0
        if plan == ReadPlan.WAIT:
            await self._wait(replica, chunk, deadline_ns)
            return AGAIN
        TAIL_QUESTIONS.inc()
        view, life = replica.view, replica.life_of(chunk)
        try:
            tail_version = await self._links.tail_version(view.tail, view.chain_version, chunk)
        except EmberfsError as problem:
            text = f"the tail does not answer: {problem.message}"
            raise EmberfsError(Code.BUSY, text) from None
        self._check(replica, operation.chain_version)
        if replica.life_of(chunk) != life:
            return AGAIN  # the number may mean a version of before a removal
        return settle_read(replica.store.state(chunk), tail_version)

    async def _wait(self, replica: TargetReplica, chunk: ChunkId, deadline_ns: int) -> None:
        left_ns = max(deadline_ns - self._env.now_ns(), MS)
        try:
            async with asyncio.timeout(left_ns / SECOND):
                await replica.finish(chunk)
        except TimeoutError:
            raise EmberfsError(Code.BUSY, "the chunk's update takes too long") from None

    async def _read_version(
        self, replica: TargetReplica, operation: ReadOp, version: int, sink: memoryview
    ) -> ReadResult | None:
        """Read one version; None when it is gone, because the chunk has moved on."""
        store, chunk = replica.store, operation.chunk
        offset, length = operation.offset, operation.length
        try:
            outcome = store.try_read_into(
                chunk, version=version, offset=offset, length=length, sink=sink
            )
            if outcome is None:
                outcome = await run_thread_to_end(
                    self._env,
                    lambda: store.read_into(
                        chunk, version=version, offset=offset, length=length, sink=sink
                    ),
                )
                self._check(replica, operation.chain_version)
        except EmberfsError as problem:
            if problem.code == Code.VERSION_GAP:
                return None
            raise
        if version not in (0, outcome.version):
            return None
        return ReadResult(0, outcome.length, outcome.version)

    # -------------------------------------------------------- who may be read

    def _replica(self, operation: ReadOp, sink: memoryview) -> TargetReplica:
        replica = self._replicas.get(operation.target)
        if replica is None:
            raise EmberfsError(Code.NOT_SERVING, f"target {operation.target} is not open here")
        if operation.length != len(sink):
            raise EmberfsError(Code.INVALID, "the length of a read differs from its sink")
        self._check(replica, operation.chain_version)
        return replica

    def _check(self, replica: TargetReplica, chain_version: ChainVersion) -> None:
        if not replica.state.serves:
            text = f"target {replica.target} is {replica.view.public.name}"
            raise EmberfsError(Code.NOT_SERVING, text)
        if chain_version != replica.view.chain_version:
            text = f"the chain is at version {replica.view.chain_version} here"
            raise EmberfsError(Code.CHAIN_VERSION, text)
        if not self._lease_ok():
            raise EmberfsError(Code.NOT_SERVING, "this node has not reached mgmtd for too long")

    def _failed(self, operation: ReadOp, problem: EmberfsError) -> ReadResult:
        return ReadResult(problem.code, 0, 0)

    def _look_into(self, operation: ReadOp, code: int) -> None:
        replica = self._replicas.get(operation.target)
        if replica is None:
            return
        if code == Code.CHECKSUM:
            self._damaged(replica, ChunkId(operation.chunk))
        elif code == Code.DISK:
            replica.fail("a read failed with an I/O error")
