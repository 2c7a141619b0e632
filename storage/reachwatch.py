"""Pings whoever does not answer, and says who is silent for too long: the shell around reach.py."""

import asyncio
from collections.abc import Callable, Iterable

from emberfs.client.nodecalls import RoutingView
from emberfs.proto.ids import NodeId, TargetId, target_node
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet
from emberfs.storage.hosted import chain_of_target
from emberfs.storage.links import Links
from emberfs.storage.reach import LOOK_NS


class ReachWatch:
    """Looks at the chains of our own targets."""

    def __init__(
        self,
        env: Env,
        routing: RoutingView,
        links: Links,
        targets: Iterable[TargetId],
        report_now: Callable[[], None],
    ) -> None:
        self.unreachable: dict[TargetId, tuple[TargetId, ...]] = {}  # by our own target
        self._env = env
        self._routing = routing
        self._links = links
        self._targets = tuple(targets)
        self._report_now = report_now
        self._pings: dict[NodeId, asyncio.Task[None]] = {}

    async def run(self, tasks: TaskSet) -> None:
        """Look for ever; pings are tasks of `tasks`."""
        while True:
            await self._env.sleep_ns(LOOK_NS)
            self._look(tasks)

    def _look(self, tasks: TaskSet) -> None:
        reach, now_ns = self._links.reach, self._env.now_ns()
        companions = self._companions()
        others = {target_node(other): other for found in companions.values() for other in found}
        reach.keep(others.keys())
        silent = reach.unreachable(now_ns)
        unreachable = {
            target: missed
            for target, found in companions.items()
            if (missed := tuple(other for other in found if target_node(other) in silent))
        }
        if unreachable != self.unreachable:
            self.unreachable = unreachable
            self._report_now()
        self._pings = {node: task for node, task in self._pings.items() if not task.done()}
        for node in reach.doubtful(now_ns):
            if node in others and node not in self._pings:
                ping = self._links.ping(others[node])
                self._pings[node] = tasks.spawn(ping, name=f"ping {node}")

    def _companions(self) -> dict[TargetId, list[TargetId]]:
        """The other members of each target's chain, on nodes that are alive."""
        snapshot, found = self._routing.snapshot, dict[TargetId, list[TargetId]]()
        alive = {number for number, node in snapshot.nodes.items() if node.alive}
        for target in self._targets:
            chain = chain_of_target(snapshot, target)
            members = chain.targets if chain is not None else ()
            found[target] = [m.target for m in members if m.target != target and m.node in alive]
        return found
