"""How many bytes of weights a GPU has room for: ``--gpu-layers auto``, worked out from llama.cpp's own report.

Cache, compute buffers and scratch come first. What is left is the room that every model of the run is placed into
(``placement.py``), each for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cerebellum.gguf import read_gguf
from cerebellum.llama.allocation import memory_report
from cerebellum.llama.library import gpus
from cerebellum.llama.native import GPU_TOKENS
from cerebellum.llama.placement import choose, layers_of, output_bytes
from cerebellum.units import size

_SPARE_SHARE = 0.05  # of the free memory: scratch of scoring, other programs
_SPARE_BYTES = 1 << 30  # and at least this
_USUAL_UBATCH = 512  # llama.cpp's, which its report of compute buffers is for
_FINEST = 8.5 / 8  # bytes a weight of the finest type that a variant is made of, Q8_0
_STEP = 1 << 26  # room is a multiple of this, so that it can be told and given again


@dataclass(frozen=True, kw_only=True)
class Offload:
    """``gpu_layers`` of 0 (all on the CPU) or -1; ``gpu_room`` bytes of weights have a place, None: all that come.

    ``line`` says so for people.
    """

    gpu_layers: int
    gpu_room: int | None
    line: str


def auto_offload(paths: Sequence[Path], ctx: int, free: int | None = None) -> Offload:
    """Returns what room the first GPU has for the models made of the one over ``paths``; none without a GPU.

    ``free`` bytes of the GPU stand in for what it says itself. The room has no end where source and a variant
    all of the finest type both fit.
    """
    found = gpus()
    if not found and free is None:
        return Offload(gpu_layers=0, gpu_room=None, line="no GPU: everything runs on the CPU")
    if free is None:
        free = found[0].free
    card = f"{size(free)} free on {found[0].name if found else 'a GPU'}"
    tensors = [tensor for path in paths for tensor in read_gguf(path).tensors]
    sequences = max(1, GPU_TOKENS // ctx)
    report = memory_report(paths, ctx * sequences, sequences=sequences)
    compute = report.compute * max(1, ctx * sequences // _USUAL_UBATCH)
    room = free - max(int(free * _SPARE_SHARE), _SPARE_BYTES) - report.cache - report.state - compute
    room = max(room, 0) // _STEP * _STEP
    placed = choose(layers_of(tensors), output_bytes(tensors), room)
    finest = sum(max(tensor.n_bytes, round(tensor.n_elements * _FINEST)) for tensor in tensors)
    endless = placed.gpu_layers == -1 and placed.whole and finest <= room
    return Offload(
        gpu_layers=placed.gpu_layers and -1,
        gpu_room=None if endless else room,
        line=f"{placed.line}, {card}",
    )
