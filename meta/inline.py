"""Small files: their content is a row beside the inode, and no chunk exists.

Every change of content or length gives the file a new version, which is never given again: the
number of the server's life, counted durably, and a count within it. So versions rise; one that a
power cut took back does not come again with other content; and of two versions of one life the
higher one was made from the lower one.

Who writes replaces the whole content and names the version that it was made from (put). If that is
not current any more, the writer has to begin anew with what is there now. A version above the
current one was lost in a power cut: what was made from it may take the place of what is left.
"""

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction, pack_counter, unpack_counter
from emberfs.kv.transactions import Engine
from emberfs.meta.tree import load_inode
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import INLINE_BYTES_MAX, Inode
from emberfs.proto.ids import InodeId
from emberfs.proto.inline import first_version_of
from emberfs.proto.meta_calls import OpenAnswer, SettleRequest


class Versions:
    """The versions of contents that one life of the server gives."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next = 1

    async def load(self, *, takes_back: bool) -> None:
        """Begin a new life, on stable storage before its first version is given.

        Not on a store that never `takes_back` what it has answered: there a version is above all
        that the file ever had, whichever server gives it, and a new one must not look like a loss.
        """

        async def begin(txn: Transaction) -> int:
            life = unpack_counter(await txn.get(keys.LIFE_KEY))
            if takes_back:
                life += 1
                txn.set(keys.LIFE_KEY, pack_counter(life))
            return life

        self._next = first_version_of(await self._engine.run(begin, durable=True))

    def after(self, version: int) -> int:
        """Return a new version, above `version`."""
        given = max(self._next, version + 1)
        self._next += 1
        return given


async def read_content(txn: Transaction, inode: Inode) -> bytes:
    """Return the content of an inline file, without the zeros behind it."""
    return await txn.get(keys.inline_key(inode.id)) or b""


async def answer(txn: Transaction, inode_id: InodeId, limit: int) -> OpenAnswer:
    """Return an inode with its content."""
    inode = await load_inode(txn, inode_id)
    content = await read_content(txn, inode) if inode.inline else None
    return OpenAnswer(inode, content, limit)


def store_content(txn: Transaction, inode: Inode, content: bytes) -> None:
    """Write the content of a file whose length is told apart from it."""
    key = keys.inline_key(inode.id)
    content = content.rstrip(b"\0")
    if content:
        txn.set(key, content)
    else:
        txn.clear(key)


async def has(txn: Transaction, inode: Inode, request: SettleRequest) -> bool:
    """Tell whether a request only tells again what is there: to make it stable, at another life.

    Who has written since says when.
    """
    if request.content is None or request.mtime_ns is not None or not inode.inline:
        return False
    there = await read_content(txn, inode)
    return inode.length == request.length and there == request.content.rstrip(b"\0")


def put(txn: Transaction, versions: Versions, inode: Inode, request: SettleRequest) -> Inode:
    """Replace the content; returns the inode with new length and version. SUPERSEDED, INVALID."""
    content, length = request.content, request.length
    assert content is not None
    if not inode.inline or inode.inline_version > request.inline_version:
        raise EmberfsError(
            Code.SUPERSEDED, f"the content of inode {inode.id} has changed since; fetch it anew"
        )
    if length is None or not len(content) <= min(length, INLINE_BYTES_MAX):
        raise EmberfsError(Code.INVALID, f"{len(content)} bytes of content, length {length}")
    store_content(txn, inode, content)
    return replace(inode, length=length, inline_version=versions.after(inode.inline_version))


def replaced(txn: Transaction, versions: Versions, inode: Inode, content: bytes) -> Inode:
    """Write a content in place of all that is there, as if the file had been cut to nothing first.

    Returns the inode with new length and versions, not stored.
    """
    store_content(txn, inode, content)
    return replace(
        inode,
        length=len(content),
        inline_version=versions.after(inode.inline_version),
        truncate_version=inode.truncate_version + int(inode.length > 0),
    )


async def cut(txn: Transaction, versions: Versions, inode: Inode, length: int) -> Inode:
    """Set the length; what is behind it goes. Returns the inode, shorter or longer, not stored."""
    content = await read_content(txn, inode)
    if length < len(content):
        store_content(txn, inode, content[:length])
    shorter = int(length < inode.length)
    return replace(
        inode,
        length=length,
        inline_version=versions.after(inode.inline_version),
        truncate_version=inode.truncate_version + shorter,
    )
