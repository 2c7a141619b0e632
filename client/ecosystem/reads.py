"""Many reads at once, into the caller's memory or into lent shared memory."""

from collections.abc import Sequence

from emberfs.client.ecosystem.session import Session
from emberfs.client.file import File, read_many
from emberfs.client.lending import Lender
from emberfs.client.oserrors import FileSystemError
from emberfs.fabric.region import Buffer, Slice


async def fetch(
    session: Session, wanted: Sequence[tuple[File, int, int]]
) -> list[memoryview | FileSystemError]:
    """Read (file, offset, length) each into shared memory that is lent while somebody holds it."""
    loans = [_lend(session.lender, length) for _, _, length in wanted]
    reads = [
        (file, offset, buffer) for (file, offset, _), (buffer, _) in zip(wanted, loans, strict=True)
    ]
    counts = await read_many(reads)
    # A server that did not confirm the end of a call may still write into what the call named.
    again = [
        place
        for place, count in enumerate(counts)
        if isinstance(count, FileSystemError) and tainted(loans[place][0])
    ]
    for place in again:
        memory = memoryview(bytearray(wanted[place][2]))
        loans[place] = memory, memory
    if again:
        second = await read_many([(*wanted[place][:2], loans[place][1]) for place in again])
        for place, count in zip(again, second, strict=True):
            counts[place] = count
    return [
        count if isinstance(count, FileSystemError) else view[:count]
        for count, (_, view) in zip(counts, loans, strict=True)
    ]


def tainted(buffer: Buffer) -> bool:
    """Tell whether memory must not be used again."""
    return isinstance(buffer, Slice) and buffer.region.abandoned


def _lend(lender: Lender, length: int) -> tuple[Buffer, memoryview]:
    if length:
        return lender.lend(length)
    empty = memoryview(bytearray())
    return empty, empty
