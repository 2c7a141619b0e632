"""What was acknowledged and not flushed yet, and in which life of its chain [pure].

Replicas that all lose power forget what they had not flushed, and a flush that they answer
afterwards promises nothing for it. So each acknowledgement is remembered with the version that its
chain had, and a flush tells at which version the chain last lost something (Chain.lost).
"""

from collections.abc import Iterable, Mapping

from emberfs.proto.ids import ChainId, ChainVersion

# By chain, the lowest version at which a part was acknowledged; or the version of its last loss.
ChainVersions = Mapping[ChainId, ChainVersion]
Mark = tuple[ChainId, ChainVersion]


class Unflushed:
    """Marks of acknowledged updates; false when there are none."""

    def __init__(self, *acknowledged: ChainVersions) -> None:
        self._marks: dict[Mark, int] = {}  # -> number of the last update with it
        self._count = 0
        for some in acknowledged:
            self.note(some)

    def __bool__(self) -> bool:
        """Tell whether there is something to flush."""
        return bool(self._marks)

    @property
    def chains(self) -> set[ChainId]:
        """Where there is something to flush."""
        return {chain for chain, _ in self._marks}

    def note(self, acknowledged: ChainVersions) -> None:
        """An update was acknowledged."""
        self._count += 1
        for mark in acknowledged.items():
            self._marks[mark] = self._count

    def now(self) -> dict[Mark, int]:
        """Return what a flush that begins now will cover."""
        return dict(self._marks)

    def flushed(self, covered: Mapping[Mark, int], lost: ChainVersions) -> bool:
        """A flush has ended well: forget what it covered; tell whether some of it may be gone.

        That is told once, also if several flushes have met it, and of later updates as well that
        were acknowledged before the loss.
        """
        gone = [mark for mark in self._marks if mark[1] < lost.get(mark[0], 0)]
        for mark, number in covered.items():
            if self._marks.get(mark) == number:  # else there was another update meanwhile
                del self._marks[mark]
        for mark in gone:
            self._marks.pop(mark, None)
        return bool(gone)


def lowest(answers: Iterable[tuple[ChainId, ChainVersion]]) -> dict[ChainId, ChainVersion]:
    """Return the lowest version of each chain."""
    found: dict[ChainId, ChainVersion] = {}
    for chain, version in answers:
        found[chain] = min(version, found.get(chain, version))
    return found
