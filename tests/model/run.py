"""Check chain.pml with spin: the protocol is clean within its bounds, every mutation is caught.

    python tests/model/run.py ci       bounded, well under a minute of one core
    python tests/model/run.py full     the exhaustive bounds of the README, 7 minutes, 8 GiB
    python tests/model/run.py large    bounds too large to store: 5 minutes each, NOT exhaustive
    python tests/model/run.py find DEFINE...   one search; prints the trace of what it finds

Prints a line per search: states, depth, memory, seconds. Exit code 1 when a search of the protocol
finds something or cannot be completed, or a search of a mutation finds nothing.

The protocol is searched exhaustively (every state stored in full). What is broken on
purpose is searched at random with few bits per state, by fixed seeds: any violation will do.
"""

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

MODEL = Path(__file__).parent / "chain.pml"
MEMORY_MIB = {"ci": 1900, "full": 8000, "large": 8000, "find": 8000}
DEPTH_MAX = 100_000
LIMIT_S = 1800
SAMPLE_S = 300
RANDOM_S = 20
SEEDS = (1, 2, 3)
RANDOMLY = ["-DBITSTATE", "-DRANDOMIZE", "-DP_RAND", "-DT_RAND"]
STEP = re.compile(r":: .*-> (act|who|fresh|alive)|:: d_step|:: timeout")  # a line of a process
BOUND = "cur<14"  # the assertion that the bound of chain versions is wide enough


@dataclass(frozen=True)
class Case:
    """One search."""

    name: str
    defines: tuple[str, ...]
    holds: bool = True
    acyclic: bool = False  # also: no run goes on for ever
    sampled: bool = False  # not exhaustive


@dataclass(frozen=True)
class Found:
    """What one search says."""

    violation: str
    complete: bool
    states: int
    depth: int
    memory_mib: float
    seconds: float


def bound(*, acyclic: bool = False, **limits: int) -> Case:
    """A search of the unchanged protocol; without limits there are no faults."""
    defines = tuple(f"{key.upper()}={value}" for key, value in {"crashes": 0, **limits}.items())
    if acyclic:
        defines += ("NO_READS",)
    return Case("protocol" + (", ends" if acyclic else ""), defines, acyclic=acyclic)


CLEAN_CI = (
    bound(crashes=1, writes=1),
    bound(cuts=1, writes=1),
    bound(timeouts=1, writes=2, writers=2),
    bound(crashes=1, writes=1, acyclic=True),
)
CLEAN_FULL = (
    bound(crashes=1, writes=2),
    bound(crashes=1, timeouts=1, writes=1),
    bound(cuts=1, timeouts=1, writes=2),
    bound(cuts=1, giveups=1, writes=2),
    bound(crashes=2, writes=2, replicas=2),
    bound(crashes=1, cuts=1, writes=1, replicas=2),
    bound(crashes=1, writes=2, acyclic=True),
    bound(cuts=1, writes=2, acyclic=True),
    bound(crashes=2, writes=1, replicas=2, acyclic=True),
    bound(crashes=1, cuts=1, writes=1, replicas=2, acyclic=True),
)
# Too large to store: few bits per state, so states may be missed, and a limit of time.
SAMPLED = (
    bound(crashes=2, writes=1),
    bound(crashes=1, writes=2, writers=2),
    bound(crashes=2, writes=2, writers=2),
    bound(crashes=1, cuts=1, writes=1),
    bound(crashes=1, cuts=1, timeouts=1, giveups=1, writes=2),
    bound(crashes=2, timeouts=1, writes=2),
    bound(cuts=2, timeouts=1, writes=2),
)


def broken(name: str, *extra: str, acyclic: bool = False, **limits: int) -> Case:
    """A search of the protocol with a fault put in, which must be found."""
    case = bound(acyclic=acyclic, **limits)
    return Case(name, (name, *extra, *case.defines), holds=False, acyclic=acyclic)


MUTATIONS = (
    broken("MUT_SKIP_TAIL_QUERY", writes=1),
    broken("MUT_COMMIT_FIRST", writes=1),
    broken("MUT_ACK_EARLY", crashes=1, writes=1),
    broken("MUT_FORGET_SEQUENCE", crashes=1, timeouts=1, writes=1),
    broken("MUT_NO_DEDUPE", timeouts=1, writes=1),
    broken("MUT_NO_SUPERSEDE", giveups=1, writes=2),
    broken("MUT_IGNORE_CHAIN_VERSION", cuts=1, writes=2),
    broken("MUT_SERVE_AFTER_LEASE", cuts=1, writes=1),
    broken("MUT_NO_NEEDS_VERSION", cuts=1, writes=1),
    broken("MUT_BURY_EARLY", cuts=1, writes=1),
    broken("MUT_LASTSRV_ALWAYS", crashes=2, writes=1),
    broken("MUT_REVIVE_INCOMPLETE", crashes=3, writes=1),
    broken("MUT_SKIP_SYNCING", crashes=1, writes=1),
    broken("MUT_NOT_SETTLED", crashes=1, writes=1),
    broken("MUT_UPTODATE_ANY_VERSION", cuts=2, writes=1, replicas=2),
    broken("MUT_AS_SERVING", cuts=1, writes=1),
    broken("MUT_NO_REPLACE_ORDER", crashes=1, timeouts=1, writes=1),
    broken("MUT_TAIL_DOES_NOT_WAIT", crashes=1, writes=1),
    broken("MUT_NO_LEFTOVERS", crashes=1, writes=1, acyclic=True),
)
# Real faults that the model found in the product; see README.md. The model has them mended.
FINDINGS = (
    broken("BUG_SUCCESSOR_UNSETTLED", crashes=1, writes=1),
    broken("BUG_DISCARD_FIRST", "NO_BURY", crashes=2, writes=1),
    broken("BUG_TOKEN_PER_LIFE", "NO_BURY", crashes=2, writes=2),
)
# Compiling takes most of the time of a search that finds something: CI has those that differ most.
QUICK = {
    "MUT_SKIP_TAIL_QUERY",
    "MUT_COMMIT_FIRST",
    "MUT_ACK_EARLY",
    "MUT_NO_DEDUPE",
    "MUT_IGNORE_CHAIN_VERSION",
    "MUT_SERVE_AFTER_LEASE",
    "MUT_LASTSRV_ALWAYS",
    "MUT_NOT_SETTLED",
    "MUT_NO_LEFTOVERS",
}
CASES = {
    "ci": (*CLEAN_CI, *FINDINGS, *(case for case in MUTATIONS if case.name in QUICK)),
    "full": (*CLEAN_FULL, *FINDINGS, *MUTATIONS),
    "large": tuple(replace(case, sampled=True) for case in SAMPLED),
}


def search(case: Case, memory_mib: int, where: Path) -> Found:
    """Run one search in the directory `where`. CalledProcessError: it does not compile."""
    (where / "chain.pml").write_bytes(MODEL.read_bytes())
    defines = [f"-D{define}" for define in case.defines]
    _run(["spin", "-a", *defines, "chain.pml"], where)
    mode = ["-DNP"] if case.acyclic else ["-DSAFETY"]
    store = [f"-DMEMLIM={memory_mib}"] if case.holds and not case.sampled else RANDOMLY
    options = ["-DNOREDUCE", "-DNOCLAIM", "-DVECTORSZ=2048"]
    optimise = "-O1" if case.holds else "-O0"  # a short search is not worth the compilation
    _run(["gcc", optimise, "-w", *mode, *options, *store, "-o", "pan", "pan.c"], where)
    loops = ["-l"] if case.acyclic else []
    if case.sampled:
        return _pan(["-m3000", "-w33", *loops], where, SAMPLE_S)
    if case.holds:
        return _pan([f"-m{DEPTH_MAX}", *loops], where, LIMIT_S)
    for seed in SEEDS:
        found = _pan(["-m3000", "-w27", f"-RS{seed}", *loops], where, RANDOM_S)
        if found.violation:
            break
    return found


def _pan(options: list[str], where: Path, limit_s: int) -> Found:
    started = time.monotonic()
    command = ["timeout", "-s", "INT", str(limit_s), "./pan", *options]
    text = subprocess.run(command, cwd=where, capture_output=True, text=True).stdout
    return _read(text, time.monotonic() - started)


def _run(command: list[str], where: Path) -> None:
    subprocess.run(command, cwd=where, check=True, capture_output=True, text=True, timeout=LIMIT_S)


def _read(text: str, seconds: float) -> Found:
    violation = re.search(r"^pan:\d+: (.*)\(at depth", text, re.MULTILINE)
    states = re.search(r"^\s*(\d+) states, stored", text, re.MULTILINE)
    depth = re.search(r"depth reached (\d+), errors: (\d+)", text)
    memory = re.search(r"([\d.]+)\s+total actual memory", text)
    cut_short = "max search depth too small" in text or "reached memory limit" in text
    complete = depth is not None and not cut_short and "Search not completed" not in text
    return Found(
        violation=violation[1].strip() if violation else "",
        complete=complete,
        states=int(states[1]) if states else 0,
        depth=int(depth[1]) if depth else 0,
        memory_mib=float(memory[1]) if memory else 0.0,
        seconds=seconds,
    )


def report(case: Case, found: Found) -> bool:
    """Print one line; tell whether it is as it should be."""
    caught = bool(found.violation) and BOUND not in found.violation
    clean = not found.violation and (found.complete or case.sampled)
    right = clean if case.holds else caught
    outcome = "clean" if found.complete else "NOT COMPLETE"
    if found.violation:
        outcome = "violated"
    elif case.sampled:
        outcome = "sampled"
    bounds = " ".join(define for define in case.defines if "=" in define).lower()
    print(
        f"{'ok ' if right else 'BAD'} {case.name:25} {outcome:9} {found.states:10,} states"
        f" depth {found.depth:5} {found.memory_mib:6.0f} MiB {found.seconds:6.1f} s  {bounds}",
        flush=True,
    )
    return right


def main(arguments: list[str]) -> int:
    """Run a tier, or one search."""
    tier, *defines = arguments or ["ci"]
    if tier == "find":
        case = Case("find", tuple(defines))
        with tempfile.TemporaryDirectory() as where:
            found = search(case, MEMORY_MIB[tier], Path(where))
            right = report(case, found)
            if found.violation:
                show(case, Path(where))
        return not right
    wrong = 0
    for case in CASES[tier]:
        with tempfile.TemporaryDirectory() as where:
            wrong += not report(case, search(case, MEMORY_MIB[tier], Path(where)))
    print(f"{len(CASES[tier])} searches, {wrong} not as they should be")
    return min(wrong, 1)


def show(case: Case, where: Path) -> None:
    """Print the trace of what was found: each step and what it changed."""
    lines = (where / "chain.pml").read_text().split("\n")
    command = ["spin", "-t", "-p", "-g", "-w", *(f"-D{d}" for d in case.defines), "chain.pml"]
    text = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=LIMIT_S)
    state: dict[str, str] = {}
    before: dict[str, str] = {}
    last = ("", 0)
    for line in text.stdout.split("\n"):
        step = re.match(r"\s*(\d+):\s+proc\s+(\d+) \((\w+):\d+\) \S+:(\d+)", line)
        value = re.match(r"\s+(\S+) = (\S+)\s*$", line)
        if step and (step[1], int(step[4])) != last and STEP.search(lines[int(step[4]) - 1]):
            print("     ", *(f"{k}={v}" for k, v in state.items() if before.get(k) != v))
            before, last = dict(state), (step[1], int(step[4]))
            print(f"{step[1]:>4} {step[3]}: {lines[int(step[4]) - 1].strip()}")
        elif value and re.match(r"[a-z_]{2,}", value[1]) and not value[1].endswith("_"):
            state[value[1]] = value[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
