"""What a call that gave up says of why."""

import asyncio
import random
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


def test_a_pause_is_one_also_when_routing_is_closed() -> None:
    """Found by simulation (files 2000188): a call at the end of a process was tried for ever."""
    now = [0]

    class Env:
        random = random.Random(1)

        def now_ns(self) -> int:
            return now[0]

        async def sleep_ns(self, pause_ns: int) -> None:
            now[0] += pause_ns

    class Closed:
        async def wait_newer(self, than: int, timeout_ns: int) -> bool:
            return False

    async def story() -> None:
        limits = {"timeout_ns": 10**9, "attempt_ns": 10}
        patience = Patience(cast(Any, Env()), cast(Any, Closed()), lambda: "a list", **limits)
        for _ in range(1000):
            await patience.pause(EmberfsError(Code.UNREACHABLE, "gone"), cast(Any, 1))

    with pytest.raises(EmberfsError, match="no success in"):
        asyncio.run(story())
