"""Where a converted source came from: kept beside its GGUF, and copied into source.json and manifest.json."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from cerebellum.codec import Artifact, Record, read_artifact

_SUFFIX = ".origin.json"


class FileNamed(Record, frozen=True, kw_only=True):
    """A file of the checkpoint by its name and content."""

    file: str
    sha256: str


class Origin(Record, frozen=True, kw_only=True):
    """Says what a GGUF was converted from, and by what.

    ``repository`` and ``commit`` are the Hub's, None for a folder. ``converter`` and ``converter_version`` name the
    program, ``packages`` the libraries that it ran with ("torch 2.13.0"), ``precision`` what it was told to
    write. ``quantization`` is the method that the checkpoint had been quantized by, or None.
    """

    repository: str | None = None
    commit: str | None = None
    name: str
    converter: str
    converter_version: str
    packages: tuple[str, ...] = ()
    precision: str
    quantization: str | None = None
    files: tuple[FileNamed, ...]

    @property
    def key(self) -> str:
        """Returns the SHA-256, in hex, of all that the converted file depends on: its name in the cache."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Converted(Artifact, frozen=True, kw_only=True):
    """<name>.gguf.origin.json: the origin of the GGUF beside it, which is known again by its header."""

    format: Literal[1] = 1
    header_sha256: str
    origin: Origin


def record_path(gguf: Path) -> Path:
    """Returns where the origin of a GGUF is kept: beside it."""
    return gguf.with_name(gguf.name + _SUFFIX)


def origin_of(gguf: Path, header_sha256: str) -> Origin | None:
    """Returns the origin that is told beside a GGUF, or None where there is none or it is of another file.

    Raises BadInput where what lies there cannot be read.
    """
    path = record_path(gguf)
    if not path.exists():
        return None
    told = read_artifact(path, Converted, "remove it, or run again from the checkpoint")
    return told.origin if told.header_sha256 == header_sha256 else None
