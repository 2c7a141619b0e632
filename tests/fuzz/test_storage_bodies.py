"""Request bodies of the storage service: whatever arrives, the store stays sound and answers."""

import asyncio
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberfs.fabric.region import Region, Slice
from emberfs.fabric.sinks import SinkTable
from emberfs.proto import storage_calls
from emberfs.proto.cluster import PublicState
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import SECOND, KiB
from emberfs.proto.method import Method
from emberfs.proto.storage_calls import (
    READ_BATCH,
    ReadOp,
    UpdateKind,
    pack_read_ops,
    unpack_read_results,
)
from emberfs.runtime.checksum import crc32c
from fuzz.profile import budget
from fuzz.strategies import ANY_INT, U32, damaged, hostile_of, values_of
from unit.test_storage_server_cluster import ClusterUnderTest, NodeUnderTest, chunk_of

METHODS = [m for m in vars(storage_calls).values() if isinstance(m, Method)]
NEVER = {Code.INTERNAL, Code.DISK, Code.CHECKSUM}
CHUNKS = st.sampled_from((chunk_of(0), chunk_of(1), b"\xff" * 12, b"", b"x" * 11, b"y" * 5000))
LENGTHS = st.sampled_from((0, 1, 100, 4096, 64 * KiB)) | ANY_INT
REGION_BYTES = 64 * KiB


class Arrived:
    """A call as far as a storage handler looks at it."""

    def __init__(self, body: bytes, source: Slice | None, sinks: list[memoryview]) -> None:
        self.body = memoryview(body)
        self.peer = "fuzz"
        self.sources = () if source is None else (source,)
        self.sinks = sinks
        self.sink_table = SinkTable.of(sinks)
        self.sink_bytes = sum(map(len, sinks))
        self.deadline_ns = time.monotonic_ns() + SECOND

    def fill(self, sink: int, length: int) -> None:
        assert 0 <= length <= len(self.sinks[sink])

    def fill_all(self) -> None:
        pass


def near_misses(struct: type[Any], version: int) -> st.SearchStrategy[Any]:
    """Requests for the real target on the real chain version, wild in the other fields."""
    fixed: dict[str, st.SearchStrategy[Any]] = {
        "target": st.just(101),
        "targets": st.lists(st.just(101), max_size=3).map(tuple),
        "chain_version": st.sampled_from((version,) * 9 + (0,)),
        "chunk": CHUNKS,
        "chunk_bytes": st.just(64 * KiB) | ANY_INT,
        "kind": st.sampled_from(list(UpdateKind)),
        "offset": LENGTHS,
        "length": LENGTHS,
        "version": st.sampled_from((0, 0, 1, 2, 2**32, 2**63, 2**64 - 1)),
    }
    names = struct.__struct_fields__
    return values_of(struct, **{name: fixed[name] for name in names if name in fixed})


async def answered(node: NodeUnderTest, number: int, call: Arrived) -> bytes | None:
    """The answer, None for an error that may be a caller's fault. Bounded."""
    try:
        async with asyncio.timeout(4):
            return await node.service.handlers[number](call)  # type: ignore[arg-type]
    except EmberfsError as problem:
        code, text = problem.code, str(problem)
    assert code not in NEVER, text
    assert len(text) < 20_000
    return None


def sound(node: NodeUnderTest) -> None:
    """Bitmaps and records agree, and the target still serves."""
    assert node.hosted.store is not None
    assert list(node.hosted.store.check().findings) == []
    assert node.hosted.state.serves, node.hosted.state.reason


class Stage:
    """One storage node with one chunk; a runner whose loop lives over many examples."""

    def __init__(self, path: Path) -> None:
        self.runner = asyncio.Runner()
        self.cluster = ClusterUnderTest(path, "tcp")
        self.node = self.cluster.nodes[0]
        self.region = Region(REGION_BYTES)
        self.run(self._start())

    async def _start(self) -> None:
        await self.cluster.start([PublicState.SERVING] * 3)
        self.cluster.set_chain([(self.node, PublicState.SERVING)])
        await self.cluster.write(chunk_of(0), b"x" * 5000)

    def run(self, work: Awaitable[Any]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(10):
                return await work

        return self.runner.run(bounded())

    def close(self) -> None:
        self.run(self.cluster.stop())
        self.runner.close()
        self.region.close()


@pytest.fixture
def stage(tmp_path: Path) -> Any:
    made = Stage(tmp_path)
    yield made
    made.close()


def test_every_method_has_a_handler(stage: Stage) -> None:
    assert set(stage.node.service.handlers) == {READ_BATCH, *(m.number for m in METHODS)}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
def test_o23_any_body_is_answered_and_the_store_stays_sound(
    method: Method[Any, Any], stage: Stage
) -> None:
    """No body can make a storage target fail, go offline, or lose track of a block."""
    honest = near_misses(method.request_type, stage.cluster.chain.version)
    raw = honest.map(method.encode_request)
    wild = hostile_of(method.request_type) | damaged(raw) | st.binary(max_size=60)

    @budget(80)
    @given(honest | wild, st.booleans())
    def tried(request: Any, with_source: bool) -> None:
        source = None
        body = request if isinstance(request, bytes) else b""
        if not isinstance(request, bytes):
            carries = "checksum" in request.__struct_fields__
            if with_source and carries and 0 <= request.length <= REGION_BYTES:
                source = stage.region.slice(0, request.length)
                request = type(request)(
                    **{
                        n: getattr(request, n) for n in request.__struct_fields__ if n != "checksum"
                    },
                    checksum=crc32c(source.view),
                )
            body = method.encode_request(request)
        call = Arrived(body, source, [])
        answer = stage.run(answered(stage.node, method.number, call))
        if answer is not None:
            method.decode_answer(answer)

    tried()
    sound(stage.node)


def test_o23_any_read_batch_is_answered(stage: Stage) -> None:
    """Reads at any offset of any length fill no more than their sinks."""
    version = stage.cluster.chain.version
    ops = st.builds(
        ReadOp,
        st.just(101) | U32,
        st.just(version) | st.just(0),
        CHUNKS.filter(lambda chunk: len(chunk) == 12),
        U32,
        st.sampled_from((0, 1, 100, 5000, 2**32 - 1)),
        U32,
    )

    @budget(150)
    @given(st.lists(ops, min_size=1, max_size=5), st.integers(0, 3))
    def tried(made: list[ReadOp], cut: int) -> None:
        body = pack_read_ops(made)
        sinks = [memoryview(bytearray(min(op.length, 8192))) for op in made]
        call = Arrived(body[: len(body) - cut], None, sinks)
        answer = stage.run(answered(stage.node, READ_BATCH, call))
        if answer is not None:
            results = unpack_read_results(answer)
            assert len(results) == len(made)
            assert not {result.code for result in results} & NEVER

    tried()
    sound(stage.node)
