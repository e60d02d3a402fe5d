"""Makes the files that a benchmark compares: every tensor at a type by an encoder, quantized once for all of them.

A type that our encoder leaves to ggml has the same bytes from both, and IQ types take ggml a minute each on a model of
1.5B: whatever a shard of the run or an earlier file holds is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from cerebellum.base import Base
from cerebellum.encode import RECODABLE
from cerebellum.errors import BadInput
from cerebellum.gguf import GgufFile, TensorSource, read_gguf, write_gguf
from cerebellum.shards import tensor_content
from cerebellum.workspace import Workspace

By = Literal["ours", "ggml"]
Types = Mapping[str, GGMLQuantizationType]
Bytes = NDArray[np.uint8]


@dataclass(kw_only=True)
class Maker:
    """Writes files into ``folder``; one that is there is taken as it is."""

    workspace: Workspace
    folder: Path
    _known: dict[tuple[str, str, str], GgufFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.workspace.path("shards").glob("*.gguf")):
            self._learn(path, "ours")

    def _learn(self, path: Path, by: By) -> None:
        try:
            file = read_gguf(path)
        except BadInput:  # of a killed run
            return
        for tensor in file.tensors:
            who = by if tensor.type in RECODABLE else "either"
            self._known.setdefault((tensor.name, tensor.type.name, who), file)

    def write(self, name: str, types: Types, by: By, base: Base | None = None) -> Path:
        """Writes the source at some types, rounded by one of the two encoders."""
        path = self.folder / f"{name}.gguf"
        like = base or self.workspace.base
        if not path.exists():
            tensors = [self._tensor(tensor, kind, by) for tensor, kind in types.items()]
            write_gguf(path, like.records, tensors, like.alignment)
        self._learn(path, by)
        return path

    def _tensor(self, name: str, kind: GGMLQuantizationType, by: By) -> TensorSource:
        shape = self.workspace.source.tensors[name].shape
        return TensorSource(name=name, shape=shape, type=kind, chunks=partial(self._bytes, name, kind, by))

    def _bytes(self, name: str, kind: GGMLQuantizationType, by: By) -> Iterator[Bytes]:
        who = by if kind in RECODABLE else "either"
        known = self._known.get((name, kind.name, who))
        if known is not None:
            return iter([known.data(next(tensor for tensor in known.tensors if tensor.name == name))])
        recipe = self.workspace.recipe
        if by == "ggml":
            recipe = replace(recipe, engine=self.workspace.engine)
        return tensor_content(recipe, name, kind)
