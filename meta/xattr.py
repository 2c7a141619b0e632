"""Extended attributes: xattr(7) rules for user.*, trusted.* and security.*; inode_xattrs.py."""

import stat

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import inode_xattrs
from emberfs.meta.context import Context
from emberfs.meta.permission import READ, WRITE, require, require_mutable, require_owner
from emberfs.meta.tree import load_inode, store_inode
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX, Inode
from emberfs.proto.meta_calls import (
    SET_XATTR,
    Caller,
    Nothing,
    SetXattrRequest,
    XattrAnswer,
    XattrRequest,
)

CREATE = 1
REPLACE = 2
LIST_BYTES_MAX = 65_536  # what listxattr(2) can return

_USER, _TRUSTED, _SECURITY = b"user.", b"trusted.", b"security."


async def xattr(context: Context, request: XattrRequest) -> XattrAnswer:
    """Get one, or list the names."""

    async def work(txn: Transaction) -> XattrAnswer:
        inode = await load_inode(txn, request.inode)
        if not request.name:
            return XattrAnswer(names=await _names(txn, inode, request.caller))
        _check_name(request.name)
        _check_read(inode, request.caller, request.name)
        if request.name in inode_xattrs.NAMES:
            value = inode_xattrs.value_of(inode, request.name)
        else:
            value = await txn.get(keys.xattr_key(inode.id, request.name))
        if value is None:
            raise _missing(request.name)
        return XattrAnswer(value=value)

    return await context.engine.run(work, read_only=True)


async def set_xattr(context: Context, request: SetXattrRequest) -> Nothing:
    """Set or remove one."""
    _check_name(request.name)
    if request.value is not None and len(request.value) > XATTR_VALUE_BYTES_MAX:
        raise EmberfsError(
            Code.TRANSACTION_TOO_LARGE,
            f"an attribute of {len(request.value)} bytes; the limit is {XATTR_VALUE_BYTES_MAX}",
        )

    async def work(txn: Transaction) -> Nothing:
        inode = await load_inode(txn, request.inode)
        if request.name in inode_xattrs.NAMES:
            store_inode(txn, _with_inode_xattr(inode, request, context.env.wall_ns()))
            return Nothing()
        _check_write(inode, request.caller, request.name)
        key = keys.xattr_key(inode.id, request.name)
        exists = await txn.get(key) is not None
        if exists and request.flags & CREATE:
            raise EmberfsError(Code.EXISTS, f"attribute {request.name!r} exists")
        if not exists and (request.value is None or request.flags & REPLACE):
            raise _missing(request.name)
        if request.value is None:
            txn.clear(key)
        else:
            if not exists:
                await _check_room(txn, inode, request.name)
            txn.set(key, request.value)
        store_inode(txn, replace(inode, ctime_ns=context.env.wall_ns()))
        return Nothing()

    return await context.replies.run(SET_XATTR, request.request, work)


def _with_inode_xattr(inode: Inode, request: SetXattrRequest, now_ns: int) -> Inode:
    if request.name == inode_xattrs.FLAGS:
        if request.caller.uid != 0:
            raise EmberfsError(Code.NOT_PERMITTED, "only uid 0 may change the flags of a file")
    else:
        require_mutable(inode)
    exists = inode_xattrs.value_of(inode, request.name) is not None
    if exists and request.flags & CREATE:
        raise EmberfsError(Code.EXISTS, f"attribute {request.name!r} exists")
    if not exists and (request.value is None or request.flags & REPLACE):
        raise _missing(request.name)
    changed = inode_xattrs.with_value(inode, request.caller, request.name, request.value)
    return replace(changed, ctime_ns=now_ns)


def _missing(name: bytes) -> EmberfsError:
    return EmberfsError(Code.NO_ATTRIBUTE, f"no attribute {name!r}")


def _check_name(name: bytes) -> None:
    if not name or len(name) > XATTR_NAME_BYTES_MAX or b"\0" in name:
        raise EmberfsError(
            Code.RANGE, f"an attribute name has 1 to {XATTR_NAME_BYTES_MAX} bytes, no zero byte"
        )
    if name in inode_xattrs.NAMES:
        return
    if name in (_USER, _TRUSTED, _SECURITY):
        raise EmberfsError(Code.INVALID, f"{name!r}: an attribute needs a name behind its space")
    if not name.startswith((_USER, _TRUSTED, _SECURITY)):
        raise EmberfsError(
            Code.UNSUPPORTED,
            f"{name!r}: only user.*, trusted.*, security.* and POSIX ACLs are stored",
        )


def _check_read(inode: Inode, caller: Caller, name: bytes) -> None:
    if name.startswith(_TRUSTED) and caller.uid != 0:
        raise _missing(name)
    if name.startswith(_USER):
        require(inode, caller, READ)


def _check_write(inode: Inode, caller: Caller, name: bytes) -> None:
    require_mutable(inode)
    if not name.startswith(_USER):
        if caller.uid != 0:
            raise EmberfsError(Code.NOT_PERMITTED, f"only uid 0 may change {name!r}")
        return
    if not (inode.is_file() or inode.is_directory()):
        raise EmberfsError(
            Code.NOT_PERMITTED, "user.* attributes are for regular files and directories"
        )
    if inode.is_directory() and inode.mode & stat.S_ISVTX:
        require_owner(inode, caller)
    require(inode, caller, WRITE)


async def _names(txn: Transaction, inode: Inode, caller: Caller) -> tuple[bytes, ...]:
    rows = await txn.get_range(*keys.xattr_span(inode.id))
    names = [*(keys.xattr_name(key) for key, _ in rows), *inode_xattrs.names_of(inode)]
    return tuple(n for n in names if caller.uid == 0 or not n.startswith(_TRUSTED))


async def _check_room(txn: Transaction, inode: Inode, name: bytes) -> None:
    rows = await txn.get_range(*keys.xattr_span(inode.id))
    used = sum(len(keys.xattr_name(key)) + 1 for key, _ in rows)
    if used + len(name) + 1 > LIST_BYTES_MAX:
        raise EmberfsError(Code.NO_SPACE, f"inode {inode.id} has {len(rows)} attributes already")
