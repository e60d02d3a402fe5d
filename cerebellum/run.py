"""The whole way through: source to verified file. Each step meets the next only in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cerebellum.base import preset_base
from cerebellum.build import build, output_path
from cerebellum.errors import BadInput
from cerebellum.groups import make_groups
from cerebellum.manifest import make_manifest
from cerebellum.measure import (
    Measurement,
    Measurer,
    chunk_order,
    drive,
    measure_change,
    measure_each,
)
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
from cerebellum.source import open_source
from cerebellum.stats.paired import as_nats
from cerebellum.verify import check_file, report, verify_json
from cerebellum.workspace import Settings, Workspace, read_json, write_json

Outcome = TypeVar("Outcome")


def run_all(workspace: Workspace) -> dict[str, Any]:
    """Every stage in order; what is finished already is read, not repeated."""
    with workspace.locked():
        measure_stage(workspace)
        plan_stage(workspace)
        build_stage(workspace)
        verify_stage(workspace)
        manifest = manifest_stage(workspace)
        card_stage(workspace.folder)
        return manifest


def measure_stage(workspace: Workspace) -> dict[str, Any]:
    """Every group alone at the demoted type -> measurements.json."""
    workspace.write_source()
    workspace.check_space()
    chunks = _chunks(workspace)
    candidates = demotable(workspace.sizes, workspace.settings.demote)
    sweep = measure_each(candidates, chunks, workspace.selection.n_chunks)
    found, counts = _with_measurer(workspace, lambda m: drive(sweep, m, workspace.shards))
    return _write_measurements(workspace, found, counts)


def plan_stage(workspace: Workspace) -> Plan:
    """Threshold planning, each combination measured whole -> plan.json."""
    settings, sizes = workspace.settings, workspace.sizes
    known = read_measurements(workspace.path("measurements.json"))
    singles = tuple(m for m in known if len(m.changes) == 1)
    planning = threshold_plan(make_units(singles, sizes), settings.demote, settings.max_increase_pct)
    combinations: list[Measurement] = []

    def complete(measurer: Measurer) -> Plan:
        try:
            changes = next(planning)
            while True:
                sweep = measure_change(changes, _chunks(workspace), workspace.selection.n_chunks)
                combinations.append(drive(sweep, measurer, workspace.shards))
                changes = planning.send(combinations[-1])
        except StopIteration as stop:
            plan: Plan = stop.value
            return plan

    plan, counts = _with_measurer(workspace, complete)
    joint = tuple(m for m in combinations if len(m.changes) > 1)
    _write_measurements(workspace, (*singles, *joint), counts)
    write_json(workspace.path("plan.json"), plan_json(plan, sizes))
    return plan


def replan(workspace: Workspace, measurements: Path) -> dict[str, Any]:
    """A plan from measurements alone, no model loaded; a combination nobody measured stays open."""
    settings = workspace.settings
    plan = plan_from(
        read_measurements(measurements), workspace.sizes, settings.demote, settings.max_increase_pct
    )
    return plan_json(plan, workspace.sizes)


def plan_header(settings: Settings, measurements: Path) -> dict[str, Any]:
    """A plan for a GGUF of which only the header is looked at, from measurements made elsewhere."""
    source = open_source(settings.source, allow_requantize=True)
    base = preset_base(source, settings.base, None, has_imatrix=True)
    groups = {group.name: group for group in make_groups(source) if not group.protected}
    sizes = Sizes(tensors=source.tensors, groups=groups, base=base)
    found = read_measurements(measurements)
    return plan_json(plan_from(found, sizes, settings.demote, settings.max_increase_pct), sizes)


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
    source_files = [file.path for file in workspace.source.files]
    with_text = Measurer(workspace.engine, workspace.ledger, corpus, workspace.reporter)
    try:
        found = report(
            with_text, source_files, workspace.shards.variant({}), out, wanted, workspace.selection.sha256
        )
    finally:
        with_text.close()
    result = verify_json(checks, found)
    write_json(workspace.path("verify.json"), result)
    return result


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
    return {row["name"]: row["chosen_type"] for row in rows if row["chosen_type"] != "base"}


def _chunks(workspace: Workspace) -> tuple[int, ...]:
    n_chunks = workspace.selection.n_chunks
    return chunk_order(n_chunks, workspace.settings.seed)[: workspace.settings.chunks or n_chunks]


def _with_measurer(
    workspace: Workspace, work: Callable[[Measurer], Outcome]
) -> tuple[Outcome, dict[str, int]]:
    measurer = Measurer(workspace.engine, workspace.ledger, workspace.selection, workspace.reporter)
    try:
        return work(measurer), {"measured": measurer.measured, "reused": measurer.reused}
    finally:
        measurer.close()


def _write_measurements(
    workspace: Workspace, found: tuple[Measurement, ...], counts: dict[str, int]
) -> dict[str, Any]:
    settings, corpus = workspace.settings, workspace.selection
    limit = as_nats(settings.max_increase_pct)
    content = {
        "base": workspace.base.label,
        "demote": settings.demote,
        "threshold_pct": settings.max_increase_pct,
        "text": corpus.path.name,
        "text_sha256": corpus.sha256,
        "ctx": corpus.ctx,
        "seed": settings.seed,
        "chunks_in_text": corpus.n_chunks,
        "measurements": [m.as_json(limit) for m in found],
    }
    write_json(workspace.path("measurements.json"), content)
    return content | counts
