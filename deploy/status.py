"""`emberfs status`: nodes, chains, targets, space and transports as tables."""

from rich.console import Console, Group, RenderableType
from rich.table import Table

from emberfs.deploy import processes
from emberfs.deploy.plan import META_NODE, STORAGE_NODE_FIRST, Plan
from emberfs.fabric.pool import PeerPool
from emberfs.proto.cluster import Node, NodeKind, PublicState, RoutingSnapshot, TargetReport
from emberfs.proto.errors import EmberfsError
from emberfs.runtime.env import Env

COLOURS = {
    PublicState.SERVING: "green",
    PublicState.SYNCING: "yellow",
    PublicState.WAITING: "yellow",
    PublicState.LASTSRV: "red",
    PublicState.OFFLINE: "red",
}


async def transports(env: Env, routing: RoutingSnapshot) -> dict[int, str]:
    """Connect to every living server and say how, and why so. Keys are node ids."""
    pool = PeerPool(env)
    found: dict[int, str] = {}
    for node in routing.nodes.values():
        if not node.alive or not node.endpoints:
            continue
        if node.kind == NodeKind.MGMTD:
            found[node.id] = "gRPC: the control plane"
            continue
        try:
            await pool.get(node.endpoints)
        except EmberfsError as problem:
            found[node.id] = f"unreachable: {problem.message}"
    reasons = {tuple(c.endpoints): f"{c.transport}: {c.reason}" for c in pool.choices()}
    await pool.close()
    for node in routing.nodes.values():
        if node.endpoints in reasons:
            found.setdefault(node.id, reasons[node.endpoints])
    return found


def size(count: int) -> str:
    """Bytes for people, binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"


def node_table(routing: RoutingSnapshot, found: dict[int, str], plan: Plan | None) -> Table:
    """One row per process."""
    table = Table(title=f"cluster {routing.cluster}, routing version {routing.version}")
    for column in ("node", "kind", "state", "memory", "transport from here"):
        table.add_column(column)
    memory = _memory(plan)
    for node in sorted(routing.nodes.values(), key=lambda n: (n.kind, n.id)):
        state = "[green]alive[/]" if node.alive else "[red]dead[/]"
        table.add_row(
            _node_name(node),
            node.kind.name.lower(),
            state,
            memory.get(node.id, ""),
            found.get(node.id, ""),
        )
    return table


def _node_name(node: Node) -> str:
    return f"{node.client:016x}" if node.kind == NodeKind.CLIENT else str(node.id)


def _memory(plan: Plan | None) -> dict[int, str]:
    if plan is None:
        return {}
    names = {META_NODE + place: name for place, name in enumerate(plan.meta_names())}
    names |= {STORAGE_NODE_FIRST + i: name for i, name in enumerate(plan.storage_names())}
    found = {}
    for node, name in names.items():
        pid = processes.running_pid(plan.process(name))
        if pid is not None:
            found[node] = size(processes.resident_bytes(pid))
    return found


def chain_table(routing: RoutingSnapshot) -> Table:
    """One row per chain, its targets head first."""
    table = Table(title="chains, head first")
    for column in ("chain", "version", "targets"):
        table.add_column(column)
    for chain in sorted(routing.chains.values(), key=lambda c: c.id):
        members = "  ".join(
            f"[{COLOURS[t.state]}]{t.target} {t.state.name.lower()}[/]" for t in chain.targets
        )
        table.add_row(str(chain.id), str(chain.version), members)
    return table


def target_table(routing: RoutingSnapshot) -> Table:
    """One row per target, with recovery progress and the reason of a failure."""
    table = Table(title="targets")
    for column in ("target", "node", "chain", "public", "local", "used", "capacity", "note"):
        table.add_column(column, justify="right" if column in ("used", "capacity") else "left")
    for status in sorted(routing.targets.values(), key=lambda t: t.target):
        report = status.report
        colour = COLOURS.get(status.public, "white")
        table.add_row(
            str(status.target),
            str(status.node),
            str(status.chain or "-"),
            f"[{colour}]{status.public.name.lower()}[/]" if status.chain else "-",
            report.local.name.lower(),
            size(report.used_bytes),
            size(report.capacity_bytes),
            target_note(status.public, report),
        )
    return table


def target_note(public: PublicState, report: TargetReport) -> str:
    """What an operator should know of a target: why it is out, how far it is, what is damaged."""
    notes = [report.reason]
    if public == PublicState.SYNCING:
        notes.append(recovery_note(report))
    if report.damaged_chunks:
        notes.append(f"[red]{report.damaged_chunks} damaged chunks, not mended yet[/]")
    if report.scrub_findings:
        notes.append(f"scrub found {report.scrub_findings}")
    if report.scrub_percent:
        notes.append(f"scrub {report.scrub_percent} %")
    return "; ".join(note for note in notes if note)


def recovery_note(report: TargetReport) -> str:
    """Progress of a target that is being filled."""
    done, total, rate = report.sync_done_bytes, report.sync_total_bytes, report.sync_bytes_per_s
    source = f" from {report.sync_source}" if report.sync_source else ""
    hindered = f", does not advance: {report.sync_problem}" if report.sync_problem else ""
    if not report.sync_total_chunks:
        return f"recovery{source} begins{hindered}"
    whole = report.sync_total_chunks
    percent = 100 * done // total if total else 100 * report.sync_done_chunks // whole
    text = (
        f"recovery{source} {percent} %: {report.sync_done_chunks} of {report.sync_total_chunks} "
        f"chunks, {size(done)} of {size(total)}"
    )
    if rate:
        text += f", {size(rate)}/s, {duration(-(-max(0, total - done) // rate))} left"
    return text + hindered


def duration(seconds: int) -> str:
    """Seconds for people."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


async def show(env: Env, routing: RoutingSnapshot, plan: Plan | None) -> RenderableType:
    """Return everything `emberfs status` prints."""
    found = await transports(env, routing)
    parts: list[RenderableType] = [
        node_table(routing, found, plan),
        chain_table(routing),
        target_table(routing),
    ]
    if plan is not None:
        parts.append(_totals(plan))
    return Group(*parts)


def _totals(plan: Plan) -> str:
    pids = [processes.running_pid(plan.process(n)) for n in [*plan.service_names(), "fuse"]]
    total = sum(processes.resident_bytes(pid) for pid in pids if pid is not None)
    return f"{sum(pid is not None for pid in pids)} processes, {size(total)} of memory together"


def console() -> Console:
    """Where the command line prints."""
    return Console(highlight=False)
