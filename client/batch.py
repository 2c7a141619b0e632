"""Many small files at once: divided into messages, a few of which are under way at a time.

What is not for a batch (larger content, files with chunks, symbolic links) is done the ordinary
way, by whoever made this. Results are in the order of what was asked, errors among them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

from emberfs.client.gather import gather_all
from emberfs.client.metadata import Metadata
from emberfs.fabric.region import Buffer, length_of, view_of
from emberfs.proto.batch_calls import (
    BATCH_CREATE,
    BATCH_STAT,
    DONE,
    ORDINARY,
    BatchCreateRequest,
    BatchItem,
    BatchStatRequest,
    error_of,
    share_of,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import INLINE_BYTES_MAX, PATH_BYTES_MAX, Inode
from emberfs.proto.meta_calls import Caller

IN_FLIGHT_MAX = 4  # messages, or files that are made the ordinary way

A = TypeVar("A")
T = TypeVar("T")


class NewFile(NamedTuple):
    """A file that is to be made."""

    path: bytes
    content: Buffer


class Manner(NamedTuple):
    """How files are to be made."""

    permissions: int
    exclusive: bool


Ordinary: TypeAlias = Callable[[NewFile, Manner], Awaitable[None]]


class Batches:
    """What one user does to many files."""

    def __init__(
        self, metadata: Metadata, caller: Caller, umask: int, make_ordinary: Ordinary
    ) -> None:
        """`make_ordinary` opens, writes and closes one file, durably, or raises EmberfsError."""
        self._metadata = metadata
        self._caller = caller
        self._umask = umask
        self._make_ordinary = make_ordinary

    # ------------------------------------------------------------ attributes

    async def inodes(self, paths: Sequence[bytes], *, follow: bool) -> list[Inode | EmberfsError]:
        """What each path leads to, or why to nothing. Raises what concerns all of them."""
        found: list[Inode | EmberfsError] = [_too_long(path) for path in paths]
        numbers = [n for n, path in enumerate(paths) if len(path) <= PATH_BYTES_MAX]

        async def ask(share: list[int]) -> None:
            asked = tuple(paths[n] for n in share)
            request = BatchStatRequest(self._caller, asked, follow)
            answer = await self._metadata.perform(BATCH_STAT, request)
            _check_count(len(answer.rows), len(share))
            for number, row in zip(share, answer.rows, strict=True):
                found[number] = error_of(row.outcome) if row.inode is None else row.inode

        shares = _shares(numbers, [len(paths[n]) for n in numbers])
        await in_turns(ask, shares)
        return found

    # ------------------------------------------------------------ new files

    async def create(self, files: Sequence[NewFile], manner: Manner) -> list[EmberfsError | None]:
        """Make files with their content, durably: None for each that is there, else the error.

        An error of the connection (TIMEOUT, ...) leaves open what became of its file.
        """
        making = _Making(self._metadata, self._caller, self._umask, files, manner)
        await making.send(range(len(files)))
        await in_turns(partial(self._make_one, making), making.ordinary)
        return making.results

    async def _make_one(self, making: "_Making", number: int) -> None:
        try:
            await self._make_ordinary(making.files[number], making.manner)
        except EmberfsError as problem:
            making.results[number] = problem


class _Making:
    """One call of Batches.create."""

    def __init__(
        self,
        metadata: Metadata,
        caller: Caller,
        umask: int,
        files: Sequence[NewFile],
        manner: Manner,
    ) -> None:
        self.files = files
        self.manner = manner
        self.results: list[EmberfsError | None] = [None] * len(files)
        self.ordinary: list[int] = []
        self._metadata = metadata
        self._caller = caller
        self._umask = umask

    async def send(self, numbers: Sequence[int]) -> None:
        """Make what is for a batch, note what is for the ordinary way."""
        small: list[int] = []
        for number in numbers:
            path, content = self.files[number]
            if len(path) > PATH_BYTES_MAX:
                self.results[number] = _too_long(path)
            elif length_of(content) > INLINE_BYTES_MAX:
                self.ordinary.append(number)
            else:
                small.append(number)
        sizes = [len(self.files[n].path) + length_of(self.files[n].content) for n in small]
        await in_turns(self._send, _shares(small, sizes))

    async def _send(self, share: list[int]) -> None:
        request = BatchCreateRequest(
            self._caller,
            self._metadata.next_request(),
            tuple(self._item(number) for number in share),
            self.manner.permissions,
            self._umask,
            self.manner.exclusive,
        )
        try:
            answer = await self._metadata.perform(BATCH_CREATE, request)
            _check_count(len(answer.outcomes), len(share))
        except EmberfsError as problem:
            await self._failed(share, problem)
            return
        for number, outcome in zip(share, answer.outcomes, strict=True):
            if outcome.code == ORDINARY:
                self.ordinary.append(number)
            elif outcome.code != DONE:
                self.results[number] = error_of(outcome)

    def _item(self, number: int) -> BatchItem:
        path, content = self.files[number]
        return BatchItem(path, bytes(view_of(content)))

    async def _failed(self, share: list[int], problem: EmberfsError) -> None:
        """A store that takes smaller transactions only has done nothing: halves may fit."""
        if problem.code == Code.TRANSACTION_TOO_LARGE and len(share) > 1:
            middle = len(share) // 2
            await self._send(share[:middle])
            await self._send(share[middle:])
            return
        for number in share:
            self.results[number] = problem


def _shares(numbers: Sequence[int], sizes: list[int]) -> list[list[int]]:
    """Divide items, which have these sizes, into messages."""
    shares: list[list[int]] = []
    first = 0
    while first < len(numbers):
        stop = share_of(sizes, first)
        shares.append(list(numbers[first:stop]))
        first = stop
    return shares


def _too_long(path: bytes) -> EmberfsError:
    text = f"a path of {len(path)} bytes; the limit is {PATH_BYTES_MAX}"
    return EmberfsError(Code.NAME_TOO_LONG, text)


def _check_count(found: int, wanted: int) -> None:
    if found != wanted:
        raise EmberfsError(Code.MALFORMED, f"{found} outcomes for a batch of {wanted}")


async def in_turns(work: Callable[[A], Awaitable[T]], arguments: Sequence[A]) -> list[T]:
    """Do `work` to every argument, a few at a time, and see all of them end; see gather_all."""
    turns = asyncio.Semaphore(IN_FLIGHT_MAX)

    async def one(argument: A) -> T:
        async with turns:
            return await work(argument)

    return await gather_all([one(argument) for argument in arguments])
