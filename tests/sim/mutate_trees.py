"""Mutations of quotas and removed trees."""

from typing import Any

from emberfs.kv import keys
from emberfs.meta import files, removed_trees, tree
from emberfs.meta import quota as quotas
from emberfs.meta.context import Context
from emberfs.proto.meta_calls import CREATE
from sim.mutations import Patch, mutation

QUOTA = "quota, fsck"


def _forget_at_start(patch: Patch, *prefixes: keys.Prefix) -> None:
    """A server that starts does not know these records."""

    def make(original: Any) -> Any:
        async def load(self: Any) -> None:
            async def forget(txn: Any) -> None:
                for prefix in prefixes:
                    for key, _ in await txn.get_range(*keys.span_of(prefix.value)):
                        txn.clear(key)

            await self.engine.run(forget)
            await original(self)

        return load

    patch.wrap(Context, "load", make)


@mutation("names", QUOTA)
def retries_count_again(patch: Patch) -> None:
    """A create that is asked for again counts again, although it answers what it did before."""
    seen: set[Any] = set()

    def make(original: Any) -> Any:
        async def run_open(context: Any, method: Any, request: Any, work: Any) -> Any:
            async def count(txn: Any) -> None:
                parent = await tree.load_inode(txn, request.parent)
                await quotas.charge(txn, parent.quota, quotas.Amount(1, 0), forced=True)

            if method is CREATE and request.request in seen:
                await context.engine.run(count)
            seen.add(request.request)
            return await original(context, method, request, work)

        return run_open

    patch.wrap(files, "_run_open", make)


@mutation("names", QUOTA)
def counters_are_forgotten_by_a_restart(patch: Patch) -> None:
    """Usage is known to the process only."""
    _forget_at_start(patch, keys.Prefix.USAGE)


@mutation("names", QUOTA)
def counting_is_forgotten_by_a_restart(patch: Patch) -> None:
    """What a new quota has not been through is known to the process only."""
    _forget_at_start(patch, keys.Prefix.WALK)


@mutation("names", "fsck, left over")
def removed_trees_are_forgotten_by_a_restart(patch: Patch) -> None:
    """The queue of removed directories is known to the process only."""
    _forget_at_start(patch, keys.Prefix.REMOVED)


@mutation("names", QUOTA)
def writers_are_not_told_of_room(patch: Patch) -> None:
    """Nobody tells a writer how far its file may grow."""

    async def grant_bytes(txn: Any, inode: Any, want: int = 0) -> None:
        return None

    patch.set(files, "grant_bytes", grant_bytes)


@mutation("names", "names, fsck")
def removed_trees_are_still_reached(patch: Patch) -> None:
    """Who knows a directory in a removed tree goes on making names in it."""

    async def check_reachable(txn: Any, directory: Any) -> None:
        return

    patch.set(tree, "check_reachable", check_reachable)


@mutation("names", "file content, fsck, left over")
def removed_trees_take_open_files_along(patch: Patch) -> None:
    """Nobody looks whether a file in a removed tree is open."""

    async def drop_link(txn: Any, inode: Any, now_ns: int) -> None:
        await tree.destroy(txn, inode, now_ns)

    patch.set(removed_trees, "drop_link", drop_link)
