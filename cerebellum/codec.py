"""JSON artifacts: one strict codec, so a damaged or foreign file is one clear line, never a wrong number.

An artifact is a frozen ``msgspec.Struct``. msgspec was chosen over eighty lines of our own because it checks
unions by tag, numbers, lists and missing or unknown keys in one pass of C, and says where in the file it
stopped. What it says is turned into our form here: file, key, got, wanted, what to do.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cerebellum.errors import BadInput
from cerebellum.files import atomic_write_text

A = TypeVar("A")

_EXPECTED = re.compile(r"Expected (?P<wanted>.+), got (?P<got>.+)")
_MISSING = re.compile(r"Object missing required field `(?P<key>.+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.+)`")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of an artifact: fields have types, keys that it does not know are refused."""


class Artifact(Record, frozen=True, kw_only=True):
    """A whole file. Every subclass declares ``format: Literal[N] = N`` and bumps N when its fields change."""


def read_artifact(path: Path, wanted: type[A], remedy: str) -> A:
    """Returns the artifact at ``path``, checked field by field.

    Raises BadInput with one line that names the file, the key, what was found, what was wanted and the
    ``remedy`` ("run `cerebellum plan` again").
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: holds {_named(raw)} where an object was wanted; {remedy}")
    number = _format_of(wanted)
    if raw.get("format") != number or isinstance(raw.get("format"), bool):
        found = f"format {raw['format']!r}" if "format" in raw else "no format number"
        raise BadInput(f"{path}: has {found}, this version reads format {number}; {remedy}")
    return _converted(path, raw, wanted, remedy)


def read_loose(path: Path, wanted: type[A], remedy: str) -> A:
    """Returns a file that others may have written: no format number is asked for, types are checked all the same.

    Raises BadInput as ``read_artifact`` does.
    """
    return _converted(path, read_json(path), wanted, remedy)


def _converted(path: Path, raw: Any, wanted: type[A], remedy: str) -> A:
    try:
        return msgspec.convert(raw, wanted, strict=True, dec_hook=_decoded)
    except UnicodeError as error:
        raise BadInput(
            f"{path}: holds text that is no Unicode (half of a surrogate pair); {remedy}"
        ) from error
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadInput(f"{path}: {_reason(str(error))}; {remedy}") from error


def write_artifact(path: Path, value: Artifact) -> None:
    """Writes ``value`` whole or not at all."""
    write_json(path, as_json(value))


def as_json(value: Any) -> Any:
    """Returns an artifact, or anything made of records, as plain JSON values: dicts, lists, numbers, strings."""
    return _listed(msgspec.to_builtins(value, enc_hook=str))


def _listed(value: Any) -> Any:
    """Turns tuples into lists all the way down: what is printed is what is read back."""
    if isinstance(value, dict):
        return {key: _listed(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(part) for part in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; a float that is not finite raises ValueError, for JSON has none."""
    atomic_write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Returns JSON as files have it; a float that is not finite raises ValueError, for JSON has none."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Returns the file's JSON; BadInput names the file where it cannot be read or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); run the stage that makes it") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error}); remove it and run its stage again") from error


def _finite(number: str) -> float:
    """Returns a number; ValueError where it is none that JSON has: NaN, Infinity, or out of the range of floats."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is no number")
    return value


def _decoded(wanted: type, value: Any) -> Any:
    """Decodes what JSON has no type for: a path is a string there."""
    if wanted is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"Expected `{wanted.__name__}`, got `{type(value).__name__}`")


def _format_of(wanted: Any) -> int:
    """Returns the format number of an artifact; all members of a union share theirs."""
    info: Any = msgspec.inspect.type_info(wanted)
    if isinstance(info, msgspec.inspect.UnionType):
        info = info.types[0]
    return next(int(field.default) for field in info.fields if field.name == "format")


def _reason(message: str) -> str:
    """Turns msgspec's message into "key: wanted this, got that"."""
    what, _, place = message.partition(" - at ")
    key = place.strip("`").removeprefix("$").removeprefix(".") or "the file"
    if missing := _MISSING.fullmatch(what):
        return f"{key}: has no key {missing['key']!r}"
    if unknown := _UNKNOWN.fullmatch(what):
        return f"{key}: has the unknown key {unknown['key']!r}"
    if expected := _EXPECTED.fullmatch(what):
        wanted, got = (expected[part].replace("`", "") for part in ("wanted", "got"))
        return f"{key}: wanted {wanted}, got {got}"
    return f"{key}: {what.replace('`', '')}"


def _named(value: Any) -> str:
    """Names a JSON value's type as JSON does."""
    names = {list: "an array", str: "a string", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number")
