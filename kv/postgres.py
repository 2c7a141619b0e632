"""PostgreSQL as a transactional store: one table of keys and values, SERIALIZABLE.

The server does the validation: a transaction commits only if the result is that of some order of
all transactions. It may refuse more than it must, since it locks pages of the index, and it may
let pass what an order allows although a row that was read has changed. Only plain SQL that other
databases with PostgreSQL's protocol know as well.
"""

import logging
import re
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from emberfs.kv.backend import Limits
from emberfs.kv.history import ReadSet, WriteSet
from emberfs.kv.keys import STAMP_KEY
from emberfs.kv.postgres_pool import Connection, Pool, answered
from emberfs.kv.store import Row
from emberfs.kv.transaction import pack_counter, pack_stamp, unpack_counter
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import MS, MiB
from emberfs.runtime.env import Env

log = logging.getLogger("emberfs.kv.postgres")

T = TypeVar("T")

# A key must fit a third of an index page.
LIMITS = Limits(key_bytes=2048, value_bytes=16 * MiB, transaction_bytes=16 * MiB, rows=50_000)
POLL_NS = 100 * MS
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,40}")


class PostgresBackend:
    """A table in a database. Fits backend.Backend."""

    limits = LIMITS

    def __init__(self, env: Env, address: str, table: str) -> None:
        """`address`: a libpq URL. EmberfsError(CONFIG) for a name that is none."""
        if not _NAME.fullmatch(table):
            raise EmberfsError(
                Code.CONFIG, f'"{table}" names no table: write small letters, digits and _ only'
            )
        self._env = env
        self._table = table
        self.pool = Pool(address)
        self.text = Statements(table)

    async def open(self) -> None:
        """See Backend. AwayError if the server does not answer."""
        connection = await self.pool.take()
        try:
            rows = await answered(self._prepare(connection), wrote=False)
        finally:
            self.pool.give(connection)
        if rows and rows[0][0] not in ("on", "remote_apply"):
            log.warning(
                "synchronous_commit is %s: what was acknowledged may be lost with the server",
                rows[0][0],
            )

    async def _prepare(self, connection: Connection) -> list[tuple[Any, ...]]:
        found = await connection.execute("SELECT to_regclass(%s)", (self._table,))
        row = await found.fetchone()
        if row is None or row[0] is None:
            try:
                await connection.execute(self.text.create)
                await connection.commit()
            except (psycopg.errors.DuplicateTable, psycopg.errors.UniqueViolation):
                await connection.rollback()  # another process was faster
        shown = await (await connection.execute("SHOW synchronous_commit")).fetchall()
        await connection.commit()
        return shown

    def attempt(self, *, read_only: bool) -> "PostgresAttempt":
        """See Backend."""
        return PostgresAttempt(self.pool, self.text, writes=not read_only)

    async def await_write(self, key: bytes, version: int) -> None:
        """See Backend. Polls: a notification would take a lock of the whole database per commit."""
        await self._env.sleep_ns(POLL_NS)

    async def close(self) -> None:
        """See Backend."""
        await self.pool.close()


class Statements:
    """The SQL of one table."""

    def __init__(self, table: str) -> None:
        def text(words: str) -> sql.Composed:
            return sql.SQL(words).format(sql.Identifier(table))

        self.create = text("CREATE TABLE {} (k bytea PRIMARY KEY, v bytea NOT NULL)")
        self.get = text("SELECT k, v FROM {} WHERE k = %b")
        self.get_many = text("SELECT k, v FROM {} WHERE k = ANY(%b::bytea[])")
        self.scan = text("SELECT k, v FROM {} WHERE k >= %b AND k < %b ORDER BY k")
        self.scan_some = text("SELECT k, v FROM {} WHERE k >= %b AND k < %b ORDER BY k LIMIT %b")
        self.back = text("SELECT k, v FROM {} WHERE k >= %b AND k < %b ORDER BY k DESC")
        self.back_some = text(
            "SELECT k, v FROM {} WHERE k >= %b AND k < %b ORDER BY k DESC LIMIT %b"
        )
        self.clear = text("DELETE FROM {} WHERE k >= %b AND k < %b")
        self.delete = text("DELETE FROM {} WHERE k = ANY(%b::bytea[])")
        self.put = text(
            "INSERT INTO {} (k, v) SELECT * FROM unnest(%b::bytea[], %b::bytea[]) "
            "ON CONFLICT (k) DO UPDATE SET v = excluded.v"
        )


class PostgresAttempt:
    """One transaction. Fits backend.Attempt."""

    version = 0  # PostgreSQL has no number in the order of commits

    def __init__(self, pool: Pool, text: Statements, *, writes: bool) -> None:
        self._pool = pool
        self._text = text
        self._writes = writes
        self._in_window = False
        self._conflict = False
        self._connection: Connection | None = None
        self._over = False

    # ------------------------------------------------------------ reading

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See Attempt."""
        if len(keys) == 1:
            rows = await self._rows(self._text.get, (keys[0],))
            return [rows[0][1] if rows else None]
        found = dict(await self._rows(self._text.get_many, (list(keys),)))
        return [found.get(key) for key in keys]

    async def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool) -> list[Row]:
        """See Attempt."""
        text = self._text
        if limit:
            statement = text.back_some if reverse else text.scan_some
            return await self._rows(statement, (start, stop, limit))
        return await self._rows(text.back if reverse else text.scan, (start, stop))

    async def _rows(self, statement: sql.Composed, values: tuple[Any, ...]) -> list[Row]:
        connection = await self._begun()

        async def ask() -> list[Row]:
            cursor = await connection.execute(statement, values, binary=True)
            rows: list[Row] = await cursor.fetchall()
            return rows

        return await self._answered(ask(), wrote=False)

    async def _begun(self) -> Connection:
        assert not self._over, "a transaction was used after its end"
        if self._writes and not self._in_window:
            await self._pool.enter()
            self._in_window = True
        if self._connection is None:
            self._connection = await self._pool.take()
        return self._connection

    async def _answered(self, work: Awaitable[T], *, wrote: bool) -> T:
        try:
            return await answered(work, wrote=wrote)
        except EmberfsError as problem:
            self._conflict = problem.code == Code.CONFLICT
            raise

    # ------------------------------------------------------------ the end

    async def finish(self) -> None:
        """See Attempt. What was read is certain only when the server lets it commit."""
        if self._connection is not None:
            await self._answered(self._connection.commit(), wrote=False)

    async def commit(self, read: ReadSet, written: WriteSet) -> int:
        """See Attempt."""
        connection = await self._begun()
        writes = dict(written.writes)
        if written.stamps:
            number = unpack_counter((await self.get_many((STAMP_KEY,)))[0]) + 1
            writes[STAMP_KEY] = pack_counter(number)
            for key, prefix in written.stamps.items():
                writes[key] = prefix + pack_stamp(number)
        # In the order of keys: two transactions that write the same rows then cannot deadlock.
        dead = sorted(key for key, value in writes.items() if value is None)
        live = sorted((key, value) for key, value in writes.items() if value is not None)

        async def write() -> None:
            async with connection.pipeline():
                for span in written.clears:
                    await connection.execute(self._text.clear, span)
                if dead:
                    await connection.execute(self._text.delete, (dead,))
                if live:
                    columns = ([key for key, _ in live], [value for _, value in live])
                    await connection.execute(self._text.put, columns)
                await connection.commit()

        await self._answered(write(), wrote=True)
        return 0

    def cancel(self) -> None:
        """See Attempt."""
        self._over = True
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.give(connection)
        if self._in_window:
            self._in_window = False
            self._pool.window.leave(conflict=self._conflict)
