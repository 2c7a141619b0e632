"""A whole cluster on one host: up, down, mount, umount. Every wait is bounded and explained."""

import shutil
from collections.abc import Callable
from pathlib import Path

from emberfs.client.control import Control
from emberfs.client.mountpoint import is_dead, is_ours, unmount
from emberfs.deploy import processes
from emberfs.deploy.plan import (
    METAS_MAX,
    STORAGE_NODE_FIRST,
    UNIX_PATH_BYTES_MAX,
    Plan,
    load_plan,
    write_plan,
)
from emberfs.kv.url import parse_store
from emberfs.mgmtd.placement import plan_chains
from emberfs.proto.cluster import EMPTY_ROUTING, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, ChainId, NodeId, TargetId
from emberfs.runtime.env import Env

START_TIMEOUT_NS = 30 * SECOND
SILENCE_NS = 2 * SECOND  # then a wait is explained
STOP_TIMEOUT_S = 30.0  # the daemon's own bound is 25 s with servers that do not answer

Say = Callable[[str], None]


async def bring_up(env: Env, plan: Plan, say: Say, *, mount: bool = True) -> RoutingSnapshot:
    """Start what is not running, create the chains at first, mount. Harmless when repeated.

    Raises EmberfsError with the service's own last line when one of them ends instead of serving.
    """
    _check_plan(plan)
    write_plan(plan)
    started = [name for name in plan.service_names() if _start_if_needed(plan, name)]
    say(f"started {', '.join(started)}" if started else "all services were running already")
    control = Control((plan.mgmtd_address,), plan.cluster)
    try:
        routing = await _await_targets(env, plan, control, say)
        if not routing.chains:
            await control.create_chains(_chains(plan))
            say(f"created {len(_chains(plan))} chains of {plan.replicas} replicas")
        routing = await _await_serving(env, plan, control, say)
    finally:
        await control.close()
    if mount:
        await mount_here(env, plan, say)
    return routing


def _check_plan(plan: Plan) -> None:
    if plan.store and not parse_store(plan.store).is_shared:
        raise EmberfsError(
            Code.CONFIG,
            f"--store {plan.store}: mgmtd and meta share it, so it must be etcd://, postgres:// or "
            "fdb://; without --store each has a RocksDB of its own",
        )
    if not 1 <= plan.metas <= METAS_MAX:
        raise EmberfsError(Code.CONFIG, f"--meta {plan.metas}: write 1 to {METAS_MAX}")
    if plan.metas > 1 and not plan.store:
        raise EmberfsError(
            Code.CONFIG,
            f"--meta {plan.metas}: several metadata servers need one store that all of them reach; "
            "pass --store etcd://... or postgres://..., or start one",
        )
    if min(plan.replicas, plan.storages, plan.targets_per_storage) < 1:
        raise EmberfsError(
            Code.CONFIG,
            f"{plan.storages} storages with {plan.targets_per_storage} targets and {plan.replicas} "
            "replicas: at least 1 of each is needed",
        )
    if plan.replicas > plan.storages:
        raise EmberfsError(
            Code.CONFIG,
            f"{plan.replicas} replicas need as many storage services; there are {plan.storages}",
        )
    longest = len(str(plan.path("run", "storage99.sock")).encode())
    if longest > UNIX_PATH_BYTES_MAX:
        raise EmberfsError(
            Code.CONFIG,
            f"{plan.directory}: too long for Unix sockets; choose a shorter --directory",
        )


def _chains(plan: Plan) -> list[tuple[ChainId, tuple[TargetId, ...]]]:
    nodes = [NodeId(STORAGE_NODE_FIRST + place) for place in range(plan.storages)]
    targets = {
        node: [TargetId(node * 100 + n + 1) for n in range(plan.targets_per_storage)]
        for node in nodes
    }
    return plan_chains(targets, plan.replicas, ChainId(1))


def _start_if_needed(plan: Plan, name: str) -> bool:
    process = plan.process(name)
    if processes.running_pid(process) is not None:
        return False
    processes.start(process)
    return True


def _check_alive(plan: Plan, names: list[str]) -> None:
    for name in names:
        process = plan.process(name)
        if processes.running_pid(process) is None:
            raise EmberfsError(Code.INTERNAL, processes.failure(process))


async def _await_routing(
    env: Env,
    plan: Plan,
    control: Control,
    say: Say,
    missing: Callable[[RoutingSnapshot], str],
) -> RoutingSnapshot:
    """Poll until nothing is missing; a dead service or the time limit ends the wait."""
    began_ns = env.now_ns()
    routing, said = EMPTY_ROUTING, False
    while True:
        try:
            routing = await control.routing()
            lacking = missing(routing)
        except EmberfsError as problem:
            lacking = f"an answer of mgmtd at {plan.mgmtd_address} ({problem.message})"
        if not lacking:
            return routing
        _check_alive(plan, plan.service_names())
        waited_ns = env.now_ns() - began_ns
        if waited_ns > START_TIMEOUT_NS:
            raise EmberfsError(Code.TIMEOUT, f"waited {START_TIMEOUT_NS // SECOND} s for {lacking}")
        if waited_ns > SILENCE_NS and not said:
            say(f"waiting for {lacking}")
            said = True
        await env.sleep_ns(50 * MS)


async def _await_targets(env: Env, plan: Plan, control: Control, say: Say) -> RoutingSnapshot:
    wanted = {target for _, targets in _chains(plan) for target in targets}

    def missing(routing: RoutingSnapshot) -> str:
        absent = sorted(wanted - set(routing.targets))
        return f"targets {absent} to register" if absent else ""

    return await _await_routing(env, plan, control, say, missing)


async def _await_serving(env: Env, plan: Plan, control: Control, say: Say) -> RoutingSnapshot:
    def missing(routing: RoutingSnapshot) -> str:
        chains = [str(chain.id) for chain in routing.chains.values() if chain.head() is None]
        if chains or not routing.chains:
            return f"a serving replica of chains {', '.join(chains)}"
        asleep = [node.id for node in routing.nodes.values() if not node.alive and not node.client]
        return f"nodes {asleep} to come back" if asleep else ""

    return await _await_routing(env, plan, control, say, missing)


async def mount_here(env: Env, plan: Plan, say: Say) -> None:
    """Start the FUSE daemon and wait until the mount answers."""
    mountpoint = plan.mountpoint
    process = plan.process("fuse")
    if processes.running_pid(process) is not None and _answers(mountpoint):
        say(f"{mountpoint} was mounted already")
        return
    if not is_ours(mountpoint):
        Path(mountpoint).mkdir(parents=True, exist_ok=True)
    processes.stop(process, timeout_s=1.0)
    processes.start(process)
    deadline_ns = env.now_ns() + START_TIMEOUT_NS
    while not _answers(mountpoint):
        _check_alive(plan, ["fuse"])
        if env.now_ns() > deadline_ns:
            raise EmberfsError(
                Code.TIMEOUT, f"{mountpoint} does not answer; log: {process.log_file}"
            )
        await env.sleep_ns(20 * MS)
    say(f"mounted at {mountpoint}")


def _answers(mountpoint: str) -> bool:
    return is_ours(mountpoint) and not is_dead(mountpoint)


def unmount_here(plan: Plan, say: Say, *, force: bool = False) -> None:
    """Unmount; a busy mount is refused unless `force` detaches it from its users."""
    mountpoint = plan.mountpoint
    if is_ours(mountpoint):
        if not unmount(mountpoint, lazy=force or is_dead(mountpoint)):
            raise EmberfsError(
                Code.BUSY,
                f"{mountpoint} is in use; close what uses it (fuser -vm {mountpoint}) or pass"
                " --force",
            )
        say(f"unmounted {mountpoint}")
    processes.stop(plan.process("fuse"), timeout_s=STOP_TIMEOUT_S)


def bring_down(plan: Plan, say: Say, *, force: bool = False) -> None:
    """Unmount and stop everything; data is kept."""
    unmount_here(plan, say, force=force)
    for name in reversed(plan.service_names()):
        process = plan.process(name)
        if processes.running_pid(process) is None:
            continue
        gentle = processes.stop(process, timeout_s=STOP_TIMEOUT_S)
        say(f"stopped {name}" if gentle else f"killed {name}: it did not stop in time")


def clean_data(directory: Path) -> None:
    """Delete a stopped cluster with all its data."""
    plan = load_plan(directory)
    if plan is None:
        return
    refuse_running(plan)
    shutil.rmtree(directory)


def refuse_running(plan: Plan) -> None:
    """Raise BUSY if anything of the cluster runs."""
    names = [*plan.service_names(), "fuse"]
    running = [name for name in names if processes.running_pid(plan.process(name)) is not None]
    if running or is_ours(plan.mountpoint):
        raise EmberfsError(
            Code.BUSY, f"still running: {', '.join(running) or 'a mount'}; run `emberfs down` first"
        )
