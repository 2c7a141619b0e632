"""Chunks whose inode a power cut has taken are found after the next start."""

from emberfs.meta.orphans import Orphans
from emberfs.proto.errors import Code, EmberfsError
from unit.meta_world import CHUNK, World, fails, play

DISK = EmberfsError(Code.DISK, "Input/output error")


def search_of(w: World) -> Orphans:
    """A search as a starting server makes it."""
    return Orphans(w.env, w.engine, w.chunks, lambda: w.routing, 0)


async def cut_power(w: World) -> Orphans:
    """Lose what is not synced, start again."""
    await w.context.close()
    w.store.crash()  # type: ignore[attr-defined]
    w.boot()
    await w.open()
    orphans = search_of(w)
    await orphans.load()
    return orphans


def test_o20_r12_chunks_of_a_file_that_a_power_cut_took_are_removed() -> None:
    """A file that was written and whose creation was not stable leaves no chunks behind."""

    async def scene(w: World) -> None:
        kept = await w.create(b"kept")
        await w.settle(kept.id, length=5, durable=True)
        lost = await w.create(b"lost")
        w.chunks.put(kept.id, 5)
        w.chunks.put(lost.id, CHUNK, 7)
        orphans = await cut_power(w)
        young = await w.create(b"young")
        w.chunks.put(young.id, 9)
        assert await orphans.search() == 1
        assert w.chunks.of(lost.id) == {}
        assert (w.chunks.of(kept.id), w.chunks.of(young.id)) == ({0: 5}, {0: 9})

    play(scene)


def test_o20_lost_files_are_searched_until_it_succeeded() -> None:
    """A search that fails, or that another power cut precedes, is made up for."""

    async def scene(w: World) -> None:
        lost = await w.create(b"lost")
        w.chunks.put(lost.id, 7)
        first = await cut_power(w)
        w.chunks.error = DISK
        await fails(DISK.code, first.search())
        for turn in range(3):  # lives that reserve ids and have no time to search
            await w.create(b"n%d" % turn)
            await w.context.close()
            w.boot()
            await w.open()
        w.chunks.error = None
        orphans = search_of(w)
        await orphans.load()
        await orphans.live()
        assert w.chunks.of(lost.id) == {}
        again = search_of(w)
        await again.load()
        assert again._first > again._last  # nothing is left to search

    play(scene)
