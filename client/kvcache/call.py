"""What has become of one call on many blocks."""

from collections import Counter


class Call:
    """One call; nothing of it changes once it is over, however late something comes."""

    def __init__(self, count: int) -> None:
        """For `count` keys."""
        self.lengths = [0] * count  # of the blocks that were read, stored or removed; 0: none
        self.reasons = [""] * count  # why not, where that is known
        self.over = False
        self.reached = False  # storage has answered
        self.failed = False

    def settle(self, outcome: str) -> "Counter[str]":
        """End it; returns how many were in vain, by reason. `outcome` is that of the whole."""
        self.over = True
        return Counter(
            reason or outcome or "absent"
            for length, reason in zip(self.lengths, self.reasons, strict=True)
            if not length
        )
