"""Memory: by hand, as llama.cpp reports it, and what a GPU leaves for the weights."""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from headers import Model, facts, write_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import convert
from rich.console import Console
from run_folder import source
from sparse import ATTENTION_LAYERS, N_LAYERS, write_sparse_granite

from cerebellum.cli.tables import memory_table
from cerebellum.errors import AnswerIsNo, BadInput
from cerebellum.gguf import GgufFile, read_gguf
from cerebellum.llama.allocation import Allocated, memory_report
from cerebellum.llama.library import LOG, llama
from cerebellum.memory.shape import (
    RESERVE_BYTES,
    SERVER_SEQUENCES,
    Memory,
    Shape,
    ask,
    contexts,
    ignores_window,
    largest_context,
    memory_json,
    memory_shape,
    off_the_gpu,
    weights_budget,
)
from cerebellum.plan.artifacts import GpuMemory
from cerebellum.settings import DEMO_MODEL
from cerebellum.source import plain_metadata

GIB = 1 << 30
ROUNDED = 2 * 0.005 * (1 << 20)  # llama.cpp logs two buffers at most, in hundredths of a MiB

FAMILIES = {
    "llama": Model(architecture="llama"),
    "untied": Model(architecture="llama", tied=False, vocabulary=128_256, width=4096, heads=32),
    "wide": Model(architecture="llama", vocabulary=512, width=8192, heads=64, heads_kv=8, inner=28_672),
    "heads": Model(
        architecture="qwen3", vocabulary=100, width=512, heads=32, heads_kv=32, head=128, inner=256
    ),
    "experts": Model(architecture="qwen3moe", vocabulary=2000, width=2048, inner=768, experts=64, used=8),
    "narrow": Model(architecture="qwen3moe", vocabulary=100, inner=256, experts=64, used=16),
    "gemma2": Model(architecture="gemma2", vocabulary=256_000, width=2304, window=4096, layers=4),
    "gemma3": Model(architecture="gemma3", heads_kv=1, head=256, window=512, layers=7),
    "pattern": Model(architecture="gemma3", window=1024, layers=3, pattern=(True, False, True)),
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return read_gguf(write_sparse_granite(tmp_path_factory.mktemp("sparse") / "granite.gguf"))


def shape_of(file: GgufFile, attention_layers: tuple[int, ...], n_layers: int) -> Shape:
    weights = sum(tensor.n_bytes for tensor in file.tensors)
    return memory_shape(plain_metadata(file), attention_layers, n_layers - len(attention_layers), weights)


def holds(formula: Memory, said: Allocated, windows: bool = False) -> None:
    """Weights and state to the rounding of the log, and the cache but for windows; the rest from above."""
    assert formula.weights == said.tensors
    if not windows:
        assert formula.cache == pytest.approx(said.cache, abs=ROUNDED)
    assert formula.cache >= said.cache - ROUNDED
    assert formula.state == pytest.approx(said.state, abs=ROUNDED)
    assert formula.compute >= said.compute


# --- as llama.cpp reports it


@pytest.mark.parametrize("context", [256, 4096, 4100, 32_768, 131_072])
@pytest.mark.parametrize("sequences", [1, SERVER_SEQUENCES])
def test_a_32b_header_is_what_llama_cpp_reports(sparse: GgufFile, context: int, sequences: int) -> None:
    shape = shape_of(sparse, ATTENTION_LAYERS, N_LAYERS)
    holds(shape.at(context, sequences), memory_report([sparse.path], context, sequences=sequences))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("context", "sequences"), [(256, 1), (1000, 1), (4096, 4), (32_768, 1), (131_072, 1)]
)
def test_families_are_what_llama_cpp_reports(tmp_path: Path, name: str, context: int, sequences: int) -> None:
    model = FAMILIES[name]
    file = read_gguf(write_header(tmp_path / "model.gguf", model))
    assert ignores_window(plain_metadata(file)) == bool(model.window)
    shape = shape_of(file, tuple(range(model.layers)), model.layers)
    said = memory_report([file.path], context, sequences=sequences)
    holds(shape.at(context, sequences), said, windows=bool(model.window))
    asked = ask(shape, [file.path], context, sequences)
    assert asked.cache == pytest.approx(said.cache, abs=ROUNDED) and asked.cache_asked


@settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_the_compute_buffer_is_bounded_whatever_the_sizes(tmp_path: Path, data: st.DataObject) -> None:
    model = Model(
        architecture=data.draw(st.sampled_from(["qwen3", "qwen3moe"])),
        vocabulary=data.draw(st.sampled_from([64, 4096, 100_000])),
        width=data.draw(st.integers(1, 32)) * 256,
        heads=data.draw(st.sampled_from([8, 16, 64])),
        heads_kv=data.draw(st.sampled_from([1, 4, 8])),
        head=data.draw(st.sampled_from([64, 128, 256])),
        inner=data.draw(st.integers(1, 64)) * 256,
    )
    if model.architecture == "qwen3moe":
        model = replace(model, experts=data.draw(st.integers(16, 64)), used=data.draw(st.integers(1, 16)))
    file = read_gguf(write_header(tmp_path / "model.gguf", model))
    context = data.draw(st.integers(1, 128)) * 256
    holds(shape_of(file, (0, 1), 2).at(context), memory_report([file.path], context))


@pytest.mark.parametrize("context", [4096, 32_768])
def test_a_real_load_takes_what_was_predicted(context: int) -> None:
    """What is asked without loading, and by formula, is what a load of the model then logs."""
    lib, shape = llama(), shape_of(read_gguf(DEMO_MODEL), (2, 5), 6)
    said = memory_report([DEMO_MODEL], context)
    with LOG.captured() as lines:
        model = lib.llama_model_load_from_file(os.fsencode(DEMO_MODEL), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = context
        lib.llama_free(lib.llama_init_from_model(model, params))
        lib.llama_model_free(model)
    log, memory = "".join(lines), shape.at(context)
    assert f"model buffer size = {memory.weights / 2**20:8.2f} MiB" in log
    assert f"KV buffer size = {memory.cache / 2**20:8.2f} MiB" in log
    assert f"RS buffer size = {memory.state / 2**20:8.2f} MiB" in log
    (compute,) = re.findall(r"compute buffer size = +([\d.]+) MiB", log)
    assert said.compute / 2**20 == pytest.approx(float(compute), abs=0.005)
    holds(memory, said)


def test_asking_keeps_exact_bytes_and_never_lowers_a_bound_without_a_gpu(sparse: GgufFile) -> None:
    shape = shape_of(sparse, ATTENTION_LAYERS, N_LAYERS)
    asked, formula = ask(shape, [sparse.path], 4096), shape.at(4096)
    assert (asked.cache, asked.state, asked.weights) == (formula.cache, formula.state, formula.weights)
    assert asked.compute >= formula.compute or asked.asked


def test_asking_about_no_model_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(BadInput, match=r"x\.gguf: llama\.cpp cannot load it"):
        memory_report([tmp_path / "x.gguf"], 4096)


# --- by hand


def test_memory_of_a_hybrid_by_hand(sparse: GgufFile) -> None:
    """4 of 40 layers cache 8 heads of 128, twice, in F16; 36 keep a state in F32."""
    given_facts = source()
    for shape in (
        memory_shape(given_facts.metadata, ATTENTION_LAYERS, 36, 14 << 30),
        memory_shape(plain_metadata(sparse), ATTENTION_LAYERS, 36, 14 << 30),
    ):
        memory = shape.at(4096)
        assert memory.cache == 4 * 2 * 8 * 128 * 2 * 4096
        assert memory.state == 36 * 4 * (3 * (8192 + 2 * 128) + 128 * 8192)
        assert memory.weights == 14 << 30
        assert (memory.runs_on(12), memory.runs_on(16)) == (False, True)
        assert shape.at(4096, SERVER_SEQUENCES).state == 4 * memory.state
        assert shape.at(4096, SERVER_SEQUENCES).cache == memory.cache


def test_a_gpu_leaves_the_rest_for_the_weights(sparse: GgufFile) -> None:
    """24 GiB less 64 MiB of cache, 147.48 of state, the compute buffer and half a GiB."""
    shape = shape_of(sparse, ATTENTION_LAYERS, N_LAYERS)
    memory = replace(shape.at(4096), compute=341 << 20)
    budget = weights_budget(shape, memory, 24 * GIB)
    assert budget == 24 * GIB - (64 << 20) - 154_644_480 - (341 << 20) - (512 << 20)
    assert replace(memory, weights=budget).runs_on(24)
    assert not replace(memory, weights=budget + 1).runs_on(24)


def test_a_gpu_that_is_too_small_says_what_would_do(sparse: GgufFile) -> None:
    shape = shape_of(sparse, ATTENTION_LAYERS, N_LAYERS)
    with pytest.raises(AnswerIsNo) as refusal:
        weights_budget(shape, shape.at(131_072), 8 * GIB, at_least=6 * GIB)
    message = str(refusal.value)
    assert message.startswith("8.000 GiB is too little at 131,072 tokens: cache 2.000 GiB, state 147.48 MiB")
    (tokens, gpu) = re.search(r"a context of ([\d,]+) tokens or a GPU of (\d+) GiB", message).groups()
    weights_budget(shape, shape.at(int(tokens.replace(",", ""))), 8 * GIB, at_least=6 * GIB)
    weights_budget(shape, shape.at(131_072), int(gpu) * GIB, at_least=6 * GIB)
    with pytest.raises(AnswerIsNo, match=r"at least 9\.000 GiB; a GPU of 11 GiB would do"):
        weights_budget(shape, shape.at(4096), 8 * GIB, at_least=9 * GIB)


def test_input_embeddings_stay_off_the_gpu_unless_they_are_the_output_too() -> None:
    assert off_the_gpu(["token_embd.weight", "output.weight"]) == {"token_embd.weight"}
    assert off_the_gpu(["token_embd.weight", "output_norm.weight"]) == frozenset()
    assert off_the_gpu(["token_embd.weight", "per_layer_token_embd.weight"]) == {
        "per_layer_token_embd.weight"
    }


def test_the_parts_add_up_and_are_told(sparse: GgufFile) -> None:
    shape = shape_of(sparse, ATTENTION_LAYERS, N_LAYERS)
    found = memory_json(replace(shape, weights=14 * GIB), replace(shape.at(4096), weights=14 * GIB), 24 * GIB)
    parts = [found[name] for name in ("weights", "cache", "state", "compute", "reserve")]
    assert sum(parts) == found["total"] == found["card"] - found["free"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(memory_table(convert(found, GpuMemory)))
    text = console.export_text()
    assert "4 attention layers, F16, 16,384 bytes a token" in text
    assert "36 recurrent layers, F32; llama-server without -np keeps 4 of them" in text
    assert "64.00 MiB" in text and "147.48 MiB" in text


@pytest.mark.parametrize("architecture", ["llama4", "phi3", "gemma3"])
def test_windows_are_not_guessed_at(architecture: str) -> None:
    """Which layers see one is llama.cpp's business: the cache is a bound, and says so."""
    windowed = facts(Model(architecture=architecture, window=2048))
    whole = facts(Model(architecture=architecture))
    shape = memory_shape(windowed, (0, 1), 0, 0)
    assert ignores_window(windowed) and not ignores_window(whole)
    assert shape.at(8192).cache == memory_shape(whole, (0, 1), 0, 0).at(8192).cache
    assert memory_json(shape, shape.at(8192), 24 * GIB)["cache_from"] == "bound"


# --- properties

shapes = st.builds(
    Shape,
    weights=st.integers(0, 100 * GIB),
    cache_bytes_per_token=st.integers(0, 1 << 20),
    window=st.sampled_from([0, 512, 4096]),
    state=st.integers(0, GIB),
    vocabulary=st.integers(1, 300_000),
    activations=st.integers(1, 300_000),
    attention_layers=st.integers(0, 80),
    recurrent_layers=st.integers(0, 80),
)


@given(shapes, st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.integers(1, 8))
def test_more_context_or_conversations_never_take_less(shape: Shape, first: int, more: int, n: int) -> None:
    assert shape.at(first).total <= shape.at(first + more).total
    assert shape.at(first).total <= shape.at(first, n).total


@given(shapes, st.integers(0, 80 * GIB), st.integers(1, 1 << 20))
def test_the_largest_context_fits_and_the_next_does_not(shape: Shape, room: int, below: int) -> None:
    found = largest_context(shape, room, below)
    assert found <= below and (not found or shape.at(found).beside_weights <= room)
    if found + 256 <= below:
        assert shape.at(found + 256).beside_weights > room


@given(shapes, st.integers(1, 1 << 20), st.integers(0, 200))
def test_a_budget_fills_the_gpu_exactly_or_is_refused(shape: Shape, context: int, gpu_gib: int) -> None:
    memory = shape.at(context)
    try:
        budget = weights_budget(shape, memory, gpu_gib * GIB)
    except AnswerIsNo:
        assert memory.beside_weights + RESERVE_BYTES >= gpu_gib * GIB
    else:
        assert budget + memory.beside_weights + RESERVE_BYTES == gpu_gib * GIB


# --- other families


_HEADS = {"attention.head_count": 32, "embedding_length": 4096}


@pytest.mark.parametrize(
    ("architecture", "facts", "cache", "state"),
    [
        ("llama", _HEADS, 32 * 256, 0),
        ("llama", _HEADS | {"attention.head_count_kv": 8}, 8 * 256, 0),
        ("gemma3", _HEADS | {"attention.key_length": 256, "attention.value_length": 256}, 32 * 512, 0),
        (
            "deepseek2",
            {
                "attention.head_count_kv": 1,
                "attention.key_length": 576,
                "attention.value_length": 512,
                "attention.key_length_mla": 192,
            },
            576,
            0,
        ),
        ("rwkv7", {"embedding_length": 768, "wkv.head_size": 64}, 0, 768 * 66),
        ("lfm2", {"embedding_length": 1024, "shortconv.l_cache": 3}, 0, 2048),
    ],
)
def test_memory_of_other_families(architecture: str, facts: dict[str, int], cache: int, state: int) -> None:
    """Elements a layer by hand: two bytes each in the cache of 256 tokens, four in the state."""
    metadata = {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in facts.items()}
    attends, recurs = ((0,) if cache else (), 1 if state else 0)
    memory = memory_shape(metadata, attends, recurs, 0).at(256)
    assert (memory.cache, memory.state) == (256 * 2 * cache, 4 * state)


@pytest.mark.parametrize(
    ("full", "rows"), [(131_072, (4096, 32768, 131_072)), (4096, (4096,)), (2048, (2048,)), (0, (4096,))]
)
def test_contexts(full: int, rows: tuple[int, ...]) -> None:
    assert contexts(full) == rows
