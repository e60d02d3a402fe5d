"""Plan -> GGUF: the shards' bytes in the source's order, written beside and renamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cerebellum.base import Base
from cerebellum.gguf import GgufFile, TensorInfo, TensorSource, read_gguf, write_gguf
from cerebellum.shards import Shards
from cerebellum.source import Source

_COPY_BYTES = 16 << 20


def build(source: Source, base: Base, shards: Shards, changes: Mapping[str, str], out: Path) -> None:
    """Writes the base with ``changes`` as one ordinary GGUF, metadata copied as bytes."""
    located = _locate(shards, changes)
    tensors = [_copy(*located[name]) for name in source.tensors]
    write_gguf(out, base.records, tensors, base.alignment)


def output_path(folder: Path, source: Source, base: Base) -> Path:
    """``<name>-Cerebellum-<label>.gguf``; the label is one the Hub recognises in file names."""
    stem = source.path.stem
    for suffix in (".f16", ".bf16", ".f32", "-f16", "-bf16", "-f32"):
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
    return folder / f"{stem}-Cerebellum-{base.label}.gguf"


def _locate(shards: Shards, changes: Mapping[str, str]) -> dict[str, tuple[GgufFile, TensorInfo]]:
    files = [read_gguf(path) for path in shards.variant(changes).paths]
    return {tensor.name: (file, tensor) for file in files for tensor in file.tensors}


def _copy(file: GgufFile, tensor: TensorInfo) -> TensorSource:
    def chunks() -> Iterator[NDArray[np.uint8]]:
        data = file.data(tensor)
        for start in range(0, len(data), _COPY_BYTES):
            yield data[start : start + _COPY_BYTES]

    return TensorSource(name=tensor.name, shape=tensor.shape, type=tensor.type, chunks=chunks)
