"""What a chunk remembers of its writers, so that a retry is answered and not applied again [pure].

Of each (client, channel) only the newest write is kept, the newest first, and not without bound: a
channel that has been silent while 16 others wrote the same chunk has long given up its retries.
"""

from collections.abc import Sequence

from emberfs.proto.storage_calls import RememberedWrite, WriteTag

REMEMBERED_MAX = 16  # (client, channel) pairs that a chunk remembers


def remember(
    remembered: tuple[RememberedWrite, ...], tag: WriteTag, version: int
) -> tuple[RememberedWrite, ...]:
    """Put the newest write in front; of each (client, channel) only the last is kept."""
    others = [row for row in remembered if row.client != tag.client or row.channel != tag.channel]
    newest = RememberedWrite(tag.client, tag.channel, tag.sequence, version)
    return (newest, *others[: REMEMBERED_MAX - 1])


def recall(remembered: Sequence[RememberedWrite], tag: WriteTag) -> RememberedWrite | None:
    """Return the last write of the tag's (client, channel), if it is remembered."""
    for row in remembered:
        if row.client == tag.client and row.channel == tag.channel:
            return row
    return None


def merge_remembered(
    own: tuple[RememberedWrite, ...], given: tuple[RememberedWrite, ...]
) -> tuple[RememberedWrite, ...]:
    """Add what a tombstone still knows behind what the chunk itself remembers.

    Of a (client, channel) that is in both the later write counts: that of the tombstone, if a power
    cut has taken the chunk back to before it.
    """
    newest: dict[tuple[int, int], RememberedWrite] = {}
    for row in (*own, *given):
        known = newest.get((row.client, row.channel))
        if known is None or known.sequence < row.sequence:
            newest[row.client, row.channel] = row
    return tuple(newest.values())[:REMEMBERED_MAX]
