"""Plan -> GGUF: the shards' bytes in the source's order, written beside and renamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cerebellum.base import Base
from cerebellum.gguf import GgufFile, TensorInfo, TensorSource, read_gguf, write_gguf
from cerebellum.shards import Shards
from cerebellum.source import Source
from cerebellum.verdicts import Changes

_COPY_BYTES = 16 << 20
_PRECISIONS = (".f16", ".bf16", ".f32", "-f16", "-bf16", "-f32")


def build(source: Source, base: Base, shards: Shards, changes: Changes, out: Path) -> None:
    """Writes the base with ``changes`` as one ordinary GGUF, metadata copied as bytes.

    A shard whose bytes changed on the disk since it was made is noticed here and made again.
    """
    located = _locate(shards, changes)
    tensors = [_copy(*located[name]) for name in source.tensors]
    write_gguf(out, base.records, tensors, base.alignment)


def output_path(folder: Path, source: Source, base: Base) -> Path:
    """Returns ``<name>-Cerebellum-<label>.gguf``; the label is one that the Hub recognises in file names."""
    stem = source.path.stem
    for suffix in _PRECISIONS:
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
    return folder / f"{stem}-Cerebellum-{base.label}.gguf"


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
