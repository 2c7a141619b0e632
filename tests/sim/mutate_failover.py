"""Mutations of what shortens an outage: reported deaths, members that are asked to leave."""

from typing import Any

from emberfs.mgmtd.events import DeathReported
from emberfs.mgmtd.membership import Membership
from emberfs.proto.cluster import LocalState
from emberfs.storage.reach import Reach
from emberfs.storage.target import TargetState, Unwanted
from sim.mutations import WRONG, Patch, mutation


@mutation("cut links", "error at a client, scenario")
def silence_is_not_told(patch: Patch) -> None:
    """A replica that does not reach its successor waits and tells nobody."""
    patch.set(Reach, "unreachable", lambda self, now_ns: frozenset())


@mutation("cut links", "error at a client")
def unwanted_members_stay(patch: Patch) -> None:
    """A target that is asked to leave its chain does not."""

    def make(original: Any) -> Any:
        def handle(self: Any, event: Any, now_ns: int) -> Any:
            return original(self, Unwanted("") if isinstance(event, Unwanted) else event, now_ns)

        return handle

    patch.wrap(TargetState, "handle", make)


@mutation("cut links and more", WRONG)
def unwanted_members_are_put_out(patch: Patch) -> None:
    """A target that cannot be reached is OFFLINE before it knows, and goes on answering reads."""

    def make(original: Any) -> Any:
        def local_state(self: Any, place: Any, version: int) -> Any:
            if any(place.target in report.unreachable for report in self._reports.values()):
                return LocalState.OFFLINE
            return original(self, place, version)

        return local_state

    patch.wrap(Membership, "_local_state", make)
    unwanted_members_stay(patch)


@mutation("reported deaths", "no exit, scenario")
def deaths_of_earlier_lives_count(patch: Patch) -> None:
    """The report of a death ends whatever life of the node there is now."""

    def make(original: Any) -> Any:
        def die(self: Any, event: DeathReported, outcome: Any) -> None:
            member = self._members.get(event.node)
            now = member.node.incarnation if member is not None else 0
            original(self, DeathReported(event.node, now), outcome)

        return die

    patch.wrap(Membership, "_die", make)
