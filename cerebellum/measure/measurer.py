"""Variants -> paired per-chunk measurements in the ledger, resumable at any moment.

``Measurer`` answers what it is asked from the ledger, and from the engine where the ledger has nothing
yet: on a model in this process, or by a crew of workers. What to ask is decided in ``race.py`` and ``probe.py``,
without I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.predictions import PredictionCache
from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.ledger import Divergence, Ledger, SeriesKey
from cerebellum.measure.bundles import Bundle, Bundles
from cerebellum.measure.crew import Anchors, Column, Crew, Wish
from cerebellum.measure.race import chunk_order
from cerebellum.measure.scorer import Compared, Found, Scorer
from cerebellum.measure.worker import KeptOf, Scored, ScoreTask
from cerebellum.progress import Reporter, Silent
from cerebellum.shards import Shards, Variant
from cerebellum.source import open_source
from cerebellum.stats.paired import Interval, superpopulation_interval
from cerebellum.texts import Corpus
from cerebellum.units import size
from cerebellum.verdicts import NOTHING, Measurement

if TYPE_CHECKING:
    from cerebellum.settings import Settings
    from cerebellum.workspace import Workspace

Vector = NDArray[np.float64]
Matrix = NDArray[np.float32]


_LEAST_NLL = -0.01  # nats: of a token that is certain, rounding gives a little less than nothing


class Measurer:
    """``nll`` gives vectors; one model stays open between calls, and other variants are swapped into it.

    With ``reference`` and ``cache``, chunks in the cache are also compared with its predictions: those of
    the base, or of the source. With a ``crew``, its workers score, and no model is open here. Of a variant in
    ``unsure`` (digests) the entropy of its predictions is measured too. ``order`` has all chunks of the text as they
    share decodes (bundles.py): None is their order in the text.
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
        crew: Crew | None = None,
        unsure: frozenset[str] = frozenset(),
        order: Sequence[int] | None = None,
    ) -> None:
        self.engine = engine
        self.ledger = ledger
        self.corpus = corpus
        self.reporter: Reporter = reporter or Silent()
        self.reference = reference
        self.cache = cache
        self.measured = self.reused = 0
        self.doing = ""
        self._crew = crew
        self._unsure = unsure
        self._scorer = Scorer(engine, self.reporter.note)
        self.bundles = Bundles.of(
            corpus.first(corpus.n_chunks) if order is None else order, engine.chunks_together(corpus.ctx)
        )
        self._of_variant: dict[tuple[str, str], int] = {}
        if reference is not None and cache is not None:
            cache.claim(f"{reference.digest} {corpus.sha256} {corpus.ctx} {engine.identity}")

    # --- many questions at once

    def want(self, who: int, wishes: Sequence[Wish], likely: Sequence[Wish]) -> None:
        """Hears what somebody wants from now on, so that workers begin with it; nothing without a crew."""
        if self._crew is not None:
            self._crew.open_book(self)
            self._crew.want(who, wishes, likely)

    def has(self, wish: Wish) -> bool:
        """Says whether all of a wish can be answered at once; without a crew nobody else would make it so."""
        if self._crew is None:
            return True
        self._crew.open_book(self)
        return self._crew.has(wish)

    def wait(self) -> None:
        """Returns once a worker has come back with something."""
        if self._crew is not None:
            self._crew.open_book(self)
            self._crew.wait()

    def gather(self, wish: Wish) -> None:
        """Has the crew, if there is one, measure all of a wish that the ledger lacks."""
        if self._crew is not None:
            self._crew.open_book(self)
            self._crew.fetch(wish)

    def settle(self) -> None:
        """Takes in what workers have begun to score ahead, so that it is in the ledger and nobody writes any more."""
        if self._crew is not None:
            self._crew.settle()

    def missing(self, variant: Variant, wish: Wish) -> list[Bundle]:
        """Returns the decodes with chunks of a wish that the ledger lacks, in the order of the wish."""
        lacking = self.ledger.lacking(self._series(variant), wish.nll)
        if wish.kld and self.reference is not None and not self._is_reference(variant):
            lacking += self._undiverged(variant, wish.kld)
        lacking += self._entropy_lacking(variant, wish.nll)
        return self.bundles.holding(lacking)

    def task(self, variant: Variant, bundles: Sequence[Bundle]) -> ScoreTask:
        """Returns what a worker has to do for some decodes."""
        kept = None
        if self.reference is not None and self.cache is not None:
            kept = KeptOf(
                reference=self.reference,
                text=f"{self.corpus.sha256} {self.corpus.ctx}",
                folder=self.cache.folder,
                chunks=self.cache.chunks,
            )
        inputs = np.stack([self.corpus.inputs(chunk) for bundle in bundles for chunk in bundle])
        return ScoreTask(
            variant=variant,
            bundles=tuple(bundles),
            inputs=inputs,
            kept=kept,
            entropy=variant.digest in self._unsure,
        )

    def record(self, variant: Variant, found: Found) -> None:
        """Writes a chunk into the ledger as one commit, or what the ledger lacks of it."""
        self._check(variant, found)
        series = self._series(variant)
        divergence = self._divergence(variant, found)
        if self.ledger.lacking(series, [found.chunk]):
            self.ledger.record(series, found.chunk, found.nll, divergence, found.entropy)
            self.measured += 1
            return
        if found.entropy is not None:
            self.ledger.record_entropy(series, found.chunk, found.entropy)
        if divergence is not None and self._undiverged(variant, [found.chunk]):
            self.ledger.record_divergence(series, found.chunk, divergence)

    def _check(self, variant: Variant, found: Found) -> None:
        """Raises CerebellumError where no model can have given this; what is not finite has collapsed: a result."""
        vectors = [part for part in (found.nll, found.kld, found.same_top, found.entropy) if part is not None]
        lengths = sorted({part.shape for part in vectors})
        if lengths != [(self.corpus.scored_per_chunk,)]:
            raise CerebellumError(
                f"{variant.label}: chunk {found.chunk} came back with {lengths} values, and "
                f"{self.corpus.scored_per_chunk} tokens of a chunk are scored; nothing was recorded of it"
            )
        least = float(np.min(found.nll, where=np.isfinite(found.nll), initial=0.0))
        if least < _LEAST_NLL:
            raise CerebellumError(
                f"{variant.label}: chunk {found.chunk} came back with {least:.4g} nats for a token, and none can be "
                "below zero; nothing was recorded of it"
            )

    def reference_first(self, variant: Variant, bundle: Bundle) -> Variant | None:
        """Returns the reference where it was not measured on a decode on which this variant is compared with it."""
        if self.reference is None or self.cache is None or self._is_reference(variant):
            return None
        compared = [chunk for chunk in bundle if chunk in self.cache.chunks]
        return self.reference if self.ledger.lacking(self._series(self.reference), compared) else None

    def kept(self) -> tuple[Variant, tuple[Bundle, ...]] | None:
        """Returns the reference and the decodes of which its predictions are kept, or None without one."""
        if self.reference is None or self.cache is None or not self.cache.chunks:
            return None
        kept = [bundle for bundle in self.bundles.every if not self.cache.chunks.isdisjoint(bundle)]
        return self.reference, tuple(kept)

    # --- answers

    def nll(self, variant: Variant, chunks: Sequence[int]) -> NDArray[np.float32]:
        """(chunks, scored tokens) nats; each chunk is committed to the ledger as it is finished."""
        self.gather(Wish(nll=tuple(chunks), variant=variant))
        series = self._series(variant)
        missing = self.ledger.lacking(series, chunks)
        self.reused += len(chunks) - len(missing)
        self._measure(variant, self.bundles.holding(missing))
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
        undiverged = self._undiverged(variant, chunks)
        unkept = [c for c in undiverged if self.cache is None or c not in self.cache.chunks]
        if unkept:
            raise CerebellumError(
                f"{variant.label}: there is no prediction of the {self.reference.label} to compare chunk {unkept[0]} "
                "with; give more with --kld-cache"
            )
        self.gather(Wish(nll=(), kld=tuple(chunks), variant=variant))
        series = self._series(variant)
        self._measure(variant, self.bundles.holding(self._undiverged(variant, chunks)))
        found = self.ledger.diverged(series, self._series(self.reference))
        return np.array([found[chunk] for chunk in chunks])

    def entropy_means(self, variant: Variant, chunks: Sequence[int]) -> Vector:
        """Mean entropy of the predictions of each chunk, nats/token, (chunks,); the variant is one of ``unsure``.

        A chunk whose NLL is known but whose entropy is not is decoded again; its NLL stays as it was.
        """
        self.gather(Wish(nll=tuple(chunks), variant=variant))
        self._measure(variant, self.bundles.holding(self._entropy_lacking(variant, chunks)))
        found = self.ledger.entropies(self._series(variant))
        return np.array([found[chunk] for chunk in chunks])

    def _entropy_lacking(self, variant: Variant, chunks: Sequence[int]) -> list[int]:
        """Returns those of ``chunks`` whose entropy is to be measured and was not."""
        if variant.digest not in self._unsure:
            return []
        known = self.ledger.entropies(self._series(variant))
        return [chunk for chunk in chunks if chunk not in known]

    def _measure(self, variant: Variant, bundles: Sequence[Bundle]) -> None:
        """Scores the chunks of some decodes on the model in this process."""
        if not bundles:
            return
        against = None
        if self.reference is not None and self.cache is not None:
            against = Compared(reference=self.reference, cache=self.cache)
        with self.reporter.task(self.doing + variant.label, sum(map(len, bundles))) as tick:
            scored = self._scorer.score(
                *(variant, bundles, self.corpus.inputs, self.corpus.ctx, against),
                entropy=variant.digest in self._unsure,
            )
            for found in scored:
                self.record(variant, found)
                tick()

    def chunk_means(self, variant: Variant, chunks: Sequence[int]) -> Vector:
        """Mean NLL of each chunk, (chunks,)."""
        return np.asarray(self.nll(variant, chunks).mean(axis=1, dtype=np.float64))

    def divergence(self, variant: Variant, chunks: Sequence[int]) -> tuple[Interval, float] | None:
        """(mean KL divergence from the reference, share of equal top tokens) on those of ``chunks`` it is known of.

        What the ledger has of other chunks has no part in it, so that it is the same however many were scored ahead.
        """
        if self.reference is None:
            return None
        kld, same = self.ledger.divergence(self._series(variant), self._series(self.reference), chunks)
        return (superpopulation_interval(kld), float(same.mean())) if len(kld) else None

    def compared(self, variant: Variant, chunks: Sequence[int]) -> tuple[Matrix, Matrix]:
        """Returns KL divergences from the reference (nats) and agreement of top tokens, (chunks, scored tokens).

        The chunks were compared before; nothing is measured here.
        """
        if self.reference is None:
            raise ValueError("a measurer without a reference knows no divergence")
        return self.ledger.divergences(self._series(variant), self._series(self.reference), chunks)

    # --- the ledger

    def _series(self, variant: Variant) -> int:
        company = self.bundles.name
        identity = self.engine.identity + (f", decodes {company}" if company else "")
        if (variant.digest, identity) not in self._of_variant:
            key = SeriesKey(
                variant=variant.digest,
                text=self.corpus.sha256,
                ctx=self.corpus.ctx,
                engine=identity,
                label=variant.label,
            )
            self._of_variant[variant.digest, identity] = self.ledger.series(key)
        return self._of_variant[variant.digest, identity]

    def _undiverged(self, variant: Variant, chunks: Sequence[int]) -> list[int]:
        """Returns those of ``chunks`` on which a variant was never compared with the reference."""
        assert self.reference is not None
        return self.ledger.undiverged(self._series(variant), self._series(self.reference), chunks)

    def _is_reference(self, variant: Variant) -> bool:
        return self.reference is not None and variant.digest == self.reference.digest

    def _divergence(self, variant: Variant, found: Found) -> Divergence | None:
        """A row for the ledger, where the chunk was compared with the reference."""
        if (
            self.reference is None
            or found.kld is None
            or found.same_top is None
            or self._is_reference(variant)
        ):
            return None
        return Divergence(base_series=self._series(self.reference), kld=found.kld, same_top=found.same_top)

    def close(self) -> None:
        """Frees the open model. The measurer can be used again."""
        self._scorer.close()


def file_variant(path: Path, label: str) -> Variant:
    """A finished GGUF, with all of its splits, as a variant, to be measured like any other."""
    return Variant.of_source(open_source(path, allow_requantize=True), label)


def with_divergence(
    found: Measurement, measurer: Measurer, shards: Shards, order: Sequence[int]
) -> Measurement:
    """The measurement with its divergence from the base, on the chunks of the order that the measurement rests on."""
    known = measurer.divergence(shards.variant(found.changes), order[: found.read])
    return found if known is None else found.with_divergence(*known)


def decode_order(workspace: Workspace, corpus: Corpus) -> tuple[int, ...]:
    """Returns all chunks of a text as they share decodes: in seeded order, another one where it decides."""
    if corpus.sha256 == workspace.selection.sha256:
        return chunk_order(corpus.n_chunks, workspace.settings.seed)
    return corpus.sample(corpus.n_chunks, workspace.settings.seed)


def base_anchors(workspace: Workspace) -> Anchors:
    """The first chunks that the base is scored on, by which workers are compared, and what the ledger has of them.

    They are a decode, or two where one takes a chunk alone. They are measured anyway, so that the comparison costs
    other workers so many chunks each and the first one nothing.
    """
    corpus = workspace.selection
    order = decode_order(workspace, corpus)
    base = workspace.shards.variant(NOTHING)
    measurer = Measurer(workspace.engine, workspace.ledger, corpus, order=order)
    bundles = measurer.bundles.holding(order[:2])
    chunks = tuple(chunk for bundle in bundles for chunk in bundle)
    known = None
    if not measurer.missing(base, Wish(nll=chunks, variant=base)):
        known = measurer.nll(base, chunks)

    def record(result: object) -> None:
        assert isinstance(result, Scored)
        for found in result.found:
            measurer.record(base, found)

    return Anchors(
        task=measurer.task(base, bundles),
        identity=workspace.engine.identity,
        known=known,
        column=_column,
        record=record,
        said="the first chunks of the base",
    )


def _column(result: object) -> Column:
    assert isinstance(result, Scored)
    return np.stack([found.nll for found in result.found]).astype(np.float32)


@contextmanager
def measuring(
    workspace: Workspace,
    reference: Variant,
    chunks: Sequence[int],
    corpus: Corpus | None = None,
    room: int | None = None,
    unsure: frozenset[str] = frozenset(),
) -> Iterator[Measurer]:
    """Opens a measurer on the selection text, or on another ``corpus``, and frees it when the block ends.

    Predictions of the reference (the base, or the source) for ``chunks``, as many of them as have room, are
    kept on disk meanwhile: divergences are measured against them. ``room`` is how many bytes they may take, where
    nobody said it with --kld-cache and the goal's own is not meant. ``unsure`` are variants by their digests of whose
    predictions the entropy is measured too.
    """
    corpus = corpus or workspace.selection
    cache = PredictionCache(
        workspace.path("predictions"),
        chunks,
        corpus.scored_per_chunk * workspace.engine.vocab_size(workspace.source.path) * 4,
        _room(workspace.settings, room),
    )
    kept = f"{len(cache.chunks)} chunks, {size(cache.n_bytes)} on disk meanwhile"
    if len(cache.chunks) < len(chunks):
        kept += f" ({len(chunks)} wanted; --kld-cache bounds it)"
    workspace.reporter.note(f"keeping the predictions of the {reference.label}: {kept}")
    measurer = Measurer(
        *(workspace.engine, workspace.ledger, corpus, workspace.reporter),
        reference=reference,
        cache=cache,
        crew=workspace.crew,
        unsure=unsure,
        order=decode_order(workspace, corpus),
    )
    try:
        yield measurer
        measurer.settle()
    finally:
        measurer.close()
        cache.remove()


def _room(settings: Settings, room: int | None) -> int:
    return room if room is not None and settings.kld_cache_bytes is None else settings.prediction_bytes
