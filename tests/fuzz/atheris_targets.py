"""Coverage-guided fuzzing of every decoder: `make fuzz SECONDS=60`, needs atheris (group fuzz).

The first byte of an input chooses the decoder, the rest is its input. Anything but EmberfsError
ends the run, with the input in a file crash-*; the same program with that file repeats it.

It begins with sound messages and records of every kind: from nothing, no fuzzer finds the way into
decoders that are compiled, where it cannot see how far it came.
"""

import importlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import msgspec
from hypothesis.errors import NonInteractiveExampleWarning

with atheris.instrument_imports(include=["emberfs"]):
    from google.protobuf.message import DecodeError

    from emberfs.client.native import messages
    from emberfs.fabric import frame
    from emberfs.meta import schema
    from emberfs.meta.server import MetaConfig
    from emberfs.proto import control_pb2, control_wire
    from emberfs.proto.errors import EmberfsError
    from emberfs.proto.method import Method
    from emberfs.proto.storage_calls import unpack_read_ops, unpack_read_results
    from emberfs.runtime.config import load_config
    from emberfs.storage import records

sys.path.insert(0, str(Path(__file__).parent.parent))
from fuzz.strategies import values_of

SEEDS_EACH = 4
SCRATCH = Path(tempfile.gettempdir()) / "emberfs-fuzz.toml"
SEEDS = Path(tempfile.gettempdir()) / "emberfs-fuzz-seeds"


def _header(raw: bytes) -> None:
    """Sound checksums are out of a fuzzer's reach, so they are made here."""
    kind = list(frame.Kind)[raw[0] % len(frame.Kind)]
    header = frame.decode_header(memoryview(frame.encode_header(kind, 1, sinks=raw[0])))
    if len(raw) >= header.tail_bytes:
        frame.split_descriptors(header, raw[: header.tail_bytes])


def _routing(raw: bytes) -> None:
    try:
        message = control_pb2.Routing.FromString(raw)
    except DecodeError:
        return
    control_wire.routing_from_wire(message)


def _config(raw: bytes) -> None:
    SCRATCH.write_bytes(raw)
    load_config(SCRATCH, MetaConfig)


def _targets() -> list[tuple[Callable[[bytes], Any], type[Any] | None]]:
    """Every decoder, with what it decodes where that is a struct in msgpack."""
    plain: list[Callable[[bytes], Any]] = [
        lambda raw: frame.decode_header(memoryview(raw.ljust(frame.HEADER_BYTES, b"\0"))),
        _header,
        frame.decode_hello,
        frame.decode_error,
        frame.decode_register,
        frame.decode_unregister,
        unpack_read_ops,
        unpack_read_results,
        messages.decode_request,
        messages.decode_answer,
        _routing,
        _config,
        lambda raw: records.decode_redo(b"R", raw),
        lambda raw: records.parse_group_row(raw[:10], raw[10:]),
    ]
    found: list[tuple[Callable[[bytes], Any], type[Any] | None]] = [(one, None) for one in plain]
    found += [
        (lambda raw: records.decode_record(b"M", raw), records.ChunkRecord),
        (lambda raw: records.decode_pending(b"P", raw), records.PendingRecord),
        (lambda raw: records.decode_tombstone(b"T" + bytes(12), raw), records.TombstoneRecord),
    ]
    for value in vars(schema).values():
        if isinstance(value, schema.Codec):
            found.append((value.decode, value.record))
    for name in ("meta_calls", "batch_calls", "storage_calls"):
        module = importlib.import_module(f"emberfs.proto.{name}")
        for method in vars(module).values():
            if isinstance(method, Method):
                found.append((method.decode_request, method.request_type))
                found.append((method.decode_answer, method.answer_type))
    return found


TARGETS = _targets()


def try_one(data: bytes) -> None:
    """One input."""
    if len(data) < 2:
        return
    try:
        TARGETS[data[0] % len(TARGETS)][0](data[1:])
    except EmberfsError:
        pass


def write_seeds(directory: Path) -> None:
    """One file for each sound input. libFuzzer adds what it finds, until the next start."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    warnings.simplefilter("ignore", NonInteractiveExampleWarning)
    for number, (_, struct) in enumerate(TARGETS):
        if struct is None or not issubclass(struct, msgspec.Struct):
            continue
        examples = values_of(struct)
        for copy in range(SEEDS_EACH):
            body = msgspec.msgpack.encode(examples.example())
            (directory / f"{number}-{copy}").write_bytes(bytes([number]) + body)


if __name__ == "__main__":
    corpus: list[str] = []
    if all(argument.startswith("-") for argument in sys.argv[1:]):  # no input to repeat
        write_seeds(SEEDS)
        corpus = ["-keep_seed=1", str(SEEDS)]  # they look alike: the difference is in compiled code
    atheris.Setup(sys.argv + corpus, try_one)
    atheris.Fuzz()
