"""Variants -> paired per-chunk measurements in the ledger, resumable at any moment.

``Measurer`` answers what it is asked from the ledger, and from the engine where the ledger has nothing
yet. What to ask is decided in ``race.py`` and ``probe.py``, without I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.predictions import PredictionCache
from cerebellum.engine.protocols import CannotSwap, Engine, Job, Resident, Scores
from cerebellum.errors import BadInput
from cerebellum.ledger import Divergence, Ledger, SeriesKey
from cerebellum.progress import Reporter, Silent
from cerebellum.shards import Shards, Variant
from cerebellum.source import open_source
from cerebellum.stats.paired import Interval, superpopulation_interval
from cerebellum.texts import Corpus
from cerebellum.units import size
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
    """``nll`` gives vectors; one model stays open between calls, and other variants are swapped into it.

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
        self.engine = engine
        self.ledger = ledger
        self.corpus = corpus
        self.reporter: Reporter = reporter or Silent()
        self.reference = reference
        self.cache = cache
        self.measured = self.reused = 0
        self.doing = ""
        self._stack = ExitStack()
        self._model: Resident | None = None
        self._open_paths: tuple[Path, ...] = ()
        self._open_digest = ""
        self._refusals: set[str] = set()
        if reference is not None and cache is not None:
            cache.claim(f"{reference.digest} {corpus.sha256} {corpus.ctx} {engine.identity}")

    def nll(self, variant: Variant, chunks: Sequence[int]) -> NDArray[np.float32]:
        """(chunks, scored tokens) nats; each chunk is committed to the ledger as it is finished."""
        series = self._series(variant)
        known = self.ledger.measured(series)
        missing = [chunk for chunk in chunks if chunk not in known]
        self.reused += len(chunks) - len(missing)
        self._measure(variant, missing, known)
        found = self.ledger.nll(series, chunks)
        if found.shape[1] != self.corpus.scored_per_chunk:
            raise BadInput(
                f"{self.ledger.path}: is damaged (chunks of {found.shape[1]} tokens, the text has "
                f"{self.corpus.scored_per_chunk}); move it away to measure anew"
            )
        return found

    def kld_means(self, variant: Variant, chunks: Sequence[int]) -> Vector:
        """Mean KL divergence from the reference of each chunk, nats/token, (chunks,).

        The chunks must fit in the cache. A chunk whose NLL is known but whose divergence from this
        reference is not is decoded again; its NLL stays as it was.
        """
        if self.reference is None:
            raise ValueError("a measurer without a reference knows no divergence")
        if variant.digest == self.reference.digest:
            return np.zeros(len(chunks))
        series = self._series(variant)
        reference = self._series(self.reference)
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
        """Scores chunks on the open model, as many at once as it decodes together."""
        model = self._opened(variant)
        is_reference = self.reference is not None and variant.digest == self.reference.digest
        reference_series = self._series(self.reference) if self.reference and not is_reference else 0
        for part in _parts(chunks, model.chunks_at_once):
            jobs = [self._job(chunk, is_reference) for chunk in part]
            for chunk, scores in zip(part, model.score(jobs), strict=True):
                if scores.kept is not None and self.cache is not None:
                    self.cache.store(chunk, scores.kept)
                yield _Scored(chunk=chunk, nll=scores.nll_S, divergence=_divergence(scores, reference_series))

    def _job(self, chunk: int, is_reference: bool) -> Job:
        """What to ask of a chunk: the reference keeps its predictions, all others are compared with them."""
        inputs = self.corpus.inputs(chunk)
        if self.cache is None or self.reference is None:
            return Job(tokens_T=inputs)
        if is_reference:
            return Job(tokens_T=inputs, keep=bool(self.cache.missing([chunk])))
        return Job(tokens_T=inputs, against=self.cache.load(chunk))

    def _refill_cache(self, variant: Variant, chunks: Sequence[int]) -> None:
        """Decodes the reference again where its predictions are gone: after a kill, say."""
        if self.cache is None or self.reference is None or variant.digest == self.reference.digest:
            return
        for _ in self._score(self.reference, self.cache.missing(chunks)):
            pass

    def _opened(self, variant: Variant) -> Resident:
        """The model that is open, with the variant's groups swapped in; a new one where that cannot be."""
        if self._model is not None and self._open_digest == variant.digest:
            return self._model
        variant.ready()
        if self._model is not None and self._swapped(self._model, variant):
            return self._model
        self.close()
        self._model = self._stack.enter_context(self.engine.resident(variant.paths, self.corpus.ctx))
        self._open_paths = variant.paths
        self._open_digest = variant.digest
        return self._model

    def _swapped(self, model: Resident, variant: Variant) -> bool:
        """Whether the variant could be swapped in; where not, says why, once for each reason."""
        if len(variant.paths) != len(self._open_paths) or variant.paths[0] != self._open_paths[0]:
            return False
        pairs = zip(variant.paths, self._open_paths, strict=True)
        try:
            model.swap([path for path, opened in pairs if path != opened])
        except CannotSwap as error:
            if str(error) not in self._refusals:
                self._refusals.add(str(error))
                self.reporter.note(f"variants are opened afresh, not swapped in: {error}")
            return False
        self._open_digest = variant.digest
        return True

    def close(self) -> None:
        """Frees the open model. The measurer can be used again."""
        self._stack.close()
        self._model = None
        self._open_digest = ""


def _parts(chunks: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(chunks), size):
        yield chunks[start : start + size]


def _divergence(scores: Scores, base_series: int) -> Divergence | None:
    """A row for the ledger, where the chunk was compared with the reference."""
    if scores.kld_S is None or scores.same_top_S is None or not base_series:
        return None
    return Divergence(base_series=base_series, kld=scores.kld_S, same_top=scores.same_top_S)


def file_variant(path: Path, label: str) -> Variant:
    """A finished GGUF, with all of its splits, as a variant, to be measured like any other."""
    file = open_source(path, allow_requantize=True)
    return Variant(label=label, paths=tuple(part.path for part in file.files), digest=file.sha256())


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
    kept = f"{len(cache.chunks)} chunks, {size(cache.n_bytes)} on disk meanwhile"
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
