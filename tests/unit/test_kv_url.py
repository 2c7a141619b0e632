"""The setting that says where the metadata lies, and who may own it."""

import asyncio

import pytest

from emberfs.kv.url import StoreUrl, open_engine, parse_store, without_password
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.real import RealEnv


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
