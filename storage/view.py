"""What one chain looks like from one of its targets [pure]."""

import msgspec

from emberfs.proto.cluster import Chain, PublicState
from emberfs.proto.ids import ChainId, ChainVersion, TargetId

NOBODY = TargetId(0)


class View(msgspec.Struct, frozen=True, gc=False):
    """A target's place in its chain. Derived from routing, never changed by hand."""

    target: TargetId
    chain: ChainId
    chain_version: ChainVersion
    public: PublicState
    head: bool  # first serving target: client updates enter here
    successor: TargetId  # who receives our forwards; NOBODY for the last writable target
    successor_syncing: bool
    tail: TargetId  # last serving target: its committed version is the truth for reads
    lost: ChainVersion = ChainVersion(0)  # see Chain

    @property
    def serving(self) -> bool:
        """Whether it answers reads."""
        return self.public == PublicState.SERVING

    @property
    def writable(self) -> bool:
        """Whether updates pass through it."""
        return self.public in (PublicState.SERVING, PublicState.SYNCING)

    @property
    def tail_here(self) -> bool:
        """Whether this target's committed version is the truth for reads."""
        return self.tail == self.target


def absent_view(target: TargetId) -> View:
    """Return the view of a target that no chain uses (or that must not be used)."""
    return View(
        target=target,
        chain=ChainId(0),
        chain_version=ChainVersion(0),
        public=PublicState.OFFLINE,
        head=False,
        successor=NOBODY,
        successor_syncing=False,
        tail=NOBODY,
    )


def view_of(chain: Chain | None, target: TargetId) -> View:
    """Return the view of `target` on `chain`; absent_view if it is no member."""
    member = chain.member(target) if chain is not None else None
    if chain is None or member is None:
        return absent_view(target)
    head, tail, successor = chain.head(), chain.tail(), chain.successor(target)
    return View(
        target=target,
        chain=chain.id,
        chain_version=chain.version,
        public=member.state,
        head=head is not None and head.target == target,
        successor=successor.target if successor is not None else NOBODY,
        successor_syncing=successor is not None and successor.state == PublicState.SYNCING,
        tail=tail.target if tail is not None else NOBODY,
        lost=chain.lost,
    )
