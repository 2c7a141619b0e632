"""The checkers of metadata calls: histories that fit, and histories that do not."""

from sim.check_lives import Cut, Seen, check_lives
from sim.check_tree import DIRECTORY, FILE, Names, check_tree
from sim.history import Key, Op


def op(kind: str, key: Key, start: int, end: int, result: str = "", outcome: str = "ok") -> Op:
    """A call from start to end (ns)."""
    return Op(1, kind, key, 0, 0, start, end, outcome, result=result, number=start)


def holds(*ops: Op, initial: Names | None = None) -> bool:
    """Tell whether the checker agrees."""
    verdict = check_tree(ops, initial or {})
    assert verdict.decided
    return not verdict.violations


def test_a_name_is_made_once() -> None:
    made = op("mkdir", (1, "a"), 1, 5, "directory 7 2")
    again = op("mkdir", (1, "a"), 2, 6, "EXISTS", "fail")
    assert holds(made, again)
    assert not holds(again)
    assert not holds(made, op("mkdir", (1, "a"), 2, 6, "directory 8 2"))


def test_links_are_counted_and_inodes_are_not_given_twice() -> None:
    made = op("create", (1, "a", "x"), 1, 2, "file 7 1")
    link = op("link", (7, 1, "b"), 3, 4, "file 7 2")
    assert holds(made, link, op("lookup", (1, "a"), 5, 6, "file 7 2"))
    assert not holds(made, link, op("lookup", (1, "a"), 5, 6, "file 7 1"))
    assert not holds(made, op("create", (1, "c", "x"), 3, 4, "file 7 1"))


def test_rename_is_atomic_and_makes_no_loop() -> None:
    tree: Names = {(1, "a"): (DIRECTORY, 7), (7, "b"): (DIRECTORY, 8), (1, "f"): (FILE, 9)}
    assert holds(op("rename", (1, "a", 8, "x"), 1, 2, "INVALID", "fail"), initial=tree)
    assert not holds(op("rename", (1, "a", 8, "x"), 1, 2), initial=tree)
    move = op("rename", (1, "f", 7, "g"), 1, 9)
    both = op("readdir", (7,), 2, 3, "b 8/g 9"), op("lookup", (1, "f"), 4, 5, "file 9 1")
    assert holds(move, both[0], initial=tree)
    assert not holds(move, *both, initial=tree)
    assert not holds(op("rmdir", (1, "a"), 1, 2), initial=tree)


def test_paths_are_walked_in_one_instant() -> None:
    tree: Names = {(1, "a"): (DIRECTORY, 7), (7, "f"): (FILE, 9)}
    assert holds(op("resolve", ("/a/f",), 1, 2, "file 9 1"), initial=tree)
    assert holds(op("resolve", ("/a/f/",), 1, 2, "NOT_DIRECTORY", "fail"), initial=tree)
    assert holds(op("resolve", ("/b/f",), 1, 2, "NOT_FOUND", "fail"), initial=tree)
    assert not holds(op("resolve", ("/a/f",), 1, 2, "file 8 1"), initial=tree)


ONE, TWO = Seen({(1, "a"): (DIRECTORY, 7)}, {(1, 1): "directory 7 2"}), Seen({}, {})


def test_memory_of_replies_tells_what_took_effect() -> None:
    lost = op("mkdir", (1, "a"), 1, 2, "", "unknown")
    assert not check_lives([lost], {1: (1, 1)}, [], ONE, 9).violations
    assert not check_lives([lost], {1: (1, 1)}, [], TWO, 9).violations
    failed = op("mkdir", (1, "a"), 1, 2, "NOT_FOUND", "fail")
    assert check_lives([failed], {1: (1, 1)}, [], TWO, 9).violations
    twice = Seen({}, {(1, 1): "directory 7 2"})
    assert check_lives([lost], {1: (1, 1)}, [], twice, 9).violations


def test_power_cuts_undo_only_what_was_not_flushed() -> None:
    made = op("mkdir", (1, "a"), 1, 2, "directory 7 2")
    flush = op("stable", (), 3, 4)
    cuts = [Cut(10, ONE, TWO)]
    assert not check_lives([made], {1: (1, 1)}, cuts, TWO, 20).violations
    found = check_lives([made, flush], {1: (1, 1)}, cuts, TWO, 20).violations
    assert [violation.rule for violation in found] == ["names not durable"]
    torn = [Cut(10, ONE, Seen({}, ONE.answers))]
    assert check_lives([made], {1: (1, 1)}, torn, Seen({}, ONE.answers), 20).violations
