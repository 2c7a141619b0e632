"""Request bodies of the metadata service: whatever arrives, an error of the table or an answer."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberfs.meta.dispatch import BINDINGS, Binding, handlers
from emberfs.proto import batch_calls, meta_calls, quota_calls
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ROOT_INODE
from emberfs.proto.method import Method
from fuzz.profile import budget
from fuzz.strategies import ANY_INT, NAMES, damaged, hostile_of, values_of
from unit.meta_world import World, play

# What a server may blame on itself or on its world; nothing of it is a caller's doing.
NEVER = {Code.INTERNAL, Code.DISK, Code.MAYBE_COMMITTED}
REFUSALS = {Code.INVALID, Code.NAME_TOO_LONG, Code.EXISTS, Code.NOT_FOUND}
PATHS = NAMES | st.sampled_from((b"/d/x", b"/d/y", b"/a", b"/l", b"/d/", b"/a/x", b"/d/../z", b"/"))
SMALL_INODES = st.sampled_from((1, 1024, 1025, 1026, 1027, 4096))


class Arrived:
    """A call as far as a metadata handler looks at it."""

    def __init__(self, body: bytes) -> None:
        self.body = memoryview(body)
        self.peer = "fuzz"


def near_misses(struct: type[Any]) -> st.SearchStrategy[bytes]:
    """Requests that get past the decoder: real inodes and callers, wild in the other fields."""
    fixed: dict[str, st.SearchStrategy[Any]] = {
        "inode": SMALL_INODES,
        "parent": SMALL_INODES,
        "new_parent": SMALL_INODES,
        "name": NAMES,
        "new_name": NAMES,
        "session": st.sampled_from((0, 1, 2)),
        "caller": st.sampled_from((meta_calls.Caller(0, 0), meta_calls.Caller(1000, 1000, (50,)))),
        "paths": st.lists(PATHS, max_size=6).map(tuple),
        "items": st.lists(st.builds(batch_calls.BatchItem, PATHS, NAMES), max_size=6).map(tuple),
        "request": st.builds(meta_calls.RequestId, st.just(77), st.integers(10_000, 10_003)),
    }
    names = struct.__struct_fields__
    made = values_of(struct, **{name: fixed[name] for name in names if name in fixed})
    return made.map(Method(0, "any", struct, struct).encode_request)


def bodies(struct: type[Any]) -> st.SearchStrategy[bytes]:
    honest = near_misses(struct)
    return honest | honest | hostile_of(struct) | damaged(honest) | st.binary(max_size=80)


CALLS = st.one_of(
    [st.tuples(st.just(binding), bodies(binding.method.request_type)) for binding in BINDINGS]
)


async def furnish(world: World) -> None:
    """Make a little of everything, so that requests meet something."""
    await world.mkdir(b"d", mode=0o777)
    made = await world.file(b"a", mode=0o666)
    await world.symlink(b"l", b"/d/../a")
    await world.open_file(made.id, 1, write=True)
    await world.set_xattr(made.id, b"user.a", b"1")


def judge(binding: Binding, problem: EmberfsError) -> None:
    assert problem.code not in NEVER, f"{binding.method.name}: {problem}"
    assert problem.message
    assert len(problem.message) < 20_000


async def submit(world: World, binding: Binding, body: bytes) -> None:
    handler = handlers(world.context)[binding.method.number]
    try:
        answer = await handler(Arrived(body))  # type: ignore[arg-type]
    except EmberfsError as problem:
        judge(binding, problem)
    else:
        binding.method.decode_answer(answer)


def test_every_method_is_bound() -> None:
    modules = (meta_calls, quota_calls, batch_calls)
    named = [value for module in modules for value in vars(module).values()]
    methods = {m.number for m in named if isinstance(m, Method)}
    assert methods == {binding.method.number for binding in BINDINGS}


@pytest.mark.parametrize("binding", BINDINGS, ids=lambda binding: str(binding.method.name))
def test_o23_every_body_gets_an_answer_or_an_error_of_the_table(binding: Binding) -> None:
    """No body of any method can make the metadata server fail, or break its records."""

    @budget(40)
    @given(st.lists(bodies(binding.method.request_type), min_size=1, max_size=4))
    def tried(made: list[bytes]) -> None:
        async def scene(world: World) -> None:
            await furnish(world)
            for body in made:
                await submit(world, binding, body)

        play(scene, inline_bytes_max=100)

    tried()


@budget(100)
@given(st.lists(CALLS, min_size=3, max_size=12))
def test_o23_sequences_of_wild_calls_keep_the_invariants(
    calls: list[tuple[Binding, bytes]],
) -> None:
    """Whatever callers send one after another, the namespace stays consistent."""

    async def scene(world: World) -> None:
        await furnish(world)
        for binding, body in calls:
            await submit(world, binding, body)
        assert (await world.getattr(ROOT_INODE)).is_directory()

    play(scene, inline_bytes_max=100)


@budget(150)
@given(NAMES, ANY_INT)
def test_c8_names_are_refused_or_kept_as_they_are(name: bytes, inode: int) -> None:
    """A name is stored byte for byte or refused: empty, NUL, slash, dots and 256 bytes are not."""

    async def scene(world: World) -> None:
        sound = 0 < len(name) <= 255 and not set(b"/\0") & set(name) and name not in (b".", b"..")
        request = meta_calls.MknodRequest(
            meta_calls.Caller(0, 0), world.rid(), ROOT_INODE, name, 0o100644
        )
        handler = handlers(world.context)[meta_calls.MKNOD.number]
        body = meta_calls.MKNOD.encode_request(request)
        try:
            await handler(Arrived(body))  # type: ignore[arg-type]
            code = None
        except EmberfsError as problem:
            code = problem.code
        assert code in ({None} if sound else REFUSALS)
        assert await world.names() == ([name] if sound else [])

    play(scene)
