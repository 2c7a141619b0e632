"""fsck of one subtree: its names, link counts of its directories, and the files in it.

Depth first with one page of names per level, so that memory depends on the depth only. Link counts
of files with several names need all names of the file system: those are left to a full run.
"""

from collections.abc import AsyncIterator
from typing import NamedTuple

from emberfs.deploy.fsck_records import Records, fetch_inodes, judge_names, pages
from emberfs.kv import keys
from emberfs.meta import check
from emberfs.meta.check import Finding
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId

DEPTH_MAX = 10_000


class Step(NamedTuple):
    """A page of the walk: what is wrong in it, and the inodes it names that are not directories."""

    findings: list[Finding]
    files: list[Inode]


async def walk(records: Records, root: Inode) -> AsyncIterator[Step]:
    """Walk from `root` (a file: only that). The root's own name is not judged."""
    if not root.is_directory():
        yield Step([], [root])
        return
    stack = [_read(records, root.id)]
    open_directories = {root.id}
    path = [root.id]
    while stack:
        found = await anext(stack[-1], None)
        if found is None:
            stack.pop()
            open_directories.discard(path.pop())
        elif isinstance(found, Step):
            yield found
        elif found not in open_directories and len(path) < DEPTH_MAX:
            stack.append(_read(records, found))
            path.append(found)
            open_directories.add(found)


async def _read(records: Records, directory: InodeId) -> AsyncIterator[Step | InodeId]:
    """Yield pages of a directory, and each subdirectory behind the page that names it."""
    before = await fetch_inodes(records, [directory])
    subdirectories = 0
    async for page in pages(records, keys.entry_span(directory)):
        findings = await judge_names(records, page)
        numbers = []
        for row in page:
            entry = check.read_entry(row.key, row.value)
            if not isinstance(entry, Finding):
                numbers.append(entry[1].inode)
        inodes = [stored.inode for stored in (await fetch_inodes(records, numbers)).values()]
        inner = [inode.id for inode in inodes if inode.is_directory()]
        subdirectories += len(inner)
        yield Step(findings, [inode for inode in inodes if not inode.is_directory()])
        for number in inner:
            yield number
    after = await fetch_inodes(records, [directory])
    stored = after.get(directory)
    if stored is None or stored != before.get(directory):
        return  # it changed while it was read
    names = int(directory not in check.TOPS)
    finding = check.link_finding(stored.inode, stored.value, names, subdirectories, is_open=False)
    if finding is not None and finding.mend is not None:
        yield Step([finding], [])
