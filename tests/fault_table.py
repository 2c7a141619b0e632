"""Writes docs/faults.md: every fault of the list, and the tests that carry its id in their names.

python tests/fault_table.py            print it
python tests/fault_table.py --write    write it; the figures between the marks are kept

`test_r4_o16_...` covers R4 and O16; the first line of its docstring is the promise. Files are
parsed, not imported.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "faults.md"
FIGURES_BEGIN = "<!-- figures: written by hand, kept by fault_table.py -->"
FIGURES_END = "<!-- end of figures -->"

IDS = re.compile(r"test_((?:[rsco]\d+_)+)")
KINDS = {
    "unit": "unit",
    "fuzz": "unit",
    "model": "model",
    "sim": "simulation",
    "semantics": "real mount",
    "integration": "real processes",
}

ROWS = {
    "R1": "A replica dies between its commit and its answer",
    "R2": "A replica being filled is ahead of the one that fills it",
    "R3": "Truncations and short writes while a replica is being filled",
    "R4": "Versions of chains or routing go backwards",
    "R5": "Restarting the servers one by one disturbs readers",
    "R6": "A disk is replaced by an empty one",
    "R7": "All replicas of a chain are down and return in some order",
    "R8": "After overload or timeouts the cluster stays unusable",
    "R9": "A server dies under load: head, middle, tail, meta, mgmtd, mount",
    "R10": "The store of mgmtd stalls, or its clock jumps",
    "R11": "Managers or servers on stores of different clusters",
    "R12": "Power fails in the middle of writes",
    "R13": "The preferred order of replicas is lost",
    "R14": "A number or message does not survive its encoding",
    "S1": "Space is given to a new owner before its release is durable",
    "S2": "A removal meets a move or rewrite of the same chunk",
    "S3": "A rewrite with identical content is mistaken for no change",
    "S4": "Bulk removals at the same time, in opposite order",
    "S5": "Removed data can still be read",
    "S6": "Removal of a chunk that exists only as an unfinished write",
    "S7": "Large counts and bulk operations overflow or never end",
    "S8": "Several block sizes run out at the same time",
    "S9": "A disk with sectors of 4096 bytes",
    "S10": "Space freed by one user of a disk is not usable by another",
    "S11": "The disk is full",
    "C1": "A killed client of the ring interface leaves shared memory behind",
    "C2": "The ring interface cannot be set up and does not say why",
    "C3": "Deep queues exhaust memory; absurd arguments",
    "C4": "One ring gives no parallelism",
    "C5": "Writers to one file wait for each other",
    "C6": "Descriptors, connections or memory leak",
    "C7": "Slots of a ring are handed out twice or lost",
    "C8": "An empty message is lost by a transport",
    "C9": "The reply of an open-create is lost",
    "C10": "A write arrives after its client has given it up",
    "C11": "After a link was down connections are not used again",
    "O1": "A reader elsewhere sees zeros in a file that is being appended to",
    "O2": "A frozen process wakes after its rights have passed on, and writes",
    "O3": "Missing blocks and wrong counts are not found by the checker",
    "O4": "Mounting hangs",
    "O5": "Conflicting metadata transactions are retried without end",
    "O6": "A crash in the middle of collection or compaction loses data",
    "O7": "Acknowledged though a replica has it not; differing replicas go unseen",
    "O8": "Large requests take all memory of the host",
    "O9": "Memory of a client or server grows for ever",
    "O10": "Asking for attributes during writes damages size or content",
    "O11": "Concurrent structural changes duplicate, resurrect or lose names",
    "O12": "In a partition both sides accept writes",
    "O13": "A buffer is freed twice, or has two users",
    "O14": "Wrong or stale bytes from a cache or a damaged disk",
    "O15": "A server accepts requests and never answers",
    "O16": "Routing older than what was seen is believed",
    "O17": "Parts of a file are zeros though its size is right",
    "O18": "A key-value cache returns damaged, foreign or half-written values",
    "O19": "Direct I/O is refused, or unaligned direct I/O is undefined",
    "O20": "Orphans of interrupted operations fill the disk",
    "O21": "A rename is not seen by other clients at once",
    "O22": "Logs or journals of the metadata grow without bound",
    "O23": "Malformed messages hurt their receiver",
}

REASONS = {
    "C1": "does not apply yet: the shared-memory ring interface is not built",
    "C2": "does not apply yet: the shared-memory ring interface is not built",
    "C4": "does not apply yet: the shared-memory ring interface is not built",
    "C7": "does not apply yet: the slots come with the native ring interface",
    "O18": "does not apply yet: the key-value cache is not built",
}

PARTLY = {
    "R11": "a store that is not ours is refused; nothing watches for two clusters of one name",
    "R13": "there is no other order to prefer: a replica that returns is appended",
    "C3": "bounds of the data path; the deep queues of the ring interface do not exist yet",
    "C5": "order and independence only; how it scales is a matter of the benchmarks",
    "C6": "thousands, not a hundred thousand, of opens and connections",
    "O4": "on the kernel of the test machine only",
    "O9": "minutes, not a day",
    "O11": "nothing is moved between servers yet",
    "O12": "one side at most always; a replica that is heard and hears nothing stops its chain",
    "O21": "the writing of a checkpoint, not the framework itself",
    "O22": "the records only; no run of weeks",
}

HEAD = """# Faults

What goes wrong in systems of this kind, and the tests which show that it does not hurt here. The
table is made from the names of the tests (`python tests/fault_table.py --write`); a test fails when
it is out of date. R: replication and recovery; S: the chunk store on one disk; C: client and
transport; O: seen in other systems of the same kind.
"""


class Found(NamedTuple):
    """A test that carries ids."""

    ids: tuple[str, ...]
    place: str  # file::name
    kind: str
    promise: str


@cache
def collect() -> list[Found]:
    """Return the tests below tests/ that carry ids, by file and name."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        relative = path.relative_to(TESTS)
        kind = KINDS.get(relative.parts[0])
        if kind is None:
            continue
        for node in _functions(ast.parse(path.read_text())):
            match = IDS.match(node.name)
            if match:
                ids = tuple(part.upper() for part in match[1].strip("_").split("_"))
                words = IDS.sub("", node.name).replace("_", " ")
                promise = (ast.get_docstring(node) or words).split("\n\n")[0]
                place = f"{relative.as_posix()}::{node.name}"
                found.append(Found(ids, place, kind, " ".join(promise.split())))
    return found


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def render(found: list[Found], figures: str) -> str:
    """Return the page."""
    parts = [HEAD, *_summary(found), "| id | fault | tests |", "|---|---|---|"]
    for row, fault in ROWS.items():
        tests = [test for test in found if row in test.ids]
        cell = "<br>".join(f"{test.kind}: `{_short(test.place)}`" for test in tests)
        note = f"<br>*{PARTLY[row]}*" if row in PARTLY else ""
        parts.append(f"| {row} | {fault} | {cell or REASONS.get(row, 'not covered')}{note} |")
    parts += ["", "## What each test promises", ""]
    parts += [f"- `{test.place}` ({', '.join(test.ids)}): {test.promise}" for test in found]
    parts += ["", "## Figures of the simulation", "", FIGURES_BEGIN, figures, FIGURES_END, ""]
    return "\n".join(parts)


def _summary(found: list[Found]) -> list[str]:
    covered = {row for test in found for row in test.ids}
    kinds = {
        kind: sum(test.kind == kind for test in found) for kind in dict.fromkeys(KINDS.values())
    }
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return [f"{len(covered)} of {len(ROWS)} rows are covered, by {len(found)} tests: {counts}.", ""]


def _short(place: str) -> str:
    """Return the file, and the name without its ids."""
    file, _, name = place.partition("::")
    return f"{file.removesuffix('.py')}::{IDS.sub('', name)}"


def figures_of(page: Path) -> str:
    """Return what stands between the marks of the page."""
    text = page.read_text() if page.exists() else ""
    _, begin, rest = text.partition(FIGURES_BEGIN)
    inside, end, _ = rest.partition(FIGURES_END)
    return inside.strip("\n") if begin and end else "None yet."


def main() -> None:
    """See the module."""
    page = render(collect(), figures_of(PAGE))
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page)
    else:
        sys.stdout.write(page)


if __name__ == "__main__":
    main()
