"""The importance matrix: counted right, kept exactly, never zero, made once."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Recorder, split_by_hand

from cerebellum import imatrix
from cerebellum.errors import BadInput
from cerebellum.files import sha256_file
from cerebellum.gguf import (
    GGMLQuantizationType,
    GGUFValueType,
    TensorSource,
    encode_kv,
    read_gguf,
    write_gguf,
)
from cerebellum.imatrix import Entry, collect, compute_or_reuse, filled
from cerebellum.llama.native import LlamaEngine
from cerebellum.texts import Corpus, load_corpus

CTX, CHUNKS = 64, 2
TOKENS = CTX * CHUNKS


@pytest.fixture(scope="module")
def corpus(embedded: Path, llama_engine: LlamaEngine, select_text: Path) -> Corpus:
    return load_corpus(llama_engine, embedded, select_text, CTX)


@pytest.fixture(scope="module")
def entries(embedded: Path, llama_engine: LlamaEngine, corpus: Corpus) -> dict[str, Entry]:
    return collect(llama_engine, [embedded], corpus, CHUNKS, lambda: None)


def test_every_demotable_weight_has_its_entry(entries: dict[str, Entry], embedded: Path) -> None:
    tensors = {tensor.name: tensor.shape for tensor in read_gguf(embedded).tensors}
    wanted = {
        name
        for name, shape in tensors.items()
        if name.startswith("blk.") and name.endswith("weight") and "norm" not in name and "conv" not in name
    }
    assert wanted - set(entries) <= {n for n in wanted if "ffn_gate_inp" in n}
    for name, entry in entries.items():
        n_experts = tensors[name][2] if len(tensors[name]) > 2 else 1
        assert entry.sums.shape == (n_experts, tensors[name][0])
        assert entry.counts.shape == (n_experts,)


def test_counts_add_up(entries: dict[str, Entry], embedded: Path) -> None:
    used = read_gguf(embedded).value("granitehybrid.expert_used_count")
    assert used >= 2
    for name, entry in entries.items():
        per_token = used if "_exps" in name else 1
        assert entry.counts.sum() == TOKENS * per_token, name
        assert (entry.sums >= 0).all() and np.isfinite(entry.sums).all()


def test_weights_that_see_the_same_input_have_the_same_sums(entries: dict[str, Entry]) -> None:
    layers = {name.split(".")[1] for name in entries if "attn_q" in name}
    assert layers
    for layer in layers:
        q, k, v = (entries[f"blk.{layer}.attn_{x}.weight"].sums for x in "qkv")
        assert np.array_equal(q, k) and np.array_equal(q, v)
    gate, up = entries["blk.0.ffn_gate_exps.weight"], entries["blk.0.ffn_up_exps.weight"]
    assert np.array_equal(gate.sums, up.sums) and np.array_equal(gate.counts, up.counts)
    shared = entries["blk.0.ffn_gate_shexp.weight"].sums
    # each token goes to `used` experts with the row that the shared expert sees
    used = gate.counts.sum() // TOKENS
    np.testing.assert_allclose(gate.sums.sum(axis=0), used * shared[0], rtol=1e-4)


def test_splits_give_the_same_matrix(
    entries: dict[str, Entry], embedded: Path, llama_engine: LlamaEngine, corpus: Corpus, tmp_path: Path
) -> None:
    splits = split_by_hand(embedded, tmp_path, "m", 2)
    again = collect(llama_engine, splits, corpus, CHUNKS, lambda: None)
    assert set(again) == set(entries)
    assert all(np.array_equal(again[name].sums, entry.sums) for name, entry in entries.items())


def test_chunks_are_additive(
    entries: dict[str, Entry], embedded: Path, llama_engine: LlamaEngine, corpus: Corpus
) -> None:
    ticks: list[int] = []
    first = collect(llama_engine, [embedded], corpus, 1, lambda: ticks.append(1))
    assert len(ticks) == 1
    for name, entry in first.items():
        assert (entry.counts <= entries[name].counts).all()
        assert (entry.sums <= entries[name].sums * (1 + 1e-6)).all()


@pytest.mark.slow
def test_it_is_llama_imatrix_within_a_percent(
    embedded: Path, llama_engine: LlamaEngine, select_text: Path, tmp_path: Path
) -> None:
    tool = shutil.which("llama-imatrix")
    if tool is None:
        pytest.skip("llama-imatrix is not on the PATH")
    text = load_corpus(llama_engine, embedded, select_text, 512)
    ours = collect(llama_engine, [embedded], text, 2, lambda: None)
    out = tmp_path / "theirs.gguf"
    asked = ["-m", embedded, "-f", select_text, "-c", "512", "--chunks", "2", "-o", out, "-t", "2"]
    subprocess.run([tool, *map(str, asked)], check=True, capture_output=True)
    theirs = imatrix.read(out)
    for name, entry in theirs.entries.items():
        found = ours[name]
        assert np.array_equal(found.counts, entry.counts) or "_exps" not in name
        seen = entry.counts > 0
        mine = found.sums[seen] / found.counts[seen, None]
        other = entry.sums[seen] / entry.counts[seen, None]
        assert np.abs(mine - other).sum() < 0.01 * other.sum(), name


# ---- files ----


def some_entries() -> dict[str, Entry]:
    rng = np.random.default_rng(3)
    return {
        "blk.0.attn_q.weight": Entry(
            sums=rng.exponential(size=(1, 32)).astype(np.float32), counts=np.array([640])
        ),
        "blk.0.ffn_up_exps.weight": Entry(
            sums=rng.exponential(size=(3, 16)).astype(np.float32), counts=np.array([100, 27, 1])
        ),
    }


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    imatrix.write(path, some_entries(), "text.txt", 10, 64, "a recipe")
    back = imatrix.read(path)
    assert back.chunk_count == 10 and back.datasets == ("text.txt",)
    assert list(back.entries) == list(some_entries())
    for name, entry in some_entries().items():
        assert np.array_equal(back.entries[name].counts, entry.counts)
        np.testing.assert_allclose(back.entries[name].sums, entry.sums, rtol=1e-6)
        np.testing.assert_allclose(back.importance(name), entry.importance(), rtol=1e-6)
    assert back.importance("token_embd.weight") is None


def test_the_file_is_llama_cpps(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    imatrix.write(path, some_entries(), "text.txt", 10, 64)
    file = read_gguf(path)
    assert file.value("general.type") == "imatrix"
    assert list(file.value("imatrix.datasets")) == ["text.txt"]
    assert file.value("imatrix.chunk_count") == 10 and file.value("imatrix.chunk_size") == 64
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    assert shapes["blk.0.ffn_up_exps.weight.in_sum2"] == (16, 3)
    assert shapes["blk.0.ffn_up_exps.weight.counts"] == (1, 3)


def legacy(entries: dict[str, tuple[int, list[float]]], chunks: int = 5) -> bytes:
    """llama.cpp's older format: values are mean squares times the number of calls."""
    raw = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode()
        raw += struct.pack("<ii", calls, len(values)) + struct.pack(f"<{len(values)}f", *values)
    return raw + struct.pack("<i", chunks) + struct.pack("<i", 8) + b"text.txt"


def test_the_legacy_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({"blk.0.a.weight": (4, [4.0, 8.0, 2.0]), "blk.1.b.weight": (1, [3.0])}))
    found = imatrix.read(path)
    assert found.chunk_count == 5
    np.testing.assert_allclose(found.importance("blk.0.a.weight"), [1.0, 2.0, 0.5])
    np.testing.assert_allclose(found.importance("blk.1.b.weight"), [3.0])


def test_legacy_zeros_do_not_stay_zero(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({"blk.0.a.weight": (0, [0.0] * 4), "blk.1.b.weight": (2, [0.0, 1.0])}))
    found = imatrix.read(path)
    assert all((found.importance(name) > 0).all() for name in found.entries)


def whole_file(tmp_path: Path, kind: str) -> bytes:
    path = tmp_path / "whole"
    if kind == "gguf":
        imatrix.write(path, some_entries(), "text.txt", 10, 64)
        return path.read_bytes()
    return legacy({"blk.0.a.weight": (4, [4.0, 8.0, 2.0]), "blk.1.b.weight": (1, [3.0])})


@pytest.mark.parametrize("kind", ["gguf", "legacy"])
@pytest.mark.parametrize("part", [0, 0.1, 0.3, 0.5, 0.6])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, part: float) -> None:
    whole = whole_file(tmp_path, kind)
    path = tmp_path / "cut"
    path.write_bytes(whole[: int(len(whole) * part)])
    refused(path)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0" * 64, b"\xff" * 64, b"this is a text, not a matrix" * 9, struct.pack("<i", 2**31 - 1)],
    ids=["empty", "zeros", "ones", "text", "huge count"],
)
def test_garbage_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(raw)
    refused(path)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.dat"
    path.write_bytes(raw)
    try:
        imatrix.read(path)
    except BadInput as error:
        assert len(str(error).splitlines()) == 1


def test_a_missing_file_and_a_model_are_refused(tmp_path: Path, embedded: Path) -> None:
    refused(tmp_path / "nowhere.gguf")
    refused(embedded)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_no_square_can_have_are_refused(tmp_path: Path, value: float) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({"blk.0.a.weight": (1, [1.0, value])}))
    assert "blk.0.a.weight" in refused(path)


def test_sums_without_counts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    sums = TensorSource(
        name="blk.0.a.weight.in_sum2",
        shape=(4, 1),
        type=GGMLQuantizationType.F32,
        chunks=lambda: [np.ones(4, np.float32)],
    )
    write_gguf(path, [encode_kv("general.type", "imatrix", GGUFValueType.STRING)], [sums])
    assert "counts" in refused(path)


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        imatrix.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- rarely used experts ----


@st.composite
def routed(draw: st.DrawFn) -> Entry:
    n_experts, columns = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    counts = draw(st.lists(st.integers(0, 10**6), min_size=n_experts, max_size=n_experts))
    values = st.one_of(st.just(0.0), st.floats(0, 2.0**99, width=32))
    rows = st.lists(values, min_size=columns, max_size=columns)
    sums = np.array(draw(st.lists(rows, min_size=n_experts, max_size=n_experts)), np.float32)
    sums[np.array(counts) == 0] = 0
    return Entry(sums=sums, counts=np.array(counts, np.int64))


@given(routed())
@settings(max_examples=200, deadline=None)
def test_importance_is_never_zero_and_the_unseen_are_the_mean_of_their_siblings(entry: Entry) -> None:
    found = filled(entry)
    assert found.shape == entry.sums.shape and found.dtype == np.float32
    assert (found > 0).all() and np.isfinite(found).all()
    seen = entry.counts > 0
    if seen.any() and not seen.all():
        siblings = (entry.sums[seen].astype(np.float64) / entry.counts[seen, None]).mean(axis=0)
        floor = max(siblings.mean() * 1e-6, float(np.finfo(np.float32).tiny))
        for row in found[~seen]:
            np.testing.assert_allclose(row, np.maximum(siblings, floor), rtol=1e-5)


@given(routed())
@settings(max_examples=50, deadline=None)
def test_unseen_experts_survive_the_file(tmp_path_factory: pytest.TempPathFactory, entry: Entry) -> None:
    path = tmp_path_factory.getbasetemp() / "routed.gguf"
    imatrix.write(path, {"blk.0.ffn_up_exps.weight": entry}, "text", 1, 64)
    back = imatrix.read(path)
    assert (back.entries["blk.0.ffn_up_exps.weight"].counts > 0).all()  # llama-quantize wants them so
    np.testing.assert_allclose(
        back.importance("blk.0.ffn_up_exps.weight"), entry.importance(), rtol=1e-4, atol=1e-37
    )


# ---- made once ----


def made(
    embedded: Path, engine: LlamaEngine, corpus: Corpus, out: Path, **changed: object
) -> tuple[bytes, int]:
    """The file, and how many chunks were decoded for it."""
    reporter = Recorder()
    asked = {
        "engine": engine,
        "shards": [embedded],
        "fingerprint": lambda: "abc",
        "corpus": corpus,
        "chunks": 1,
        "out": out,
        "reporter": reporter,
    }
    matrix = compute_or_reuse(**{**asked, **changed})
    assert matrix.sha256 == sha256_file(out)
    return out.read_bytes(), reporter.ticks


def test_it_is_reused_only_while_nothing_changed(
    embedded: Path, llama_engine: LlamaEngine, corpus: Corpus, report_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "imatrix.gguf"
    first, decoded = made(embedded, llama_engine, corpus, out)
    assert decoded == 1
    assert made(embedded, llama_engine, corpus, out) == (first, 0)
    assert made(embedded, llama_engine, corpus, out, fingerprint=lambda: "def")[1] == 1
    assert made(embedded, llama_engine, corpus, out, fingerprint=lambda: "def", chunks=2)[1] == 2
    other = load_corpus(llama_engine, embedded, report_text, CTX)
    changed, decoded = made(embedded, llama_engine, other, out)
    assert decoded == 1 and changed != first
    assert made(embedded, llama_engine, corpus, out) == (first, 1)


def test_more_chunks_than_the_text_has_are_all_of_them(
    embedded: Path, llama_engine: LlamaEngine, corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "imatrix.gguf"
    _, decoded = made(embedded, llama_engine, corpus, out, chunks=10**6)
    assert decoded == imatrix.read(out).chunk_count == corpus.n_chunks


@pytest.mark.parametrize("count", [math.nan, math.inf, -1.0, 1e30])
def test_a_count_that_counts_nothing_is_one_line(tmp_path: Path, count: float) -> None:
    out = tmp_path / "imatrix.gguf"
    values = {"blk.0.attn_q.weight.in_sum2": [1.0] * 8, "blk.0.attn_q.weight.counts": [count]}
    tensors = [
        TensorSource(
            name=name,
            shape=(len(numbers),),
            type=GGMLQuantizationType.F32,
            chunks=lambda numbers=numbers: iter([np.array(numbers, np.float32).tobytes()]),
        )
        for name, numbers in values.items()
    ]
    write_gguf(out, [encode_kv("general.type", "imatrix", GGUFValueType.STRING)], tensors)
    with pytest.raises(BadInput, match="a count of rows that is no number of rows"):
        imatrix.read(out)
