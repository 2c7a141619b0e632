"""One table of error codes: a code exists only where some caller reacts differently to it."""

import errno
from enum import IntEnum
from typing import NamedTuple


class Reaction(IntEnum):
    """What the caller of a failed request does next."""

    GIVE_UP = 1  # tell the application
    RETRY = 2  # the same request to the same server, after a pause
    REFRESH = 3  # wait for newer routing, then choose the server anew
    FAILOVER = 4  # try another replica or connection, then as REFRESH


class Code(IntEnum):
    """Error codes as they travel in replies; 0 is success and never an error."""

    INVALID = 100
    UNSUPPORTED = 101
    INTERNAL = 102
    SHUTTING_DOWN = 103
    CONFIG = 104

    TIMEOUT = 200
    DISCONNECTED = 201
    CANCELLED = 202
    MALFORMED = 203
    OVERLOADED = 204
    TOO_LARGE = 205
    UNREACHABLE = 206

    NOT_FOUND = 300
    EXISTS = 301
    NOT_DIRECTORY = 302
    IS_DIRECTORY = 303
    NOT_EMPTY = 304
    NOT_PERMITTED = 305
    ACCESS = 306
    NAME_TOO_LONG = 307
    LOOP = 308
    STALE = 309
    TOO_MANY_LINKS = 310
    NO_ATTRIBUTE = 311
    FILE_TOO_LARGE = 312
    BAD_HANDLE = 313
    RANGE = 314
    READ_ONLY = 315
    QUOTA = 316
    OTHER_QUOTA = 317
    TOO_MANY_NAMES = 318  # for one call: a tree is removed in parts

    CHAIN_VERSION = 400
    NOT_SERVING = 401
    NOT_HEAD = 402
    NO_SPACE = 403
    DISK = 404
    CHECKSUM = 405
    VERSION_GAP = 406
    SUPERSEDED = 407
    BUSY = 408

    CONFLICT = 500
    TOO_OLD = 501
    MAYBE_COMMITTED = 502
    TRANSACTION_TOO_LARGE = 503

    WRONG_CLUSTER = 600
    NOT_REGISTERED = 601
    NODE_ID_TAKEN = 602
    NOT_PRIMARY = 603  # this mgmtd does not lead: ask the next one; the message names who does


class Meaning(NamedTuple):
    """One row of the table."""

    reaction: Reaction
    errno: int


_GIVE_UP, _RETRY, _REFRESH, _FAILOVER = Reaction

MEANINGS: dict[Code, Meaning] = {
    Code.INVALID: Meaning(_GIVE_UP, errno.EINVAL),
    Code.UNSUPPORTED: Meaning(_GIVE_UP, errno.EOPNOTSUPP),
    Code.INTERNAL: Meaning(_GIVE_UP, errno.EIO),
    Code.SHUTTING_DOWN: Meaning(_FAILOVER, errno.EIO),
    Code.CONFIG: Meaning(_GIVE_UP, errno.EINVAL),
    Code.TIMEOUT: Meaning(_FAILOVER, errno.ETIMEDOUT),
    Code.DISCONNECTED: Meaning(_FAILOVER, errno.EIO),
    Code.CANCELLED: Meaning(_GIVE_UP, errno.EINTR),
    Code.MALFORMED: Meaning(_GIVE_UP, errno.EIO),
    Code.OVERLOADED: Meaning(_RETRY, errno.EAGAIN),
    Code.TOO_LARGE: Meaning(_GIVE_UP, errno.EMSGSIZE),
    Code.UNREACHABLE: Meaning(_FAILOVER, errno.EIO),
    Code.NOT_FOUND: Meaning(_GIVE_UP, errno.ENOENT),
    Code.EXISTS: Meaning(_GIVE_UP, errno.EEXIST),
    Code.NOT_DIRECTORY: Meaning(_GIVE_UP, errno.ENOTDIR),
    Code.IS_DIRECTORY: Meaning(_GIVE_UP, errno.EISDIR),
    Code.NOT_EMPTY: Meaning(_GIVE_UP, errno.ENOTEMPTY),
    Code.NOT_PERMITTED: Meaning(_GIVE_UP, errno.EPERM),
    Code.ACCESS: Meaning(_GIVE_UP, errno.EACCES),
    Code.NAME_TOO_LONG: Meaning(_GIVE_UP, errno.ENAMETOOLONG),
    Code.LOOP: Meaning(_GIVE_UP, errno.ELOOP),
    Code.STALE: Meaning(_GIVE_UP, errno.ESTALE),
    Code.TOO_MANY_LINKS: Meaning(_GIVE_UP, errno.EMLINK),
    Code.NO_ATTRIBUTE: Meaning(_GIVE_UP, errno.ENODATA),
    Code.FILE_TOO_LARGE: Meaning(_GIVE_UP, errno.EFBIG),
    Code.BAD_HANDLE: Meaning(_GIVE_UP, errno.EBADF),
    Code.RANGE: Meaning(_GIVE_UP, errno.ERANGE),
    Code.READ_ONLY: Meaning(_GIVE_UP, errno.EROFS),
    Code.QUOTA: Meaning(_GIVE_UP, errno.EDQUOT),
    Code.OTHER_QUOTA: Meaning(_GIVE_UP, errno.EXDEV),
    Code.TOO_MANY_NAMES: Meaning(_GIVE_UP, errno.ENOTEMPTY),
    Code.CHAIN_VERSION: Meaning(_REFRESH, errno.EIO),
    Code.NOT_SERVING: Meaning(_REFRESH, errno.EIO),
    Code.NOT_HEAD: Meaning(_REFRESH, errno.EIO),
    Code.NO_SPACE: Meaning(_GIVE_UP, errno.ENOSPC),
    Code.DISK: Meaning(_FAILOVER, errno.EIO),
    Code.CHECKSUM: Meaning(_FAILOVER, errno.EIO),
    Code.VERSION_GAP: Meaning(_REFRESH, errno.EIO),
    Code.SUPERSEDED: Meaning(_GIVE_UP, errno.EIO),
    Code.BUSY: Meaning(_RETRY, errno.EAGAIN),
    Code.CONFLICT: Meaning(_RETRY, errno.EAGAIN),
    Code.TOO_OLD: Meaning(_RETRY, errno.EAGAIN),
    Code.MAYBE_COMMITTED: Meaning(_RETRY, errno.EIO),
    Code.TRANSACTION_TOO_LARGE: Meaning(_GIVE_UP, errno.E2BIG),
    Code.WRONG_CLUSTER: Meaning(_GIVE_UP, errno.EINVAL),
    Code.NOT_REGISTERED: Meaning(_REFRESH, errno.EIO),
    Code.NODE_ID_TAKEN: Meaning(_GIVE_UP, errno.EEXIST),
    Code.NOT_PRIMARY: Meaning(_FAILOVER, errno.EIO),
}


class EmberfsError(Exception):
    """The one exception of emberfs: a code that callers react to, and a sentence for people."""

    def __init__(self, code: Code, message: str = "") -> None:
        super().__init__(message or code.name)
        self.code = code
        self.message = message or code.name

    @property
    def reaction(self) -> Reaction:
        """What the caller should do."""
        return MEANINGS[self.code].reaction

    @property
    def errno(self) -> int:
        """The errno that an application sees when nothing else helped."""
        return MEANINGS[self.code].errno

    def __str__(self) -> str:
        """Name the code first: it is what one searches for."""
        return f"{self.code.name}: {self.message}"


def code_of(number: int) -> Code:
    """Return the code of a number from outside; unknown numbers become INTERNAL."""
    try:
        return Code(number)
    except ValueError:
        return Code.INTERNAL
