"""The way to an etcd cluster: find its leader, call it, and say in our words what went wrong."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NoReturn, Protocol, TypeVar

import grpc
import grpc.aio

from emberfs.kv.backend import AwayError
from emberfs.proto import etcd_pb2 as pb
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.etcd_pb2_grpc import KVStub, MaintenanceStub, WatchStub

STATUS_TIMEOUT_S = 1.0
CALL_TIMEOUT_S = 3.0

FLAGS = "--max-txn-ops 4096 --max-request-bytes 10485760"

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3000),
)

R = TypeVar("R")
A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
R_contra = TypeVar("R_contra", contravariant=True)


class Rpc(Protocol[R_contra, A_co]):
    """A method of a stub."""

    def __call__(self, request: R_contra, /, *, timeout: float) -> Awaitable[A_co]:
        """Call it."""
        ...


class Member:
    """One member of the cluster."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.channel = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        self.kv = KVStub(self.channel)
        self.maintenance = MaintenanceStub(self.channel)
        self.watch = WatchStub(self.channel)

    async def status(self) -> pb.StatusResponse | None:
        """Return what it says of itself, None if it does not answer."""
        try:
            answer: pb.StatusResponse = await self.maintenance.Status(
                pb.StatusRequest(), timeout=STATUS_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return None
        return answer


class EtcdLink:
    """Talks to the leader, which saves a hop; to another member while the leader is not known."""

    def __init__(self, endpoints: tuple[str, ...]) -> None:
        self._endpoints = endpoints
        self._members: list[Member] = []
        self._chosen: Member | None = None
        self._choosing = asyncio.Lock()

    async def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        """Read. AwayError, TOO_OLD, or EmberfsError as `explain`."""
        return await self._call(lambda member: member.kv.Range, request, writes=False)

    async def txn(self, request: pb.TxnRequest, *, writes: bool) -> pb.TxnResponse:
        """Read or write. As `range`; with `writes` MAYBE_COMMITTED instead of AwayError."""
        return await self._call(lambda member: member.kv.Txn, request, writes=writes)

    async def _call(self, method: Callable[[Member], Rpc[R, A]], request: R, *, writes: bool) -> A:
        member = await self._member()
        try:
            return await method(member)(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as problem:
            self._explain(member, problem, writes=writes)

    def _explain(self, member: Member, problem: grpc.aio.AioRpcError, *, writes: bool) -> NoReturn:
        found = explain(problem)
        if found is not None:
            raise found from None
        if self._chosen is member:
            self._chosen = None  # look for the leader anew
        words = f"etcd at {member.endpoint}: {problem.details() or problem.code().name}"
        if writes:
            raise EmberfsError(Code.MAYBE_COMMITTED, words) from None
        raise AwayError(words) from None

    async def events(
        self, key: bytes, start_revision: int
    ) -> AsyncGenerator[pb.WatchResponse, None]:
        """Yield what happens to a key from a revision on. AwayError."""
        member = await self._member()
        create = pb.WatchCreateRequest(key=key, start_revision=start_revision)
        stream = member.watch.Watch()
        try:
            await stream.write(pb.WatchRequest(create_request=create))
            while True:
                answer = await stream.read()
                if answer is grpc.aio.EOF:
                    raise AwayError(f"etcd at {member.endpoint} ended a watch")
                yield answer
        except grpc.aio.AioRpcError as problem:
            self._explain(member, problem, writes=False)
        finally:
            stream.cancel()

    async def _member(self) -> Member:
        if self._chosen is not None:
            return self._chosen
        async with self._choosing:
            if self._chosen is None:
                self._chosen = await self._choose()
            return self._chosen

    async def _choose(self) -> Member:
        if not self._members:
            self._members = [Member(endpoint) for endpoint in self._endpoints]
        answers = await asyncio.gather(*(member.status() for member in self._members))
        known = [(m, a) for m, a in zip(self._members, answers, strict=True) if a is not None]
        if len({answer.header.cluster_id for _, answer in known}) > 1:
            raise EmberfsError(
                Code.CONFIG,
                f"{', '.join(self._endpoints)} are members of different etcd clusters; name those "
                "of one",
            )
        led = [(member, answer) for member, answer in known if answer.leader]
        if not led:
            reason = "have no leader" if known else "do not answer"
            raise AwayError(
                f"the etcd members {', '.join(self._endpoints)} {reason}; start most of them"
            )
        for member, answer in led:
            if answer.leader == answer.header.member_id:
                return member
        return led[0][0]

    async def size_bytes(self) -> int:
        """Return what the cluster's database takes on a disk; 0 if nobody says."""
        answer = await (await self._member()).status()
        return answer.db_size if answer else 0

    async def close(self) -> None:
        """Close all connections."""
        for member in self._members:
            await member.channel.close()


def explain(problem: grpc.aio.AioRpcError) -> EmberfsError | None:
    """Return what a refusal means; None if nobody knows whether the request was carried out."""
    words = problem.details() or ""
    if "has been compacted" in words:
        return EmberfsError(Code.TOO_OLD, "a transaction outlived etcd's history")
    if "future revision" in words:
        return EmberfsError(Code.BUSY, words)
    if "database space exceeded" in words:
        return EmberfsError(
            Code.NO_SPACE,
            "etcd's database has reached its quota and refuses to write: compact and defragment "
            "it, raise --quota-backend-bytes (8 GiB at most) and disarm the alarm, or move to "
            "another store with `emberfs meta dump` and `load`",
        )
    if "too many operations" in words or "request is too large" in words:
        return EmberfsError(
            Code.TRANSACTION_TOO_LARGE,
            f"etcd refused a transaction ({words}); start every member with {FLAGS}",
        )
    if "too many requests" in words:
        return EmberfsError(Code.CONFLICT, words)  # refused before anything was done
    if problem.code() in (
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INVALID_ARGUMENT,
    ):
        return EmberfsError(Code.CONFIG, f"etcd refused a request: {words}")
    return None
