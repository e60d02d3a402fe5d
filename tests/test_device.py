"""What runs on a GPU, run on the CPU through the same graphs: it must say what the host says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tiny import small_text

from cerebellum.encode.moments import watch
from cerebellum.engine.protocols import ColumnProducts, Job, Scores, Tokens, Watch
from cerebellum.engine.scoring import Prediction
from cerebellum.imatrix import collect
from cerebellum.llama import activations, moments
from cerebellum.llama.graphs import Workbench
from cerebellum.llama.model import ContextShape, LlamaModel
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.llama.scorer import DeviceScorer, OnDevice
from cerebellum.source import open_source
from cerebellum.texts import load_corpus

CTX = 64


@pytest.fixture(scope="module")
def engine() -> LlamaEngine:
    return LlamaEngine(EngineSettings(threads=1))


@pytest.fixture(scope="module")
def chunks(engine: LlamaEngine, embedded: Path) -> list[Tokens]:
    tokens = engine.tokenize(embedded, small_text(4000)).tokens
    return [tokens[i * CTX : (i + 1) * CTX].copy() for i in range(4)]


@contextmanager
def opened(
    engine: LlamaEngine, path: Path, *, on_gpu: bool, sequences: int = 1, notes: list[str] | None = None
) -> Iterator[LlamaModel]:
    shape = ContextShape(ctx=CTX, sequences=sequences, ubatch=CTX * sequences, threads=1)
    with engine.weights([path]) as weights:
        model = LlamaModel(
            weights, shape, on_gpu=on_gpu, note=(notes or []).append if notes is None else notes.append
        )
        try:
            yield model
        finally:
            model.close()


@pytest.fixture(scope="module")
def other(engine: LlamaEngine, embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at other types: a variant to compare."""
    import ctypes
    import os

    from cerebellum.gguf import parse_preset
    from cerebellum.llama.library import llama

    out = tmp_path_factory.mktemp("other") / "q4.gguf"
    params = llama().llama_model_quantize_default_params()
    params.ftype, params.nthread = int(parse_preset("Q4_K_M")), 1
    assert llama().llama_model_quantize(os.fsencode(embedded), os.fsencode(out), ctypes.byref(params)) == 0
    return out


def same(a: Scores, b: Scores) -> None:
    np.testing.assert_allclose(a.nll_S, b.nll_S, rtol=0, atol=1e-6)
    assert (a.entropy_S is None) == (b.entropy_S is None)
    if a.entropy_S is not None and b.entropy_S is not None:
        np.testing.assert_allclose(a.entropy_S, b.entropy_S, rtol=0, atol=1e-5)
    assert (a.kld_S is None) == (b.kld_S is None)
    if a.kld_S is not None and b.kld_S is not None:
        np.testing.assert_allclose(a.kld_S, b.kld_S, rtol=0, atol=1e-6)
        assert np.array_equal(a.same_top_S, b.same_top_S)


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_card_scores_as_the_host_does(
    engine: LlamaEngine, embedded: Path, other: Path, chunks: list[Tokens], sequences: int
) -> None:
    found: dict[bool, list[Scores]] = {}
    for on_gpu in (False, True):
        with opened(engine, embedded, on_gpu=on_gpu, sequences=sequences) as base:
            kept = base.score([Job(tokens_T=chunk, keep=True, entropy=True) for chunk in chunks])
        assert all(isinstance(scores.kept, OnDevice if on_gpu else Prediction) for scores in kept)
        jobs = [Job(tokens_T=c, against=s.kept) for c, s in zip(chunks, kept, strict=True)]
        with opened(engine, other, on_gpu=on_gpu, sequences=sequences) as variant:
            found[on_gpu] = [*kept, *variant.score(jobs)]
        for scores in kept:
            assert scores.kept is not None and scores.kept.n_bytes > 0
            assert scores.entropy_S is not None and (scores.entropy_S > 0).all()
            scores.kept.close()
    for ours, theirs in zip(found[True], found[False], strict=True):
        same(ours, theirs)
    assert np.mean([s.kld_S for s in found[True][len(chunks) :]]) > 1e-4


def test_several_chunks_a_decode_are_the_chunks_alone(
    engine: LlamaEngine, embedded: Path, chunks: list[Tokens]
) -> None:
    jobs = [Job(tokens_T=chunk) for chunk in chunks]
    with (
        opened(engine, embedded, on_gpu=False) as alone,
        opened(engine, embedded, on_gpu=False, sequences=3) as together,
    ):
        for one, other in zip(alone.score(jobs), together.score(jobs), strict=True):
            np.testing.assert_allclose(one.nll_S, other.nll_S, rtol=0, atol=1e-4)
        again = together.score(jobs[3:])
        assert np.array_equal(again[0].nll_S, together.score(jobs)[3].nll_S)  # filled up, so of the same form


def test_what_does_not_fit_on_the_card_is_kept_on_the_host(
    engine: LlamaEngine, embedded: Path, other: Path, chunks: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceScorer, "_keep", lambda *_: None)
    with opened(engine, embedded, on_gpu=True) as base:
        (kept,) = base.score([Job(tokens_T=chunks[0], keep=True)])
    assert isinstance(kept.kept, Prediction)
    job = Job(tokens_T=chunks[0], against=kept.kept)
    with opened(engine, other, on_gpu=True) as card, opened(engine, other, on_gpu=False) as host:
        same(card.score([job])[0], host.score([job])[0])


def test_a_card_that_is_wrong_is_not_believed(
    engine: LlamaEngine, embedded: Path, chunks: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DeviceScorer.score

    def wrong(self: DeviceScorer, jobs: list[Job], rows: int) -> list[Scores]:
        return [Scores(nll_S=scores.nll_S + 0.01) for scores in right(self, jobs, rows)]

    monkeypatch.setattr(DeviceScorer, "score", wrong)
    notes: list[str] = []
    with opened(engine, embedded, on_gpu=True, notes=notes) as card:
        found = card.score([Job(tokens_T=chunks[0])])
    with opened(engine, embedded, on_gpu=False) as host:
        same(found[0], host.score([Job(tokens_T=chunks[0])])[0])
    assert len(notes) == 1 and "scored on the host, not on the GPU: it is off by 0.01 nats" in notes[0]


def test_sums_on_the_card_are_those_of_the_host(
    engine: LlamaEngine, embedded: Path, select_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = load_corpus(engine, embedded, select_text, CTX)
    several = LlamaEngine(EngineSettings(threads=1, decode_tokens=2 * CTX))
    host = collect(several, [embedded], corpus, 3, lambda: None)
    reading = activations.on_host
    f32 = activations.F32
    monkeypatch.setattr(activations, "on_host", lambda t: reading(t) and t.type != f32)
    card = collect(several, [embedded], corpus, 3, lambda: None)
    assert set(host) == set(card)
    for name, entry in host.items():
        assert np.array_equal(card[name].counts, entry.counts), name
        np.testing.assert_allclose(card[name].sums, entry.sums, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("pooled", [False, True])
def test_products_on_the_card_are_those_of_the_host(
    engine: LlamaEngine, embedded: Path, select_text: Path, monkeypatch: pytest.MonkeyPatch, pooled: bool
) -> None:
    several, inputs, watched = watching(engine, embedded, select_text, pooled)
    host = several.moments([embedded], CTX, inputs, watched, lambda: None)
    summed = on_the_card(monkeypatch)
    card = several.moments([embedded], CTX, inputs, watched, lambda: None)
    assert {"attn_q", "ssm_in", "ffn_gate_exps", "ffn_down_exps"} <= {name.split(".")[2] for name in summed}
    alike(card, host)


def test_products_that_have_no_room_on_the_card_are_summed_on_the_host(
    engine: LlamaEngine, embedded: Path, select_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several, inputs, watched = watching(engine, embedded, select_text, False)
    host = several.moments([embedded], CTX, inputs, watched, lambda: None)
    summed = on_the_card(monkeypatch)
    room = iter([1 << 50] * 5 + [0] * 1000)  # five inputs fit
    monkeypatch.setattr(Workbench, "free_bytes", lambda _: next(room))
    card = several.moments([embedded], CTX, inputs, watched, lambda: None)
    assert len(summed) == 5
    alike(card, host)


def watching(
    engine: LlamaEngine, embedded: Path, text: Path, pooled: bool
) -> tuple[LlamaEngine, list[Tokens], dict[str, Watch]]:
    """An engine that decodes two chunks at once, three chunks, and inputs of which one has a rest beside its spans."""
    corpus = load_corpus(engine, embedded, text, CTX)
    inputs = [corpus.inputs(chunk) for chunk in range(3)]
    tensors = open_source(embedded, allow_requantize=True).tensors
    watched = {
        name: Watch(
            span=384 if "down_shexp" in name else kept.span,
            pooled=pooled and ("gate_exps" in name or "up_exps" in name),
        )
        for name, kept in watch(tensors).weights.items()
    }
    return LlamaEngine(EngineSettings(threads=1, decode_tokens=2 * CTX)), inputs, watched


def on_the_card(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Has activations pass for ones on a card; the set gets the names of those whose products are summed there."""
    reading = activations.on_host
    f32 = activations.F32
    monkeypatch.setattr(moments, "on_host", lambda t: reading(t) and t.type != f32)
    summed: set[str] = set()
    making = moments._DeviceProducts._input

    def noted(self: moments._DeviceProducts, name: str, *rest: object, **more: object) -> object:
        found = making(self, name, *rest, **more)  # type: ignore[arg-type]
        if found is not None:
            summed.add(name)
        return found

    monkeypatch.setattr(moments._DeviceProducts, "_input", noted)
    return summed


def alike(card: Mapping[str, ColumnProducts], host: Mapping[str, ColumnProducts]) -> None:
    assert set(host) == set(card)
    for name, found in host.items():
        assert np.array_equal(card[name].counts, found.counts), name
        assert card[name].same_rows == found.same_rows, name
        assert card[name].spans.shape == found.spans.shape and card[name].rest.shape == found.rest.shape
        scale = float(np.abs(found.spans).max(initial=1e-9))
        np.testing.assert_allclose(card[name].spans, found.spans, atol=1e-4 * scale, rtol=0, err_msg=name)
        np.testing.assert_allclose(card[name].rest, found.rest, atol=1e-4 * scale, rtol=0, err_msg=name)
