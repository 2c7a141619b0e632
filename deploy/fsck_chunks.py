"""fsck of the chunks: all serving replicas of a chain side by side, page by page.

A chunk that differs because a write is passing through is looked at again; it counts when two looks
some time apart show the same difference. Chunks that change all the time are counted as busy.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple, Protocol

from emberfs.deploy.fsck_equal import Seen, are_equal, good_replica, in_words
from emberfs.proto.cluster import Chain, ChainTarget
from emberfs.proto.ids import SECOND, ChainId, ChainVersion, ChunkId, MiB, TargetId, unpack_chunk_id
from emberfs.proto.meta_calls import Mend
from emberfs.proto.storage_calls import ChunkRow, FsckAnswer, Leak, ListAnswer
from emberfs.runtime.env import Env

PAGE_ROWS = 1000
VERIFY_BYTES = 128 * MiB  # read by a storage service in one call
SUSPECTS_MAX = 10_000  # of one chain; what is behind shows in the next run
LOOKS = 5
PAUSE_NS = 2 * SECOND


class Stores(Protocol):
    """What is asked of the storage services."""

    def chains(self) -> list[Chain]:
        """All chains as routing shows them now, by id."""
        ...

    async def list(
        self, member: ChainTarget, start: bytes, stop: bytes, limit: int, *, verify: bool
    ) -> ListAnswer:
        """A page of a replica's inventory."""
        ...

    async def check(self, member: ChainTarget) -> FsckAnswer:
        """Compare a replica's allocation bitmaps with its records."""
        ...


class ReplaceReplica(NamedTuple):
    """Make one replica of a chunk equal to another one."""

    chain: ChainId
    chain_version: ChainVersion
    chunk: ChunkId
    target: ChainTarget
    source: TargetId
    wanted: ChunkRow


class RemoveChunks(NamedTuple):
    """Remove chunks of an inode from a chain that have no business there."""

    chain: ChainId
    inode: int
    kind: str
    chunks: int
    bytes: int


class FreeBlocks(NamedTuple):
    """Free blocks of a store that nothing owns."""

    target: ChainTarget
    leak: Leak


class ChunkFinding(NamedTuple):
    """Something that is wrong with chunks, and what would mend it."""

    text: str
    cure: str  # "" if only a person can decide
    mend: tuple[ReplaceReplica, ...] | RemoveChunks | FreeBlocks | Mend | None


class Replicas(NamedTuple):
    """One chunk on all serving replicas."""

    chunk: ChunkId
    rows: Seen


OnPage = Callable[[Chain, list[Replicas]], Awaitable[None]]


async def nothing(chain: Chain, page: list[Replicas]) -> None:
    """An `OnPage` that does not care."""


async def merged(
    stores: Stores, chain: Chain, start: bytes, stop: bytes, *, verify: bool
) -> AsyncIterator[list[Replicas]]:
    """Walk a range of chunks over all serving replicas in step; one page of each in memory."""
    members = chain.serving()
    while members:
        answers = await asyncio.gather(
            *(stores.list(member, start, stop, PAGE_ROWS, verify=False) for member in members)
        )
        upper = min((answer.next for answer in answers if answer.next), default=stop)
        views = [_below(answer.rows, upper) for answer in answers]
        if not verify:
            yield _joined(views)
        else:
            for low, high in _portions(_joined(views), start, upper):
                yield await _whole_range(stores, members, low, high)
        if upper == stop:
            return
        start = upper


async def _whole_range(
    stores: Stores, members: tuple[ChainTarget, ...], start: bytes, stop: bytes
) -> list[Replicas]:
    """Fetch a short range with all data read; it may have grown a little meanwhile."""

    async def one(member: ChainTarget) -> dict[ChunkId, ChunkRow]:
        rows: dict[ChunkId, ChunkRow] = {}
        at = start
        while True:
            answer = await stores.list(member, at, stop, PAGE_ROWS, verify=True)
            rows.update((row.chunk, row) for row in answer.rows)
            if not answer.next:
                return rows
            at = answer.next

    return _joined(list(await asyncio.gather(*map(one, members))))


def _below(rows: tuple[ChunkRow, ...], upper: bytes) -> dict[ChunkId, ChunkRow]:
    return {row.chunk: row for row in rows if not upper or row.chunk < upper}


def _joined(views: list[dict[ChunkId, ChunkRow]]) -> list[Replicas]:
    names = sorted(set().union(*views)) if views else []
    return [Replicas(name, tuple(view.get(name) for view in views)) for name in names]


def _portions(page: list[Replicas], start: bytes, stop: bytes) -> list[tuple[bytes, bytes]]:
    """Cut a page into ranges of which a service can read all data in one call."""
    borders = [start]
    size = 0
    for chunk, rows in page:
        longest = max(row.length for row in rows if row is not None)
        if size and size + longest > VERIFY_BYTES:
            borders.append(chunk)
            size = 0
        size += longest
    return list(zip(borders, [*borders[1:], stop], strict=True)) if page else []


class ChunkCheck:
    """Compares replicas; `on_page` sees every page on the way."""

    def __init__(
        self,
        env: Env,
        stores: Stores,
        *,
        verify: bool,
        trusted: TargetId | None = None,
        on_page: OnPage = nothing,
        pause_ns: int = PAUSE_NS,
    ) -> None:
        self._env = env
        self._stores = stores
        self._verify = verify
        self._trusted = trusted
        self._on_page = on_page
        self._pause_ns = pause_ns
        self.findings: list[ChunkFinding] = []
        self.chunks = 0
        self.bytes = 0
        self.busy = 0  # chunks that changed at every look

    async def range(self, chain: Chain, start: bytes = b"", stop: bytes = b"") -> None:
        """Compare all replicas of a range of chunks."""
        suspects: list[Replicas] = []
        async for page in merged(self._stores, chain, start, stop, verify=self._verify):
            self.chunks += len(page)
            self.bytes += sum(r.rows[0].length for r in page if r.rows[0] is not None)
            unequal = [replicas for replicas in page if not are_equal(replicas.rows)]
            suspects += unequal[: SUSPECTS_MAX - len(suspects)]
            await self._on_page(chain, page)
        if suspects:
            await self._look_again(chain, suspects)

    async def _look_again(self, chain: Chain, suspects: list[Replicas]) -> None:
        for _ in range(LOOKS - 1):
            await self._env.sleep_ns(self._pause_ns)
            changed: list[Replicas] = []
            for before in suspects:
                now = await self._one(chain, before.chunk)
                if are_equal(now) or not any(now):
                    continue
                if now == before.rows:
                    self.findings.append(self._finding(chain, before))
                else:
                    changed.append(Replicas(before.chunk, now))
            suspects = changed
            if not suspects:
                return
        self.busy += len(suspects)

    async def _one(self, chain: Chain, chunk: ChunkId) -> Seen:
        page = await _whole_range(self._stores, chain.serving(), chunk, chunk + b"\0")
        return page[0].rows if page else tuple(None for _ in chain.serving())

    def _finding(self, chain: Chain, replicas: Replicas) -> ChunkFinding:
        members, (chunk, rows) = chain.serving(), replicas
        inode, index = unpack_chunk_id(chunk)
        seen = "; ".join(
            f"target {member.target}: {in_words(row)}"
            for member, row in zip(members, rows, strict=True)
        )
        text = f"chain {chain.id}: inode {inode} chunk {index} differs: {seen}"
        good = good_replica(rows, [member.target for member in members], self._trusted)
        wanted = rows[good] if good is not None else None
        if good is None or wanted is None:
            return ChunkFinding(text, "", None)
        wrong = [
            members[place]
            for place, row in enumerate(rows)
            if place != good and not are_equal((wanted, row))
        ]
        source = members[good].target
        mend = tuple(
            ReplaceReplica(chain.id, chain.version, chunk, member, source, wanted)
            for member in wrong
        )
        names = ", ".join(str(member.target) for member in wrong)
        return ChunkFinding(text, f"replace it on {names} from target {source}", mend)

    async def blocks(self, member: ChainTarget) -> None:
        """Look at the ownership of blocks in one store, twice if need be."""
        first = await self._stores.check(member)
        if not first.findings:
            return
        await self._env.sleep_ns(self._pause_ns)
        second = await self._stores.check(member)
        leaks = {leak.in_words(): leak for leak in second.leaks}
        for found in second.findings:
            if found not in first.findings:
                continue
            text = f"target {member.target}: {found}"
            if found in leaks:
                mend = FreeBlocks(member, leaks[found])
                self.findings.append(ChunkFinding(text, "free them", mend))
            else:
                self.findings.append(ChunkFinding(text, "", None))
