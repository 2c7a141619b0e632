"""Quotas, removal of whole trees, and the trash: the calls behind them, by inode."""

import errno
from collections.abc import AsyncIterator

from emberfs.client.metadata import Metadata
from emberfs.proto import quota_calls as calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import Caller
from emberfs.proto.quota_calls import QuotaReport, TrashItem

PAGE_ROWS = 1000
DEPTH_MAX = 1000  # of a tree that is removed in parts


class Administration:
    """What one user may do to quotas, trees and the trash."""

    def __init__(self, metadata: Metadata, caller: Caller) -> None:
        self._metadata = metadata
        self._caller = caller

    # ------------------------------------------------------------ quotas

    async def set_quota(
        self, inode: InodeId, *, bytes_max: int | None = None, files_max: int | None = None
    ) -> None:
        """Limit a directory; None leaves a limit, 0 lifts it. NOT_PERMITTED, NOT_DIRECTORY."""
        request = calls.SetQuotaRequest(
            self._caller, self._metadata.next_request(), inode, bytes_max, files_max
        )
        await self._metadata.perform(calls.SET_QUOTA, request)

    async def remove_quota(self, inode: InodeId) -> None:
        """Lift it. NOT_FOUND if there is none."""
        request = calls.RemoveQuotaRequest(self._caller, self._metadata.next_request(), inode)
        await self._metadata.perform(calls.REMOVE_QUOTA, request)

    async def quotas_of(self, inode: InodeId) -> tuple[QuotaReport, ...]:
        """The quotas that an inode counts for, innermost first."""
        request = calls.ShowQuotaRequest(self._caller, inode)
        return (await self._metadata.perform(calls.SHOW_QUOTA, request)).quotas

    async def quotas(self) -> AsyncIterator[QuotaReport]:
        """All quotas. NOT_PERMITTED."""
        after, more = InodeId(0), True
        while more:
            request = calls.ListQuotasRequest(self._caller, after)
            page = await self._metadata.perform(calls.LIST_QUOTAS, request)
            for report in page.quotas:
                yield report
                after = report.directory
            more = page.more

    # ------------------------------------------------------------ trees

    async def remove_tree(self, parent: InodeId, name: bytes, depth: int = 0) -> None:
        """Remove a directory with everything below it, or something that is no directory.

        A tree that has too many names to be checked in one call is removed in parts.
        """
        request = calls.RemoveTreeRequest(self._caller, self._metadata.next_request(), parent, name)
        try:
            await self._metadata.perform(calls.REMOVE_TREE, request)
        except EmberfsError as problem:
            if problem.code == Code.NOT_DIRECTORY:
                await self._metadata.remove(self._caller, parent, name, directory=False)
            elif problem.code == Code.TOO_MANY_NAMES and depth < DEPTH_MAX:
                await self._remove_parts(parent, name, depth)
            else:
                raise

    async def _remove_parts(self, parent: InodeId, name: bytes, depth: int) -> None:
        directory = await self._metadata.lookup(self._caller, parent, name)
        more = True
        while more:
            page = await self._metadata.readdir(
                self._caller, directory.id, b"", PAGE_ROWS, plus=False
            )
            for row in page.rows:
                try:
                    await self.remove_tree(directory.id, row.name, depth + 1)
                except EmberfsError as problem:
                    if problem.errno != errno.ENOENT:  # else another one was faster
                        raise
            more = page.more
        await self._metadata.remove(self._caller, parent, name, directory=True)

    # ------------------------------------------------------------ trash

    async def trash(self, parent: InodeId, name: bytes, path: bytes) -> None:
        """Put a name into the trash; `path` is what the list shows."""
        request = calls.TrashRequest(
            self._caller, self._metadata.next_request(), parent, name, path
        )
        await self._metadata.perform(calls.TRASH, request)

    async def trashed(self) -> AsyncIterator[TrashItem]:
        """What is in the trash, oldest first."""
        after_ns, after, more = 0, InodeId(0), True
        while more:
            request = calls.ListTrashRequest(self._caller, after_ns, after)
            page = await self._metadata.perform(calls.LIST_TRASH, request)
            for item in page.items:
                yield item
            after_ns, after, more = page.after_ns, InodeId(page.after), page.more

    async def restore(self, item: TrashItem) -> None:
        """Put it back where it was. EXISTS, NOT_FOUND."""
        request = calls.RestoreRequest(
            self._caller, self._metadata.next_request(), item.time_ns, item.id
        )
        await self._metadata.perform(calls.RESTORE, request)

    async def remove_trashed(self, item: TrashItem) -> None:
        """Remove it for good."""
        request = calls.EmptyTrashRequest(
            self._caller, self._metadata.next_request(), item.time_ns, item.id
        )
        await self._metadata.perform(calls.EMPTY_TRASH, request)
