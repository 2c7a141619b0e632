"""Mutations of small files: versions of their content, promotion, what clients tell again."""

from typing import Any

from msgspec.structs import replace

from emberfs.client.inline import InlineContent
from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import files, inline, promote
from emberfs.meta.inline import Versions
from emberfs.meta.orphans import Orphans
from emberfs.proto.inline import first_version_of
from sim.mutate_meta import CONTENT, FOUND
from sim.mutations import Patch, mutation


@mutation("files", CONTENT)
def settlements_ignore_the_version(patch: Patch) -> None:
    """Meta replaces the content, whatever the new one was made from."""

    def make(original: Any) -> Any:
        def put(txn: Any, versions: Any, inode: Any, request: Any) -> Any:
            return original(txn, versions, inode, replace(request, inline_version=(1 << 63) - 1))

        return put

    assert files.inline is inline
    patch.wrap(inline, "put", make)


@mutation("files", CONTENT)
def promotions_do_not_look_again(patch: Patch) -> None:
    """A file gets the chunks that were written, whatever has become of its content."""
    patch.set(promote, "is_same", lambda now, inode: True)


@mutation("files", CONTENT)
def promoted_chunks_have_the_own_id(patch: Patch) -> None:
    """Chunks of a small file that grew are named by its inode."""

    async def new_data_id(context: Any, inode: Any) -> Any:
        return inode.id

    patch.set(promote, "new_data_id", new_data_id)


@mutation("files", FOUND)
def given_up_promotions_are_not_collected(patch: Patch) -> None:
    """Chunks of an attempt that came to nothing stay."""

    async def give_up(context: Any, layout: Any) -> None:
        return

    patch.set(promote, "give_up", give_up)


@mutation("files, meta storm", CONTENT)
def owners_of_data_ids_are_not_looked_at(patch: Patch) -> None:
    """The search for chunks of lost files takes those of small files that grew."""

    async def lost(self: Any, inodes: Any) -> Any:
        async def missing(txn: Transaction) -> Any:
            values = await txn.get_many([keys.inode_key(inode) for inode in inodes])
            return [inode for inode, v in zip(inodes, values, strict=True) if v is None]

        return await self._engine.run(missing, read_only=True)

    patch.set(Orphans, "_lost", lost)


@mutation("metas", CONTENT)
def ids_are_not_barred(patch: Patch) -> None:
    """Who searches for lost chunks does not say so before to the other servers."""

    async def barred(txn: Transaction) -> int:
        return -1

    patch.set(promote, "barred_block", barred)


@mutation("meta power", CONTENT)
def told_contents_are_not_told_again(patch: Patch) -> None:
    """fsync takes what was told once for stable."""
    patch.set(InlineContent, "unstable", property(lambda self: self.unsettled))


@mutation("meta power", CONTENT)
def lost_contents_are_not_laid_over(patch: Patch) -> None:
    """What was told in an earlier life of meta is taken for a part of what there is now."""
    patch.set(InlineContent, "_reclaim", lambda self, version: None)


@mutation("meta power", CONTENT)
def versions_of_contents_are_given_again(patch: Patch) -> None:
    """The lives of the server are not told apart."""

    async def load(self: Any, **_: Any) -> None:
        self._next = first_version_of(1)

    patch.set(Versions, "load", load)


@mutation("files", CONTENT)
def readers_do_not_look_at_the_version(patch: Patch) -> None:
    """Who has a small file open takes its content for what it was."""
    patch.set(InlineContent, "outdated", property(lambda self: False))
