"""Namespace operations are atomic: one order of them explains all answers.

The model is a POSIX tree: path -> (kind, inode). Operations, with `key` (path,) or (path, path2)
and `result` for what was answered:

    create, mkdir       the inode, or "" if not known; exclusive: EXISTS if the name exists
    unlink, rmdir, link, rename     ""
    stat                "kind inode links", "-" for what is not compared
    readdir             the names, sorted, joined with "/"

`fail` with one of ERRORS in `result` is an answer and must fit; any other failure did nothing.
Paths are absolute and plain: no symlinks, no dots. Histories are split by their first directory.
"""

from collections.abc import Iterable, Mapping

from sim.history import Op
from sim.linearize import BUDGET_STEPS, Call, linearize
from sim.violation import Verdict, Violation

Node = tuple[str, int]  # (file or directory, inode; negative: not known yet)
Tree = frozenset[tuple[str, Node]]

FILE, DIRECTORY = "file", "directory"
MISSING, NO_DIRECTORY, EXISTS = "NOT_FOUND", "NOT_DIRECTORY", "EXISTS"
NOT_EMPTY, IS_DIRECTORY, LOOP = "NOT_EMPTY", "IS_DIRECTORY", "INVALID"
NOT_PERMITTED = "NOT_PERMITTED"  # a hard link to a directory
ERRORS = (MISSING, NO_DIRECTORY, EXISTS, NOT_EMPTY, IS_DIRECTORY, LOOP, NOT_PERMITTED)
_ANY = "-"
_EMPTY: Mapping[str, Node] = {}


def check_names(
    ops: Iterable[Op], initial: Mapping[str, Node] = _EMPTY, budget_steps: int = BUDGET_STEPS
) -> Verdict:
    """Check a history that began with the tree `initial` ("/" is always there)."""
    verdict = Verdict()
    for name, some in _independent(list(ops)).items():
        tree = {p: n for p, n in initial.items() if name == "" or _top(p) in name.split("/")}
        found = Names(some).search(tree, budget_steps)
        if found is None:
            verdict.undecided.append(f"/{name}: {len(some)} operations")
            continue
        verdict.decided += 1
        verdict.violations.extend(found)
    return verdict


def _top(path: str) -> str:
    return path.split("/")[1]


def _independent(ops: list[Op]) -> dict[str, list[Op]]:
    """Group operations that share no first directory; one that names the root joins all."""
    group: dict[str, str] = {}

    def leader(name: str) -> str:
        while group.setdefault(name, name) != name:
            name = group[name]
        return name

    if any("/" in op.key for op in ops):
        return {"": ops}
    for op in ops:
        tops = [leader(_top(str(path))) for path in op.key]
        group[tops[0]] = tops[-1]
    found: dict[str, list[Op]] = {}
    for op in ops:
        found.setdefault(leader(_top(str(op.key[0]))), []).append(op)
    members: dict[str, list[str]] = {}
    for name in group:
        members.setdefault(leader(name), []).append(name)
    return {"/".join(members[name]): some for name, some in found.items()}


class Names:
    """The search over one tree."""

    def __init__(self, ops: list[Op]) -> None:
        self.ops = [
            op
            for op in ops
            if (op.outcome != "fail" or op.result in ERRORS)
            and (op.outcome != "unknown" or op.kind not in ("stat", "readdir"))
        ]
        # Where an inode is not known from its creation, a stat decides it: it is no mere observer.
        open_inodes = any(op.kind in ("create", "mkdir") and not op.result for op in self.ops)
        self.calls = [
            Call(
                op.start_ns,
                op.effect_by_ns if op.outcome != "fail" else op.end_ns or 0,
                op.outcome != "unknown",
                op.outcome == "fail"
                or op.kind == "readdir"
                or (op.kind == "stat" and not open_inodes),
            )
            for op in self.ops
        ]

    def search(self, tree: Mapping[str, Node], budget_steps: int) -> list[Violation] | None:
        """Return what is wrong, None if the budget did not suffice."""
        start: Tree = frozenset(tree.items())
        search = linearize(self.calls, start, self.apply, budget_steps)
        if not search.decided:
            return None
        if search.order is not None:
            return []
        stuck = [op for i, op in enumerate(self.ops) if not search.deepest >> i & 1]
        sure = [op for op in stuck if op.outcome != "unknown"]
        first = min(sure, key=lambda op: (op.end_ns or 0, op.number))
        near = [op for op in self.ops if _related(op, first) and op.start_ns <= (first.end_ns or 0)]
        text = f"no order explains these answers; the best one stops at #{first.number}"
        return [Violation("names", text, tuple(sorted(near, key=lambda op: op.number)))]

    def apply(self, state: Tree, index: int, done: int) -> Tree | None:
        """Return the tree after one operation; None if its answer does not fit."""
        op = self.ops[index]
        tree = dict(state)
        answer = _perform(tree, op)
        if op.outcome == "fail":
            return state if op.result in answer.split("|") else None
        if answer.split("|")[0] in ERRORS:
            return None
        if op.kind == "readdir":
            return state if answer == op.result else None
        if op.kind == "stat":
            return _stat(state, tree, op, answer)
        after = frozenset(tree.items())
        return None if op.outcome == "unknown" and after == state else after


def _related(op: Op, other: Op) -> bool:
    return any(
        str(a).startswith(str(b)) or str(b).startswith(str(a)) for a in op.key for b in other.key
    )


def _parent(tree: dict[str, Node], path: str) -> str:
    """Return "" if the directory that holds `path` exists, else the error."""
    parts = path.split("/")[1:-1]
    for count in range(1, len(parts) + 1):
        node = tree.get("/" + "/".join(parts[:count]))
        if node is None:
            return MISSING
        if node[0] != DIRECTORY:
            return NO_DIRECTORY
    return ""


def _perform(tree: dict[str, Node], op: Op) -> str:
    """Change the tree; return the answer, or the errors, "|" between those that fit equally."""
    path = str(op.key[0])
    problem = _parent(tree, path)
    if problem:
        return problem
    node = (DIRECTORY, 1) if path == "/" else tree.get(path)
    if op.kind in ("create", "mkdir"):
        if node is not None:
            return EXISTS
        inode = int(op.result) if op.ok and op.result else -1 - op.number
        tree[path] = (FILE if op.kind == "create" else DIRECTORY), inode
        return ""
    if node is None:
        # POSIX leaves open which of two errors is told.
        problem = _parent(tree, str(op.key[1])) if op.kind == "rename" else ""
        return f"{MISSING}|{problem}" if problem else MISSING
    if op.kind == "stat":
        return path
    if op.kind == "readdir":
        return "/".join(_children(tree, path)) if node[0] == DIRECTORY else NO_DIRECTORY
    if op.kind == "unlink":
        if node[0] == DIRECTORY:
            return IS_DIRECTORY
        del tree[path]
        return ""
    if op.kind == "rmdir":
        if node[0] != DIRECTORY:
            return NO_DIRECTORY
        if _children(tree, path):
            return NOT_EMPTY
        del tree[path]
        return ""
    other = str(op.key[1])
    return _link(tree, node, other) if op.kind == "link" else _rename(tree, path, other)


def _children(tree: dict[str, Node], path: str) -> list[str]:
    prefix = path.rstrip("/") + "/"
    return sorted(
        p[len(prefix) :] for p in tree if p.startswith(prefix) and "/" not in p[len(prefix) :]
    )


def _link(tree: dict[str, Node], node: Node, other: str) -> str:
    problem = _parent(tree, other)
    if problem or other in tree:
        return problem or EXISTS
    if node[0] == DIRECTORY:
        return NOT_PERMITTED
    tree[other] = node
    return ""


def _rename(tree: dict[str, Node], path: str, other: str) -> str:
    problem = _parent(tree, other)
    if problem:
        return problem
    node, there = tree[path], tree.get(other)
    if node == there:
        return ""  # the same file: nothing happens, both names stay
    if other.startswith(path + "/"):
        return LOOP
    if path.startswith(other + "/"):
        return NOT_EMPTY
    if there is not None:
        if there[0] != node[0]:
            return NO_DIRECTORY if node[0] == DIRECTORY else IS_DIRECTORY
        if there[0] == DIRECTORY and _children(tree, other):
            return NOT_EMPTY
    moved = [p for p in tree if p == path or p.startswith(path + "/")]
    tree.pop(other, None)
    for name in moved:
        tree[other + name[len(path) :]] = tree.pop(name)
    return ""


def _stat(state: Tree, tree: dict[str, Node], op: Op, path: str) -> Tree | None:
    """Compare a stat; it may tell the inode of something whose creation did not."""
    kind, inode, links = op.result.split(" ")
    node = (DIRECTORY, 1) if path == "/" else tree[path]
    count = sum(other == node for other in tree.values())
    if kind not in (_ANY, node[0]) or links not in (_ANY, str(count)):
        return None
    if inode in (_ANY, str(node[1])):
        return state
    if node[1] >= 0 or any(other[1] == int(inode) for other in tree.values()):
        return None
    known = (node[0], int(inode))
    return frozenset((p, known if other == node else other) for p, other in state)
