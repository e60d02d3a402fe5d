"""Variants -> paired per-chunk measurements in the ledger, resumable at any moment.

What to measure is decided by generators that yield an ``Ask`` and are sent the ``Answer``: the same
logic runs on an engine, on a replayed ledger and in a unit test. ``drive`` connects one to an engine.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cerebellum.files import sha256_file
from cerebellum.ledger import Ledger, SeriesKey
from cerebellum.llama.engine import Engine, Logits, Model, Tokens
from cerebellum.llama.scoring import overlapped, token_nll
from cerebellum.progress import Reporter, Silent
from cerebellum.shards import Changes, Shards, Variant
from cerebellum.stats.paired import Interval, as_percent, mean_interval
from cerebellum.texts import Corpus

TOLERANT, SENSITIVE, UNDECIDED, COLLAPSED = "tolerant", "sensitive", "undecided", "collapsed"

Vector = NDArray[np.float64]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Please measure the base with ``changes`` on these ``chunks`` of the text."""

    changes: Changes
    chunks: tuple[int, ...]


Answer = Vector
"""Mean NLL of each chunk asked for, nats/token, in the order of the ask; NaN where not finite."""

Sweep = Generator[Ask, Answer, Result]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The paired change of some groups at one type against the base, on ``delta.n`` chunks.

    ``delta`` is in nats/token; None when the logits were not finite: the variant collapsed.
    """

    changes: Mapping[str, str]
    delta: Interval | None

    def verdict(self, threshold_nats: float) -> str:
        """Against a threshold: decided only when the whole interval lies on one side of it."""
        if self.delta is None:
            return COLLAPSED
        if self.delta.high < threshold_nats:
            return TOLERANT
        return SENSITIVE if self.delta.low > threshold_nats else UNDECIDED

    def as_json(self, threshold_nats: float) -> dict[str, Any]:
        """A row of measurements.json, the format that ``plan --measurements`` reads."""
        kinds = sorted(set(self.changes.values()))
        row: dict[str, Any] = {
            "groups": sorted(self.changes),
            "type": kinds[0] if len(kinds) == 1 else dict(self.changes),
            "delta_pct": None,
            "ci_pct": None,
            "chunks": None,
            "verdict": self.verdict(threshold_nats),
        }
        if self.delta is not None:
            mean, low, high = self.delta.percent()
            row |= {"delta_pct": mean, "ci_pct": [low, high], "chunks": self.delta.n}
        return row


class Measurer:
    """Answers asks from the ledger, and from the engine where the ledger has nothing yet.

    One model stays open between asks, so a run of asks on one variant loads it once.
    ``measured`` and ``reused`` count chunks of this session.
    """

    def __init__(self, engine: Engine, ledger: Ledger, corpus: Corpus, reporter: Reporter | None = None):
        self.engine, self.ledger, self.corpus = engine, ledger, corpus
        self.reporter: Reporter = reporter or Silent()
        self.measured = self.reused = 0
        self._stack, self._open_digest = ExitStack(), ""
        self._model: Model | None = None

    def nll(self, variant: Variant, chunks: Sequence[int]) -> NDArray[np.float32]:
        """(chunks, scored tokens) nats; each chunk is committed to the ledger as it is finished."""
        series = self.ledger.series(self._key(variant))
        known = self.ledger.measured(series)
        missing = [chunk for chunk in chunks if chunk not in known]
        self.reused += len(chunks) - len(missing)
        if missing:
            with self.reporter.task(f"{variant.label}", len(missing)) as tick:
                for chunk, nll in self._score(variant, missing):
                    self.ledger.record(series, chunk, nll)
                    self.measured += 1
                    tick()
        return self.ledger.nll(series, chunks)

    def chunk_means(self, variant: Variant, chunks: Sequence[int]) -> Vector:
        """Mean NLL of each chunk, (chunks,)."""
        return np.asarray(self.nll(variant, chunks).mean(axis=1, dtype=np.float64))

    def _key(self, variant: Variant) -> SeriesKey:
        return SeriesKey(
            variant=variant.digest,
            text=self.corpus.sha256,
            ctx=self.corpus.ctx,
            engine=self.engine.identity,
            label=variant.label,
        )

    def _score(self, variant: Variant, chunks: Iterable[int]) -> Iterator[tuple[int, Vector]]:
        model = self._opened(variant)

        def decoded() -> Iterator[tuple[int, Logits, Tokens]]:
            for chunk in chunks:
                yield chunk, model.logits(self.corpus.inputs(chunk)), self.corpus.targets(chunk)

        return overlapped(decoded(), lambda item: (item[0], token_nll(item[1], item[2])))

    def _opened(self, variant: Variant) -> Model:
        if self._model is None or self._open_digest != variant.digest:
            self.close()
            self._model = self._stack.enter_context(self.engine.open(variant.paths, self.corpus.ctx))
            self._open_digest = variant.digest
        return self._model

    def close(self) -> None:
        """Frees the open model. The measurer can be used again."""
        self._stack.close()
        self._model, self._open_digest = None, ""


def file_variant(path: Path, label: str) -> Variant:
    """A finished GGUF as a variant, to be measured like any other."""
    return Variant(label=label, paths=(path,), digest=sha256_file(path))


def chunk_order(n_chunks: int, seed: int) -> tuple[int, ...]:
    """The one seeded order in which base and all variants visit the chunks of a text."""
    return tuple(int(i) for i in np.random.default_rng(seed).permutation(n_chunks))


def measure_change(changes: Changes, chunks: tuple[int, ...], population: int) -> Sweep[Measurement]:
    """The base and the base with ``changes`` on the same chunks, paired."""
    base = yield Ask(changes={}, chunks=chunks)
    variant = yield Ask(changes=changes, chunks=chunks)
    differences = variant - base
    if not np.isfinite(differences).all():
        return Measurement(changes=dict(changes), delta=None)
    return Measurement(changes=dict(changes), delta=mean_interval(differences, population))


def measure_each(
    candidates: Iterable[Changes], chunks: tuple[int, ...], population: int
) -> Sweep[tuple[Measurement, ...]]:
    """Every candidate alone."""
    found = []
    for changes in candidates:
        found.append((yield from measure_change(changes, chunks, population)))
    return tuple(found)


def drive(sweep: Sweep[Result], measurer: Measurer, shards: Shards) -> Result:
    """Runs a sweep to its end on a real engine; shards are made when first asked for."""
    try:
        ask = next(sweep)
        while True:
            ask = sweep.send(measurer.chunk_means(shards.variant(ask.changes), ask.chunks))
    except StopIteration as stop:
        result: Result = stop.value
        return result


def percent_or_none(nats: float | None) -> float | None:
    """For JSON, which has no NaN."""
    return None if nats is None or not np.isfinite(nats) else as_percent(nats)
