"""What goes onto a GPU: all of it, or all but experts, or the last layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from cerebellum.gguf import read_gguf
from cerebellum.llama import offload
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.llama.offload import auto_offload
from cerebellum.llama.placement import LayerBytes, choose, layers_of, output_bytes, place
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
    found = choose(layers, 5, room)
    assert (found.gpu_layers, found.cpu_expert_layers) == (gpu_layers, cpu_experts)
    assert words in found.line and "\n" not in found.line
    assert found.whole == (gpu_layers == 0 or room >= 445 or (layers is DENSE and room >= 45))


def test_every_byte_is_in_a_layer_or_the_output() -> None:
    tensors = read_gguf(DEMO_MODEL).tensors
    layers = layers_of(tensors)
    assert len(layers) == read_gguf(DEMO_MODEL).value("granitehybrid.block_count")
    assert all(layer.experts > layer.rest > 0 for layer in layers)
    placed = sum(layer.experts + layer.rest for layer in layers) + output_bytes(tensors)
    names = {tensor.name: tensor.n_bytes for tensor in tensors}
    twice = 0 if "output.weight" not in names else names["token_embd.weight"]
    assert placed == sum(names.values()) - twice


def test_a_card_that_is_large_enough_has_no_bound() -> None:
    large = auto_offload([DEMO_MODEL], 512, free=24 << 30)
    assert (large.gpu_layers, large.gpu_room) == (-1, None) and "all 6 layers" in large.line


def test_a_card_without_room_leaves_all_to_the_cpu() -> None:
    small = auto_offload([DEMO_MODEL], 512, free=1 << 30)
    assert (small.gpu_layers, small.gpu_room) == (0, 0) and "nothing fits" in small.line


def test_the_room_has_a_bound_where_a_fine_variant_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_FINEST", 10_000.0)
    found = auto_offload([DEMO_MODEL], 512, free=24 << 30)
    assert found.gpu_layers == -1 and found.gpu_room is not None
    assert 20 << 30 < found.gpu_room < 24 << 30 and found.gpu_room % (1 << 26) == 0


def test_every_model_is_placed_for_itself() -> None:
    """A base that fits stays whole on the GPU beside a source that does not."""
    source = read_gguf(DEMO_MODEL)
    n_bytes = sum(tensor.n_bytes for tensor in source.tensors)
    assert not place([DEMO_MODEL], n_bytes // 2).whole
    assert place([DEMO_MODEL], 2 * n_bytes).whole


def test_a_model_that_does_not_fit_is_told_of_once() -> None:
    told: list[str] = []
    engine = LlamaEngine(EngineSettings(threads=1, gpu_layers=-1, gpu_room=20 << 20), told.append)
    for _ in range(2):
        with engine.weights([DEMO_MODEL]):
            pass
    assert len(told) == 1 and "experts" in told[0] and DEMO_MODEL.name in told[0]


def test_without_a_card_the_cpu_does_it_all() -> None:
    found = auto_offload([DEMO_MODEL], 512)
    assert found.gpu_layers == 0 and "no GPU" in found.line


def test_experts_on_the_host_are_the_same_model(embedded: Path) -> None:
    """Without a GPU the override changes nothing, but llama.cpp must take it."""
    settings = EngineSettings(threads=1, gpu_layers=-1, gpu_room=20 << 20)
    engine = LlamaEngine(settings)
    tokens = engine.tokenize(embedded, b"The quick brown fox jumps over the lazy dog. " * 9).tokens[:64]
    with (
        engine.open([embedded], 64) as model,
        LlamaEngine(EngineSettings(threads=1)).open([embedded], 64) as other,
    ):
        assert (model.logits(tokens) == other.logits(tokens)).all()
    assert "what fits into 20 MiB" in engine.identity
