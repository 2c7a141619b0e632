"""What Prometheus sees of mgmtd."""

from collections import Counter as Tally

from prometheus_client import Counter, Gauge

from emberfs.proto.cluster import NodeKind, PublicState, RoutingSnapshot

RPCS = Counter("emberfs_mgmtd_rpcs", "Calls answered", ["method", "outcome"])
ROUTING_VERSION = Gauge("emberfs_mgmtd_routing_version", "Version of the newest snapshot")
WATCHERS = Gauge("emberfs_mgmtd_watchers", "Streams that follow the routing")
CHAIN_CHANGES = Counter("emberfs_mgmtd_chain_changes", "New versions of chains")
LEADS = Gauge("emberfs_mgmtd_leads", "1 while this mgmtd is the one that answers")
TERMS = Counter("emberfs_mgmtd_terms", "How often this mgmtd has begun to lead")
PERSIST_FAILURES = Counter("emberfs_mgmtd_persist_failures", "Failed writes of the cluster state")
_NODES = Gauge("emberfs_mgmtd_nodes", "Registered processes", ["kind", "alive"])
_TARGETS = Gauge("emberfs_mgmtd_targets", "Targets in chains by public state", ["state"])
_CHAINS = Gauge("emberfs_mgmtd_chains", "Chains by condition", ["condition"])


def show(snapshot: RoutingSnapshot) -> None:
    """Set the gauges to a snapshot."""
    ROUTING_VERSION.set(snapshot.version)
    nodes = Tally((node.kind, node.alive) for node in snapshot.nodes.values())
    for kind in NodeKind:
        for alive in (True, False):
            labels = (kind.name.lower(), str(alive).lower())
            _NODES.labels(*labels).set(nodes[kind, alive])
    states = Tally(t.state for chain in snapshot.chains.values() for t in chain.targets)
    for state in PublicState:
        _TARGETS.labels(state.name.lower()).set(states[state])
    conditions = Tally(
        "down"
        if not (serving := len(chain.serving()))
        else "whole"
        if serving == len(chain.targets)
        else "degraded"
        for chain in snapshot.chains.values()
    )
    for condition in ("whole", "degraded", "down"):
        _CHAINS.labels(condition).set(conditions[condition])
