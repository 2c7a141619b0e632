"""Fakes for the tests of the client's data path: storage and meta on dicts, over the real fabric.

All replicas of a chain share one dict of chunks, so replication itself is out of the picture. Every
node can be told to fail in the ways a client must survive.
"""

import asyncio
import contextlib
import stat
from collections import Counter, deque
from collections.abc import Callable

import msgspec

from emberfs.client.chunkio import ChunkIO
from emberfs.client.metadata import Metadata
from emberfs.client.openfile import OpenFiles
from emberfs.fabric.pool import PeerPool
from emberfs.fabric.server import Server
from emberfs.proto import batch_calls as bc
from emberfs.proto import meta_calls as mc
from emberfs.proto import storage_calls as sc
from emberfs.proto.cluster import (
    EMPTY_ROUTING,
    Chain,
    ChainTarget,
    Node,
    NodeKind,
    PublicState,
    RoutingSnapshot,
)
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.files import DirectoryEntry, Inode, Layout
from emberfs.proto.ids import KiB, pack_chunk_id, unpack_chunk_id
from emberfs.runtime.checksum import crc32c
from emberfs.runtime.real import RealEnv

CHUNK = 64 * KiB
META_NODE = 50


class FakeRouting:
    """A routing snapshot that the test changes by hand."""

    def __init__(self):
        self.snapshot = EMPTY_ROUTING
        self.callbacks = []
        self._newer = asyncio.Event()

    async def wait_newer(self, than, timeout_ns):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ns / 1e9):
                while self.snapshot.version <= than:
                    await self._newer.wait()
        return self.snapshot.version > than

    def subscribe(self, callback):
        self.callbacks.append(callback)

    def publish(self, nodes=None, chains=None):
        self.snapshot = RoutingSnapshot(
            cluster="test",
            version=self.snapshot.version + 1,
            nodes=dict(nodes if nodes is not None else self.snapshot.nodes),
            chains=dict(chains if chains is not None else self.snapshot.chains),
            targets={},
        )
        self._newer.set()
        self._newer = asyncio.Event()
        for callback in self.callbacks:
            callback(self.snapshot)


class FakeNode:
    """A server with faults. Subclasses fill `handlers`."""

    def __init__(self, env, node_id, kind):
        self.env = env
        self.id = node_id
        self.kind = kind
        self.refuse = deque()  # codes that the next calls get instead of an answer
        self.lose_replies = (
            0  # the next calls are performed, the connection breaks before the reply
        )
        self.hang = False  # accept, never answer
        self.delay_s = 0.0
        self.calls = []
        self.server = None
        self.endpoint = ""
        self.incarnation = 0
        self.handlers = {}

    async def start(self, endpoint="tcp://127.0.0.1:0"):
        wrapped = {number: self._wrap(handler) for number, handler in self.handlers.items()}
        self.server = Server(self.env, wrapped, name=f"fake-{self.id}")
        self.endpoint = await self.server.listen(endpoint)
        self.incarnation += 1

    async def stop(self):
        if self.server is not None:
            await self.server.close()
            self.server = None

    def record(self, alive=True):
        return Node(
            id=self.id,
            kind=self.kind,
            host="here",
            endpoints=(self.endpoint,),
            incarnation=self.incarnation,
            alive=alive,
        )

    def _wrap(self, handler):
        async def wrapped(call):
            self.calls.append(call.method)
            if self.hang:
                await asyncio.sleep(3600)
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if self.refuse:
                raise EmberfsError(self.refuse.popleft(), "injected")
            body = handler(call)
            if asyncio.iscoroutine(body):
                body = await body
            if self.lose_replies:
                self.lose_replies -= 1
                server, self.server = self.server, None
                address = "tcp://" + self.endpoint.removeprefix("tcp://")

                async def restart():
                    await server.close()
                    await self.start(address)

                self.restarting = asyncio.ensure_future(restart())
                await asyncio.sleep(3600)
            return body

        return wrapped


class FakeStorage(FakeNode):
    def __init__(self, env, node_id, world):
        super().__init__(env, node_id, NodeKind.STORAGE)
        self.world = world
        self.tags = []  # of UPDATEs in order of arrival
        self.flushed = []
        self.read_codes = deque()  # code for the next single read operations
        self.handlers = {
            sc.READ_BATCH: self.read,
            sc.UPDATE.number: self.update,
            sc.LIST.number: self.list,
            sc.FLUSH.number: self.flush,
        }

    def _chain(self, target, version=None):
        for chain in self.world.routing.snapshot.chains.values():
            if chain.member(target) is not None:
                if version is not None and version != chain.version:
                    raise EmberfsError(Code.CHAIN_VERSION, f"{version} is not {chain.version}")
                return chain
        raise EmberfsError(Code.NOT_SERVING, "no chain")

    def read(self, call):
        results = []
        for place, op in enumerate(sc.unpack_read_ops(call.body)):
            try:
                self._chain(op.target, op.chain_version)
                if self.read_codes:
                    raise EmberfsError(self.read_codes.popleft(), "injected")
            except EmberfsError as problem:
                results.append(sc.ReadResult(problem.code, 0, 0))
                continue
            chunk = self.world.chunks.get(op.chunk, b"")
            part = bytes(chunk[op.offset : op.offset + op.length])
            call.sinks[place][: len(part)] = part
            call.fill(place, len(part))
            results.append(sc.ReadResult(0, len(part), 1))
        return sc.pack_read_results(results)

    async def update(self, call):
        request = sc.UPDATE.decode_request(call.body)
        self.tags.append(request.tag)
        chain = self._chain(request.target, request.chain_version)
        if chain.head().target != request.target:
            raise EmberfsError(Code.NOT_HEAD, "not the head")
        key = (request.chunk, request.tag.client, request.tag.channel)
        seen = self.world.remembered.get(key, 0)
        if request.tag.sequence < seen:
            raise EmberfsError(Code.SUPERSEDED, "older than what was done")
        assert request.chunk not in self.world.busy, "two updates of a chunk at the same time"
        self.world.busy.add(request.chunk)
        try:
            if self.world.update_delay_s:
                await asyncio.sleep(self.world.update_delay_s())
            if request.tag.sequence > seen:
                self.apply(request, call)
                self.world.remembered[key] = request.tag.sequence
        finally:
            self.world.busy.discard(request.chunk)
        length = len(self.world.chunks.get(request.chunk, b""))
        return sc.UPDATE.encode_answer(sc.UpdateAnswer(1, length, chain.version))

    def apply(self, request, call):
        world = self.world
        world.applied += 1
        if request.kind == sc.UpdateKind.REMOVE:
            world.chunks.pop(request.chunk, None)
            return
        chunk = world.chunks.setdefault(request.chunk, bytearray())
        if request.kind == sc.UpdateKind.TRUNCATE:
            del chunk[request.length :]
            chunk.extend(bytes(request.length - len(chunk)))
            return
        data = bytes(call.sources[0].view)
        assert len(data) == request.length
        assert crc32c(data) == request.checksum
        assert request.offset + request.length <= request.chunk_bytes
        if len(chunk) < request.offset:
            chunk.extend(bytes(request.offset - len(chunk)))
        chunk[request.offset : request.offset + len(data)] = data
        world.sizes.append(len(data))

    def list(self, call):
        request = sc.LIST.decode_request(call.body)
        chain = self._chain(request.target)
        found = [
            sc.ChunkRow(chunk, 1, 0, len(data), 0)
            for chunk, data in sorted(self.world.chunks.items())
            if request.start <= chunk
            and (not request.stop or chunk < request.stop)
            and self.world.chain_of(chunk) == chain.id
        ]
        rows = tuple(found[: request.limit])
        more = rows[-1].chunk + b"\0" if len(found) > len(rows) else b""
        return sc.LIST.encode_answer(sc.ListAnswer(rows, more))

    def flush(self, call):
        request = sc.FLUSH.decode_request(call.body)
        self.flushed.append(request.targets)
        lost = tuple(self._chain(target).lost for target in request.targets)
        return sc.FLUSH.encode_answer(sc.FlushAnswer(request.targets, lost))


class FakeMeta(FakeNode):
    """Inodes and names in dicts; enough of the rules for the client's tests."""

    def __init__(self, env, world, node_id=META_NODE):
        super().__init__(env, node_id, NodeKind.META)
        self.world = world
        self.inodes = {1: self._new(1, stat.S_IFDIR | 0o755, None)}
        self.names = {}
        self.xattrs = {}
        self.sessions = Counter()
        self.requests = {}  # RequestId -> remembered answer
        self.settled = []
        self.quota_bytes = None
        self.next = 2
        self.inline_bytes_max = 0
        self.contents = {}  # of inline files
        self.before = lambda method, request: None  # may raise
        self.versions = 0
        methods = {
            mc.LOOKUP: self.lookup,
            mc.RESOLVE: self.resolve,
            mc.GETATTR: lambda r: mc.InodeAnswer(self.get(r.inode)),
            mc.SETATTR: self.setattr,
            mc.CREATE: self.create,
            mc.MKNOD: self.mknod,
            mc.SYMLINK: self.symlink,
            mc.LINK: self.link,
            mc.REMOVE: self.remove,
            mc.RENAME: self.rename,
            mc.OPEN: self.open,
            mc.SETTLE: self.settle,
            mc.READDIR: self.readdir,
            mc.XATTR: self.xattr,
            mc.SET_XATTR: self.set_xattr,
            mc.STATFS: lambda r: mc.StatfsAnswer(1 << 40, 1 << 39, len(self.inodes)),
            mc.STABLE: lambda r: mc.Nothing(),
            mc.CONTENT: lambda r: self.opened(self.get(r.inode)),
            mc.PROMOTE: self.promote,
            bc.BATCH_STAT: self.batch_stat,
            bc.BATCH_CREATE: self.batch_create,
        }
        self.handlers = {m.number: self._typed(m, f) for m, f in methods.items()}

    def _typed(self, method, function):
        def handle(call):
            request = method.decode_request(call.body)
            key = getattr(request, "request", None)
            if key is not None and key in self.requests:
                return self.requests[key]
            self.before(method, request)
            body = method.encode_answer(function(request))
            if key is not None:
                self.requests[key] = body
            return body

        return handle

    def _new(self, number, mode, layout, **more):
        return Inode(number, mode, 0, 0, 1, 0, 0, 0, 0, layout=layout, **more)

    def get(self, number):
        if number not in self.inodes:
            raise EmberfsError(Code.NOT_FOUND, f"inode {number}")
        return self.inodes[number]

    def find(self, parent, name):
        number = self.names.get((parent, name))
        if number is None:
            raise EmberfsError(Code.NOT_FOUND, f"{name!r}")
        return self.inodes[number]

    def change(self, number, **fields):
        self.inodes[number] = msgspec.structs.replace(self.get(number), **fields)
        return self.inodes[number]

    def add(self, parent, name, mode, **more):
        if (parent, name) in self.names:
            raise EmberfsError(Code.EXISTS, f"{name!r}")
        number, self.next = self.next, self.next + 1
        layout = self.world.layout if stat.S_ISREG(mode) else None
        if self.inline_bytes_max and layout is not None:
            self.versions += 1
            more |= {"inline": True, "inline_version": self.versions}
        self.inodes[number] = self._new(number, mode, layout, **more)
        self.names[parent, name] = number
        return self.inodes[number]

    def lookup(self, r):
        return mc.InodeAnswer(self.find(r.parent, r.name))

    def resolve(self, r):
        names = [n for n in r.path.split(b"/") if n]
        at = self.inodes[1]
        last = b""
        if r.parent and names:
            last = names.pop()
        for name in names:
            at = self.find(at.id, name)
            while at.is_symlink() and (r.follow or name is not names[-1]):
                at = self.find(1, at.symlink)
        return mc.ResolveAnswer(at, last)

    def cut(self, number, length):
        inode = self.get(number)
        if inode.inline:
            self.versions += 1
            self.contents[number] = self.contents.get(number, b"")[:length]
            return self.change(number, length=length, inline_version=self.versions)
        if length < inode.length:
            for chunk in list(self.world.chunks):
                owner, index = unpack_chunk_id(chunk)
                if owner == (inode.layout.data or number):
                    keep = max(0, length - index * self.world.layout.chunk_bytes)
                    del self.world.chunks[chunk][keep:]
            return self.change(number, length=length, truncate_version=inode.truncate_version + 1)
        return self.change(number, length=length)

    def setattr(self, r):
        if r.length is not None:
            self.cut(r.inode, r.length)
        fields = {}
        inode = self.get(r.inode)
        if r.mode is not None:
            fields["mode"] = stat.S_IFMT(inode.mode) | r.mode
        for name in ("uid", "gid", "atime_ns", "mtime_ns"):
            if getattr(r, name) is not None:
                fields[name] = getattr(r, name)
        return mc.InodeAnswer(self.change(r.inode, **fields))

    def create(self, r):
        number = self.names.get((r.parent, r.name))
        if number is None:
            inode = self.add(r.parent, r.name, stat.S_IFREG | r.mode & ~r.umask)
        elif r.exclusive:
            raise EmberfsError(Code.EXISTS, f"{r.name!r}")
        else:
            inode = self.cut(number, 0) if r.truncate else self.get(number)
        self.sessions[inode.id, r.session] += 1
        return self.opened(inode)

    def batch_stat(self, r):
        def row(path):
            try:
                return bc.StatRow(self.resolve(mc.ResolveRequest(r.caller, path, r.follow)).inode)
            except EmberfsError as problem:
                return bc.StatRow(None, bc.outcome_of(problem))

        return bc.BatchStatAnswer(tuple(map(row, r.paths)))

    def batch_create(self, r):
        def make(item):
            if len(item.content) > self.inline_bytes_max:
                return bc.Outcome(bc.ORDINARY)
            try:
                at = self.resolve(mc.ResolveRequest(r.caller, item.path, parent=True))
                inode = self.add(at.inode.id, at.name, stat.S_IFREG | r.mode & ~r.umask)
            except EmberfsError as problem:
                return bc.outcome_of(problem)
            self.contents[inode.id] = item.content
            self.change(inode.id, length=len(item.content))
            return bc.Outcome()

        return bc.BatchCreateAnswer(tuple(map(make, r.items)))

    def opened(self, inode):
        content = self.contents.get(inode.id, b"") if inode.inline else None
        return mc.OpenAnswer(inode, content, self.inline_bytes_max, self.room())

    def promote(self, r):
        inode = self.get(r.inode)
        if inode.inline:
            data, self.next = self.next, self.next + 1
            content = self.contents.pop(inode.id, b"")
            if content:
                self.world.chunks[pack_chunk_id(data, 0)] = bytearray(content)
            layout = msgspec.structs.replace(inode.layout, data=data)
            inode = self.change(inode.id, inline=False, layout=layout)
        return mc.InodeAnswer(inode)

    def mknod(self, r):
        return mc.InodeAnswer(self.add(r.parent, r.name, r.mode & ~r.umask))

    def symlink(self, r):
        mode = stat.S_IFLNK | 0o777
        return mc.InodeAnswer(self.add(r.parent, r.name, mode, symlink=r.target))

    def link(self, r):
        self.names[r.parent, r.name] = r.inode
        return mc.InodeAnswer(self.change(r.inode, nlink=self.get(r.inode).nlink + 1))

    def remove(self, r):
        inode = self.find(r.parent, r.name)
        if r.directory and any(p == inode.id for p, _ in self.names):
            raise EmberfsError(Code.NOT_EMPTY, f"{r.name!r}")
        if r.directory != inode.is_directory():
            code = Code.NOT_DIRECTORY if r.directory else Code.IS_DIRECTORY
            raise EmberfsError(code, f"{r.name!r}")
        del self.names[r.parent, r.name]
        return mc.Nothing()

    def rename(self, r):
        self.names[r.new_parent, r.new_name] = self.find(r.parent, r.name).id
        del self.names[r.parent, r.name]
        return mc.Nothing()

    def open(self, r):
        inode = self.cut(r.inode, 0) if r.truncate else self.get(r.inode)
        self.sessions[r.inode, r.session] += 1
        return self.opened(inode)

    def room(self, want=0):
        """All files are under one quota, if any."""
        if self.quota_bytes is None:
            return None
        left = max(0, self.quota_bytes - sum(inode.length for inode in self.inodes.values()))
        return min(left, max(left // 8, 4096, want))

    def settle(self, r):
        self.settled.append(r)
        inode = self.get(r.inode)
        fields = {}
        if r.content is not None:
            if not inode.inline or r.inline_version < inode.inline_version:
                raise EmberfsError(Code.SUPERSEDED, f"inode {inode.id}")
            self.versions += 1
            self.contents[inode.id] = r.content
            fields |= {"length": r.length, "inline_version": self.versions}
        elif r.length is not None and r.truncate_version == inode.truncate_version:
            fields["length"] = max(inode.length, r.length)
        if fields.get("length", inode.length) != inode.length or r.mtime_ns is not None:
            fields["mtime_ns"] = 777 if r.mtime_ns is None else r.mtime_ns
        if r.close:
            del self.sessions[r.inode, r.session]
        return mc.InodeAnswer(self.change(r.inode, **fields), self.room(r.want))

    def readdir(self, r):
        found = sorted(n for p, n in self.names if p == r.inode and n > r.after)
        rows = []
        for name in found[: r.limit]:
            inode = self.find(r.inode, name)
            entry = DirectoryEntry(name, inode.id, stat.S_IFMT(inode.mode))
            rows.append(mc.ReaddirRow(entry.name, entry.inode, entry.mode, inode))
        return mc.ReaddirAnswer(tuple(rows), len(found) > r.limit)

    def xattr(self, r):
        mine = self.xattrs.get(r.inode, {})
        if r.name:
            if r.name not in mine:
                raise EmberfsError(Code.NO_ATTRIBUTE, f"{r.name!r}")
            return mc.XattrAnswer(value=mine[r.name])
        return mc.XattrAnswer(names=tuple(sorted(mine)))

    def set_xattr(self, r):
        mine = self.xattrs.setdefault(r.inode, {})
        if r.value is None:
            mine.pop(r.name, None)
        else:
            mine[r.name] = r.value
        return mc.Nothing()


class World:
    """Storage nodes 1..n, one meta server, and `chains` chains over all storage nodes."""

    def __init__(self, *, nodes=3, chains=2, chunk_bytes=CHUNK):
        self.env = RealEnv()
        self.routing = FakeRouting()
        self.chunks = {}
        self.remembered = {}
        self.busy = set()
        self.applied = 0
        self.sizes = []  # of applied writes
        self.update_delay_s: Callable[[], float] | None = None
        self.layout = Layout(chunk_bytes, tuple(range(1, chains + 1)))
        self.storage = [FakeStorage(self.env, n, self) for n in range(1, nodes + 1)]
        self.meta = FakeMeta(self.env, self)
        self.peers = PeerPool(self.env)
        self.clients = []

    def chain_of(self, chunk):
        _, index = unpack_chunk_id(chunk)
        return self.layout.chains[index % len(self.layout.chains)]

    async def start(self, endpoint=None):
        for node in (*self.storage, self.meta):
            await node.start(endpoint(node) if endpoint else "tcp://127.0.0.1:0")
        chains = {
            chain: Chain(
                chain,
                1,
                tuple(
                    ChainTarget(node.id * 100 + chain, node.id, PublicState.SERVING)
                    for node in self.storage
                ),
            )
            for chain in self.layout.chains
        }
        self.routing.publish({n.id: n.record() for n in (*self.storage, self.meta)}, chains)

    def republish(self, lost=(), *, blackout=False):
        """Publish the nodes as they are; those `lost` are dead and at the end of every chain.

        After a `blackout` the chains have lost what was not flushed.
        """
        chains = {}
        for chain in self.routing.snapshot.chains.values():
            alive = [t for t in chain.targets if t.node not in lost]
            dead = [
                ChainTarget(t.target, t.node, PublicState.OFFLINE)
                for t in chain.targets
                if t.node in lost
            ]
            version = chain.version + 1
            since = version if blackout else chain.lost
            chains[chain.id] = Chain(chain.id, version, tuple(alive + dead), since)
        nodes = {n.id: n.record(n.id not in lost) for n in (*self.storage, self.meta)}
        self.routing.publish(nodes, chains)

    def head(self, chain=1):
        head = self.routing.snapshot.chains[chain].head()
        return self.storage[head.node - 1]

    def client(self, number=7, **more):
        chunkio = ChunkIO(self.env, self.routing, self.peers, number)
        metadata = Metadata(self.env, self.routing, self.peers, number)
        files = OpenFiles(self.env, chunkio, metadata, **more)
        self.clients.append(files)
        return files

    def content(self, inode, length):
        """What storage holds of a file."""
        out = bytearray(length)
        known = self.meta.inodes.get(inode)
        if known is not None and known.inline:
            kept = self.meta.contents.get(inode, b"")[:length]
            return kept + bytes(length - len(kept))
        if known is not None and known.layout is not None:
            inode = known.layout.data or inode
        for chunk, data in self.chunks.items():
            owner, index = unpack_chunk_id(chunk)
            start = index * self.layout.chunk_bytes
            if owner == inode and start < length:
                part = data[: length - start]
                out[start : start + len(part)] = part
        return bytes(out)

    async def close(self):
        for files in self.clients:
            await files.close()
        await self.peers.close()
        for node in (*self.storage, self.meta):
            await node.stop()


def run(test, *, timeout_s=20, endpoint=None, **world):
    """Run `test(world)` in a fresh world, bounded in time."""

    async def main():
        async with asyncio.timeout(timeout_s):
            made = World(**world)
            await made.start(endpoint)
            try:
                await test(made)
            finally:
                await made.close()

    asyncio.run(main())
