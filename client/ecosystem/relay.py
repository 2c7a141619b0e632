"""Calls to mgmtd through a small process of one's own, for processes that gRPC is broken in.

The gRPC library does not survive a fork: in a child of a process that has used it every call hangs
for ever. A forked child therefore starts this module as a new program, with one end of a socket
pair as its standard input, and lets it speak gRPC. It ends when the other end is closed.

Frames are a length (4 bytes, little-endian) and a msgpack array: a Call one way, Answers back.
"""

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

import msgspec

from emberfs.client.connection import Lease
from emberfs.client.control_grpc import MESSAGE_BYTES_MAX, GrpcConnection
from emberfs.proto.cluster import ClusterId, Node, NodeKind, RoutingSnapshot, TargetReport
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ChainId, NodeId, RoutingVersion, TargetId
from emberfs.runtime.tasks import TaskSet

T = TypeVar("T")

_HEAD_BYTES = 4


class Register(msgspec.Struct, array_like=True, tag=True):
    """See Control.register."""

    cluster: ClusterId
    node: Node


class Heartbeat(msgspec.Struct, array_like=True, tag=True):
    """See Control.heartbeat."""

    cluster: ClusterId
    node: NodeId
    kind: NodeKind
    incarnation: int
    client: int


class Watch(msgspec.Struct, array_like=True, tag=True):
    """See Control.watch: every snapshot is an answer."""

    cluster: ClusterId
    version: RoutingVersion


class Cancel(msgspec.Struct, array_like=True, tag=True):
    """The call of that number is not wanted any more."""


class Call(msgspec.Struct, array_like=True):
    """One request; answers carry its number."""

    number: int
    body: Register | Heartbeat | Watch | Cancel


class Answer(msgspec.Struct, array_like=True):
    """A result, or (`code` not 0) an error, which is the last of its call."""

    number: int
    body: msgspec.Raw = msgspec.Raw(b"\xc0")
    code: int = 0
    message: str = ""


def _write(writer: asyncio.StreamWriter, message: Call | Answer) -> None:
    data = msgspec.msgpack.encode(message)
    writer.write(len(data).to_bytes(_HEAD_BYTES, "little") + data)


async def _read(reader: asyncio.StreamReader, kind: type[T]) -> T | None:
    """The next message; None at the end."""
    try:
        size_bytes = int.from_bytes(await reader.readexactly(_HEAD_BYTES), "little")
        if size_bytes > MESSAGE_BYTES_MAX:
            return None
        return msgspec.msgpack.decode(await reader.readexactly(size_bytes), type=kind)
    except (asyncio.IncompleteReadError, OSError, msgspec.MsgspecError):
        return None


class RelayedConnection:
    """A client.connection.Connection; the process is started by the first call."""

    def __init__(self, address: str) -> None:
        """`address`: "host:port"."""
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Queue[Answer]] = {}
        self._tasks = TaskSet()
        self._opening = asyncio.Lock()
        self._count = 0

    async def register(
        self, cluster: ClusterId, node: Node, reports: Sequence[TargetReport]
    ) -> Lease:
        """See Control.register; reports are for services only."""
        return await self._once(Register(cluster, node), Lease)

    async def heartbeat(
        self,
        cluster: ClusterId,
        node_id: NodeId,
        kind: NodeKind,
        incarnation: int,
        reports: Sequence[TargetReport],
        client: int,
    ) -> Lease:
        """See Control.heartbeat; reports are for services only."""
        return await self._once(Heartbeat(cluster, node_id, kind, incarnation, client), Lease)

    async def report_death(self, cluster: ClusterId, node_id: NodeId, incarnation: int) -> None:
        """Not what clients do."""
        raise EmberfsError(Code.UNSUPPORTED, "a forked client reports no deaths")

    async def create_chains(
        self, cluster: ClusterId, chains: Sequence[tuple[ChainId, tuple[TargetId, ...]]]
    ) -> list[ChainId]:
        """Not what clients do."""
        raise EmberfsError(Code.UNSUPPORTED, "a forked client makes no chains")

    async def watch(
        self, cluster: ClusterId, have_version: RoutingVersion
    ) -> AsyncGenerator[RoutingSnapshot, None]:
        """See Control.watch."""
        answers = self._call(Watch(cluster, have_version))
        try:
            async for answer in answers:
                if answer.body == b"\xc0":
                    return
                yield msgspec.msgpack.decode(answer.body, type=RoutingSnapshot)
        finally:
            await answers.aclose()

    async def close(self) -> None:
        """End all calls, and the process."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        await self._tasks.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def _once(self, body: Register | Heartbeat, kind: type[T]) -> T:
        answers = self._call(body)
        try:
            async for answer in answers:
                return msgspec.msgpack.decode(answer.body, type=kind)
        finally:
            await answers.aclose()
        raise AssertionError("unreachable")

    async def _call(self, body: Register | Heartbeat | Watch) -> AsyncGenerator[Answer, None]:
        writer = await self._open()
        self._count += 1
        number = self._count
        queue = self._waiting[number] = asyncio.Queue()
        try:
            _write(writer, Call(number, body))
            while True:
                answer = await queue.get()
                if answer.code:
                    raise EmberfsError(Code(answer.code), answer.message)
                yield answer
        finally:
            del self._waiting[number]
            if not writer.is_closing():
                _write(writer, Call(number, Cancel()))

    async def _open(self) -> asyncio.StreamWriter:
        async with self._opening:
            if self._writer is None:
                if self._process is not None:  # it has died
                    self._process.kill()
                    self._process.wait()
                ours, theirs = socket.socketpair()
                with theirs:
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", __name__, self._address],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        start_new_session=True,  # an interrupt of the terminal is not for it
                    )
                reader, self._writer = await asyncio.open_connection(sock=ours)
                self._tasks.spawn(self._receive(reader, self._writer), name="relay to mgmtd")
            return self._writer

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (answer := await _read(reader, Answer)) is not None:
            if (queue := self._waiting.get(answer.number)) is not None:
                queue.put_nowait(answer)
        writer.close()
        if self._writer is writer:
            self._writer = None
        for number, queue in self._waiting.items():
            text = f"the process that speaks to mgmtd at {self._address} has ended"
            queue.put_nowait(Answer(number, code=Code.UNREACHABLE, message=text))


async def _perform(connection: GrpcConnection, call: Call, writer: asyncio.StreamWriter) -> None:
    """Answer one call."""

    def answer(body: Lease | RoutingSnapshot | None) -> None:
        _write(writer, Answer(call.number, msgspec.Raw(msgspec.msgpack.encode(body))))

    try:
        match call.body:
            case Register(cluster, node):
                answer(await connection.register(cluster, node, ()))
            case Heartbeat(cluster, node_id, kind, incarnation, client):
                answer(await connection.heartbeat(cluster, node_id, kind, incarnation, (), client))
            case Watch(cluster, version):
                async with contextlib.aclosing(connection.watch(cluster, version)) as stream:
                    async for snapshot in stream:
                        answer(snapshot)
                answer(None)
    except EmberfsError as problem:
        _write(writer, Answer(call.number, code=problem.code, message=problem.message))


async def _serve(address: str) -> None:
    """Relay until the other end is closed."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=sys.stdin.fileno()))
    connection = GrpcConnection(address)
    tasks = TaskSet()
    running: dict[int, asyncio.Task[None]] = {}
    while (call := await _read(reader, Call)) is not None:
        if isinstance(call.body, Cancel):
            if (task := running.pop(call.number, None)) is not None:
                task.cancel()
        else:
            work = _perform(connection, call, writer)
            running[call.number] = tasks.spawn(work, name=f"call {call.number}")
    await tasks.close()
    await connection.close()
    writer.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
