"""The encoder: valid bytes, read as it believes, no worse than ggml, the same everywhere."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cerebellum import encode as encoder
from cerebellum.encode import (
    ENCODER_VERSION,
    RECODABLE,
    RESCALABLE,
    SUPPORTED,
    Share,
    Unshrink,
    available,
    decode,
    encode,
    feed_back,
    library,
    unavailable_because,
    unshrink,
)
from cerebellum.encode.grids import LISTED, table
from cerebellum.errors import BadInput
from cerebellum.gguf import GGMLQuantizationType, block_size, row_bytes
from cerebellum.llama.library import ggml
from cerebellum.llama.quantize import QuantizeJob, quantize

T = GGMLQuantizationType
Floats = NDArray[np.float32]

KINDS = sorted(SUPPORTED)
IQ_KINDS = sorted(RECODABLE - SUPPORTED)
SIGMA = {T.Q2_K: 1.0, T.Q3_K: 2.0, T.Q4_K: 2.0, T.Q5_K: 2.0, T.Q6_K: 0.0, T.Q8_0: 0.0}

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None,
    reason="no C compiler, so there is no encoder to test",
)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_iq_kind = pytest.mark.parametrize("kind", IQ_KINDS, ids=lambda kind: kind.name)


def importances(columns: int, seed: int = 3, log_sd: float = 1.0) -> Floats:
    return np.exp(np.random.default_rng(seed).normal(size=columns) * log_sd).astype(np.float32)


def normal(rows: int = 64, columns: int = 512, seed: int = 0, size: float = 0.02) -> Floats:
    return (np.random.default_rng(seed).normal(size=(rows, columns)) * size).astype(np.float32)


def sparse(rng: np.random.Generator) -> Floats:
    return (rng.normal(size=(128, 512)) * (rng.random((128, 512)) < 0.02)).astype(np.float32)


ROWS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "random": lambda rng: rng.normal(size=(64, 512)) * 0.02,
    "heavy tails": lambda rng: rng.standard_t(3, size=(64, 512)) * 0.02,
    "constant": lambda _: np.full((32, 512), 0.013),
    "negative constant": lambda _: np.full((32, 512), -0.013),
    "two values": lambda rng: np.where(rng.random((64, 512)) < 0.5, -0.5, 0.25),
    "sparse": sparse,
    "one value a row": lambda _: np.eye(64, 512) * 0.1,
    "zero sub-blocks": lambda rng: rng.normal(size=(64, 512)) * 0.01 * (np.arange(512) // 16 % 3 == 0),
    "huge": lambda rng: rng.normal(size=(64, 512)) * 1e4,
    "tiny": lambda rng: rng.normal(size=(64, 512)) * 1e-6,
    "below fp16": lambda rng: rng.normal(size=(64, 512)) * 3e-8,
    "all positive": lambda rng: rng.random((64, 512)) * 0.1,
    "all negative": lambda rng: -rng.random((64, 512)) * 0.1,
    "far from zero": lambda rng: 1 + rng.random((64, 512)) * 0.1,
    "on a grid": lambda rng: rng.integers(-8, 8, (64, 512)) * 0.01,
    "one block": lambda rng: rng.normal(size=(64, 256)) * 0.02,
}
EXACT = {"constant", "negative constant", "two values", "one value a row", "on a grid"}
"""Rows that a type may hit exactly, by luck of a scale's last bit: there, a trace of error is allowed."""


def by_ggml(values: Floats, kind: GGMLQuantizationType, importance: Floats | None) -> NDArray[np.uint8]:
    job = QuantizeJob(
        name="rows",
        raw=values.view(np.uint8).ravel(),
        shape=values.shape[::-1],
        from_type=T.F32,
        to_type=kind,
        importance=importance,
    )
    return np.concatenate(list(quantize(job, 2))).reshape(len(values), -1)


def weights(values: Floats, kind: GGMLQuantizationType, importance: Floats | None) -> NDArray[np.float64]:
    """ggml's: importance * sqrt(sigma * mean square of the block + x^2), or importance alone."""
    columns = np.ones(values.shape[1]) if importance is None else importance.astype(np.float64)
    if not SIGMA[kind]:
        return np.broadcast_to(columns, values.shape)
    blocks = values.astype(np.float64).reshape(-1, 256)
    spread = SIGMA[kind] * (blocks**2).mean(axis=1, keepdims=True)
    return columns * np.sqrt(spread + blocks**2).reshape(values.shape)


def error(
    values: Floats, raw: NDArray[np.uint8], kind: GGMLQuantizationType, importance: Floats | None
) -> float:
    back = quants.dequantize(raw, kind).astype(np.float64)
    return float((weights(values, kind, importance) * (back - values) ** 2).sum())


def is_valid(raw: NDArray[np.uint8], kind: GGMLQuantizationType) -> bool:
    data = np.ascontiguousarray(raw)
    pointer = data.ctypes.data_as(ctypes.c_void_p)
    return bool(ggml().ggml_validate_row_data(int(kind), pointer, data.size))


def test_this_machine_can_encode() -> None:
    assert unavailable_because() is None
    assert available() and ENCODER_VERSION


@every_kind
@pytest.mark.parametrize("what", ROWS)
@pytest.mark.parametrize("weighted", [True, False], ids=["importance", "plain"])
def test_no_worse_than_ggml(kind: GGMLQuantizationType, what: str, weighted: bool) -> None:
    """At most 1% more weighted error; and the bytes are valid and read as the encoder believes."""
    values = ROWS[what](np.random.default_rng(5)).astype(np.float32)
    importance = importances(values.shape[1]) if weighted else None
    raw = encode(values, kind, importance, threads=1)
    assert is_valid(raw, kind)
    assert np.array_equal(decode(raw, kind), quants.dequantize(raw, kind))
    theirs = error(values, by_ggml(values, kind, importance), kind, importance)
    energy = float((weights(values, kind, importance) * values.astype(np.float64) ** 2).sum())
    slack = 4e-5 if what in EXACT else 1e-7
    assert error(values, raw, kind, importance) <= 1.01 * theirs + slack * energy


@every_kind
def test_blocks_with_outliers_are_hardly_ever_worse(kind: GGMLQuantizationType) -> None:
    """A thousandfold outlier makes a block's search rugged: now and then ggml's lands better."""
    rng = np.random.default_rng(5)
    sizes = np.where(rng.random((256, 512)) < 0.003, 10, 0.01)
    values = (rng.normal(size=(256, 512)) * sizes).astype(np.float32)
    importance = importances(512)
    per_block = weights(values, kind, importance).reshape(-1, 256)

    def errors(raw: NDArray[np.uint8]) -> NDArray[np.float64]:
        back = quants.dequantize(raw, kind).astype(np.float64) - values
        return np.asarray((per_block * back.reshape(-1, 256) ** 2).sum(axis=1))

    ours = errors(encode(values, kind, importance, threads=1))
    theirs = errors(by_ggml(values, kind, importance))
    assert (ours > 1.05 * theirs).mean() < 0.02
    assert np.median(ours / theirs) < 1


@every_kind
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_finite_rows_give_valid_bytes(kind: GGMLQuantizationType, data: st.DataObject) -> None:
    """Any sizes of values and importances within float32, zeros among them, in any mixture."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    exponents = st.floats(-45, 37)
    rng = np.random.default_rng(seed)
    rows, columns = data.draw(st.integers(1, 40)), 256 * data.draw(st.integers(1, 2))
    values = rng.normal(size=(rows, columns)) * 10.0 ** data.draw(exponents)
    values *= rng.random((rows, columns)) < data.draw(st.floats(0, 1))
    values *= 10.0 ** (rng.normal(size=(rows, 1)) * data.draw(st.floats(0, 3)))
    finite = np.clip(values, -3e38, 3e38).astype(np.float32)
    importance = np.clip(rng.exponential(size=columns) * 10.0 ** data.draw(exponents), 0, 3e38)
    importance *= rng.random(columns) < data.draw(st.floats(0, 1))
    raw = encode(finite, kind, importance.astype(np.float32), threads=1)
    assert is_valid(raw, kind)
    back = quants.dequantize(raw, kind)
    assert np.isfinite(back).all()
    assert np.array_equal(decode(raw, kind), back)


@every_kind
def test_random_bytes_are_read_as_gguf_reads_them(kind: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (200, row_bytes(kind, block_size(kind))), np.uint8)
    offset, halves = encoder._SCALES[kind]
    scales = rng.normal(size=(200, halves)) * 10 ** rng.uniform(-8, 4, (200, 1))
    raw[:, offset : offset + 2 * halves] = scales.astype(np.float16).view(np.uint8)
    assert np.array_equal(decode(raw, kind), quants.dequantize(raw, kind))


@every_kind
def test_zeros_stay_zeros(kind: GGMLQuantizationType) -> None:
    values = normal(3, 512)
    values[1] = 0
    back = decode(encode(values, kind, importances(512), threads=1), kind)
    assert not back[1].any() and back[0].any() and back[2].any()


@every_kind
def test_rows_do_not_depend_on_their_neighbours_or_on_threads(kind: GGMLQuantizationType) -> None:
    values, importance = normal(301, 1024), importances(1024)
    whole = encode(values, kind, importance, threads=1, unshrink=Unshrink(strength=0.5))
    for threads in (2, 3, 16):
        again = encode(values, kind, importance, threads=threads, unshrink=Unshrink(strength=0.5))
        assert np.array_equal(whole, again)
    alone = encode(values[77:78], kind, importance, threads=1, unshrink=Unshrink(strength=0.5))
    assert np.array_equal(whole[77:78], alone)


@every_kind
def test_importance_none_is_all_the_same_importance(kind: GGMLQuantizationType) -> None:
    values = normal(40)
    plain = encode(values, kind, None, threads=1)
    for level in (1.0, 2.0**-100, 2.0**100, 0.0):
        assert np.array_equal(plain, encode(values, kind, np.full(512, level, np.float32), threads=1))


@every_kind
def test_columns_that_count_more_come_out_better(kind: GGMLQuantizationType) -> None:
    values, importance = normal(), np.ones(512, np.float32)
    importance[::16] = 1000
    plain = decode(encode(values, kind, None, threads=1), kind)
    weighted = decode(encode(values, kind, importance, threads=1), kind)
    before = np.square(plain - values)[:, ::16].sum()
    assert np.square(weighted - values)[:, ::16].sum() < 0.7 * before


BUILDS = {
    "O0": ("-O0", "-march=native"),
    "O1 for any x86-64": ("-O1", "-march=x86-64"),
    "O2 AVX2": ("-O2", "-march=x86-64", "-mavx2", "-mfma"),
    "8 lanes": ("-O3", "-march=native", "-DLANES=8"),
}


def built(tmp_path: Path, *extra: str) -> ctypes.CDLL:
    compiler = library._find_compiler()
    out = tmp_path / "other.so"
    try:
        library.compile_library(compiler.path, (*library.FLAGS, *extra), out)
    except library.Unavailable as reason:
        pytest.skip(str(reason))
    return library.open_library(out)


def many_bytes(lib: ctypes.CDLL) -> dict[GGMLQuantizationType, bytes]:
    """More rows than the self-test has: heavy tails of many sizes, importances of many sizes."""
    rng = np.random.default_rng(11)
    values = (rng.standard_t(3, size=(70, 768)) * 10 ** rng.uniform(-6, 2, (70, 1))).astype(np.float32)
    importance = importances(768, log_sd=3)
    found = {}
    for kind in KINDS:
        out = np.zeros((70, row_bytes(kind, 768)), np.uint8)
        status = lib.encode_rows(
            int(kind), values.ctypes.data, importance.ctypes.data, 70, 768, out.ctypes.data
        )
        assert status == 0
        found[kind] = out.tobytes()
    moments = np.stack([correlated_moments(256, seed) for seed in range(3)])
    for kind in IQ_KINDS:
        out = any_codes(kind, values)
        given = (table(kind).ctypes.data, values.ctypes.data, moments.ctypes.data)
        assert lib.feed_back_iq(int(kind), *given, 70, 768, 256, 3, out.ctypes.data) == 0
        found[kind] = out.tobytes()
    return found


@pytest.mark.parametrize("build", BUILDS)
def test_other_builds_give_the_same_bytes(tmp_path: Path, build: str) -> None:
    other = built(tmp_path, *BUILDS[build])
    assert library.self_test(other) == library.SELF_TEST
    assert many_bytes(other) == many_bytes(library.load())


REORDERED = ("-fassociative-math", "-freciprocal-math", "-fno-signed-zeros", "-fno-trapping-math")
"""What -ffast-math allows. The flag itself, when linking, turns subnormal numbers off in the whole process."""


def test_a_build_that_contracts_is_found_out(tmp_path: Path) -> None:
    """The reason for the self-test: such a library runs well and gives other bytes."""
    other = built(tmp_path, "-march=native", "-ffp-contract=fast", *REORDERED)
    assert library.self_test(other) != library.SELF_TEST


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    library.attempt.cache_clear()
    try:
        assert not available()
        assert "no C compiler" in (unavailable_because() or "")
        with pytest.raises(library.Unavailable):
            encode(normal(), T.Q3_K, None, threads=1)
    finally:
        library.attempt.cache_clear()


def test_a_library_with_other_bytes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SELF_TEST", "0" * 64)
    library.attempt.cache_clear()
    try:
        assert "other bytes" in (unavailable_because() or "")
    finally:
        library.attempt.cache_clear()


def test_a_cache_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    library.attempt.cache_clear()
    try:
        assert available()
    finally:
        library.attempt.cache_clear()


def projection(values: Floats, back: Floats, importance: Floats, group: int) -> NDArray[np.float64]:
    """sum q x y / sum q x^2 of every `group` elements."""
    x = values.astype(np.float64)
    exact = (importance * x * x).reshape(-1, group).sum(axis=1)
    return np.asarray((importance * x * back).reshape(-1, group).sum(axis=1) / exact)


SLOW = {T.IQ2_XS, T.IQ2_S}  # many seconds until ggml has its tables
RESCALED = sorted(RESCALABLE - SLOW - {T.Q8_0})


SHARES = [
    *((kind, "block", block_size(kind)) for kind in RESCALED),
    *(
        (kind, share, size)
        for kind in (T.Q2_K, T.Q6_K)
        for share, size in (("row", 512), ("tensor", 32 * 512))
    ),
]


@pytest.mark.parametrize(("kind", "share", "size"), SHARES)
def test_unshrinking_keeps_the_projection(kind: GGMLQuantizationType, share: Share, size: int) -> None:
    """To the rounding of a half; and ggml's own blocks can be given to it."""
    values, importance = normal(32), importances(512)
    raw = by_ggml(values, kind, importance)
    scaled = unshrink(raw, values, importance, kind, Unshrink(share=share), threads=2)
    assert is_valid(scaled, kind)
    back = quants.dequantize(scaled, kind)
    before = projection(values, quants.dequantize(raw, kind), importance, size)
    after = projection(values, back, importance, size)
    step = 0.02 if kind in (T.Q5_K, T.Q6_K) else 0.004
    assert np.abs(after - 1).max() < step
    assert np.abs(after - 1).mean() <= np.abs(before - 1).mean() + 1e-3
    if kind in (T.Q2_K, T.Q3_K, T.IQ2_XXS):
        assert np.abs(after - 1).mean() < 0.3 * np.abs(before - 1).mean()


@pytest.mark.parametrize("kind", sorted(SUPPORTED - {T.Q8_0}), ids=lambda kind: kind.name)
def test_unshrinking_is_a_step_of_encoding(kind: GGMLQuantizationType) -> None:
    values, importance = normal(), importances(512)
    how = Unshrink(strength=0.7, share="row")
    raw = encode(values, kind, importance, threads=1)
    at_once = encode(values, kind, importance, threads=2, unshrink=how)
    assert np.array_equal(at_once, unshrink(raw, values, importance, kind, how))
    handed_in = unshrink(raw, values, importance, kind, how, rounded=decode(raw, kind))
    assert np.array_equal(at_once, handed_in)
    assert np.array_equal(raw, unshrink(raw, values, importance, kind, Unshrink(strength=0)))


def test_unshrinking_changes_scales_and_nothing_else() -> None:
    values = normal()
    raw = encode(values, T.Q3_K, None, threads=1)
    scaled = unshrink(raw, values, None, T.Q3_K)
    changed = (raw != scaled).reshape(-1, 110)
    assert changed[:, 108:].any() and not changed[:, :108].any()


def correlated_moments(columns: int, seed: int = 2) -> Floats:
    """(columns, columns) of activations that share a few directions, as those of real layers do."""
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(3000, 40)) @ rng.normal(size=(40, columns)) * 0.3
    activations += rng.normal(size=(3000, columns))
    return (activations.T @ activations / 3000).astype(np.float32)


def output_error(
    values: Floats, raw: NDArray[np.uint8], kind: GGMLQuantizationType, moments: Floats
) -> float:
    rest = quants.dequantize(raw, kind).astype(np.float64) - values
    return float(np.einsum("ri,ij,rj->", rest, moments.astype(np.float64), rest, optimize=True))


@every_kind
def test_feeding_errors_back_lowers_what_the_output_loses(kind: GGMLQuantizationType) -> None:
    values, moments = normal(40), correlated_moments(512)
    for raw in (encode(values, kind, None, threads=1), by_ggml(values, kind, None)):
        better = feed_back(raw, values, moments, kind, threads=2)
        assert is_valid(better, kind)
        before = output_error(values, raw, kind, moments)
        assert output_error(values, better, kind, moments) < 0.6 * before
        assert np.array_equal(better, feed_back(raw, values, moments, kind, threads=1))


@every_kind
def test_feeding_back_over_spans_is_each_span_alone(kind: GGMLQuantizationType) -> None:
    values, moments = normal(8, 768), np.stack([correlated_moments(256, seed) for seed in range(3)])
    raw = encode(values, kind, None, threads=1)
    whole = feed_back(raw, values, moments, kind, threads=1)
    size = row_bytes(kind, 256)
    for span in range(3):
        part = raw[:, span * size : (span + 1) * size]
        columns = np.ascontiguousarray(values[:, 256 * span : 256 * (span + 1)])
        alone = feed_back(part, columns, moments[span], kind, threads=1)
        assert np.array_equal(whole[:, span * size : (span + 1) * size], alone)


@every_kind
def test_a_row_is_fed_back_alone_as_among_others(kind: GGMLQuantizationType) -> None:
    """Eight rows go side by side; the last of thirteen are fewer, and zeros and odd sizes are among them."""
    values, moments = normal(13), correlated_moments(512)
    values[3] = 0
    values[5] *= 1e-6
    values[9] *= 1e4
    raw = encode(values, kind, None, threads=1)
    whole = feed_back(raw, values, moments, kind, threads=1)
    assert is_valid(whole, kind)
    assert (whole != raw).any(axis=1).sum() >= 10
    alone = [feed_back(raw[r : r + 1], values[r : r + 1], moments, kind, threads=1) for r in range(13)]
    assert np.array_equal(whole, np.concatenate(alone))


@every_kind
def test_feeding_back_without_correlations_changes_next_to_nothing(kind: GGMLQuantizationType) -> None:
    """Every code is the nearest already, but where a tie or a last bit decides."""
    values = normal(16)
    raw = encode(values, kind, None, threads=1)
    again = feed_back(raw, values, np.eye(512, dtype=np.float32), kind, threads=1)
    difference = quants.dequantize(again, kind) != quants.dequantize(raw, kind)
    assert difference.mean() < 0.002


LARGEST = {T.IQ4_NL: 113, T.IQ4_XS: 113 * 16, T.IQ3_XXS: 62 * 4, T.IQ3_S: 15 * 15}
"""About what a block's fp16 scale is multiplied by in its largest weights; 43 times 2 in IQ2 types."""


def any_codes(kind: GGMLQuantizationType, values: Floats) -> NDArray[np.uint8]:
    """Blocks of an IQ type whose codes are anything and whose scales fit the rows: ggml takes long to begin."""
    rows, columns = values.shape
    raw = np.random.default_rng(4).integers(0, 256, (rows, row_bytes(kind, columns)), np.uint8)
    blocks = raw.reshape(rows, -1, row_bytes(kind, block_size(kind)))
    size = 3 * values.std(axis=1, keepdims=True) / LARGEST.get(kind, 43 * 2)
    factors = np.broadcast_to(size, blocks.shape[:2]).astype(np.float16)
    blocks[:, :, :2] = factors[..., None].view(np.uint8)
    return raw


def row_errors(
    values: Floats, raw: NDArray[np.uint8], kind: GGMLQuantizationType, moments: Floats
) -> NDArray[np.float64]:
    rest = quants.dequantize(raw, kind).astype(np.float64) - values
    return np.asarray(np.einsum("ri,ij,rj->r", rest, moments.astype(np.float64), rest, optimize=True))


@every_iq_kind
def test_iq_codes_are_read_and_written_as_ggml_has_them(kind: GGMLQuantizationType) -> None:
    """Without a sweep every bit comes back, of whatever blocks; and what the codes stand for is seen below."""
    values, moments = normal(40), correlated_moments(512)
    raw = any_codes(kind, values)
    assert np.array_equal(raw, feed_back(raw, values, moments, kind, threads=1, sweeps=0))


@every_iq_kind
def test_feeding_back_in_iq_types_lowers_what_every_row_loses(kind: GGMLQuantizationType) -> None:
    values, moments = normal(40), correlated_moments(512)
    values[3] = 0
    damped = moments + 0.1 * np.diag(moments).mean() * np.eye(512, dtype=np.float32)
    made = [any_codes(kind, values)]
    if kind not in SLOW:
        made.append(by_ggml(values, kind, np.ascontiguousarray(np.diag(moments))))
    for raw in made:
        better = feed_back(raw, values, moments, kind, threads=2)
        assert is_valid(better, kind)
        before, after = (row_errors(values, codes, kind, damped) for codes in (raw, better))
        assert (after <= before * (1 + 1e-6)).all()
        assert after.sum() < 0.6 * before.sum()
        assert np.array_equal(better, feed_back(raw, values, moments, kind, threads=1))


@every_iq_kind
def test_iq_rows_and_spans_are_fed_back_alone_as_among_others(kind: GGMLQuantizationType) -> None:
    values, moments = normal(13, 768), np.stack([correlated_moments(256, seed) for seed in range(3)])
    values[5] *= 1e-3
    raw = any_codes(kind, values)
    whole = feed_back(raw, values, moments, kind, threads=1)
    assert (whole != raw).any(axis=1).all()
    size = row_bytes(kind, 256)
    for row, span in ((0, 1), (5, 0), (12, 2)):
        at = slice(span * size, (span + 1) * size)
        columns = np.ascontiguousarray(values[row : row + 1, 256 * span : 256 * (span + 1)])
        alone = feed_back(raw[row : row + 1, at], columns, moments[span], kind, threads=1)
        assert np.array_equal(whole[row : row + 1, at], alone)


@every_iq_kind
def test_where_iq_codes_come_to_rest_none_is_better(kind: GGMLQuantizationType) -> None:
    """Whatever is written in place of one code, or of one entry's low byte, costs the row more."""
    values, moments = normal(2, 256), correlated_moments(256)
    raw = feed_back(any_codes(kind, values), values, moments, kind, threads=1, damping=0.0, sweeps=100)
    now = row_errors(values, raw, kind, moments)
    codes = np.arange(256, dtype=np.uint8)
    for row, byte in ((0, 8), (0, 9), (1, 10), (1, 12)):
        tried = np.repeat(raw[row : row + 1], 256, axis=0)
        tried[:, byte] = codes
        if kind in LISTED:  # two codes a byte: one of them stays
            tried[:, byte] = raw[row, byte] & 15 | codes // 16 * 16
        errors = row_errors(values[[row] * 256], tried, kind, moments)
        assert errors.min() > now[row] * (1 - 1e-5)


@every_iq_kind
def test_moments_of_nothing_leave_iq_codes(kind: GGMLQuantizationType) -> None:
    values = normal(4)
    raw = any_codes(kind, values)
    zeros = np.zeros((512, 512), np.float32)
    assert np.array_equal(raw, feed_back(raw, values, zeros, kind, threads=1, damping=0.0))


@every_iq_kind
def test_columns_that_others_make_up_cost_no_iq_row_more(kind: GGMLQuantizationType) -> None:
    """Moments of one direction alone have no inverse, and some columns count nothing."""
    values, direction = normal(8), normal(1, 512)[0]
    direction[::3] = 0
    moments = np.outer(direction, direction).astype(np.float32)
    raw = any_codes(kind, values)
    better = feed_back(raw, values, moments, kind, threads=1, damping=0.0)
    before, after = (row_errors(values, codes, kind, moments) for codes in (raw, better))
    assert (after < 0.1 * before).all()


def test_moments_that_do_not_fit_are_refused() -> None:
    values = normal(4)
    raw = encode(values, T.Q3_K, None, threads=1)
    for shape in ((256, 256), (3, 256, 256), (4, 128, 128)):
        with pytest.raises(BadInput, match="moments"):
            feed_back(raw, values, np.ones(shape, np.float32), T.Q3_K, threads=1)


def test_moments_of_nothing_leave_the_codes() -> None:
    values = normal(4)
    raw = encode(values, T.Q3_K, None, threads=1)
    zeros = np.zeros((512, 512), np.float32)
    assert np.array_equal(raw, feed_back(raw, values, zeros, T.Q3_K, threads=1, damping=0.0))


@pytest.mark.parametrize(
    ("values", "kind", "importance", "message"),
    [
        (normal(2, 512), T.IQ2_S, None, "IQ2_S"),
        (normal(2, 500), T.Q3_K, None, "whole blocks of 256"),
        (np.zeros(256, np.float32), T.Q3_K, None, "no table of rows"),
        (np.full((2, 256), np.nan, np.float32), T.Q3_K, None, "not finite"),
        (normal(2, 256), T.Q3_K, np.ones(255, np.float32), r"\(256,\)"),
        (normal(2, 256), T.Q3_K, np.ones(256), "float32"),
        (normal(2, 256), T.Q3_K, -np.ones(256, np.float32), "negative"),
    ],
)
def test_wrong_input_is_refused(
    values: Floats, kind: GGMLQuantizationType, importance: Floats | None, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        encode(values, kind, importance, threads=1)


def test_wrong_strengths_and_types_are_refused() -> None:
    with pytest.raises(BadInput, match="strength"):
        Unshrink(strength=1.5)
    raw = np.zeros((2, row_bytes(T.Q4_0, 256)), np.uint8)
    with pytest.raises(BadInput, match="Q4_0"):
        unshrink(raw, normal(2, 256), None, T.Q4_0)
