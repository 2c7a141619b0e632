"""Faults of the metadata server and of clients with open files, and the moods that have them."""

import asyncio
from collections.abc import Awaitable, Callable

from sim.check_lives import Cut
from sim.cluster import World
from sim.files_load import FilesLoad
from sim.machine import Machine
from sim.meta_view import seen_of, store_of
from sim.moods import Mood
from sim.nemesis import Nemesis

LONG_S = 20.0  # longer than lease and grace time: sessions end

FILE_MOODS = {
    mood.name: mood
    for mood in (
        Mood("names", ("kill meta", "meta dies between operations", "reset"), files=True,
             messages=True),
        # Within the replication factor, and no message is lost: no client may see an error.
        Mood("gentle files", ("kill meta", "meta dies between operations", "kill storage",
             "kill mgmtd", "reset"), files=True, gentle=True),
        Mood("files", ("kill meta", "kill client", "kill storage", "meta dies between operations"),
             files=True, messages=True),
        Mood("meta power", ("power cut of meta", "meta dies between operations", "kill client"),
             files=True),
        Mood("meta storm", ("kill meta", "freeze meta", "isolate meta", "kill client", "reset",
             "kill mgmtd", "slow meta disk"), files=True, messages=True, overlap=True),
        Mood("lost clients", ("freeze client", "isolate client", "kill client", "kill meta"),
             files=True, overlap=True),
        Mood("files and storage", ("kill storage", "freeze storage", "isolate storage",
             "die between disk operations", "kill client", "reset"), files=True, messages=True),
        # Several metadata servers on one store.
        Mood("metas", ("kill meta", "freeze meta", "reset", "maybe committed"), files=True,
             messages=True, metas=2),
        Mood("gentle metas", ("kill meta", "freeze meta", "isolate meta", "kill storage",
             "kill mgmtd", "reset", "maybe committed"), files=True, gentle=True, metas=3),
        Mood("metas storm", ("kill meta", "freeze meta", "isolate meta", "one way of meta",
             "kill client", "freeze client", "reset", "kill mgmtd", "freeze rows",
             "maybe committed"), files=True, messages=True, overlap=True, metas=3),
        Mood("metas and storage", ("freeze meta", "kill meta", "one way of meta", "kill storage",
             "freeze storage", "isolate client"), files=True, messages=True, overlap=True,
             metas=2),
        # Once, the power of all servers fails in the same instant.
        Mood("files blackout", ("blackout", "blackout", "kill client", "kill meta"), files=True),
    )
}  # fmt: skip


class FilesNemesis(Nemesis):
    """A nemesis that knows metadata servers."""

    def __init__(self, world: World, load: FilesLoad, mood: Mood) -> None:
        super().__init__(world, load, mood)
        self.files = load

    def victims(self, kind: str) -> list[Machine]:
        """See Nemesis."""
        if kind in ("freeze rows", "maybe committed"):
            return [self.world.rows]
        return self.world.meta if "meta" in kind else super().victims(kind)

    def actions(self) -> dict[str, Callable[[Machine], Awaitable[None]]]:
        """See Nemesis."""
        return super().actions() | {
            "kill meta": self._kill,
            "freeze meta": self._freeze,
            "isolate meta": self._isolate,
            "one way of meta": self._one_way,
            "freeze rows": self._freeze_rows,
            "maybe committed": self._doubt,
            "slow meta disk": self._slow_disk,
            "meta dies between operations": self._die_soon,
            "power cut of meta": self._cut_meta,
            "freeze client": self._freeze_client,
            "isolate client": self._isolate_client,
        }

    async def _cut_meta(self, victim: Machine) -> None:
        """Its store loses what was not synced; both sides of the cut are kept for the checkers."""
        before = seen_of(store_of(victim))
        at_ns = self.world.loop.now_ns()
        victim.power_cut()
        self.files.cuts.append(Cut(at_ns, before, seen_of(store_of(victim))))
        await asyncio.sleep(self._some_seconds() / 2)
        victim.power_on()
        self.revive(victim)

    async def _blackout(self, victim: Machine) -> None:
        """All servers of data and metadata at once; the clients have their own supply."""
        if self.load.cut_ns:
            return
        meta = self.world.meta[0]
        before, at_ns = seen_of(store_of(meta)), self.world.loop.now_ns()
        meta.power_cut()
        self.files.cuts.append(Cut(at_ns, before, seen_of(store_of(meta))))
        await super()._blackout(victim)
        meta.power_on()
        self.revive(meta)

    async def _freeze_rows(self, victim: Machine) -> None:
        """The store of all metadata servers stands still."""
        process = victim.process
        assert process is not None
        process.pause()
        await asyncio.sleep(self._some_seconds() / 2)
        process.resume()

    async def _doubt(self, victim: Machine) -> None:
        """The store does not say what became of commits."""
        self.world.maybe_share = self.dice.choice((0.05, 0.3))
        await asyncio.sleep(self._some_seconds())
        self.world.maybe_share = 0.0

    async def _freeze_client(self, victim: Machine) -> None:
        process = victim.process
        if process is None or not process.alive:
            return
        process.pause()
        await asyncio.sleep(self.dice.choice((2, 7, LONG_S)) * self.dice.uniform(0.8, 1.2))
        if process.alive:
            process.resume()

    async def _isolate_client(self, victim: Machine) -> None:
        """Out of sight of the management services, or of everybody."""
        names = [m.name for m in (*self.world.mgmtd, self.world.kv)]
        if self.dice.random() < 0.5:
            names = [name for name in self.world.machines if name != victim.name]
        pairs = [p for n in names for p in ((victim.name, n), (n, victim.name))]
        await self._cut_links(pairs, self.dice.choice((2, 7, LONG_S)))
