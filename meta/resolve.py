"""Names to inodes: one step (lookup) and whole paths, with permission checks."""

import stat

from emberfs.kv.transaction import Transaction
from emberfs.meta.context import Context
from emberfs.meta.permission import EXECUTE, check_name
from emberfs.meta.tree import load_directory, load_entry, load_inode
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import PATH_BYTES_MAX, Inode
from emberfs.proto.ids import ROOT_INODE
from emberfs.proto.meta_calls import (
    Caller,
    InodeAnswer,
    LookupRequest,
    ResolveAnswer,
    ResolveRequest,
)

SYMLINKS_MAX = 40


async def step(txn: Transaction, directory: Inode, name: bytes, caller: Caller) -> Inode:
    """Return what a name leads to. The directory is known to grant EXECUTE."""
    if name == b".":
        return directory
    if name == b"..":
        return await load_inode(txn, directory.parent)
    check_name(name)
    entry = await load_entry(txn, directory.id, name)
    return await load_inode(txn, entry.inode)


async def lookup(context: Context, request: LookupRequest) -> InodeAnswer:
    """Find a name in a directory."""

    async def work(txn: Transaction) -> InodeAnswer:
        directory = await load_directory(txn, request.parent, request.caller, EXECUTE)
        return InodeAnswer(await step(txn, directory, request.name, request.caller))

    return await context.engine.run(work, read_only=True)


async def resolve(context: Context, request: ResolveRequest) -> ResolveAnswer:
    """Walk a path from the root."""

    async def work(txn: Transaction) -> ResolveAnswer:
        return await walk(txn, request)

    return await context.engine.run(work, read_only=True)


async def walk(txn: Transaction, request: ResolveRequest) -> ResolveAnswer:
    """Walk inside a transaction; see path_resolution(7)."""
    check_path(request.path)
    caller = request.caller
    names = _split(request.path)
    must_be_directory = request.path.endswith((b"/", b"/.", b"/.."))
    last = _take_last(names) if request.parent else b""
    at = await load_inode(txn, ROOT_INODE)
    links = 0
    while names:
        directory = await load_directory(txn, at.id, caller, EXECUTE)
        found = await step(txn, directory, names.pop(), caller)
        follows = bool(names) or request.parent or request.follow or must_be_directory
        if not (found.is_symlink() and follows):
            at = found
            continue
        links += 1
        if links > SYMLINKS_MAX:
            raise EmberfsError(Code.LOOP, f"more than {SYMLINKS_MAX} symbolic links on the way")
        must_be_directory |= not names and found.symlink.endswith(b"/")
        names += _split(found.symlink)
        at = await load_inode(txn, ROOT_INODE) if found.symlink.startswith(b"/") else directory
    if (request.parent or must_be_directory) and not stat.S_ISDIR(at.mode):
        raise EmberfsError(Code.NOT_DIRECTORY, f"inode {at.id} is not a directory")
    return ResolveAnswer(at, last)


def check_path(path: bytes) -> None:
    """Refuse what cannot be a path: NOT_FOUND if empty, NAME_TOO_LONG."""
    if not path:
        raise EmberfsError(Code.NOT_FOUND, "an empty path")
    if len(path) > PATH_BYTES_MAX:
        raise EmberfsError(
            Code.NAME_TOO_LONG, f"a path of {len(path)} bytes; the limit is {PATH_BYTES_MAX}"
        )


def _split(path: bytes) -> list[bytes]:
    """Names of a path, last one first."""
    return [name for name in path.split(b"/") if name][::-1]


def _take_last(names: list[bytes]) -> bytes:
    """The name that is to be made or removed; the root has only itself."""
    return names.pop(0) if names else b"."
