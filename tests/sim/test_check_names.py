"""The checker of namespace histories: exact on tiny ones, no false alarm, no miss."""

import errno
import os
from itertools import combinations, permutations
from pathlib import Path
from random import Random

from sim.check_names import ERRORS, Names, check_names
from sim.history import Op

PATHS = ("/a/x", "/a/y", "/a/d", "/a/d/x", "/a/d/y")


def op(kind: str, paths: str, start: int, end: int | None, result: str = "") -> Op:
    outcome = "fail" if result in ERRORS else "unknown" if end is None else "ok"
    return Op(1, kind, tuple(paths.split()), 0, 0, start, end, outcome, result=result)


def good(*ops: Op) -> bool:
    for number, each in enumerate(ops):
        each.number = number
    verdict = check_names(ops, {"/a": ("directory", 2)})
    assert not verdict.undecided
    assert all(str(violation) for violation in verdict.violations)
    return not verdict.violations


def test_plain_histories() -> None:
    create = op("create", "/a/x", 0, 1, "10")
    assert good(create, op("stat", "/a/x", 2, 3, "file 10 1"))
    assert not good(create, op("stat", "/a/x", 2, 3, "file 11 1"))
    assert not good(create, op("stat", "/a/x", 2, 3, "NOT_FOUND"))
    assert good(create, op("readdir", "/a", 2, 3, "x"))
    assert not good(create, op("readdir", "/a", 2, 3, ""))
    assert good(create, op("link", "/a/x /a/y", 2, 3), op("stat", "/a/y", 4, 5, "file 10 2"))
    assert good(op("mkdir", "/a/d", 0, 1), op("create", "/a/d/x", 2, 3),
                op("rmdir", "/a/d", 4, 5, "NOT_EMPTY"),
                op("rename", "/a/d /a/y", 6, 7), op("readdir", "/a/y", 8, 9, "x"),
                op("rename", "/a/y /a/y/z", 10, 11, "INVALID"))  # fmt: skip


def test_one_of_two_creates_wins() -> None:
    assert good(op("create", "/a/x", 0, 9), op("create", "/a/x", 0, 9, "EXISTS"))
    assert not good(op("create", "/a/x", 0, 9), op("create", "/a/x", 0, 9))
    assert not good(op("create", "/a/x", 0, 9, "EXISTS"))


def test_a_name_is_never_missing_while_it_is_replaced() -> None:
    ops = (op("create", "/a/x", 0, 1, "10"), op("create", "/a/y", 0, 1, "11"),
           op("rename", "/a/x /a/y", 5, 20))  # fmt: skip
    assert good(*ops, op("stat", "/a/y", 6, 7, "file 11 1"), op("stat", "/a/y", 8, 9, "file 10 1"))
    assert not good(*ops, op("stat", "/a/y", 6, 7, "NOT_FOUND"))
    assert not good(*ops, op("readdir", "/a", 6, 7, "x/y"), op("readdir", "/a", 8, 9, "y"),
                    op("readdir", "/a", 10, 11, "x/y"))  # fmt: skip


def test_unknown_outcomes_happen_late_or_never_but_once() -> None:
    create = op("create", "/a/x", 0, None)
    assert good(create, op("stat", "/a/x", 5, 6, "NOT_FOUND"))
    assert good(create, op("stat", "/a/x", 5, 6, "NOT_FOUND"), op("stat", "/a/x", 7, 8, "file 9 1"))
    assert not good(
        create, op("stat", "/a/x", 5, 6, "file 9 1"), op("stat", "/a/x", 7, 8, "file 8 1")
    )
    assert not good(create, op("stat", "/a/x", 5, 6, "file 9 1"), op("unlink", "/a/x", 7, 8),
                    op("stat", "/a/x", 9, 10, "file 9 1"))  # fmt: skip


def test_two_files_never_have_one_inode() -> None:
    creates = op("create", "/a/x", 0, 1), op("create", "/a/y", 0, 1)
    seen = op("stat", "/a/x", 5, 6, "file 9 1")
    assert good(*creates, seen, op("stat", "/a/y", 7, 8, "file 8 1"))
    assert not good(*creates, seen, op("stat", "/a/y", 7, 8, "file 9 1"))
    assert not good(*creates, seen, op("stat", "/a/y", 7, 8, "file 9 -"))


def test_directories_apart_are_searched_apart() -> None:
    ops = [op("mkdir", f"/{n}", 0, 1) for n in range(20)]
    ops += [op("create", f"/{n}/x", 2, 3) for n in range(20)]
    assert check_names(ops).decided == 20
    assert check_names([*ops, op("rename", "/1/x /2/y", 4, 5)]).decided == 19
    assert check_names([*ops, op("stat", "/", 4, 5, "directory 1 -")]).decided == 1


def test_what_the_budget_does_not_cover_is_undecided() -> None:
    ops = [op("create", f"/a/{n}", 0, 9, str(n + 5)) for n in range(12)]
    ops.append(op("readdir", "/a", 10, 11, "1"))
    verdict = check_names(ops, {"/a": ("directory", 2)}, budget_steps=50)
    assert verdict.undecided
    assert not verdict.violations


def random_history(random: Random, count: int) -> list[Op]:
    """Execute operations of three clients, each at an instant inside its interval."""
    plan, clocks = [], [0, 0, 0]
    for number in range(count):
        client = random.randrange(3)
        start = clocks[client] + random.randrange(1, 20)
        clocks[client] = start + random.randrange(1, 60)
        kind = random.choice(
            (
                "create",
                "create",
                "mkdir",
                "unlink",
                "rmdir",
                "rename",
                "link",
                "stat",
                "stat",
                "readdir",
            )
        )
        key = (random.choice(PATHS),)
        if kind in ("rename", "link"):
            key = (key[0], random.choice(PATHS))
        elif kind == "readdir":
            key = (random.choice(("/a", "/a/d")),)
        made = Op(client, kind, key, 0, 0, start, clocks[client], "ok", number=number)
        plan.append((random.randint(start, clocks[client]), number, made))
    tree = frozenset({("/a", ("directory", 2))})
    for _, _, made in sorted(plan, key=lambda item: item[:2]):
        tree = _execute(random, tree, made)
    return [made for _, _, made in plan]


def _execute(random: Random, tree: frozenset, made: Op) -> frozenset:
    lost = random.random() < 0.15 and made.kind not in ("stat", "readdir")
    inode = str(100 + made.number) if made.kind in ("create", "mkdir") else ""
    for result in (*ERRORS, inode):
        made.outcome, made.result = ("fail" if result in ERRORS else "ok"), result
        if made.kind in ("stat", "readdir") and made.outcome == "ok":
            nodes = dict(tree)
            path = str(made.key[0])
            below = [p for p in nodes if p.rpartition("/")[0] == path]
            names = "/".join(sorted(p.rpartition("/")[2] for p in below))
            links = sum(node == nodes[path] for node in nodes.values())
            made.result = f"{nodes[path][0]} {nodes[path][1]} {links}"
            made.result = made.result if made.kind == "stat" else names
        after = Names([made]).apply(tree, 0, 0)
        if after is not None:
            if lost:
                made.outcome, made.result = "unknown", ""
                return after if random.random() < 0.5 else tree
            return after
    raise AssertionError(f"no answer fits {made}")


def brute_force(ops: list[Op]) -> bool:
    """Try every order of every subset that keeps what returned."""
    names = Names(ops)
    sure = [i for i, call in enumerate(names.calls) if call.required]
    unknown = [i for i, call in enumerate(names.calls) if not call.required]
    for count in range(len(unknown) + 1):
        for some in combinations(unknown, count):
            for order in permutations(sure + list(some)):
                latest, tree = -1, frozenset({("/a", ("directory", 2))})
                for index in order:
                    call = names.calls[index]
                    if call.end_ns < latest:
                        break
                    latest = max(latest, call.start_ns)
                    after = names.apply(tree, index, 0)
                    if after is None:
                        break
                    tree = after
                else:
                    return True
    return False


def test_true_histories_pass() -> None:
    for seed in range(60):
        ops = random_history(Random(seed), 40)
        verdict = check_names(ops, {"/a": ("directory", 2)})
        assert not verdict.violations, f"seed {seed}: {verdict.violations[0]}"
        assert not verdict.undecided, f"seed {seed}"


def test_agrees_with_brute_force_in_both_directions() -> None:
    counts = {True: 0, False: 0}
    for seed in range(300):
        random = Random(seed)
        ops = random_history(random, 6)
        if seed % 4:
            victim = random.choice(ops)
            if victim.outcome != "unknown":
                victim.outcome, victim.result = random.choice(
                    [("fail", "NOT_FOUND"), ("fail", "EXISTS")]
                    + ([("ok", "")] if victim.kind not in ("stat",) else [])
                )
        truth = brute_force(ops)
        verdict = check_names(ops, {"/a": ("directory", 2)})
        assert truth == (not verdict.violations), f"seed {seed}\n" + "\n".join(map(str, ops))
        counts[truth] += 1
    assert min(counts.values()) > 40, counts


CODES = {
    errno.ENOENT: "NOT_FOUND", errno.ENOTDIR: "NOT_DIRECTORY", errno.EEXIST: "EXISTS",
    errno.ENOTEMPTY: "NOT_EMPTY", errno.EISDIR: "IS_DIRECTORY", errno.EINVAL: "INVALID",
    errno.EPERM: "NOT_PERMITTED",
}  # fmt: skip


def on_disk(root: Path, made: Op) -> str:
    """Do it on a real directory; return the answer."""
    path, *other = [f"{root}{name}" for name in made.key]
    try:
        if made.kind == "create":
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            return str(os.stat(path).st_ino)
        if made.kind == "mkdir":
            os.mkdir(path)
            return str(os.stat(path).st_ino)
        if made.kind == "stat":
            found = os.stat(path)
            directory = os.path.isdir(path)
            links = "-" if directory else found.st_nlink
            return f"{'directory' if directory else 'file'} {found.st_ino} {links}"
        if made.kind == "readdir":
            return "/".join(sorted(os.listdir(path)))
        getattr(os, made.kind)(path, *other)
    except OSError as problem:
        return CODES[problem.errno or 0]
    return ""


def test_the_model_answers_as_a_real_directory_does(tmp_path: Path) -> None:
    for seed in range(60):
        root = tmp_path / str(seed)
        (root / "a").mkdir(parents=True)
        ops = random_history(Random(seed), 60)
        for number, made in enumerate(ops):
            made.start_ns, made.end_ns = 2 * number, 2 * number + 1
            made.result = on_disk(root, made)
            made.outcome = "fail" if made.result in ERRORS else "ok"
            if seed % 2 and made.kind in ("create", "mkdir") and made.outcome == "ok":
                made.result = ""  # the inode is learnt from a stat
        inode = os.stat(root / "a").st_ino
        verdict = check_names(ops, {"/a": ("directory", inode)})
        assert not verdict.violations, f"seed {seed}: {verdict.violations[0]}"
        assert not verdict.undecided, f"seed {seed}"
