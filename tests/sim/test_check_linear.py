"""The linearizability checkers: exact on tiny histories, no false alarm, no miss, fast."""

from itertools import combinations, permutations
from random import Random
from time import perf_counter

from sim.check_linear import check_linear
from sim.history import Op
from sim.random_histories import Shape, make, overwrite_seen
from sim.stamps import runs_of, stamp_fill

KEY = ("f",)


def write(number: int, start: int, end: int | None, low: int = 0, high: int = 64) -> Op:
    data = runs_of(stamp_fill(number, low, high - low), low)
    outcome = "unknown" if end is None else "ok"
    return Op(1, "write", KEY, low, high - low, start, end, outcome, data, number)


def read(start: int, end: int, *seen: tuple[int, int, int]) -> Op:
    """Return a read that saw (number, low, high)."""
    data = b"".join(stamp_fill(n, a, b - a) if n else bytes(b - a) for n, a, b in seen)
    low, high = seen[0][1], seen[-1][2]
    return Op(2, "read", KEY, low, high - low, start, end, "ok", runs_of(data, low))


def truncate(size: int, start: int, end: int) -> Op:
    return Op(3, "truncate", KEY, size, 0, start, end, "ok")


def rules(*ops: Op, **settings) -> set[str]:
    for number, op in enumerate(ops):
        op.number = number
    verdict = check_linear(ops, **settings)
    assert not verdict.undecided
    assert all(str(violation) for violation in verdict.violations)
    return {violation.rule for violation in verdict.violations}


def test_good_histories_pass() -> None:
    assert rules(write(1, 0, 10), read(11, 12, (1, 0, 64))) == set()
    assert rules(write(1, 0, 10), read(5, 6, (0, 0, 64)), read(7, 8, (1, 0, 64))) == set()
    # Of unknown outcome: seen late, or never.
    assert rules(write(1, 0, 1), write(2, 2, None), read(90, 91, (1, 0, 64)),
                 read(95, 96, (2, 0, 64))) == set()  # fmt: skip
    assert rules(write(1, 0, 1), write(2, 2, None, 0, 8), read(90, 91, (1, 0, 64))) == set()
    # Two concurrent writes, each on top somewhere else only where the other does not reach.
    assert rules(write(1, 0, 9, 0, 40), write(2, 0, 9, 24, 64),
                 read(10, 11, (1, 0, 40), (2, 40, 64))) == set()  # fmt: skip
    assert rules(write(1, 0, 1), truncate(32, 2, 3), read(4, 5, (1, 0, 32), (0, 32, 64))) == set()


def test_stale_read_is_caught() -> None:
    ops = write(1, 0, 1), write(2, 2, 3), read(4, 5, (1, 0, 64))
    assert rules(*ops) == {"stale"}
    assert "w1 comes before w2" in str(check_linear(ops).violations[0])


def test_version_seen_again_after_a_newer_one_is_caught() -> None:
    ops = write(1, 0, 1), write(2, 2, None), read(3, 4, (2, 0, 64)), read(5, 6, (1, 0, 64))
    assert rules(*ops) == {"stale"}


def test_lost_write_is_caught() -> None:
    assert rules(write(1, 0, 1), read(2, 3, (0, 0, 64))) == {"lost"}
    assert rules(write(1, 0, 1), read(2, 3, (1, 0, 32), (0, 32, 64))) == {"torn"}
    assert rules(write(1, 0, 1), read(2, 3, (0, 0, 32))) == {"lost"}


def test_duplicate_applied_late_is_caught() -> None:
    """C10: a late duplicate of write 1 overwrote newer data."""
    ops = (write(1, 0, None), write(2, 5, 6), read(7, 8, (2, 0, 64)), read(9, 10, (1, 0, 64)),
           write(3, 11, 12), read(13, 14, (3, 0, 64)), read(15, 16, (1, 0, 64)))  # fmt: skip
    assert rules(*ops[:4]) == set(), "its first effect may be late"
    assert rules(*ops) == {"stale"}, "a second one may not"


def test_value_from_nowhere_is_caught() -> None:
    assert rules(read(2, 3, (7, 0, 64))) == {"phantom"}
    assert rules(write(1, 5, 6), read(2, 3, (1, 0, 64))) == {"future"}
    failed = write(1, 0, 1)
    failed.outcome = "fail"
    assert rules(failed, read(2, 3, (1, 0, 64))) == {"phantom"}
    flipped = read(2, 3, (1, 0, 64))
    data = bytearray(flipped.payload)
    data[20] ^= 0x80
    flipped.data = runs_of(bytes(data), 0)
    assert rules(write(1, 0, 1), flipped) == {"torn"}


def test_half_a_write_is_caught_by_whole_operations_only() -> None:
    # Every segment alone is fine: both writes are concurrent, but they covered the same bytes.
    ops = (write(1, 0, 9), write(2, 0, 9), write(3, 0, 1, 32, 40),
           read(10, 11, (1, 0, 32), (2, 32, 64)))  # fmt: skip
    assert rules(*ops) == {"atomic"}
    [violation] = check_linear(ops).violations
    assert [op.number for op in violation.ops] == [0, 1, 3], "the third write has no part in it"


def test_writes_across_chunks_need_not_be_atomic() -> None:
    ops = write(1, 0, 9), write(2, 0, 9), read(10, 11, (1, 0, 32), (2, 32, 64))
    assert rules(*ops, chunk_bytes=32) == set()
    assert rules(*ops, chunk_bytes=64) != set()


def test_erased_bytes_stay_erased() -> None:
    ops = write(1, 0, 1), truncate(32, 2, 3), read(4, 5, (1, 0, 64))
    assert rules(*ops) == {"erased"}
    assert rules(write(1, 0, 1), truncate(32, 2, 3), write(2, 4, 5),
                 read(6, 7, (2, 0, 32), (0, 32, 64))) != set()  # fmt: skip


def test_lengths_are_compared_when_asked_for() -> None:
    short = Op(2, "read", KEY, 0, 64, 4, 5, "ok", runs_of(stamp_fill(1, 0, 32), 0))
    assert rules(write(1, 0, 1), truncate(32, 2, 3), short, lengths=True) == set()
    padded = read(4, 5, (1, 0, 32), (0, 32, 64))
    assert rules(write(1, 0, 1), truncate(32, 2, 3), padded) == set()
    assert rules(write(1, 0, 1), truncate(32, 2, 3), padded, lengths=True) == {"atomic"}
    assert rules(write(1, 0, 1), truncate(32, 2, 3), truncate(64, 6, 7),
                 read(8, 9, (1, 0, 32), (0, 32, 64)), lengths=True) == set()  # fmt: skip


def test_true_histories_pass_whatever_their_shape() -> None:
    for seed in range(120):
        random = Random(seed)
        shape = Shape(
            ops=random.choice((12, 40, 80)),
            clients=random.choice((2, 4, 6)),
            unit_bytes=random.choice((1, 3, 8, 32)),
            unknown=random.choice((0.0, 0.1, 0.4)),
            erases=random.choice((0.0, 0.0, 0.1)),
            lengths=random.random() < 0.3,
        )
        verdict = check_linear(make(random, shape), lengths=shape.lengths)
        assert not verdict.violations, f"seed {seed}: {verdict.violations[0]}"
        assert not verdict.undecided, f"seed {seed}: {verdict.undecided}"


def brute_force(ops: list[Op]) -> bool:
    """Try every order of every subset that keeps what returned; bytes against bytes."""
    sure = [op for op in ops if op.ok]
    unknown = [op for op in ops if op.outcome == "unknown"]
    for count in range(len(unknown) + 1):
        for some in combinations(unknown, count):
            for order in permutations(sure + list(some)):
                if _in_real_time(order) and _explains(order):
                    return True
    return False


def _in_real_time(order: tuple[Op, ...]) -> bool:
    latest = -1
    for op in order:
        if op.effect_by_ns < latest:
            return False
        latest = max(latest, op.start_ns)
    return True


def _explains(order: tuple[Op, ...]) -> bool:
    chunk = bytearray(256)
    for op in order:
        if op.kind == "read":
            if chunk[op.offset : op.stop] != op.payload:
                return False
        elif op.kind == "write":
            chunk[op.offset : op.stop] = op.payload
        else:
            chunk[op.offset :] = bytes(256 - op.offset)
    return True


def test_agrees_with_brute_force_in_both_directions() -> None:
    """Tiny histories, mutated at random: the same answer as trying everything."""
    counts = {True: 0, False: 0}
    for seed in range(400):
        random = Random(seed)
        shape = Shape(ops=6, clients=3, size_bytes=32, unit_bytes=random.choice((4, 16)),
                      unknown=0.2, erases=random.choice((0.0, 0.2)), pause_ns=60)  # fmt: skip
        ops = make(random, shape)
        reads = [op for op in ops if op.kind == "read"]
        writes = [op.stamp for op in ops if op.kind == "write"]
        if reads and seed % 4:
            op, unit = random.choice(reads), shape.unit_bytes
            position = op.offset + unit * random.randrange(op.length // unit)
            overwrite_seen(op, position, random.choice((unit, 64)), random.choice([0, *writes]))
        verdict, truth = check_linear(ops), brute_force(ops)
        assert not verdict.undecided
        shown = "\n".join(map(str, ops))
        assert truth == (not verdict.violations), f"seed {seed}: true is {truth} of\n{shown}"
        counts[truth] += 1
    assert min(counts.values()) > 60, counts


def test_overwritten_values_are_caught_in_long_histories() -> None:
    """Let a read return a value that was surely overwritten before it began."""
    tried = 0
    for seed in range(40):
        random = Random(seed)
        ops = make(random, Shape(ops=120, unknown=0.05))
        write_ops = [op for op in ops if op.kind == "write" and op.ok]
        pairs = [
            (old, new, op)
            for old in write_ops
            for new in write_ops
            for op in ops
            if op.kind == "read"
            and old.effect_by_ns < new.start_ns
            and new.effect_by_ns < op.start_ns
            and max(old.offset, new.offset, op.offset) + 32 <= min(old.stop, new.stop, op.stop)
        ]
        if pairs:
            old, new, op = random.choice(pairs)
            overwrite_seen(op, max(old.offset, new.offset, op.offset), 32, old.stamp)
            assert check_linear(ops).violations, f"seed {seed}"
            tried += 1
    assert tried > 20


def test_what_the_budget_does_not_cover_is_undecided() -> None:
    ops = [write(n, n, 1000, n % 4 * 16, n % 4 * 16 + 32) for n in range(1, 20)]
    ops.append(read(2000, 2001, (1, 16, 32), (2, 32, 48)))
    verdict = check_linear(ops, budget_steps=2)
    assert verdict.undecided
    assert not verdict.violations
    assert verdict.decided == 0


def test_five_hundred_operations_are_checked_quickly() -> None:
    random = Random(1)
    ops = [
        op
        for chunk in range(8)
        for op in make(random, Shape(ops=64, clients=4, size_bytes=4096), ("f", str(chunk)))
    ]
    start = perf_counter()
    verdict = check_linear(ops)
    spent = perf_counter() - start
    assert not verdict.violations
    assert spent < 2.0, f"{spent:.3f} s"  # a bound for loaded machines; usually 0.05
