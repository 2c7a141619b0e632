"""TOML into frozen structs: unknown keys are errors that name the nearest known key."""

import difflib
import logging
import math
import tomllib
from pathlib import Path
from typing import TypeVar

import msgspec

from emberfs.proto.errors import Code, EmberfsError

C = TypeVar("C", bound=msgspec.Struct)

SHOWN_CHARACTERS_MAX = 100  # of what an operator wrote, in a message
_FLOAT_MAX = 1e9  # seconds; in ns it still fits 64 bits
# Ranges of settings that mean the same in every service. A target's id is node * 100 + place, u32.
_RANGES = {"node": (1, (1 << 32) // 100 - 1), "metrics_port": (0, 65_535)}


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
    except (ValueError, RecursionError) as problem:  # ValueError: of int() too, beside TOML's own
        text = _one_line(str(problem))
        raise EmberfsError(Code.CONFIG, f"{path}: not valid TOML: {text}") from None
    _refuse_unknown(path, table, config_type)
    try:
        config = msgspec.convert(table, config_type)
    except msgspec.ValidationError as problem:
        raise EmberfsError(Code.CONFIG, f"{path}: {_one_line(str(problem))}") from None
    for name in config.__struct_fields__:
        _check_value(path, name, getattr(config, name))
    return config


def _check_value(path: Path, name: str, value: object) -> None:
    """Refuse what no service could use: it would fail later and less clearly."""
    wrong = ""
    for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
        if isinstance(text, str) and not text.isprintable():
            wrong = "contains characters that cannot be printed; write plain text"
    if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= _FLOAT_MAX):
        wrong = f"is {value:g}; write a number of at most {_FLOAT_MAX:g}"
    if isinstance(value, int) and name in _RANGES:
        low, high = _RANGES[name]
        if not low <= value <= high:
            wrong = f"is {value}; write a number from {low} to {high}"
    if name == "log_level" and str(value).upper() not in logging.getLevelNamesMapping():
        wrong = f'is "{_one_line(str(value))}"; write DEBUG, INFO, WARNING or ERROR'
    if wrong:
        raise EmberfsError(Code.CONFIG, f"{path}: {name} {wrong}")


def _one_line(text: str) -> str:
    """Make text from outside fit for a message."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= SHOWN_CHARACTERS_MAX * 2 else shown[:SHOWN_CHARACTERS_MAX] + "..."


def _refuse_unknown(path: Path, table: dict[str, object], config_type: type[C]) -> None:
    known = [field.encode_name for field in msgspec.structs.fields(config_type)]
    for key in table:
        if key not in known:
            key = key[:SHOWN_CHARACTERS_MAX]
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f'did you mean "{nearest[0]}"?' if nearest else f"known keys: {', '.join(known)}"
            text = f'{path}: unknown key "{_one_line(key)}"; {hint}'
            raise EmberfsError(Code.CONFIG, text)
