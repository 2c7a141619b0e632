"""No state without an exit: when all faults are healed, everything works again in bounded time."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from sim.history import Op
from sim.violation import Violation

SERVING = "SERVING"
_NOTHING: Mapping[int, Collection[str]] = {}


class Sample(NamedTuple):
    """The published state of a target, when it changed or when it was looked at."""

    target: int
    state: str
    now_ns: int
    reason: str = ""


def check_exit(
    samples: Iterable[Sample],
    targets: Iterable[int],
    healed_ns: int,
    bound_ns: int,
    allowed: Mapping[int, Collection[str]] = _NOTHING,
) -> list[Violation]:
    """From healed + bound on, every target serves or is in a state that is allowed for it."""
    limit_ns = healed_ns + bound_ns
    found: list[Violation] = []
    last: dict[int, Sample] = {}
    bad: dict[int, Sample] = {}
    for sample in sorted(samples, key=lambda sample: sample.now_ns):
        good = sample.state == SERVING or sample.state in allowed.get(sample.target, ())
        if sample.now_ns <= limit_ns:
            last[sample.target] = sample
            bad.pop(sample.target, None)
            if not good:
                bad[sample.target] = sample
        elif not good:
            bad.setdefault(sample.target, sample)
    for target in targets:
        if target in bad:
            text = f"{bad[target]}, {bound_ns / 1e9:.3f} s after {healed_ns / 1e9:.3f} s"
            found.append(Violation("no exit", text))
        elif target not in last:
            found.append(Violation("no exit", f"target {target}: its state was never seen"))
    return found


def check_progress(
    ops: Iterable[Op], healed_ns: int, deadline_ns: int, recovery_ns: int = 0
) -> list[Violation]:
    """Every operation begun after the heal succeeds within its deadline; earlier ones return.

    Those that were under way at the heal, or begun in the `recovery_ns` after it, may fail, but
    they return: nothing hangs. `fail` with a `result` is an answer (a name that does not exist).
    """
    found: list[Violation] = []
    for op in ops:
        since_ns = max(op.start_ns, healed_ns)
        late = op.end_ns is None or op.end_ns > since_ns + deadline_ns
        answered = op.ok or (op.outcome == "fail" and op.result != "")
        if late:
            found.append(Violation("hangs", f"not back in {deadline_ns / 1e9:.3f} s", (op,)))
        elif op.start_ns >= healed_ns + recovery_ns and not answered:
            found.append(Violation("fails", "nothing was broken any more", (op,)))
    return found
