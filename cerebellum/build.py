"""Plan -> GGUF: the shards' bytes in the source's order, written beside and renamed.

A file larger than the Hub takes in one piece is written as splits, named and numbered as llama-gguf-split does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from cerebellum import files
from cerebellum.base import Base
from cerebellum.gguf import (
    GgufFile,
    TensorInfo,
    TensorSource,
    encode_kv,
    gguf_size,
    read_gguf,
    tensor_bytes,
    write_gguf,
)
from cerebellum.shards import Shards
from cerebellum.source import SPLIT_NAME, Source, split_paths
from cerebellum.verdicts import Changes

_COPY_BYTES = 16 << 20
_PRECISIONS = (".f16", ".bf16", ".f32", "-f16", "-bf16", "-f32")
_SPLIT_HEADER = 1 << 10
"""Bytes that a split takes beside its tensors and the metadata: three records and the paddings, from above."""


def build(
    source: Source, base: Base, shards: Shards, changes: Changes, out: Path, split_above: int
) -> tuple[Path, ...]:
    """Writes the base with ``changes`` as one ordinary GGUF, metadata copied as bytes; returns what was written.

    Where that would have more than ``split_above`` bytes it is written as splits that have no more each. A shard
    whose bytes changed on the disk since it was made is noticed here and made again.
    """
    located = _locate(shards, changes)
    tensors = [_copy(*located[name]) for name in source.tensors]
    paths = write_model(out, base, tensors, split_above)
    _remove_earlier(out, paths)
    return paths


def write_model(out: Path, base: Base, tensors: Sequence[TensorSource], split_above: int) -> tuple[Path, ...]:
    """Writes tensors with the base's metadata as one file, or as splits where that would be larger."""
    if gguf_size(base.records, tensors, base.alignment) <= split_above:
        write_gguf(out, base.records, tensors, base.alignment)
        paths: tuple[Path, ...] = (out,)
    else:
        parts = _split(tensors, split_above, sum(map(len, base.records)))
        paths = split_paths(out.with_suffix(""), len(parts))
        for number, (path, part) in enumerate(zip(paths, parts, strict=True)):
            records = (*(() if number else base.records), *_split_records(number, len(parts), len(tensors)))
            write_gguf(path, records, part, 32 if number else base.alignment)
    return paths


def _split(tensors: Sequence[TensorSource], most: int, metadata: int) -> list[list[TensorSource]]:
    """Shares out tensors in their order, so many to a split as fit; a single one may be larger than ``most``."""
    parts: list[list[TensorSource]] = [[]]
    taken = metadata + _SPLIT_HEADER
    for tensor in tensors:
        n_bytes = tensor_bytes(tensor.type, tensor.shape) + 256  # its entry in the header and its padding
        if parts[-1] and taken + n_bytes > most:
            parts.append([])
            taken = _SPLIT_HEADER
        parts[-1].append(tensor)
        taken += n_bytes
    return parts


def _split_records(number: int, count: int, tensors: int) -> tuple[bytes, ...]:
    """Returns the keys that llama.cpp knows a split by, counted from 0."""
    return (
        encode_kv("split.no", number, GGUFValueType.UINT16),
        encode_kv("split.count", count, GGUFValueType.UINT16),
        encode_kv("split.tensors.count", tensors, GGUFValueType.INT32),
    )


def result_paths(out: Path) -> tuple[Path, ...]:
    """Returns the finished file at ``out`` or, where it was split, its splits in order; none where there is none."""
    if out.exists():
        return (out,)
    first = next(iter(sorted(out.parent.glob(f"{_escaped(out.stem)}-00001-of-*.gguf"))), None)
    if first is None:
        return ()
    count = int(read_gguf(first).value("split.count", 0))
    return split_paths(out.with_suffix(""), count)


def _escaped(stem: str) -> str:
    """Returns a name as a pattern that matches nothing else."""
    return "".join(f"[{sign}]" if sign in "[]*?" else sign for sign in stem)


def _remove_earlier(out: Path, paths: Sequence[Path]) -> None:
    """Removes an earlier result of this name with another number of splits: nobody shall find two."""
    earlier = [out, *out.parent.glob(f"{_escaped(out.stem)}-?????-of-?????.gguf")]
    for path in earlier:
        if path not in paths and path.exists():
            files.DISK.unlink(path)


def output_path(folder: Path, source: Source, label: str) -> Path:
    """Returns ``<name>-Cerebellum-<label>.gguf``; the label is one that the Hub recognises in file names.

    A result that is split has the splits' numbers after the label.
    """
    stem = source.path.stem
    split = SPLIT_NAME.match(source.path.name)
    if split is not None:
        stem = split["stem"]
    for suffix in _PRECISIONS:
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
    return folder / f"{stem}-Cerebellum-{label}.gguf"


def _locate(shards: Shards, changes: Changes) -> dict[str, tuple[GgufFile, TensorInfo]]:
    """Finds every tensor in the shards of a variant."""
    files = [read_gguf(path) for path in shards.checked(changes).paths]
    return {tensor.name: (file, tensor) for file in files for tensor in file.tensors}


def _copy(file: GgufFile, tensor: TensorInfo) -> TensorSource:
    """Returns a tensor whose bytes are copied, some MiB at a time, when it is written."""

    def chunks() -> Iterator[NDArray[np.uint8]]:
        data = file.data(tensor)
        for start in range(0, len(data), _COPY_BYTES):
            yield data[start : start + _COPY_BYTES]

    return TensorSource(name=tensor.name, shape=tensor.shape, type=tensor.type, chunks=chunks)
