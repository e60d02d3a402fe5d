"""Compares two GGUFs on the same tokens: perplexity change, KL divergence, agreement of the top token.

Both score the same chunks, so the difference on a chunk is free of what makes its text hard or easy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cerebellum.codec import Record
from cerebellum.engine.protocols import Engine, Logits, Tokens
from cerebellum.engine.scoring import divergence, normalize, overlapped, predict, token_nll
from cerebellum.errors import BadInput
from cerebellum.measure.race import chunk_order
from cerebellum.progress import Reporter
from cerebellum.source import Source, open_source
from cerebellum.stats.paired import Interval, as_nats, perplexity, superpopulation_interval
from cerebellum.stats.sequential import FixedWidth
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
    """Holds one chunk under both models, as vectors over its scored tokens.

    The NLLs and the KL divergence of B from A are in nats; ``same_top`` says where both models have the same
    likeliest token.
    """

    nll_a: NDArray[np.float64]
    nll_b: NDArray[np.float64]
    kld: NDArray[np.float64]
    same_top: NDArray[np.bool_]


def open_pair(a: Path, b: Path) -> tuple[Source, Source]:
    """Opens both models; BadInput unless they share a tokenizer, because other tokens cannot be paired."""
    first = open_source(a, allow_requantize=True)
    second = open_source(b, allow_requantize=True)
    check_same_tokens(first, second)
    return first, second


def check_same_tokens(first: Source, second: Source) -> None:
    """Raises BadInput unless both models have the same tokenizer."""
    for key in _VOCABULARY_KEYS:
        if first.kv_records.get(key) != second.kv_records.get(key):
            raise BadInput(
                f"{first.path} and {second.path} differ in {key}: tokens of different vocabularies cannot be compared"
            )


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """Says on which tokens two models are compared, and when to stop.

    ``ctx`` counts tokens in a chunk. ``chunks`` takes the first so many of the text (0: all). ``until_pct``
    takes them in random order instead and stops once the interval of the perplexity change is no wider than
    plus or minus that many percent; ``seed`` decides the order. Both intervals, wrong with chance ``alpha``
    each, are then made for such a stop and are of this text; without it they are Student's, of text like this.
    """

    text: Path
    ctx: int
    chunks: int = 0
    until_pct: float | None = None
    seed: int = 1
    alpha: float = 0.05


class Comparison(Record, frozen=True, kw_only=True):
    """Holds the answer of `compare --json`; intervals are 95% over chunks, None for a single chunk.

    ``delta_pct`` is the change of perplexity from A to B in percent, ``kld_mean`` the KL divergence of B from
    A in nats/token, ``top1_agreement`` the share of tokens with the same likeliest prediction, and ``tokens``
    the number that were scored.
    """

    ppl_a: float
    ppl_b: float
    delta_pct: float
    ci_pct: tuple[float | None, float | None]
    kld_mean: float
    kld_ci: tuple[float | None, float | None]
    top1_agreement: float
    chunks: int
    tokens: int
    ctx: int


class PerplexityAnswer(Record, frozen=True, kw_only=True):
    """Holds the answer of `perplexity --json`, to the digits that llama-perplexity prints.

    ``se`` is the standard error of the perplexity and ``tokens`` the number that were scored, half of each
    chunk of ``ctx`` tokens.
    """

    ppl: float
    se: float
    chunks: int
    tokens: int
    ctx: int


def compare(engine: Engine, a: Path, b: Path, settings: ComparisonSettings, reporter: Reporter) -> Comparison:
    """Returns how the model at ``b`` differs from that at ``a`` on the same tokens.

    Raises BadInput where a file or the text cannot be used, the two have different vocabularies, or one gives
    logits that are not finite.
    """
    first, second = open_pair(a, b)
    corpus = load_corpus(engine, a, settings.text, settings.ctx)
    count = min(settings.chunks or corpus.n_chunks, corpus.n_chunks)
    order = tuple(range(count)) if settings.until_pct is None else chunk_order(count, settings.seed)
    rule = FixedWidth(population=count, confidence=1 - settings.alpha)
    scores: list[PairScore] = []
    with reporter.task("comparing", count) as tick:
        for score in score_pairs(engine, first, second, corpus, order):
            scores.append(score)
            tick()
            if settings.until_pct is not None and _narrow_enough(scores, rule, settings.until_pct):
                break
    return summarise(scores, settings.ctx, rule if settings.until_pct is not None else None)


def _narrow_enough(scores: list[PairScore], rule: FixedWidth, until_pct: float) -> bool:
    if len(scores) < _BURN_IN:
        return False
    delta = rule.interval(_differences(scores))
    return delta.high - delta.low <= 2 * as_nats(until_pct)


def _differences(scores: list[PairScore]) -> NDArray[np.float64]:
    """Returns the mean NLL of B less that of A for each chunk, (chunks,), in nats/token."""
    return np.array([(score.nll_b - score.nll_a).mean() for score in scores])


def score_pairs(
    engine: Engine, a: Source, b: Source, corpus: Corpus, order: Sequence[int]
) -> Iterator[PairScore]:
    """Yields a score for every chunk of ``order``; both models stay open and take turns on each chunk."""
    files_a = a.paths
    files_b = b.paths
    with engine.open(files_a, corpus.ctx) as model_a, engine.open(files_b, corpus.ctx) as model_b:

        def decoded() -> Iterator[tuple[Logits, Logits, Tokens]]:
            for chunk in order:
                tokens = corpus.inputs(chunk)
                yield model_a.logits(tokens), model_b.logits(tokens), corpus.targets(chunk)

        yield from overlapped(decoded(), lambda item: _score(*item))


def _score(logits_a: Logits, logits_b: Logits, targets: Tokens) -> PairScore:
    a = normalize(logits_a)
    b = normalize(logits_b)
    kld, same_top = divergence(predict(a), b)
    return PairScore(
        nll_a=a.nll(targets),
        nll_b=b.nll(targets),
        kld=kld,
        same_top=same_top,
    )


def summarise(scores: list[PairScore], ctx: int, rule: FixedWidth | None = None) -> Comparison:
    """Returns means with 95% intervals over chunks; the chunk is the unit, since its tokens share a context.

    ``rule`` makes the intervals where the comparison could stop early; they are Student's else. Raises BadInput
    where a model's logits are not finite.
    """
    interval: Callable[[NDArray[np.float64]], Interval] = rule.interval if rule else superpopulation_interval
    nll_a = np.stack([score.nll_a for score in scores])
    nll_b = np.stack([score.nll_b for score in scores])
    if not (np.isfinite(nll_a).all() and np.isfinite(nll_b).all()):
        raise BadInput("one of the models gives logits that are not finite; it has collapsed")
    delta = interval(_differences(scores))
    kld = interval(np.array([score.kld.mean() for score in scores]))
    mean, low, high = delta.percent()
    found_a = perplexity(nll_a)
    one_chunk = len(scores) == 1  # it has no interval: null rather than infinity
    return Comparison(
        ppl_a=found_a.ppl,
        ppl_b=perplexity(nll_b).ppl,
        delta_pct=mean,
        ci_pct=(None, None) if one_chunk else (low, high),
        kld_mean=kld.mean,
        kld_ci=(None, None) if one_chunk else (kld.low, kld.high),
        top1_agreement=float(np.mean([score.same_top.mean() for score in scores])),
        chunks=len(scores),
        tokens=found_a.tokens,
        ctx=ctx,
    )


def perplexity_of(
    engine: Engine, model: Path, text: Path, ctx: int, chunks: int, reporter: Reporter
) -> PerplexityAnswer:
    """Returns llama-perplexity's number on the first ``chunks`` chunks (0: all) of ``ctx`` tokens.

    Raises BadInput where the model or the text cannot be used, or the logits are not finite.
    """
    source = open_source(model, allow_requantize=True)
    corpus = load_corpus(engine, model, text, ctx)
    count = min(chunks or corpus.n_chunks, corpus.n_chunks)
    with (
        engine.open(source.paths, ctx) as opened,
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
    return PerplexityAnswer(ppl=found.ppl, se=found.se, chunks=count, tokens=found.tokens, ctx=ctx)
