"""Proof that every block has exactly one owner and none leaks: the fsck of a target."""

from collections import Counter, defaultdict

from emberfs.kv.store import View
from emberfs.proto.ids import ChunkId
from emberfs.proto.storage_calls import FsckAnswer, Leak
from emberfs.storage.allocator import GROUP_BLOCKS, NO_BLOCK, block_bytes, pack_position
from emberfs.storage.records import (
    chunk_of_key,
    decode_pending,
    decode_record,
    parse_group_row,
    parse_redo_key,
    prefix_range,
)

_PAGE_ROWS = 1000
FINDINGS_MAX = 100


class BlockCheck:
    """Compares bitmaps with records on a snapshot of the store."""

    def __init__(self, rows: View) -> None:
        self._rows = rows
        self._owners: dict[int, set[ChunkId]] = defaultdict(set)
        self._in_redo: set[int] = set()  # blocks that redo rows name
        self._findings: list[str] = []
        self._leaks: list[Leak] = []
        self._chunks = 0
        self.leaked: list[int] = []  # blocks that are marked and that no row of any kind names

    def run(self) -> None:
        """Look at everything, once. Raises DISK."""
        self._walk_records()
        self._walk_pending()
        self._walk_undo()
        self._walk_redo()
        self._compare_bitmaps()

    def answer(self) -> FsckAnswer:
        """Return the findings; no finding means that the store is sound."""
        findings = self._findings[:FINDINGS_MAX]
        if len(self._findings) > FINDINGS_MAX:
            findings.append(f"and {len(self._findings) - FINDINGS_MAX} more")
        return FsckAnswer(self._chunks, len(self._owners), tuple(findings), tuple(self._leaks))

    def _pages(self, prefix: bytes) -> "list[tuple[bytes, bytes]]":
        return list(self._rows.scan(*prefix_range(prefix)))

    def _walk_records(self) -> None:
        start, stop = prefix_range(b"M")
        while page := self._rows.scan(start, stop, limit=_PAGE_ROWS):
            for key, value in page:
                self._chunks += 1
                self._own(chunk_of_key(key), decode_record(key, value).block)
            start = page[-1][0] + b"\0"

    def _walk_pending(self) -> None:
        for key, value in self._pages(b"P"):
            pending = decode_pending(key, value)
            chunk = chunk_of_key(key)
            shared = not pending.fresh and pending.block != NO_BLOCK
            if shared and chunk not in self._owners.get(pending.block, set()):
                self._findings.append(f"pending of {chunk.hex()} writes to a foreign block")
            self._own(chunk, pending.block)

    def _walk_undo(self) -> None:
        for key, value in self._pages(b"U"):
            if value:
                self._own(chunk_of_key(key), decode_record(key, value).block)

    def _walk_redo(self) -> None:
        for key, _ in self._pages(b"R"):
            chunk, block, version = parse_redo_key(key)
            self._in_redo.add(block)
            if chunk not in self._owners.get(block, set()):
                self._findings.append(
                    f"redo data of version {version} of {chunk.hex()} belongs to no block"
                )

    def _own(self, chunk: ChunkId, block: int) -> None:
        if block == NO_BLOCK:
            return
        self._owners[block].add(chunk)
        if len(self._owners[block]) == 2:
            names = ", ".join(sorted(owner.hex() for owner in self._owners[block]))
            self._findings.append(f"block {block:#x} belongs to more than one chunk: {names}")

    def _compare_bitmaps(self) -> None:
        unmarked = set(self._owners)
        for key, value in self._pages(b"G"):
            size_class, group, bits = parse_group_row(key, value)
            for index in range(GROUP_BLOCKS[size_class]):
                if not bits >> index & 1:
                    continue
                position = pack_position(size_class, group, index)
                if position in self._owners:
                    unmarked.discard(position)
                elif position not in self._in_redo:  # that one is found already
                    self.leaked.append(position)
        for size_bytes, count in sorted(Counter(map(block_bytes, self.leaked)).items()):
            self._leaks.append(Leak(size_bytes, count))
            self._findings.append(self._leaks[-1].in_words())
        for position in sorted(unmarked):
            owners = ", ".join(sorted(owner.hex() for owner in self._owners[position]))
            self._findings.append(f"block {position:#x} of {owners} is not marked")
