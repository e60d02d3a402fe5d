"""Quantization: bit for bit what llama.cpp itself writes, or a line that names the tensor."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
from gguf import quants

from cerebellum.engine.protocols import QuantizeJob
from cerebellum.errors import BadInput
from cerebellum.gguf import (
    LADDER,
    GGMLQuantizationType,
    bits_per_weight,
    needs_imatrix,
    parse_preset,
    preset_names,
    row_bytes,
)
from cerebellum.llama.library import llama
from cerebellum.llama.presets import preset_types
from cerebellum.llama.quantize import quantize, round_trip, to_float
from cerebellum.source import Source, open_source

T = GGMLQuantizationType


def random_matrix(source: Source) -> dict[str, np.ndarray]:
    """An importance for every weight of a layer, as llama-quantize has it; none for embeddings."""
    rng = np.random.default_rng(7)
    return {
        name: rng.exponential(
            size=tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)
        ).astype(np.float32)
        for name, tensor in source.tensors.items()
        if name.startswith("blk.") and len(tensor.shape) > 1
    }


def quantized_by_llama_cpp(source: Source, preset: str, matrix: dict[str, np.ndarray], out: Path) -> Source:
    """What llama-quantize --imatrix does, through the same C function."""
    lib = llama()
    entries = (lib.llama_model_imatrix_data * (len(matrix) + 1))()
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.imatrix = int(parse_preset(preset)), 2, entries
    status = lib.llama_model_quantize(os.fsencode(source.path), os.fsencode(out), ctypes.byref(params))
    assert status == 0
    return open_source(out, allow_requantize=True)


@pytest.mark.parametrize("preset", ["Q3_K_M", "Q2_K"])
def test_every_tensor_is_what_llama_cpp_writes(embedded: Path, tmp_path: Path, preset: str) -> None:
    source = open_source(embedded)
    matrix = random_matrix(source)
    theirs = quantized_by_llama_cpp(source, preset, matrix, tmp_path / "theirs.gguf")
    types = preset_types(embedded, parse_preset(preset), has_imatrix=True)
    assert types == {name: tensor.type for name, tensor in theirs.tensors.items()}
    assert {T.Q3_K, T.Q4_K} & set(types.values())
    for name, tensor in source.tensors.items():
        job = QuantizeJob(
            name=name,
            raw=source.read(name),
            shape=tensor.shape,
            from_type=tensor.type,
            to_type=types[name],
            importance=matrix.get(name),
        )
        ours = np.concatenate(list(quantize(job, threads=2)))
        assert np.array_equal(ours, theirs.read(name)), name


def job(to_type: GGMLQuantizationType, shape: tuple[int, ...] = (256, 8), **changed: object) -> QuantizeJob:
    values = np.random.default_rng(0).normal(size=shape[::-1]).astype(np.float32)
    importance = np.ones(shape[0] * (shape[2] if len(shape) > 2 else 1), np.float32)
    given = {
        "name": "blk.3.some_weight",
        "raw": values.view(np.uint8).ravel(),
        "shape": shape,
        "from_type": T.F32,
        "to_type": to_type,
        "importance": importance,
    }
    return QuantizeJob(**{**given, **changed})


def result(what: QuantizeJob, threads: int = 2) -> np.ndarray:
    return np.concatenate(list(quantize(what, threads)))


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
def test_the_ladder_comes_back_within_its_bits(kind: GGMLQuantizationType) -> None:
    """The error of normal values falls by half with each bit: 2 ** (2 - bits) is a generous line."""
    given = job(kind)
    raw = result(given)
    assert raw.size == 8 * row_bytes(kind, 256)
    back = to_float(raw, kind, 256)
    values = given.raw.view(np.float32)
    error = float(np.sqrt(np.mean((back - values) ** 2)))
    assert back.shape == values.shape
    assert error < 2.0 ** (2 - bits_per_weight(kind))
    assert np.corrcoef(back, values)[0, 1] > 0.85


@pytest.mark.parametrize("kind", [T.F16, T.BF16])
def test_half_precision_sources_give_what_their_values_give(kind: GGMLQuantizationType) -> None:
    values = job(T.Q2_K).raw.view(np.float32)
    if kind == T.F16:
        raw = values.astype(np.float16).view(np.uint8)
        exact = values.astype(np.float16).astype(np.float32)
    else:
        raw = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        exact = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.array_equal(to_float(raw, kind, 256), exact)
    half = result(job(T.Q2_K, raw=raw, from_type=kind))
    assert np.array_equal(half, result(job(T.Q2_K, raw=exact.view(np.uint8))))


@pytest.mark.parametrize("kind", [T.Q2_K, T.IQ2_XXS, T.Q8_0], ids=lambda kind: kind.name)
def test_threads_do_not_change_bytes(kind: GGMLQuantizationType) -> None:
    """Three experts of more than one block of work each."""
    shape = (512, 2100, 3) if kind != T.IQ2_XXS else (256, 64, 3)
    importance = np.random.default_rng(1).exponential(size=shape[0] * 3).astype(np.float32)
    given = job(kind, shape, importance=importance)
    assert np.array_equal(result(given, threads=1), result(given, threads=5))


def test_each_expert_has_its_own_importance() -> None:
    importance = np.random.default_rng(1).exponential(size=512).astype(np.float32) ** 3
    whole = job(T.Q2_K, (256, 8, 2), importance=importance)
    parts = np.split(whole.raw, 2)
    apart = [
        result(job(T.Q2_K, raw=part, importance=part_importance))
        for part, part_importance in zip(parts, np.split(importance, 2), strict=True)
    ]
    assert np.array_equal(result(whole), np.concatenate(apart))
    swapped = job(T.Q2_K, (256, 8, 2), importance=np.roll(importance, 256))
    assert not np.array_equal(result(swapped), result(whole))


def test_the_same_type_is_copied_unread() -> None:
    raw = np.arange(100, dtype=np.uint8)
    given = job(T.Q3_K, raw=raw, from_type=T.Q3_K, shape=(576, 1), importance=None)
    assert result(given) is not None and np.array_equal(result(given), raw)


def refusal(what: QuantizeJob) -> str:
    with pytest.raises(BadInput) as caught:
        result(what)
    message = str(caught.value)
    assert "blk.3.some_weight" in message and len(message.splitlines()) == 1
    return message


def test_rows_that_are_no_blocks_are_refused() -> None:
    assert "rows of 576 cannot be Q2_K" in refusal(job(T.Q2_K, (576, 2)))


@pytest.mark.parametrize("kind", [kind for kind in LADDER if needs_imatrix(kind)], ids=lambda k: k.name)
def test_types_that_need_an_importance_matrix_are_refused_without(kind: GGMLQuantizationType) -> None:
    assert "importance matrix" in refusal(job(kind, importance=None))


@pytest.mark.parametrize("size", [255, 512])
def test_an_importance_of_another_size_is_refused(size: int) -> None:
    message = refusal(job(T.Q2_K, importance=np.ones(size, np.float32)))
    assert str(size) in message and "256" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [T.F32, T.F16])
def test_a_source_that_is_not_finite_is_refused(value: float, kind: GGMLQuantizationType) -> None:
    values = np.zeros(256 * 8, np.float32 if kind == T.F32 else np.float16)
    values[1000] = value
    assert "not finite" in refusal(job(T.Q3_K, raw=values.view(np.uint8), from_type=kind))


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
@pytest.mark.parametrize("importance", [1e-38, 1e-12, 1e30])
def test_zeros_and_extreme_importances_still_quantize(kind: GGMLQuantizationType, importance: float) -> None:
    """Dead experts are common: rows of zeros, columns that nothing ever touched."""
    values = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    values[3] = 0
    weights = np.full(256, importance, np.float32)
    back = to_float(result(job(kind, raw=values.view(np.uint8).ravel(), importance=weights)), kind, 256)
    assert np.isfinite(back).all()
    assert np.abs(back.reshape(8, 256)[3]).max() < 1e-3


def test_presets_are_named_as_llama_quantize_names_them() -> None:
    assert parse_preset("q3_k_m") == parse_preset("Q3_K_M") == parse_preset("Q3_K")
    assert {"Q2_K", "Q3_K_M", "Q4_K_M", "IQ2_XXS", "F16"} <= set(preset_names())
    with pytest.raises(BadInput, match=r"Q9_Z.*Q3_K_M"):
        parse_preset("Q9_Z")


@pytest.mark.parametrize("kind", LADDER, ids=lambda kind: kind.name)
def test_reading_back_gives_the_bits_that_gguf_py_gives(kind: GGMLQuantizationType) -> None:
    raw = result(job(kind, shape=(512, 33)))
    theirs = quants.dequantize(raw.reshape(-1, row_bytes(kind, 512)), kind).reshape(-1)
    ours = to_float(raw, kind, 512)
    assert np.array_equal(ours.view(np.uint32), np.ascontiguousarray(theirs, np.float32).view(np.uint32))


@pytest.mark.parametrize("from_type", [T.Q4_K, T.Q6_K, T.Q8_0])
def test_a_quantized_source_gives_what_its_values_give(from_type: GGMLQuantizationType) -> None:
    packed = result(job(from_type))
    values = to_float(packed, from_type, 256)
    again = result(job(T.Q2_K, raw=packed, from_type=from_type))
    assert np.array_equal(again, result(job(T.Q2_K, raw=values.view(np.uint8))))


def test_a_round_trip_on_one_thread_is_quantize_and_back() -> None:
    given = job(T.Q3_K, shape=(256, 8, 3))
    back = to_float(result(given), T.Q3_K, 256)
    assert np.array_equal(round_trip(given), back)


def test_half_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole rows"):
        to_float(np.zeros(100, np.uint8), T.Q4_K, 256)
