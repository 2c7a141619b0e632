"""Removing etcd's tombstones, once no transaction can be older than they are.

Every transaction that makes tombstones lists them in a grave, a row of its own. When a revision is
AGE old, the fence is raised to it: from then on transactions that began before it are refused.
Tombstones up to the fence look to everyone else like missing keys, and go with their grave. Any
number of processes may do that at the same time.
"""

import logging
import struct
from collections import deque

import msgspec

from emberfs.kv.etcd_link import EtcdLink
from emberfs.proto import etcd_pb2 as pb
from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import SECOND
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.kv.graves")

AGE_NS = 20 * SECOND  # transactions may be that old at least
TICK_NS = 5 * SECOND
GRAVES_PER_PAGE = 32
TOMBSTONES_PER_CALL = 500

_REVISION = struct.Struct(">Q")
_NUMBER = struct.Struct(">QQ")
_ENCODE = msgspec.msgpack.Encoder().encode
_KEYS = msgspec.msgpack.Decoder(list[bytes])


def grave_of(fence: pb.RangeResponse) -> int:
    """Return the revision in an answer about the fence."""
    revision: int = _REVISION.unpack(fence.kvs[0].value)[0] if fence.kvs else 0
    return revision


class Graves:
    """The tombstones of one prefix."""

    def __init__(self, env: Env, link: EtcdLink, prefix: bytes) -> None:
        self._env = env
        self._link = link
        self._fence = prefix + b"f"
        self._graves = prefix + b"g"
        self._process = env.random.getrandbits(64)
        self._made = 0
        self._marks: deque[tuple[int, int]] = deque()  # when which revision was the newest

    def new(self, tombstones: list[bytes]) -> tuple[bytes, bytes]:
        """Return the row of a new grave."""
        self._made += 1
        return self._graves + _NUMBER.pack(self._process, self._made), _ENCODE(tombstones)

    def fence_request(self) -> pb.RangeRequest:
        """Ask for the fence."""
        return pb.RangeRequest(key=self._fence)

    def not_older_than(self, revision: int) -> pb.Compare:
        """Who read at `revision` may commit: the fence has not passed it."""
        return pb.Compare(
            target=pb.Compare.VALUE,
            result=pb.Compare.LESS,
            key=self._fence,
            value=_REVISION.pack(revision + 1),
        )

    async def open(self) -> None:
        """Make the fence, if there is none: comparisons with a missing one fail."""
        missing = pb.Compare(
            target=pb.Compare.CREATE, result=pb.Compare.EQUAL, key=self._fence, create_revision=0
        )
        put = pb.RequestOp(request_put=pb.PutRequest(key=self._fence, value=_REVISION.pack(0)))
        await self._link.txn(pb.TxnRequest(compare=[missing], success=[put]), writes=False)

    async def live(self) -> None:
        """Remove tombstones for ever."""
        while True:
            await self._env.sleep_ns(TICK_NS)
            try:
                await self.tick()
            except EmberfsError as problem:
                log.info("etcd's tombstones stay for now: %s", problem)

    async def tick(self) -> int:
        """Note the newest revision, remove what is older than AGE; returns how many tombstones."""
        now_ns = self._env.now_ns()
        answer = await self._link.range(self.fence_request())
        self._marks.append((now_ns, answer.header.revision))
        revision = 0
        while self._marks and self._marks[0][0] <= now_ns - AGE_NS:
            revision = self._marks.popleft()[1]
        return await self.remove(revision) if revision else 0

    async def remove(self, revision: int) -> int:
        """Raise the fence and remove the tombstones up to it; returns how many."""
        raised = pb.RequestOp(
            request_put=pb.PutRequest(key=self._fence, value=_REVISION.pack(revision))
        )
        below = self.not_older_than(revision - 1)  # it only ever rises
        await self._link.txn(pb.TxnRequest(compare=[below], success=[raised]), writes=False)
        gone = 0
        low, high = self._graves, self._graves + b"\xff" * (_NUMBER.size + 1)
        while True:
            page = await self._link.range(
                pb.RangeRequest(
                    key=low, range_end=high, limit=GRAVES_PER_PAGE, max_mod_revision=revision
                )
            )
            for grave in page.kvs:
                gone += await self._empty(grave)
            if not page.kvs or not page.more:
                return gone
            low = page.kvs[-1].key + b"\0"

    async def _empty(self, grave: pb.KeyValue) -> int:
        """Delete a grave's tombstones, unless they were written anew, then the grave."""
        keys = _KEYS.decode(grave.value)
        for first in range(0, len(keys), TOMBSTONES_PER_CALL):
            part = keys[first : first + TOMBSTONES_PER_CALL]
            ops = [_delete_if(key, grave.mod_revision) for key in part]
            if first + TOMBSTONES_PER_CALL >= len(keys):
                ops.append(_delete(grave.key))
            await self._link.txn(pb.TxnRequest(success=ops), writes=False)
        return len(keys)


def _delete(key: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))


def _delete_if(key: bytes, revision: int) -> pb.RequestOp:
    same = pb.Compare(
        target=pb.Compare.MOD, result=pb.Compare.EQUAL, key=key, mod_revision=revision
    )
    return pb.RequestOp(request_txn=pb.TxnRequest(compare=[same], success=[_delete(key)]))
