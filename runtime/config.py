"""TOML into frozen structs: unknown keys are errors that name the nearest known key."""

import difflib
import tomllib
from pathlib import Path
from typing import TypeVar

import msgspec

from emberfs.proto.errors import Code, EmberfsError

C = TypeVar("C", bound=msgspec.Struct)


def load_config(path: Path, config_type: type[C]) -> C:
    """Read a TOML file into `config_type`.

    Raises EmberfsError(CONFIG) with one sentence: file, what is wrong, and what to write instead.
    """
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise EmberfsError(Code.CONFIG, f"{path}: no such file; pass --config FILE.toml") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise EmberfsError(Code.CONFIG, f"{path}: cannot be read: {problem}") from None
    except tomllib.TOMLDecodeError as problem:
        raise EmberfsError(Code.CONFIG, f"{path}: not valid TOML: {problem}") from None
    _refuse_unknown(path, table, config_type)
    try:
        return msgspec.convert(table, config_type)
    except msgspec.ValidationError as problem:
        raise EmberfsError(Code.CONFIG, f"{path}: {problem}") from None


def _refuse_unknown(path: Path, table: dict[str, object], config_type: type[C]) -> None:
    known = [field.encode_name for field in msgspec.structs.fields(config_type)]
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f'did you mean "{nearest[0]}"?' if nearest else f"known keys: {', '.join(known)}"
            raise EmberfsError(Code.CONFIG, f'{path}: unknown key "{key}"; {hint}')
