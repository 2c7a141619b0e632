"""What is said of a process after its death, so that nobody waits for its lease to run out.

A lease ends a node that may still be alive somewhere; seconds must pass before others may take its
place. Of a process that was killed its own kernel knows better: the last will is carried out by a
heir (runtime.env.Env.bequeath) that runs only when no thread of the process is left. It can be
lost, with the machine or on the way; then the lease counts.

python -m emberfs.client.lastwill WILL
"""

import asyncio
import sys

import msgspec

from emberfs.client.control import Control
from emberfs.proto.cluster import Node
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, SECOND, NodeId
from emberfs.runtime.env import Env
from emberfs.runtime.real import RealEnv
from emberfs.runtime.retry import Backoff

RETRY_FIRST_NS = 50 * MS
RETRY_MAX_NS = 500 * MS
GIVE_UP_NS = 5 * SECOND  # leases are over by then


class Will(msgspec.Struct, frozen=True):
    """Whose death is to be reported to whom."""

    mgmtd: tuple[str, ...]
    cluster: str
    identity: int
    node: NodeId
    incarnation: int


def make_will(env: Env, control: Control, node: Node) -> None:
    """Have the death of this process reported. Call it once the node is registered."""
    will = Will(control.addresses, control.cluster, control.identity, node.id, node.incarnation)
    env.bequeath(__name__, msgspec.json.encode(will).decode())


def revoke_will(env: Env) -> None:
    """Say nothing: an orderly stop is often a restart, within the lease and without a refill."""
    env.bequeath(__name__, "")


async def carry_out(env: Env, control: Control, will: Will) -> bool:
    """Report the death; tell whether mgmtd has heard of it."""
    control.identity = will.identity
    give_up_ns = env.now_ns() + GIVE_UP_NS
    backoff = Backoff(RETRY_FIRST_NS, RETRY_MAX_NS)
    while True:
        try:
            await control.report_death(will.node, will.incarnation)
            return True
        except EmberfsError as problem:
            if problem.code != Code.UNREACHABLE or env.now_ns() >= give_up_ns:
                return False
        await env.sleep_ns(backoff.next_ns(env.random))


async def _main(words: str) -> int:
    will = msgspec.json.decode(words, type=Will)
    control = Control(will.mgmtd, will.cluster)
    try:
        return 0 if await carry_out(RealEnv(), control, will) else 1
    finally:
        await control.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(sys.argv[1])))
