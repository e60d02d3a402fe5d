"""The plan of a finished run on a finetune of its model: applied, checked, and revised where it does not hold.

The finetune gets its own importance matrix and its own base. The plan is measured whole against that base, paired
chunk by chunk, and held to what it promised: a limit on perplexity, or for a budget the share of the base's
divergence that it had. Only where that does not hold are groups measured again, and the run's own goal plans anew.
What is left is a run folder like any other, with transfer.json beside its artifacts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from cerebellum.codec import read_artifact
from cerebellum.errors import BadInput
from cerebellum.folder import CURVES, MEASUREMENTS, PLAN, SETTINGS, TRANSFER, RunFolder
from cerebellum.manifest import Manifest, make_manifest
from cerebellum.measure.artifacts import Curves, MeasurementRow, Measurements, Response, finite_pair
from cerebellum.measure.curves import Probe, measure_response
from cerebellum.measure.measurer import Measurer, decode_order, measuring
from cerebellum.measure.probe import MeasurementBudget, Session, curves_of, open_session
from cerebellum.measure.race import chunk_order
from cerebellum.measure.rounding import read_or_make_errors
from cerebellum.measure.stage import SINGLES_SHARE, Racing, against_base, write_measurements
from cerebellum.plan.artifacts import AnyPlan, BudgetPlan, GivenPlan, LimitPlan, Plan
from cerebellum.plan.stage import plan_against_limit, plan_for_budget
from cerebellum.plan.target import target_of
from cerebellum.recipes.transferred import BROKEN, HOLDS, OPEN, Figure, GroupAgain, Transferred, Verdict
from cerebellum.run import build_stage, card_if_possible, check, drop_shards, verify_stage, way_of
from cerebellum.settings import Budget, Domain, Given, Limit, Published, Settings, held
from cerebellum.source import Source, open_source, plain_metadata
from cerebellum.stats.estimate import Estimate
from cerebellum.stats.paired import Interval, as_nats, superpopulation_interval
from cerebellum.stats.sequential import union_share
from cerebellum.verdicts import NOTHING
from cerebellum.verify import Verified
from cerebellum.workspace import Workspace

_TOLERANCE = 1.1
"""A budget's plan keeps its promise while it has no more than this times the share of the base's divergence."""

CHUNKS = 300

WorkspaceFor = Callable[[Settings], Workspace]
"""Opens the new folder with settings."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a plan was measured to do on its own model, in words, and what that asks of another.

    Either the change of the NLL against the base is to stay under ``limit_nats``, or the divergence from the source
    near a ``share`` of the base's.
    """

    words: str
    share: float | None
    limit_nats: float


def promise_of(plan: Plan) -> Promise:
    """Returns the promise of a plan; BadInput where it was never measured whole, or came from a recipe."""
    match plan:
        case LimitPlan():
            words = f"perplexity within +{plan.threshold_pct:g}% of the base"
            return Promise(words=words, share=None, limit_nats=as_nats(plan.threshold_pct))
        case BudgetPlan(base_kld=float(base), measured_kld=float(measured)) if base > 0:
            share = (base + measured) / base
            words = (
                f"within {plan.budget_bytes:,} bytes, {100 * share:.1f}% of the base's KL divergence from the source, "
                f"or at most {_TOLERANCE:g} times that"
            )
            return Promise(words=words, share=share, limit_nats=0.0)
    raise BadInput(
        "the plan was never measured whole, or is a recipe, so it promises nothing; use `cerebellum run SOURCE "
        "--recipe` with the finished file"
    )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """How the plan did on the finetune: how far over its promise, and as figures of its own."""

    verdict: Verdict
    over: Interval
    now_share: float | None


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """A finetune, and what is given for it in place of what the run had; None where the run's will do.

    An importance matrix of the run's is never taken: without ``imatrix`` the finetune's own is made.
    """

    source: Path
    imatrix: Path | None = None
    base_file: Path | None = None
    select_texts: tuple[Domain, ...] = ()
    report_texts: tuple[Domain, ...] = ()


def transferred_settings(run: RunFolder, finetune: Finetune) -> Settings:
    """Returns the settings of a run for a finetune; of several sizes the first alone is carried over.

    What was said of the run's model for its card is not said of the finetune. Raises BadInput where the run had a
    base of its own and there is none for the finetune: its damage would be another model's.
    """
    settings = run.settings()
    if settings.base_file is not None and finetune.base_file is None:
        raise BadInput(
            f"{run.path}: was measured against a base file; make the finetune's in the same way and give it with "
            "--base-file"
        )
    goal = settings.goal
    if isinstance(goal, Budget):
        goal = goal.with_sizes(goal.sizes[:1])
    select_text, select_domains = held(finetune.select_texts or settings.select_texts)
    report_text, report_domains = held(finetune.report_texts or settings.report_texts)
    return replace(
        settings,
        goal=goal,
        published=Published(),
        source=finetune.source.absolute(),
        imatrix=finetune.imatrix,
        base_file=finetune.base_file,
        select_text=select_text,
        select_domains=select_domains,
        report_text=report_text,
        report_domains=report_domains,
    )


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a transfer left: what was found, the plan that ships, and the proof of its file."""

    transferred: Transferred
    plan: AnyPlan
    verified: Verified
    manifest: Manifest

    @property
    def ok(self) -> bool:
        """Says whether the file is verified, and its plan kept the promise or was made for this very model."""
        return self.verified.ok and (self.transferred.revised or not is_broken(self.transferred))


def transfer(
    run: RunFolder, settings: Settings, open_workspace: WorkspaceFor, chunks: int, *, revise: bool
) -> Done:
    """Applies the plan of ``run`` to the source of ``settings``, checks it, and leaves a finished run folder.

    Where the promise does not hold and ``revise`` says so, the groups that matter are measured again and the plan
    is revised. Raises BadInput where the models are not of one shape.
    """
    plan = run.plan()
    promise = promise_of(plan)
    manifest = run.check_evidence()
    recipe = f"{run.path.resolve().name}-plan.json"
    given = Given(recipe=recipe, types=_types(plan, run), chunks=chunks, label=plan.label)
    workspace = open_workspace(replace(settings, goal=given))
    _check_folder(workspace.folder, run, recipe)
    _check_shapes(plan, workspace.source, run)
    _check_same_kind(workspace.source, run, run.path / manifest.result.file)
    _check_another(workspace, run)
    with workspace.locked():
        said = _check(workspace, run, settings, promise)
        if not (revise and is_broken(said)):
            return _finish(workspace, said)
    workspace = open_workspace(settings)
    with workspace.locked():
        again = _revise(workspace, run, plan)
        return _finish(workspace, replace(said, revised=True, again=again))


def _check(workspace: Workspace, run: RunFolder, settings: Settings, promise: Promise) -> Transferred:
    """Gives the finetune the types of the plan, measures the whole, and holds it to the promise."""
    way = way_of(workspace.settings.goal)
    check(workspace, way)
    way.measure_and_plan(workspace)
    found = workspace.artifacts.plan()
    assert isinstance(found, GivenPlan)
    checked = _check_promise(workspace, found, promise)
    said = _told(run, workspace, found, checked, promise, fits=_fits(workspace, settings, found))
    workspace.artifacts.write(TRANSFER, said)
    return said


def _finish(workspace: Workspace, said: Transferred) -> Done:
    """Builds the file that plan.json describes, proves it, and writes what a finished run has."""
    build_stage(workspace)
    (verified,) = verify_stage(workspace)
    workspace.artifacts.write(TRANSFER, said)
    manifest = make_manifest(workspace)
    drop_shards(workspace)
    card_if_possible(workspace)
    return Done(transferred=said, plan=workspace.artifacts.plan(), verified=verified, manifest=manifest)


def is_broken(said: Transferred) -> bool:
    """Says whether the plan is to be revised: it is over its promise, surely or as far as is known, or too large."""
    return said.verdict == BROKEN or not said.fits or (said.verdict == OPEN and (said.over.mean or 0.0) > 0)


def _types(plan: Plan, run: RunFolder) -> dict[str, str]:
    """Returns the types of all tensors of the groups that the plan changes."""
    groups = {group.name: group.tensor_names for group in run.groups().groups}
    types = {name: qtype for group, qtype in plan.changes.items() for name in groups.get(group, ())}
    strange = next((name for name, qtype in types.items() if plan.tensor_types.get(name) != qtype), None)
    lost = next((group for group in plan.changes if group not in groups), None)
    if strange is not None or lost is not None:
        raise BadInput(
            f"{run / PLAN}: is not of the groups beside it ({strange or lost} has another type, or is not there); run "
            "`cerebellum run` again in its folder"
        )
    return types


def _check_folder(out: Path, run: RunFolder, recipe: str) -> None:
    """Raises BadInput where the transfer would write over the run itself, or over anything but a transfer of it.

    ``recipe`` is what a transfer of this run calls its plan.
    """
    if out.exists() and out.resolve() == run.path.resolve():
        raise BadInput(
            f"{out}: is the run whose plan is carried over; give the finetune a folder of its own with -o"
        )
    there = RunFolder(out)
    if not (out / SETTINGS).exists():
        return
    if (out / TRANSFER).exists():
        said = read_artifact(out / TRANSFER, Transferred, "give the finetune a folder of its own with -o")
        ours = said.run == run.path.resolve().name
    else:
        goal = there.settings().goal
        ours = isinstance(goal, Given) and goal.recipe == recipe
    if not ours:
        raise BadInput(f"{out}: holds a run already; give the finetune a folder of its own with -o")


def _check_same_kind(source: Source, run: RunFolder, result: Path) -> None:
    """Raises BadInput where the finetune is of another architecture, vocabulary or shape than the run's model."""
    before = run.source()
    now = plain_metadata(source.files[0])
    pairs: list[tuple[str, object, object]] = [("architecture", before.architecture, source.architecture)]
    keys = ("tokenizer.ggml.model", "vocabulary", f"{source.architecture}.embedding_length")
    pairs += [(key, before.metadata.get(key), now.get(key)) for key in keys]
    if result.exists():
        made = open_source(result, allow_requantize=True).tensors
        shapes = (
            (name, made[name].shape, tensor.shape) for name, tensor in source.tensors.items() if name in made
        )
        pairs += [(f"shape of {name}", old, new) for name, old, new in shapes]
    for what, old, new in pairs:
        if old != new:
            raise BadInput(
                f"{source.path}: its {what} is {new!a}, and {old!a} in {before.path}, the model of {run.path}; give a "
                "finetune of that model"
            )


def _check_another(workspace: Workspace, run: RunFolder) -> None:
    """Raises BadInput where the finetune is the run's own model, for which every promise holds."""
    if workspace.source_fingerprint == run.source().fingerprint:
        raise BadInput(
            f"{workspace.source.path}: is the model of {run.path} itself, byte for byte; give a finetune of it"
        )


def _check_shapes(plan: Plan, source: Source, run: RunFolder) -> None:
    """Raises BadInput unless the finetune has the tensors of the run's model, each with as many parameters."""
    strange = sorted(plan.tensor_types.keys() ^ source.tensors.keys())
    if strange:
        raise BadInput(
            f"{source.path}: is of another shape than {run.source().path}, the model of {run.path}: only one of them "
            f"has {strange[0]}"
        )
    for group in run.groups().groups:
        if sum(source.tensors[name].n_elements for name in group.tensor_names) != group.parameters:
            raise BadInput(
                f"{source.path}: is of another shape than {run.source().path}, the model of {run.path}: "
                f"{group.name} has another number of parameters"
            )


def _check_promise(workspace: Workspace, plan: GivenPlan, promise: Promise) -> Checked:
    """Holds the plan to its promise on the chunks that it was measured on; what the ledger knows is not read again."""
    order = chunk_order(plan.of_chunks, workspace.settings.seed)[: plan.chunks]
    base = workspace.shards.variant(NOTHING)
    whole = workspace.shards.variant(plan.changes)
    if promise.share is None:
        corpus = workspace.selection
        measurer = Measurer(
            workspace.engine,
            workspace.ledger,
            corpus,
            workspace.reporter,
            order=decode_order(workspace, corpus),
        )
        with closing(measurer):
            nll_N = measurer.chunk_means(whole, order) - measurer.chunk_means(base, order)
        return _checked(nll_N - promise.limit_nats, None)
    with measuring(workspace, workspace.source_variant, order) as measurer:
        compared = [chunk for chunk in order if measurer.cache is not None and chunk in measurer.cache.chunks]
        if len(compared) < 2:
            raise BadInput("--kld-cache: too small for the predictions of two chunks; give it more")
        of_base_N = measurer.kld_means(base, compared)
        of_whole_N = measurer.kld_means(whole, compared)
    share = float(of_whole_N.mean() / of_base_N.mean())
    return _checked(of_whole_N - _TOLERANCE * promise.share * of_base_N, share)


def _checked(over_N: NDArray[np.float64], share: float | None) -> Checked:
    """Returns the verdict on how far the plan is over its promise, nats a token, a value a chunk."""
    if not np.isfinite(over_N).all():
        broken = Interval(mean=np.inf, low=np.inf, high=np.inf, n=len(over_N), population=len(over_N))
        return Checked(verdict=BROKEN, over=broken, now_share=None)
    over = superpopulation_interval(over_N)
    verdict = HOLDS if over.high < 0 else BROKEN if over.low > 0 else OPEN
    return Checked(verdict=verdict, over=over, now_share=share)


def _fits(workspace: Workspace, settings: Settings, plan: GivenPlan) -> bool:
    """Says whether the file is within the size that the run was for; a limit has none."""
    match settings.goal:
        case Budget(sizes=(size, *_)):
            target = target_of(size, workspace.engine, workspace.source, workspace.layout, workspace.matrix)
            return plan.file_bytes <= target.file_bytes
        case _:
            return True


def _told(
    run: RunFolder, workspace: Workspace, found: GivenPlan, checked: Checked, promise: Promise, *, fits: bool
) -> Transferred:
    plan = run.plan()
    source = run.source()
    return Transferred(
        run=run.path.resolve().name,
        run_source=source.path,
        run_source_sha256=source.sha256,
        source=workspace.source.path.name,
        source_sha256=workspace.source_sha256,
        promise=promise.words,
        verdict=checked.verdict,
        over=_figure(checked.over),
        chunks=found.chunks,
        of_chunks=found.of_chunks,
        before_pct=Figure(mean=plan.measured_delta_pct, ci=plan.ci_pct),
        now_pct=Figure(mean=found.measured_delta_pct, ci=found.ci_pct),
        before_share=promise.share,
        now_share=checked.now_share,
        fits=fits,
        revised=False,
        again=(),
    )


def _figure(interval: Interval) -> Figure:
    mean = interval.mean if np.isfinite(interval.mean) else None
    return Figure(mean=mean, ci=finite_pair(interval.low, interval.high))


# --- measuring again


def _revise(workspace: Workspace, run: RunFolder, plan: Plan) -> tuple[GroupAgain, ...]:
    """Measures again what matters to the plan, and plans by the run's own goal; writes plan.json."""
    check(workspace, way_of(workspace.settings.goal))
    workspace.write_source()
    match workspace.settings.goal:
        case Limit() as limit:
            return _revise_limit(workspace, limit, run, plan)
        case Budget() as budget:
            with open_session(workspace, budget) as session:
                curves, again = _curves_again(session, run.curves())
                workspace.artifacts.write(CURVES, curves)
                plan_for_budget(workspace, budget, curves, session)
                return again
        case Given(recipe=recipe):
            raise BadInput(f"{recipe}: a recipe has no goal to plan by")


def _revise_limit(workspace: Workspace, limit: Limit, run: RunFolder, plan: Plan) -> tuple[GroupAgain, ...]:
    """Measures every group that the plan demotes alone, and combines anew those that the limit allows.

    What the plan kept stays as it is: only what it changed can have done the damage.
    """
    candidates = [{name: qtype} for name, qtype in plan.changes.items()]
    order = chunk_order(workspace.selection.n_chunks, workspace.settings.seed)
    with against_base(workspace, order) as measurer:
        racing = Racing(workspace=workspace, limit=limit, measurer=measurer, order=order)
        found = racing.measure(candidates, union_share(limit.alpha * SINGLES_SHARE, len(candidates)))
        now = write_measurements(workspace, limit, {order: found})
    plan_against_limit(workspace, limit)
    before = run.measurements() if (run / MEASUREMENTS).exists() else None
    return tuple(_row_again(row, _row_of(before, row)) for row in now.measurements)


def _row_of(before: Measurements | None, row: MeasurementRow) -> MeasurementRow | None:
    rows = before.measurements if before else ()
    return next((old for old in rows if old.groups == row.groups and old.type == row.type), None)


def _row_again(now: MeasurementRow, before: MeasurementRow | None) -> GroupAgain:
    """Sets a group's change of perplexity beside the one before; it differs where the intervals are apart."""
    old = Figure(mean=before.delta_pct, ci=before.ci_pct) if before else Figure(mean=None, ci=None)
    apart = now.delta_pct is None
    if old.ci is not None and now.ci_pct is not None:
        apart = now.ci_pct[0] > old.ci[1] or now.ci_pct[1] < old.ci[0]
    return GroupAgain(
        name=" + ".join(now.groups),
        type=str(now.type),
        before=old,
        now=Figure(mean=now.delta_pct, ci=now.ci_pct),
        differs=apart,
    )


def _curves_again(session: Session, before: Curves) -> tuple[Curves, tuple[GroupAgain, ...]]:
    """Measures every role at one type, and at all types, and its layers, where it surely costs another amount.

    Rounding errors are the finetune's own for all groups, since they take no model. What does not differ keeps the
    responses of the run, which cost nothing.
    """
    workspace = session.workspace
    errors = read_or_make_errors(workspace, session.goal, session.method)
    reference = session.measure_reference()
    budget = MeasurementBudget(limit=session.limit, beforehand=3 * len(session.few))
    most = min(before.chunks, len(session.few))

    def again(old: Response) -> Response:
        probe = Probe(part=workspace.layout.part(old.groups), qtype=old.type)
        return session.run(measure_response(probe, reference, session.method, most), budget)

    kept: list[Response] = []
    rows: list[GroupAgain] = []
    for responses in _by_role(before, session):
        first = again(responses[0])
        differs = _differ(first, responses[0])
        rows.append(_response_again(first, responses[0], differs=differs))
        kept += [first, *(again(old) if differs else old for old in responses[1:])]
    return curves_of(session, reference, tuple(kept), errors, budget, most), tuple(rows)


def _by_role(before: Curves, session: Session) -> list[list[Response]]:
    """Returns the responses of a run, those of a role and of its layers together, the whole role first."""
    found: dict[str, list[Response]] = {}
    for response in before.responses:
        role = session.layout.groups[response.groups[0]].role
        found.setdefault(role, []).append(response)
    return list(found.values())


def _differ(now: Response, before: Response) -> bool:
    """Says whether the damage of a role at a type is surely another one; a collapse always is."""
    if now.kld is None or before.kld is None:
        return (now.kld is None) != (before.kld is None)
    difference: Estimate = now.kld + before.kld * -1.0
    interval = difference.interval()
    return interval.low > 0 or interval.high < 0


def _response_again(now: Response, before: Response, *, differs: bool) -> GroupAgain:
    return GroupAgain(
        name=now.part, type=now.type, before=_estimated(before), now=_estimated(now), differs=differs
    )


def _estimated(response: Response) -> Figure:
    if response.kld is None:
        return Figure(mean=None, ci=None)
    return _figure(response.kld.interval())
