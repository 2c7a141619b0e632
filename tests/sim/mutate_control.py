"""Mutations of the management services: leases, chains, election, what is stored."""

import copy
import itertools
from typing import Any

import msgspec

from emberfs.mgmtd import chain as chains
from emberfs.mgmtd import membership
from emberfs.mgmtd.election import Election, ElectionTiming
from emberfs.mgmtd.events import Persist
from emberfs.mgmtd.manager import Manager
from emberfs.mgmtd.membership import Membership
from emberfs.mgmtd.store import ClusterStore
from emberfs.mgmtd.term import Term
from emberfs.proto.cluster import LocalState, PublicState
from sim.mutations import WRONG, Patch, mutation

VERSIONS = "version went back, two contents of a version, two primaries, published unstored"


@mutation("two worlds, network", WRONG)
def dead_before_the_lease_is_over(patch: Patch) -> None:
    """A node is declared dead a quarter of a lease after its last heartbeat."""

    def make(original: Any) -> Any:
        def tick(self: Any, now_ns: int, outcome: Any) -> None:
            timing = self._timing
            self._timing = msgspec.structs.replace(timing, lease_ns=timing.lease_ns // 4)
            try:
                original(self, now_ns, outcome)
            finally:
                self._timing = timing

        return tick

    patch.wrap(Membership, "_tick", make)


@mutation("processes, network, everything", VERSIONS)
def epochs_are_not_checked(patch: Patch) -> None:
    """A mgmtd that was primary goes on, whoever has taken over."""

    async def fence(self: Any, transaction: Any, mine: Any) -> None:
        pass

    patch.set(ClusterStore, "_fence", fence)
    patch.wrap(Manager, "_check", lambda original: lambda self: None)


@mutation("processes, everything", VERSIONS)
def claims_do_not_wait(patch: Patch) -> None:
    """A candidate takes over while the lease of the primary runs."""

    async def fence(self: Any, transaction: Any, mine: Any) -> None:
        pass

    patch.set(ClusterStore, "_fence", fence)
    patch.set(Election, "_claimable_ns", lambda self: self._since_ns)


@mutation("processes, network, gentle", f"{VERSIONS}, {WRONG}")
def state_is_published_and_not_stored(patch: Patch) -> None:
    """What mgmtd decides is not stored."""

    async def persist(self: Any, effect: Any) -> None:
        pass

    patch.set(Term, "_persist", persist)


@mutation("processes, network, everything", f"{VERSIONS}, {WRONG}")
def state_is_published_before_it_is_stored(patch: Patch) -> None:
    """What mgmtd decides is known to others before it is stored, and stored a little later."""

    def make(original: Any) -> Any:
        async def persist(self: Any, effect: Persist) -> None:
            async def later() -> None:
                await self._env.sleep_ns(400_000_000)
                try:
                    await original(self, effect)
                except Exception:
                    self._resign("cannot be stored")

            self._tasks.spawn(later(), name="late")

        return persist

    patch.wrap(Term, "_persist", make)


@mutation("processes, gentle, everything", VERSIONS)
def versions_are_used_again(patch: Patch) -> None:
    """After a takeover versions begin where they were last reserved."""

    def make(original: Any) -> Any:
        def load(self: Any, event: Any, now_ns: int, outcome: Any) -> None:
            original(self, event, now_ns, outcome)
            self._version = max(0, self._version - membership.VERSIONS_RESERVED)

        return load

    patch.wrap(Membership, "_load", make)


@mutation("outage, everything, aimed", WRONG)
def any_replica_revives_a_chain(patch: Patch) -> None:
    """After a total outage whoever returns first serves, complete or not."""

    def make(original: Any) -> Any:
        def next_chain(chain: Any, local: Any, doubtful: Any = ()) -> Any:
            if not chain.serving():
                targets = [
                    msgspec.structs.replace(member, state=PublicState.LASTSRV)
                    for member in chain.targets
                ]
                chain = msgspec.structs.replace(chain, targets=tuple(targets))
            return original(chain, local, doubtful)

        return next_chain

    patch.wrap(membership, "next_chain", make)


@mutation("processes, outage", "error at a client")
def every_return_of_a_chain_is_a_loss(patch: Patch) -> None:
    """Whoever brings a chain back is taken for one that has lost something."""

    def make(original: Any) -> Any:
        def next_chain(chain: Any, local: Any, doubtful: Any = ()) -> Any:
            return original(chain, local, {member.target for member in chain.targets})

        return next_chain

    patch.wrap(membership, "next_chain", make)


@mutation("power", "error at a client")
def every_power_cut_is_a_loss(patch: Patch) -> None:
    """A chain is said to have lost what one of its replicas has lost."""

    def make(original: Any) -> Any:
        def next_chain(chain: Any, local: Any, doubtful: Any = ()) -> Any:
            found = original(chain, local, doubtful)
            if found is chain or not doubtful:
                return found
            return msgspec.structs.replace(found, lost=found.version)

        return next_chain

    patch.wrap(membership, "next_chain", make)


@mutation("gentle, processes, power", WRONG)
def targets_serve_before_they_are_filled(patch: Patch) -> None:
    """A target in recovery serves before it says that it is complete."""
    patch.put(chains.TABLE, (PublicState.SYNCING, LocalState.ONLINE), chains.Move.FINISH)


@mutation("everything, processes, aimed", WRONG)
def old_reports_count(patch: Patch) -> None:
    """UPTODATE counts whichever version of the chain it was decided on."""

    def local_state(self: Any, place: Any, version: int) -> Any:
        member = self._members.get(place.node)
        if member is None or not member.node.alive:
            return LocalState.OFFLINE
        report = self._reports.get(place.target)
        return report.local if report is not None else LocalState.OFFLINE

    patch.set(Membership, "_local_state", local_state)
    patch.put(chains.TABLE, (PublicState.WAITING, LocalState.UPTODATE), chains.Move.FINISH)
    patch.put(chains.TABLE, (PublicState.OFFLINE, LocalState.UPTODATE), chains.Move.FINISH)


@mutation("gentle, processes", "no exit, error at a client")
def the_dead_are_never_buried(patch: Patch) -> None:
    """A node that is silent for a lease stays in its chains."""
    patch.set(Membership, "_bury", lambda self, member, outcome: None)


@mutation("gentle, processes", "no exit")
def waiting_targets_stay_so(patch: Patch) -> None:
    """A target that was lost is not filled again."""
    patch.put(chains.TABLE, (PublicState.OFFLINE, LocalState.ONLINE), chains.Move.KEEP)
    patch.put(chains.TABLE, (PublicState.WAITING, LocalState.ONLINE), chains.Move.KEEP)


@mutation("gentle, processes", VERSIONS)
def chain_versions_stay(patch: Patch) -> None:
    """A chain changes and keeps its version."""

    def make(original: Any) -> Any:
        return lambda number, version, targets, lost: original(number, 1, targets)

    patch.wrap(chains, "Chain", make)


@mutation("gentle, processes", VERSIONS)
def snapshots_share_a_version(patch: Patch) -> None:
    """Two snapshots of different content have the same version, now and then."""
    calls = itertools.count(1)

    def make(original: Any) -> Any:
        def effects(self: Any, outcome: Any, now_ns: int) -> Any:
            if next(calls) % 5 == 0 and self._version > 5:
                self._version -= 1
            return original(self, outcome, now_ns)

        return effects

    patch.wrap(Membership, "_effects", make)


@mutation("managers", VERSIONS)
def a_leader_believes_its_lease_longer(patch: Patch) -> None:
    """It answers for two leases after its last renewal."""
    patch.set(ElectionTiming, "answer_ns", property(lambda self: 2 * self.lease_ns))


@mutation("managers", VERSIONS)
def renewals_are_not_stable(patch: Patch) -> None:
    """A power cut of the store takes back that the leader was there."""

    class Hasty:
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        async def run(self, work: Any, *, durable: bool) -> Any:
            return await self._engine.run(work)

    def make(original: Any) -> Any:
        async def renew(self: Any, mine: Any) -> Any:
            hasty = copy.copy(self)
            hasty._engine = Hasty(self._engine)
            return await original(hasty, mine)

        return renew

    patch.wrap(ClusterStore, "renew", make)
