"""Groups -> measurements.json against a limit, or curves.json for a budget, through the ledger.

This file drives; what to ask is decided without I/O in ``race.py`` and ``probe.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from cerebellum.folder import CURVES, MEASUREMENTS
from cerebellum.measure.artifacts import Curves, MeasurementRow, Measurements
from cerebellum.measure.measurer import Measurer, measuring, with_divergence
from cerebellum.measure.probe import Session, measure_curves
from cerebellum.measure.race import ChunkAsk, RaceSettings, Vector, chunk_order, measure_fixed, race
from cerebellum.settings import Limit
from cerebellum.stats.sequential import StoppingRule, union_share
from cerebellum.verdicts import NOTHING, Changes, Measurement, drive
from cerebellum.workspace import Workspace

SINGLES_SHARE = 0.5
"""Of the chance to be wrong: what the groups alone may spend. Their combinations get the rest."""

_KLD_CHUNKS = 8  # the first block of a race: every variant measures these


def measure_against_limit(workspace: Workspace, limit: Limit) -> Measurements:
    """Measures every group alone at the demoted type, writes measurements.json and returns it."""
    workspace.write_source()
    candidates = demotions(workspace, limit)
    with against_base(workspace) as measurer:
        alpha = union_share(limit.alpha * SINGLES_SHARE, len(candidates))
        found = measure_until_sure(workspace, limit, measurer, candidates, alpha)
        return write_measurements(workspace, limit, found, measurer)


def demotions(workspace: Workspace, limit: Limit) -> list[Changes]:
    """Returns one change for every group that can be demoted; BadInput where the disk cannot hold them."""
    layout = workspace.layout
    found: list[Changes] = [
        {name: limit.demote} for name in layout.groups if layout.why_not(name, limit.demote) is None
    ]
    workspace.check_space(found)
    return found


def measure_for_budget(workspace: Workspace, session: Session) -> Curves:
    """Measures every role at every type, and layers apart where they differ; writes curves.json."""
    workspace.write_source()
    curves = measure_curves(workspace, session)
    workspace.artifacts.write(CURVES, curves)
    return curves


@contextmanager
def against_base(workspace: Workspace) -> Iterator[Measurer]:
    """Opens a measurer that compares every variant with the base's own predictions on a race's first block."""
    order = chunk_order(workspace.selection.n_chunks, workspace.settings.seed)
    with measuring(workspace, workspace.shards.variant(NOTHING), order[:_KLD_CHUNKS]) as measurer:
        yield measurer


def measure_until_sure(
    workspace: Workspace, limit: Limit, measurer: Measurer, candidates: Sequence[Changes], alpha: float
) -> tuple[Measurement, ...]:
    """Measures candidates until each verdict is sure at level ``alpha``, or on as many chunks as were asked for."""
    shards = workspace.shards
    population = workspace.selection.n_chunks
    order = chunk_order(population, workspace.settings.seed)

    def answer(ask: ChunkAsk) -> Vector:
        return measurer.chunk_means(shards.variant(ask.changes), ask.chunks)

    ahead = shards.made_ahead(candidates) if workspace.engine.on_gpu else nullcontext()
    if limit.chunks:
        asking = measure_fixed(candidates, order[: limit.chunks], population)
    else:
        settings = RaceSettings(
            order=order,
            max_chunks=min(limit.max_chunks or population, population),
            threshold=limit.threshold,
            rule=StoppingRule(alpha=alpha, population=population),
        )
        asking = race(candidates, settings)
    with ahead:
        found = drive(asking, answer)
    return tuple(with_divergence(measurement, measurer, shards) for measurement in found)


def write_measurements(
    workspace: Workspace, limit: Limit, found: Sequence[Measurement], measurer: Measurer
) -> Measurements:
    """Writes measurements.json: what was found, on what text, and how many tokens it took."""
    corpus = workspace.selection
    variants = [workspace.shards.variant(changes) for changes in (NOTHING, *(m.changes for m in found))]
    scored = sum(measurer.n_measured(variant) for variant in variants)
    content = Measurements(
        base=workspace.base.label,
        demote=limit.demote,
        threshold_pct=limit.max_increase_pct,
        indifference_pct=limit.indifference_pct,
        alpha=limit.alpha,
        text=corpus.path.name,
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
