"""Variants -> paired per-chunk measurements in the ledger, resumable at any moment.

``Measurer`` answers what it is asked from the ledger, and from the engine where the ledger has nothing
yet. What to ask is decided in ``race.py`` and ``probe.py``, without I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.predictions import PredictionCache
from cerebellum.engine.protocols import Engine, Logits, Model
from cerebellum.engine.scoring import divergence, normalize, overlapped, predict
from cerebellum.files import sha256_file
from cerebellum.ledger import Divergence, Ledger, SeriesKey
from cerebellum.progress import Reporter, Silent
from cerebellum.shards import Shards, Variant
from cerebellum.stats.paired import Interval, superpopulation_interval
from cerebellum.texts import Corpus
from cerebellum.verdicts import Measurement

if TYPE_CHECKING:
    from cerebellum.workspace import Workspace

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Scored:
    chunk: int
    nll: Vector
    divergence: Divergence | None


class Measurer:
    """``nll`` gives vectors; one model stays open between calls, so a run on one variant loads it once.

    With ``reference`` and ``cache``, chunks in the cache are also compared with its predictions: those of
    the base, or of the source.
    ``measured`` and ``reused`` count chunks of this session; ``doing`` stands before the titles of tasks.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        corpus: Corpus,
        reporter: Reporter | None = None,
        reference: Variant | None = None,
        cache: PredictionCache | None = None,
    ) -> None:
        self.engine, self.ledger, self.corpus = engine, ledger, corpus
        self.reporter: Reporter = reporter or Silent()
        self.reference, self.cache = reference, cache
        self.measured = self.reused = 0
        self.doing = ""
        self._stack, self._open_digest = ExitStack(), ""
        self._model: Model | None = None
        if reference is not None and cache is not None:
            cache.claim(f"{reference.digest} {corpus.sha256} {corpus.ctx} {engine.identity}")

    def nll(self, variant: Variant, chunks: Sequence[int]) -> NDArray[np.float32]:
        """(chunks, scored tokens) nats; each chunk is committed to the ledger as it is finished."""
        series = self._series(variant)
        known = self.ledger.measured(series)
        missing = [chunk for chunk in chunks if chunk not in known]
        self.reused += len(chunks) - len(missing)
        self._measure(variant, missing, known)
        return self.ledger.nll(series, chunks)

    def kld_means(self, variant: Variant, chunks: Sequence[int]) -> Vector:
        """Mean KL divergence from the reference of each chunk, nats/token, (chunks,).

        The chunks must fit in the cache. A chunk whose NLL is known but whose divergence from this
        reference is not is decoded again; its NLL stays as it was.
        """
        if self.reference is None:
            raise ValueError("a measurer without a reference knows no divergence")
        if variant.digest == self.reference.digest:
            return np.zeros(len(chunks))
        series, reference = self._series(variant), self._series(self.reference)
        found = self.ledger.diverged(series, reference)
        missing = [chunk for chunk in chunks if chunk not in found]
        self._measure(variant, missing, self.ledger.measured(series))
        found = self.ledger.diverged(series, reference)
        return np.array([found[chunk] for chunk in chunks])

    def _measure(self, variant: Variant, chunks: Sequence[int], known: frozenset[int]) -> None:
        if not chunks:
            return
        series = self._series(variant)
        self._refill_cache(variant, chunks)
        with self.reporter.task(self.doing + variant.label, len(chunks)) as tick:
            for scored in self._score(variant, chunks):
                if scored.chunk not in known:
                    self.ledger.record(series, scored.chunk, scored.nll, scored.divergence)
                    self.measured += 1
                elif scored.divergence is not None:
                    self.ledger.record_divergence(series, scored.chunk, scored.divergence)
                tick()

    def n_measured(self, variant: Variant) -> int:
        """How many chunks of the text the ledger has of a variant."""
        return len(self.ledger.measured(self._series(variant)))

    def chunk_means(self, variant: Variant, chunks: Sequence[int]) -> Vector:
        """Mean NLL of each chunk, (chunks,)."""
        return np.asarray(self.nll(variant, chunks).mean(axis=1, dtype=np.float64))

    def divergence(self, variant: Variant) -> tuple[Interval, float] | None:
        """(mean KL divergence from the reference, share of equal top tokens), if measured."""
        if self.reference is None:
            return None
        kld, same = self.ledger.divergence(self._series(variant), self._series(self.reference))
        return (superpopulation_interval(kld), float(same.mean())) if len(kld) else None

    def _series(self, variant: Variant) -> int:
        key = SeriesKey(
            variant=variant.digest,
            text=self.corpus.sha256,
            ctx=self.corpus.ctx,
            engine=self.engine.identity,
            label=variant.label,
        )
        return self.ledger.series(key)

    def _score(self, variant: Variant, chunks: Sequence[int]) -> Iterator[_Scored]:
        model = self._opened(variant)
        decoded = ((chunk, model.logits(self.corpus.inputs(chunk))) for chunk in chunks)
        return overlapped(decoded, self._work(variant))

    def _work(self, variant: Variant) -> Callable[[tuple[int, Logits]], _Scored]:
        """What the worker thread does with a chunk's logits."""
        is_reference = self.reference is not None and variant.digest == self.reference.digest
        reference_series = self._series(self.reference) if self.reference and not is_reference else 0

        def work(item: tuple[int, Logits]) -> _Scored:
            chunk, logits = item
            scores = normalize(logits)
            nll = scores.nll(self.corpus.targets(chunk))
            if is_reference and self.cache and chunk in self.cache.chunks:
                self.cache.store(chunk, predict(scores))
            kept = self.cache.load(chunk) if self.cache and reference_series else None
            if kept is None:
                return _Scored(chunk=chunk, nll=nll, divergence=None)
            kld, same_top = divergence(kept, scores)
            found = Divergence(base_series=reference_series, kld=kld, same_top=same_top)
            return _Scored(chunk=chunk, nll=nll, divergence=found)

        return work

    def _refill_cache(self, variant: Variant, chunks: Sequence[int]) -> None:
        """Decodes the reference again where its predictions are gone: after a kill, say."""
        if self.cache is None or self.reference is None or variant.digest == self.reference.digest:
            return
        missing = self.cache.missing(chunks)
        if missing:
            model = self._opened(self.reference)
            for chunk in missing:
                self.cache.store(chunk, predict(normalize(model.logits(self.corpus.inputs(chunk)))))

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


def with_divergence(found: Measurement, measurer: Measurer, shards: Shards) -> Measurement:
    """The measurement with what the ledger knows of the variant's divergence from the base."""
    known = measurer.divergence(shards.variant(found.changes))
    return found if known is None else found.with_divergence(*known)


@contextmanager
def measuring(
    workspace: Workspace, reference: Variant, chunks: Sequence[int], corpus: Corpus | None = None
) -> Iterator[Measurer]:
    """Opens a measurer on the selection text, or on another ``corpus``, and frees it when the block ends.

    Predictions of the reference (the base, or the source) for ``chunks``, as many of them as have room, are
    kept on disk meanwhile: divergences are measured against them.
    """
    corpus = corpus or workspace.selection
    cache = PredictionCache(
        workspace.path("predictions"),
        chunks,
        corpus.scored_per_chunk * workspace.engine.vocab_size(workspace.source.path) * 4,
        workspace.settings.prediction_bytes,
    )
    kept = f"{len(cache.chunks)} chunks, {cache.n_bytes / 1e6:.0f} MB on disk meanwhile"
    if len(cache.chunks) < len(chunks):
        kept += f" ({len(chunks)} wanted; --kld-cache bounds it)"
    workspace.reporter.note(f"keeping the predictions of the {reference.label}: {kept}")
    measurer = Measurer(
        workspace.engine, workspace.ledger, corpus, workspace.reporter, reference=reference, cache=cache
    )
    try:
        yield measurer
    finally:
        measurer.close()
        cache.remove()
