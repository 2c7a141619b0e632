"""`emberfs fsck`: prove that replicas are equal, that data matches its checksums, that no block is
owned twice or leaked, and that every chunk belongs to a file.

It reads a living cluster. A chunk that differs because a write is passing through is looked at
again, a few times, before it counts as a finding.
"""

from collections.abc import Callable
from typing import NamedTuple

from emberfs.client.cluster import Cluster
from emberfs.proto.cluster import Chain, ChainTarget
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChunkId, InodeId, unpack_chunk_id
from emberfs.proto.method import Answer, Method, Request
from emberfs.proto.storage_calls import (
    FSCK,
    LIST,
    ChunkRow,
    FsckRequest,
    ListRequest,
)

CALL_TIMEOUT_NS = 60 * SECOND
PAGE_ROWS = 1000
LOOKS = 5
PAUSE_NS = 300 * MS

Say = Callable[[str], None]


class Report(NamedTuple):
    """What fsck found."""

    chunks: int
    bytes: int
    findings: list[str]


class Fsck:
    """One run over one cluster."""

    def __init__(self, cluster: Cluster, say: Say, *, verify: bool) -> None:
        self._cluster = cluster
        self._say = say
        self._verify = verify
        self._findings: list[str] = []
        self._inodes: set[InodeId] = set()

    async def run(self) -> Report:
        """Look at every chain, then at the files."""
        chunks = total_bytes = 0
        for chain in sorted(self._cluster.routing.snapshot.chains.values(), key=lambda c: c.id):
            rows = await self._chain(chain)
            chunks += len(rows)
            total_bytes += sum(row.length for row in rows.values())
            self._say(f"chain {chain.id}: {len(rows)} chunks on {len(chain.serving())} replicas")
        await self._files()
        return Report(chunks, total_bytes, self._findings)

    async def _call(
        self, member: ChainTarget, method: Method[Request, Answer], request: Request
    ) -> Answer:
        node = self._cluster.routing.snapshot.nodes[member.node]
        peer = await self._cluster.peers.get(node.endpoints)
        reply = await peer.call(
            method.number, method.encode_request(request), timeout_ns=CALL_TIMEOUT_NS
        )
        return method.decode_answer(reply.body)

    async def _chain(self, chain: Chain) -> dict[ChunkId, ChunkRow]:
        """Compare the replicas of one chain; returns the head's chunks."""
        serving = chain.serving()
        for member in chain.targets:
            if member not in serving:
                self._findings.append(
                    f"chain {chain.id}: target {member.target} is {member.state.name.lower()}"
                )
        replicas = {m.target: await self._rows(m, b"", b"") for m in serving}
        for member in serving:
            await self._blocks(member)
        suspects = self._unequal(list(replicas.values()))
        for chunk in sorted(suspects):
            await self._look_again(chain, serving, chunk)
        first = next(iter(replicas.values()), {})
        self._inodes.update(unpack_chunk_id(chunk)[0] for chunk in first)
        return first

    @staticmethod
    def _unequal(replicas: list[dict[ChunkId, ChunkRow]]) -> set[ChunkId]:
        names: set[ChunkId] = set().union(*replicas) if replicas else set()
        found = set()
        for chunk in names:
            rows = [replica.get(chunk) for replica in replicas]
            if (
                rows[0] is None
                or rows[0].damaged
                or rows[0].pending
                or rows.count(rows[0]) < len(rows)
            ):
                found.add(chunk)
        return found

    async def _look_again(
        self, chain: Chain, serving: tuple[ChainTarget, ...], chunk: ChunkId
    ) -> None:
        """A passing write is gone after a moment; a difference stays."""
        stop = ChunkId(chunk + b"\0")
        views: list[dict[ChunkId, ChunkRow]] = []
        for _ in range(LOOKS):
            views = [await self._rows(member, chunk, stop) for member in serving]
            if not self._unequal(views):
                return
            await self._cluster.env.sleep_ns(PAUSE_NS)
        inode, index = unpack_chunk_id(chunk)
        seen = "; ".join(
            f"{member.target}: {_words(view.get(chunk))}"
            for member, view in zip(serving, views, strict=True)
        )
        self._findings.append(f"chain {chain.id}: inode {inode} chunk {index} differs: {seen}")

    async def _rows(
        self, member: ChainTarget, start: bytes, stop: bytes
    ) -> dict[ChunkId, ChunkRow]:
        rows: dict[ChunkId, ChunkRow] = {}
        while True:
            request = ListRequest(
                target=member.target, start=start, stop=stop, limit=PAGE_ROWS, verify=self._verify
            )
            answer = await self._call(member, LIST, request)
            rows.update((row.chunk, row) for row in answer.rows)
            if not answer.next:
                return rows
            start = answer.next

    async def _blocks(self, member: ChainTarget) -> None:
        answer = await self._call(member, FSCK, FsckRequest(target=member.target))
        self._findings += [f"target {member.target}: {finding}" for finding in answer.findings]

    async def _files(self) -> None:
        """Chunks of inodes that no longer exist, and are not awaiting collection either."""
        orphans = 0
        for inode in sorted(self._inodes):
            try:
                await self._cluster.metadata.getattr(inode)
            except EmberfsError as problem:
                if problem.code != Code.NOT_FOUND:
                    raise
                orphans += 1
        if orphans:
            self._say(f"{orphans} deleted files still await the collection of their chunks")


def _words(row: ChunkRow | None) -> str:
    if row is None:
        return "absent"
    pending = f", pending {row.pending}" if row.pending else ""
    damaged = ", damaged" if row.damaged else ""
    return f"version {row.version}, {row.length} bytes, digest {row.digest:08x}{pending}{damaged}"
