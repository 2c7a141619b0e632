"""A client that may have been taken for dead looks whether its open files are still its own.

After lease and grace time the sessions of a client end, and files without a name are collected. A
process that was frozen or cut off for so long would write chunks that nobody removes any more, and
read zeros where its data was. So a lease that has run out stops writes until it is renewed, and
every file is opened anew, under its old session, before it is used again. The same is done when a
metadata server has begun a new life: a power cut may have taken sessions from it. Not so where
another one has lived on: what several servers share loses no commit.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from emberfs.proto.cluster import NodeKind, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import InodeId, NodeId


class Membership(Protocol):
    """What the fence asks of client.agent.Agent."""

    lapses: int  # how often the lease had run out before it was renewed

    def is_member(self) -> bool:
        """Tell whether mgmtd cannot have declared the process dead yet."""
        ...


class Fence:
    """Between open files and the chunks that they are made of."""

    def __init__(
        self, membership: Membership | None, reopen: Callable[[InodeId], Awaitable[None]]
    ) -> None:
        """`reopen` makes the sessions of a file valid; STALE if the file is gone."""
        self._membership = membership
        self._reopen = reopen
        self._metas: dict[NodeId, int] = {}  # lives of the metadata servers, by their incarnation
        self._living: dict[NodeId, int] = {}  # those of them that are alive
        self._restarts = 0
        self._seen: dict[InodeId, tuple[int, int]] = {}  # when a file was known to be open

    def note_routing(self, snapshot: RoutingSnapshot) -> bool:
        """Tell whether a metadata server has begun a new life."""
        nodes = snapshot.nodes_of(NodeKind.META)
        metas = {node.id: node.incarnation for node in nodes}
        living = {node.id: node.incarnation for node in nodes if node.alive}
        known, self._metas = self._metas, metas
        lived_on = any(self._living.get(node) == life for node, life in living.items())
        self._living = living
        again = not lived_on and any(known.get(node, life) != life for node, life in metas.items())
        self._restarts += again
        return again

    def _now(self) -> tuple[int, int]:
        lapses = self._membership.lapses if self._membership is not None else 0
        return lapses, self._restarts

    def watch(self, inode: InodeId) -> None:
        """A file was opened."""
        self._seen.setdefault(inode, self._now())

    def forget(self, inode: InodeId) -> None:
        """A file has no descriptions any more."""
        self._seen.pop(inode, None)

    def is_current(self, inode: InodeId) -> bool:
        """Tell whether the file is known to be open at meta."""
        now = self._now()
        if self._seen.get(inode, now) != now:
            return False
        return self._membership is None or self._membership.is_member()

    async def before_read(self, inode: InodeId) -> None:
        """Return when the file is known to be open at meta; STALE if it is gone."""
        now = self._now()
        if self.is_current(inode):
            return
        await self._reopen(inode)
        if inode in self._seen:
            self._seen[inode] = now

    async def before_write(self, inode: InodeId) -> None:
        """As before_read; NOT_REGISTERED until the lease is renewed: try again then."""
        if self._membership is not None and not self._membership.is_member():
            raise EmberfsError(Code.NOT_REGISTERED, "the lease of this client has run out")
        await self.before_read(inode)
