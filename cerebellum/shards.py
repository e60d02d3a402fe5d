"""One shard per group and type: a variant of the model is a list of paths and copies nothing.

Shard 0 carries the metadata and every protected tensor; shard i holds group i at one type. They are
GGUF splits, and llama.cpp loads any list that agrees on ``split.no`` and ``split.count``. A shard is
named after its recipe, so one that is there was finished and need not be made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from cerebellum.base import Base
from cerebellum.errors import BadInput
from cerebellum.files import sha256_file
from cerebellum.gguf import TensorSource, encode_kv, fits, parse_type, read_gguf, tensor_bytes, write_gguf
from cerebellum.groups import Group
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.ledger import Ledger
from cerebellum.llama.library import build_id
from cerebellum.llama.quantize import QuantizeJob, quantize
from cerebellum.source import Source

BASE = "base"
PROTECTED = "protected"
_LABELLED = 12  # changes that a label still names

Changes = Mapping[str, str]
"""A variant in code: group name -> type name; groups not named stay at the base."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A variant on disk. ``digest`` is over the contents of the shards, so it names the weights."""

    label: str
    paths: tuple[Path, ...]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the shards are made from, and where they go."""

    source: Source
    base: Base
    matrix: ImportanceMatrix | None
    groups: tuple[Group, ...]
    folder: Path
    threads: int


class Shards:
    """Makes shards on demand, each (group, type) once ever, and lists them as variants."""

    def __init__(self, recipe: Recipe, ledger: Ledger, tick: Callable[[str], None] = lambda _: None) -> None:
        self._recipe, self._ledger, self._tick = recipe, ledger, tick
        self.groups = {group.name: group for group in recipe.groups if not group.protected}
        self._number = {name: number for number, name in enumerate(self.groups, start=1)}
        self._hashes: dict[Path, str] = {}
        matrix = recipe.matrix.sha256 if recipe.matrix else ""
        base_file = recipe.base.file.sha256() if recipe.base.file else ""
        self._origin = [recipe.source.sha256(), base_file, matrix, build_id()]
        recipe.folder.mkdir(parents=True, exist_ok=True)

    def variant(self, changes: Changes, label: str = "") -> Variant:
        """The shard list of the base with ``changes``, made where missing."""
        unknown = set(changes) - set(self.groups)
        if unknown:
            raise BadInput(f"no group {sorted(unknown)[0]!r}; `cerebellum inspect` lists them")
        paths = [self.path(PROTECTED, BASE)]
        paths += [self.path(name, changes.get(name, BASE)) for name in self.groups]
        content = "".join(self._hashes[path] for path in paths)
        return Variant(
            label=label or _label(changes),
            paths=tuple(paths),
            digest=hashlib.sha256(content.encode()).hexdigest(),
        )

    def tensor(self, name: str, kind: GGMLQuantizationType) -> TensorSource:
        """One tensor of the source at a type, quantized when it is written."""
        shape = self._recipe.source.tensors[name].shape
        return TensorSource(name=name, shape=shape, type=kind, chunks=lambda: self._bytes(name, kind))

    def path(self, name: str, kind: str) -> Path:
        """The shard of one group at one type (or BASE); written if it is not there."""
        types = self.types(name, kind)
        recipe = json.dumps([*self._origin, self._split_numbers(name), types_as_names(types)])
        digest = hashlib.sha256(recipe.encode()).hexdigest()
        number = self._number.get(name, 0)
        path = self._recipe.folder / f"{number:02d}-{name}.{kind}.{digest[:12]}.gguf"
        if path not in self._hashes:
            if not path.exists():
                self._tick(f"{name} at {kind}")
                self._write(path, name, types)
            self._hashes[path] = self._content_hash(path, digest)
        return path

    def types(self, name: str, kind: str) -> dict[str, GGMLQuantizationType]:
        """Tensor name -> type for a group at ``kind``; BadInput where a row cannot take it."""
        base = self._recipe.base.types
        if kind == BASE:
            return {tensor: base[tensor] for tensor in self._tensors(name)}
        wanted = parse_type(kind)
        for tensor in self._tensors(name):
            shape = self._recipe.source.tensors[tensor].shape
            if not fits(wanted, shape):
                raise BadInput(f"{tensor}: rows of {shape[0]} cannot be {wanted.name}")
        return dict.fromkeys(self._tensors(name), wanted)

    def n_bytes(self, name: str, kind: str) -> int:
        """Bytes of a group's tensors at ``kind``, without padding. Makes nothing."""
        shapes = self._recipe.source.tensors
        return sum(tensor_bytes(t, shapes[tensor].shape) for tensor, t in self.types(name, kind).items())

    def _tensors(self, name: str) -> tuple[str, ...]:
        if name != PROTECTED:
            return self.groups[name].tensors
        return tuple(t for group in self._recipe.groups if group.protected for t in group.tensors)

    def _content_hash(self, path: Path, recipe: str) -> str:
        known = self._ledger.content_hash(path.name, recipe)
        if known is None:
            known = sha256_file(path)
            self._ledger.record_content_hash(path.name, recipe, known)
        return known

    def _write(self, path: Path, name: str, types: Mapping[str, GGMLQuantizationType]) -> None:
        records = self._recipe.base.records if name == PROTECTED else ()
        number, count, total = self._split_numbers(name)
        split = (
            encode_kv("split.no", number, GGUFValueType.UINT16),
            encode_kv("split.count", count, GGUFValueType.UINT16),
            encode_kv("split.tensors.count", total, GGUFValueType.INT32),
        )
        tensors = [self.tensor(tensor, kind) for tensor, kind in types.items()]
        write_gguf(path, (*records, *split), tensors, self._alignment(records))

    def _split_numbers(self, name: str) -> tuple[int, int, int]:
        return (self._number.get(name, 0), len(self._number) + 1, len(self._recipe.source.tensors))

    def _alignment(self, records: tuple[bytes, ...]) -> int:
        """Only the shard with the metadata carries general.alignment; the others use the default."""
        return self._recipe.base.alignment if records else 32

    def _bytes(self, name: str, kind: GGMLQuantizationType) -> Iterator[NDArray[np.uint8]]:
        base = self._recipe.base
        if base.file is not None and base.types[name] == kind:
            yield base.file.read(name)
            return
        source, matrix = self._recipe.source, self._recipe.matrix
        job = QuantizeJob(
            name=name,
            raw=source.read(name),
            shape=source.tensors[name].shape,
            from_type=source.tensors[name].type,
            to_type=kind,
            importance=matrix.importance(name) if matrix else None,
        )
        yield from quantize(job, self._recipe.threads)


def _label(changes: Changes) -> str:
    """For people: every change, or, of a whole plan, how many."""
    if len(changes) > _LABELLED:
        return f"a plan of {len(changes)} changes"
    return ", ".join(f"{name}:{kind}" for name, kind in sorted(changes.items())) or BASE


def types_as_names(types: Mapping[str, GGMLQuantizationType]) -> dict[str, str]:
    """For JSON."""
    return {name: kind.name for name, kind in types.items()}


def shard_tensors(path: Path) -> dict[str, NDArray[np.uint8]]:
    """The tensors of one shard, as views of the mapped file."""
    file = read_gguf(path)
    return {tensor.name: file.data(tensor) for tensor in file.tensors}
