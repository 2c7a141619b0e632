"""Meta and the library against a small POSIX tree: answers, errnos, every attribute of everything.

Three users, two clients, three names; the server dies before and after any call. Long form:
EMBERFS_MODEL_EXAMPLES=20000 pytest tests/unit/test_meta_model.py
"""

import asyncio
import errno
import os
import stat
from collections.abc import Awaitable, Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from emberfs.client.file import File
from emberfs.client.oserrors import translated
from emberfs.proto.meta_calls import Caller
from unit.model_world import CLIENTS, FATES, FLAGS, ModelWorld, model_attributes, show_model
from unit.posix_model import EXCHANGE, NOREPLACE, Node, Refused, Tree, User

IS_LONG = "EMBERFS_MODEL_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("EMBERFS_MODEL_EXAMPLES", "300"))
STEPS = 40

ROOT = User(0, 0)
ALICE = User(1000, 1000, (50,))
BOB = User(2000, 2000, (50,))

users = st.sampled_from((ROOT, ALICE, BOB))
clients = st.integers(0, len(CLIENTS) - 1)
# A path: any, or one of those that exist; for new names also a name in an existing directory.
_any = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda n: "/" + "/".join(n))
_existing = st.integers(0, 60)
paths = st.one_of(_existing, _existing, _existing, _any)
news = st.one_of(_any, _existing, st.tuples(_existing, st.sampled_from("abc")))
Pick = str | int | tuple[int, str]
modes = st.sampled_from((0o777, 0o755, 0o700, 0o1777, 0o2775, 0o2757, 0o6755, 0o644, 0o070, 0o2644))
directory_modes = st.sampled_from((0o777, 0o777, 0o755, 0o1777, 0o2777, 0o700))
targets = st.sampled_from(("a", "b", "/a", "/b/c", "c/a"))
fates = st.one_of(st.just(()), st.lists(st.sampled_from(FATES), max_size=2).map(tuple))
owners = st.sampled_from((-1, 0, 1000, 2000))
groups = st.sampled_from((-1, 0, 50, 1000, 2000))
lengths = st.integers(0, 3)
flags = st.sampled_from((0, 0, 0, NOREPLACE, EXCHANGE))
opening = st.sampled_from(("r", "r+", "w", "w+", "a", "a+", "x"))
umasks = st.sampled_from((0, 0o022, 0o077))
actors = st.tuples(clients, users, umasks, fates)
Actor = tuple[int, User, int, tuple[str, ...]]


class Agreement(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.real = ModelWorld()
        self.runner.run(self.real.open())
        self.model = Tree(self.real.now)
        self.open: list[tuple[File, Node, User, bool]] = []

    def teardown(self) -> None:
        try:
            self.runner.run(self.real.close())
        finally:
            self.runner.close()

    def _path(self, pick: Pick) -> str:
        if isinstance(pick, str):
            return pick
        found = [path for path, _ in self.model.walk()]
        if isinstance(pick, int):
            return found[pick % len(found)] if found else "/a"
        directories = ["", *(p for p, node in self.model.walk() if node.kind == "directory")]
        return f"{directories[pick[0] % len(directories)]}/{pick[1]}"

    def both(
        self,
        actor: Actor,
        real: Callable[[Any], Awaitable[Any]],
        model: Callable[[User], Any],
    ) -> tuple[Any, Any]:
        """Do it in both worlds; either both succeed or both are refused with the same errno."""
        client, who, umask, fates = actor
        self.real.now += 1
        self.model.now = self.real.now
        try:
            wanted, number = model(who), 0
        except Refused as problem:
            wanted, number = None, problem.errno
        self.real.server.fates.extend(fates)
        library = self.real.library(client, Caller(*who), umask)
        try:
            found, got = self.runner.run(real(library)), 0
        except OSError as problem:
            found, got = None, problem.errno or -1
        self.real.server.fates.clear()
        assert got == number, f"{_name(got)} instead of {_name(number)} for {who}"
        return found, wanted

    # ------------------------------------------------------------ names

    @initialize(small=st.booleans())
    def begin(self, small: bool) -> None:
        """Everybody may make names in the root."""
        self.real.keep_small_files(8192 if small else 0)
        self.both((0, ROOT, 0, ()), lambda fs: fs.chmod("/", 0o777), _chmod(self.model, "/", 0o777))
        self.mkdir((0, ALICE, 0, ()), "/a", 0o777)
        self.mkdir((0, ROOT, 0, ()), "/b", 0o1777)
        self.mkdir((0, BOB, 0, ()), "/a/a", 0o2777)
        self.mkfifo((0, BOB, 0, ()), "/a/c", 0o666)
        self.symlink((0, BOB, 0, ()), "/c", "a")
        for who, path in ((ALICE, "/a/b"), (BOB, "/b/a"), (ALICE, "/b/b")):
            self.open_file((0, who, 0, ()), path, "w", False)

    @rule(actor=actors, path=news, mode=directory_modes)
    def mkdir(self, actor: Actor, path: Pick, mode: int) -> None:
        path = self._path(path)
        self.both(
            actor,
            lambda fs: fs.mkdir(path, mode),
            lambda who: self.model.make(who, path, "directory", mode, actor[2]),
        )

    @rule(actor=actors, path=news, mode=modes)
    def mkfifo(self, actor: Actor, path: Pick, mode: int) -> None:
        path = self._path(path)

        async def real(fs: Any) -> None:
            with translated():
                parent, name = await fs._parent(os.fsencode(path))
                kind = stat.S_IFIFO | mode
                await fs._metadata.mknod(fs._caller, parent.id, name, kind, umask=actor[2])

        self.both(actor, real, lambda who: self.model.make(who, path, "fifo", mode, actor[2]))

    @rule(actor=actors, path=news, leads_to=targets)
    def symlink(self, actor: Actor, path: Pick, leads_to: str) -> None:
        path = self._path(path)
        self.both(
            actor,
            lambda fs: fs.symlink(leads_to, path),
            lambda who: self.model.make(who, path, "link", 0o777, target=leads_to),
        )

    @rule(actor=actors, old=paths, new=news)
    def link(self, actor: Actor, old: Pick, new: Pick) -> None:
        old, new = self._path(old), self._path(new)
        self.both(actor, lambda fs: fs.link(old, new), lambda who: self.model.link(who, old, new))

    @rule(actor=actors, path=paths)
    def unlink(self, actor: Actor, path: Pick) -> None:
        path = self._path(path)
        self.both(
            actor,
            lambda fs: fs.remove(path),
            lambda who: self.model.remove(who, path, directory=False),
        )

    @rule(actor=actors, path=paths)
    def rmdir(self, actor: Actor, path: Pick) -> None:
        path = self._path(path)
        self.both(
            actor,
            lambda fs: fs.rmdir(path),
            lambda who: self.model.remove(who, path, directory=True),
        )

    @rule(actor=actors, old=paths, new=news, flags=flags)
    def rename(self, actor: Actor, old: Pick, new: Pick, flags: int) -> None:
        old, new = self._path(old), self._path(new)
        self.both(
            actor,
            lambda fs: fs.rename(old, new, flags=flags),
            lambda who: self.model.rename(who, old, new, flags),
        )

    # ------------------------------------------------------------ attributes

    @rule(actor=actors, path=paths, mode=modes)
    def chmod(self, actor: Actor, path: Pick, mode: int) -> None:
        path = self._path(path)
        self.both(actor, lambda fs: fs.chmod(path, mode), _chmod(self.model, path, mode))

    @rule(actor=actors, path=paths, uid=owners, gid=groups)
    def chown(self, actor: Actor, path: Pick, uid: int, gid: int) -> None:
        path = self._path(path)
        if uid == gid == -1:
            return  # asks for nothing: see the cases of tests/semantics
        self.both(
            actor,
            lambda fs: fs.chown(path, uid, gid, follow_symlinks=False),
            lambda who: self.model.chown(who, path, uid, gid),
        )

    @rule(actor=actors, path=paths, times=st.sampled_from((None, (5, 7))))
    def utime(self, actor: Actor, path: Pick, times: tuple[int, int] | None) -> None:
        path = self._path(path)
        self.both(
            actor,
            lambda fs: fs.utime(path, times),
            lambda who: self.model.utime(who, path, times),
        )

    @rule(actor=actors, path=paths, value=st.sampled_from((b"1", b"22", None)))
    def set_xattr(self, actor: Actor, path: Pick, value: bytes | None) -> None:
        path = self._path(path)

        def real(fs: Any) -> Awaitable[None]:
            if value is None:
                return fs.removexattr(path, "user.x")
            return fs.setxattr(path, "user.x", value)

        self.both(actor, real, lambda who: self.model.set_xattr(who, path, "user.x", value))

    @rule(actor=actors, path=paths)
    def get_xattr(self, actor: Actor, path: Pick) -> None:
        path = self._path(path)
        found, wanted = self.both(
            actor,
            lambda fs: fs.getxattr(path, "user.x"),
            lambda who: self.model.get_xattr(who, path, "user.x"),
        )
        assert found == wanted

    @rule(actor=actors, path=paths, on=st.booleans())
    def immutable(self, actor: Actor, path: Pick, on: bool) -> None:
        path = self._path(path)

        def real(fs: Any) -> Awaitable[None]:
            return fs.setxattr(path, FLAGS, b"i") if on else fs.removexattr(path, FLAGS)

        value = b"i" if on else None
        self.both(actor, real, lambda who: self.model.set_xattr(who, path, "immutable", value))

    @rule(actor=actors, path=paths)
    def listing(self, actor: Actor, path: Pick) -> None:
        path = self._path(path)
        found, wanted = self.both(
            actor, lambda fs: fs.listdir(path), lambda who: self.model.list(who, path)
        )
        assert found == wanted

    @rule(actor=actors, path=paths)
    def stat(self, actor: Actor, path: Pick) -> None:
        path = self._path(path)
        found, wanted = self.both(
            actor, lambda fs: fs.stat(path), lambda who: self.model.find(who, path)
        )
        if found is not None:
            assert found.st_size == wanted.length
            assert found.st_mtime_ns == wanted.mtime

    # ------------------------------------------------------------ files

    @rule(actor=actors, path=paths, length=lengths)
    def truncate(self, actor: Actor, path: Pick, length: int) -> None:
        path = self._path(path)
        self.both(
            actor,
            lambda fs: fs.truncate(path, length),
            lambda who: self.model.truncate(who, path, length),
        )

    @rule(actor=actors, path=news, mode=opening, keep=st.booleans())
    def open_file(self, actor: Actor, path: Pick, mode: str, keep: bool) -> None:
        path = self._path(path)
        found, wanted = self.both(
            actor,
            lambda fs: fs.open(path, mode),
            lambda who: self.model.open(who, path, mode, actor[2]),
        )
        if found is None:
            return
        if keep and len(self.open) < 4:
            self.open.append((found, wanted, actor[1], mode != "r"))
        else:
            self.runner.run(found.close())

    @rule(place=st.integers(0, 3), fates=fates)
    def close(self, place: int, fates: tuple[str, ...]) -> None:
        if place < len(self.open):
            file, _, _, _ = self.open.pop(place)
            self.real.server.fates.extend(fates)
            self.runner.run(file.close())
            self.real.server.fates.clear()

    @rule(place=st.integers(0, 3), length=lengths, fates=fates)
    def cut_open_file(self, place: int, length: int, fates: tuple[str, ...]) -> None:
        """ftruncate: the right was looked at when the file was opened."""
        if place >= len(self.open) or not self.open[place][3]:
            return
        file, node, who, _ = self.open[place]
        self.both(
            (0, who, 0, fates),
            lambda _: file.truncate(length),
            lambda who: self.model.set_length(who, node, length),
        )

    # ------------------------------------------------------------ always

    @invariant()
    def agree(self) -> None:
        found, wanted = self.real.tree(), show_model(self.model)
        assert found.keys() == wanted.keys()
        for path in wanted:
            assert found[path] == wanted[path], path
        for file, node, _, _ in self.open:
            inode = self.real.inode(file._file.inode_id)
            assert inode is not None, "a file that is open has gone"
            shown = model_attributes(self.model, node, self.model.links(node))
            assert self.real.attributes(inode) == shown


def _chmod(model: Tree, path: str, mode: int) -> Callable[[User], None]:
    return lambda who: model.chmod(who, path, mode)


def _name(number: int) -> str:
    return errno.errorcode.get(number, "success")


def test_close_does_not_touch_times_that_were_set_after_the_last_write() -> None:
    """Found by the model, of small files: what close made stable was told with the time of then."""
    world = Agreement()
    try:
        me = (0, ROOT, 0, ())
        world.begin(small=True)
        world.open_file(me, (0, "a"), "w", True)
        world.cut_open_file(0, 2, ())
        world.utime(me, "/a", (11, 12))
        world.close(0, ())
        world.agree()
        world.open_file(me, "/a", "r+", True)
        world.cut_open_file(0, 0, ())
        world.listing(me, "/")
        world.close(0, ())
        world.agree()
    finally:
        world.teardown()


Agreement.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not IS_LONG,
    database=None,
)
TestAgreement = Agreement.TestCase
