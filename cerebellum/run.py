"""The whole way through: source to verified file. Each step meets the next only in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cerebellum.base import preset_base
from cerebellum.bench.scores import Candidate
from cerebellum.bench.stage import Request, bench, candidate_from, llama_opener
from cerebellum.build import build, output_path
from cerebellum.errors import BadInput
from cerebellum.groups import make_groups
from cerebellum.manifest import make_manifest
from cerebellum.measure.measurer import Measurer, drive, measuring, with_divergence
from cerebellum.measure.race import (
    Changes,
    Measurement,
    RaceSettings,
    Sweep,
    chunk_order,
    measure_fixed,
    race,
)
from cerebellum.plan import by_budget
from cerebellum.plan.limit import (
    Plan,
    Sizes,
    demotable,
    make_units,
    plan_from,
    plan_json,
    read_measurements,
    threshold_plan,
)
from cerebellum.source import open_source
from cerebellum.stats.sequential import StoppingRule, union_share
from cerebellum.verify import check_file, report, verify_json
from cerebellum.workspace import Settings, Workspace, read_json, write_json

_SINGLES_SHARE = 0.5  # of alpha goes to the groups alone, the rest to their combinations
_KLD_CHUNKS = 8  # the first block of a race: every variant measures these


def run_all(workspace: Workspace, bench: Request | None = None) -> dict[str, Any]:
    """Every stage in order; what is finished already is read, not repeated."""
    with workspace.locked():
        workspace.check_texts()
        if workspace.settings.by_budget:
            by_budget.run(workspace)
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
    with _against_base(workspace) as measurer:
        found = _sweep(workspace, measurer, candidates, alpha)
        return _write_measurements(workspace, found, measurer)


def plan_stage(workspace: Workspace) -> Plan:
    """Threshold planning, each combination measured whole -> plan.json."""
    known = read_measurements(workspace.path("measurements.json"))
    singles = tuple(m for m in known if len(m.changes) == 1)
    with _against_base(workspace) as measurer:
        plan, combinations = _planmeasuring(workspace, measurer, singles)
        joint = tuple(m for m in combinations if len(m.changes) > 1)
        _write_measurements(workspace, (*singles, *joint), measurer)
    write_json(workspace.path("plan.json"), plan_json(plan, workspace.sizes))
    return plan


def _planmeasuring(
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


def _against_base(workspace: Workspace) -> AbstractContextManager[Measurer]:
    """Every variant is compared with the base's own predictions on the first block of a race."""
    order = chunk_order(workspace.selection.n_chunks, workspace.settings.seed)
    return measuring(workspace, workspace.shards.variant({}), order[:_KLD_CHUNKS])


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


def replan(workspace: Workspace, measurements: Path) -> dict[str, Any]:
    """A plan from measurements alone, no model loaded; a combination nobody measured stays open."""
    settings = workspace.settings
    plan = plan_from(read_measurements(measurements), workspace.sizes, settings.demote, settings.threshold)
    return plan_json(plan, workspace.sizes)


def plan_header(settings: Settings, measurements: Path) -> dict[str, Any]:
    """A plan for a GGUF of which only the header is looked at, from measurements made elsewhere."""
    source = open_source(settings.source, allow_requantize=True)
    base = preset_base(source, settings.base, None, has_imatrix=True)
    sizes = Sizes.of(source, make_groups(source), base)
    found = read_measurements(measurements)
    if settings.by_budget:
        return by_budget.plan_header(settings, found, source, sizes)
    return plan_json(plan_from(found, sizes, settings.demote, settings.threshold), sizes)


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
    from cerebellum.card.stage import make_card  # matplotlib takes a second to load, and only this needs it

    return make_card(folder, repo)


def planned_changes(workspace: Workspace) -> dict[str, str]:
    """The groups that plan.json changes, with their types."""
    rows = read_json(workspace.path("plan.json"))["groups"]
    changed = [row for row in rows if row["chosen_type"] != "base"]
    return {name: row["chosen_type"] for row in changed for name in row.get("members") or [row["name"]]}


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
