"""etcd as a transactional store: optimistic transactions out of its compare-and-write.

All reads of a transaction are at one revision R, that of its first read. It commits if no key and
no range that it read was modified after R: one comparison each, "modified at most at R".

etcd's comparisons do not see deletes: a missing key counts as never modified. So nothing is ever
deleted: a one-byte tombstone is written, which graves.py removes once no transaction can be older
than it. A fence says how old that is: whoever read before the fence is refused, TOO_OLD.

Keys: PREFIX + "k" + key: a tag byte and the value; PREFIX + "f": the fence, a revision of 8 bytes;
PREFIX + "g" + number: the tombstones that one transaction made.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from emberfs.kv.backend import Limits
from emberfs.kv.etcd_link import FLAGS, EtcdLink
from emberfs.kv.graves import Graves, grave_of
from emberfs.kv.history import ReadSet, WriteSet
from emberfs.kv.store import Row
from emberfs.kv.transaction import pack_stamp
from emberfs.proto import etcd_pb2 as pb
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MiB
from emberfs.runtime.env import Env
from emberfs.runtime.tasks import TaskSet

DEAD, LIVE, STAMPED = b"\0", b"\1", b"\2"  # stamped: the revision belongs behind the value

LIMITS = Limits(key_bytes=2048, value_bytes=1 * MiB, transaction_bytes=8 * MiB, rows=4000)
OPS_MAX = 4096
SCAN_ROWS = 1000
SPARE_ROWS = 16  # read beyond a limit, for tombstones among them
READS_PER_CALL = 100
DESCENDING = 2


class EtcdBackend:
    """One cluster of emberfs behind a prefix in an etcd cluster. Fits backend.Backend."""

    limits = LIMITS

    def __init__(self, env: Env, endpoints: tuple[str, ...], prefix: bytes) -> None:
        """`endpoints` as "host:port"; several clusters may share an etcd under other prefixes."""
        self.link = EtcdLink(endpoints)
        self.keys = prefix + b"k"
        self.graves = Graves(env, self.link, prefix)
        self._tasks = TaskSet()

    async def open(self) -> None:
        """See Backend. AwayError if etcd does not answer."""
        await self._probe()
        await self.graves.open()
        self._tasks.spawn(self.graves.live(), name="etcd graves")

    async def _probe(self) -> None:
        """Ask for as many comparisons as a large transaction has: does etcd take them?"""
        never = pb.Compare(
            target=pb.Compare.MOD, result=pb.Compare.EQUAL, key=self.keys, mod_revision=-1
        )
        try:
            await self.link.txn(pb.TxnRequest(compare=[never] * OPS_MAX), writes=False)
        except EmberfsError as problem:
            if problem.code != Code.TRANSACTION_TOO_LARGE:
                raise
            raise EmberfsError(
                Code.CONFIG,
                f"this etcd takes small transactions only; start every member with {FLAGS}",
            ) from None

    def attempt(self, *, read_only: bool) -> "EtcdAttempt":
        """See Backend."""
        return EtcdAttempt(self)

    async def await_write(self, key: bytes, version: int) -> None:
        """See Backend."""
        async with aclosing(self.link.events(self.keys + key, version + 1)) as events:
            async for answer in events:
                if answer.events or answer.canceled:
                    return

    async def close(self) -> None:
        """See Backend."""
        await self._tasks.close()
        await self.link.close()


class EtcdAttempt:
    """One transaction. Fits backend.Attempt."""

    def __init__(self, backend: EtcdBackend) -> None:
        self._link = backend.link
        self._keys = backend.keys
        self._graves = backend.graves
        self._first = asyncio.Lock()
        self.version = 0  # R

    # ------------------------------------------------------------ reading

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Attempt."""
        values: list[bytes | None] = []
        for first in range(0, len(keys), READS_PER_CALL):
            part = keys[first : first + READS_PER_CALL]
            requests = [pb.RangeRequest(key=self._keys + key) for key in part]
            answers = await self._ask(requests)
            values += [_value(answer.kvs[0]) if answer.kvs else None for answer in answers]
        return values

    async def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool) -> list[Row]:
        """See Attempt. Costs etcd as much as there are rows up to `stop`, not up to `limit`."""
        rows: list[Row] = []
        low, high = self._keys + start, self._keys + stop
        page = limit + SPARE_ROWS if limit else SCAN_ROWS
        while low < high:
            request = pb.RangeRequest(
                key=low, range_end=high, limit=page, sort_order=DESCENDING if reverse else 0
            )
            (answer,) = await self._ask([request])
            for found in answer.kvs:
                value = _value(found)
                if value is not None:
                    rows.append((found.key[len(self._keys) :], value))
            if not answer.more or (limit and len(rows) >= limit):
                break
            last = answer.kvs[-1].key
            low, high = (low, last) if reverse else (last + b"\0", high)
            page = min(2 * page, SCAN_ROWS)  # many tombstones here
        return rows[:limit] if limit else rows

    async def _ask(self, requests: list[pb.RangeRequest]) -> list[pb.RangeResponse]:
        """Read at R. Reads at the same time wait for the one that finds R."""
        if self.version:
            return await self._ask_at(requests)
        async with self._first:
            if self.version:
                return await self._ask_at(requests)
            answers, revision = await self._send(requests)
            self.version = revision
            return answers

    async def _ask_at(self, requests: list[pb.RangeRequest]) -> list[pb.RangeResponse]:
        for request in requests:
            request.revision = self.version
            request.serializable = True  # any member knows what was at R, once it has come so far
        try:
            return (await self._send(requests))[0]
        except EmberfsError as problem:
            if problem.code != Code.BUSY:  # "future revision": this member lags behind
                raise
        for request in requests:
            request.serializable = False
        return (await self._send(requests))[0]

    async def _send(self, requests: list[pb.RangeRequest]) -> tuple[list[pb.RangeResponse], int]:
        if len(requests) == 1:
            answer = await self._link.range(requests[0])
            return [answer], answer.header.revision
        ops = [pb.RequestOp(request_range=request) for request in requests]
        many = await self._link.txn(pb.TxnRequest(success=ops), writes=False)
        return [found.response_range for found in many.responses], many.header.revision

    # ------------------------------------------------------------ the end

    async def finish(self) -> None:
        """See Attempt. All was read at R: that is a moment."""

    async def commit(self, read: ReadSet, written: WriteSet) -> int:
        """See Attempt."""
        if not self.version:
            await self._ask([self._graves.fence_request()])
        ranges, writes = list(read.ranges), dict(written.writes)
        for start, stop in written.clears:
            ranges.append((start, stop))
            for key, _ in await self.scan(start, stop, 0, False):
                writes.setdefault(key, None)
        for key in written.stamps:
            writes.pop(key, None)
        ops = [_put(self._keys + key, DEAD if v is None else LIVE + v) for key, v in writes.items()]
        ops += [_put(self._keys + key, STAMPED + v) for key, v in written.stamps.items()]
        dead = [self._keys + key for key, value in writes.items() if value is None]
        if dead:
            ops.append(_put(*self._graves.new(dead)))
        compare = [self._graves.not_older_than(self.version)]
        compare += [self._unmodified(key, b"") for key in read.keys]
        compare += [self._unmodified(start, stop) for start, stop in ranges]
        if max(len(ops), len(compare)) > OPS_MAX:
            raise EmberfsError(
                Code.TRANSACTION_TOO_LARGE,
                f"a transaction of {len(ops)} rows that depends on {len(compare)} reads; etcd "
                f"takes {OPS_MAX} of each: split it",
            )
        failure = [pb.RequestOp(request_range=self._graves.fence_request())]
        request = pb.TxnRequest(compare=compare, success=ops, failure=failure)
        answer = await self._link.txn(request, writes=True)
        if not answer.succeeded:
            if grave_of(answer.responses[0].response_range) > self.version:
                raise EmberfsError(Code.TOO_OLD, "a transaction outlived etcd's tombstones")
            raise EmberfsError(Code.CONFLICT, "something that was read has changed meanwhile")
        return answer.header.revision

    def _unmodified(self, start: bytes, stop: bytes) -> pb.Compare:
        return pb.Compare(
            target=pb.Compare.MOD,
            result=pb.Compare.LESS,
            key=self._keys + start,
            range_end=self._keys + stop if stop else b"",
            mod_revision=self.version + 1,
        )

    def cancel(self) -> None:
        """See Attempt. There is nothing at the server."""


def _put(key: bytes, value: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))


def _value(row: pb.KeyValue) -> bytes | None:
    tag = row.value[:1]
    if tag == LIVE:
        return row.value[1:]
    if tag == STAMPED:
        return row.value[1:] + pack_stamp(row.mod_revision)
    return None
