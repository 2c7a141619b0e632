"""`emberfs fsck`: metadata in itself, chunks against metadata, replicas against each other, blocks.

It reads a living cluster: what one look finds is believed when a later one finds the same with the
same evidence. Nothing is changed without `repair`. Rounds of repair follow each other, because one
repair may lay open the next thing (a name dropped, its inode found without names).
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from emberfs.client.cluster import Cluster
from emberfs.deploy.fsck_chunks import ChunkCheck, ChunkFinding
from emberfs.deploy.fsck_mend import Mender, MendingRecords, MendingStores
from emberfs.deploy.fsck_owners import Owners, file_ranges
from emberfs.deploy.fsck_records import RecordCheck
from emberfs.deploy.fsck_stores import ClusterStores
from emberfs.deploy.fsck_tree import walk
from emberfs.meta.check import Finding
from emberfs.proto.cluster import Chain, PublicState
from emberfs.proto.files import Inode
from emberfs.proto.ids import SECOND, TargetId
from emberfs.proto.meta_calls import Caller
from emberfs.runtime.env import Env

PAUSE_NS = 2 * SECOND  # between the first and the second look
GRACE_NS = 60 * SECOND  # chunks without owner stay at least this long
ROUNDS_MAX = 5
ROOT = Caller(uid=0, gid=0)

Say = Callable[[str], None]


class Options(NamedTuple):
    """What is asked for."""

    path: bytes = b""  # only this subtree; b"" for everything
    verify: bool = True  # read all data and compare its checksums
    repair: bool = False
    trusted: TargetId | None = None  # decides where versions are equal and contents are not
    grace_ns: int = GRACE_NS
    pause_ns: int = PAUSE_NS


class Report(NamedTuple):
    """What the last look found."""

    chunks: int
    bytes: int
    inodes: int
    findings: list[Finding | ChunkFinding]


class Fsck:
    """One run over one cluster."""

    def __init__(
        self,
        env: Env,
        records: MendingRecords,
        stores: MendingStores,
        say: Say,
        options: Options,
        root: Inode | None,
    ) -> None:
        """`root`: the inode that `options.path` leads to, None for everything."""
        self._env = env
        self._records = records
        self._stores = stores
        self._say = say
        self._options = options
        self._root = root
        self._mender = Mender(env, records, stores, grace_ns=options.grace_ns)
        self._owners = Owners(env, records, stores)
        self._inodes = 0

    async def run(self) -> Report:
        """Look; with `repair` mend and look again, until nothing is left that can be mended."""
        for _ in range(ROUNDS_MAX):
            report = await self._look()
            for finding in report.findings:
                self._say(finding.text)
            if not self._options.repair or not await self._repair(report):
                break
        return report

    async def _repair(self, report: Report) -> bool:
        """Mend what can be mended; tell whether anything was."""
        mended = 0
        for finding in report.findings:
            if finding.mend is None:
                continue
            self._say(f"repair: {finding.text}: {finding.cure}")
            problem = await self._mender.mend(finding, self._owners.first_ns)
            if problem:
                self._say(f"  not done: {problem}")
            else:
                mended += 1
        if mended:
            self._say(f"{mended} repairs done; looking again")
        return mended > 0

    # ------------------------------------------------------------ one look

    async def _look(self) -> Report:
        self._owners = Owners(self._env, self._records, self._stores)
        self._inodes = 0
        chunks = ChunkCheck(
            self._env,
            self._stores,
            verify=self._options.verify,
            trusted=self._options.trusted,
            on_page=self._owners.see,
            pause_ns=self._options.pause_ns,
        )
        if self._root is None:
            await self._all_chains(chunks)
            records = await self._twice(self._all_records)
        else:
            await self._tree(self._root, chunks)
            records = await self._twice(self._tree_records)
        if self._owners.strange:
            await self._env.sleep_ns(self._options.pause_ns)
        strange = await self._owners.judge()
        if chunks.busy:
            self._say(f"{chunks.busy} chunks were written all the time and not compared")
        findings: list[Finding | ChunkFinding] = [*records, *chunks.findings, *strange]
        return Report(chunks.chunks, chunks.bytes, self._inodes, findings)

    async def _twice(self, look: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
        """Return what two looks find, equal in all evidence."""
        first = await look()
        if not first:
            return []
        await self._env.sleep_ns(self._options.pause_ns)
        second = await look()
        seen = set(first)
        return [finding for finding in second if finding in seen]

    async def _all_chains(self, chunks: ChunkCheck) -> None:
        for chain in self._stores.chains():
            before = chunks.chunks
            chunks.findings += degraded(chain)
            await chunks.range(chain)
            for member in chain.serving():
                await chunks.blocks(member)
            count = chunks.chunks - before
            self._say(f"chain {chain.id}: {count} chunks on {len(chain.serving())} replicas")

    async def _all_records(self) -> list[Finding]:
        look = RecordCheck(self._records)
        findings = await look.run()
        self._inodes = look.inodes
        return findings

    async def _tree(self, root: Inode, chunks: ChunkCheck) -> None:
        chains = {chain.id: chain for chain in self._stores.chains()}
        reported: set[int] = set()
        async for step in walk(self._records, root):
            for inode in step.files:
                for chain, start, stop in file_ranges(inode, chains):
                    if chain.id not in reported:
                        reported.add(chain.id)
                        chunks.findings += degraded(chain)
                    await chunks.range(chain, start, stop)

    async def _tree_records(self) -> list[Finding]:
        assert self._root is not None
        findings: list[Finding] = []
        self._inodes = 0
        async for step in walk(self._records, self._root):
            findings += step.findings
            self._inodes += len(step.files)
        return findings


def degraded(chain: Chain) -> list[ChunkFinding]:
    """Replicas that do not serve: they cannot be compared, and copies are missing."""
    return [
        ChunkFinding(
            f"chain {chain.id}: target {member.target} is {member.state.name.lower()}", "", None
        )
        for member in chain.targets
        if member.state != PublicState.SERVING
    ]


async def check(cluster: Cluster, say: Say, options: Options) -> Report:
    """Run fsck on a cluster. NOT_FOUND for a path that does not exist, and what calls raise."""
    stores = ClusterStores(cluster)
    try:
        root: Inode | None = None
        if options.path:
            root = await cluster.metadata.resolve(ROOT, options.path)
        fsck = Fsck(cluster.env, cluster.metadata, stores, say, options, root)
        report = await fsck.run()
        if options.repair:
            await cluster.metadata.stable()
        return report
    finally:
        stores.close()
