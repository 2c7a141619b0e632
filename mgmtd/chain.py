"""The rule that moves the targets of one replication chain from state to state.

Theory of operation. A write commits only when every SERVING target holds it, so every target that
is SERVING in the published chain is complete. From that follow four things:

1. A lost SERVING target is OFFLINE as soon as another SERVING one remains, since that one goes on
   committing without it. When none remains, all those that were lost in this very evaluation are
   equally complete, and each becomes LASTSRV: whoever returns first may bring the chain back.
2. The first LASTSRV that returns becomes SERVING. From then on the others may miss writes, so they
   become OFFLINE and are filled again like everybody else. They could also differ from it in
   writes that nobody was told of; filling them settles that. One that is doubtful (a power cut may
   have taken what it had not flushed) comes last, and the chain then says since when such writes
   may be gone: `lost` is the version at which it came back. Every other change of a chain keeps
   all that was acknowledged, as a SERVING target stays or a complete one returns.
3. Whoever is not complete (WAITING, OFFLINE) is filled as SYNCING, one at a time. It receives all
   writes and becomes SERVING when it reports UPTODATE, decided on the current version of the chain.
   WAITING or OFFLINE targets that still call themselves UPTODATE mean an older chain: they are
   treated as ONLINE, so that no such state is without an exit.
4. A SYNCING target is promoted or kept only beside a SERVING one that stays: it has no source of
   its own. Hence two consecutive SERVING sets always share a target, or a LASTSRV stands between.

Unheard-of targets (absent from `local`) keep their state: nothing is known against them. That
covers the first lease after a start of mgmtd and a service that has registered but not reported.

Invariants: order SERVING, LASTSRV, SYNCING, WAITING, OFFLINE; within a group who was there before
stands first, in the old order, and newcomers follow in the old order; at most one SYNCING; the
version rises by one exactly when targets changed; `lost` only rises, to the version of its change.
"""

from collections.abc import Collection, Mapping
from enum import Enum

import msgspec

from emberfs.proto.cluster import Chain, ChainTarget, LocalState, PublicState
from emberfs.proto.ids import ChainVersion, TargetId

_SERVING, _LASTSRV, _SYNCING, _WAITING, _OFFLINE = PublicState
_UPTODATE, _ONLINE, _GONE = LocalState

GROUP_ORDER = (_SERVING, _LASTSRV, _SYNCING, _WAITING, _OFFLINE)


class Move(Enum):
    """What happens to one target; the conditions look at the chain as it is being built."""

    SERVE = "stays serving"
    LOSE = "LASTSRV if no serving target remains, else OFFLINE"
    RETURN = "SERVING if it is the first and nobody serves, else OFFLINE"
    REMAIN = "stays LASTSRV while nobody serves, else OFFLINE"
    FINISH = "SERVING beside a serving target that stays, else as FILL"
    FILL = "SYNCING beside a serving target if nobody else is, else WAITING"
    KEEP = "stays as it is"
    DROP = "OFFLINE"


# (public state, local state) -> move. None: nothing has been heard of the target yet.
TABLE: dict[tuple[PublicState, LocalState | None], Move] = {
    (_SERVING, _UPTODATE): Move.SERVE,
    (_SERVING, _ONLINE): Move.SERVE,  # restarted in the same boot: it has all that it acknowledged
    (_SERVING, None): Move.SERVE,
    (_SERVING, _GONE): Move.LOSE,
    (_LASTSRV, _UPTODATE): Move.RETURN,
    (_LASTSRV, _ONLINE): Move.RETURN,
    (_LASTSRV, None): Move.REMAIN,
    (_LASTSRV, _GONE): Move.REMAIN,
    (_SYNCING, _UPTODATE): Move.FINISH,
    (_SYNCING, _ONLINE): Move.FILL,
    (_SYNCING, None): Move.FILL,
    (_SYNCING, _GONE): Move.DROP,
    (_WAITING, _UPTODATE): Move.FILL,
    (_WAITING, _ONLINE): Move.FILL,
    (_WAITING, None): Move.KEEP,
    (_WAITING, _GONE): Move.DROP,
    (_OFFLINE, _UPTODATE): Move.FILL,
    (_OFFLINE, _ONLINE): Move.FILL,
    (_OFFLINE, None): Move.KEEP,
    (_OFFLINE, _GONE): Move.DROP,
}


def next_chain(
    chain: Chain, local: Mapping[TargetId, LocalState], doubtful: Collection[TargetId] = ()
) -> Chain:
    """Return the chain after one evaluation; the same object when nothing changed.

    `local` holds what is known of each target: OFFLINE when its node's lease has expired, UPTODATE
    only when that was decided on `chain.version`, absent when nothing has been heard. `doubtful`:
    targets that may have lost what they had not flushed.
    """
    moves = [(member, TABLE[member.state, local.get(member.target)]) for member in chain.targets]
    states = _decide(moves, doubtful)
    targets = _arrange(chain, states)
    if targets == chain.targets:
        return chain
    version = ChainVersion(chain.version + 1)
    lost = version if _came_back(chain, states) in doubtful else chain.lost
    return check_chain(Chain(chain.id, version, targets, lost))


def check_chain(chain: Chain) -> Chain:
    """Assert the invariants of a chain, and return it."""
    groups = [GROUP_ORDER.index(member.state) for member in chain.targets]
    assert groups == sorted(groups), f"chain {chain.id} is out of order"
    assert groups.count(GROUP_ORDER.index(_SYNCING)) <= 1, f"chain {chain.id}: two are syncing"
    assert len({member.target for member in chain.targets}) == len(groups)
    assert chain.lost <= chain.version, f"chain {chain.id} knows of a loss to come"
    return chain


def _came_back(chain: Chain, states: Mapping[TargetId, PublicState]) -> TargetId | None:
    """Return the LASTSRV target that brings the chain back, if one does now."""
    return next(
        (
            member.target
            for member in chain.targets
            if member.state == _LASTSRV and states[member.target] == _SERVING
        ),
        None,
    )


def _decide(
    moves: list[tuple[ChainTarget, Move]], doubtful: Collection[TargetId]
) -> dict[TargetId, PublicState]:
    """Give each target its new state, complete targets first: the others depend on them."""
    had_serving = any(member.state == _SERVING for member, _ in moves)
    serving = any(move == Move.SERVE for _, move in moves)
    states: dict[TargetId, PublicState] = {}
    for member, move in moves:
        match move:
            case Move.SERVE:
                states[member.target] = _SERVING
            case Move.LOSE:
                states[member.target] = _OFFLINE if serving else _LASTSRV
            case Move.RETURN | Move.REMAIN if had_serving:
                states[member.target] = _OFFLINE  # others have committed without it
            case _:
                pass
    returning = [m.target for m, move in moves if move == Move.RETURN and not had_serving]
    returning.sort(key=lambda target: target in doubtful)
    for member, move in moves:
        if move in (Move.RETURN, Move.REMAIN) and not had_serving:
            rest = _OFFLINE if returning else _LASTSRV
            first = returning[:1] == [member.target]
            states[member.target] = _SERVING if first else rest
    _fill(moves, states, finished=serving, source=serving or bool(returning))
    return states


def _fill(
    moves: list[tuple[ChainTarget, Move]],
    states: dict[TargetId, PublicState],
    *,
    finished: bool,
    source: bool,
) -> None:
    """Decide on the incomplete targets; `finished`: who is complete may be promoted now."""
    free = source
    for group in (_SYNCING, _WAITING, _OFFLINE):
        for member, move in moves:
            if member.state != group:
                continue
            if move == Move.FINISH and finished:
                states[member.target] = _SERVING
            elif move in (Move.FINISH, Move.FILL):
                states[member.target] = _SYNCING if free else _WAITING
                free = False
            else:
                states[member.target] = member.state if move == Move.KEEP else _OFFLINE


def _arrange(chain: Chain, states: Mapping[TargetId, PublicState]) -> tuple[ChainTarget, ...]:
    """Order by group; within a group the old members first, the newcomers after them."""
    assert len(states) == len(chain.targets)

    def rank(member: ChainTarget) -> tuple[int, bool]:
        state = states[member.target]
        return GROUP_ORDER.index(state), state != member.state

    return tuple(
        msgspec.structs.replace(member, state=states[member.target])
        for member in sorted(chain.targets, key=rank)
    )
