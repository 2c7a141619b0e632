"""A metadata load with a model: every answer is known beforehand, and so is the tree in the end.

The handlers of a real metadata server, in this process, on any engine. Callers behave as clients
do: what fails for a while is sent again under the same number, and now and then a request is sent
twice, as if an answer had been late.
"""

import asyncio
import random
import stat
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from emberfs.kv.transactions import Engine
from emberfs.meta.context import Context, Policy
from emberfs.meta.dispatch import handlers
from emberfs.meta.format import open_file_system
from emberfs.proto import meta_calls as calls
from emberfs.proto.errors import Code, EmberfsError, Reaction
from emberfs.proto.ids import ROOT_INODE, InodeId, SessionId
from emberfs.proto.method import Method
from emberfs.runtime.real import RealEnv
from unit.meta_world import CHUNK, FakeChunks, make_snapshot

WHO = calls.Caller(0, 0)
CALL_TIMEOUT_S = 3.0
GIVE_UP_S = 60.0


@dataclass
class File:
    """What the model knows of an inode."""

    inode: InodeId
    mode: int
    links: int = 1


@dataclass
class Directory:
    """A directory of the model."""

    inode: InodeId
    names: dict[bytes, File] = field(default_factory=dict)


class _Call:
    peer = "load"

    def __init__(self, body: bytes) -> None:
        self.body = body


class Server:
    """A metadata server without sockets."""

    def __init__(self, engine: Engine) -> None:
        env, routing = RealEnv(), make_snapshot()
        self.engine = engine
        self.context = Context(env, engine, FakeChunks(), lambda: routing, Policy(CHUNK, 16))
        self._table = handlers(self.context)
        self.retried = 0
        self.slowest_s = 0.0

    async def start(self) -> None:
        await open_file_system(self.engine, "load", uid=0, gid=0, now_ns=time.time_ns())
        await self.context.load()
        self.context.start()

    async def call(self, method: Method[Any, Any], request: msgspec.Struct) -> Any:
        """Call as a client does. EmberfsError if the answer is one that a client gives up on."""
        body = method.encode_request(request)
        began = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    answer = await self._table[method.number](_Call(body))  # type: ignore[arg-type]
                    return method.decode_answer(answer)
            except TimeoutError:
                problem = EmberfsError(Code.TIMEOUT)
            except EmberfsError as found:
                if found.reaction == Reaction.GIVE_UP:
                    raise
                problem = found
            finally:
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.retried += 1
            assert time.monotonic() - began < GIVE_UP_S, f"{method.name}: {problem}"
            await asyncio.sleep(0.05)

    async def twice(self, method: Method[Any, Any], request: msgspec.Struct) -> Any:
        """Send a request a second time while the first is on its way; both get one answer."""
        both = await asyncio.gather(
            self.call(method, request), self.call(method, request), return_exceptions=True
        )
        for answer in both:
            if isinstance(answer, BaseException) and not isinstance(answer, EmberfsError):
                raise answer
        first, second = (str(answer) for answer in both)
        assert first == second, f"{method.name}: {first} / {second}"
        if isinstance(both[0], EmberfsError):
            raise both[0]
        return both[0]


class Worker:
    """One client with names of its own, in a directory of its own and in one that all share."""

    def __init__(self, server: Server, number: int, shared: Directory) -> None:
        self._server = server
        self._number = number
        self._dice = random.Random(number)
        self._sequence = 0
        self._names = 0
        self._shared = shared
        self.own = Directory(InodeId(0))
        self.mine: dict[tuple[int, bytes], File] = {}  # by directory and name
        self.subdirectories: dict[bytes, InodeId] = {}
        self.done = 0

    def _rid(self) -> calls.RequestId:
        self._sequence += 1
        return calls.RequestId(1000 + self._number, self._sequence)

    async def _ask(self, method: Method[Any, Any], request: msgspec.Struct) -> Any:
        self.done += 1
        ask = self._server.twice if self._dice.random() < 0.05 else self._server.call
        return await ask(method, request)

    async def _refused(self, code: Code, method: Method[Any, Any], request: Any) -> None:
        try:
            answer = await self._ask(method, request)
        except EmberfsError as problem:
            answer = problem
        found = answer.code if isinstance(answer, EmberfsError) else None
        assert found == code, f"{method.name}: {answer}, not {code.name}"

    def _new_name(self) -> bytes:
        self._names += 1
        return b"w%d-%d" % (self._number, self._names)

    def _place(self) -> Directory:
        return self._shared if self._dice.random() < 0.3 else self.own

    async def start(self) -> None:
        name = b"own%d" % self._number
        mode = stat.S_IFDIR | 0o755
        request = calls.MknodRequest(WHO, self._rid(), InodeId(ROOT_INODE), name, mode)
        self.own.inode = (await self._ask(calls.MKNOD, request)).inode.id

    async def step(self) -> None:
        acts = [self._create, self._make, self._mkdir, self._make]
        if self.mine:
            acts += [self._link, self._rename, self._remove, self._chmod, self._again, self._look]
        if self.subdirectories:
            acts += [self._rmdir, self._full]
        await self._dice.choice(acts)()

    def _choose(self) -> tuple[int, bytes]:
        return self._dice.choice(list(self.mine))

    async def _make(self) -> None:
        place, name = self._place(), self._new_name()
        mode = stat.S_IFREG | 0o644
        request = calls.MknodRequest(WHO, self._rid(), place.inode, name, mode)
        inode = (await self._ask(calls.MKNOD, request)).inode
        self.mine[place.inode, name] = File(inode.id, 0o644)

    async def _create(self) -> None:
        place, name, session = self._place(), self._new_name(), SessionId(self._sequence + 1)
        request = calls.CreateRequest(
            WHO, self._rid(), place.inode, name, 0o600, session, write=True, exclusive=True
        )
        inode = (await self._ask(calls.CREATE, request)).inode
        await self._ask(
            calls.SETTLE, calls.SettleRequest(self._rid(), inode.id, session, close=True)
        )
        self.mine[place.inode, name] = File(inode.id, 0o600)

    async def _mkdir(self) -> None:
        name = self._new_name()
        mode = stat.S_IFDIR | 0o755
        request = calls.MknodRequest(WHO, self._rid(), self.own.inode, name, mode)
        self.subdirectories[name] = (await self._ask(calls.MKNOD, request)).inode.id

    async def _rmdir(self) -> None:
        name = self._dice.choice(list(self.subdirectories))
        request = calls.RemoveRequest(WHO, self._rid(), self.own.inode, name, directory=True)
        await self._ask(calls.REMOVE, request)
        del self.subdirectories[name]

    async def _full(self) -> None:
        """A directory with a name in it cannot be removed."""
        name, inode = self._dice.choice(list(self.subdirectories.items()))
        mode = stat.S_IFREG | 0o644
        await self._ask(calls.MKNOD, calls.MknodRequest(WHO, self._rid(), inode, b"x", mode))
        remove = calls.RemoveRequest(WHO, self._rid(), self.own.inode, name, directory=True)
        await self._refused(Code.NOT_EMPTY, calls.REMOVE, remove)
        inside = calls.RemoveRequest(WHO, self._rid(), inode, b"x", directory=False)
        await self._ask(calls.REMOVE, inside)

    async def _link(self) -> None:
        file = self.mine[self._choose()]
        place, name = self._place(), self._new_name()
        await self._ask(
            calls.LINK, calls.LinkRequest(WHO, self._rid(), file.inode, place.inode, name)
        )
        file.links += 1
        self.mine[place.inode, name] = file

    async def _rename(self) -> None:
        parent, name = self._choose()
        place, new = self._place(), self._new_name()
        request = calls.RenameRequest(WHO, self._rid(), InodeId(parent), name, place.inode, new)
        await self._ask(calls.RENAME, request)
        self.mine[place.inode, new] = self.mine.pop((parent, name))

    async def _remove(self) -> None:
        parent, name = self._choose()
        request = calls.RemoveRequest(WHO, self._rid(), InodeId(parent), name, directory=False)
        await self._ask(calls.REMOVE, request)
        self.mine.pop((parent, name)).links -= 1
        again = calls.RemoveRequest(WHO, self._rid(), InodeId(parent), name, directory=False)
        await self._refused(Code.NOT_FOUND, calls.REMOVE, again)

    async def _chmod(self) -> None:
        file = self.mine[self._choose()]
        mode = self._dice.randrange(0o1000)
        await self._ask(
            calls.SETATTR, calls.SetattrRequest(WHO, self._rid(), file.inode, mode=mode)
        )
        file.mode = mode

    async def _again(self) -> None:
        parent, name = self._choose()
        mode = stat.S_IFREG | 0o644
        request = calls.MknodRequest(WHO, self._rid(), InodeId(parent), name, mode)
        await self._refused(Code.EXISTS, calls.MKNOD, request)

    async def _look(self) -> None:
        key = self._choose()
        request = calls.LookupRequest(WHO, InodeId(key[0]), key[1])
        inode = (await self._ask(calls.LOOKUP, request)).inode
        file = self.mine[key]
        found = (inode.id, stat.S_IMODE(inode.mode), inode.nlink)
        assert found == (file.inode, file.mode, file.links), f"{key}: {inode} is not {file}"


class Load:
    """`workers` clients that take steps until `steps` are done by each."""

    def __init__(self, server: Server, workers: int, steps: int) -> None:
        self.server = server
        self._steps = steps
        self.shared = Directory(InodeId(0))
        self.workers = [Worker(server, number, self.shared) for number in range(workers)]
        self.half = asyncio.Event()  # set when half of the steps are done
        self.seconds = 0.0

    @property
    def calls(self) -> int:
        return sum(worker.done for worker in self.workers)

    async def run(self) -> None:
        mode = stat.S_IFDIR | 0o755
        made = calls.MknodRequest(WHO, calls.RequestId(1, 1), InodeId(ROOT_INODE), b"shared", mode)
        self.shared.inode = (await self.server.call(calls.MKNOD, made)).inode.id
        began, taken = time.monotonic(), 0

        async def one(worker: Worker) -> None:
            nonlocal taken
            await worker.start()
            for _ in range(self._steps):
                await worker.step()
                taken += 1
                if taken >= len(self.workers) * self._steps // 2:
                    self.half.set()

        async with asyncio.TaskGroup() as group:
            for worker in self.workers:
                group.create_task(one(worker))
        self.seconds = time.monotonic() - began

    async def check(self, server: Server) -> None:
        """Compare the tree with the model, through any server on the same store."""
        expected: dict[int, dict[bytes, tuple[int, int, int]]] = {self.shared.inode: {}}
        inodes = {ROOT_INODE, self.shared.inode}
        for worker in self.workers:
            names = expected.setdefault(worker.own.inode, {})
            inodes.add(worker.own.inode)
            for name, inode in worker.subdirectories.items():
                names[name] = (inode, 0o755, 2)
                expected[inode] = {}
                inodes.add(inode)
            for (parent, name), file in worker.mine.items():
                expected[parent][name] = (file.inode, file.mode, file.links)
                inodes.add(file.inode)
        for directory, names in expected.items():
            assert await self._names(server, directory) == names
        counted = (await server.call(calls.STATFS, calls.StatfsRequest())).inodes
        assert counted == len(inodes)

    async def _names(self, server: Server, directory: int) -> dict[bytes, tuple[int, int, int]]:
        found: dict[bytes, tuple[int, int, int]] = {}
        after = b""
        while True:
            request = calls.ReaddirRequest(WHO, InodeId(directory), after, 50)
            answer = await server.call(calls.READDIR, request)
            for row in answer.rows:
                assert row.inode is not None
                assert row.name not in found
                found[row.name] = (row.id, stat.S_IMODE(row.inode.mode), row.inode.nlink)
            if not answer.more:
                return found
            after = answer.rows[-1].name
