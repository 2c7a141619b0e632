"""The data-plane methods of quotas, removed trees and the trash."""

import msgspec

from emberfs.proto.bounds import I64, U63, BoundedInode
from emberfs.proto.ids import InodeId
from emberfs.proto.meta_calls import Caller, Nothing, RequestId
from emberfs.proto.method import Method


class SetQuotaRequest(msgspec.Struct, frozen=True, gc=False):
    """Limit what a directory and everything below it may use; None leaves a limit, 0 lifts it.

    For uid 0 and the owner of the root. What is there already is counted in the background.
    """

    caller: Caller
    request: RequestId
    inode: BoundedInode
    bytes_max: U63 | None = None
    files_max: U63 | None = None


class RemoveQuotaRequest(msgspec.Struct, frozen=True, gc=False):
    """Lift a quota at once; its counters go in the background. NOT_FOUND if there is none."""

    caller: Caller
    request: RequestId
    inode: BoundedInode


class ShowQuotaRequest(msgspec.Struct, frozen=True, gc=False):
    """Ask for the quotas that an inode counts for, innermost first."""

    caller: Caller
    inode: BoundedInode


class ListQuotasRequest(msgspec.Struct, frozen=True, gc=False):
    """Ask for a page of all quotas, behind the one of directory `after`."""

    caller: Caller
    after: BoundedInode = InodeId(0)


class QuotaReport(msgspec.Struct, frozen=True, gc=False):
    """A quota as it is now; a limit of 0 means none."""

    directory: InodeId
    path: bytes  # b"" if the directory is gone
    bytes_max: int
    files_max: int
    bytes_used: int
    files_used: int
    state: str  # "active", "counting" or "removing"
    walked: int  # names that counting or removing has been through
    waiting: int  # directories that it knows of and has not


class QuotasAnswer(msgspec.Struct, frozen=True, gc=False):
    """Quotas; `more` tells whether others follow."""

    quotas: tuple[QuotaReport, ...]
    more: bool = False


class RemoveTreeRequest(msgspec.Struct, frozen=True, gc=False):
    """Remove a directory with everything below it: out of the name space at once.

    The caller needs what `rm -r` needs: ACCESS, NOT_PERMITTED name the directory that refuses.
    TOO_LARGE: there are too many names to look at for one call; remove its parts.
    """

    caller: Caller
    request: RequestId
    parent: BoundedInode
    name: bytes


class TrashRequest(msgspec.Struct, frozen=True, gc=False):
    """Put a name, with everything below it, into the trash. Rights as for its removal."""

    caller: Caller
    request: RequestId
    parent: BoundedInode
    name: bytes
    path: bytes = b""  # as the user called it, for the list


class TrashItem(msgspec.Struct, frozen=True, gc=False):
    """Something in the trash."""

    id: InodeId  # names it to RESTORE and EMPTY_TRASH
    time_ns: int  # when it was put there
    uid: int  # by whom
    path: bytes
    mode: int  # file type bits


class ListTrashRequest(msgspec.Struct, frozen=True, gc=False):
    """Ask for a page of what the caller (uid 0: anybody) has in the trash, oldest first."""

    caller: Caller
    after_ns: U63 = 0
    after: BoundedInode = InodeId(0)


class TrashAnswer(msgspec.Struct, frozen=True, gc=False):
    """A page; `more` tells whether another follows behind (`after_ns`, `after`)."""

    items: tuple[TrashItem, ...]
    more: bool = False
    after_ns: int = 0
    after: int = 0


class RestoreRequest(msgspec.Struct, frozen=True, gc=False):
    """Put something back where it was. EXISTS, or NOT_FOUND when its directory is gone."""

    caller: Caller
    request: RequestId
    time_ns: U63
    id: BoundedInode


class EmptyTrashRequest(msgspec.Struct, frozen=True, gc=False):
    """Remove one thing from the trash for good."""

    caller: Caller
    request: RequestId
    time_ns: U63
    id: BoundedInode


class QuotaCensusRequest(msgspec.Struct, frozen=True, gc=False):
    """Count what every inode counts for, and compare with the counters of the same moment."""


class QuotaDifference(msgspec.Struct, frozen=True, gc=False):
    """A quota whose counters are wrong."""

    directory: InodeId
    files: I64
    files_counter: I64
    bytes: I64
    bytes_counter: I64


class QuotaCensusAnswer(msgspec.Struct, frozen=True, gc=False):
    """What does not agree."""

    differences: tuple[QuotaDifference, ...]


SET_QUOTA = Method(70, "set_quota", SetQuotaRequest, Nothing)
REMOVE_QUOTA = Method(71, "remove_quota", RemoveQuotaRequest, Nothing)
SHOW_QUOTA = Method(72, "show_quota", ShowQuotaRequest, QuotasAnswer)
LIST_QUOTAS = Method(73, "list_quotas", ListQuotasRequest, QuotasAnswer)
QUOTA_CENSUS = Method(74, "quota_census", QuotaCensusRequest, QuotaCensusAnswer)
REMOVE_TREE = Method(75, "remove_tree", RemoveTreeRequest, Nothing)
TRASH = Method(76, "trash", TrashRequest, Nothing)
LIST_TRASH = Method(77, "list_trash", ListTrashRequest, TrashAnswer)
RESTORE = Method(78, "restore", RestoreRequest, Nothing)
EMPTY_TRASH = Method(79, "empty_trash", EmptyTrashRequest, Nothing)
