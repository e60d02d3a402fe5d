"""The whole way through: source to verified file. Each step meets the next only in the run folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cerebellum.base import preset_base
from cerebellum.bench import Request, bench, candidate_from, llama_opener
from cerebellum.budget import Allocation, BudgetPlan, budget_json, budget_plan, frontier
from cerebellum.build import build, output_path
from cerebellum.curves import (
    PPL,
    Effort,
    Point,
    Score,
    Tried,
    candidates,
    effort,
    fine_candidates,
    measure_curves,
    measure_point,
    point_from_json,
)
from cerebellum.errors import BadInput
from cerebellum.fit import Card
from cerebellum.groups import make_groups
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.llama.prediction_cache import PredictionCache
from cerebellum.manifest import make_manifest
from cerebellum.measure import Measurer, drive, with_divergence
from cerebellum.plan import (
    Plan,
    Sizes,
    demotable,
    make_units,
    plan_from,
    plan_json,
    read_measurements,
    threshold_plan,
)
from cerebellum.questions.scores import Candidate
from cerebellum.recorded import MODEL, recorded_points
from cerebellum.shards import Variant
from cerebellum.sizes import parse_size
from cerebellum.source import Source, open_source
from cerebellum.stats.sequential import StoppingRule, union_share
from cerebellum.sweep import Changes, Measurement, RaceSettings, Sweep, chunk_order, measure_fixed, race
from cerebellum.verify import check_file, report, verify_json
from cerebellum.workspace import Settings, Workspace, read_json, write_json
from cerebellum.zoom import refined, zoom

_SINGLES_SHARE = 0.5  # of alpha goes to the groups alone, the rest to their combinations
_KLD_CHUNKS = 8  # the first block of a race: every variant measures these
_WHOLE_KLD_CHUNKS, _WHOLE_NLL_CHUNKS = 48, 96  # a plan as a whole: what ships deserves more than its parts


def run_all(workspace: Workspace, bench: Request | None = None) -> dict[str, Any]:
    """Every stage in order; what is finished already is read, not repeated."""
    with workspace.locked():
        workspace.check_texts()
        if workspace.settings.by_budget:
            curves_stage(workspace)
            budget_stage(workspace)
        else:
            measure_stage(workspace)
            plan_stage(workspace)
        build_stage(workspace)
        verify_stage(workspace)
        if bench is not None:
            bench_stage(workspace, bench)
        manifest = manifest_stage(workspace)
        card_stage(workspace.folder)
        return manifest


def measure_stage(workspace: Workspace) -> dict[str, Any]:
    """Every group alone at the demoted type -> measurements.json."""
    workspace.write_source()
    candidates = demotable(workspace.sizes, workspace.settings.demote)
    workspace.check_space(candidates)
    alpha = union_share(workspace.settings.alpha * _SINGLES_SHARE, len(candidates))
    with _measuring(workspace) as measurer:
        found = _sweep(workspace, measurer, candidates, alpha)
        return _write_measurements(workspace, found, measurer)


def plan_stage(workspace: Workspace) -> Plan:
    """Threshold planning, each combination measured whole -> plan.json."""
    known = read_measurements(workspace.path("measurements.json"))
    singles = tuple(m for m in known if len(m.changes) == 1)
    with _measuring(workspace) as measurer:
        plan, combinations = _plan_measuring(workspace, measurer, singles)
        joint = tuple(m for m in combinations if len(m.changes) > 1)
        _write_measurements(workspace, (*singles, *joint), measurer)
    write_json(workspace.path("plan.json"), plan_json(plan, workspace.sizes))
    return plan


def _plan_measuring(
    workspace: Workspace, measurer: Measurer, singles: tuple[Measurement, ...]
) -> tuple[Plan, list[Measurement]]:
    """Each combination the plan wants is measured; the k-th gets half the level of the one before."""
    settings = workspace.settings
    units = make_units(singles, workspace.sizes)
    planning = threshold_plan(units, settings.demote, settings.threshold)
    combinations: list[Measurement] = []
    alpha = settings.alpha * (1 - _SINGLES_SHARE)
    try:
        changes = next(planning)
        while True:
            alpha /= 2
            combinations += _sweep(workspace, measurer, [changes], alpha)
            changes = planning.send(combinations[-1])
    except StopIteration as stop:
        return stop.value, combinations


def _sweep(
    workspace: Workspace, measurer: Measurer, candidates: Sequence[Changes], alpha: float
) -> tuple[Measurement, ...]:
    """Sequential by default; the same chunks for all where ``--chunks`` says how many."""
    found = drive(_chosen_sweep(workspace, candidates, alpha), measurer, workspace.shards)
    return tuple(with_divergence(m, measurer, workspace.shards) for m in found)


def _chosen_sweep(
    workspace: Workspace, candidates: Sequence[Changes], alpha: float
) -> Sweep[tuple[Measurement, ...]]:
    settings, population = workspace.settings, workspace.selection.n_chunks
    order = chunk_order(population, settings.seed)
    if settings.chunks:
        return measure_fixed(candidates, order[: settings.chunks], population)
    return race(
        candidates,
        RaceSettings(
            order=order,
            max_chunks=min(settings.max_chunks or population, population),
            threshold=settings.threshold,
            rule=StoppingRule(alpha=alpha, population=population),
        ),
    )


def curves_stage(workspace: Workspace) -> dict[str, Any]:
    """Every role at every type of the ladder, against the source, and layers apart -> curves.json."""
    workspace.write_source()
    sizes, tried = workspace.sizes, candidates(workspace.sizes, workspace.settings.types)
    workspace.check_space(part.at(kind) for part, kind in tried)
    spent = _effort(workspace)
    with _scoring(workspace, spent.chunks) as scoring:
        points = measure_curves(sizes, tried, scoring.alone)
        points += zoom(points, sizes, partial(_alone, scoring), spent.probes)
    return _write_curves(workspace, points)


def _alone(scoring: _Scoring, tried: Tried) -> Point:
    return measure_point(tried, scoring.workspace.sizes, scoring.alone, scoring.alone({}))


def _effort(workspace: Workspace) -> Effort:
    """What the curves may cost, the source and the base counted in."""
    tried = candidates(workspace.sizes, workspace.settings.types)
    return effort(workspace.settings.curve_passes, len(tried) + 2, workspace.selection.n_chunks)


def _write_curves(workspace: Workspace, points: Sequence[Point]) -> dict[str, Any]:
    corpus = workspace.selection
    chunks = max((point.kld.n for point in points if point.kld), default=0)
    variants = 2 + sum(point.kind != "base" for point in points)  # the source and the base too
    content = {
        "base": workspace.base.label,
        "text": corpus.path.name,
        "text_sha256": corpus.sha256,
        "ctx": corpus.ctx,
        "seed": workspace.settings.seed,
        "chunks": chunks,
        "tokens_scored": chunks * variants * corpus.ctx,
        "passes": chunks * variants / corpus.n_chunks,
        "points": [point.as_json() for point in points],
        "parts": [point.as_json() for point in refined(points, workspace.sizes)],
    }
    write_json(workspace.path("curves.json"), content)
    return content


def budget_stage(workspace: Workspace) -> dict[str, Any]:
    """The knapsack's proposals, each measured whole; the best measured one -> plan.json."""
    points, target = read_points(workspace), _target(workspace)
    budget = target.file_bytes()
    spent, objective = _effort(workspace), workspace.settings.objective
    with _scoring(workspace, spent.chunks) as scoring:
        points = _with_fine_types(workspace, points, budget, scoring, spent.fine)
        planning = budget_plan(points, workspace.sizes, budget, objective)
        try:
            changes = next(planning)
            while True:
                changes = planning.send((scoring.whole(changes), scoring.whole({})))
        except StopIteration as stop:
            planned = _budget_json(stop.value, target)
    _write_curves(workspace, points)
    write_json(workspace.path("plan.json"), planned)
    return planned


def _with_fine_types(
    workspace: Workspace, points: tuple[Point, ...], budget: int, scoring: _Scoring, most: int
) -> tuple[Point, ...]:
    """The curves with the IQ types that the plan for this budget could want, ``most`` of them."""
    sizes = workspace.sizes
    found = Allocation(refined(points, sizes), sizes, workspace.settings.objective).best(budget)
    if found is None or not workspace.settings.fine_types:
        return points
    tried = fine_candidates(points, found.points, sizes)[:most]
    return (*points, *(_alone(scoring, pair) for pair in tried))


def rebudget(workspace: Workspace) -> dict[str, Any]:
    """A plan for another budget from curves.json alone: no model is loaded, nothing is measured."""
    return _unmeasured(read_points(workspace), _target(workspace), workspace.settings.objective)


def _unmeasured(points: Sequence[Point], target: _Target, objective: str) -> dict[str, Any]:
    """What the curves alone propose, as plan.json has it."""
    planning = budget_plan(points, target.sizes, target.file_bytes(), objective)
    try:
        next(planning)
        planning.send(None)
    except StopIteration as stop:
        return _budget_json(stop.value, target)
    raise AssertionError("a plan without measurements asks once")


def _budget_json(plan: BudgetPlan, target: _Target) -> dict[str, Any]:
    """plan.json, with the memory it takes where a card was given."""
    memory = {"memory": target.card.plan_json(plan.chosen.changes)} if target.card else {}
    return budget_json(plan, target.sizes) | memory


def frontier_of(workspace: Workspace) -> list[dict[str, Any]]:
    """Size and predicted damage of the best plans, from the smallest file to the largest."""
    found = frontier(read_points(workspace), workspace.sizes, objective=workspace.settings.objective)
    return [{"file_bytes": c.n_bytes, "predicted": c.predicted, "changes": dict(c.changes)} for c in found]


def read_points(workspace: Workspace) -> tuple[Point, ...]:
    """curves.json, which ``run --budget`` makes."""
    return tuple(point_from_json(row) for row in read_json(workspace.path("curves.json"))["points"])


@dataclass(frozen=True)
class _Target:
    """What was asked for: a size, a preset's own size for this model, or a card."""

    settings: Settings
    source: Source
    sizes: Sizes
    matrix: ImportanceMatrix | None = None

    def file_bytes(self) -> int:
        """The budget as bytes of the file."""
        if self.card is not None:
            return self.card.file_bytes()
        asked = self.settings.budget or self.sizes.base.label
        try:
            return parse_size(asked)
        except ValueError:
            preset = preset_base(self.source, asked, self.matrix, has_imatrix=True)
            return replace(self.sizes, base=preset).whole_file_bytes()

    @cached_property
    def card(self) -> Card | None:
        """llama.cpp is asked once what it would allocate."""
        if self.settings.fit is None:
            return None
        return Card(self.source, self.sizes, _size(self.settings.fit), self.settings.fit_ctx)


def _size(asked: str) -> int:
    try:
        return parse_size(asked)
    except ValueError as error:
        raise BadInput(f"--fit: {error}") from error


def _target(workspace: Workspace) -> _Target:
    return _Target(workspace.settings, workspace.source, workspace.sizes, workspace.matrix)


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """Scores variants on the first chunks of the seeded order, against the source's own predictions.

    A part alone on ``few`` chunks; a whole plan on more, since it is what ships.
    """

    workspace: Workspace
    measurer: Measurer
    few: tuple[int, ...]
    many: tuple[int, ...]

    def alone(self, changes: Changes) -> Score:
        return self._score(changes, self.few, self.few)

    def whole(self, changes: Changes) -> Score:
        kept = len(self.measurer.cache.chunks) if self.measurer.cache else 0
        return self._score(changes, self.many, self.many[:kept])

    def _score(self, changes: Changes, for_nll: tuple[int, ...], for_kld: tuple[int, ...]) -> Score:
        variant = self.workspace.shards.variant(changes)
        kld = self.measurer.kld_means(variant, for_kld)
        return Score(nll=self.measurer.chunk_means(variant, for_nll), kld=kld)


@contextmanager
def _scoring(workspace: Workspace, n_chunks: int) -> Iterator[_Scoring]:
    """Opens what scoring needs; the source's predictions are kept on disk meanwhile."""
    corpus = workspace.selection
    order = chunk_order(corpus.n_chunks, workspace.settings.seed)
    kept = order[: max(n_chunks, _WHOLE_KLD_CHUNKS)]
    with _measuring(workspace, workspace.source_variant, kept) as measurer:
        n_kept = len(measurer.cache.chunks) if measurer.cache else 0
        if n_kept < 2:
            raise BadInput("--kld-cache: too small for the predictions of two chunks; give it more")
        measurer.nll(workspace.source_variant, kept[:n_kept])
        few, many = kept[: min(n_chunks, n_kept)], order[: max(n_chunks, _WHOLE_NLL_CHUNKS)]
        yield _Scoring(workspace=workspace, measurer=measurer, few=few, many=many)


def replan(workspace: Workspace, measurements: Path) -> dict[str, Any]:
    """A plan from measurements alone, no model loaded; a combination nobody measured stays open."""
    settings = workspace.settings
    plan = plan_from(read_measurements(measurements), workspace.sizes, settings.demote, settings.threshold)
    return plan_json(plan, workspace.sizes)


def plan_header(settings: Settings, measurements: Path) -> dict[str, Any]:
    """A plan for a GGUF of which only the header is looked at, from measurements made elsewhere."""
    source = open_source(settings.source, allow_requantize=True)
    base = preset_base(source, settings.base, None, has_imatrix=True)
    groups = {group.name: group for group in make_groups(source) if not group.protected}
    sizes = Sizes(tensors=source.tensors, groups=groups, base=base)
    found = read_measurements(measurements)
    if not settings.by_budget:
        return plan_json(plan_from(found, sizes, settings.demote, settings.threshold), sizes)
    target = _Target(settings, source, sizes)
    return _unmeasured(recorded_points(found, sizes), target, PPL) | {"model": MODEL}


def build_stage(workspace: Workspace) -> Path:
    """plan.json -> the GGUF."""
    out = output_path(workspace.folder, workspace.source, workspace.base)
    changes = planned_changes(workspace)
    build(workspace.source, workspace.base, workspace.shards, changes, out)
    return out


def verify_stage(workspace: Workspace) -> dict[str, Any]:
    """The finished file, read again and measured on the report text -> verify.json."""
    out = output_path(workspace.folder, workspace.source, workspace.base)
    if not out.exists():
        raise BadInput(f"{out}: not there; run `cerebellum build {workspace.folder}` first")
    changes = planned_changes(workspace)
    checks = check_file(
        out, read_json(workspace.path("plan.json")), workspace.base, workspace.shards, changes
    )
    corpus = workspace.report_corpus
    wanted = workspace.settings.report_chunks or corpus.n_chunks
    with_text = Measurer(workspace.engine, workspace.ledger, corpus, workspace.reporter)
    try:
        found = report(
            with_text,
            workspace.source_variant,
            workspace.shards.variant({}),
            out,
            wanted,
            workspace.selection.sha256,
        )
    finally:
        with_text.close()
    result = verify_json(checks, found)
    write_json(workspace.path("verify.json"), result)
    return result


def bench_stage(workspace: Workspace, request: Request) -> dict[str, Any]:
    """The finished file against its base on the same questions -> bench.json and bench/."""
    result = candidate_from(output_path(workspace.folder, workspace.source, workspace.base))
    variant = workspace.shards.variant({})
    base = Candidate(name=workspace.base.label, paths=tuple(variant.paths), sha256=variant.digest)
    opener = llama_opener(workspace.engine.settings)
    found = bench((result, base), request, opener, workspace.path("bench"), workspace.reporter)
    write_json(workspace.path("bench.json"), found)
    return found


def manifest_stage(workspace: Workspace) -> dict[str, Any]:
    """What made what: hashes, builds, settings, seed -> manifest.json."""
    return make_manifest(workspace, planned_changes(workspace))


def card_stage(folder: Path, repo: str | None = None) -> tuple[Path, ...]:
    """The artifacts -> README.md, report.html and charts."""
    from cerebellum.card import make_card  # matplotlib takes a second to load, and only this needs it

    return make_card(folder, repo)


def planned_changes(workspace: Workspace) -> dict[str, str]:
    """The groups that plan.json changes, with their types."""
    rows = read_json(workspace.path("plan.json"))["groups"]
    changed = [row for row in rows if row["chosen_type"] != "base"]
    return {name: row["chosen_type"] for row in changed for name in row.get("members") or [row["name"]]}


@contextmanager
def _measuring(
    workspace: Workspace, reference: Variant | None = None, order: Sequence[int] | None = None
) -> Iterator[Measurer]:
    """A measurer on the selection text; predictions of the reference (the base, or the source) for the
    first chunks of ``order`` are kept on disk while it is open."""
    corpus, settings = workspace.selection, workspace.settings
    if order is None:
        order = chunk_order(corpus.n_chunks, settings.seed)[:_KLD_CHUNKS]
    vocab_size = workspace.engine.vocab_size(workspace.source.path)
    reference = reference or workspace.shards.variant({})
    cache = PredictionCache(
        workspace.path("predictions"),
        order,
        corpus.scored_per_chunk * vocab_size * 4,
        settings.kld_cache_bytes,
    )
    kept = f"{len(cache.chunks)} chunks, {cache.n_bytes / 1e6:.0f} MB on disk meanwhile"
    workspace.reporter.note(f"keeping the predictions of the {reference.label}: {kept}")
    measurer = Measurer(
        workspace.engine,
        workspace.ledger,
        corpus,
        workspace.reporter,
        reference=reference,
        cache=cache,
    )
    try:
        yield measurer
    finally:
        measurer.close()
        cache.remove()


def _write_measurements(
    workspace: Workspace, found: tuple[Measurement, ...], measurer: Measurer
) -> dict[str, Any]:
    settings, corpus = workspace.settings, workspace.selection
    variants = [workspace.shards.variant(changes) for changes in ({}, *(m.changes for m in found))]
    scored = sum(measurer.n_measured(variant) for variant in variants)
    content = {
        "base": workspace.base.label,
        "demote": settings.demote,
        "threshold_pct": settings.max_increase_pct,
        "indifference_pct": settings.indifference_pct,
        "alpha": settings.alpha,
        "text": corpus.path.name,
        "text_sha256": corpus.sha256,
        "ctx": corpus.ctx,
        "seed": settings.seed,
        "chunks_in_text": corpus.n_chunks,
        "chunks_scored": scored,
        "tokens_scored": scored * corpus.ctx,
        "tokens_full": (1 + len(found)) * corpus.n_chunks * corpus.ctx,
        "measurements": [m.as_json(settings.threshold) for m in found],
    }
    write_json(workspace.path("measurements.json"), content)
    return content | {"measured": measurer.measured, "reused": measurer.reused}
