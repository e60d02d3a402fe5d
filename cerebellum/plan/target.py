"""Turns the size that was asked for into bytes of file: a number, a preset's size, or what a GPU has room for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from cerebellum.base import preset_base
from cerebellum.engine.protocols import Engine
from cerebellum.gguf import tensor_bytes
from cerebellum.groups import attention_layers, recurrent_layers
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.layout import Layout
from cerebellum.memory.shape import (
    Memory,
    Shape,
    ask,
    memory_json,
    memory_shape,
    off_the_gpu,
    weights_budget,
)
from cerebellum.plan.artifacts import GpuMemory
from cerebellum.settings import Bytes, Gpu, Preset
from cerebellum.source import Source, plain_metadata
from cerebellum.verdicts import NOTHING, Changes

_SPLIT_BYTES = 512
"""Header, three records and padding of one split, from above."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The largest file that is wanted, in bytes, and the room on the GPU that the size came from, if any.

    ``for_splits`` of its bytes are set aside for the headers of splits, where it will be split.
    """

    file_bytes: int
    room: _GpuRoom | None = field(default=None, repr=False)
    for_splits: int = 0

    @property
    def model_bytes(self) -> int:
        """The bytes that the model may have as one file."""
        return self.file_bytes - self.for_splits

    def split_above(self, n_bytes: int) -> Target:
        """Returns the same size for a result that is written as splits of at most ``n_bytes``."""
        if self.file_bytes <= n_bytes:
            return self
        return replace(self, for_splits=(2 + self.file_bytes // n_bytes) * _SPLIT_BYTES)

    def memory(self, changes: Changes) -> GpuMemory | None:
        """Returns what the base with ``changes`` takes on the GPU part by part, or None where none was named."""
        return None if self.room is None else self.room.taken(changes)


def target_of(
    size: Bytes | Preset | Gpu,
    engine: Engine,
    source: Source,
    layout: Layout,
    matrix: ImportanceMatrix | None = None,
) -> Target:
    """Returns the bytes of file that a size stands for on this model.

    Raises BadInput for a preset that llama.cpp does not know, and AnswerIsNo for a GPU where the context leaves
    no room for weights. llama.cpp reads the model's header and loads no weights.
    """
    match size:
        case Bytes(n_bytes=n_bytes):
            return Target(file_bytes=n_bytes)
        case Preset(name=name):
            preset = replace(layout, base=preset_base(engine, source, name, matrix))
            return Target(file_bytes=preset.file_bytes())
        case Gpu():
            room = _gpu_room(size, source, layout)
            return Target(file_bytes=room.file_bytes(), room=room)


@dataclass(frozen=True, kw_only=True)
class _GpuRoom:
    """A GPU with all that goes on it beside the weights: the cache of the context, the state, compute buffers."""

    gpu: Gpu
    layout: Layout
    elsewhere: frozenset[str]
    shape: Shape
    beside: Memory

    def file_bytes(self) -> int:
        """Returns the largest file that runs on the GPU; AnswerIsNo where the rest leaves no room for one.

        A file is larger than its weights on the GPU: by its header, and by tensors that stay in main memory.
        """
        off_the_gpu = self.layout.tensor_bytes() - _bytes_on_gpu(self.layout, NOTHING, self.elsewhere)
        room = weights_budget(self.shape, self.beside, self.gpu.n_bytes)
        return room + off_the_gpu + self.layout.header_bytes()

    def taken(self, changes: Changes) -> GpuMemory:
        """Returns what the base with ``changes`` takes, part by part, in bytes."""
        weights = _bytes_on_gpu(self.layout, changes, self.elsewhere)
        told = memory_json(
            replace(self.shape, weights=weights), replace(self.beside, weights=weights), self.gpu.n_bytes
        )
        return msgspec.convert(told, GpuMemory)


def _gpu_room(gpu: Gpu, source: Source, layout: Layout) -> _GpuRoom:
    """Asks llama.cpp, once, what it would allocate beside the weights for this model and context."""
    elsewhere = off_the_gpu(source.tensors.keys())
    shape = memory_shape(
        plain_metadata(source.files[0]),
        attention_layers(source),
        len(recurrent_layers(source)),
        _bytes_on_gpu(layout, NOTHING, elsewhere),
    )
    beside = ask(shape, source.paths, gpu.context)
    return _GpuRoom(gpu=gpu, layout=layout, elsewhere=elsewhere, shape=shape, beside=beside)


def _bytes_on_gpu(layout: Layout, changes: Changes, elsewhere: frozenset[str]) -> int:
    types = layout.types(changes)
    return sum(
        tensor_bytes(type_, layout.tensors[name].shape)
        for name, type_ in types.items()
        if name not in elsewhere
    )
