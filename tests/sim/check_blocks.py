"""No block is owned twice, none leaks."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sim.violation import Violation


class Owned(NamedTuple):
    """A chunk owns bytes of a file: `file` names it (the block class), offsets are in it."""

    owner: str
    file: int
    offset: int
    length: int


def check_findings(findings: Mapping[str, Iterable[str]]) -> list[Violation]:
    """Take the findings of ChunkStore.check() by target."""
    return [
        Violation("blocks", f"{target}: {text}")
        for target in sorted(findings)
        for text in findings[target]
    ]


def check_owners(
    owned: Iterable[Owned], allocated: Iterable[tuple[int, int, int]]
) -> list[Violation]:
    """Compare owners with the (file, offset, length) that are marked as in use.

    Independent of the code under test: overlap is judged by byte ranges, not by block numbers.
    """
    found: list[Violation] = []
    marked, owners = set(allocated), set(owned)
    before: Owned | None = None
    for entry in sorted(owners, key=lambda entry: (entry.file, entry.offset, entry.owner)):
        place = f"file {entry.file} bytes [{entry.offset}, {entry.offset + entry.length})"
        if (
            before is not None
            and before.file == entry.file
            and entry.offset < before.offset + before.length
            and entry.owner != before.owner
        ):
            found.append(Violation("owned twice", f"{place}: {before.owner} and {entry.owner}"))
        if entry[1:] not in marked:
            found.append(Violation("owned but free", f"{place} of {entry.owner}"))
        if before is None or (entry.file, entry.offset + entry.length) > (
            before.file, before.offset + before.length
        ):  # fmt: skip
            before = entry
    for file, offset, length in sorted(marked - {entry[1:] for entry in owners}):
        place = f"file {file} bytes [{offset}, {offset + length})"
        found.append(Violation("leaked", f"{place} is marked and has no owner"))
    return found
