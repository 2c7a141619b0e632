"""What replication needs of a chunk store: chunks.ChunkStore, or a fake of it in tests."""

from collections.abc import Collection, Container, Sequence
from typing import Protocol

from emberfs.proto.ids import ChunkId
from emberfs.proto.storage_calls import ChunkRow, Leak, RememberedWrite, UpdateKind
from emberfs.storage.chunk_events import State
from emberfs.storage.plainread import Readable


class ReadOutcome(Protocol):
    """What a read found."""

    @property
    def length(self) -> int:
        """Bytes filled."""
        ...

    @property
    def version(self) -> int:
        """Version that was read; 0 for an absent chunk."""
        ...


class Findings(Protocol):
    """What a check of the store found."""

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        ...

    @property
    def blocks(self) -> int:
        """How many blocks they own."""
        ...

    @property
    def findings(self) -> Sequence[str]:
        """What is wrong, in words."""
        ...

    @property
    def leaks(self) -> Sequence[Leak]:
        """Blocks without owner, by size."""
        ...


class Plain(Protocol):
    """See plainread.PlainReads."""

    def begin(self) -> int:
        """Before the first look; until `end` no block that was looked at is used anew."""
        ...

    def end(self, token: int) -> None:
        """The reads are over."""
        ...

    def readable(self, active: Container[ChunkId], leftover: Container[ChunkId]) -> Readable:
        """Name what a batch may read, but for the chunks that are in work."""
        ...


class Store(Protocol):
    """What replication needs of chunks.ChunkStore."""

    @property
    def plain(self) -> Plain:
        """Reads of a batch that are done in one call."""
        ...

    @property
    def used_bytes(self) -> int:
        """Bytes in use on the disk."""
        ...

    @property
    def capacity_bytes(self) -> int:
        """What this store could hold at most."""
        ...

    def state(self, chunk: ChunkId) -> State | None:
        """Return the committed and pending version."""
        ...

    def tombstone(self, chunk: ChunkId) -> tuple[RememberedWrite, ...]:
        """Return who wrote a chunk that was removed."""
        ...

    def is_quick(
        self, kind: UpdateKind, length: int, *, chunk: ChunkId | None = None, offset: int = 0
    ) -> bool:
        """Tell whether preparing such an update may run on the event loop."""
        ...

    def prepare(
        self,
        chunk: ChunkId,
        kind: UpdateKind,
        *,
        version: int,
        offset: int,
        length: int,
        data: memoryview | None,
        chunk_bytes: int,
        remembered: tuple[RememberedWrite, ...],
        replace_exists: bool = True,
        checksums: bytes = b"",
    ) -> None:
        """Write a pending version."""
        ...

    def prepare_and_commit(
        self,
        chunk: ChunkId,
        kind: UpdateKind,
        *,
        version: int,
        offset: int,
        length: int,
        data: memoryview | None,
        chunk_bytes: int,
        remembered: tuple[RememberedWrite, ...],
        replace_exists: bool = True,
        checksums: bytes = b"",
    ) -> None:
        """Write a committed version in one batch."""
        ...

    def commit(self, chunk: ChunkId, version: int) -> None:
        """Commit the pending version."""
        ...

    def discard(self, chunk: ChunkId) -> None:
        """Drop the pending version."""
        ...

    def read_into(
        self, chunk: ChunkId, *, version: int, offset: int, length: int, sink: memoryview
    ) -> ReadOutcome:
        """Read a version; 0 for the committed one. Blocks."""
        ...

    def try_read_into(
        self, chunk: ChunkId, *, version: int, offset: int, length: int, sink: memoryview
    ) -> ReadOutcome | None:
        """Read without blocking, or return None."""
        ...

    def read_damaged(self, chunk: ChunkId, *, version: int, sink: memoryview) -> bytes:
        """Read a whole version unverified and return its checksums. Blocks."""
        ...

    def verify(self, chunk: ChunkId, *, from_disk: bool = False) -> bool:
        """Compare the committed version with its checksums. Blocks."""
        ...

    @property
    def damaged(self) -> Collection[ChunkId]:
        """Chunks whose committed content is known not to verify."""
        ...

    def flush(self) -> None:
        """Make everything stable. Blocks."""
        ...

    @property
    def need_flush(self) -> bool:
        """Whether so much waits for a flush that one should run now."""
        ...

    def pending_chunks(self) -> list[ChunkId]:
        """Chunks with a pending version."""
        ...

    def list(
        self,
        start: bytes,
        stop: bytes,
        limit: int,
        verify: bool = False,
        tombstones: bool = False,
    ) -> tuple[list[ChunkRow], bytes]:
        """Page through the inventory. Blocks."""
        ...

    def check(self) -> Findings:
        """Compare bitmaps with records. Blocks."""
        ...

    def free_leaked(self, leak: Leak) -> None:
        """Free blocks that a check found to have no owner. Blocks."""
        ...

    def close(self) -> None:
        """Release the store. Blocks."""
        ...
