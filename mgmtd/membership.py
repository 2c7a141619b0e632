"""Who is alive, what each target says of itself, and so the state of every chain.

One machine: `handle(event, now_ns) -> effects`. A node is alive from its registration or heartbeat
until a full lease has passed without another, or its host has reported the death of the process;
its targets are OFFLINE from then on. Chains are evaluated on every event that changes what is known
of their targets, never by polling.

Rules for reports:
- UPTODATE counts only if it was decided on the current version of the chain; else it is ONLINE.
- OFFLINE that was decided on an older version is not believed for one lease after the chain changed
  (its sender may not have seen the change yet), unless nothing better is known.
- A target that its node has not reported since it registered keeps its state for one lease.

Nobody is declared dead before a full lease after Loaded, nor after a pause of this process itself:
heartbeats may lie unread in its sockets.

Invariants: versions of the snapshot and of every chain only rise, over restarts too, because
versions are reserved on stable storage ahead of their use; a target is in at most one chain;
a refused request changes nothing.
"""

from collections import deque
from dataclasses import dataclass, field

import msgspec

from emberfs.mgmtd.chain import check_chain, next_chain
from emberfs.mgmtd.events import (
    Answer,
    ChainsRequested,
    DeathReported,
    Effect,
    Event,
    HeartbeatArrived,
    Loaded,
    Persist,
    Publish,
    Refused,
    Registered,
    Ticked,
    Timing,
)
from emberfs.mgmtd.quarrels import unwanted
from emberfs.proto.cluster import (
    Chain,
    ChainTarget,
    LocalState,
    Node,
    NodeKind,
    PublicState,
    RoutingSnapshot,
    TargetReport,
    TargetStatus,
)
from emberfs.proto.errors import Code
from emberfs.proto.ids import (
    SECOND,
    ChainId,
    ChainVersion,
    NodeId,
    RoutingVersion,
    TargetId,
    target_node,
)

VERSIONS_RESERVED = 1000  # snapshot versions per durable reservation
PROGRESS_NS = 1 * SECOND  # used bytes and progress of recovery are published this often at most
SUPERSEDED_MAX = 8  # incarnations remembered per node
EVALUATIONS_MAX = 10  # a chain settles in far fewer
STORY_EVENTS = 64


@dataclass(slots=True)
class _Member:
    """A node and when it was heard."""

    node: Node
    heard_ns: int
    registered_ns: int
    heard: bool = True  # by this mgmtd; False for a loaded node until it shows itself
    settled: bool = False  # a lease has passed since: unreported targets do not exist
    superseded: tuple[int, ...] = ()  # incarnations that a newer process has replaced


@dataclass(slots=True)
class _Outcome:
    """What one event has changed."""

    nodes: set[NodeId] = field(default_factory=set)
    dropped: set[NodeId] = field(default_factory=set)
    chains: set[ChainId] = field(default_factory=set)
    suspects: set[ChainId] = field(default_factory=set)  # chains to evaluate
    lease_ns: int = 0  # to be stored
    visible: bool = False  # worth a snapshot at once
    reply: Answer | Refused | None = None


class Membership:
    """The state of the cluster."""

    def __init__(self, cluster: str, own: Node, timing: Timing) -> None:
        self._cluster = cluster
        self._own = own
        self._timing = timing
        self._members: dict[NodeId, _Member] = {}
        self._reports: dict[TargetId, TargetReport] = {}  # of the present incarnations
        self._chains: dict[ChainId, Chain] = {}
        self._chain_of: dict[TargetId, ChainId] = {}
        self._changed_ns: dict[ChainId, int] = {}
        self._identity = 0
        self._promised_ns = 0  # as stored: the longest lease that a node may still hold
        self._version = RoutingVersion(0)
        self._reserved = RoutingVersion(0)
        self._grace_until_ns = 0  # nobody dies before
        self._ticked_ns = 0
        self._published_ns = 0
        self._progress = False  # something small is unpublished
        self.story: deque[tuple[int, Event]] = deque(maxlen=STORY_EVENTS)

    def handle(self, event: Event, now_ns: int) -> list[Effect]:
        """Apply one event; return what to do, in this order."""
        self.story.append((now_ns, event))
        outcome = _Outcome()
        match event:
            case Loaded():
                self._load(event, now_ns, outcome)
            case Registered():
                self._register(event, now_ns, outcome)
            case HeartbeatArrived():
                self._heartbeat(event, now_ns, outcome)
            case DeathReported():
                self._die(event, outcome)
            case ChainsRequested():
                self._create(event, now_ns, outcome)
            case Ticked():
                self._tick(now_ns, outcome)
        self._evaluate(outcome, now_ns)
        return self._effects(outcome, now_ns)

    def check(self) -> None:
        """Assert the invariants."""
        assert self._version <= self._reserved
        for chain in self._chains.values():
            check_chain(chain)
            for member in chain.targets:
                assert self._chain_of[member.target] == chain.id
        assert len(self._chain_of) == sum(len(c.targets) for c in self._chains.values())

    # Start and time.

    def _load(self, event: Loaded, now_ns: int, outcome: _Outcome) -> None:
        assert not self._reserved, "loaded twice"
        for node in event.nodes:
            settled = not node.alive
            self._members[node.id] = _Member(node, now_ns, now_ns, heard=False, settled=settled)
        for chain in event.chains:
            self._adopt(chain, now_ns)
        self._version = self._reserved = event.reserved
        self._identity = event.identity
        longest_ns = max(self._timing.lease_ns, event.lease_ns)
        outcome.lease_ns = longest_ns if longest_ns != event.lease_ns else 0
        self._promised_ns = longest_ns
        self._grace_until_ns = now_ns + longest_ns
        self._ticked_ns = now_ns
        outcome.visible = True

    def _tick(self, now_ns: int, outcome: _Outcome) -> None:
        lease_ns = self._timing.lease_ns
        if now_ns - self._ticked_ns > lease_ns // 2:
            self._grace_until_ns = max(self._grace_until_ns, now_ns + lease_ns)
        self._ticked_ns = now_ns
        if self._promised_ns > lease_ns and now_ns >= self._grace_until_ns:
            # Whoever held the longer lease of before has renewed it since, or is dead.
            self._promised_ns = outcome.lease_ns = lease_ns
        for member in [self._members[number] for number in sorted(self._members)]:
            if member.node.alive:
                if now_ns >= max(member.heard_ns + lease_ns, self._grace_until_ns):
                    self._bury(member, outcome)
                elif not member.settled and now_ns >= max(
                    member.registered_ns + lease_ns, self._grace_until_ns
                ):
                    member.settled = True
                    self._suspect_node(member.node.id, outcome)

    def _die(self, event: DeathReported, outcome: _Outcome) -> None:
        """End a lease early; a heartbeat of the dead that is still on its way is none any more."""
        member = self._members.get(event.node)
        if (
            member is not None
            and member.node.alive
            and member.node.incarnation == event.incarnation
            and member.node.kind != NodeKind.MGMTD
        ):
            member.superseded = (*member.superseded, event.incarnation)[-SUPERSEDED_MAX:]
            self._bury(member, outcome)
        outcome.reply = Answer(RoutingVersion(0))

    def _bury(self, member: _Member, outcome: _Outcome) -> None:
        number = member.node.id
        if member.node.kind == NodeKind.CLIENT:
            del self._members[number]
            outcome.dropped.add(number)
        else:
            self._change_node(member, msgspec.structs.replace(member.node, alive=False), outcome)
        self._suspect_node(number, outcome)
        outcome.visible = True

    # Registration and heartbeats.

    def _register(self, event: Registered, now_ns: int, outcome: _Outcome) -> None:
        node = msgspec.structs.replace(event.node, alive=True)
        message = self._taken(node)
        if message:
            outcome.reply = Refused(Code.NODE_ID_TAKEN, message)
            return
        message = _wrong_node(node) or _wrong_reports(node.id, node.kind, event.reports)
        if message:
            outcome.reply = Refused(Code.INVALID, message)
            return
        member = self._members.get(node.id)
        if member is None:
            member = self._members[node.id] = _Member(node, now_ns, now_ns)
            outcome.nodes.add(node.id)
        elif member.node.incarnation != node.incarnation:
            old = (*member.superseded, member.node.incarnation)[-SUPERSEDED_MAX:]
            member.superseded, member.registered_ns, member.settled = old, now_ns, False
            self._forget_reports(node.id)
        self._change_node(member, node, outcome)
        self._suspect_node(node.id, outcome)
        outcome.visible = True
        self._hear(member, event.reports, now_ns, outcome)
        outcome.reply = Answer(RoutingVersion(0))

    def _taken(self, node: Node) -> str:
        """Say who has this node id, if it is somebody else."""
        if node.id == self._own.id:
            return f'node id {node.id} is that of mgmtd itself; choose another "node"'
        member = self._members.get(node.id)
        if member is None:
            return ""
        known = member.node
        if (known.kind, known.client) != (node.kind, node.client):
            if not known.alive and not self._holds_replicas(node.id):
                return ""
            return (
                f"node id {node.id} belongs to a {known.kind.name.lower()} process on "
                f'{known.host}; choose another "node"'
            )
        if node.incarnation in member.superseded:
            return (
                f"node id {node.id} was taken over by a newer process on {known.host}; stop one of "
                'the two or give this one another "node"'
            )
        # After a power cut of everything hosts may have new names: who has not shown itself since
        # this mgmtd started has no claim.
        elsewhere = known.incarnation != node.incarnation and known.host != node.host
        if known.alive and member.heard and elsewhere:
            return (
                f"node id {node.id} is in use by a live process on {known.host}; choose another "
                '"node", or wait until its lease has expired'
            )
        return ""

    def _holds_replicas(self, node: NodeId) -> bool:
        return any(target_node(target) == node for target in self._chain_of)

    def _heartbeat(self, event: HeartbeatArrived, now_ns: int, outcome: _Outcome) -> None:
        member = self._members.get(event.node)
        if (
            member is None
            or event.incarnation in member.superseded
            or (member.node.kind, member.node.incarnation) != (event.kind, event.incarnation)
        ):
            message = f"node {event.node} is not registered with this incarnation; register again"
            outcome.reply = Refused(Code.NOT_REGISTERED, message)
            return
        message = _wrong_reports(event.node, event.kind, event.reports)
        if message:
            outcome.reply = Refused(Code.INVALID, message)
            return
        if not member.node.alive:
            self._change_node(member, msgspec.structs.replace(member.node, alive=True), outcome)
            self._suspect_node(event.node, outcome)
            outcome.visible = True
        self._hear(member, event.reports, now_ns, outcome)
        outcome.reply = Answer(RoutingVersion(0))

    def _change_node(self, member: _Member, node: Node, outcome: _Outcome) -> None:
        if node != member.node:
            member.node = node
            outcome.nodes.add(node.id)

    # Reports.

    def _hear(
        self, member: _Member, reports: tuple[TargetReport, ...], now_ns: int, outcome: _Outcome
    ) -> None:
        member.heard_ns, member.heard = now_ns, True
        if member.node.kind != NodeKind.STORAGE:
            return
        named = {report.target for report in reports}
        for target in sorted(self._reports):
            if target_node(target) == member.node.id and target not in named:
                del self._reports[target]
                self._suspect(target, outcome)
                outcome.visible = True
        for report in reports:
            self._accept(report, now_ns, outcome)

    def _accept(self, report: TargetReport, now_ns: int, outcome: _Outcome) -> None:
        known = self._reports.get(report.target)
        if known is not None and self._disbelieved(report, known, now_ns):
            report = msgspec.structs.replace(
                report, local=known.local, chain_version=known.chain_version, reason=known.reason
            )
        if report == known:
            return
        self._reports[report.target] = report
        self._progress = True
        if known is None or _news(known) != _news(report):
            outcome.visible = True
        self._suspect(report.target, outcome)

    def _disbelieved(self, report: TargetReport, known: TargetReport, now_ns: int) -> bool:
        """Tell an OFFLINE that was decided before the last change of the chain."""
        chain = self._chain_of.get(report.target)
        return (
            chain is not None
            and report.local == LocalState.OFFLINE
            and known.local != LocalState.OFFLINE
            and 0 < report.chain_version < self._chains[chain].version
            and now_ns < self._changed_ns[chain] + self._timing.lease_ns
        )

    def _forget_reports(self, node: NodeId) -> None:
        for target in [t for t in self._reports if target_node(t) == node]:
            del self._reports[target]

    # Chains.

    def _create(self, event: ChainsRequested, now_ns: int, outcome: _Outcome) -> None:
        refusal = self._wrong_chains(event)
        if refusal is not None:
            outcome.reply = refusal
            return
        created = []
        for number, targets in event.chains:
            if number not in self._chains:
                places = [ChainTarget(t, target_node(t), PublicState.SERVING) for t in targets]
                self._adopt(Chain(number, ChainVersion(1), tuple(places)), now_ns)
                outcome.chains.add(number)
                outcome.suspects.add(number)
                created.append(number)
        outcome.visible = bool(created)
        outcome.reply = Answer(RoutingVersion(0), tuple(created))

    def _wrong_chains(self, event: ChainsRequested) -> Refused | None:
        """Find the first reason not to create these chains."""
        claimed = dict(self._chain_of)
        numbers = [number for number, _ in event.chains]
        if len(set(numbers)) != len(numbers) or 0 in numbers:
            return Refused(Code.INVALID, "chain ids must be distinct and not 0")
        for number, targets in event.chains:
            existing = self._chains.get(number)
            if existing is not None:
                if {m.target for m in existing.targets} == set(targets):
                    continue
                return Refused(Code.EXISTS, f"chain {number} exists with other targets")
            if not targets:
                return Refused(Code.INVALID, f"chain {number} has no targets")
            for target in targets:
                message = self._unusable(target, claimed)
                if message:
                    return Refused(Code.INVALID, f"chain {number}: {message}")
                claimed[target] = number
        return None

    def _unusable(self, target: TargetId, claimed: dict[TargetId, ChainId]) -> str:
        """Say why a target cannot enter a new chain. New chains begin complete, hence strictly."""
        if target in claimed:
            return f"target {target} is already in chain {claimed[target]}"
        member = self._members.get(target_node(target))
        report = self._reports.get(target)
        if member is None or report is None:
            return f"target {target} has not been reported by node {target_node(target)}"
        if not member.node.alive or report.local == LocalState.OFFLINE:
            return f"target {target} is offline {report.reason}".rstrip()
        return ""

    def _adopt(self, chain: Chain, now_ns: int) -> None:
        self._chains[chain.id] = check_chain(chain)
        self._changed_ns[chain.id] = now_ns
        for member in chain.targets:
            self._chain_of[member.target] = chain.id

    def _suspect(self, target: TargetId, outcome: _Outcome) -> None:
        chain = self._chain_of.get(target)
        if chain is not None:
            outcome.suspects.add(chain)

    def _suspect_node(self, node: NodeId, outcome: _Outcome) -> None:
        for target in self._chain_of:
            if target_node(target) == node:
                self._suspect(target, outcome)

    def _evaluate(self, outcome: _Outcome, now_ns: int) -> None:
        """Move every suspected chain until it settles."""
        for number in sorted(outcome.suspects):
            chain = self._chains[number]
            for _ in range(EVALUATIONS_MAX):
                before, doubtful = chain, self._doubtful(chain)
                chain = next_chain(chain, self._local_states(chain), doubtful)
                if chain is before:
                    break
            else:
                raise AssertionError(f"chain {number} does not settle: {chain}")
            if chain is not self._chains[number]:
                self._adopt(chain, now_ns)
                outcome.chains.add(number)
                outcome.visible = True

    def _local_states(self, chain: Chain) -> dict[TargetId, LocalState]:
        found = {}
        for place in chain.targets:
            state = self._local_state(place, chain.version)
            if state is not None:
                found[place.target] = state
        return found

    def _doubtful(self, chain: Chain) -> set[TargetId]:
        reports = (self._reports.get(place.target) for place in chain.targets)
        return {report.target for report in reports if report is not None and report.doubtful}

    def _local_state(self, place: ChainTarget, version: ChainVersion) -> LocalState | None:
        member = self._members.get(place.node)
        if member is None or not member.node.alive:
            return LocalState.OFFLINE
        report = self._reports.get(place.target)
        if report is None:
            return LocalState.OFFLINE if member.settled else None
        if report.local == LocalState.UPTODATE and report.chain_version != version:
            return LocalState.ONLINE
        return report.local

    # Effects.

    def _effects(self, outcome: _Outcome, now_ns: int) -> list[Effect]:
        publish = outcome.visible or (self._progress and now_ns >= self._published_ns + PROGRESS_NS)
        reserved = RoutingVersion(0)
        if publish:
            self._version = RoutingVersion(self._version + 1)
            if self._version > self._reserved:
                reserved = self._reserved = RoutingVersion(self._version + VERSIONS_RESERVED)
        effects: list[Effect] = []
        if outcome.nodes or outcome.dropped or outcome.chains or reserved or outcome.lease_ns:
            effects.append(
                Persist(
                    nodes=tuple(self._members[n].node for n in sorted(outcome.nodes)),
                    dropped=tuple(sorted(outcome.dropped)),
                    chains=tuple(self._chains[n] for n in sorted(outcome.chains)),
                    reserved=reserved,
                    durable=bool(outcome.chains or reserved or outcome.lease_ns),
                    lease_ns=outcome.lease_ns,
                )
            )
        if publish:
            self._progress, self._published_ns = False, now_ns
            effects.append(Publish(self._snapshot()))
        if isinstance(outcome.reply, Answer):
            effects.append(msgspec.structs.replace(outcome.reply, version=self._version))
        elif outcome.reply is not None:
            effects.append(outcome.reply)
        return effects

    def _snapshot(self) -> RoutingSnapshot:
        nodes = {number: self._members[number].node for number in sorted(self._members)}
        targets = sorted(self._chain_of.keys() | self._reports.keys())
        leaving = self._unwanted()
        return RoutingSnapshot(
            cluster=self._cluster,
            version=self._version,
            nodes={self._own.id: self._own, **nodes},
            chains={number: self._chains[number] for number in sorted(self._chains)},
            targets={t: self._status(t, leaving.get(t, "")) for t in targets},
            identity=self._identity,
        )

    def _unwanted(self) -> dict[TargetId, str]:
        """Who is to leave its chain, and why."""
        said = {t: frozenset(r.unreachable) for t, r in self._reports.items() if r.unreachable}
        if not said:
            return {}
        alive = frozenset(
            target
            for target in self._chain_of
            if (member := self._members.get(target_node(target))) and member.node.alive
        )
        found: dict[TargetId, str] = {}
        for number in sorted({self._chain_of[target] for target in said.keys() & alive}):
            found |= unwanted(self._chains[number], said, alive)
        return found

    def _status(self, target: TargetId, reason: str) -> TargetStatus:
        number = self._chain_of.get(target)
        place = self._chains[number].member(target) if number is not None else None
        return TargetStatus(
            target=target,
            node=target_node(target),
            chain=number or ChainId(0),
            public=place.state if place is not None else PublicState.OFFLINE,
            report=self._known_report(target),
            unwanted=reason,
        )

    def _known_report(self, target: TargetId) -> TargetReport:
        """The last report, corrected by what is known of its node."""
        node = target_node(target)
        member = self._members.get(node)
        report = self._reports.get(target)
        if report is None:
            reason = f"not reported by node {node}"
            report = TargetReport(target, LocalState.OFFLINE, ChainVersion(0), 0, 0, reason)
        if member is None or not member.node.alive:
            reason = f"node {node} does not answer"
            report = msgspec.structs.replace(report, local=LocalState.OFFLINE, reason=reason)
        return report


def _news(report: TargetReport) -> tuple[object, ...]:
    """What of a report is worth a snapshot at once."""
    return report.local, report.reason, report.unreachable


def _wrong_node(node: Node) -> str:
    """Say what is wrong with a registration by itself."""
    if node.id == 0:
        return "node id 0 is not valid; choose another"
    if node.kind == NodeKind.MGMTD:
        return "a management service does not register with another"
    if (node.kind == NodeKind.CLIENT) != (node.client != 0):
        return "a client id belongs to clients, and to every one of them"
    return ""


def _wrong_reports(node: NodeId, kind: NodeKind, reports: tuple[TargetReport, ...]) -> str:
    """Say what is wrong with a list of reports."""
    if reports and kind != NodeKind.STORAGE:
        return f"node {node} is no storage service and has no targets"
    if len({report.target for report in reports}) != len(reports):
        return f"node {node} reports a target twice"
    for report in reports:
        if target_node(report.target) != node:
            return f"target {report.target} does not belong on node {node}: its id says otherwise"
    return ""
