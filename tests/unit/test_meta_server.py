"""The dispatch table, over a real socket; configuration."""

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from emberfs.fabric.pool import PeerPool
from emberfs.fabric.server import Server
from emberfs.meta.dispatch import BINDINGS, handlers
from emberfs.meta.server import MetaConfig, MetaService, check_config
from emberfs.proto import batch_calls, quota_calls
from emberfs.proto import meta_calls as calls
from emberfs.proto.cluster import EMPTY_ROUTING, Node, NodeKind
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import ROOT_INODE, SECOND, NodeId, SessionId
from emberfs.proto.method import Method
from emberfs.runtime.real import RealEnv
from unit.meta_world import CLIENT, ROOT, World, play


def test_every_method_has_a_handler() -> None:
    modules = (calls, quota_calls, batch_calls)
    named = [value for module in modules for value in vars(module).values()]
    methods = {m for m in named if isinstance(m, Method)}
    assert {binding.method for binding in BINDINGS} == methods
    assert len({m.number for m in methods}) == len(methods) == len(BINDINGS)


def test_calls_over_a_socket() -> None:
    async def scene(w: World) -> None:
        server = Server(w.env, handlers(w.context), name="meta test")
        endpoint = await server.listen("tcp://127.0.0.1:0")
        pool = PeerPool(w.env)

        async def call(method: Method[Any, Any], request: Any) -> Any:
            peer = await pool.get([endpoint])
            body = method.encode_request(request)
            reply = await peer.call(method.number, body, timeout_ns=3 * SECOND)
            return method.decode_answer(reply.body)

        try:
            create = calls.CreateRequest(
                ROOT, calls.RequestId(CLIENT, 1), ROOT_INODE, b"f", 0o644, SessionId(1), write=True
            )
            made = (await call(calls.CREATE, create)).inode
            found = (await call(calls.LOOKUP, calls.LookupRequest(ROOT, ROOT_INODE, b"f"))).inode
            assert found == made
            assert (await call(calls.STABLE, calls.StableRequest())) == calls.Nothing()
            assert (await call(calls.STATFS, calls.StatfsRequest())).inodes == 2
            with pytest.raises(EmberfsError) as raised:
                await call(calls.LOOKUP, calls.LookupRequest(ROOT, ROOT_INODE, b"none"))
            assert raised.value.code == Code.NOT_FOUND
            peer = await pool.get([endpoint])
            for body in (
                b"",
                b"\xc1",
                calls.STATFS.encode_request(calls.StatfsRequest()),
                b"x" * 1000,
            ):
                with pytest.raises(EmberfsError) as raised:
                    await peer.call(calls.LOOKUP.number, body, timeout_ns=3 * SECOND)
                assert raised.value.code == Code.MALFORMED
        finally:
            await pool.close()
            await server.close()

    play(scene)


GOOD = {"cluster": "c", "node": 1, "mgmtd": ["127.0.0.1:1"], "listen": ["tcp://x:1"], "data": "d"}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("chunk_bytes", 1000),
        ("chunk_bytes", 96 * 1024),
        ("chunk_bytes", 1 << 30),
        ("stripe", 0),
        ("mgmtd", []),
        ("listen", []),
        ("session_grace_s", 0.0),
    ],
)
def test_bad_settings_are_refused(setting: str, value: object) -> None:
    check_config(msgspec.convert(GOOD, MetaConfig))
    with pytest.raises(EmberfsError, match=setting) as raised:
        check_config(msgspec.convert(GOOD | {setting: value}, MetaConfig))
    assert raised.value.code == Code.CONFIG


def test_a_lookup_is_quick() -> None:
    """Decode, one read-only transaction, encode: far below a millisecond on any machine."""

    async def scene(w: World) -> None:
        await w.file(b"f")

        class Call:
            body = calls.LOOKUP.encode_request(calls.LookupRequest(ROOT, ROOT_INODE, b"f"))
            peer = "test"

        handle = handlers(w.context)[calls.LOOKUP.number]
        started_ns = w.env.now_ns()
        for _ in range(1000):
            await handle(Call())  # type: ignore[arg-type]
        assert (w.env.now_ns() - started_ns) / 1000 < 1_000_000
        await asyncio.sleep(0)

    play(scene)


@pytest.mark.parametrize(
    ("store", "alive", "refused"),
    [("", True, True), ("", False, False), ("etcd://127.0.0.1:2379/x", True, False)],
)
def test_two_servers_with_a_store_each_are_refused(store: str, alive: bool, refused: bool) -> None:
    """They would be two file systems; on a shared store there may be many."""
    config = MetaConfig("c", 2, ("127.0.0.1:1",), ("tcp://127.0.0.1:0",), data="/x", store=store)
    other = Node(NodeId(3), NodeKind.META, "there", (), 1, alive=alive)
    snapshot = msgspec.structs.replace(EMPTY_ROUTING, nodes={other.id: other})
    cluster: Any = SimpleNamespace(routing=SimpleNamespace(snapshot=snapshot))
    service = MetaService(config, RealEnv())
    if refused:
        with pytest.raises(EmberfsError, match='needs the same "store"') as caught:
            service._refuse_beside_others(cluster)
        assert caught.value.code == Code.CONFIG
    else:
        service._refuse_beside_others(cluster)
