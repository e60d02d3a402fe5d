"""Groups -> measurements.json against a limit, or curves.json for a budget, through the ledger.

This file drives; what to ask is decided without I/O in ``race.py`` and ``probe.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from cerebellum.folder import CURVES, MEASUREMENTS
from cerebellum.measure.artifacts import Curves, MeasurementRow, Measurements
from cerebellum.measure.crew import Wish
from cerebellum.measure.measurer import Measurer, measuring, with_divergence
from cerebellum.measure.probe import Session, measure_curves
from cerebellum.measure.race import ChunkAsk, ChunkScores, RaceSettings, chunk_order, race
from cerebellum.settings import Limit
from cerebellum.stats.sequential import Rule, SpendingRule, StoppingRule, looks, union_share
from cerebellum.verdicts import NOTHING, Changes, Measurement, drive_together
from cerebellum.workspace import Workspace

SINGLES_SHARE = 0.5
"""Of the chance to be wrong: what the groups alone may spend. Their combinations get the rest."""

_KLD_CHUNKS = 8  # the first chunks of a race: the divergence of more would not foretell the spread any better

_FIRST_LOOK = 2
_LATE_FIRST_LOOK = 8
_GROWTH = 1.5
_STEEP_GROWTH = 2.5
"""Chunks at the first look, and how blocks grow. Two are enough where the divergence foretells the spread, and
pay where weights stay resident and a switch of groups costs less than a chunk. Where every switch opens a model
anew, looks are late and few."""

COMBINATION_FIRST_LOOK = 12
COMBINATION_GROWTH = 1.3
"""Of combinations, which lie near the limit: none is decided by fewer chunks, and each chunk beyond costs one of the
base too, so that looks are close."""


def measure_against_limit(workspace: Workspace, limit: Limit) -> Measurements:
    """Measures every group alone at the demoted type, writes measurements.json and returns it."""
    workspace.write_source()
    candidates = demotions(workspace, limit)
    order = chunk_order(workspace.selection.n_chunks, workspace.settings.seed)
    with against_base(workspace, order) as measurer:
        racing = Racing(workspace=workspace, limit=limit, measurer=measurer, order=order)
        alpha = union_share(limit.alpha * SINGLES_SHARE, len(candidates))
        found = racing.measure(candidates, alpha)
        return write_measurements(workspace, limit, {order: found})


def demotions(workspace: Workspace, limit: Limit) -> list[Changes]:
    """Returns one change for every group that can be demoted; BadInput where the disk cannot hold them."""
    found = workspace.layout_of_shapes.demotions(limit.demote)
    workspace.check_space(found)
    return found


def measure_for_budget(workspace: Workspace, session: Session) -> Curves:
    """Measures every role at every type, and layers apart where they differ; writes curves.json."""
    workspace.write_source()
    curves = measure_curves(workspace, session)
    workspace.artifacts.write(CURVES, curves)
    return curves


@contextmanager
def against_base(workspace: Workspace, order: tuple[int, ...]) -> Iterator[Measurer]:
    """Opens a measurer that compares every variant with the base's own predictions on the first chunks of an order."""
    if workspace.crew is not None:
        workspace.crew.make(workspace.shards.missing(NOTHING))
    with measuring(workspace, workspace.shards.variant(NOTHING), order[:_KLD_CHUNKS]) as measurer:
        yield measurer


@dataclass(frozen=True, kw_only=True)
class Racing:
    """Measures candidates against the limit, in one ``order`` of the chunks.

    With ``limit.chunks`` all get the same chunks; else each stops once its verdict is sure.
    """

    workspace: Workspace
    limit: Limit
    measurer: Measurer
    order: tuple[int, ...]

    def measure(
        self, candidates: Sequence[Changes], alpha: float, *, worth: float | None = None
    ) -> tuple[Measurement, ...]:
        """Returns what was found, each bound wrong with chance ``alpha`` whatever the way to stop.

        With ``worth``, in chunks, the candidates are combinations, which may be set aside without a verdict.
        """
        shards = self.workspace.shards
        settings = self._settings(alpha, self._looks(candidates, worth is not None), worth)
        with self.workspace.shards_ahead(candidates):
            (found,) = drive_together([race(candidates, settings)], self)
        return tuple(with_divergence(one, self.measurer, shards, self.order) for one in found)

    def want(self, who: int, asks: Sequence[ChunkAsk], likely: Sequence[ChunkAsk]) -> None:
        """Hears what the race wants next."""
        self.measurer.want(who, [self._wish(ask) for ask in asks], [self._wish(ask) for ask in likely])

    def ready(self, ask: ChunkAsk) -> bool:
        """Says whether an answer is known."""
        return self.measurer.has(self._wish(ask))

    def wait(self) -> None:
        """Returns once more is known."""
        self.measurer.wait()

    def _wish(self, ask: ChunkAsk) -> Wish:
        compared = tuple(chunk for chunk in ask.chunks if chunk in self._compared)
        return Wish(nll=ask.chunks, kld=compared, changes=ask.changes)

    def _settings(self, alpha: float, at: tuple[int, ...], worth: float | None) -> RaceSettings:
        return RaceSettings(
            order=self.order,
            looks=at,
            threshold=self.limit.threshold,
            rule=self._rule(alpha, at),
            scored_per_chunk=self.workspace.selection.scored_per_chunk,
            worth=None if self.limit.chunks else worth,
        )

    def _rule(self, alpha: float, at: tuple[int, ...]) -> Rule:
        """Without a divergence the wider bounds: on skewed differences the sharp ones are three times as often off."""
        population = len(self.order)
        if self._foretells or self.limit.chunks:
            return SpendingRule(alpha=alpha, population=population, looks=at)
        return StoppingRule(alpha=alpha, population=population)

    def _looks(self, candidates: Sequence[Changes], combinations: bool) -> tuple[int, ...]:
        """How many chunks are in at each look; what the data say has no part in it, as the rules want it."""
        population = len(self.order)
        if self.limit.chunks:
            return (min(self.limit.chunks, population),)
        swaps = self.workspace.can_swap(NOTHING, candidates)
        first = _FIRST_LOOK if swaps and self._foretells else _LATE_FIRST_LOOK
        growth = _GROWTH if swaps else _STEEP_GROWTH
        if combinations:
            first, growth = max(first, COMBINATION_FIRST_LOOK), COMBINATION_GROWTH if swaps else growth
        together = self.workspace.engine.chunks_together(self.workspace.selection.ctx)
        return looks(first, growth, min(self.limit.max_chunks or population, population), together)

    @property
    def _foretells(self) -> bool:
        """Whether variants are compared with the base on enough chunks to foretell the spread at the first look."""
        return len(self._compared) >= _FIRST_LOOK

    @property
    def _compared(self) -> frozenset[int]:
        """The chunks on which variants are compared with the base's predictions."""
        return self.measurer.cache.chunks if self.measurer.cache else frozenset()

    def answer(self, ask: ChunkAsk) -> ChunkScores:
        """Returns the scores, measured now where nobody has."""
        variant = self.workspace.shards.variant(ask.changes)
        nll_N = self.measurer.chunk_means(variant, ask.chunks)
        compared = [chunk for chunk in ask.chunks if chunk in self._compared]
        if not compared:
            return ChunkScores(nll_N=nll_N)
        known = dict(zip(compared, self.measurer.kld_means(variant, compared), strict=True))
        return ChunkScores(nll_N=nll_N, kld_N=np.array([known.get(chunk, np.nan) for chunk in ask.chunks]))


def write_measurements(
    workspace: Workspace, limit: Limit, by_order: Mapping[tuple[int, ...], Sequence[Measurement]]
) -> Measurements:
    """Writes measurements.json: what was found, in which order of the chunks, on what text, at how many tokens.

    Tokens are counted on which verdicts rest. What idle workers scored ahead of that is in the ledger and not here.
    """
    corpus = workspace.selection
    found = tuple(one for measurements in by_order.values() for one in measurements)
    read = [(order, _read(one)) for order, measurements in by_order.items() for one in measurements]
    of_base = {chunk for order, n in read for chunk in order[:n]}
    scored = len(of_base) + sum(n for _, n in read)
    content = Measurements(
        base=workspace.base.label,
        demote=limit.demote,
        threshold_pct=limit.max_increase_pct,
        indifference_pct=limit.indifference_pct,
        alpha=limit.alpha,
        text=corpus.name,
        text_sha256=corpus.sha256,
        ctx=corpus.ctx,
        seed=workspace.settings.seed,
        chunks_in_text=corpus.n_chunks,
        chunks_scored=scored,
        tokens_scored=scored * corpus.ctx,
        tokens_full=(1 + len(found)) * corpus.n_chunks * corpus.ctx,
        measurements=tuple(MeasurementRow.of_measurement(m, limit.threshold) for m in found),
    )
    workspace.artifacts.write(MEASUREMENTS, content)
    return content


def _read(found: Measurement) -> int:
    """How many chunks a measurement rests on; one that was read from a file says it by its interval."""
    return found.read or (found.delta.n if found.delta else 0)
