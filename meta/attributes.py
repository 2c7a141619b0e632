"""The effect of setattr on an inode, without its length: permissions and side effects."""

import stat

from msgspec.structs import replace

from emberfs.meta.permission import (
    WRITE,
    in_group,
    require,
    require_mutable,
    require_owner,
    without_set_id,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.meta_calls import SERVER_CLOCK, Caller, SetattrRequest


def with_attributes(inode: Inode, request: SetattrRequest, now_ns: int) -> Inode:
    """Return the inode after chown, chmod and utimens, in this order.

    Raises NOT_PERMITTED, ACCESS, or UNSUPPORTED (mode of a symlink).
    """
    asked = (request.mode, request.uid, request.gid, request.atime_ns, request.mtime_ns)
    if any(field is not None for field in asked):  # a length alone was looked at before
        require_mutable(inode)
    changed = _with_owner(inode, request)
    changed = _with_mode(changed, request)
    changed = _with_times(inode, changed, request, now_ns)
    return replace(changed, ctime_ns=now_ns)


def _with_owner(inode: Inode, request: SetattrRequest) -> Inode:
    if request.uid is None and request.gid is None:
        return inode
    caller = request.caller
    uid = inode.uid if request.uid is None else request.uid
    gid = inode.gid if request.gid is None else request.gid
    if caller.uid != 0:
        require_owner(inode, caller)
        if uid != inode.uid or (gid != inode.gid and not in_group(caller, gid)):
            raise EmberfsError(
                Code.NOT_PERMITTED, f"uid {caller.uid} may not give inode {inode.id} away"
            )
    mode = inode.mode if inode.is_directory() else without_set_id(inode.mode)
    return replace(inode, uid=uid, gid=gid, mode=mode)


def _with_mode(inode: Inode, request: SetattrRequest) -> Inode:
    if request.mode is None:
        return inode
    if inode.is_symlink():
        raise EmberfsError(Code.UNSUPPORTED, "the mode of a symbolic link cannot be changed")
    caller = request.caller
    mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(request.mode)
    require_owner(inode, caller)
    if caller.uid != 0 and not in_group(caller, inode.gid):
        mode &= ~stat.S_ISGID
    return replace(inode, mode=mode)


def _with_times(before: Inode, inode: Inode, request: SetattrRequest, now_ns: int) -> Inode:
    atime_ns, mtime_ns = request.atime_ns, request.mtime_ns
    if atime_ns is None and mtime_ns is None:
        return inode
    touched = atime_ns == mtime_ns == SERVER_CLOCK  # one of the two alone is for owners
    if not touched:
        require_owner(before, request.caller)
    elif request.caller.uid != before.uid:
        require(before, request.caller, WRITE)
    return replace(
        inode,
        atime_ns=_time(atime_ns, inode.atime_ns, now_ns),
        mtime_ns=_time(mtime_ns, inode.mtime_ns, now_ns),
    )


def _time(asked_ns: int | None, old_ns: int, now_ns: int) -> int:
    if asked_ns is None:
        return old_ns
    return now_ns if asked_ns == SERVER_CLOCK else asked_ns


def after_write(inode: Inode, *, privileged: bool, now_ns: int, mtime_ns: int | None) -> Inode:
    """Return the inode after its content changed: times, and set-id bits of the unprivileged."""
    mode = inode.mode if privileged else without_set_id(inode.mode)
    return replace(
        inode, mode=mode, mtime_ns=now_ns if mtime_ns is None else mtime_ns, ctime_ns=now_ns
    )


def is_privileged(caller: Caller) -> bool:
    """Tell who may write without losing set-id bits (CAP_FSETID)."""
    return caller.uid == 0
