"""fsck of the metadata in itself: pages of records go through the rules of meta/check.py.

Memory is bounded: link counts are taken in rounds of INODES_AT_ONCE inodes, each of which lets all
names pass by; remembered replies likewise. The pages are of different moments, so a single look may
find things that are not so: fsck.py believes what it finds twice with the same evidence.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple, Protocol

from emberfs.kv import keys
from emberfs.meta import check, check_trees, schema
from emberfs.meta.check import Ancestry, Finding, LinkCount
from emberfs.proto.files import Inode
from emberfs.proto.ids import TRASH_INODE, InodeId
from emberfs.proto.meta_calls import CensusAnswer, RecordRow, ScanRecordsAnswer
from emberfs.proto.quota_calls import QuotaCensusAnswer

PAGE_ROWS = 2000
INODES_AT_ONCE = 1_000_000  # about 100 MiB
REPLIES_AT_ONCE = 500_000
DIRECTORIES_KNOWN_MAX = 1_000_000
FINDINGS_MAX = 10_000  # of one look; what is behind shows in the next run


class Records(Protocol):
    """What is asked of the metadata service: client.metadata.Metadata."""

    async def scan_records(
        self, start: bytes, stop: bytes, limit: int, *, values: bool = True
    ) -> ScanRecordsAnswer:
        """A page of stored records of [start, stop)."""
        ...

    async def fetch_records(self, keys: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        """Stored records by key."""
        ...

    async def census(self) -> CensusAnswer:
        """Count inodes and look for sessions that should have ended."""
        ...

    async def quota_census(self) -> QuotaCensusAnswer:
        """Count what counts for each quota."""
        ...


class Stored(NamedTuple):
    """An inode and the record it was read from."""

    inode: Inode
    value: bytes


async def pages(
    records: Records, span: keys.Span, *, values: bool = True
) -> AsyncIterator[tuple[RecordRow, ...]]:
    """All records of a range, page by page."""
    start, more = span.start, True
    while more:
        answer = await records.scan_records(start, span.stop, PAGE_ROWS, values=values)
        if answer.rows:
            yield answer.rows
            start = answer.rows[-1].key + b"\0"
        more = answer.more


async def fetch_inodes(records: Records, numbers: Sequence[InodeId]) -> dict[InodeId, Stored]:
    """Return those of the inodes that exist and can be read."""
    found: dict[InodeId, Stored] = {}
    for first in range(0, len(numbers), PAGE_ROWS):
        part = numbers[first : first + PAGE_ROWS]
        wanted = tuple(keys.inode_key(number) for number in part)
        for key, value in zip(wanted, await records.fetch_records(wanted), strict=True):
            inode = check.read_inode(key, value) if value is not None else None
            if isinstance(inode, Inode) and value is not None:
                found[inode.id] = Stored(inode, value)
    return found


class TreeCheck:
    """Quotas, removed trees and the trash."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.quotas: dict[InodeId, schema.Quota] = {}
        self._queued: set[int] = set()

    async def run(self, note: Callable[[Finding | None], None]) -> None:
        """Look at their records. They are few, except those of the queue and of the trash."""
        self.quotas.clear()
        async for page in self._pages(keys.Prefix.QUOTA):
            for row, directory in await self._with_inodes(page):
                self.quotas[_number(row)] = schema.QUOTA.decode(row.value)
                note(check_trees.quota_finding(row.key, row.value, directory))
        for finding in check_trees.usage_findings((await self._records.quota_census()).differences):
            note(finding)
        async for page in self._pages(keys.Prefix.REMOVED):
            for row, inode in await self._with_inodes(page):
                self._queued.add(_number(row))
                note(check_trees.removed_finding(row.key, row.value, inode))
        await self._trash(note)

    async def _trash(self, note: Callable[[Finding | None], None]) -> None:
        named: set[bytes] = set()
        async for page in pages(self._records, keys.entry_span(TRASH_INODE)):
            wanted = [check_trees.trash_key_of(keys.entry_name(row.key)) for row in page]
            known = await self._records.fetch_records(tuple(key or b"?" for key in wanted))
            for row, key, value in zip(page, wanted, known, strict=True):
                if key is not None and value is not None:
                    named.add(key)
                    continue
                entry = schema.ENTRY.decode(row.value)
                for inode, stored in (await fetch_inodes(self._records, [entry.inode])).values():
                    name = keys.entry_name(row.key)
                    note(check_trees.lost_trash_finding(name, inode, stored))
        async for page in self._pages(keys.Prefix.TRASH):
            for row in page:
                note(check_trees.trash_finding(row.key, row.value, has_name=row.key in named))

    def judge_hidden(self, inode: Inode, stored: bytes) -> Finding | None:
        """Judge an inode: a directory of a removed tree waits in the queue."""
        if not check_trees.is_hidden(inode) or inode.id in self._queued:
            return None
        return check_trees.unqueued_finding(inode, stored)

    def _pages(self, prefix: keys.Prefix) -> AsyncIterator[tuple[RecordRow, ...]]:
        return pages(self._records, keys.span_of(bytes(prefix.value)))

    async def _with_inodes(self, page: Sequence[RecordRow]) -> list[tuple[RecordRow, Inode | None]]:
        stored = await fetch_inodes(self._records, [_number(row) for row in page])
        found = [(row, stored.get(_number(row))) for row in page]
        return [(row, one.inode if one is not None else None) for row, one in found]


def _number(row: RecordRow) -> InodeId:
    return InodeId(keys.unpack_inode_suffix(row.key))


async def fetch_owners(records: Records, numbers: Sequence[InodeId]) -> dict[InodeId, Stored]:
    """Return the inodes whose chunks are named by these ids: their own or data ids."""
    found = await fetch_inodes(records, numbers)
    rest = [number for number in numbers if number not in found]
    values = await records.fetch_records(tuple(map(keys.owner_key, rest))) if rest else ()
    owners = {n: InodeId(keys.unpack_owner(v)) for n, v in zip(rest, values, strict=True) if v}
    inodes = await fetch_inodes(records, sorted(set(owners.values())))
    return found | {n: inodes[owner] for n, owner in owners.items() if owner in inodes}


class RecordCheck:
    """One look at all metadata."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._findings: list[Finding] = []
        self._trees = TreeCheck(records)
        self.inodes = 0
        self.names = 0

    async def run(self) -> list[Finding]:
        """Look at every record once (at names as often as memory demands)."""
        await self._trees.run(self._note)
        await self._names()
        await self._links()
        census = await self._records.census()
        await self._sessions(frozenset(census.overdue))
        await self._belongings(keys.Prefix.XATTR, "attribute")
        await self._belongings(keys.Prefix.TRIM, "trim")
        await self._contents()
        await self._data_ids()
        await self._queue()
        await self._ages()
        await self._replies()
        self._note(check.census_finding(census.inodes, census.counter))
        return self._findings

    def _note(self, finding: Finding | None) -> None:
        if finding is not None and len(self._findings) < FINDINGS_MAX:
            self._findings.append(finding)

    def _pages(
        self, prefix: keys.Prefix, *, values: bool = True
    ) -> AsyncIterator[tuple[RecordRow, ...]]:
        return pages(self._records, keys.span_of(bytes(prefix.value)), values=values)

    # ------------------------------------------------------------ names

    async def _names(self) -> None:
        async for page in self._pages(keys.Prefix.ENTRY):
            self.names += len(page)
            for finding in await judge_names(self._records, page, self._trees.quotas):
                self._note(finding)

    # ------------------------------------------------------------ links and ".."

    async def _links(self) -> None:
        count, ancestry = LinkCount(), Ancestry(DIRECTORIES_KNOWN_MAX)
        async for page in self._pages(keys.Prefix.INODE):
            self.inodes += len(page)
            for row in page:
                inode = check.read_inode(row.key, row.value)
                if isinstance(inode, Finding):
                    self._note(inode)
                    continue
                count.expect(inode)
                self._note(self._trees.judge_hidden(inode, row.value))
                if inode.is_directory():
                    ancestry.ask(inode)
            await self._owned(page)
            await self._cycles(ancestry)
            if count.inodes >= INODES_AT_ONCE:
                await self._count(count)
                count = LinkCount()
        await self._count(count)

    async def _count(self, count: LinkCount) -> None:
        async for page in self._pages(keys.Prefix.ENTRY):
            for row in page:
                entry = check.read_entry(row.key, row.value)
                if not isinstance(entry, Finding):
                    count.see(*entry)
        suspects = count.suspects()
        stored = await fetch_inodes(self._records, suspects[:FINDINGS_MAX])
        for inode, value in stored.values():
            names, subdirectories = count.seen(inode)
            is_open = not names and await self._is_open(inode.id)
            self._note(check.link_finding(inode, value, names, subdirectories, is_open=is_open))

    async def _is_open(self, inode: InodeId) -> bool:
        span = keys.session_span(inode)
        return bool((await self._records.scan_records(*span, 1)).rows)

    async def _cycles(self, ancestry: Ancestry) -> None:
        while missing := ancestry.unknown():
            stored = await fetch_inodes(self._records, missing)
            for number in missing:
                known = stored.get(number)
                ancestry.learn(number, known.inode if known is not None else None)
        found = ancestry.cycles()
        for inode, value in (await fetch_inodes(self._records, found)).values():
            name = await name_in(self._records, inode.parent, inode.id)
            if name:
                self._note(check.cycle_finding(inode, value, name))

    # ------------------------------------------------------------ what belongs to inodes

    async def _sessions(self, overdue: frozenset[int]) -> None:
        async for page in self._pages(keys.Prefix.SESSION):
            owners = await self._owners(page)
            for row in page:
                self._note(
                    check.session_finding(
                        row.key,
                        row.value,
                        inode_exists=check.parent_of(row.key) in owners,
                        overdue=overdue,
                    )
                )

    async def _owners(self, page: Sequence[RecordRow]) -> set[InodeId]:
        numbers = sorted({check.parent_of(row.key) for row in page})
        found = await self._records.fetch_records(tuple(map(keys.inode_key, numbers)))
        return {n for n, value in zip(numbers, found, strict=True) if value is not None}

    async def _belongings(self, prefix: keys.Prefix, what: str) -> None:
        async for page in self._pages(prefix):
            owners = await self._owners(page)
            for row in page:
                if check.parent_of(row.key) not in owners:
                    self._note(check.belonging_finding(row.key, row.value, what))

    async def _contents(self) -> None:
        async for page in self._pages(keys.Prefix.INLINE):
            numbers = sorted({check.parent_of(row.key) for row in page})
            inodes = await fetch_inodes(self._records, numbers)
            unreadable = await _unreadable(self._records, sorted(set(numbers) - set(inodes)))
            for row in page:
                owner = check.parent_of(row.key)
                if owner not in unreadable:
                    stored = inodes.get(owner)
                    inode = stored.inode if stored is not None else None
                    self._note(check.content_finding(row.key, row.value, inode))

    async def _data_ids(self) -> None:
        async for page in self._pages(keys.Prefix.OWNER):
            owners = {row.key: InodeId(keys.unpack_owner(row.value)) for row in page}
            numbers = sorted(set(owners.values()))
            inodes = await fetch_inodes(self._records, numbers)
            unreadable = await _unreadable(self._records, sorted(set(numbers) - set(inodes)))
            for row in page:
                if owners[row.key] not in unreadable:
                    stored = inodes.get(owners[row.key])
                    inode = stored.inode if stored is not None else None
                    self._note(check.owner_finding(row.key, row.value, inode))

    async def _owned(self, page: Sequence[RecordRow]) -> None:
        """Look whether the data ids that inodes name lead back to them."""
        named = {}
        for row in page:
            inode = check.read_inode(row.key, row.value)
            if isinstance(inode, Inode) and inode.layout is not None and inode.layout.data:
                named[keys.owner_key(inode.layout.data)] = (inode, row.value)
        found = await self._records.fetch_records(tuple(named)) if named else ()
        for value, (inode, stored) in zip(found, named.values(), strict=True):
            self._note(check.unowned_finding(inode, stored, value))

    async def _queue(self) -> None:
        async for page in self._pages(keys.Prefix.DELETED):
            wanted = tuple(keys.inode_key(keys.unpack_inode_suffix(row.key)) for row in page)
            found = await self._records.fetch_records(wanted)
            for row, inode in zip(page, found, strict=True):
                if inode is not None:
                    self._note(check.queue_finding(row.key, row.value))

    # ------------------------------------------------------------ replies

    async def _ages(self) -> None:
        async for page in self._pages(keys.Prefix.REPLY_AGE):
            wanted = tuple(_reply_of(row.key) for row in page)
            found = await self._records.fetch_records(wanted)
            for row, reply in zip(page, found, strict=True):
                if reply is None:
                    self._note(check.age_finding(row.key, row.value))

    async def _replies(self) -> None:
        waiting: set[bytes] = set()
        async for page in self._pages(keys.Prefix.REPLY, values=False):
            waiting.update(row.key for row in page)
            if len(waiting) >= REPLIES_AT_ONCE:
                await self._without_age(waiting)
                waiting = set()
        if waiting:
            await self._without_age(waiting)

    async def _without_age(self, waiting: set[bytes]) -> None:
        async for page in self._pages(keys.Prefix.REPLY_AGE, values=False):
            waiting.difference_update(_reply_of(row.key) for row in page)
        wanted = tuple(sorted(waiting))[:PAGE_ROWS]
        if wanted:
            values = dict(zip(wanted, await self._records.fetch_records(wanted), strict=True))
            for finding in check.reply_findings(wanted, values):
                self._note(finding)


async def judge_names(
    records: Records, page: Sequence[RecordRow], quotas: check_trees.Quotas | None = None
) -> list[Finding]:
    """Judge a page of directory entries; with all `quotas` also what counts for which."""
    found: list[Finding] = []
    entries: list[tuple[RecordRow, InodeId, schema.Entry]] = []
    for row in page:
        entry = check.read_entry(row.key, row.value)
        if isinstance(entry, Finding):
            found.append(entry)
        else:
            entries.append((row, *entry))
    numbers = {parent for _, parent, _ in entries} | {named.inode for _, _, named in entries}
    inodes = await fetch_inodes(records, sorted(numbers))
    unreadable = await _unreadable(records, sorted(numbers - set(inodes)))
    for row, parent, named in entries:
        if unreadable & {parent, named.inode}:
            continue  # found by whoever reads the inodes; nothing follows for their names
        finding = await _judge_name(records, row, inodes.get(parent), inodes.get(named.inode))
        parents, named_inode = inodes.get(parent), inodes.get(named.inode)
        if finding is None and quotas is not None and parents and named_inode:
            finding = check_trees.quota_name_finding(
                row.key, parents.inode, named_inode.inode, named_inode.value, quotas
            )
        if finding is not None:
            found.append(finding)
    return found


async def _unreadable(records: Records, missing: Sequence[InodeId]) -> set[InodeId]:
    if not missing:
        return set()
    values = await records.fetch_records(tuple(map(keys.inode_key, missing)))
    return {n for n, value in zip(missing, values, strict=True) if value is not None}


async def _judge_name(
    records: Records, row: RecordRow, directory: Stored | None, leads_to: Stored | None
) -> Finding | None:
    parent = directory.inode if directory is not None else None
    inode = leads_to.inode if leads_to is not None else None
    problem = check.entry_finding(row.key, row.value, parent, inode)
    if problem is not None or leads_to is None or not check.is_misplaced(row.key, inode):
        return problem
    twice = await name_in(records, leads_to.inode.parent, leads_to.inode.id)
    return check.misplaced_finding(
        row.key, row.value, leads_to.inode, leads_to.value, named_by_parent=bool(twice)
    )


async def name_in(records: Records, directory: InodeId, inode: InodeId) -> bytes:
    """Return a name of the inode in a directory, b"" if it has none there."""
    async for page in pages(records, keys.entry_span(directory)):
        for row in page:
            entry = check.read_entry(row.key, row.value)
            if not isinstance(entry, Finding) and entry[1].inode == inode:
                return keys.entry_name(row.key)
    return b""


def _reply_of(age_key: bytes) -> bytes:
    return keys.aged_key(keys.unpack_reply_age_key(age_key))
