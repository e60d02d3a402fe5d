"""What goes onto a GPU: all of it, or all but experts, or the last layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from cerebellum.gguf import read_gguf
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.llama.offload import LayerBytes, auto_offload, choose, layers_of, output_bytes
from cerebellum.settings import DEMO_MODEL

DENSE = [LayerBytes(experts=0, rest=10)] * 4
SPARSE = [LayerBytes(experts=100, rest=10)] * 4


@pytest.mark.parametrize(
    ("layers", "room", "gpu_layers", "cpu_experts", "words"),
    [
        (DENSE, 45, -1, 0, "all 4 layers on the GPU"),
        (DENSE, 44, 4, 0, "the last 3 of 4 layers"),
        (DENSE, 14, 0, 0, "nothing fits on the GPU"),
        (SPARSE, 445, -1, 0, "all 4 layers on the GPU"),
        (SPARSE, 444, -1, 1, "but the experts of 1 of 4 layers"),
        (SPARSE, 145, -1, 3, "but the experts of 3 of 4 layers"),
        (SPARSE, 45, -1, 4, "but the experts of 4 of 4 layers"),
        (SPARSE, 35, 4, 4, "the last 3 of 4 layers"),
    ],
)
def test_experts_leave_first_then_layers(
    layers: list[LayerBytes], room: int, gpu_layers: int, cpu_experts: int, words: str
) -> None:
    found = choose(layers, 5, room, "24 GB free on CUDA0")
    assert (found.gpu_layers, found.cpu_expert_layers) == (gpu_layers, cpu_experts)
    assert words in found.line and "24 GB free on CUDA0" in found.line and "\n" not in found.line


def test_every_byte_is_in_a_layer_or_the_output() -> None:
    tensors = read_gguf(DEMO_MODEL).tensors
    layers = layers_of(tensors)
    assert len(layers) == read_gguf(DEMO_MODEL).value("granitehybrid.block_count")
    assert all(layer.experts > layer.rest > 0 for layer in layers)
    placed = sum(layer.experts + layer.rest for layer in layers) + output_bytes(tensors)
    names = {tensor.name: tensor.n_bytes for tensor in tensors}
    twice = 0 if "output.weight" not in names else names["token_embd.weight"]
    assert placed == sum(names.values()) - twice


def test_a_card_that_is_large_enough_holds_all() -> None:
    assert auto_offload([DEMO_MODEL], 512, free=24 << 30).gpu_layers == -1
    assert auto_offload([DEMO_MODEL], 512, free=1 << 30).gpu_layers == 0


def test_without_a_card_the_cpu_does_it_all() -> None:
    found = auto_offload([DEMO_MODEL], 512)
    assert found.gpu_layers == 0 and "no GPU" in found.line


def test_experts_on_the_host_are_the_same_model(embedded: Path) -> None:
    """Without a GPU the override changes nothing, but llama.cpp must take it."""
    settings = EngineSettings(threads=1, cpu_expert_layers=2)
    engine = LlamaEngine(settings)
    tokens = engine.tokenize(embedded, b"The quick brown fox jumps over the lazy dog. " * 9).tokens[:64]
    with (
        engine.open([embedded], 64) as model,
        LlamaEngine(EngineSettings(threads=1)).open([embedded], 64) as other,
    ):
        assert (model.logits(tokens) == other.logits(tokens)).all()
    assert "experts of 2 layers on the host" in engine.identity
