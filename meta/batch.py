"""Many small files in one call: attributes by path, and files made together with their content.

Directories are found once for all items in them, and what is read is read together: a store at
another place is asked a few times for a batch, not a few times for each file. Making files is three
steps in one transaction: read, decide for every item by itself, write. An item is refused before
anything of it is written, so that the others can go on without it.
"""

from functools import partial
from typing import NamedTuple

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import schema
from emberfs.meta.batch_make import Place, make, refusal
from emberfs.meta.context import Context
from emberfs.meta.permission import EXECUTE, check_name
from emberfs.meta.resolve import check_path, walk
from emberfs.meta.tree import load_directory, no_entry, read_inode
from emberfs.proto.batch_calls import (
    BATCH_CREATE,
    BatchCreateAnswer,
    BatchCreateRequest,
    BatchStatAnswer,
    BatchStatRequest,
    Outcome,
    StatRow,
    check_bytes,
    outcome_of,
)
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import Caller, ResolveRequest


class _Way(NamedTuple):
    """A path, divided: the directory that holds its last name, and that name."""

    directory: bytes
    name: bytes


def _divided(path: bytes) -> _Way:
    directory, _, name = path.rpartition(b"/")
    return _Way(directory + b"/", name)


async def _directories(
    txn: Transaction, caller: Caller, paths: tuple[bytes, ...]
) -> dict[bytes, InodeId | Outcome]:
    """Find every directory that is named on the ways, once each."""
    found: dict[bytes, InodeId | Outcome] = {}
    for path in dict.fromkeys(_divided(path).directory for path in paths):
        try:
            at = (await walk(txn, ResolveRequest(caller, path))).inode
            found[path] = (await load_directory(txn, at.id, caller, EXECUTE)).id
        except EmberfsError as problem:
            found[path] = refusal(problem)
    return found


# ---------------------------------------------------------------- attributes


async def stat(context: Context, request: BatchStatRequest) -> BatchStatAnswer:
    """Attributes of what many paths lead to, all of one moment."""
    check_bytes(sum(map(len, request.paths)))
    rows = await context.engine.run(partial(_look, request=request), read_only=True)
    return BatchStatAnswer(tuple(rows))


async def _look(txn: Transaction, request: BatchStatRequest) -> list[StatRow]:
    """Most paths end with a plain name in a directory: those are read together."""
    directories = await _directories(txn, request.caller, request.paths)
    rows: list[StatRow | None] = [None] * len(request.paths)
    wanted: list[tuple[int, InodeId, bytes]] = []
    for place, path in enumerate(request.paths):
        way = _divided(path)
        directory = directories[way.directory]
        try:
            check_path(path)
            if way.name in (b"", b".", b".."):
                rows[place] = await _walked(txn, request, path)
            elif isinstance(directory, Outcome):
                rows[place] = StatRow(None, directory)
            else:
                check_name(way.name)
                wanted.append((place, directory, way.name))
        except EmberfsError as problem:
            rows[place] = StatRow(None, refusal(problem))
    for (place, _, _), found in zip(wanted, await _entries(txn, wanted), strict=True):
        if isinstance(found, Inode) and found.is_symlink() and request.follow:
            rows[place] = await _walked(txn, request, request.paths[place])
        else:
            rows[place] = StatRow(found) if isinstance(found, Inode) else StatRow(None, found)
    return [row for row in rows if row is not None]


async def _walked(txn: Transaction, request: BatchStatRequest, path: bytes) -> StatRow:
    try:
        found = await walk(txn, ResolveRequest(request.caller, path, request.follow))
    except EmberfsError as problem:
        return StatRow(None, refusal(problem))
    return StatRow(found.inode)


async def _entries(
    txn: Transaction, wanted: list[tuple[int, InodeId, bytes]]
) -> list[Inode | Outcome]:
    """What names lead to: one multi-get for the entries, one for the inodes."""
    values = await txn.get_many([keys.entry_key(parent, name) for _, parent, name in wanted])
    ids = [None if value is None else schema.ENTRY.decode(value).inode for value in values]
    present = [inode for inode in ids if inode is not None]
    records = await txn.get_many([keys.inode_key(inode) for inode in present])
    inodes = dict(zip(present, records, strict=True))
    return [
        outcome_of(no_entry(parent, name)) if inode is None else read_inode(inode, inodes[inode])
        for (_, parent, name), inode in zip(wanted, ids, strict=True)
    ]


# ---------------------------------------------------------------- new files


async def create(context: Context, request: BatchCreateRequest) -> BatchCreateAnswer:
    """Make small files with their content in one transaction, on stable storage when answered."""
    check_bytes(sum(len(item.path) + len(item.content) for item in request.items))
    paths = tuple(item.path for item in request.items)
    find = partial(_directories, caller=request.caller, paths=paths)
    # Apart, as when a client walks first: what lies above a directory may change meanwhile.
    directories = await context.engine.run(find, read_only=True)
    places = [await _place(context, path, directories) for path in paths]

    async def work(txn: Transaction) -> BatchCreateAnswer:
        return BatchCreateAnswer(tuple(await make(txn, context, request, places)))

    return await context.replies.run(BATCH_CREATE, request.request, work, durable=True)


async def _place(
    context: Context, path: bytes, directories: dict[bytes, InodeId | Outcome]
) -> Place | Outcome:
    way = _divided(path)
    directory = directories[way.directory]
    try:
        check_path(path)
    except EmberfsError as problem:
        return refusal(problem)
    if isinstance(directory, Outcome):
        return directory
    return Place(directory, way.name, await context.ids.take())
