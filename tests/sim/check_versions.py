"""Versions only go up, at every observer, and one version is one content.

An observer is whatever must not see time run backwards. For what mgmtd publishes (routing, chains)
that is the process whatever its incarnation: name it without one. For what a restart may forget,
put the incarnation into the observer's name.
"""

from collections.abc import Iterable
from typing import NamedTuple

from sim.violation import Violation

GONE = 0  # version of something removed: what comes after may begin anew


class Seen(NamedTuple):
    """An observer saw (or published, or committed) a version."""

    observer: str
    kind: str  # "routing", "chain", "chunk" ...
    id: int | str | bytes
    version: int
    now_ns: int
    content: str = ""  # digest; empty: not compared


def check_versions(records: Iterable[Seen], published: Iterable[str] = ()) -> list[Violation]:
    """Check records in time order (equal times: in the order given).

    Of kinds in `published` no observer may be behind what *any* of them did before: for the moment
    of publishing by successive primaries, not for what readers have heard of.
    """
    everyone = set(published)
    newest: dict[tuple[str, str, int | str | bytes], Seen] = {}
    contents: dict[tuple[str, int | str | bytes, int], Seen] = {}
    found: list[Violation] = []
    for record in sorted(records, key=lambda record: record.now_ns):
        observer = "" if record.kind in everyone else record.observer
        place = (observer, record.kind, record.id)
        before = newest.get(place)
        if before is not None and GONE != record.version < before.version:
            found.append(Violation("version went back", f"{_show(record)} after {_show(before)}"))
        else:
            newest[place] = record
        if record.content:
            first = contents.setdefault((record.kind, record.id, record.version), record)
            if first.content != record.content:
                text = f"{_show(first)} and {_show(record)} differ: "
                text += f"{first.content} and {record.content}"
                found.append(Violation("two contents of a version", text))
    return found


def _show(record: Seen) -> str:
    return (
        f"{record.observer} {record.kind} {record.id!r} version {record.version} "
        f"at {record.now_ns / 1e9:.6f} s"
    )
