"""Coverage-guided fuzzing of every decoder: `make fuzz SECONDS=60`, needs atheris (group fuzz).

The first byte of an input chooses the decoder, the rest is its input. Anything but EmberfsError
ends the run, with the input in a file crash-*; the same program with that file repeats it.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["emberfs"]):
    from google.protobuf.message import DecodeError

    from emberfs.fabric import frame
    from emberfs.meta import schema
    from emberfs.meta.server import MetaConfig
    from emberfs.proto import control_pb2, control_wire
    from emberfs.proto.errors import EmberfsError
    from emberfs.proto.method import Method
    from emberfs.proto.storage_calls import unpack_read_ops, unpack_read_results
    from emberfs.runtime.config import load_config
    from emberfs.storage import records

SCRATCH = Path(tempfile.gettempdir()) / "emberfs-fuzz.toml"


def _header(raw: bytes) -> None:
    """Sound checksums are out of a fuzzer's reach, so they are made here."""
    kind = list(frame.Kind)[raw[0] % len(frame.Kind)]
    header = frame.decode_header(memoryview(frame.encode_header(kind, 1, sinks=raw[0])))
    if len(raw) >= header.tail_bytes:
        frame.unpack_descriptors(header, raw[: header.tail_bytes])


def _routing(raw: bytes) -> None:
    try:
        message = control_pb2.Routing.FromString(raw)
    except DecodeError:
        return
    control_wire.routing_from_wire(message)


def _config(raw: bytes) -> None:
    SCRATCH.write_bytes(raw)
    load_config(SCRATCH, MetaConfig)


def _targets() -> list[Callable[[bytes], Any]]:
    found: list[Callable[[bytes], Any]] = [
        lambda raw: frame.decode_header(memoryview(raw.ljust(frame.HEADER_BYTES, b"\0"))),
        _header,
        frame.decode_hello,
        frame.decode_error,
        frame.decode_register,
        frame.decode_unregister,
        unpack_read_ops,
        unpack_read_results,
        _routing,
        _config,
        lambda raw: records.decode_record(b"M", raw),
        lambda raw: records.decode_pending(b"P", raw),
        lambda raw: records.decode_redo(b"R", raw),
        lambda raw: records.parse_group_row(raw[:10], raw[10:]),
    ]
    found += [value.decode for value in vars(schema).values() if isinstance(value, schema.Codec)]
    for name in ("meta_calls", "storage_calls"):
        module = importlib.import_module(f"emberfs.proto.{name}")
        for method in vars(module).values():
            if isinstance(method, Method):
                found += [method.decode_request, method.decode_answer]
    return found


TARGETS = _targets()


def try_one(data: bytes) -> None:
    """One input."""
    if len(data) < 2:
        return
    try:
        TARGETS[data[0] % len(TARGETS)](data[1:])
    except EmberfsError:
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_one)
    atheris.Fuzz()
