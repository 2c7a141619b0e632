"""Calls to the metadata service are atomic: one order of them explains all answers.

The model works with inodes, as the calls do: a path that a client walks in several calls is not
atomic, each call is. State: (directory, name) -> (kind, inode). Operations, with their `key`, and
`result` for what was answered ("kind inode links" is a *stat*):

    lookup (directory, name), resolve (path,)          stat; "/" at the end: a directory
    mkdir (directory, name)                            stat
    create (directory, name, "x" or "")                stat; without "x" what exists is opened
    link (inode, directory, name)                      stat
    unlink, rmdir, rmtree (directory, name), rename (d, name, d2, name2)        ""
    readdir (directory,)                               "name inode" of all, sorted, joined with "/"
    tree ()                                            the same of everything, see `show`

`fail` with one of ERRORS in `result` is an answer and must fit. What else did not end is left out
or settled before (check_lives.py).
"""

from collections.abc import Callable, Mapping, Sequence

from sim.history import Op
from sim.linearize import BUDGET_STEPS, Call, linearize
from sim.violation import Verdict, Violation

Place = tuple[int, str]  # (directory, name)
Node = tuple[str, int]  # (file or directory, inode)
Tree = frozenset[tuple[Place, Node]]
Names = dict[Place, Node]

ROOT = 1
FILE, DIRECTORY = "file", "directory"
MISSING, NO_DIRECTORY, EXISTS = "NOT_FOUND", "NOT_DIRECTORY", "EXISTS"
NOT_EMPTY, IS_DIRECTORY, LOOP = "NOT_EMPTY", "IS_DIRECTORY", "INVALID"
NOT_PERMITTED = "NOT_PERMITTED"
ERRORS = (MISSING, NO_DIRECTORY, EXISTS, NOT_EMPTY, IS_DIRECTORY, LOOP, NOT_PERMITTED)
LOOKS = ("lookup", "resolve", "readdir", "tree")
CHANGES = ("mkdir", "create", "link", "unlink", "rmdir", "rmtree", "rename")


def check_tree(
    ops: Sequence[Op],
    initial: Mapping[Place, Node],
    what: str = "names",
    budget_steps: int = BUDGET_STEPS,
) -> Verdict:
    """Check calls that began with the tree `initial`; all of them ended or took effect."""
    verdict = Verdict()
    some = [op for op in ops if op.outcome == "ok" or op.result in ERRORS]
    calls = [
        Call(op.start_ns, op.end_ns or 0, True, op.outcome == "fail" or op.kind in LOOKS)
        for op in some
    ]

    def apply(state: Tree, index: int, _done: int) -> Tree | None:
        return _apply(state, some[index])

    search = linearize(calls, frozenset(initial.items()), apply, budget_steps)
    if not search.decided:
        verdict.undecided.append(f"{what}: {len(some)} calls")
        return verdict
    verdict.decided += 1
    if search.order is None:
        stuck = [op for i, op in enumerate(some) if not search.deepest >> i & 1]
        first = min(stuck, key=lambda op: (op.end_ns or 0, op.number))
        near = [op for op in some if _related(op, first) and op.start_ns <= (first.end_ns or 0)]
        text = f"no order explains these answers; the best one stops at {first}"
        verdict.violations.append(Violation(what, text, tuple(near[-12:])))
    return verdict


def show(tree: Mapping[Place, Node]) -> str:
    """Return a whole tree as the result of a `tree` operation."""
    return "/".join(f"{d} {name} {kind} {i}" for (d, name), (kind, i) in sorted(tree.items()))


def _related(op: Op, other: Op) -> bool:
    return bool({op.key[0], *op.key[1:]} & {*other.key}) if op.key and other.key else True


def _apply(state: Tree, op: Op) -> Tree | None:
    names = dict(state)
    answer = _PERFORM[op.kind](names, op)
    if op.outcome == "fail":
        return state if op.result == answer else None
    if answer in ERRORS or (answer != op.result and op.result != "?"):
        return None
    return state if op.kind in LOOKS else frozenset(names.items())


# ---------------------------------------------------------------- what each call does


def _kind(names: Names, inode: int) -> str:
    """Return "" for what has no name."""
    if inode == ROOT:
        return DIRECTORY
    return next((kind for kind, number in names.values() if number == inode), "")


def _directory(names: Names, inode: object) -> str:
    """Return the error of a call in a directory, "" if it exists."""
    assert isinstance(inode, int)
    kind = _kind(names, inode)
    if kind != DIRECTORY:
        return NO_DIRECTORY if kind else MISSING
    return ""


def _stat(names: Names, node: Node) -> str:
    kind, inode = node
    if kind == FILE:
        links = sum(other == node for other in names.values())
    else:
        links = 2 + sum(d == inode and n[0] == DIRECTORY for (d, _), n in names.items())
    return f"{kind} {inode} {links}"


def _place(op: Op, at: int = 0) -> Place:
    directory, name = op.key[at : at + 2]
    assert isinstance(directory, int)
    assert isinstance(name, str)
    return directory, name


def _made(op: Op) -> int:
    return int(op.result.split(" ")[1])


def _lookup(names: Names, op: Op) -> str:
    problem = _directory(names, op.key[0])
    node = names.get(_place(op))
    return problem or (_stat(names, node) if node else MISSING)


def _resolve(names: Names, op: Op) -> str:
    node: Node = (DIRECTORY, ROOT)
    for name in str(op.key[0]).split("/"):
        if not name:
            continue
        if node[0] != DIRECTORY:
            return NO_DIRECTORY
        found = names.get((node[1], name))
        if found is None:
            return MISSING
        node = found
    if str(op.key[0]).endswith("/") and node[0] != DIRECTORY:
        return NO_DIRECTORY
    return _stat(names, node)


def _mkdir(names: Names, op: Op) -> str:
    problem = _directory(names, op.key[0])
    if problem or _place(op) in names:
        return problem or EXISTS
    if op.outcome == "fail":
        return ""
    names[_place(op)] = node = (DIRECTORY, _made(op))
    return _stat(names, node)


def _create(names: Names, op: Op) -> str:
    problem = _directory(names, op.key[0])
    if problem:
        return problem
    node = names.get(_place(op))
    if node is None:
        if op.outcome == "fail":
            return ""
        if _kind(names, _made(op)):
            return EXISTS  # a new file has a new number
        names[_place(op)] = node = (FILE, _made(op))
    elif op.key[2]:
        return EXISTS
    elif node[0] == DIRECTORY:
        return IS_DIRECTORY
    return _stat(names, node)


def _link(names: Names, op: Op) -> str:
    inode = op.key[0]
    assert isinstance(inode, int)
    problem, kind = _directory(names, op.key[1]), _kind(names, inode)
    if problem or not kind:
        return problem or MISSING
    if _place(op, 1) in names:
        return EXISTS
    if kind == DIRECTORY:
        return NOT_PERMITTED
    names[_place(op, 1)] = (FILE, inode)
    return _stat(names, (FILE, inode))


def _remove(names: Names, op: Op) -> str:
    node = names.get(_place(op))
    problem = _directory(names, op.key[0])
    if problem or node is None:
        return problem or MISSING
    if op.kind == "unlink" and node[0] == DIRECTORY:
        return IS_DIRECTORY
    if op.kind == "rmdir" and node[0] != DIRECTORY:
        return NO_DIRECTORY
    if op.kind == "rmdir" and _is_used(names, node[1]):
        return NOT_EMPTY
    del names[_place(op)]
    return ""


def _remove_tree(names: Names, op: Op) -> str:
    """Everything below goes at once; links to it from elsewhere are not modelled."""
    node = names.get(_place(op))
    problem = _directory(names, op.key[0])
    if problem or node is None:
        return problem or MISSING
    if node[0] != DIRECTORY:
        return NO_DIRECTORY
    del names[_place(op)]
    waiting = [node[1]]
    while waiting:
        at = waiting.pop()
        below = [place for place in names if place[0] == at]
        waiting += [names.pop(place)[1] for place in below]
    return ""


def _is_used(names: Names, directory: int) -> bool:
    return any(parent == directory for parent, _ in names)


def _rename(names: Names, op: Op) -> str:
    old, new = _place(op), _place(op, 2)
    problem = _directory(names, old[0]) or _directory(names, new[0])
    node, there = names.get(old), names.get(new)
    if problem or node is None:
        return problem or MISSING
    if node == there:
        return ""  # two names of one file: nothing happens
    if node[0] == DIRECTORY and _is_below(names, new[0], node[1]):
        return LOOP
    if there is not None and there[0] != node[0]:
        return NO_DIRECTORY if node[0] == DIRECTORY else IS_DIRECTORY
    if there is not None and there[0] == DIRECTORY and _is_used(names, there[1]):
        return NOT_EMPTY
    del names[old]
    names[new] = node
    return ""


def _is_below(names: Names, inode: int, directory: int) -> bool:
    """Tell whether `inode` is the directory or lies below it."""
    seen: set[int] = set()
    while inode not in (ROOT, directory) and inode not in seen:
        seen.add(inode)
        inode = next((d for (d, _), node in names.items() if node[1] == inode), ROOT)
    return inode == directory


def _readdir(names: Names, op: Op) -> str:
    problem = _directory(names, op.key[0])
    found = sorted((name, node[1]) for (d, name), node in names.items() if d == op.key[0])
    return problem or "/".join(f"{name} {inode}" for name, inode in found)


_PERFORM: dict[str, Callable[[Names, Op], str]] = {
    "lookup": _lookup,
    "resolve": _resolve,
    "mkdir": _mkdir,
    "create": _create,
    "link": _link,
    "unlink": _remove,
    "rmdir": _remove,
    "rmtree": _remove_tree,
    "rename": _rename,
    "readdir": _readdir,
    "tree": lambda names, _: show(names),
}
