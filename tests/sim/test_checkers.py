"""Every checker passes what is good and catches what is bad."""

from dataclasses import replace
from random import Random

from sim.check_blocks import Owned, check_findings, check_owners
from sim.check_durable import LOST, after_cut, check_acknowledged, check_durable
from sim.check_exit import Sample, check_exit, check_progress
from sim.check_linear import check_linear
from sim.check_once import Applied, check_appends, check_count, check_once, check_remembered
from sim.check_partition import Accepted, Answered, check_primaries, check_writes
from sim.check_replicas import ChunkState, Replica, check_replicas
from sim.check_versions import Seen, check_versions
from sim.history import Op
from sim.random_histories import Shape, make
from sim.stamps import runs_of, stamp_fill
from sim.violation import Violation, report


def rules(found: list[Violation]) -> set[str]:
    assert report(found) or not found
    return {violation.rule for violation in found}


def op(kind: str, start: int, end: int | None, number: int = 0, client: int = 1) -> Op:
    """Return a whole-chunk operation; of a read `number` is what it saw."""
    length = 0 if kind in ("flush", "remove", "truncate") else 64
    data = (stamp_fill(number, 0, 64) if number else bytes(64)) if length else b""
    stamp = number if kind in ("write", "append") else 0
    outcome = "unknown" if end is None else "ok"
    key = ("f",) if kind == "flush" else ("f", 0)
    return Op(client, kind, key, 0, length, start, end, outcome, runs_of(data, 0), stamp)


# ---------------------------------------------------------------- durability


def test_what_was_flushed_before_a_power_cut_is_there() -> None:
    base = [op("write", 0, 1, 1), op("flush", 2, 3), op("write", 4, 5, 2), op("write", 6, None, 3)]
    for number in (1, 2, 3):
        assert rules(check_durable([*base, op("read", 20, 21, number)], 10)) == set()
    assert rules(check_durable([*base, op("read", 20, 21, 0)], 10)) == {"not durable"}
    older = [op("write", -5, -4, 9), *base]
    assert rules(check_durable([*older, op("read", 20, 21, 9)], 10)) == {"not durable"}


def test_only_a_flush_that_began_after_the_write_and_ended_well_counts() -> None:
    for flush in (op("flush", 2, 8), op("flush", 2, None), op("flush", 0, 3)):
        ops = [op("write", 0, 1, 1), flush, op("read", 20, 21, 0)]
        counts = flush.start_ns >= 1 and flush.ok
        assert bool(check_durable(ops, 10)) == counts
    ops = [op("write", 0, 1, 1), op("flush", 2, 3, client=2), op("read", 20, 21, 0)]
    assert rules(check_durable(ops, 10)) == {"not durable"}
    assert rules(check_durable(ops, 10, any_client=False)) == set()


def test_a_flush_after_the_cut_answers_for_what_its_client_had_written_before() -> None:
    """Probe of the simulator: it ended well although the write before the cut was gone."""
    write, gone = op("write", 0, 1, 1), op("read", 20, 21, 0)
    for flush in (op("flush", 2, 15), op("flush", 12, 15), op("flush", 30, 31)):
        assert rules(check_durable([write, flush, gone], 10)) == {"not durable"}
        assert check_linear(after_cut([write, flush, gone], 10)).violations
        assert not check_durable([write, replace(flush, client=2), gone], 10)
        told = replace(flush, outcome="unknown", result=LOST)
        assert not check_durable([write, told, gone], 10)
        later = op("flush", 40, 41)
        assert not check_durable([write, told, gone, later], 10), "told once"
        assert rules(check_durable([write, replace(told, client=2), gone, later], 10))


def test_a_flushed_removal_stays_removed() -> None:
    ops = [op("write", 0, 1, 1), op("remove", 2, 3), op("flush", 4, 5)]
    assert rules(check_durable([*ops, op("read", 20, 21, 0)], 10)) == set()
    assert rules(check_durable([*ops, op("read", 20, 21, 1)], 10)) == {"not durable"}
    unflushed = [op("write", 0, 1, 1), op("flush", 2, 3), op("remove", 4, 5)]
    assert rules(check_durable([*unflushed, op("read", 20, 21, 1)], 10)) == set()


def test_kills_lose_nothing_that_was_acknowledged() -> None:
    ops = [op("write", 0, 1, 1), op("write", 2, 3, 2), op("write", 4, None, 3)]
    for number, lost in ((0, True), (1, True), (2, False), (3, False)):
        assert bool(check_acknowledged([*ops, op("read", 9, 10, number)], 5)) == lost


def test_no_alarm_on_true_histories_and_every_dropped_last_write_is_found() -> None:
    caught = 0
    for seed in range(40):
        ops = make(Random(seed), Shape(ops=40, unknown=0.1, erases=0.05))
        assert check_acknowledged(ops) == [], f"seed {seed}"
        writes = [o for o in ops if o.kind == "write" and o.ok and o.end_ns is not None]
        last = max(writes, key=lambda o: o.start_ns)
        if any(o.stop > last.offset and o.effect_by_ns >= last.start_ns and o is not last
               for o in ops if o.kind != "read"):  # fmt: skip
            continue
        end = 1 << 40
        final = Op(9, "read", last.key, last.offset, last.length, end, end + 1, "ok",
                   runs_of(bytes(last.length), last.offset))  # fmt: skip
        assert rules(check_acknowledged([*ops, final], end)) == {"lost"}
        caught += 1
    assert caught > 1


def test_linearizability_after_a_cut_allows_what_was_not_flushed_to_be_gone() -> None:
    ops = [op("write", 0, 1, 1), op("flush", 2, 3), op("write", 4, 5, 2), op("read", 6, 7, 2)]
    after = [op("read", 20, 21, 1), op("read", 22, 23, 1)]
    assert check_linear([*ops, *after]).violations
    assert not check_linear(after_cut([*ops, *after], 10)).violations
    assert check_linear(after_cut([*ops, op("read", 20, 21, 0)], 10)).violations
    back = [op("read", 20, 21, 2), op("read", 22, 23, 1)]
    assert check_linear(after_cut([*ops, *back], 10)).violations


def test_what_counts_after_a_cut_is_when_the_answer_was_sent() -> None:
    before, amid = [op("write", 0, 1, 1), op("flush", 2, 3)], op("write", 5, 15, 2)
    for sent_ns, counts in ((None, False), (9, False), (10, False), (11, True)):
        amid.answered_ns = sent_ns
        found = check_linear(after_cut([*before, amid, op("read", 20, 21, 1)], 10)).violations
        assert bool(found) == counts, sent_ns
        for there in (op("read", 12, 13, 2), op("read", 20, 21, 2)):
            assert not check_linear(after_cut([*before, amid, there], 10)).violations


# ---------------------------------------------------------------- versions


def test_versions_only_go_up() -> None:
    up = [Seen("client 1", "routing", 0, v, t) for v, t in ((1, 1), (1, 2), (4, 3))]
    assert rules(check_versions(up)) == set()
    assert rules(check_versions([*up, Seen("client 1", "routing", 0, 3, 4)])) == {
        "version went back"
    }
    assert rules(check_versions([*up, Seen("client 2", "routing", 0, 3, 4)])) == set()
    back = [*up, Seen("mgmtd 2", "routing", 0, 3, 4)]
    assert rules(check_versions(back, published=["routing"])) == {"version went back"}
    chunk = [Seen("t", "chunk", b"c", v, t) for v, t in ((5, 1), (0, 2), (1, 3))]
    assert rules(check_versions(chunk)) == set(), "removed and written anew"
    assert rules(check_versions([chunk[0], chunk[2]])) == {"version went back"}


def test_one_version_is_one_content() -> None:
    one, same = Seen("a", "routing", 0, 7, 1, "x"), Seen("b", "routing", 0, 7, 2, "x")
    assert rules(check_versions([one, same])) == set()
    assert rules(check_versions([one, same._replace(content="y")])) == {"two contents of a version"}


# ---------------------------------------------------------------- replicas, once, blocks


def test_replicas_are_equal_when_quiet() -> None:
    full = {b"a": ChunkState(3, 10, "x"), b"b": ChunkState(1, 5, "y")}
    good = [Replica(1, 101, True, full), Replica(1, 201, True, dict(full)),
            Replica(1, 301, False, {}, [b"a"]), Replica(2, 102, True, {})]  # fmt: skip
    assert rules(check_replicas(good)) == set()
    for wrong in (
        {b"a": full[b"a"]},
        full | {b"c": full[b"b"]},
        full | {b"a": ChunkState(4, 10, "x")},
        full | {b"a": ChunkState(3, 11, "x")},
        full | {b"a": ChunkState(3, 10, "z")},
    ):
        assert rules(check_replicas([good[0], Replica(1, 201, True, wrong)])) == {"replicas differ"}
    assert rules(check_replicas([Replica(1, 101, True, full, [b"a"])])) == {"still pending"}


def test_a_tag_becomes_one_version() -> None:
    log = [Applied(t, b"c", 1, 2, s, s) for s in (1, 2, 3) for t in (101, 201)]
    assert rules(check_once(log)) == set()
    assert rules(check_once([*log, Applied(101, b"c", 1, 2, 2, 4)])) == {"applied twice"}
    elsewhere = [*log, Applied(301, b"c", 1, 2, 2, 4)]
    assert rules(check_once(elsewhere)) == {"applied twice"}
    assert rules(check_once(elsewhere, across=False)) == set()


def test_memory_of_writers_is_complete() -> None:
    now, before = Applied(101, b"c", 1, 2, 3, 3), Applied(101, b"c", 1, 2, 2, 2)
    assert rules(check_remembered([now], [before, now])) == set()
    assert rules(check_remembered([before], [now])) == {"forgotten"}
    assert rules(check_remembered([before, now], [])) == {"remembered twice"}


def test_appends_stand_there_once_and_in_order() -> None:
    ops = [op("append", 0, 1, 1), op("append", 2, 3, 2), op("append", 2, 3, 3),
           op("append", 0, None, 4)]  # fmt: skip

    def content(*numbers: int) -> bytes:
        return b"".join(stamp_fill(number, 0, 64) for number in numbers)

    for good in ((1, 2, 3), (1, 3, 2), (1, 3, 4, 2), (4, 1, 2, 3)):
        assert rules(check_appends(ops, content(*good))) == set()
    assert rules(check_appends(ops, content(1, 2))) == {"lost"}
    assert rules(check_appends(ops, content(1, 2, 3, 2))) == {"applied twice"}
    assert rules(check_appends(ops, content(1, 4, 4, 2, 3))) == {"applied twice"}
    assert rules(check_appends(ops, content(2, 1, 3))) == {"out of order"}
    assert rules(check_appends(ops, content(1, 2, 3)[:-8])) == {"torn record"}
    assert rules(check_appends(ops, content(1, 2, 3) + bytes(64))) == {"foreign record"}


def test_counts_are_within_what_can_have_happened() -> None:
    ops = [op("increment", 0, 1), op("increment", 2, None), op("increment", 4, 5)]
    assert [rules(check_count(ops, "increment", n)) for n in (1, 2, 3, 4)] == [
        {"lost"}, set(), set(), {"applied twice"}
    ]  # fmt: skip


def test_blocks_have_one_owner() -> None:
    owned = [Owned("a", 0, 0, 64), Owned("b", 0, 64, 64), Owned("a", 1, 0, 128)]
    marked = [entry[1:] for entry in owned]
    assert rules(check_owners(owned, marked)) == set()
    assert rules(check_owners([*owned, Owned("c", 0, 64, 64)], marked)) == {"owned twice"}
    overlap = Owned("c", 1, 64, 64)
    assert rules(check_owners([*owned, overlap], [*marked, overlap[1:]])) == {"owned twice"}
    assert rules(check_owners(owned, marked[1:])) == {"owned but free"}
    assert rules(check_owners(owned[1:], marked)) == {"leaked"}
    assert rules(check_owners(iter(owned), iter(marked))) == set()
    assert rules(check_findings({"101": []})) == set()
    assert rules(check_findings({"101": ["block 0x1 is not marked"]})) == {"blocks"}


# ---------------------------------------------------------------- partition, exit


def test_one_side_accepts_writes() -> None:
    """O12: after the new side has answered, the old one takes nothing up."""
    good = [Accepted(101, 1, 5, 0, 1), Accepted(101, 1, 5, 2, 20), Accepted(201, 1, 6, 9, 10),
            Accepted(101, 2, 5, 30, 31)]  # fmt: skip
    assert rules(check_writes(good)) == set(), "the late answer was taken up before"
    assert rules(check_writes([*good, Accepted(101, 1, 5, 11, 12)])) == {"old side accepts"}
    assert rules(check_writes([*good, Accepted(301, 1, 6, 40, 41)])) == {"two heads"}


def test_one_primary_answers() -> None:
    good = [Answered(1, 1, 0, 5), Answered(2, 2, 6, 7), Answered(1, 3, 8, 9)]
    assert rules(check_primaries(good)) == set()
    assert rules(check_primaries([*good, Answered(1, 1, 8, 8)])) == {"old primary answers"}
    assert rules(check_primaries([*good, Answered(2, 3, 10, 11)])) == {"two primaries"}


def test_all_serve_again_in_time() -> None:
    good = [Sample(1, "SERVING", 0), Sample(1, "OFFLINE", 50), Sample(1, "SYNCING", 110),
            Sample(1, "SERVING", 190), Sample(2, "SERVING", 0)]  # fmt: skip
    assert rules(check_exit(good, [1, 2], 100, 100)) == set()
    assert rules(check_exit(good, [1, 2], 100, 50)) == {"no exit"}
    assert rules(check_exit(good, [1, 2, 3], 100, 100)) == {"no exit"}, "never seen"
    again = [*good, Sample(2, "OFFLINE", 300, "disk")]
    assert rules(check_exit(again, [1, 2], 100, 100)) == {"no exit"}
    assert rules(check_exit(again, [1, 2], 100, 100, {2: ["OFFLINE"]})) == set()


def test_operations_succeed_after_the_heal() -> None:
    failed, named = op("write", 120, 130, 2), op("write", 120, 130, 3)
    failed.outcome = named.outcome = "fail"
    named.result = "NO_SPACE"
    early = op("write", 50, 130, 4)
    early.outcome = "unknown"
    good = [op("write", 110, 120, 1), named, early, op("write", 0, 9, 5)]
    assert rules(check_progress(good, 100, 50)) == set()
    assert rules(check_progress([*good, failed], 100, 50)) == {"fails"}
    assert rules(check_progress([*good, failed], 100, 50, recovery_ns=30)) == set()
    assert rules(check_progress([op("write", 50, None, 1)], 100, 50)) == {"hangs"}
    assert rules(check_progress([op("write", 110, 170, 1)], 100, 50)) == {"hangs"}
