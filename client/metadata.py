"""Metadata calls, one typed method each, with retry and failover across the meta servers.

A mutating call gets its RequestId once; every retry carries the same, so a reply that was lost on
the way does nothing twice, whichever server answers. Who is asked stands in metachoice.py. A meta
server that restarts is waited for until the deadline, if there is no other.
"""

from collections.abc import Callable
from typing import TypeVar

import msgspec

from emberfs.client import metrics
from emberfs.client.metachoice import MetaServers, file_of
from emberfs.client.nodecalls import NodeCalls, Peers, RoutingView
from emberfs.client.patience import Patience
from emberfs.client.quotaroom import QuotaRooms
from emberfs.proto import meta_calls as calls
from emberfs.proto import quota_calls
from emberfs.proto.cluster import NodeKind, RoutingSnapshot
from emberfs.proto.errors import Code, EmberfsError, Reaction
from emberfs.proto.files import Inode
from emberfs.proto.ids import MS, SECOND, InodeId, NodeId, SessionId
from emberfs.proto.meta_calls import Caller, ReaddirAnswer, RequestId, StatfsAnswer
from emberfs.proto.method import Method
from emberfs.runtime.env import Env

Request = TypeVar("Request", bound=msgspec.Struct)
Answer = TypeVar("Answer", bound=msgspec.Struct)
Opened = TypeVar("Opened", calls.InodeAnswer, calls.OpenAnswer)

DEADLINE_NS = 60 * SECOND
ATTEMPT_NS = 10 * SECOND  # a server that accepts but never answers is left after this
BACKOFF_FIRST_NS = 20 * MS
BACKOFF_MAX_NS = 500 * MS
NO_SESSION = SessionId(0)


class Metadata:
    """The metadata service as a client sees it. Raises EmberfsError with the server's code."""

    def __init__(
        self,
        env: Env,
        routing: RoutingView,
        peers: Peers,
        client_id: int,
        *,
        deadline_ns: int = DEADLINE_NS,
        attempt_ns: int = ATTEMPT_NS,
        since: Callable[[], int] = lambda: 0,
    ) -> None:
        """`since`: the routing version from which on this client is shown, see OpenRequest."""
        self.deadline_ns = deadline_ns  # of one logical call, all retries included
        self._env = env
        self._routing = routing
        self._nodes = NodeCalls(env, routing, peers)
        self._client_id = client_id
        self._attempt_ns = attempt_ns
        self._since = since
        self._sequence = 0
        self._servers = MetaServers(env, client_id)
        self.rooms = QuotaRooms()

    def close(self) -> None:
        """Stop listening to routing."""
        self._nodes.close()

    def new_session(self) -> SessionId:
        """Return a fresh id for one open file description."""
        return SessionId(self._env.random.getrandbits(63) | 1)

    # ------------------------------------------------------------ names

    async def lookup(self, caller: Caller, parent: InodeId, name: bytes) -> Inode:
        """Find a name in a directory. NOT_FOUND, NOT_DIRECTORY, ACCESS."""
        request = calls.LookupRequest(caller=caller, parent=parent, name=name)
        return (await self._call(calls.LOOKUP, request)).inode

    async def resolve(self, caller: Caller, path: bytes, *, follow: bool = True) -> Inode:
        """Walk a path from the root. NOT_FOUND, NOT_DIRECTORY, ACCESS, LOOP, NAME_TOO_LONG."""
        request = calls.ResolveRequest(caller=caller, path=path, follow=follow)
        return (await self._call(calls.RESOLVE, request)).inode

    async def resolve_parent(self, caller: Caller, path: bytes) -> tuple[Inode, bytes]:
        """Return the directory that holds the last name of a path, and that name."""
        request = calls.ResolveRequest(caller=caller, path=path, parent=True)
        answer = await self._call(calls.RESOLVE, request)
        return answer.inode, answer.name

    async def readdir(
        self, caller: Caller, inode: InodeId, after: bytes, limit: int, *, plus: bool = True
    ) -> ReaddirAnswer:
        """One page of a directory, in name order, after a name (b"" from the beginning)."""
        request = calls.ReaddirRequest(
            caller=caller, inode=inode, after=after, limit=limit, plus=plus
        )
        return await self._call(calls.READDIR, request)

    async def mknod(
        self,
        caller: Caller,
        parent: InodeId,
        name: bytes,
        mode: int,
        rdev: int = 0,
        *,
        umask: int = 0,
    ) -> Inode:
        """Make a directory (S_IFDIR in mode), fifo, socket, device or empty regular file.

        The umask counts where the directory has no default ACL.
        """
        request = calls.MknodRequest(
            caller=caller,
            request=self._request_id(),
            parent=parent,
            name=name,
            mode=mode,
            rdev=rdev,
            umask=umask,
        )
        return (await self._call(calls.MKNOD, request)).inode

    async def symlink(self, caller: Caller, parent: InodeId, name: bytes, target: bytes) -> Inode:
        """Make a symbolic link. EXISTS."""
        request = calls.SymlinkRequest(
            caller=caller, request=self._request_id(), parent=parent, name=name, target=target
        )
        return (await self._call(calls.SYMLINK, request)).inode

    async def link(self, caller: Caller, inode: InodeId, parent: InodeId, name: bytes) -> Inode:
        """Make a hard link to a non-directory. EXISTS, TOO_MANY_LINKS."""
        request = calls.LinkRequest(
            caller=caller, request=self._request_id(), inode=inode, parent=parent, name=name
        )
        return (await self._call(calls.LINK, request)).inode

    async def remove(
        self, caller: Caller, parent: InodeId, name: bytes, *, directory: bool
    ) -> None:
        """unlink(2), or rmdir(2) with `directory`. IS_DIRECTORY, NOT_DIRECTORY, NOT_EMPTY."""
        request = calls.RemoveRequest(
            caller=caller,
            request=self._request_id(),
            parent=parent,
            name=name,
            directory=directory,
        )
        await self._call(calls.REMOVE, request)

    async def rename(
        self,
        caller: Caller,
        parent: InodeId,
        name: bytes,
        new_parent: InodeId,
        new_name: bytes,
        flags: int = 0,
    ) -> None:
        """renameat2(2); flags 1 NOREPLACE, 2 EXCHANGE."""
        request = calls.RenameRequest(
            caller=caller,
            request=self._request_id(),
            parent=parent,
            name=name,
            new_parent=new_parent,
            new_name=new_name,
            flags=flags,
        )
        await self._call(calls.RENAME, request)

    # ------------------------------------------------------------ attributes

    async def getattr(self, inode: InodeId) -> Inode:
        """Attributes by id. NOT_FOUND once the inode is gone."""
        return (await self._call(calls.GETATTR, calls.GetattrRequest(inode=inode))).inode

    async def setattr(
        self,
        caller: Caller,
        inode: InodeId,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        length: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        session: SessionId = NO_SESSION,
        written: int = 0,
        truncate_version: int = 0,
    ) -> Inode:
        """Change attributes; None leaves one alone, -1 as a time means the server's clock."""
        request = calls.SetattrRequest(
            caller=caller,
            request=self._request_id(),
            inode=inode,
            mode=mode,
            uid=uid,
            gid=gid,
            length=length,
            atime_ns=atime_ns,
            mtime_ns=mtime_ns,
            session=session,
            written=written,
            truncate_version=truncate_version,
        )
        return (await self._call(calls.SETATTR, request)).inode

    async def getxattr(self, caller: Caller, inode: InodeId, name: bytes) -> bytes:
        """Value of an extended attribute. NO_ATTRIBUTE."""
        request = calls.XattrRequest(caller=caller, inode=inode, name=name)
        return (await self._call(calls.XATTR, request)).value

    async def listxattr(self, caller: Caller, inode: InodeId) -> tuple[bytes, ...]:
        """Names of the extended attributes."""
        request = calls.XattrRequest(caller=caller, inode=inode, name=b"")
        return (await self._call(calls.XATTR, request)).names

    async def setxattr(
        self, caller: Caller, inode: InodeId, name: bytes, value: bytes | None, flags: int = 0
    ) -> None:
        """Set one; value None removes it. Flags 1 XATTR_CREATE, 2 XATTR_REPLACE."""
        request = calls.SetXattrRequest(
            caller=caller,
            request=self._request_id(),
            inode=inode,
            name=name,
            value=value,
            flags=flags,
        )
        await self._call(calls.SET_XATTR, request)

    async def statfs(self, inode: InodeId = InodeId(0)) -> StatfsAnswer:  # noqa: B008
        """Space and inodes of the whole file system after replication, or of an inode's quota."""
        return await self._call(calls.STATFS, calls.StatfsRequest(inode))

    # ------------------------------------------------------------ open files

    async def create(
        self,
        caller: Caller,
        parent: InodeId,
        name: bytes,
        mode: int,
        *,
        session: SessionId,
        write: bool,
        read: bool = False,
        exclusive: bool = False,
        truncate: bool = False,
        umask: int = 0,
    ) -> calls.OpenAnswer:
        """Create and open a regular file, or open an existing one unless `exclusive` (EXISTS)."""
        request = calls.CreateRequest(
            caller=caller,
            request=self._request_id(),
            parent=parent,
            name=name,
            mode=mode,
            session=session,
            write=write,
            read=read,
            exclusive=exclusive,
            truncate=truncate,
            since=self._since(),
            umask=umask,
        )
        return self._opened(await self._call(calls.CREATE, request), write=write)

    async def open(
        self,
        caller: Caller,
        inode: InodeId,
        session: SessionId,
        *,
        read: bool,
        write: bool,
        truncate: bool = False,
    ) -> calls.OpenAnswer:
        """Open a regular file: permission is checked, a session recorded."""
        request = calls.OpenRequest(
            caller=caller,
            request=self._request_id(),
            inode=inode,
            session=session,
            read=read,
            write=write,
            truncate=truncate,
            since=self._since(),
        )
        return self._opened(await self._call(calls.OPEN, request), write=write)

    async def settle(
        self,
        inode: InodeId,
        session: SessionId,
        *,
        length: int | None = None,
        truncate_version: int = 0,
        mtime_ns: int | None = None,
        atime_ns: int | None = None,
        close: bool = False,
        durable: bool = False,
        torn: bool = False,
        want: int = 0,
        sparse: bool = False,
        content: bytes | None = None,
        inline_version: int = 0,
    ) -> Inode:
        """Report length, times or content of an open file; see SettleRequest. SUPERSEDED."""
        request = calls.SettleRequest(
            request=self._request_id(),
            inode=inode,
            session=session,
            length=length,
            truncate_version=truncate_version,
            mtime_ns=mtime_ns,
            atime_ns=atime_ns,
            close=close,
            durable=durable,
            torn=torn,
            want=want,
            sparse=sparse,
            content=content,
            inline_version=inline_version,
        )
        return self._opened(await self._call(calls.SETTLE, request), write=not close).inode

    def _opened(self, answer: Opened, *, write: bool) -> Opened:
        if write:
            self.rooms.note(answer.inode, answer.room, self._env.now_ns())
        return answer

    async def content(self, inode: InodeId) -> calls.OpenAnswer:
        """Fetch the content of an inline file with its inode. NOT_FOUND."""
        return await self._call(calls.CONTENT, calls.ContentRequest(inode=inode))

    async def promote(self, inode: InodeId) -> Inode:
        """Let an inline file have chunks, for good; returns it when that is stable. NOT_FOUND."""
        request = calls.PromoteRequest(request=self._request_id(), inode=inode)
        return (await self._call(calls.PROMOTE, request)).inode

    async def stable(self) -> None:
        """Make every metadata transaction so far stable (fsync of a directory, syncfs)."""
        await self._call(calls.STABLE, calls.StableRequest())

    # ------------------------------------------------------------ for fsck

    async def scan_records(
        self, start: bytes, stop: bytes, limit: int, *, values: bool = True
    ) -> calls.ScanRecordsAnswer:
        """A page of stored records of [start, stop)."""
        request = calls.ScanRecordsRequest(start=start, stop=stop, limit=limit, values=values)
        return await self._call(calls.SCAN_RECORDS, request)

    async def fetch_records(self, keys: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        """Stored records by key."""
        request = calls.FetchRecordsRequest(keys=keys)
        return (await self._call(calls.FETCH_RECORDS, request)).values

    async def census(self) -> calls.CensusAnswer:
        """Count inodes and look for sessions that should have ended."""
        return await self._call(calls.CENSUS, calls.CensusRequest())

    async def quota_census(self) -> quota_calls.QuotaCensusAnswer:
        """Count what counts for each quota."""
        return await self._call(quota_calls.QUOTA_CENSUS, quota_calls.QuotaCensusRequest())

    async def mend(self, mend: calls.Mend) -> None:
        """Perform one repair of the metadata. STALE if what was seen has changed."""
        request = calls.MendRequest(request=self._request_id(), mend=mend)
        await self._call(calls.MEND, request)

    # ------------------------------------------------------------ one call

    async def perform(self, method: Method[Request, Answer], request: Request) -> Answer:
        """Any other call of the metadata service, with the same patience."""
        return await self._call(method, request)

    def next_request(self) -> RequestId:
        """Name one mutating call."""
        return self._request_id()

    def _request_id(self) -> RequestId:
        self._sequence += 1
        return RequestId(client=self._client_id, sequence=self._sequence)

    async def _call(self, method: Method[Request, Answer], request: Request) -> Answer:
        """Try until an answer, an error for the application, or the deadline."""
        began_ns = self._env.now_ns()
        body, inode = method.encode_request(request), file_of(request)
        patience = Patience(
            self._env,
            self._routing,
            lambda: f"meta {method.name}",
            timeout_ns=self.deadline_ns,
            attempt_ns=self._attempt_ns,
            pause_first_ns=BACKOFF_FIRST_NS,
            pause_max_ns=BACKOFF_MAX_NS,
        )
        asked: tuple[NodeId, int] | None = None  # the server, and its life, of the last try
        helpless: set[NodeId] = set()
        while True:
            snapshot = self._routing.snapshot
            node = self._servers.choose(snapshot, inode, helpless)
            try:
                if node is None:
                    raise EmberfsError(Code.UNREACHABLE, "no meta server is registered")
                now_asked = (node, snapshot.nodes[node].incarnation)
                if asked is not None and asked != now_asked:
                    request = _sent_elsewhere(request)
                    body = method.encode_request(request)
                asked = now_asked
                reply = await self._nodes.call(
                    node, method.number, body, timeout_ns=patience.attempt_ns()
                )
                answer = method.decode_answer(reply.body)
                self._servers.answered(node)
                metrics.META_SECONDS.observe((self._env.now_ns() - began_ns) / SECOND)
                return answer
            except EmberfsError as problem:
                if problem.reaction == Reaction.GIVE_UP and node is not None:
                    self._servers.answered(node)
                patience.note(problem)
                metrics.RETRIES.labels(problem.code.name).inc()
                if node is not None:
                    self._note_failure(snapshot, node, problem, helpless)
                await patience.pause(problem, snapshot.version)

    def _note_failure(
        self,
        snapshot: RoutingSnapshot,
        node: NodeId,
        problem: EmberfsError,
        helpless: set[NodeId],
    ) -> None:
        """Turn from a server that does not answer; for this call, from one that cannot."""
        if problem.reaction == Reaction.FAILOVER:
            self._servers.failed(snapshot, node)
        elif problem.reaction == Reaction.REFRESH:
            helpless.add(node)
            if all(n.id in helpless for n in snapshot.nodes_of(NodeKind.META) if n.alive):
                helpless.clear()


def _sent_elsewhere(request: Request) -> Request:
    """Mark a mutating call: a copy of it may be on its way at another server, or in another life.

    Whoever performs it then remembers its outcome for all, whatever that is (meta/replies.py).
    """
    wanted: RequestId | None = getattr(request, "request", None)
    if wanted is None or wanted.elsewhere:
        return request
    marked = msgspec.structs.replace(wanted, elsewhere=True)
    return msgspec.structs.replace(request, request=marked)
