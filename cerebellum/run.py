"""The whole way through, one line a stage. Each stage meets the next only in the run folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cerebellum.bench.artifacts import BenchResults
from cerebellum.bench.scores import Examinee
from cerebellum.bench.stage import BenchRequest, bench, examinee_from
from cerebellum.build import build, output_path, result_paths
from cerebellum.engine.protocols import Engine
from cerebellum.engine.speed import Speeds
from cerebellum.engine.timetable import time_table
from cerebellum.engine.timings import collecting, stage, timed
from cerebellum.errors import BadInput
from cerebellum.files import is_one_of
from cerebellum.folder import BENCH, PLAN, SIZES, VERIFY, RunFolder
from cerebellum.manifest import Manifest, make_manifest
from cerebellum.measure.artifacts import Curves, Measurements
from cerebellum.measure.measurer import Measurer, decode_order, measuring
from cerebellum.measure.probe import open_session
from cerebellum.measure.stage import measure_against_limit, measure_for_budget
from cerebellum.plan.artifacts import AnyPlan, BudgetPlan, GivenPlan, LimitPlan
from cerebellum.plan.budget import check_allocated, check_reachable
from cerebellum.plan.given import check_given, given_header, plan_given, replan_given
from cerebellum.plan.stage import (
    budget_header,
    limit_header,
    plan_against_limit,
    plan_for_budget,
    replan_budget,
    replan_limit,
    sizes_of,
)
from cerebellum.settings import DEMO_MODEL, Budget, Given, Goal, Limit, Published, Settings
from cerebellum.source import open_source, plain_metadata
from cerebellum.units import size
from cerebellum.verdicts import NOTHING
from cerebellum.verify import Asked, Verified, check_file, report, verified
from cerebellum.workspace import Workspace


class Way(Protocol):
    """What differs between the goals: how it is checked, measured and planned. All else is one program."""

    def check(self, workspace: Workspace) -> None:
        """Raises before any work where the goal cannot be reached."""
        ...

    def labels(self, workspace: Workspace) -> tuple[str, ...]:
        """Names the files that the run will make, by their labels; shapes alone are looked at."""
        ...

    def measure(self, workspace: Workspace) -> Measurements | Curves:
        """Measures, and writes measurements.json or curves.json."""
        ...

    def measure_and_plan(self, workspace: Workspace) -> None:
        """Measures and plans in one go, and writes plan.json too."""
        ...

    def replan(self, workspace: Workspace, measurements: Path | None) -> tuple[AnyPlan, ...]:
        """Plans each size from what the folder holds; loads no model."""
        ...

    def plan_header(
        self, settings: Settings, engine: Engine, measurements: Path | None
    ) -> tuple[AnyPlan, ...]:
        """Plans for a GGUF of which only the header is looked at, from measurements made elsewhere."""
        ...


@dataclass(frozen=True)
class LimitWay:
    """Demotes what a limit on damage allows."""

    limit: Limit

    def check(self, workspace: Workspace) -> None:
        """Finds nothing to refuse: a limit that no group keeps leaves the base as it is."""

    def labels(self, workspace: Workspace) -> tuple[str, ...]:
        """Names the one file after its base."""
        return (workspace.base_of_shapes.label,)

    def measure(self, workspace: Workspace) -> Measurements:
        """Measures every group alone."""
        return measure_against_limit(workspace, self.limit)

    def measure_and_plan(self, workspace: Workspace) -> None:
        """Measures every group alone, then the combinations that the plan wants."""
        self.measure(workspace)
        plan_against_limit(workspace, self.limit)

    def replan(self, workspace: Workspace, measurements: Path | None) -> tuple[LimitPlan, ...]:
        """Plans from measurements alone."""
        return (replan_limit(workspace, self.limit, measurements),)

    def plan_header(
        self, settings: Settings, engine: Engine, measurements: Path | None
    ) -> tuple[LimitPlan, ...]:
        """Plans from shapes and recorded measurements."""
        return (limit_header(settings, self.limit, engine, _recorded(settings, measurements)),)


@dataclass(frozen=True)
class BudgetWay:
    """Spends the bytes of a size where the measurement says that they matter."""

    budget: Budget

    def check(self, workspace: Workspace) -> None:
        """Raises AnswerIsNo where no file can be as small as one of the sizes, and tells of sizes that are one."""
        check_allocated(workspace, self.budget)
        check_reachable(workspace, self.budget)
        left_out = len(self.budget.sizes) - len(sizes_of(workspace, self.budget))
        if left_out:
            workspace.reporter.note(
                f"{left_out + 1} sizes have room for the largest file that these types allow: one file is made for them"
            )

    def labels(self, workspace: Workspace) -> tuple[str, ...]:
        """Names a file for each size, after the preset that was given or the nearest one."""
        return tuple(one.label for one in sizes_of(workspace, self.budget))

    def measure(self, workspace: Workspace) -> Curves:
        """Measures every role at every type, and layers apart."""
        with open_session(workspace, self.budget) as session:
            return measure_for_budget(workspace, session)

    def measure_and_plan(self, workspace: Workspace) -> None:
        """Does both in one session, so that the source's predictions are made once."""
        with open_session(workspace, self.budget) as session:
            plan_for_budget(workspace, self.budget, measure_for_budget(workspace, session), session)

    def replan(self, workspace: Workspace, measurements: Path | None) -> tuple[BudgetPlan, ...]:
        """Plans from curves alone."""
        return replan_budget(workspace, self.budget, measurements)

    def plan_header(
        self, settings: Settings, engine: Engine, measurements: Path | None
    ) -> tuple[BudgetPlan, ...]:
        """Plans from shapes, recorded measurements and a stated model."""
        return budget_header(settings, self.budget, engine, _recorded(settings, measurements))


@dataclass(frozen=True)
class GivenWay:
    """Gives tensors the types of somebody's recipe, and measures what that does as a whole."""

    given: Given

    def check(self, workspace: Workspace) -> None:
        """Raises BadInput where a tensor cannot have its type, or the text has one chunk only."""
        check_given(workspace, self.given)

    def labels(self, workspace: Workspace) -> tuple[str, ...]:
        """Names the one file after its base, unless the types were carried over with a label."""
        return (self.given.label or workspace.base_of_shapes.label,)

    def measure(self, workspace: Workspace) -> Measurements:
        """Raises BadInput: no group is measured alone where nothing is to be chosen."""
        raise BadInput(
            f"{self.given.recipe}: a recipe leaves nothing to choose; `cerebellum run` measures the whole"
        )

    def measure_and_plan(self, workspace: Workspace) -> None:
        """Measures the whole against the base."""
        plan_given(workspace, self.given)

    def replan(self, workspace: Workspace, measurements: Path | None) -> tuple[GivenPlan, ...]:
        """Plans from types alone."""
        if measurements is not None:
            raise BadInput("--measurements: a recipe needs none; leave it out")
        return (replan_given(workspace, self.given),)

    def plan_header(
        self, settings: Settings, engine: Engine, measurements: Path | None
    ) -> tuple[GivenPlan, ...]:
        """Plans from shapes and types alone."""
        if measurements is not None:
            raise BadInput("--measurements: a recipe needs none; leave it out")
        return (given_header(settings, self.given, engine),)


def _recorded(settings: Settings, measurements: Path | None) -> Path:
    """Returns the measurements that were given; BadInput where there are none, for a GGUF has none itself."""
    if measurements is None:
        raise BadInput(
            f"{settings.source}: a GGUF has no measurements; give --measurements FILE or a run folder"
        )
    return measurements


def way_of(goal: Goal) -> Way:
    """Returns the way to a goal: the one place where the program asks which goal it has."""
    match goal:
        case Limit():
            return LimitWay(goal)
        case Budget():
            return BudgetWay(goal)
        case Given():
            return GivenWay(goal)


def run_all(workspace: Workspace, request: BenchRequest | None = None) -> Manifest:
    """Runs every stage in order; what is finished already is read, not repeated."""
    way = way_of(workspace.settings.goal)
    with workspace.locked():
        with collecting() as timings:
            with stage("checking"):
                check(workspace, way)
                tell_unknown_origin(workspace)
            with stage("measuring"):
                way.measure_and_plan(workspace)
            with stage("building"):
                build_stage(workspace)
            with stage("verifying"):
                verify_stage(workspace)
            if request is not None:
                with stage("questions"):
                    bench_stage(workspace, request)
        manifest = make_manifest(workspace, time_table(timings))
        drop_shards(workspace)
        card_if_possible(workspace)
        return manifest


def drop_shards(workspace: Workspace) -> None:
    """Removes the shards that only measuring needed, unless they are to be kept.

    The ledger knows what they held. A plan made later that ships one of them makes it again from the source.
    """
    if workspace.settings.keep_shards:
        return
    plans = [result.plan().changes for result in workspace.artifacts.results()]
    freed = workspace.shards.remove_all_but([NOTHING, *plans])
    if freed:
        workspace.reporter.note(
            f"shards that nothing needs any more were removed: {size(freed)} (--keep-shards keeps them)"
        )


def card_if_possible(workspace: Workspace) -> None:
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
    workspace.artifacts.publish(workspace.settings.published)


def _check(workspace: Workspace, way: Way) -> None:
    workspace.begin_hashing()
    workspace.admit_models()
    workspace.check_texts()
    way.check(workspace)
    check_output(workspace, way.labels(workspace))
    workspace.tell_memory()
    if workspace.watched is not None:
        workspace.reporter.note(workspace.watched.said())
    rehearse(workspace)


def tell_unknown_origin(workspace: Workspace) -> None:
    """Says in a line what the card will lack, while it can still be given without a second thought.

    Nothing is said of the model that comes with Cerebellum: nobody publishes it.
    """
    from cerebellum.card.origin import base_model

    if workspace.source.path.resolve() == DEMO_MODEL.resolve():
        return
    metadata = plain_metadata(workspace.source.files[0])
    said = workspace.settings.published.over(workspace.artifacts.published())
    lacking = []
    if not (said.base_model or base_model(metadata)):
        lacking.append("no base model, so that the Hub will draw no model tree (--base-model OWNER/NAME)")
    if not (said.license or metadata.get("general.license")):
        lacking.append("no license (--license ID)")
    if lacking:
        workspace.reporter.note(
            f"the source names {' and '.join(lacking)}; `cerebellum card` takes it later too"
        )


def check_output(workspace: Workspace, labels: Sequence[str]) -> None:
    """Raises BadInput where a finished file would replace something that this folder's run did not make."""
    settings = workspace.settings
    given = (
        settings.base_file,
        settings.imatrix,
        *(text.path for text in (*settings.select_texts, *settings.report_texts, *settings.imatrix_texts)),
    )
    inputs = [*workspace.source.paths, *(path for path in given if path is not None)]
    for out in (output_path(workspace.folder, workspace.source, label) for label in labels):
        if is_one_of(out, inputs):
            raise BadInput(
                f"{out}: is an input of this run, and the result would replace it; give another -o"
            )
        if result_paths(out) and not workspace.path(PLAN).exists():
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
            workspace.finish_source()
        return Measuring(found=found, measured=workspace.ledger.n_chunks() - before, reused=before)


def rested_plan(workspace: Workspace, result: RunFolder) -> AnyPlan:
    """Returns a size's plan.json; BadInput where the importance matrix is not the one that the plan rests on."""
    plan = result.plan()
    if plan.imatrix_sha256 is not None and plan.imatrix_sha256 != workspace.matrix.sha256:
        raise BadInput(
            f"{workspace.matrix.path}: is not the importance matrix that {result / PLAN} rests on; put "
            "the one back that it was measured with, or remove it and run `cerebellum run` again"
        )
    return plan


def planned_sizes(workspace: Workspace) -> tuple[RunFolder, ...]:
    """Returns the folder as each size sees it; BadInput where it has more or fewer than were asked for.

    Sizes that have room for everything are one file, so that fewer may be right.
    """
    views = workspace.artifacts.results()
    goal = workspace.settings.goal
    wanted = len(goal.sizes) if isinstance(goal, Budget) else 1
    if len(views) != wanted and isinstance(goal, Budget):
        wanted = len(sizes_of(workspace, goal))
    if len(views) != wanted:
        raise BadInput(
            f"{workspace.path(SIZES)}: the run was asked for {wanted} sizes, and {len(views)} are planned here; "
            "run `cerebellum plan` again, or put the list back"
        )
    return views


def build_stage(workspace: Workspace) -> tuple[Path, ...]:
    """Writes the GGUF that each size's plan.json describes, and returns them; of a split one the first file."""
    return tuple(_build_one(workspace, result) for result in planned_sizes(workspace))


def _build_one(workspace: Workspace, result: RunFolder) -> Path:
    plan = rested_plan(workspace, result)
    variant = workspace.shards.variant(plan.changes)
    if plan.changes and plan.measured_delta_pct is not None and not workspace.ledger.knows(variant.digest):
        raise BadInput(
            f"{result / PLAN}: says that its combination was measured, and the ledger knows nothing of "
            "these bytes: source, base or llama.cpp changed since; run `cerebellum run` again"
        )
    out = output_path(workspace.folder, workspace.source, plan.file_label)
    above = workspace.settings.split_above_bytes
    with timed("building"):
        return build(workspace.source, workspace.base, workspace.shards, plan.changes, out, above)[0]


def finished_file(workspace: Workspace, plan: AnyPlan) -> Path:
    """Returns the file that was built for a plan, or the first of its splits; BadInput where there is none."""
    out = output_path(workspace.folder, workspace.source, plan.file_label)
    found = result_paths(out)
    if not found:
        raise BadInput(f"{out}: not there; run `cerebellum build {workspace.folder}` first")
    return found[0]


def verify_stage(workspace: Workspace) -> tuple[Verified, ...]:
    """Reads each finished file again, measures it on the report text and writes its verify.json."""
    results = planned_sizes(workspace)
    with _reporting(workspace) as measurer:
        return tuple(_verify_one(workspace, result, measurer) for result in results)


@contextmanager
def _reporting(workspace: Workspace) -> Iterator[Measurer]:
    """Opens a measurer on the report text; of several domains it compares with the source's own predictions."""
    corpus = workspace.report_corpus
    unsure = frozenset({workspace.source_variant.digest})  # the card says whether the source is overconfident
    if corpus.parts:
        room = min(Budget.prediction_bytes, shutil.disk_usage(workspace.folder).free // 4)
        order = _asked(workspace).of(corpus)
        with measuring(workspace, workspace.source_variant, order, corpus, room, unsure) as measurer:
            yield measurer
        return
    measurer = Measurer(
        *(workspace.engine, workspace.ledger, corpus, workspace.reporter),
        crew=workspace.crew,
        unsure=unsure,
        order=decode_order(workspace, corpus),
    )
    try:
        yield measurer
        measurer.settle()
    finally:
        measurer.close()


def _asked(workspace: Workspace) -> Asked:
    settings = workspace.settings
    return Asked(chunks=settings.report_chunks, seed=settings.seed, selection=workspace.selection.texts)


def _verify_one(workspace: Workspace, result: RunFolder, measurer: Measurer) -> Verified:
    plan = rested_plan(workspace, result)
    out = finished_file(workspace, plan)
    with timed("verifying"):
        checks = check_file(out, plan, workspace.source, workspace.layout, workspace.shards)
    found = report(
        measurer,
        workspace.source_variant,
        workspace.shards.variant(NOTHING),
        out,
        _asked(workspace),
    )
    proved = verified(checks, found, _speeds(workspace, out, measurer))
    result.write(VERIFY, proved)
    return proved


def _speeds(workspace: Workspace, out: Path, measurer: Measurer) -> Speeds | None:
    """Times the base and a finished file one after the other, where that was asked for."""
    if not workspace.settings.tokens_per_second:
        return None
    measurer.close()  # each is timed with the machine to itself
    base = workspace.shards.variant(NOTHING)
    base.ready()
    finished = open_source(out, allow_requantize=True)
    with timed("tokens a second"):
        return Speeds(
            machine=workspace.engine.machine,
            base=workspace.engine.speed(base.paths),
            result=workspace.engine.speed(finished.paths),
        )


def bench_stage(workspace: Workspace, request: BenchRequest) -> tuple[BenchResults, ...]:
    """Asks each finished file and the base the same questions, nothing twice, and writes its bench.json."""
    return tuple(_bench_one(workspace, result, request) for result in planned_sizes(workspace))


def _bench_one(workspace: Workspace, result: RunFolder, request: BenchRequest) -> BenchResults:
    finished = examinee_from(finished_file(workspace, result.plan()))
    variant = workspace.shards.variant(NOTHING)
    variant.ready()
    base = Examinee(name=workspace.base.label, paths=tuple(variant.paths), sha256=variant.digest)
    found = bench(
        *((finished, base), request, workspace.engine.asker, workspace.path("bench"), workspace.reporter),
        crew=workspace.crew,
    )
    result.write(BENCH, found)
    return found


def card_stage(folder: Path, repo: str | None = None, said: Published | None = None) -> tuple[Path, ...]:
    """Writes README.md, report.html and the charts from the folder's artifacts; keeps what is ``said`` of the model."""
    from cerebellum.card.stage import make_card  # matplotlib takes a second to load, and only this needs it

    if said is not None:
        RunFolder(folder).plan()  # a folder without a run is refused before anything is written
        RunFolder(folder).publish(said)
    return make_card(folder, repo)
