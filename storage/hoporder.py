"""What a predecessor sent earlier, or twice, must not be taken up after what it sent later [pure].

Messages overtake each other on different connections, and a frozen process finds on waking the last
words of a predecessor that was killed beside the first ones of its next life. Updates that follow
a version protect themselves, a REPLACE does not: it may go back. So every message of a predecessor
carries (life, sending target, rising number). `life` counts the starts of the sending target, on
its disk; a replaced disk begins with life 1 again, but not without a change of the chain.

A message with the number of an earlier one is its copy: who sends again sends under a new number.
"""

from collections import OrderedDict

from emberfs.proto.ids import ChunkId, TargetId
from emberfs.proto.storage_calls import NO_ORDER, UpdateRequest, WriteTag

CHUNKS_MAX = 4096


class HopOrder:
    """Remembers the newest message of recently changed chunks, and what is too old for the rest."""

    def __init__(self, chunks_max: int = CHUNKS_MAX) -> None:
        self._chunks_max = chunks_max
        self._newest: OrderedDict[tuple[TargetId, ChunkId], WriteTag] = OrderedDict()
        # (receiver, sender) -> (chain version, life), and the highest number that was forgotten.
        self._lives: dict[tuple[TargetId, int], tuple[int, int]] = {}
        self._forgotten: dict[tuple[TargetId, int], int] = {}

    def admit(self, request: UpdateRequest) -> bool:
        """Note a predecessor's message; False when it must not be taken up any more."""
        tag = request.order
        if tag == NO_ORDER:  # of a repair by hand: it has looked before
            return True
        sender, life = (request.target, tag.channel), (request.chain_version, tag.client)
        known = self._lives.get(sender, (0, 0))
        if life < known:
            return False
        if life > known:
            self._lives[sender], self._forgotten[sender] = life, 0
        place = (request.target, request.chunk)
        if tag.sequence <= self._last(place, sender, tag):
            return False
        self._newest.pop(place, None)
        self._newest[place] = tag
        while len(self._newest) > self._chunks_max:
            self._forget(*self._newest.popitem(last=False))
        return True

    def _last(
        self, place: tuple[TargetId, ChunkId], sender: tuple[TargetId, int], tag: WriteTag
    ) -> int:
        newest = self._newest.get(place)
        if newest is not None and (newest.client, newest.channel) == (tag.client, tag.channel):
            return newest.sequence
        return self._forgotten.get(sender, 0)

    def _forget(self, place: tuple[TargetId, ChunkId], tag: WriteTag) -> None:
        sender = (place[0], tag.channel)
        if self._lives.get(sender, (0, 0))[1] == tag.client:
            self._forgotten[sender] = max(self._forgotten.get(sender, 0), tag.sequence)
