"""Mutations of what holds several metadata servers together."""

from typing import Any

from msgspec.structs import replace

from emberfs.client import metadata
from emberfs.client.metachoice import MetaServers
from emberfs.meta import chunkguard, files, tree
from emberfs.meta.collect import Collector
from emberfs.meta.forgetting import Forgetting
from emberfs.meta.tenure import Shared
from sim.mutations import Patch, mutation

NAMES = "names, unreadable"
CONTENT = "file content, file length"
FOUND = "fsck, left over"
ERROR = "error at a client"


@mutation("metas, metas storm", NAMES)
def retries_elsewhere_look_new(patch: Patch) -> None:
    """A retry at another server looks like a first try: its failure leaves no record."""
    patch.set(metadata, "_sent_elsewhere", lambda request: request)


@mutation("metas", NAMES)
def forgotten_replies_leave_no_mark(patch: Patch) -> None:
    """When a reply is forgotten, a copy of its call is performed."""
    patch.set(Forgetting, "_raise_mark", lambda self, txn, client, sequence, known: None)


@mutation("metas storm", CONTENT)
def cuts_go_on_after_a_tenure(patch: Patch) -> None:
    """A server that was put out of its place sends what it had in hand."""

    async def get(self: Any, endpoints: Any) -> Any:
        return await self._peers.get(endpoints)

    patch.set(chunkguard._GuardedPeers, "get", get)


@mutation("metas storm", f"{CONTENT}, {FOUND}")
def cuts_of_others_are_not_waited_for(patch: Patch) -> None:
    """A file is opened and settled while another server cuts it."""

    patch.set(files, "load_uncut", tree.load_inode)


@mutation("metas storm", FOUND)
def files_are_collected_while_they_are_cut(patch: Patch) -> None:
    """A server removes the chunks of a file that another may still be cutting."""
    patch.set(Collector, "_is_ours", lambda self, row: True)


@mutation("metas storm", f"{ERROR}, {CONTENT}, {FOUND}")
def cuts_of_the_dead_are_left(patch: Patch) -> None:
    """Nobody takes over what a dead server has begun."""
    patch.set(Shared, "is_over", lambda self, owner: False)


@mutation("gentle metas", ERROR)
def clients_stay_with_a_server_that_does_not_answer(patch: Patch) -> None:
    """While routing shows it alive, it is asked again and again."""
    patch.set(MetaServers, "failed", lambda self, snapshot, node: None)


@mutation("metas storm", CONTENT)
def sessions_do_not_say_since_when(patch: Patch) -> None:
    """Whether a client lives is judged by routing of any age, and by what this server has heard."""

    def make(original: Any) -> Any:
        def add_session(txn: Any, context: Any, inode: Any, request: Any) -> None:
            original(txn, context, inode, replace(request, since=0))

        return add_session

    patch.wrap(files, "_add_session", make)
