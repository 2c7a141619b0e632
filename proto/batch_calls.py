"""The data-plane methods for clients that have many small files: one message for hundreds of them.

Every item has an outcome of its own, in the order of the items. Whoever sends keeps a message
within ITEMS_MAX and BYTES_MAX (`share_of`); a larger one is refused as a whole.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from emberfs.proto.bounds import U32
from emberfs.proto.errors import Code, EmberfsError, code_of
from emberfs.proto.files import Inode
from emberfs.proto.ids import MiB
from emberfs.proto.meta_calls import Caller, RequestId
from emberfs.proto.method import Method

ITEMS_MAX = 256  # of one message: the server does nothing else meanwhile
BYTES_MAX = 1 * MiB  # of paths and contents of one message
DONE = 0
ORDINARY = 1  # nothing was done: the item is not for a batch, open, write and close it
TEXT_CHARACTERS_MAX = 200  # of an outcome: what a request is remembered by stays small


class Outcome(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What became of an item: DONE, ORDINARY, or the code of an error and its message."""

    code: int = DONE
    text: str = ""


class BatchStatRequest(msgspec.Struct, frozen=True, gc=False):
    """Walk paths from the root, all of one moment; the last name is followed only if `follow`.

    TOO_LARGE for more than BYTES_MAX. Outcomes: the errors of ResolveRequest.
    """

    caller: Caller
    paths: Annotated[tuple[bytes, ...], Meta(max_length=ITEMS_MAX)]
    follow: bool = True


class StatRow(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """An inode, or why there is none."""

    inode: Inode | None
    outcome: Outcome = Outcome()


class BatchStatAnswer(msgspec.Struct, frozen=True, gc=False):
    """One row for each path."""

    rows: tuple[StatRow, ...]


class BatchItem(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A file that is to be made, or replaced, and all that is to be in it."""

    path: bytes
    content: bytes


class BatchCreateRequest(msgspec.Struct, frozen=True, gc=False):
    """Make small files with their content, all in one transaction, which is stable when answered.

    A file that exists is replaced as by O_TRUNC and one write, unless `exclusive` (EXISTS).
    TOO_LARGE for more than BYTES_MAX. Outcomes: the errors of CreateRequest and of the walk to the
    directory, QUOTA; ORDINARY for what does not fit beside an inode, for files with chunks,
    symbolic links, files that the client has open, and for a name that comes again.
    """

    caller: Caller
    request: RequestId
    items: Annotated[tuple[BatchItem, ...], Meta(max_length=ITEMS_MAX)]
    mode: U32  # permission bits
    umask: U32 = 0  # of the caller; a default ACL takes its place
    exclusive: bool = False


class BatchCreateAnswer(msgspec.Struct, frozen=True, gc=False):
    """One outcome for each item."""

    outcomes: tuple[Outcome, ...]


def outcome_of(problem: EmberfsError) -> Outcome:
    """How a failure travels."""
    return Outcome(problem.code, problem.message[:TEXT_CHARACTERS_MAX])


def error_of(outcome: Outcome) -> EmberfsError:
    """The failure that an outcome tells of."""
    code = code_of(outcome.code)
    return EmberfsError(code, outcome.text)


def share_of(sizes: list[int], first: int) -> int:
    """Return where a message that begins with item `first` ends, by the sizes of all items."""
    stop, left = first, BYTES_MAX
    while stop < len(sizes) and stop - first < ITEMS_MAX and (left := left - sizes[stop]) >= 0:
        stop += 1
    return max(stop, first + 1)  # what is too large alone is refused alone


def check_bytes(size_bytes: int) -> None:
    """Refuse what is too large for one message: TOO_LARGE."""
    if size_bytes > BYTES_MAX:
        raise EmberfsError(
            Code.TOO_LARGE, f"{size_bytes} bytes of paths and contents; send {BYTES_MAX} at most"
        )


BATCH_STAT = Method(80, "batch_stat", BatchStatRequest, BatchStatAnswer)
BATCH_CREATE = Method(81, "batch_create", BatchCreateRequest, BatchCreateAnswer)
