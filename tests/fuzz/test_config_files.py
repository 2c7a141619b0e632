"""Configuration files of every service: any bytes give a usable struct or one clear line."""

import importlib
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberfs.client.fuse import FuseConfig
from emberfs.deploy.plan import Plan
from emberfs.meta.server import MetaConfig
from emberfs.mgmtd.server import MgmtdConfig, timing_of
from emberfs.proto.errors import Code, EmberfsError
from emberfs.runtime.config import load_config
from emberfs.storage.server import StorageConfig
from fuzz.profile import budget
from fuzz.strategies import ANY_INT

CONFIGS = (MgmtdConfig, MetaConfig, StorageConfig, FuseConfig, Plan)
LINE_CHARACTERS_MAX = 1000

VALUES = st.one_of(
    ANY_INT.map(str),
    st.sampled_from(("nan", "-inf", "inf", "1e400", "true", "2020-01-01", "[]", "{}", '["a"]')),
    st.sampled_from(
        ('"127.0.0.1:1"', '["127.0.0.1:1"]', '"\\u0000"', '"a\\nb"', '"/tmp"', "9" * 5000)
    ),
    st.text(max_size=20).map(lambda text: msgspec.json.encode(text).decode()),
)


def tables(config_type: type[Any]) -> st.SearchStrategy[bytes]:
    names = st.sampled_from(config_type.__struct_fields__) | st.sampled_from(
        ("clutser", "a.b", "1")
    )
    lines = st.dictionaries(names, VALUES, max_size=8)
    return lines.map(lambda d: "\n".join(f"{k} = {v}" for k, v in d.items()).encode())


def load(path: Path, raw: bytes, config_type: type[Any]) -> Any:
    path.write_bytes(raw)
    try:
        return load_config(path, config_type)
    except EmberfsError as problem:
        found = problem
    assert found.code is Code.CONFIG
    assert "\n" not in found.message
    assert len(found.message) < LINE_CHARACTERS_MAX
    return None


def test_every_service_is_covered() -> None:
    modules = ("client.fuse", "meta.server", "mgmtd.server", "storage.server")
    for module in modules:
        found = [
            n for n in vars(importlib.import_module(f"emberfs.{module}")) if n.endswith("Config")
        ]
        assert set(found) <= {c.__name__ for c in CONFIGS}


@pytest.mark.parametrize("config_type", CONFIGS, ids=lambda c: str(c.__name__))
def test_any_table_is_usable_or_refused_in_one_line(config_type: type[Any], tmp_path: Path) -> None:
    """A wrong configuration costs the operator one line to read, never a traceback."""

    @budget(120)
    @given(tables(config_type) | st.binary(max_size=60))
    def tried(raw: bytes) -> None:
        config = load(tmp_path / "x.toml", raw, config_type)
        for name in config.__struct_fields__ if config is not None else ():
            value = getattr(config, name)
            assert not isinstance(value, float) or math.isfinite(value)

    tried()


@pytest.mark.parametrize(
    "raw",
    [
        b"node = " + b"9" * 5000,  # int() has its own limit, 4300 digits
        b"cluster = " + b"[" * 5000,  # deeper than the parser's stack
        b"x" * 100_000 + b" = 1",  # the message must not repeat it all
        b'log_level = "FOO"',
        b"metrics_port = 99999",
        b"node = -1",
        b"lease_s = inf",
        b"lease_s = 1e300",  # finite, but not in ns
        b'cluster = "a\\u0000b"',
        b"\xff\xfe",
    ],
    ids=lambda raw: str(raw[:20]),
)
def test_what_once_ended_in_a_traceback_is_refused(raw: bytes, tmp_path: Path) -> None:
    """Numbers, levels and texts that no service can use are named before anything starts."""
    rest = b"\n".join(line for line in (b'cluster = "c"', b'data = "d"') if line[:4] != raw[:4])
    assert load(tmp_path / "x.toml", rest + b"\n" + raw, MgmtdConfig) is None


SECONDS = st.floats(-1e9, 1e9)


@budget(200)
@given(SECONDS, SECONDS)
def test_any_lease_is_usable_or_refused(lease_s: float, heartbeat_s: float) -> None:
    try:
        timing = timing_of(MgmtdConfig("c", "d", lease_s=lease_s, heartbeat_s=heartbeat_s))
    except EmberfsError:
        return
    assert timing.lease_ns >= 4 * timing.heartbeat_ns - 4
