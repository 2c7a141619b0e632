"""What a call that gave up says of why."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from emberfs.client.patience import Patience
from emberfs.proto.errors import Code, EmberfsError

DISK = EmberfsError(Code.DISK, "EIO on /data")
SILENCE = EmberfsError(Code.TIMEOUT, "no answer within 0 ms")


def message_after(*problems: EmberfsError) -> str:
    """Let the deadline pass with the last problem."""
    now = [0]
    clock: Callable[[], int] = lambda: now[0]  # noqa: E731
    env = cast(Any, SimpleNamespace(now_ns=clock))
    patience = Patience(env, cast(Any, None), lambda: "a read", timeout_ns=100, attempt_ns=10)
    for problem in problems[:-1]:
        patience.note(problem)
    now[0] = 100
    with pytest.raises(EmberfsError) as caught:
        patience.note(problems[-1])
    assert caught.value.code == Code.TIMEOUT
    return caught.value.message


def test_an_attempt_that_the_deadline_cut_short_does_not_hide_the_cause() -> None:
    assert "EIO on /data" in message_after(DISK, SILENCE)
    assert "before" not in message_after(SILENCE, SILENCE)
    assert message_after(SILENCE, DISK).endswith(f"last: {DISK}")
