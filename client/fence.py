"""A client that may have been taken for dead looks whether its open files are still its own.

After lease and grace time the sessions of a client end, and files without a name are collected. A
process that was frozen or cut off for so long would write chunks that nobody removes any more, and
read zeros where its data was. So a lease that has run out stops writes until it is renewed, and
every file is opened anew, under its old session, before it is used again.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import InodeId


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
        self._seen: dict[InodeId, int] = {}  # lapses by which the file was known to be there

    def watch(self, inode: InodeId) -> None:
        """A file was opened."""
        if self._membership is not None:
            self._seen.setdefault(inode, self._membership.lapses)

    def forget(self, inode: InodeId) -> None:
        """A file has no descriptions any more."""
        self._seen.pop(inode, None)

    async def before_read(self, inode: InodeId) -> None:
        """Return when the file is known to be there; STALE if it is gone."""
        member = self._membership
        if member is None:
            return
        lapses = member.lapses
        if self._seen.get(inode, lapses) != lapses or not member.is_member():
            await self._reopen(inode)
            self._seen[inode] = lapses

    async def before_write(self, inode: InodeId) -> None:
        """As before_read; NOT_REGISTERED until the lease is renewed: try again then."""
        if self._membership is not None and not self._membership.is_member():
            raise EmberfsError(Code.NOT_REGISTERED, "the lease of this client has run out")
        await self.before_read(inode)
