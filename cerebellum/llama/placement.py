"""What of a model goes onto a GPU with room for so many bytes of weights. Pure: it reads headers and nothing else.

All of it where it fits. Where it does not, the routed experts leave first, layer by layer, since few of them are
read for a token (llama.cpp's ``--n-cpu-moe`` does the same); only then do whole layers. Every model of a run is
placed for itself: a source that fits in part does not keep a base from fitting whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cerebellum.gguf import TensorInfo, read_gguf
from cerebellum.units import size

_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """``gpu_layers`` (-1: all) go onto the GPU, but the experts of the first ``cpu_expert_layers``.

    ``line`` says so for people.
    """

    gpu_layers: int
    cpu_expert_layers: int = 0
    line: str = ""

    @property
    def whole(self) -> bool:
        """Whether all weights lie on one kind of device."""
        return self.gpu_layers in (0, -1) and not self.cpu_expert_layers


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """What one layer's weights take: its routed experts, and all else."""

    experts: int
    rest: int


def place(paths: Sequence[Path], room: int) -> Placement:
    """Returns how much of the model over ``paths`` fits into ``room`` bytes of a GPU."""
    tensors = [tensor for path in paths for tensor in read_gguf(path).tensors]
    return choose(layers_of(tensors), output_bytes(tensors), room)


def choose(layers: Sequence[LayerBytes], output: int, room: int) -> Placement:
    """Returns the most that fits into ``room`` bytes: all, all but some layers' experts, or the last layers only."""
    total = output + sum(layer.experts + layer.rest for layer in layers)
    if total <= room:
        line = f"all {len(layers)} layers on the GPU ({size(total)} of {size(room)} for weights)"
        return Placement(gpu_layers=-1, line=line)
    left = total
    for number, layer in enumerate(layers, start=1):
        left -= layer.experts
        if layer.experts and left <= room:
            on_gpu = f"{size(left)} of {size(total)} on the GPU"
            line = f"all but the experts of {number} of {len(layers)} layers ({on_gpu})"
            return Placement(gpu_layers=-1, cpu_expert_layers=number, line=line)
    held = 0
    used = output
    for layer in reversed(layers):  # llama.cpp offloads the last layers first, the output head with them
        if used + layer.rest > room:
            break
        used += layer.rest
        held += 1
    with_experts = any(layer.experts for layer in layers)
    if not held:
        line = f"nothing fits on the GPU ({size(room)} for weights): everything runs on the CPU"
        return Placement(gpu_layers=0, line=line)
    line = f"the last {held} of {len(layers)} layers on the GPU ({size(used)} of {size(total)})"
    return Placement(gpu_layers=held + 1, cpu_expert_layers=len(layers) if with_experts else 0, line=line)


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
