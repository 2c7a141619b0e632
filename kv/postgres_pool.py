"""Connections to a PostgreSQL server: one per transaction at a time, up to a bound.

How many transactions may write at a time adapts itself: PostgreSQL refuses them for what others do
on the same page of the index, and in a small table that is every other one. Fewer at a time then
get more done.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable
from typing import Any, NoReturn, TypeVar

import psycopg
from psycopg import AsyncConnection, IsolationLevel

from emberfs.kv.backend import AwayError
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.tasks import TaskSet

log = logging.getLogger("emberfs.kv.postgres")
# It warns of every statement that follows a refused one in the same batch.
logging.getLogger("psycopg").setLevel(logging.ERROR)

T = TypeVar("T")
Connection = AsyncConnection[tuple[Any, ...]]

CONNECTIONS_MAX = 16
ANSWER_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 3

# Index scans only: a sequential or bitmap scan locks more than what was read, for SERIALIZABLE.
_SETTINGS = ("enable_seqscan", "enable_bitmapscan")

_CONFLICTS = ("40001", "40P01")
_FULL = ("53100",)
_DAMAGED = ("58", "XX")  # classes: its disk, its files
_AWAY = ("08", "53", "57")  # classes: connection, no resources, going down or coming up
_STANDBY = ("25006", "25P03")


class Window:
    """A bound that shrinks with every conflict and grows with success, as TCP's does."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = float(most)
        self._inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Wait until one more is allowed."""
        while self._inside >= int(self._size):
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # its turn is another's now
                raise
        self._inside += 1

    def leave(self, *, conflict: bool) -> None:
        """Count one out."""
        self._inside -= 1
        grown = self._size * 0.75 if conflict else self._size + 0.2 / self._size
        self._size = min(max(grown, 1.0), self._most)
        for _ in range(int(self._size) - self._inside):
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class Pool:
    """Serializable connections of one process."""

    def __init__(self, address: str) -> None:
        """`address`: a libpq URL."""
        self._address = address
        self._free: list[Connection] = []
        self._gate = asyncio.Semaphore(CONNECTIONS_MAX)
        self.window = Window(CONNECTIONS_MAX)
        self._tasks = TaskSet()

    async def enter(self) -> None:
        """Enter the window. AwayError if nobody leaves it."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self.window.enter()
        except TimeoutError:
            raise AwayError("PostgreSQL is too busy for another transaction") from None

    async def take(self) -> Connection:
        """Return a connection without a transaction. AwayError."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._gate.acquire()
        except TimeoutError:
            raise AwayError(f"all {CONNECTIONS_MAX} connections to PostgreSQL are busy") from None
        while self._free:
            connection = self._free.pop()
            if not connection.broken:
                return connection
        try:
            return await self._connect()
        except BaseException:
            self._gate.release()
            raise

    async def _connect(self) -> Connection:
        try:
            connection = await AsyncConnection.connect(
                self._address,
                autocommit=True,
                connect_timeout=CONNECT_TIMEOUT_S,
                keepalives_idle=5,
                keepalives_interval=2,
                keepalives_count=2,
                tcp_user_timeout=int(ANSWER_TIMEOUT_S * 1000),
            )
            try:
                await _set_up(connection)
            except BaseException:
                await connection.close()
                raise
        except psycopg.Error as problem:
            raise explained(problem, wrote=False) from None
        return connection

    def give(self, connection: Connection) -> None:
        """Take a connection back; a transaction in it is rolled back, without waiting for that."""
        if connection.broken or connection.info.transaction_status == _IDLE:
            self._return(connection)
        else:
            self._tasks.spawn(self._roll_back(connection), name="postgres rollback")

    async def _roll_back(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await connection.rollback()
        except (psycopg.Error, TimeoutError):
            await connection.close()
        finally:
            self._return(connection)

    def _return(self, connection: Connection) -> None:
        if not connection.broken and not connection.closed:
            self._free.append(connection)
        self._gate.release()

    async def close(self) -> None:
        """Close all that are free."""
        await self._tasks.drain()
        while self._free:
            await self._free.pop().close()


_IDLE = psycopg.pq.TransactionStatus.IDLE


async def _set_up(connection: Connection) -> None:
    for name in _SETTINGS:
        try:
            await connection.execute(f"SET {name} = off")
        except psycopg.errors.UndefinedObject:
            pass  # a relative of PostgreSQL that does not know it
    await connection.set_autocommit(False)
    await connection.set_isolation_level(IsolationLevel.SERIALIZABLE)


async def answered(work: Awaitable[T], *, wrote: bool) -> T:
    """Await an answer of the server. EmberfsError as `explained`."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await work
    except TimeoutError:
        _unknown(f"PostgreSQL did not answer within {ANSWER_TIMEOUT_S:g} s", wrote=wrote)
    except psycopg.Error as problem:
        raise explained(problem, wrote=wrote) from None


def explained(problem: psycopg.Error, *, wrote: bool) -> EmberfsError:
    """Say in our words what went wrong.

    CONFLICT, NO_SPACE, DISK, CONFIG. Else AwayError if nothing was to be committed, or
    MAYBE_COMMITTED.
    """
    state, words = problem.sqlstate or "", str(problem).strip().replace("\n", "; ")
    if state in _CONFLICTS:
        return EmberfsError(Code.CONFLICT, "something that was read has changed meanwhile")
    if state in _FULL:
        return EmberfsError(Code.NO_SPACE, f"PostgreSQL's disk is full: {words}")
    if state[:2] in _DAMAGED:
        return EmberfsError(Code.DISK, f"PostgreSQL has a damaged disk or table ({state}): {words}")
    if state and state[:2] not in _AWAY and state not in _STANDBY:
        return EmberfsError(Code.CONFIG, f"PostgreSQL refused a statement ({state}): {words}")
    try:
        _unknown(f"PostgreSQL: {words}", wrote=wrote)
    except EmberfsError as found:
        return found


def _unknown(words: str, *, wrote: bool) -> NoReturn:
    if wrote:
        raise EmberfsError(Code.MAYBE_COMMITTED, words)
    raise AwayError(words)
