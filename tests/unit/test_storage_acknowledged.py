"""In which life of its chain an update was acknowledged."""

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec

from emberfs.proto.ids import ChainId, ChainVersion, ChunkId, TargetId
from emberfs.proto.storage_calls import UpdateAnswer, UpdateKind, UpdateRequest, WriteTag
from emberfs.storage import chunk_events as ev
from emberfs.storage.replica import TargetReplica
from emberfs.storage.view import absent_view

ME = TargetId(101)


def test_r12_an_answer_names_the_version_in_which_it_was_decided() -> None:
    """The chain may be another one when it is sent, and have lost what was done in that one."""

    def view(version: int) -> Any:
        chain, at = ChainId(1), ChainVersion(version)
        return msgspec.structs.replace(absent_view(ME), chain=chain, chain_version=at)

    async def scene() -> UpdateAnswer:
        replica = TargetReplica.__new__(TargetReplica)
        replica.state = SimpleNamespace(view=view(3))  # type: ignore[assignment]
        replica._closed, replica._keys = False, 0
        replica._waiters, replica._active = {}, {}

        def decide(key: int) -> None:
            replica._reply(ev.Reply(key, None, "", 7, 4))
            replica.state.view = view(9)

        def arrive(_: ChunkId, event: Any) -> None:
            asyncio.get_running_loop().call_soon(decide, event.key)

        replica._arrive = arrive  # type: ignore[method-assign]
        tag, chunk = WriteTag(1, 1, 1), ChunkId(bytes(12))
        write = UpdateKind.WRITE
        request = UpdateRequest(ME, ChainVersion(3), chunk, write, 0, 4, tag, 65536, 0)
        return await replica.update(request, None)

    assert asyncio.run(scene()) == UpdateAnswer(7, 4, ChainVersion(3))
