"""The setting that says where the metadata lies, and who may own it."""

import asyncio

import pytest

from emberfs.kv.owned import OwnedEngine
from emberfs.kv.transaction import Transaction
from emberfs.kv.url import StoreUrl, open_engine, parse_store, without_password
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.real import RealEnv
from kv_faulty import faulty_engine
from unit.kv_engines import read_all


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory:", StoreUrl("memory")),
        ("rocks:///var/lib/x%20y", StoreUrl("rocks", path="/var/lib/x y")),
        ("etcd://a:1,10.0.0.2:2379/prod", StoreUrl("etcd", ("a:1", "10.0.0.2:2379"), name="prod")),
        ("etcd://[::1]:2379", StoreUrl("etcd", ("[::1]:2379",))),
        ("fdb:///etc/fdb.cluster?prod", StoreUrl("fdb", path="/etc/fdb.cluster", name="prod")),
        (
            "postgres://u:p@h:5432/db?table=t&sslmode=require",
            StoreUrl("postgres", name="t", address="postgresql://u:p@h:5432/db?sslmode=require"),
        ),
        (
            "postgresql://h1:1,h2:2/db",
            StoreUrl("postgres", address="postgresql://h1:1,h2:2/db"),
        ),
    ],
)
def test_good_urls(text: str, expected: StoreUrl) -> None:
    assert parse_store(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no kind of store"),
        ("/var/lib/x", "no kind of store"),
        ("redis://h:1/0", '"redis" is no kind of store'),
        ("rocks://var/lib", "no absolute path"),
        ("rocks:///", "no absolute path"),
        ("memory:/x", '"memory" is no kind'),
        ("etcd://h/x", '"h" is not host:port'),
        ("etcd:///x", "is not host:port"),
        ("etcd://a:1,b/x", '"b" is not host:port'),
        ("postgres://h", "no database"),
        ("postgres://h:x/db", "Port"),
        ("fdb:fdb.cluster", "no absolute path"),
        ("http://[::1/", "IPv6"),
    ],
)
def test_bad_urls_say_how_to_write_them(text: str, words: str) -> None:
    with pytest.raises(EmberfsError) as raised:
        parse_store(text)
    assert raised.value.code == Code.CONFIG
    assert words in raised.value.message
    assert "rocks:///directory" in raised.value.message


def test_passwords_are_not_shown() -> None:
    assert without_password("postgres://u:secret@h/db") == "postgres://u@h/db"
    with pytest.raises(EmberfsError) as raised:
        parse_store("postgres://u:secret@h")
    assert "secret" not in raised.value.message


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("postgres://h/db?table=Robert'); --", Code.CONFIG, "names no table"),
        ("postgres://u@127.0.0.1:1/db", Code.UNREACHABLE, "PostgreSQL"),
        ("etcd://127.0.0.1:1/x", Code.UNREACHABLE, "do not answer"),
        ("fdb:///no/such/fdb.cluster", Code.CONFIG, "libfdb_c.so"),
    ],
)
def test_servers_that_are_not_there(url: str, code: Code, words: str) -> None:
    with pytest.raises(EmberfsError) as raised:
        asyncio.run(open_engine(RealEnv(), url))
    assert (raised.value.code, words in raised.value.message) == (code, True), raised.value


def test_one_owner_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberfs.kv.owned.LEASE_NS", 300_000_000)
    monkeypatch.setattr("emberfs.kv.owned.BEAT_NS", 30_000_000)
    monkeypatch.setattr("emberfs.kv.owned.LOOK_NS", 20_000_000)

    async def write(txn: Transaction) -> None:
        txn.set(b"a", (await txn.get(b"a") or b"") + b"x")

    async def main() -> None:
        engine = faulty_engine(0)
        first, second, third = (OwnedEngine(RealEnv(), engine, node) for node in (1, 2, 3))
        await first.claim()
        living = asyncio.ensure_future(first.live())
        with pytest.raises(EmberfsError, match="metadata server 1 is using this store"):
            await second.claim()
        await first.run(write)
        living.cancel()  # it hangs
        await second.claim()
        with pytest.raises(EmberfsError) as raised:
            await first.run(write)
        assert raised.value.code == Code.SHUTTING_DOWN
        assert first.lost
        await asyncio.wait_for(first.live(), 1)
        with pytest.raises(EmberfsError):
            await first.run(write, read_only=True)
        await second.run(write)
        await second.release()
        began = asyncio.get_running_loop().time()
        await third.claim()
        assert asyncio.get_running_loop().time() - began < 0.2  # a released one is not waited for
        assert (await read_all(engine, b"a", b"b")) == {b"a": b"xx"}
        await engine.close()

    asyncio.run(main())


def test_what_an_earlier_owner_has_on_its_way_fails() -> None:
    async def main() -> None:
        engine = faulty_engine(0)
        first = OwnedEngine(RealEnv(), engine, 1)
        await first.claim()
        going, taken = asyncio.Event(), asyncio.Event()

        async def slow(txn: Transaction) -> None:
            txn.set(b"a", b"late")
            going.set()
            await taken.wait()

        late = asyncio.ensure_future(first.run(slow))
        await going.wait()
        await first.release()
        await OwnedEngine(RealEnv(), engine, 2).claim()
        taken.set()
        with pytest.raises(EmberfsError) as raised:
            await late
        assert raised.value.code == Code.SHUTTING_DOWN
        assert await read_all(engine, b"a", b"b") == {}
        await engine.close()

    asyncio.run(main())
