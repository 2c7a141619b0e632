"""All rows of a store in a file, and back: a backup, and the way from one engine to another.

FILE: the magic, then blocks: length u32, CRC-32C u32, msgpack [[key, value], ...]. The last block
is the number of all rows instead. Rows are in the order of keys and of one moment. What engines
keep for themselves is not among them.

A store is filled in many transactions. LOADING_KEY is there from the first to the last of them:
services refuse such a store, and so does a second load.
"""

import os
import struct
from collections.abc import AsyncIterator, Iterator
from typing import BinaryIO, TypeAlias

import msgspec
from crc32c import crc32c

from emberfs.kv.keys import LOADING_KEY, Prefix
from emberfs.kv.slots import ENGINE_ROWS
from emberfs.kv.store import Row
from emberfs.kv.transaction import Transaction
from emberfs.kv.transactions import Engine
from emberfs.proto.errors import Code, EmberfsError

MAGIC = b"emberfs rows 1\n"
PAGE_ROWS = 2000  # in memory at a time
LOAD_ROWS = 500  # per transaction
LOAD_BYTES = 512 * 1024
END = b"\xff" * 16

_HEAD = struct.Struct(">II")
_ENCODE = msgspec.msgpack.Encoder().encode
_BLOCK = msgspec.msgpack.Decoder(list[tuple[bytes, bytes]] | int)
_MGMTD = bytes(Prefix.MGMTD.value)

Block: TypeAlias = list[Row]


async def pages(engine: Engine, *, stopped: bool = False) -> AsyncIterator[list[Row]]:
    """Yield all rows of one moment. `stopped`: nobody writes, so many moments are as good as one.

    TOO_OLD: the engine has forgotten the moment.
    """
    start = ENGINE_ROWS.stop
    txn = engine.begin(read_only=True)
    try:
        while True:
            try:
                rows = await txn.get_range(start, END, limit=PAGE_ROWS)
            except EmberfsError as problem:
                if problem.code != Code.TOO_OLD:
                    raise
                if not stopped:
                    raise _forgotten(problem) from None
                txn.cancel()
                txn = engine.begin(read_only=True)
                continue
            yield rows
            if len(rows) < PAGE_ROWS:
                return
            start = rows[-1][0] + b"\0"
    finally:
        txn.cancel()


def _forgotten(problem: EmberfsError) -> EmberfsError:
    return EmberfsError(
        Code.TOO_OLD,
        f"the store forgot the moment of this dump before it was finished ({problem.message}); "
        "stop mgmtd and meta and pass --stopped, or let it remember longer",
    )


async def dump(
    engine: Engine, file: BinaryIO, *, stopped: bool = False, mgmtd: Engine | None = None
) -> int:
    """Write all rows to `file`; returns how many.

    `mgmtd`: a store that only mgmtd uses, whose keys have no prefix.
    """
    file.write(MAGIC)
    count = 0
    async for rows in pages(engine, stopped=stopped):
        count += _write(file, rows)
    if mgmtd is not None:
        async for rows in pages(mgmtd, stopped=stopped):
            count += _write(file, [(_MGMTD + key, value) for key, value in rows])
    _write_block(file, _ENCODE(count))
    file.flush()
    os.fsync(file.fileno())
    return count


def _write(file: BinaryIO, rows: list[Row]) -> int:
    if rows:
        _write_block(file, _ENCODE(rows))
    return len(rows)


def _write_block(file: BinaryIO, block: bytes) -> None:
    file.write(_HEAD.pack(len(block), crc32c(block)))
    file.write(block)


def blocks(file: BinaryIO) -> Iterator[Block]:
    """Yield the rows of a file. EmberfsError(CHECKSUM) if it is damaged or not whole."""
    if file.read(len(MAGIC)) != MAGIC:
        raise EmberfsError(Code.CHECKSUM, "this is no file of `emberfs meta dump`")
    count = 0
    while True:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise _damaged("it ends too early")
        length, checksum = _HEAD.unpack(head)
        block = file.read(length)
        if len(block) < length:
            raise _damaged("it ends too early")
        if crc32c(block) != checksum:
            raise _damaged(f"the checksum after {count} rows is wrong")
        try:
            found = _BLOCK.decode(block)
        except msgspec.MsgspecError as problem:
            raise _damaged(str(problem)) from None
        if isinstance(found, int):
            if found != count or file.read(1):
                raise _damaged(f"it holds {count} rows and says {found}")
            return
        count += len(found)
        yield found


def _damaged(reason: str) -> EmberfsError:
    return EmberfsError(Code.CHECKSUM, f"the dump is damaged: {reason}; take another one")


async def load(engine: Engine, file: BinaryIO, *, mgmtd: Engine | None = None) -> int:
    """Fill an empty store from a file that can be read twice; returns how many rows.

    EmberfsError: EXISTS if a store is not empty, CHECKSUM before anything is written.
    """
    for _ in blocks(file):
        pass  # all of it is sound
    file.seek(0)
    await _claim(engine)
    if mgmtd is not None:
        await _claim(mgmtd)
    count = 0
    batch, states = _Batch(engine), None if mgmtd is None else _Batch(mgmtd)
    for rows in blocks(file):
        count += len(rows)
        for key, value in rows:
            if states is not None and key.startswith(_MGMTD):
                await states.put(key.removeprefix(_MGMTD), value)
            else:
                await batch.put(key, value)
    await batch.end()
    if states is not None:
        await states.end()
    for filled in (engine, mgmtd):
        if filled is not None:
            await _finish(filled)
    return count


class _Batch:
    """Rows on their way into a store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rows: list[Row] = []
        self._size = 0

    async def put(self, key: bytes, value: bytes) -> None:
        self._rows.append((key, value))
        self._size += len(key) + len(value)
        if len(self._rows) >= LOAD_ROWS or self._size >= LOAD_BYTES:
            await self.end()

    async def end(self) -> None:
        rows, self._rows, self._size = self._rows, [], 0

        async def work(txn: Transaction) -> None:
            for key, value in rows:
                txn.set(key, value)

        if rows:
            await self._engine.run(work)


async def _claim(engine: Engine) -> None:
    async def work(txn: Transaction) -> None:
        if await txn.get(LOADING_KEY) is not None:
            raise EmberfsError(
                Code.EXISTS, "an earlier load into this store did not finish; clear it first"
            )
        if await txn.get_range(ENGINE_ROWS.stop, END, limit=1):
            raise EmberfsError(
                Code.EXISTS,
                "this store is not empty; load into an empty one: another directory, name or table",
            )
        txn.set(LOADING_KEY, b"")

    await engine.run(work, durable=True)


async def _finish(engine: Engine) -> None:
    async def work(txn: Transaction) -> None:
        txn.clear(LOADING_KEY)

    await engine.run(work, durable=True)
