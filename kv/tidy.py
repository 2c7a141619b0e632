"""What processes that are gone have left in a shared store: their slots, and their shares.

Every process has slots of its own, so a counter would have more and more shares. Shares of slots
that nobody used for a day are added to the counter's own row. Should their process live all the
same, it begins with empty shares again.
"""

import logging

from emberfs.kv import slots
from emberfs.kv.backend import Backend
from emberfs.kv.history import ReadSet, WriteSet
from emberfs.kv.transaction import pack_counter, unpack_counter
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import SECOND
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.kv.tidy")

UNUSED_S = 24 * 3600
SLOTS_PER_TRANSACTION = 50
AGAIN_NS = 3600 * SECOND


async def live(env: Env, backend: Backend) -> None:
    """Tidy up once an hour."""
    while True:
        try:
            while await tidy(env, backend):
                pass
        except EmberfsError as problem:
            log.info("old slots stay for now: %s", problem)
        await env.sleep_ns(AGAIN_NS)


async def tidy(env: Env, backend: Backend) -> int:
    """Fold some old slots; returns how many."""
    attempt = backend.attempt(read_only=False)
    try:
        now_s = env.wall_ns() // SECOND
        rows = await attempt.scan(*slots.SLOTS, 0, False)
        old = [key for key, row in rows if now_s - slots.slot_time_s(row) > UNUSED_S]
        old = old[:SLOTS_PER_TRANSACTION]
        if not old:
            return 0
        shares = await attempt.scan(*slots.SHARES, 0, False)
        sums: dict[bytes, int] = {}
        writes: dict[bytes, bytes | None] = dict.fromkeys(old)
        for key, value in shares:
            if slots.slot_of_share(key) in writes:
                counter = slots.counter_of(key)
                sums[counter] = sums.get(counter, 0) + unpack_counter(value)
                writes[key] = None
        counters = sorted(sums)
        values = await attempt.get_many(counters)
        for counter, base in zip(counters, values, strict=True):
            writes[counter] = pack_counter(unpack_counter(base) + sums[counter])
        read = ReadSet(attempt.version, set(writes), [])
        await attempt.commit(read, WriteSet(writes, {}, [], [], {}))
        return len(old)
    finally:
        attempt.cancel()
