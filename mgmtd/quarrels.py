"""Who is to leave a chain whose members cannot reach each other [pure].

Everybody concerned is alive, as leases show; only the link between two is cut, or one of them no
longer hears or speaks. The chain cannot go on with both, and its rule (chain.py) knows of no such
thing: so one of them is asked to leave by itself, which it does by reporting OFFLINE. Nobody is put
out: who is still SERVING in its own eyes would go on answering reads.

    a serving member does not reach the next writable one   -> the next one is to leave
    nor another member of the chain                         -> the one that reaches nobody is to
    the last serving one does not reach one outside         -> that one stays outside: nobody could
                                                               fill it

Theory of operation: what a member says counts only while it serves and is not asked to leave
itself. At least one serving member is never asked: the first one that stays has nobody before it
that could complain, and a member is only blamed for itself while another one stays.
"""

from collections.abc import Mapping

from emberfs.proto.cluster import Chain, ChainTarget
from emberfs.proto.ids import TargetId

BLAMED_FROM = 2  # members that one does not reach, before the fault is taken for its own


def unwanted(
    chain: Chain, unreachable: Mapping[TargetId, frozenset[TargetId]], alive: frozenset[TargetId]
) -> dict[TargetId, str]:
    """Return who is to leave or to stay outside, and why.

    `unreachable`: what each member says it does not reach. `alive`: members whose lease runs.
    """
    found: dict[TargetId, str] = {}
    serving = [member for member in chain.serving() if member.target in alive]
    for member in serving:
        missed = _missed(chain, member, unreachable, alive) - found.keys()
        if member.target in found or not missed:
            continue
        successor = chain.successor(member.target)
        hindered = successor is not None and successor.target in missed
        others = [m for m in serving if m is not member and m.target not in found]
        if hindered and len(missed) >= BLAMED_FROM and others:
            found[member.target] = f"it does not reach targets {_list(missed)}"
        elif hindered and successor is not None:
            found[successor.target] = f"target {member.target} does not reach it"
    stay = [member for member in serving if member.target not in found]
    if stay:
        _shut_out(chain, stay[-1], _missed(chain, stay[-1], unreachable, alive), found)
    return found


def _shut_out(
    chain: Chain, source: ChainTarget, missed: frozenset[TargetId], found: dict[TargetId, str]
) -> None:
    """Keep those outside that the one who would fill them does not reach."""
    writable = {member.target for member in chain.writable()}
    for member in chain.targets:
        if member.target in missed and member.target not in writable:
            found[member.target] = f"target {source.target} does not reach it"


def _missed(
    chain: Chain,
    member: ChainTarget,
    unreachable: Mapping[TargetId, frozenset[TargetId]],
    alive: frozenset[TargetId],
) -> frozenset[TargetId]:
    said = unreachable.get(member.target, frozenset())
    return frozenset(m.target for m in chain.targets if m.target in said & alive)


def _list(targets: frozenset[TargetId]) -> str:
    return ", ".join(str(target) for target in sorted(targets))
