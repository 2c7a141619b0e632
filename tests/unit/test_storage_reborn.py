"""A chunk that is removed and made anew counts its versions anew: a number is not a name."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from emberfs.proto.storage_calls import UpdateKind
from unit.test_storage_server_cluster import ClusterUnderTest, chunk_of, run, until


class Gated:
    """A call that can be stopped: before it is made, or after it was answered."""

    def __init__(self, call: Any, *, after: bool) -> None:
        self.waiting = 0
        self._call = call
        self._after = after
        self._opened = asyncio.Event()

    async def __call__(self, *arguments: Any) -> Any:
        found = await self._call(*arguments) if self._after else None
        self.waiting += 1
        await self._opened.wait()
        return found if self._after else await self._call(*arguments)

    def open(self) -> None:
        """Let everybody pass who waits, and stop whoever comes."""
        self._opened.set()
        self._opened, self.waiting = asyncio.Event(), 0


def test_s5_a_late_answer_of_the_tail_does_not_show_a_write_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 was asked for, removed and made anew: the tail's old "1" shows nobody the new 1."""

    async def body(cluster: ClusterUnderTest) -> None:
        second, chunk = cluster.nodes[1], chunk_of(0)
        await cluster.write(chunk, b"1" * 900)
        links = second.service._links
        forward, question = Gated(links.update, after=False), Gated(links.tail_version, after=True)
        monkeypatch.setattr(links, "update", forward)
        monkeypatch.setattr(links, "tail_version", question)
        removing = asyncio.ensure_future(cluster.update(UpdateKind.REMOVE, chunk))
        await until(lambda: forward.waiting == 1)
        reading = asyncio.ensure_future(cluster.read(second, chunk, 900))
        await until(lambda: question.waiting == 1)
        forward.open()
        await removing
        writing = asyncio.ensure_future(cluster.write(chunk, b"2" * 900))
        await until(lambda: forward.waiting == 1)
        question.open()
        await until(lambda: question.waiting == 1 or reading.done())
        question.open()
        result, _ = await reading
        assert (result.code, result.length) == (0, 0)
        forward.open()
        assert await writing == 1

    run(tmp_path, body)
