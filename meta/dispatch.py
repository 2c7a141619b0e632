"""One table from method to handler, and what surrounds every call: decode, measure, encode."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from emberfs.fabric.call import Handler, ServerCall
from emberfs.meta import (
    batch,
    files,
    mend,
    namespace,
    promote,
    quota_census,
    records,
    rename,
    resolve,
    space,
    tree_calls,
    xattr,
)
from emberfs.meta import quota_calls as quotas
from emberfs.meta.context import Context
from emberfs.meta.metrics import ERRORS, SECONDS
from emberfs.proto import batch_calls, meta_calls, quota_calls
from emberfs.proto.errors import EmberfsError
from emberfs.proto.method import Method

log = logging.getLogger("emberfs.meta.dispatch")


class Binding(NamedTuple):
    """A method and the function that answers it."""

    method: Method[Any, Any]
    handle: Callable[[Context, Any], Awaitable[Any]]


async def _listen(context: Context, request: meta_calls.ListenRequest) -> meta_calls.ListenAnswer:
    return await context.announcer.listen(request)


BINDINGS: tuple[Binding, ...] = (
    Binding(meta_calls.LOOKUP, resolve.lookup),
    Binding(meta_calls.RESOLVE, resolve.resolve),
    Binding(meta_calls.GETATTR, namespace.getattr_),
    Binding(meta_calls.SETATTR, files.setattr_),
    Binding(meta_calls.CREATE, files.create),
    Binding(meta_calls.MKNOD, namespace.mknod),
    Binding(meta_calls.SYMLINK, namespace.symlink),
    Binding(meta_calls.LINK, namespace.link),
    Binding(meta_calls.REMOVE, namespace.remove),
    Binding(meta_calls.RENAME, rename.rename),
    Binding(meta_calls.OPEN, files.open_),
    Binding(meta_calls.SETTLE, files.settle),
    Binding(meta_calls.READDIR, namespace.readdir),
    Binding(meta_calls.XATTR, xattr.xattr),
    Binding(meta_calls.SET_XATTR, xattr.set_xattr),
    Binding(meta_calls.STATFS, space.statfs),
    Binding(meta_calls.STABLE, space.stable),
    Binding(meta_calls.LISTEN, _listen),
    Binding(meta_calls.SCAN_RECORDS, records.scan),
    Binding(meta_calls.FETCH_RECORDS, records.fetch),
    Binding(meta_calls.CENSUS, records.census),
    Binding(meta_calls.MEND, mend.mend),
    Binding(meta_calls.CONTENT, files.content),
    Binding(meta_calls.PROMOTE, promote.promote),
    Binding(quota_calls.SET_QUOTA, quotas.set_quota),
    Binding(quota_calls.REMOVE_QUOTA, quotas.remove_quota),
    Binding(quota_calls.SHOW_QUOTA, quotas.show_quota),
    Binding(quota_calls.LIST_QUOTAS, quotas.list_quotas),
    Binding(quota_calls.QUOTA_CENSUS, quota_census.census),
    Binding(quota_calls.REMOVE_TREE, tree_calls.remove_tree),
    Binding(quota_calls.TRASH, tree_calls.trash),
    Binding(quota_calls.LIST_TRASH, tree_calls.list_trash),
    Binding(quota_calls.RESTORE, tree_calls.restore),
    Binding(quota_calls.EMPTY_TRASH, tree_calls.empty_trash),
    Binding(batch_calls.BATCH_STAT, batch.stat),
    Binding(batch_calls.BATCH_CREATE, batch.create),
)


def handlers(context: Context) -> dict[int, Handler]:
    """Return the handlers for a fabric server, by method number."""
    return {binding.method.number: _handler(context, binding) for binding in BINDINGS}


def _handler(context: Context, binding: Binding) -> Handler:
    method, handle = binding
    seconds = SECONDS.labels(method.name)
    now_ns = context.env.now_ns

    async def answer(call: ServerCall) -> bytes:
        started_ns = now_ns()
        try:
            return method.encode_answer(await handle(context, method.decode_request(call.body)))
        except EmberfsError as problem:
            ERRORS.labels(method.name, problem.code.name).inc()
            log.debug("%s from %s: %s", method.name, call.peer, problem)
            raise
        finally:
            seconds.observe((now_ns() - started_ns) / 1e9)

    return answer
