"""Our encoder in the product: rows alone as in the whole, moments kept exactly, runs that come out twice."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from test_fake_run import workspace
from test_quantize import quantized_by_llama_cpp, random_matrix
from test_reproduce import again, details, finished_run
from tiny import Recorder

from cerebellum import encode, imatrix, open_run
from cerebellum.cli.quantize import Quantizing, quantize
from cerebellum.encode import encoders, moments
from cerebellum.encode.encoders import FED_BACK, OurEncoder, choose
from cerebellum.encode.moments import Moments, watch
from cerebellum.engine.fake import FakeEngine
from cerebellum.engine.protocols import ColumnProducts, QuantizeJob
from cerebellum.errors import BadInput
from cerebellum.gguf import GGMLQuantizationType, TensorSource, parse_preset, read_gguf, row_bytes
from cerebellum.imatrix import Entry
from cerebellum.llama.native import LlamaEngine
from cerebellum.progress import Silent
from cerebellum.run import run_all
from cerebellum.settings import OURS, Budget, Domain, EncoderName, Goal, Limit, Preset
from cerebellum.source import open_source
from cerebellum.texts import load_corpus
from cerebellum.workspace import Workspace

T = GGMLQuantizationType
NAME = "blk.0.ffn_down_exps.weight"
COLUMNS, ROWS, EXPERTS = 1280, 40, 3  # two spans of 512 and a rest of 256

ours_is_here = pytest.mark.skipif(not encode.available(), reason="there is no compiler")


def products(
    experts: int = EXPERTS, columns: int = COLUMNS, n_rows: int = 600, **changed: bool
) -> ColumnProducts:
    """Sums over made-up rows whose neighbouring columns go together."""
    found = ColumnProducts.empty(experts, columns, 512, same_rows=changed.get("same_rows", False))
    random = np.random.default_rng(3)
    for expert in range(experts):
        rows = random.standard_normal((n_rows, columns + 1), np.float32)
        found.add(expert, (1 + expert) * (rows[:, 1:] + rows[:, :-1]))
    return found


def written(folder: Path, found: dict[str, ColumnProducts]) -> Moments:
    moments.write(folder / "moments.gguf", found, "made up")
    return moments.read(folder / "moments.gguf")


def job(kind: GGMLQuantizationType) -> QuantizeJob:
    random = np.random.default_rng(5)
    values = random.standard_normal((EXPERTS, ROWS, COLUMNS), np.float32)
    return QuantizeJob(
        name=NAME,
        raw=values.view(np.uint8).ravel(),
        shape=(COLUMNS, ROWS, EXPERTS),
        from_type=T.F32,
        to_type=kind,
        importance=random.exponential(size=EXPERTS * COLUMNS).astype(np.float32),
    )


def made(encoder: encoders.Encoder, asked: QuantizeJob, threads: int = 1) -> np.ndarray:
    return np.concatenate(list(encoder.quantize(asked, threads)))


IQ_TYPES = sorted(
    FED_BACK - encode.SUPPORTED - {T.IQ2_XS, T.IQ2_S}
)  # without those whose tables take ggml seconds


@ours_is_here
@pytest.mark.parametrize("kind", [*sorted(encode.SUPPORTED), *IQ_TYPES])
def test_rows_alone_have_the_bytes_that_they_have_in_the_whole(tmp_path: Path, kind: T) -> None:
    encoder = OurEncoder(engine=LlamaEngine(), moments=written(tmp_path, {NAME: products()}))
    whole = job(kind)
    size = row_bytes(kind, COLUMNS)
    found = made(encoder, whole, threads=2).reshape(EXPERTS, ROWS, size)
    assert whole.importance is not None
    for expert, rows in ((0, slice(0, 16)), (1, slice(7, 8)), (2, slice(33, 40))):
        values = whole.raw.view(np.float32).reshape(EXPERTS, ROWS, COLUMNS)[expert, rows]
        part = replace(
            whole,
            raw=np.ascontiguousarray(values).view(np.uint8).ravel(),
            shape=(COLUMNS, len(values)),
            importance=whole.importance[expert * COLUMNS : (expert + 1) * COLUMNS],
            first_expert=expert,
        )
        assert np.array_equal(made(encoder, part), found[expert, rows].ravel())
        assert np.array_equal(encoder.encoded(part), found[expert, rows].ravel())
    back = encoder.to_float(found.ravel(), kind, COLUMNS)
    assert np.array_equal(encoder.round_trip(whole), back)
    plain = made(OurEncoder(engine=LlamaEngine(), moments=None), whole)
    assert np.array_equal(plain, found.ravel()) == (kind not in FED_BACK)


@ours_is_here
@pytest.mark.parametrize("kind", [T.Q3_K, *IQ_TYPES])
def test_what_rows_give_is_nearer_with_errors_fed_back(tmp_path: Path, kind: T) -> None:
    kept = written(tmp_path, {NAME: products()})
    asked = job(kind)
    exact = asked.raw.view(np.float32).reshape(EXPERTS, ROWS, COLUMNS)

    def error(encoder: OurEncoder) -> float:
        back = encoder.to_float(made(encoder, asked), kind, COLUMNS).reshape(exact.shape)
        return sum(span.squared((exact - back)[e]) for e in range(EXPERTS) for span in kept.of(NAME, e))

    plain = error(OurEncoder(engine=LlamaEngine(), moments=None))
    assert error(OurEncoder(engine=LlamaEngine(), moments=kept)) < 0.5 * plain


@ours_is_here
def test_types_that_are_not_ours_are_the_engines(tmp_path: Path) -> None:
    engine = FakeEngine()
    without = replace(job(T.IQ3_XXS), importance=None)
    asked = job(T.IQ4_XS)
    encoder = OurEncoder(engine=engine, moments=None)
    assert np.array_equal(made(encoder, asked), made(engine, asked))
    with pytest.raises(BadInput, match="IQ3_XXS needs an importance matrix"):
        made(OurEncoder(engine=LlamaEngine(), moments=written(tmp_path, {NAME: products()})), without)
    with pytest.raises(BadInput, match="cannot be Q3_K"):
        made(encoder, replace(job(T.Q3_K), shape=(COLUMNS // 2, ROWS * 2, EXPERTS)))


def test_without_a_compiler_it_is_ggmls_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "unavailable_because", lambda: "there is no C compiler")
    reporter = Recorder()
    engine = FakeEngine()
    assert choose(OURS, engine, None, reporter) is engine
    assert reporter.notes == [
        "weights are rounded by ggml's encoders, since ours cannot be had: there is no C compiler"
    ]


def test_moments_come_back_as_means_and_are_shared(tmp_path: Path) -> None:
    sums = products(experts=1)
    kept = written(tmp_path, {"blk.0.attn_q.weight": sums, "blk.0.attn_k.weight": sums})
    spans = kept.of("blk.0.attn_k.weight", 0)
    assert [(span.columns.start, span.columns.stop) for span in spans] == [(0, 1024), (1024, 1280)]
    assert np.array_equal(spans[0].moments, sums.spans[0] / np.float32(600))
    assert np.array_equal(spans[1].moments[0], sums.rest[0] / np.float32(600))
    assert kept.of("blk.0.attn_output.weight", 0) == ()
    assert len([t for t in read_gguf(kept.path).tensors if t.name.endswith(".counts")]) == 1


@pytest.mark.parametrize("same_rows", [True, False])
def test_an_expert_that_met_too_few_rows_has_the_others_or_none(tmp_path: Path, same_rows: bool) -> None:
    sums = products(same_rows=same_rows)
    sums.counts[1] = 511
    spans = written(tmp_path, {NAME: sums}).of(NAME, 1)
    assert bool(spans) == same_rows
    if spans:
        assert np.allclose(spans[0].moments, sums.spans.sum(axis=0) / 1711)


def test_what_moments_take_is_known_before_and_bounded(embedded: Path) -> None:
    tensors = open_source(embedded).tensors
    everything = watch(tensors)
    assert not everything.left_out and "MB of disk" in everything.said()
    assert all(tensors[name].shape[0] % kept.span == 0 for name, kept in everything.weights.items())
    half = watch(tensors, everything.n_bytes // 2)
    assert half.n_bytes <= everything.n_bytes // 2
    assert set(half.weights) | set(half.left_out) == set(everything.weights)
    assert watch(tensors, 0).weights == {}


@pytest.mark.parametrize(
    ("hidden", "inner", "layers", "spans"),
    [
        (1536, 8960, 28, {1536, 2048}),
        (4096, 14336, 32, {1024}),
        (5120, 27648, 64, {512}),
        (1024, 3072, 300, {1024, 512}),
    ],
    ids=["1.5B", "8B", "32B", "rows of 1,024"],
)
def test_spans_are_as_long_as_there_is_time_and_room_for(
    hidden: int, inner: int, layers: int, spans: set[int]
) -> None:
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_output": (hidden, hidden),
        "ffn_up": (hidden, inner),
        "ffn_gate": (hidden, inner),
        "ffn_down": (inner, hidden),
    }
    tensors = {
        name: TensorSource(name=name, shape=shape, type=GGMLQuantizationType.F16, chunks=lambda: iter(()))
        for layer in range(layers)
        for role, shape in shapes.items()
        for name in [f"blk.{layer}.{role}.weight"]
    }
    watched = watch(tensors)
    assert not watched.left_out
    assert {kept.span for kept in watched.weights.values()} == spans


def test_the_diagonal_is_the_importance_matrix(
    embedded: Path, llama_engine: LlamaEngine, select_text: Path
) -> None:
    """Two ways through the same activations: sums of squares, and the diagonal of sums of products."""
    corpus = load_corpus(llama_engine, embedded, select_text, 64)
    chunks = [corpus.inputs(chunk) for chunk in range(2)]
    squares = llama_engine.importance([embedded], 64, chunks, lambda: None)
    watched = watch(open_source(embedded).tensors)
    found = llama_engine.moments([embedded], 64, chunks, watched.weights, lambda: None)
    assert set(found) == set(watched.weights)
    shared = {id(sums) for sums in found.values()}
    assert len(shared) < len(found)
    assert 4 * sum(s.spans.size + s.rest.size for s in {id(s): s for s in found.values()}.values()) <= (
        watched.n_bytes
    )
    for name, sums in found.items():
        diagonal = np.einsum("esii->esi", sums.spans).reshape(len(sums.counts), -1)
        assert np.allclose(diagonal, squares[name].squares, rtol=1e-4), name
        assert np.array_equal(sums.counts, squares[name].counts), name


def test_one_pass_sums_what_two_do(embedded: Path, llama_engine: LlamaEngine, select_text: Path) -> None:
    corpus = load_corpus(llama_engine, embedded, select_text, 64)
    chunks = [corpus.inputs(chunk) for chunk in range(3)]
    watched = watch(open_source(embedded).tensors).weights
    ticks: list[int] = []
    squares, products = llama_engine.importance_and_moments(
        [embedded], 64, chunks, watched, 2, lambda: ticks.append(1)
    )
    assert len(ticks) == 3
    alone = llama_engine.importance([embedded], 64, chunks, lambda: None)
    assert set(squares) == set(alone)
    for name, found in alone.items():
        assert np.array_equal(squares[name].squares, found.squares), name
        assert np.array_equal(squares[name].counts, found.counts), name
    two = llama_engine.moments([embedded], 64, chunks[:2], watched, lambda: None)
    assert set(products) == set(two)
    for name, sums in two.items():
        assert np.array_equal(products[name].counts, sums.counts), name
        assert np.allclose(products[name].spans, sums.spans, rtol=1e-5, atol=1e-5), name


@dataclass
class CountingEngine(FakeEngine):
    """Notes which passes over the text are asked for."""

    passes: list[str] = field(default_factory=list)

    def importance(self, *rest: Any) -> Any:
        self.passes.append("importance")
        return super().importance(*rest)

    def moments(self, *rest: Any) -> Any:
        self.passes.append("moments")
        return super().moments(*rest)

    def importance_and_moments(self, *rest: Any) -> Any:
        self.passes.append("both")
        found = super().importance_and_moments(*rest)
        del self.passes[-2:]  # the fake does one after the other
        return found


@ours_is_here
@pytest.mark.parametrize(
    ("lost", "passes"),
    [
        ((), []),
        (("imatrix.gguf",), ["importance"]),
        (("moments.gguf",), ["moments"]),
        (("imatrix.gguf", "moments.gguf"), ["both"]),
    ],
)
def test_only_what_is_lacking_is_decoded_and_in_one_pass(
    tmp_path: Path, lost: tuple[str, ...], passes: list[str]
) -> None:
    def opened() -> Workspace:
        made = workspace(tmp_path, Limit(), CountingEngine())
        settings = structs.replace(made.settings, encoder=OURS)
        made.folder.mkdir(exist_ok=True)
        return Workspace(made.folder, settings, made.engine, made.reporter)

    first = opened()
    matrix_of_both = first.matrix.path.read_bytes()
    assert first.moments is not None
    assert isinstance(first.engine, CountingEngine) and first.engine.passes == ["both"]
    moments_of_both = (first.folder / "moments.gguf").read_bytes()
    for name in lost:
        (first.folder / name).unlink()
    again = opened()
    assert again.matrix.path.read_bytes() == matrix_of_both and again.moments is not None
    assert (first.folder / "moments.gguf").read_bytes() == moments_of_both
    assert isinstance(again.engine, CountingEngine) and again.engine.passes == passes


@ours_is_here
@pytest.mark.parametrize("goal", [Limit(max_increase_pct=1.0), Budget(sizes=(Preset(name="Q3_K_M"),))])
def test_a_whole_run_with_our_encoder_comes_out_twice(tmp_path: Path, goal: Goal) -> None:
    results = []
    for place in ("a", "b"):
        opened = workspace(tmp_path / place, goal)
        settings = structs.replace(opened.settings, encoder=OURS)
        run_all(Workspace(opened.folder, settings, opened.engine, opened.reporter))
        run = open_run(tmp_path / place / "run")
        assert run.verified().ok
        results.append(run.manifest())
    assert results[0].result.sha256 == results[1].result.sha256
    named = results[0].encoder
    assert (named.name, named.version) == (OURS, encode.ENCODER_VERSION)
    assert named.moments is not None and named.moments.file == "moments.gguf"
    assert "rounded by Cerebellum's own encoder" in (tmp_path / "a" / "run" / "README.md").read_text()


@ours_is_here
def test_a_manifest_of_ours_gives_the_same_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "run", tmp_path / "elsewhere", encoder=OURS)
    found = again(run)
    assert (found["ok"], found["bit_equal"]) == (True, True)
    assert {"encoder", "second moments"} <= set(details(found))
    monkeypatch.setattr(encode, "ENCODER_VERSION", "0")
    assert again(run)["changed"] == ["encoder"]


def asked(embedded: Path, folder: Path, encoder: EncoderName, text: Path) -> Quantizing:
    source = open_source(embedded)
    entries = {
        name: Entry(
            sums=values.reshape(-1, source.tensors[name].shape[0]),
            counts=np.ones(values.size // source.tensors[name].shape[0], np.int64),
        )
        for name, values in random_matrix(source).items()
    }
    imatrix.write(folder / "matrix.gguf", entries, "made-up", 1, 64)
    return Quantizing(
        source=embedded,
        preset="Q2_K",
        out=folder / f"{encoder}.gguf",
        imatrix=folder / "matrix.gguf",
        encoder=encoder,
        feedback=True,
        moments=None,
        texts=(Domain(path=text),),
        ctx=64,
        chunks=8,
        threads=2,
    )


def test_quantize_with_ggml_is_llama_quantize(embedded: Path, tmp_path: Path, select_text: Path) -> None:
    request = asked(embedded, tmp_path, "ggml", select_text)
    found = quantize(request, LlamaEngine(), Silent())
    theirs = quantized_by_llama_cpp(
        open_source(embedded), "Q2_K", random_matrix(open_source(embedded)), tmp_path / "theirs.gguf"
    )
    written = open_source(request.out, allow_requantize=True)
    assert (found.encoder, found.moments) == ("ggml", None)
    assert all(np.array_equal(written.read(name), theirs.read(name)) for name in theirs.tensors)
    with pytest.raises(BadInput, match="--force"):
        quantize(request, LlamaEngine(), Silent())


@ours_is_here
def test_moments_that_are_given_are_used_as_they_are(tmp_path: Path) -> None:
    """Those of a run are of its own texts: nothing decodes another one, and nothing is written over them."""
    made = workspace(tmp_path, Limit(), CountingEngine())
    run = Workspace(made.folder, structs.replace(made.settings, encoder=OURS), made.engine, made.reporter)
    run.folder.mkdir(exist_ok=True)
    assert run.moments is not None
    path = run.folder / "moments.gguf"
    before = path.read_bytes()
    watched = run.watched
    assert watched is not None
    assert moments.read_given(path, watched).sha256 == run.moments.sha256
    fewer = moments.Watched(weights=dict(list(watched.weights.items())[:-1]), n_bytes=0, left_out=())
    with pytest.raises(BadInput, match="of other weights"):
        moments.read_given(path, fewer)
    with pytest.raises(BadInput, match="no second moments"):
        moments.read_given(made.settings.source, watched)
    assert path.read_bytes() == before


@ours_is_here
def test_quantize_with_ours_has_the_same_types_and_replaces_its_own(
    embedded: Path, tmp_path: Path, select_text: Path
) -> None:
    request = asked(embedded, tmp_path, OURS, select_text)
    found = quantize(request, LlamaEngine(), Silent())
    assert found.moments == str(tmp_path / "ours.moments.gguf")
    again_found = quantize(request, LlamaEngine(), Silent())
    assert again_found.sha256 == found.sha256
    types = LlamaEngine().preset_types(embedded, parse_preset("Q2_K"), has_imatrix=True)
    assert {tensor.name: tensor.type for tensor in read_gguf(request.out).tensors} == types
