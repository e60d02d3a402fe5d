"""How much of a model a GPU can hold: ``--gpu-layers auto``, worked out from llama.cpp's own report.

Everything goes onto the GPU where it fits beside cache, compute buffers and scratch. Where it does not, the
routed experts leave first, layer by layer, since few of them are read for a token; only then do whole layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cerebellum.gguf import TensorInfo, read_gguf
from cerebellum.llama.allocation import memory_report
from cerebellum.llama.library import gpus
from cerebellum.llama.native import GPU_TOKENS
from cerebellum.units import size

_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")
_SPARE_SHARE = 0.05  # of the free memory: scratch of scoring, other programs
_SPARE_BYTES = 1 << 30  # and at least this
_USUAL_UBATCH = 512  # llama.cpp's, which its report of compute buffers is for


@dataclass(frozen=True, kw_only=True)
class Offload:
    """``gpu_layers`` (-1: all) go to the GPU, but the experts of the first ``cpu_expert_layers``.

    ``line`` says so for people.
    """

    gpu_layers: int
    cpu_expert_layers: int
    line: str


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """What one layer's weights take: its routed experts, and all else."""

    experts: int
    rest: int


def auto_offload(paths: Sequence[Path], ctx: int, free: int | None = None) -> Offload:
    """What to put on the first GPU, for the largest model that will be opened; all on the CPU without one.

    ``free`` bytes of the GPU stand in for what it says itself.
    """
    found = gpus()
    if not found and free is None:
        return Offload(gpu_layers=0, cpu_expert_layers=0, line="no GPU: everything runs on the CPU")
    if free is None:
        free = found[0].free
    name = found[0].name if found else "a GPU"
    tensors = [tensor for path in paths for tensor in read_gguf(path).tensors]
    sequences = max(1, GPU_TOKENS // ctx)
    report = memory_report(paths, ctx * sequences, sequences=sequences)
    compute = report.compute * max(1, ctx * sequences // _USUAL_UBATCH)
    room = free - max(int(free * _SPARE_SHARE), _SPARE_BYTES) - report.cache - report.state - compute
    return choose(layers_of(tensors), output_bytes(tensors), room, f"{size(free)} free on {name}")


def choose(layers: Sequence[LayerBytes], output: int, room: int, card: str) -> Offload:
    """The most that fits into ``room`` bytes: all, all but some layers' experts, or the last layers only."""
    total = output + sum(layer.experts + layer.rest for layer in layers)
    if total <= room:
        line = f"all {len(layers)} layers on the GPU ({size(total)} of {card})"
        return Offload(gpu_layers=-1, cpu_expert_layers=0, line=line)
    left = total
    for number, layer in enumerate(layers, start=1):
        left -= layer.experts
        if layer.experts and left <= room:
            line = f"all but the experts of {number} of {len(layers)} layers ({size(left)} of {card})"
            return Offload(gpu_layers=-1, cpu_expert_layers=number, line=line)
    held = 0
    used = output
    for layer in reversed(layers):  # llama.cpp offloads the last layers first, the output head with them
        if used + layer.rest > room:
            break
        used += layer.rest
        held += 1
    with_experts = any(layer.experts for layer in layers)
    if not held:
        line = f"nothing fits on the GPU ({card}): everything runs on the CPU"
        return Offload(gpu_layers=0, cpu_expert_layers=0, line=line)
    line = f"the last {held} of {len(layers)} layers on the GPU ({size(used)} of {card})"
    return Offload(gpu_layers=held + 1, cpu_expert_layers=len(layers) if with_experts else 0, line=line)


def layers_of(tensors: Sequence[TensorInfo]) -> list[LayerBytes]:
    """Bytes of every layer, in order."""
    experts: dict[int, int] = {}
    rest: dict[int, int] = {}
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        if match:
            part = experts if _EXPERTS.search(tensor.name) else rest
            part[int(match[1])] = part.get(int(match[1]), 0) + tensor.n_bytes
    count = max([*experts, *rest], default=-1) + 1
    return [LayerBytes(experts=experts.get(i, 0), rest=rest.get(i, 0)) for i in range(count)]


def output_bytes(tensors: Sequence[TensorInfo]) -> int:
    """The output head; where a model has none of its own, its embeddings are loaded a second time for it."""
    outside = {t.name: t.n_bytes for t in tensors if not _LAYER.match(t.name)}
    embeddings = outside.pop("token_embd.weight", 0)
    return sum(outside.values()) + (0 if "output.weight" in outside else embeddings)
