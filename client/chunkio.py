"""Chunk I/O of files: offsets and layouts in, chunk reads and updates out.

Reads go to any serving replica (chunkread.py), updates to the head of the chain (chunkwrite.py).
A lost server is invisible here: reads move on, writes wait for the new chain, until `timeout_ns`.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

from emberfs.client.chunkread import ChunkReader, Job, jobs_of, part_of
from emberfs.client.chunkwrite import ChunkWriter, Update
from emberfs.client.gather import gather_all
from emberfs.client.nodecalls import NodeCalls, Peers, RoutingView
from emberfs.client.packedread import PackedReader
from emberfs.client.unflushed import ChainVersions, lowest
from emberfs.fabric.region import Buffer, length_of
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Layout, Piece, chunks_of, pieces
from emberfs.proto.ids import SECOND, ChainId, ChunkId, InodeId, pack_chunk_id, unpack_chunk_id
from emberfs.proto.storage_calls import UpdateKind, file_chunk_range
from emberfs.runtime.env import Env

ReadRequest: TypeAlias = tuple[InodeId, Layout, int, Buffer]  # inode, layout, file offset, sink

TIMEOUT_NS = 60 * SECOND
PENDING_TRIES = 8
STORED_ROWS = 1024  # of a chain; who asks what a longer file takes is not answered
STORED_TIMEOUT_NS = 2 * SECOND
LIST_ROWS = 256  # chunks removed per round and chain


class ChunkIO:
    """Reads and writes chunks of files on the storage chains. Raises EmberfsError."""

    def __init__(self, env: Env, routing: RoutingView, peers: Peers, client_id: int) -> None:
        self._nodes = NodeCalls(env, routing, peers)
        self._reader = ChunkReader(env, routing, self._nodes)
        self.packed = PackedReader(env, routing, self._nodes, self._reader)
        self._writer = ChunkWriter(env, routing, self._nodes, client_id)

    def guard(self, before_write: Callable[[InodeId], Awaitable[None]]) -> None:
        """Ask before every try to write a chunk; what is raised counts as the try's failure."""
        self._writer.before_write = before_write

    def close(self) -> None:
        """Stop listening to routing."""
        self._nodes.close()

    async def read(
        self,
        inode: InodeId,
        layout: Layout,
        offset: int,
        sink: Buffer,
        *,
        timeout_ns: int = TIMEOUT_NS,
    ) -> None:
        """Fill the whole sink from `offset` (bytes); holes and short chunks read as zeros.

        A memoryview must be of bytes and contiguous. Raises TIMEOUT with the last cause.
        """
        await self._reader.read(jobs_of(inode, layout, offset, sink), timeout_ns)

    async def read_many(
        self, requests: Sequence[ReadRequest], *, timeout_ns: int = TIMEOUT_NS
    ) -> None:
        """Same for many ranges, also of different files, in few calls. Raises the first error."""
        jobs: list[Job] = []
        for inode, layout, offset, sink in requests:
            jobs += jobs_of(inode, layout, offset, sink)
        await self._reader.read(jobs, timeout_ns)

    async def write(
        self,
        inode: InodeId,
        layout: Layout,
        offset: int,
        data: Buffer,
        *,
        timeout_ns: int = TIMEOUT_NS,
    ) -> ChainVersions:
        """Write at `offset` (bytes); on return every chain has committed. See `flush`.

        `data` must not change before. On an error other pieces may have been written.
        """
        updates = [
            _write_of(inode, piece, layout, data)
            for piece in pieces(inode, layout, offset, length_of(data))
        ]
        return await self._perform(updates, timeout_ns)

    async def _perform(self, updates: Sequence[Update], timeout_ns: int) -> ChainVersions:
        answers = await gather_all([self._writer.update(one, timeout_ns) for one in updates])
        done = zip(updates, answers, strict=True)
        return lowest((update.chain, answer.chain_version) for update, answer in done)

    async def remove_chunks(
        self, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int = TIMEOUT_NS
    ) -> ChainVersions:
        """Remove all chunks of a file from `first_index` on; `timeout_ns` bounds each call.

        Names the chains where there were any, see `flush`: until then a power cut may undo it.
        """
        removed = await gather_all(
            [
                self._remove_on(chain, inode, layout, first_index, timeout_ns)
                for chain in sorted(set(layout.chains))
            ]
        )
        return lowest(mark for some in removed for mark in some.items())

    async def truncate_chunk(
        self,
        inode: InodeId,
        layout: Layout,
        index: int,
        length: int,
        timeout_ns: int = TIMEOUT_NS,
    ) -> ChainVersions:
        """Cut one chunk to `length` bytes if it exists and is longer; never creates it.

        Names its chain if it was cut, see remove_chunks.
        """
        chain = layout.chains[index % len(layout.chains)]
        chunk = pack_chunk_id(chunks_of(inode, layout), index)
        rows = await self._writer.rows(chain, chunk, chunk + b"\0", 1, timeout_ns)
        # A pending version may be longer than what is committed; the update waits behind it.
        if rows and (rows[0].length > length or rows[0].pending):
            update = Update(chain, chunk, UpdateKind.TRUNCATE, 0, length, layout.chunk_bytes)
            return await self._perform([update], timeout_ns)
        return {}

    async def end_of(
        self, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int = TIMEOUT_NS
    ) -> int:
        """Return where the last chunk from `first_index` on ends, in the file; 0: no chunk.

        BUSY when a write that is under way there does not end.
        """
        ends = await gather_all(
            [
                self._end_on(chain, inode, layout, first_index, timeout_ns)
                for chain in sorted(set(layout.chains))
            ]
        )
        return max(ends)

    async def _end_on(
        self, chain: ChainId, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int
    ) -> int:
        start, stop = file_chunk_range(chunks_of(inode, layout), first_index)
        end, tries = 0, 0
        while rows := await self._writer.rows(chain, start, stop, LIST_ROWS, timeout_ns):
            for row in rows:
                at = unpack_chunk_id(row.chunk)[1] * layout.chunk_bytes
                if row.pending:  # a reader decides it
                    if tries == PENDING_TRIES:
                        raise EmberfsError(Code.BUSY, "a write is under way; try again")
                    tries += 1
                    await self.read(inode, layout, at, memoryview(bytearray(1)))
                    break
                end, tries = max(end, at + row.length), 0
                start = row.chunk + b"\0"
        return end

    async def stored_bytes(
        self, inode: InodeId, layout: Layout, timeout_ns: int = STORED_TIMEOUT_NS
    ) -> int | None:
        """What one replica holds of a file; None if that is too much to list."""
        start, stop = file_chunk_range(chunks_of(inode, layout), 0)
        pages = await gather_all(
            [
                self._writer.rows(chain, start, stop, STORED_ROWS, timeout_ns)
                for chain in sorted(set(layout.chains))
            ]
        )
        if any(len(page) == STORED_ROWS for page in pages):
            return None
        return sum(row.length for page in pages for row in page)

    async def inodes_on(
        self, chain: ChainId, first: InodeId, stop: InodeId, timeout_ns: int = TIMEOUT_NS
    ) -> list[InodeId]:
        """Return the ids of [first, stop) that name chunks on a chain."""
        found: list[InodeId] = []
        end = file_chunk_range(stop, 0)[0]
        while first < stop:
            start = file_chunk_range(first, 0)[0]
            rows = await self._writer.rows(chain, start, end, LIST_ROWS, timeout_ns)
            if not rows:
                break
            found += sorted({unpack_chunk_id(row.chunk)[0] for row in rows})
            first = InodeId(found[-1] + 1)
        return found

    async def flush(self, chains: Iterable[ChainId], timeout_ns: int = TIMEOUT_NS) -> ChainVersions:
        """What these chains have committed is on stable storage of every replica on return.

        Updates tell at which version of its chain they were acknowledged (where there were several,
        the lowest). What this returns for the chain must not be higher: it is the version at which
        all replicas had lost what was not flushed. See unflushed.py.
        """
        return await self._writer.flush(sorted(set(chains)), timeout_ns)

    async def _remove_on(
        self, chain: ChainId, inode: InodeId, layout: Layout, first_index: int, timeout_ns: int
    ) -> ChainVersions:
        """Remove what is listed until nothing is; empty if there was nothing."""
        start, stop = file_chunk_range(chunks_of(inode, layout), first_index)
        removed: list[ChainVersions] = []
        while rows := await self._writer.rows(chain, start, stop, LIST_ROWS, timeout_ns):
            updates = [_remove_of(row.chunk, chain, layout) for row in rows]
            removed.append(await self._perform(updates, timeout_ns))
        return lowest(mark for some in removed for mark in some.items())


def _write_of(inode: InodeId, piece: Piece, layout: Layout, data: Buffer) -> Update:
    source = part_of(data, piece.start, piece.length)
    return Update(
        piece.chain,
        piece.chunk,
        UpdateKind.WRITE,
        piece.offset,
        piece.length,
        layout.chunk_bytes,
        source,
        inode,
    )


def _remove_of(chunk: ChunkId, chain: ChainId, layout: Layout) -> Update:
    return Update(chain, chunk, UpdateKind.REMOVE, 0, 0, layout.chunk_bytes)
