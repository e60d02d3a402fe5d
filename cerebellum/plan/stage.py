"""Measurements or curves -> plan.json: what to ship. Combinations are measured whole before they ship."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from cerebellum import files
from cerebellum.base import preset_base
from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput
from cerebellum.folder import BENCH, MEASUREMENTS, PLAN, SIZES, VERIFY, RunFolder, SizeRow, Sizes
from cerebellum.groups import make_groups
from cerebellum.layout import Layout
from cerebellum.measure.artifacts import Curves, read_recorded
from cerebellum.measure.probe import Session
from cerebellum.measure.race import chunk_order, fresh_order
from cerebellum.measure.stage import SINGLES_SHARE, Racing, against_base, write_measurements
from cerebellum.plan.artifacts import BudgetPlan, LimitPlan, Plan
from cerebellum.plan.budget import plan_budget, plan_unmeasured
from cerebellum.plan.labels import Sized, sized
from cerebellum.plan.limit import Trial, limit_plan, make_units, plan_from, threshold_plan
from cerebellum.plan.recorded import plan_recorded
from cerebellum.plan.target import Target, target_of
from cerebellum.settings import Budget, Limit, Settings
from cerebellum.source import Source, open_source
from cerebellum.stats.sequential import combination_share
from cerebellum.verdicts import Measurement, drive
from cerebellum.workspace import Workspace

P = TypeVar("P", bound=Plan)


def plan_against_limit(workspace: Workspace, limit: Limit) -> LimitPlan:
    """Plans by the limit, measures each combination that it wants whole, and writes plan.json.

    Combinations are read in an order of their own, for the groups' noise chose them. The k-th may be wrong with
    1/(k(k+1)) of their share of the level, so that all of them together spend no more. One that is not worth the chunks
    that it would take yet is set aside for the next: to prove it over the limit would protect nothing that ships.
    """
    known = read_recorded(workspace.path(MEASUREMENTS))
    singles = tuple(m for m in known if len(m.changes) == 1)
    corpus = workspace.selection
    together = workspace.engine.chunks_together(corpus.ctx)
    order = fresh_order(corpus.n_chunks, workspace.settings.seed, together)
    combinations: list[Measurement] = []
    with against_base(workspace, order) as measurer:
        racing = Racing(workspace=workspace, limit=limit, measurer=measurer, order=order)

        def measured(trial: Trial) -> Measurement:
            alpha = combination_share(limit.alpha * (1 - SINGLES_SHARE), len(combinations) + 1)
            combinations.extend(racing.measure([trial.changes], alpha, worth=trial.worth))
            return combinations[-1]

        chosen = drive(threshold_plan(make_units(singles, workspace.layout), limit.threshold), measured)
        of_groups = chunk_order(corpus.n_chunks, workspace.settings.seed)
        write_measurements(workspace, limit, {of_groups: singles, order: combinations})
    return written(workspace, limit_plan(chosen, workspace.layout, limit))


def plan_for_budget(
    workspace: Workspace, budget: Budget, curves: Curves, session: Session
) -> tuple[BudgetPlan, ...]:
    """Proposes plans within each size of the budget, measures each whole, and writes the best measured of each."""
    return _planned(workspace, budget, lambda target: plan_budget(curves, session, target))


def sizes_of(workspace: Workspace, budget: Budget) -> tuple[Sized, ...]:
    """Returns the sizes of the budget on this model, with their labels; shapes alone decide them."""
    layout = Layout.of(workspace.source, workspace.groups, workspace.base_without_matrix)
    return sized(budget, workspace.engine, workspace.source, layout)


def replan_limit(workspace: Workspace, limit: Limit, measurements: Path | None = None) -> LimitPlan:
    """Plans from the folder's measurements, or from others, and writes plan.json; loads no model.

    A combination that nobody measured stays unmeasured.
    """
    found = read_recorded(measurements or workspace.path(MEASUREMENTS))
    layout = workspace.layout
    workspace.write_groups()
    return written(workspace, limit_plan(plan_from(found, layout, limit), layout, limit))


def replan_budget(
    workspace: Workspace, budget: Budget, measurements: Path | None = None
) -> tuple[BudgetPlan, ...]:
    """Plans every size from the folder's curves and writes the plans; loads no model, and measures nothing whole."""
    if measurements is not None:
        raise BadInput("--measurements: a folder plans a budget from its curves.json; leave it out")
    curves = workspace.artifacts.curves()
    layout = workspace.layout

    def plan(target: Target) -> BudgetPlan:
        return plan_unmeasured(curves, layout, target, budget.objective)

    plans = _planned(workspace, budget, plan)
    workspace.write_groups()
    return plans


def _planned(
    workspace: Workspace, budget: Budget, plan: Callable[[Target], BudgetPlan]
) -> tuple[BudgetPlan, ...]:
    """Plans every size, then writes all plans with sizes.json; where one cannot be planned none is written."""
    sizes = sizes_of(workspace, budget)
    made = [_plan_one(workspace, one, plan, several=len(sizes) > 1) for one in sizes]
    views = [RunFolder(workspace.folder, one.label if number else None) for number, one in enumerate(sizes)]
    for view, each in zip(views, made, strict=True):
        view.write(PLAN, each)
    if len(sizes) == 1:
        _forget_sizes(workspace)
    else:
        rows = (_size_row(*each) for each in zip(sizes, made, views, strict=True))
        workspace.artifacts.write(SIZES, Sizes(sizes=tuple(rows)))
    return tuple(made)


def _plan_one(
    workspace: Workspace, one: Sized, plan: Callable[[Target], BudgetPlan], several: bool
) -> BudgetPlan:
    """Plans one size; of several it says what each took, beside the curves that all of them share."""
    begun = time.monotonic()
    target = target_of(
        one.asked, workspace.engine, workspace.source, workspace.layout, workspace.matrix
    ).split_above(workspace.settings.split_above_bytes)
    found = plan(target)
    if several:
        workspace.reporter.note(
            f"{one.label}: planned in {time.monotonic() - begun:.1f} s from the shared curves"
        )
    return msgspec.structs.replace(found, label=one.label, imatrix_sha256=workspace.matrix.sha256)


def _size_row(one: Sized, plan: BudgetPlan, view: RunFolder) -> SizeRow:
    return SizeRow(
        label=one.label,
        asked=one.asked,
        budget_bytes=plan.budget_bytes,
        plan=view.place(PLAN),
        verify=view.place(VERIFY),
        bench=view.place(BENCH),
    )


def _forget_sizes(workspace: Workspace) -> None:
    """Removes the list of sizes that an earlier run of the folder left, for now there is a single plan."""
    if workspace.path(SIZES).exists():
        files.DISK.unlink(workspace.path(SIZES))


def written(workspace: Workspace, plan: P) -> P:
    """Writes the one plan of a run as plan.json, with the matrix that it rests on, and returns it."""
    resting: P = msgspec.structs.replace(plan, imatrix_sha256=workspace.matrix.sha256)
    workspace.artifacts.write(PLAN, resting)
    _forget_sizes(workspace)
    return resting


def header_layout(settings: Settings, engine: Engine) -> tuple[Source, Layout]:
    """Opens a GGUF of which only the header is looked at, and returns it with its layout by roles."""
    source = open_source(settings.source, allow_requantize=True)
    base = preset_base(engine, source, settings.base, None)
    return source, Layout.of(source, make_groups(source), base)


def limit_header(settings: Settings, limit: Limit, engine: Engine, measurements: Path) -> LimitPlan:
    """Plans for a header from measurements made elsewhere."""
    _, layout = header_layout(settings, engine)
    return limit_plan(plan_from(read_recorded(measurements), layout, limit), layout, limit)


def budget_header(
    settings: Settings, budget: Budget, engine: Engine, measurements: Path
) -> tuple[BudgetPlan, ...]:
    """Plans each size for a header from measurements made elsewhere, and a stated model where they say nothing."""
    source, layout = header_layout(settings, engine)
    recorded = read_recorded(measurements)
    return tuple(
        msgspec.structs.replace(plan_recorded(recorded, layout, one.target), label=one.label)
        for one in sized(budget, engine, source, layout)
    )
