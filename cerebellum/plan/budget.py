"""Chooses the best file of a size: damages and a budget in bytes give proposals, and measurement picks among them.

The knapsack assumes that damages add up. What it proposes is therefore measured whole, what the parts got
wrong is learned (damage.py), and it is solved again; then for damages drawn from what is still not known. The
best *measured* proposal ships, the unchanged base among them where it fits.

The words of budget mode, each with one meaning:

| word | meaning |
| --- | --- |
| part | groups that are looked at together: a role, or some neighbouring layers of it |
| anchor | the type that all else has while a part is measured, so fine that it does next to no damage (Q8_0) |
| probe, response | one part at one type with all else at the anchor; the damage that was measured for it |
| damage | what a change costs in the budget's objective: KL divergence from the source, or NLL, nats a token |
| sensitivity | damage of a group for each unit of rounding error; what the damage model fits |
| point, curve | one group at one type as foretold: its damage and its bytes; all points of a group are its curve |
| proposal | one point of every group that fits the budget together, foretold and then measured whole |
| step | a measured plan with one part at another type; what the part costs there |
| target | the size that was asked for, as bytes of the whole file |
| reference | anchor and base scored on all chunks that parts get; damages are measured from it |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace as replace_fields

from cerebellum.errors import AnswerIsNo, BadInput
from cerebellum.groups import is_tied
from cerebellum.layout import Layout
from cerebellum.measure.artifacts import Bounds, Curves, Look, Response, finite_pair
from cerebellum.measure.curves import (
    Curving,
    Planning,
    Probe,
    ProbeAsk,
    Reference,
    WholeAsk,
    measure_response,
)
from cerebellum.plan.allocation import Allocation, Proposal
from cerebellum.plan.artifacts import (
    DEMOTED,
    KEPT,
    PROMOTED,
    BudgetPlan,
    CandidateRow,
    FrontierRow,
    PlanRow,
    PointRow,
    StepRow,
)
from cerebellum.plan.damage import DamageModel, fit_damage
from cerebellum.plan.presets import Types, largest_fitting
from cerebellum.plan.search import Search
from cerebellum.plan.steps import Step, is_off, propose_by_steps
from cerebellum.plan.target import Target, target_of
from cerebellum.settings import FINE_LADDER, KLD, PPL, Budget, Gpu, Objective
from cerebellum.stats.estimate import Estimate
from cerebellum.stats.paired import as_percent
from cerebellum.verdicts import NOTHING, Batch

if TYPE_CHECKING:  # planning from artifacts alone loads no engine
    from cerebellum.measure.probe import Session
    from cerebellum.workspace import Workspace


_AFFORDABLE = 1000  # chunks that steps of a round may cost, where nobody says it


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What measuring came to: the best proposal, all of them in order, and what every group is now known to cost.

    The unchanged base is the last of ``proposals`` where it fits.
    """

    chosen: Proposal
    proposals: tuple[Proposal, ...]
    points: tuple[PointRow, ...]
    steps: tuple[Step, ...] = ()


def budget_plan(
    model: DamageModel,
    reference: Reference,
    file_bytes: int,
    objective: Objective = KLD,
    seed: int = 1,
    presets: Mapping[str, Types] = MappingProxyType({}),
    affordable: int = _AFFORDABLE,
) -> Planning[Decision]:
    """Asks for the score of each combination that it wants, and returns the best that was measured.

    The base comes first: every proposal is compared with it. K-quants alone are quicker to run than IQ types,
    and a check on them; the largest of the ``presets`` that fits is llama.cpp's own choice of types. Where they are not
    what their parts foretold, steps are taken, a round of them for an ``affordable`` number of chunks. Raises
    AnswerIsNo where nothing fits, with the nearest reachable size, and where all that fits collapsed.
    """
    layout = model.observed.layout
    method = model.observed.method
    points = model.points()
    allocation = Allocation(points, layout, objective)
    first = allocation.best(file_bytes)
    if first is None:
        raise unreachable(file_bytes, allocation.smallest())
    (base,) = yield Batch(asks=(WholeAsk(changes=NOTHING),))
    search = Search(base=base, reference=reference)
    yield from search.measure(first, *_checks(points, layout, objective, file_bytes, presets))
    steps: tuple[Step, ...] = ()
    if is_off(search, objective, method):
        steps = yield from propose_by_steps(model, search, file_bytes, objective, affordable)
    else:
        yield from _propose_by_lessons(model, search, file_bytes, objective, seed)
    proposals = search.with_base(layout, file_bytes)
    chosen = _least_bad(proposals, file_bytes, objective)
    points = model.learning(search.lessons()).points()
    return Decision(chosen=chosen, proposals=proposals, points=points, steps=steps)


def _propose_by_lessons(
    model: DamageModel, search: Search, file_bytes: int, objective: Objective, seed: int
) -> Planning[None]:
    """Measures what is best by all that whole plans taught, and then by damages drawn from what is still not known."""
    layout, method = model.observed.layout, model.observed.method

    def best_of(points: Sequence[PointRow], how: str) -> Proposal | None:
        return Allocation(points, layout, objective).best(file_bytes, how)

    for _ in range(method.learned):
        learned = model.learning(search.lessons())
        yield from search.measure(best_of(learned.points(), "having learned"))
    rng = np.random.default_rng(seed)
    for _ in range(method.drawn):
        drawn = model.learning(search.lessons()).drawn(rng)
        yield from search.measure(best_of(drawn.points(), "damages drawn"))


def _checks(
    points: Sequence[PointRow],
    layout: Layout,
    objective: Objective,
    file_bytes: int,
    presets: Mapping[str, Types],
) -> Iterator[Proposal]:
    """Yields what the sum of the parts is checked against: K-quants alone, and llama.cpp's own choice of types."""
    plain = [point for point in points if point.type not in FINE_LADDER]
    best = Allocation(plain, layout, objective).best(file_bytes, "K-quants alone")
    if best is not None:
        yield best
    preset = largest_fitting(presets, points, layout, file_bytes)
    if preset is not None:
        yield _followed(*preset, layout)


def _followed(name: str, points: tuple[PointRow, ...], layout: Layout) -> Proposal:
    """Returns a preset, group by group, as a proposal."""
    n_bytes = layout.fixed_bytes() + sum(point.bytes for point in points)
    return Proposal(how=f"llama.cpp's {name}, group by group", points=points, file_bytes=n_bytes)


def _least_bad(proposals: Sequence[Proposal], file_bytes: int, objective: Objective) -> Proposal:
    """Returns the proposal with the least measured damage; AnswerIsNo where all of them collapsed."""
    best = min(proposals, key=lambda proposal: proposal.badness(objective), default=None)
    if best is None or not np.isfinite(best.badness(objective)):
        raise AnswerIsNo(
            f"every plan of {file_bytes:,} bytes that was measured collapsed (no finite logits); "
            "give a larger budget"
        )
    return best


def unreachable(file_bytes: int, smallest: int) -> AnswerIsNo:
    """Returns the answer to a budget under the ``smallest`` file, both in bytes."""
    return AnswerIsNo(
        f"a budget of {file_bytes:,} bytes cannot be reached: the smallest file that these types allow "
        f"has {smallest:,} bytes; nothing was written"
    )


def check_allocated(workspace: Workspace, goal: Budget) -> None:
    """Raises BadInput where the embeddings are to be planned for a GPU that they do not lie on.

    Bytes that they gave up would be spent on the GPU, where they were never.
    """
    fitted = any(isinstance(size, Gpu) for size in goal.sizes)
    if fitted and "embd" in goal.allocate and not is_tied(workspace.source):
        raise BadInput(
            "--allocate embd and --fit: this model's embeddings stay in main memory and take nothing of a graphics "
            "card; give --allocate head, or a --budget"
        )
    if goal.allocate and is_tied(workspace.source):
        workspace.reporter.note(
            "embeddings and output head are one tensor in this model: token_embd is planned for both"
        )


def check_reachable(workspace: Workspace, goal: Budget) -> None:
    """Raises AnswerIsNo before any work where shapes alone say that no file can be as small as one of the sizes.

    No importance matrix is made for it: types depend on whether there is one, not on what it holds.
    """
    layout = Layout.of(workspace.source, workspace.groups, workspace.base_of_shapes)
    smallest = layout.fixed_bytes() + sum(
        min(layout.group_bytes(name, qtype) for qtype in (None, *layout.ladder(name, goal.offered)))
        for name in layout.groups
    )
    for size in goal.sizes:
        wanted = target_of(size, workspace.engine, workspace.source, layout).file_bytes
        if wanted < smallest:
            raise unreachable(wanted, smallest)


# --- the stage


def plan_budget(curves: Curves, session: Session, target: Target) -> BudgetPlan:
    """Measures the knapsack's proposals whole on an open session, and returns the best that was measured.

    Nothing that is measured here goes back into the curves, so that the plan for a budget never depends on
    which budget was planned before.
    """
    layout = session.layout
    objective = session.goal.objective
    fine = _measure_fine_types(curves, session, target)
    model = fit_damage(curves, layout, fine)
    planning = budget_plan(
        model,
        session.measure_reference(),
        target.model_bytes,
        objective,
        session.seed,
        presets=session.presets,
        affordable=int(session.method.steps_share * session.limit),
    )
    decision = session.plan(planning)
    plan = _plan_of(decision, layout, target, objective, curves.base_kld)
    rows = _frontier_rows(decision.points, layout, objective, curves)
    return replace_fields(plan, responses=fine, frontier=rows)


def plan_unmeasured(curves: Curves, layout: Layout, target: Target, objective: Objective) -> BudgetPlan:
    """Returns the plan that the curves alone propose: no model is loaded and nothing is measured whole."""
    points = fit_damage(curves, layout).points()
    plan = plan_points(points, layout, target, objective, curves.base_kld)
    return replace_fields(plan, frontier=_frontier_rows(points, layout, objective, curves))


def plan_points(
    points: tuple[PointRow, ...],
    layout: Layout,
    target: Target,
    objective: Objective,
    base_kld: float | None = None,
) -> BudgetPlan:
    """Returns the plan of least foretold damage; AnswerIsNo with the nearest reachable size where none fits."""
    allocation = Allocation(points, layout, objective)
    best = allocation.best(target.model_bytes)
    if best is None:
        raise unreachable(target.file_bytes, allocation.smallest())
    decision = Decision(chosen=best, proposals=(best,), points=points)
    return _plan_of(decision, layout, target, objective, base_kld)


def frontier(curves: Curves, layout: Layout, objective: Objective) -> tuple[FrontierRow, ...]:
    """Returns size and foretold damage of the best plans, from the smallest file to the largest."""
    return _frontier_rows(fit_damage(curves, layout).points(), layout, objective, curves)


def _frontier_rows(
    points: Sequence[PointRow], layout: Layout, objective: Objective, curves: Curves
) -> tuple[FrontierRow, ...]:
    rows = []
    for proposal in Allocation(points, layout, objective).frontier(curves.method.frontier_steps):
        predicted = proposal.predicted(objective)
        assert predicted is not None
        rows.append(
            FrontierRow(
                file_bytes=proposal.file_bytes,
                predicted=predicted,
                predicted_kld=curves.base_kld + predicted if objective == KLD else None,
                changes=dict(proposal.changes),
            )
        )
    return tuple(rows)


def _measure_fine_types(curves: Curves, session: Session, target: Target) -> tuple[Response, ...]:
    """Measures the IQ types that the plan for this budget wants, the largest parts first.

    IQ types quantize ten times as slowly as K-quants, and rounding errors foretell them well, so a part is
    measured at one only where a plan wants it, and while the passes last.
    """
    layout = session.layout
    points = fit_damage(curves, layout).points()
    first = Allocation(points, layout, session.goal.objective).best(target.model_bytes)
    wanted: dict[tuple[str, str], list[str]] = {}
    for point in first.points if first else ():
        if point.type in FINE_LADDER:
            wanted.setdefault((layout.groups[point.group].role, point.type), []).append(point.group)
    probes = [Probe(part=layout.part(names), qtype=qtype) for (_, qtype), names in wanted.items()]
    probes.sort(key=lambda probe: -layout.part_bytes(probe.part, probe.qtype))
    known = {(response.groups, response.type) for response in curves.responses}
    new = [probe for probe in probes if (probe.part.groups, probe.qtype) not in known]
    budget = session.budget_after(curves)

    def measured() -> Curving[tuple[Response, ...]]:
        found = []
        for number, probe in enumerate(new):
            if budget.left >= curves.chunks:
                reference = session.measure_reference()
                first = min(session.method.first_look, curves.chunks)
                then = tuple(ProbeAsk(probe=later, n=first) for later in new[number + 1 :])
                one = measure_response(probe, reference, session.method, curves.chunks, then=then)
                found.append((yield from one))
        return tuple(found)

    with session.ahead(new):
        return session.run(measured(), budget)


# --- what plan.json says


def _plan_of(
    decision: Decision, layout: Layout, target: Target, objective: Objective, base_kld: float | None
) -> BudgetPlan:
    """Returns a decision as plan.json has it, one row a group; ``base_kld`` is the base's own divergence."""
    chosen = decision.chosen
    divergence = chosen.measured(KLD)
    measured = _look(chosen.measured(PPL))
    predicted = chosen.predicted(PPL)
    return BudgetPlan(
        base=layout.base.label,
        groups=tuple(_row(point, layout) for point in chosen.points),
        predicted_delta_pct=None if predicted is None else as_percent(predicted),
        measured_delta_pct=measured.delta_pct,
        ci_pct=measured.ci_pct,
        base_tensor_bytes=layout.tensor_bytes(),
        tensor_bytes=layout.tensor_bytes(chosen.changes),
        bytes_saved=layout.bytes_saved(chosen.changes),
        file_bytes=chosen.file_bytes,
        tensor_types=layout.type_names(chosen.changes),
        budget_bytes=target.file_bytes,
        objective=objective,
        base_kld=base_kld,
        predicted_kld=chosen.predicted(KLD),
        measured_kld=divergence.mean if divergence else None,
        kld_ci=_bounds(divergence),
        tradeoff=tradeoff(decision, objective),
        candidates=tuple(_candidate(proposal) for proposal in decision.proposals),
        steps=tuple(_step(step, decision) for step in decision.steps),
        points=decision.points,
        memory=target.memory(chosen.changes),
    )


def _row(point: PointRow, layout: Layout) -> PlanRow:
    changes = {} if point.type is None else {point.group: point.type}
    saved = layout.bytes_saved(changes)
    verdict = KEPT if point.type is None else (DEMOTED if saved > 0 else PROMOTED)
    alone = _look(point.nll)
    return replace_fields(
        PlanRow.kept(layout, point.group),
        chosen_type=PlanRow.told(point.type),
        bytes_saved=saved,
        delta_pct=alone.delta_pct,
        ci_pct=alone.ci_pct,
        chunks=point.kld.n if point.kld else None,
        verdict=verdict,
        decision=verdict,
        kld_change=point.kld.mean if point.kld else None,
    )


def _candidate(proposal: Proposal) -> CandidateRow:
    divergence = proposal.measured(KLD)
    measured = _look(proposal.measured(PPL))
    return CandidateRow(
        how=proposal.how,
        changes=dict(proposal.changes),
        file_bytes=proposal.file_bytes,
        predicted_kld=proposal.foretold(KLD),
        measured_kld=divergence.mean if divergence else None,
        kld_ci=_bounds(divergence),
        delta_pct=measured.delta_pct,
        ci_pct=measured.ci_pct,
        chunks=measured.chunks,
    )


def _step(step: Step, decision: Decision) -> StepRow:
    around = [proposal.changes for proposal in decision.proposals].index(step.around.changes)
    effect = step.effect
    divergence = effect.kld if effect else None
    measured = _look(effect.nll if effect else None)
    return StepRow(
        around=around,
        part=step.part.name,
        way=step.way,
        changes={name: PlanRow.told(point.type) for name, point in step.points.items()},
        predicted=step.after - step.before,
        measured_kld=divergence.mean if divergence else None,
        kld_ci=_bounds(divergence),
        delta_pct=measured.delta_pct,
        ci_pct=measured.ci_pct,
        chunks=step.chunks,
    )


def _look(change: Estimate | None) -> Look:
    return Look.of(None if change is None else change.interval())


def _bounds(change: Estimate | None) -> Bounds | None:
    if change is None:
        return None
    interval = change.interval()
    return finite_pair(interval.low, interval.high)


def tradeoff(decision: Decision, objective: Objective) -> str | None:
    """Says what the chosen plan costs in the measure it was not chosen by, if that is sure; None if nothing."""
    if decision.chosen.effect is None:
        return None
    kld, nll = (decision.chosen.measured(measure) for measure in (KLD, PPL))
    if kld is None or nll is None:
        return None
    if kld.mean < 0 < nll.interval().low:
        return "closer to the source than the base (KL divergence), but with a higher perplexity on the text"
    if nll.mean < 0 < kld.interval().low:
        return "a lower perplexity on the text than the base, but farther from the source (KL divergence)"
    return _rival(decision, PPL if objective == KLD else KLD)


def _rival(decision: Decision, other: Objective) -> str | None:
    """Names another proposal that is surely better by the ``other`` measure, paired chunk by chunk."""
    ours = decision.chosen.score
    rivals = [each for each in decision.proposals if each.changes and each is not decision.chosen]
    for rival in sorted(rivals, key=lambda proposal: proposal.badness(other)):
        theirs = rival.score
        if ours is None or theirs is None or rival.measured(other) is None:
            continue
        gain = theirs.change(ours).damage(other)
        if gain is not None and gain.interval().high < 0:
            name = "perplexity" if other == PPL else "KL divergence"
            told = f"{as_percent(gain.mean):+.2f}%" if other == PPL else f"{gain.mean:+.5f} nats"
            return f"another measured plan of {rival.file_bytes:,} bytes has a lower {name} ({told})"
    return None
