"""Records every call that a client makes to the metadata service, below the file library.

What the library does in several calls (walk to a directory, then act in it) is not atomic; each
call is, so this is where check_tree.py looks.
"""

import stat
from collections.abc import Callable
from typing import Any

import msgspec

from emberfs.client.metadata import Metadata
from emberfs.meta.schema import Reply
from emberfs.proto import meta_calls as calls
from emberfs.proto import quota_calls
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.method import Method
from sim.check_lives import FLUSH
from sim.check_tree import DIRECTORY, ERRORS, FILE
from sim.history import History, Key

_METHODS: dict[int, Method[Any, Any]] = {
    method.number: method
    for method in (*vars(calls).values(), *vars(quota_calls).values())
    if isinstance(method, Method)
}
# What a quota refuses does nothing, and check_tree.py knows of no quotas.
REFUSED = ("QUOTA", "OTHER_QUOTA")


def record_calls(
    metadata: Metadata,
    history: History,
    client: int,
    requests: dict[int, tuple[int, int]],
    now_ns: Callable[[], int],
    note: Callable[[str], None],
) -> None:
    """Let every further call of `metadata` appear in `history`; request ids in `requests`."""
    original = metadata._call

    async def call(method: Method[Any, Any], request: Any) -> Any:
        described = _described(method, request)
        if described is None:
            return await original(method, request)
        kind, key = described
        op = history.begin(client, kind, key, 0, 0, now_ns())
        wanted = getattr(request, "request", None)
        if wanted is not None:
            requests[op.number] = (wanted.client, wanted.sequence)
        try:
            answer = await original(method, request)
        except EmberfsError as problem:
            name = problem.code.name
            if name not in (*ERRORS, *REFUSED) and name != "SUPERSEDED":  # that is tried again
                note(f"{method.name}: {problem.code.name}: {problem}")
            outcome = "fail" if name in ERRORS else "unknown"
            history.end(op, now_ns(), outcome, result=name)
            raise
        history.end(op, now_ns(), "ok", result=in_words(method, answer))
        return answer

    metadata._call = call  # type: ignore[method-assign]


def _described(method: Method[Any, Any], request: Any) -> tuple[str, Key] | None:
    """Return kind and key of a call that check_tree knows."""
    if method is calls.RESOLVE:
        path = request.path.decode()
        return "resolve", (path.rpartition("/")[0] + "/" if request.parent else path,)
    if method is calls.LOOKUP:
        return "lookup", _key(request.parent, request.name)
    if method is calls.MKNOD:
        return "mkdir", _key(request.parent, request.name)
    if method is calls.CREATE:
        exclusive = "x" if request.exclusive else ""
        return "create", (*_key(request.parent, request.name), exclusive)
    if method is calls.LINK:
        return "link", (request.inode, *_key(request.parent, request.name))
    if method is calls.REMOVE:
        kind = "rmdir" if request.directory else "unlink"
        return kind, _key(request.parent, request.name)
    if method is quota_calls.REMOVE_TREE:
        return "rmtree", _key(request.parent, request.name)
    if method is calls.RENAME:
        old = _key(request.parent, request.name)
        return "rename", (*old, *_key(request.new_parent, request.new_name))
    if method is calls.READDIR:
        return "readdir", (request.inode,)
    if method is calls.STABLE or (method is calls.SETTLE and request.durable):
        return FLUSH, ()
    return None


def _key(parent: int, name: bytes) -> tuple[int, str]:
    return int(parent), name.decode()


def in_words(method: Method[Any, Any], answer: msgspec.Struct) -> str:
    """Return an answer as check_tree compares it."""
    if method in (calls.SETTLE, calls.STABLE):
        return ""
    if isinstance(answer, calls.InodeAnswer | calls.OpenAnswer | calls.ResolveAnswer):
        return _stat(answer.inode)
    if isinstance(answer, calls.ReaddirAnswer):
        return "/".join(f"{row.name.decode()} {row.id}" for row in answer.rows)
    return ""


def _stat(inode: Inode) -> str:
    kind = DIRECTORY if stat.S_ISDIR(inode.mode) else FILE
    return f"{kind} {inode.id} {inode.nlink}"


def reply_in_words(reply: Reply) -> str:
    """Return a remembered reply as check_tree compares it."""
    method = _METHODS[reply.method]
    return in_words(method, method.decode_answer(reply.body))
