"""The whole way through, one line a stage. Each stage meets the next only in the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cerebellum.bench.artifacts import BenchResults
from cerebellum.bench.scores import Examinee
from cerebellum.bench.stage import BenchRequest, bench, examinee_from
from cerebellum.build import build, output_path
from cerebellum.engine.protocols import Engine
from cerebellum.engine.timetable import time_table
from cerebellum.engine.timings import collecting, timed
from cerebellum.errors import BadInput
from cerebellum.files import is_one_of
from cerebellum.folder import BENCH, PLAN, VERIFY
from cerebellum.manifest import Manifest, make_manifest
from cerebellum.measure.artifacts import Curves, Measurements
from cerebellum.measure.measurer import Measurer
from cerebellum.measure.probe import open_session
from cerebellum.measure.stage import measure_against_limit, measure_for_budget
from cerebellum.plan.artifacts import AnyPlan, BudgetPlan, LimitPlan
from cerebellum.plan.budget import check_reachable
from cerebellum.plan.stage import (
    budget_header,
    limit_header,
    plan_against_limit,
    plan_for_budget,
    replan_budget,
    replan_limit,
)
from cerebellum.settings import Budget, Goal, Limit, Settings
from cerebellum.units import size
from cerebellum.verdicts import NOTHING
from cerebellum.verify import Verified, check_file, report, verified
from cerebellum.workspace import Workspace


class Way(Protocol):
    """What differs between the goals: how it is checked, measured and planned. All else is one program."""

    def check(self, workspace: Workspace) -> None:
        """Raises before any work where the goal cannot be reached."""
        ...

    def measure(self, workspace: Workspace) -> Measurements | Curves:
        """Measures, and writes measurements.json or curves.json."""
        ...

    def measure_and_plan(self, workspace: Workspace) -> None:
        """Measures and plans in one go, and writes plan.json too."""
        ...

    def replan(self, workspace: Workspace, measurements: Path | None) -> AnyPlan:
        """Plans from what the folder holds; loads no model."""
        ...

    def plan_header(self, settings: Settings, engine: Engine, measurements: Path) -> AnyPlan:
        """Plans for a GGUF of which only the header is looked at, from measurements made elsewhere."""
        ...


@dataclass(frozen=True)
class LimitWay:
    """Demotes what a limit on damage allows."""

    limit: Limit

    def check(self, workspace: Workspace) -> None:
        """Finds nothing to refuse: a limit that no group keeps leaves the base as it is."""

    def measure(self, workspace: Workspace) -> Measurements:
        """Measures every group alone."""
        return measure_against_limit(workspace, self.limit)

    def measure_and_plan(self, workspace: Workspace) -> None:
        """Measures every group alone, then the combinations that the plan wants."""
        self.measure(workspace)
        plan_against_limit(workspace, self.limit)

    def replan(self, workspace: Workspace, measurements: Path | None) -> LimitPlan:
        """Plans from measurements alone."""
        return replan_limit(workspace, self.limit, measurements)

    def plan_header(self, settings: Settings, engine: Engine, measurements: Path) -> LimitPlan:
        """Plans from shapes and recorded measurements."""
        return limit_header(settings, self.limit, engine, measurements)


@dataclass(frozen=True)
class BudgetWay:
    """Spends the bytes of a size where the measurement says that they matter."""

    budget: Budget

    def check(self, workspace: Workspace) -> None:
        """Raises AnswerIsNo where no file can be as small as the budget."""
        check_reachable(workspace, self.budget)

    def measure(self, workspace: Workspace) -> Curves:
        """Measures every role at every type, and layers apart."""
        with open_session(workspace, self.budget) as session:
            return measure_for_budget(workspace, session)

    def measure_and_plan(self, workspace: Workspace) -> None:
        """Does both in one session, so that the source's predictions are made once."""
        with open_session(workspace, self.budget) as session:
            plan_for_budget(workspace, self.budget, measure_for_budget(workspace, session), session)

    def replan(self, workspace: Workspace, measurements: Path | None) -> BudgetPlan:
        """Plans from curves alone."""
        return replan_budget(workspace, self.budget, measurements)

    def plan_header(self, settings: Settings, engine: Engine, measurements: Path) -> BudgetPlan:
        """Plans from shapes, recorded measurements and a stated model."""
        return budget_header(settings, self.budget, engine, measurements)


def way_of(goal: Goal) -> Way:
    """Returns the way to a goal: the one place where the program asks which goal it has."""
    match goal:
        case Limit():
            return LimitWay(goal)
        case Budget():
            return BudgetWay(goal)


def run_all(workspace: Workspace, request: BenchRequest | None = None) -> Manifest:
    """Runs every stage in order; what is finished already is read, not repeated."""
    way = way_of(workspace.settings.goal)
    with workspace.locked():
        with collecting() as timings:
            check(workspace, way)
            way.measure_and_plan(workspace)
            build_stage(workspace)
            verify_stage(workspace)
            if request is not None:
                bench_stage(workspace, request)
        manifest = make_manifest(workspace, time_table(timings))
        drop_shards(workspace)
        _card_if_possible(workspace)
        return manifest


def drop_shards(workspace: Workspace) -> None:
    """Removes the shards that only measuring needed, unless they are to be kept.

    The ledger knows what they held. A plan made later that ships one of them makes it again from the source.
    """
    if workspace.settings.keep_shards:
        return
    freed = workspace.shards.remove_all_but([NOTHING, workspace.artifacts.plan().changes])
    if freed:
        workspace.reporter.note(
            f"shards that nothing needs any more were removed: {size(freed)} (--keep-shards keeps them)"
        )


def _card_if_possible(workspace: Workspace) -> None:
    """Makes the card; a failure is told and no more, for the file is verified and needs no card to be used."""
    try:
        card_stage(workspace.folder)
    except Exception as error:
        workspace.reporter.note(
            f"the card could not be made ({type(error).__name__}: {error}); the file is finished and verified: "
            f"`cerebellum card {workspace.folder}` makes the card alone"
        )


def rehearse(workspace: Workspace) -> None:
    """Makes manifest, card and report of made-up results, so that they cannot fail when all is measured."""
    from cerebellum.card.rehearsal import rehearse as rehearse_card  # loads matplotlib

    rehearse_card(workspace)


def check(workspace: Workspace, way: Way) -> None:
    """Raises before any work where anything that later stages need is missing; then saves the settings."""
    with timed("checking"):
        _check(workspace, way)
    workspace.save_settings()


def _check(workspace: Workspace, way: Way) -> None:
    workspace.begin_hashing()
    workspace.admit_models()
    workspace.check_texts()
    way.check(workspace)
    check_output(workspace)
    workspace.tell_memory()
    if workspace.watched is not None:
        workspace.reporter.note(workspace.watched.said())
    rehearse(workspace)


def check_output(workspace: Workspace) -> None:
    """Raises BadInput where the finished file would replace something that this folder's run did not make."""
    out = output_path(workspace.folder, workspace.source, workspace.base_of_shapes)
    settings = workspace.settings
    given = (
        settings.base_file,
        settings.imatrix,
        settings.imatrix_text,
        settings.select_text,
        settings.report_text,
    )
    inputs = [*(file.path for file in workspace.source.files), *(path for path in given if path is not None)]
    if is_one_of(out, inputs):
        raise BadInput(f"{out}: is an input of this run, and the result would replace it; give another -o")
    if out.exists() and not workspace.path(PLAN).exists():
        raise BadInput(
            f"{out}: is there already and no run of this folder made it; move it, or give another -o"
        )


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What one session of measuring left: its artifact, the chunks it measured, and those that were there before."""

    found: Measurements | Curves
    measured: int
    reused: int


def measure_stage(workspace: Workspace) -> Measuring:
    """Measures for the goal that was set: measurements.json against a limit, curves.json for a budget."""
    way = way_of(workspace.settings.goal)
    with workspace.locked():
        check(workspace, way)
        before = workspace.ledger.n_chunks()
        with collecting():
            found = way.measure(workspace)
        return Measuring(found=found, measured=workspace.ledger.n_chunks() - before, reused=before)


def rested_plan(workspace: Workspace) -> AnyPlan:
    """Returns plan.json; BadInput where the importance matrix is not the one that the plan rests on."""
    plan = workspace.artifacts.plan()
    if plan.imatrix_sha256 is not None and plan.imatrix_sha256 != workspace.matrix.sha256:
        raise BadInput(
            f"{workspace.matrix.path}: is not the importance matrix that {workspace.path(PLAN)} rests on; put "
            "the one back that it was measured with, or remove it and run `cerebellum run` again"
        )
    return plan


def build_stage(workspace: Workspace) -> Path:
    """Writes the GGUF that plan.json describes."""
    plan = rested_plan(workspace)
    out = output_path(workspace.folder, workspace.source, workspace.base)
    variant = workspace.shards.variant(plan.changes)
    if plan.changes and plan.measured_delta_pct is not None and not workspace.ledger.knows(variant.digest):
        raise BadInput(
            f"{workspace.path(PLAN)}: says that its combination was measured, and the ledger knows nothing of "
            "these bytes: source, base or llama.cpp changed since; run `cerebellum run` again"
        )
    with timed("building"):
        build(workspace.source, workspace.base, workspace.shards, plan.changes, out)
    return out


def verify_stage(workspace: Workspace) -> Verified:
    """Reads the finished file again, measures it on the report text and writes verify.json."""
    plan = rested_plan(workspace)
    out = output_path(workspace.folder, workspace.source, workspace.base)
    if not out.exists():
        raise BadInput(f"{out}: not there; run `cerebellum build {workspace.folder}` first")
    with timed("verifying"):
        checks = check_file(out, plan, workspace.layout, workspace.shards)
    corpus = workspace.report_corpus
    measurer = Measurer(workspace.engine, workspace.ledger, corpus, workspace.reporter, crew=workspace.crew)
    try:
        found = report(
            measurer,
            workspace.source_variant,
            workspace.shards.variant(NOTHING),
            out,
            workspace.settings.report_chunks or corpus.n_chunks,
            workspace.selection.sha256,
        )
        measurer.settle()
    finally:
        measurer.close()
    result = verified(checks, found)
    workspace.artifacts.write(VERIFY, result)
    return result


def bench_stage(workspace: Workspace, request: BenchRequest) -> BenchResults:
    """Asks the finished file and its base the same questions and writes bench.json."""

    result = examinee_from(output_path(workspace.folder, workspace.source, workspace.base))
    variant = workspace.shards.variant(NOTHING)
    variant.ready()
    base = Examinee(name=workspace.base.label, paths=tuple(variant.paths), sha256=variant.digest)
    found = bench(
        (result, base), request, workspace.engine.asker, workspace.path("bench"), workspace.reporter
    )
    workspace.artifacts.write(BENCH, found)
    return found


def card_stage(folder: Path, repo: str | None = None) -> tuple[Path, ...]:
    """Writes README.md, report.html and the charts from the folder's artifacts."""
    from cerebellum.card.stage import make_card  # matplotlib takes a second to load, and only this needs it

    return make_card(folder, repo)
