"""Two GGUFs on the same tokens: paired perplexity change, KL divergence, agreement of the top token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.protocols import Engine, Logits, Tokens
from cerebellum.engine.scoring import divergence, normalize, overlapped, predict, token_nll
from cerebellum.errors import BadInput
from cerebellum.measure.race import chunk_order
from cerebellum.progress import Reporter
from cerebellum.source import Source, open_source
from cerebellum.stats.paired import Interval, as_nats, perplexity, superpopulation_interval
from cerebellum.stats.sequential import StoppingRule
from cerebellum.texts import Corpus, load_corpus

_VOCABULARY_KEYS = (
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.add_bos_token",
)
_BURN_IN = 8  # chunks before a sequential interval is looked at


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """One chunk under both models; vectors over its scored tokens."""

    nll_a: NDArray[np.float64]
    nll_b: NDArray[np.float64]
    kld: NDArray[np.float64]
    same_top: NDArray[np.bool_]


def open_pair(a: Path, b: Path) -> tuple[Source, Source]:
    """Both models, refused unless they share a tokenizer: other tokens cannot be paired."""
    first, second = open_source(a, allow_requantize=True), open_source(b, allow_requantize=True)
    for key in _VOCABULARY_KEYS:
        if first.kv_records.get(key) != second.kv_records.get(key):
            raise BadInput(
                f"{a} and {b} differ in {key}: tokens of different vocabularies cannot be compared"
            )
    return first, second


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """``chunks``: the first so many of the text (0: all). ``until_pct`` stops earlier, in random order,
    once the interval of the perplexity change is no wider than plus or minus that."""

    text: Path
    ctx: int
    chunks: int = 0
    until_pct: float | None = None
    seed: int = 1
    alpha: float = 0.05


def compare(
    engine: Engine, a: Path, b: Path, settings: ComparisonSettings, reporter: Reporter
) -> dict[str, Any]:
    """The contract of ``compare --json``."""
    first, second = open_pair(a, b)
    corpus = load_corpus(engine, a, settings.text, settings.ctx)
    count = min(settings.chunks or corpus.n_chunks, corpus.n_chunks)
    order = tuple(range(count)) if settings.until_pct is None else chunk_order(count, settings.seed)
    rule = StoppingRule(alpha=settings.alpha / 2, population=count)
    scores: list[PairScore] = []
    with reporter.task("comparing", count) as tick:
        for score in score_pairs(engine, first, second, corpus, order):
            scores.append(score)
            tick()
            if settings.until_pct is not None and _narrow_enough(scores, rule, settings.until_pct):
                break
    delta = rule.interval(_differences(scores)) if settings.until_pct is not None else None
    return summarise(scores, settings.ctx, delta)


def _narrow_enough(scores: list[PairScore], rule: StoppingRule, until_pct: float) -> bool:
    if len(scores) < _BURN_IN:
        return False
    delta = rule.interval(_differences(scores))
    return delta.high - delta.low <= 2 * as_nats(until_pct)


def _differences(scores: list[PairScore]) -> NDArray[np.float64]:
    """Mean NLL of B less that of A for each chunk, nats/token."""
    return np.array([(score.nll_b - score.nll_a).mean() for score in scores])


def score_pairs(
    engine: Engine, a: Source, b: Source, corpus: Corpus, order: Sequence[int]
) -> Iterator[PairScore]:
    """Both models stay open; each chunk is decoded by one, then the other."""
    files_a, files_b = ([file.path for file in source.files] for source in (a, b))
    with engine.open(files_a, corpus.ctx) as model_a, engine.open(files_b, corpus.ctx) as model_b:

        def decoded() -> Iterator[tuple[Logits, Logits, Tokens]]:
            for chunk in order:
                tokens = corpus.inputs(chunk)
                yield model_a.logits(tokens), model_b.logits(tokens), corpus.targets(chunk)

        yield from overlapped(decoded(), lambda item: _score(*item))


def _score(logits_a: Logits, logits_b: Logits, targets: Tokens) -> PairScore:
    a, b = normalize(logits_a), normalize(logits_b)
    kld, same_top = divergence(predict(a), b)
    return PairScore(
        nll_a=a.nll(targets),
        nll_b=b.nll(targets),
        kld=kld,
        same_top=same_top,
    )


def summarise(scores: list[PairScore], ctx: int, delta: Interval | None = None) -> dict[str, Any]:
    """Means with 95% intervals over chunks; the chunk is the unit, since its tokens share a context.

    ``delta`` is the sequential interval where the comparison could stop early; a Student interval else.
    """
    nll_a, nll_b = (np.stack([getattr(s, name) for s in scores]) for name in ("nll_a", "nll_b"))
    if not (np.isfinite(nll_a).all() and np.isfinite(nll_b).all()):
        raise BadInput("one of the models gives logits that are not finite; it has collapsed")
    delta = delta or superpopulation_interval(_differences(scores))
    kld = superpopulation_interval(np.array([s.kld.mean() for s in scores]))
    mean, low, high = delta.percent()
    found_a, found_b = perplexity(nll_a), perplexity(nll_b)
    answer = {
        "ppl_a": found_a.ppl,
        "ppl_b": found_b.ppl,
        "delta_pct": mean,
        "ci_pct": [low, high],
        "kld_mean": kld.mean,
        "kld_ci": [kld.low, kld.high],
        "top1_agreement": float(np.mean([s.same_top.mean() for s in scores])),
        "chunks": len(scores),
        "tokens": found_a.tokens,
        "ctx": ctx,
    }
    # One chunk has no interval: null rather than infinity.
    return answer if len(scores) > 1 else answer | {"ci_pct": [None, None], "kld_ci": [None, None]}


def perplexity_of(
    engine: Engine, model: Path, text: Path, ctx: int, chunks: int, reporter: Reporter
) -> dict[str, Any]:
    """The contract of ``perplexity --json``: llama-perplexity's number on the first ``chunks`` chunks."""
    source = open_source(model, allow_requantize=True)
    corpus = load_corpus(engine, model, text, ctx)
    count = min(chunks or corpus.n_chunks, corpus.n_chunks)
    with (
        engine.open([file.path for file in source.files], ctx) as opened,
        reporter.task("perplexity", count) as tick,
    ):
        decoded = ((opened.logits(corpus.inputs(i)), corpus.targets(i)) for i in range(count))
        nll = []
        for vector in overlapped(decoded, lambda item: token_nll(*item)):
            nll.append(vector)
            tick()
    if not np.isfinite(nll).all():
        raise BadInput(f"{model}: gives logits that are not finite on {text}; it has collapsed")
    found = perplexity(np.stack(nll))
    return {"ppl": found.ppl, "se": found.se, "chunks": count, "tokens": found.tokens, "ctx": ctx}
