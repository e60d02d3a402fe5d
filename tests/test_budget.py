"""Budget planning without a model: what it proposes, learns, ships and refuses; bytes exact to the file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from synthetic import BITS, CHUNKS, TrueSession, Truth, by_layer, by_role

from cerebellum.codec import as_json, read_artifact, write_artifact
from cerebellum.errors import AnswerIsNo, BadInput
from cerebellum.layout import Layout
from cerebellum.ledger import Ledger
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.measure.artifacts import Curves
from cerebellum.measure.curves import Score, WholeAsk
from cerebellum.measure.probe import Session
from cerebellum.plan.allocation import Allocation
from cerebellum.plan.artifacts import BudgetPlan, PointRow
from cerebellum.plan.budget import (
    Decision,
    budget_plan,
    frontier,
    plan_budget,
    plan_unmeasured,
    tradeoff,
)
from cerebellum.plan.damage import DamageModel, base_point
from cerebellum.plan.presets import largest_fitting
from cerebellum.plan.target import Target
from cerebellum.settings import DEMO_MODEL, FINE_LADDER, KLD
from cerebellum.shards import Recipe, Shards
from cerebellum.source import open_source
from cerebellum.stats.estimate import Estimate
from cerebellum.verdicts import NOTHING, Changes, drive


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(by_layer())


@pytest.fixture(scope="module")
def curves(truth: Truth) -> Curves:
    return truth.curves()


@pytest.fixture(scope="module")
def model(truth: Truth) -> DamageModel:
    return truth.model()


@pytest.fixture(scope="module")
def points(model: DamageModel) -> Sequence[PointRow]:
    return model.points()


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A decision, and every combination that was asked for on the way to it."""

    decision: Decision
    asked: list[Changes]


def plan(
    model: DamageModel, truth: Truth, budget: int, measured: Mapping[str, float] | None = None
) -> Planned:
    """``measured``: type -> how many times its damage a whole plan does in truth."""
    asked = []

    def score(ask: WholeAsk) -> Score:
        asked.append(ask.changes)
        return truth.score(ask.changes, ask.n or CHUNKS, factors=measured)

    decision = drive(budget_plan(model, truth.reference(), budget), score)
    return Planned(decision=decision, asked=asked)


def smallest(points: Sequence[PointRow], truth: Truth) -> int:
    return Allocation(points, truth.layout, KLD).smallest()


def test_it_beats_the_base_at_its_own_size(model: DamageModel, truth: Truth) -> None:
    found = plan(model, truth, truth.layout.file_bytes())
    chosen = found.decision.chosen
    assert chosen.file_bytes <= truth.layout.file_bytes()
    assert truth.damage(chosen.changes) < 0.8 * truth.damage(NOTHING)
    types = {chosen.changes[name] for name in truth.layout.groups if name.startswith("ssm")}
    assert types <= {"Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS"}, "the sensitive groups are spared"
    asked = found.asked
    assert len({tuple(sorted(changes.items())) for changes in asked}) == len(asked), "nothing twice"


def test_the_base_is_asked_for_first_and_by_name(model: DamageModel, truth: Truth) -> None:
    found = plan(model, truth, truth.layout.file_bytes() - 500_000)
    assert found.asked[0] == NOTHING and all(found.asked[1:])
    assert [each.how for each in found.decision.proposals][:2] == ["the sum of the parts", "K-quants alone"]


def test_what_llama_cpp_would_choose_is_tried_and_ships_where_it_measures_best(
    model: DamageModel, truth: Truth
) -> None:
    """The additive model is made wrong about everything but the preset: no plan may ship that measured worse."""
    layout = truth.layout
    q2 = {name: GGMLQuantizationType.Q2_K for group in layout.groups.values() for name in group.tensors}
    budget = layout.file_bytes() - 500_000
    base = truth.score(NOTHING)
    wanted = {name: "Q2_K" for name in layout.groups}

    def score(ask: WholeAsk) -> Score:
        worse = 0.01 if ask.changes == wanted else 0.5
        return replace(base, kld=base.kld + worse) if ask.changes else base

    presets = {"Q2_K": dict(layout.base.types) | q2, "Q8_0": dict.fromkeys(q2, GGMLQuantizationType.Q8_0)}
    found = drive(budget_plan(model, truth.reference(), budget, presets=presets), score)
    assert found.chosen.how == "llama.cpp's Q2_K, group by group"
    assert found.chosen.file_bytes == layout.file_bytes(found.chosen.changes) <= budget
    without = drive(budget_plan(model, truth.reference(), budget), score)
    assert without.chosen.how != found.chosen.how


def test_a_preset_of_mixed_groups_is_followed_at_the_type_of_most_bytes_or_the_smaller_one() -> None:
    layout = by_role()
    name, group = next((name, group) for name, group in layout.groups.items() if len(group.tensors) > 1)
    mixed = dict.fromkeys(group.tensors, GGMLQuantizationType.Q6_K)
    mixed[group.tensors[0]] = GGMLQuantizationType.Q2_K
    zero = Estimate.exact(0.0)
    points = [base_point(one, layout) for one in layout.groups] + [
        PointRow(group=name, type=kind, bytes=layout.group_bytes(name, kind), kld=zero, nll=zero)
        for kind in ("Q2_K", "Q6_K")
    ]
    presets = {"mixed": dict(layout.base.types) | mixed}

    def followed(file_bytes: int) -> dict[str, str] | None:
        found = largest_fitting(presets, points, layout, file_bytes)
        return None if found is None else {point.group: point.type for point in found[1] if point.type}

    assert followed(layout.file_bytes({name: "Q6_K"})) == {name: "Q6_K"}
    assert followed(layout.file_bytes({name: "Q6_K"}) - 1) == {name: "Q2_K"}
    assert followed(layout.file_bytes({name: "Q2_K"})) == {name: "Q2_K"}
    assert followed(layout.file_bytes({name: "Q2_K"}) - 1) is None


def test_a_group_that_a_preset_gives_the_type_of_the_base_stays_at_the_base() -> None:
    """One tensor of the group differs, as llama.cpp's rules have it, and the smaller type is the base's own."""
    layout = by_role()
    group = next(
        group
        for name, group in layout.groups.items()
        if len(group.tensors) > 1 and len(layout.base_types([name])) == 1
    )
    larger = dict.fromkeys(group.tensors[:1], GGMLQuantizationType.Q8_0)
    presets = {"mixed": dict(layout.base.types) | larger}
    points = [base_point(one, layout) for one in layout.groups]
    found = largest_fitting(presets, points, layout, layout.file_bytes())
    assert found is not None and all(point.type is None for point in found[1])


def test_the_prediction_is_the_truth_where_damages_add_up(model: DamageModel, truth: Truth) -> None:
    first = plan(model, truth, truth.layout.file_bytes() - 500_000).decision.proposals[0]
    gained = truth.damage(first.changes) - truth.damage(NOTHING)
    assert first.predicted(KLD) == pytest.approx(gained, rel=0.05)


def test_the_base_ships_where_every_change_measures_worse(model: DamageModel, truth: Truth) -> None:
    worse = dict.fromkeys(BITS, 30.0)
    found = plan(model, truth, truth.layout.file_bytes(), worse)
    assert len(found.asked) > 1 and found.decision.chosen.changes == {}
    assert found.decision.chosen.how == "the base itself"


def test_it_learns_from_the_whole(model: DamageModel, truth: Truth) -> None:
    """IQ types do six times what rounding says here: later plans have fewer, and one without ships."""
    bad = dict.fromkeys(FINE_LADDER, 6.0)
    found = plan(model, truth, truth.layout.file_bytes() - 900_000, bad)
    shares = [sum(qtype in FINE_LADDER for qtype in changes.values()) for changes in found.asked[1:]]
    assert shares[0] > 10 and shares[1] == 0 and shares[2] < shares[0]
    chosen = found.decision.chosen
    assert not set(chosen.changes.values()) & set(FINE_LADDER)
    changes = [proposal.measured(KLD) for proposal in found.decision.proposals]
    means = [change.mean for change in changes if change]
    best = chosen.measured(KLD)
    assert best is not None and best.mean == min(means) < means[0]


def test_never_over_budget_along_the_whole_frontier(points: Sequence[PointRow], truth: Truth) -> None:
    curve = Allocation(points, truth.layout, KLD).frontier(12)
    assert [c.file_bytes for c in curve] == sorted(c.file_bytes for c in curve)
    damages = [c.predicted(KLD) for c in curve]
    assert all(a is not None and b is not None and a >= b - 1e-12 for a, b in pairwise(damages))


def test_the_frontier_is_told_from_the_curves_alone(curves: Curves, truth: Truth) -> None:
    rows = frontier(curves, truth.layout, KLD)
    assert len(rows) > 12 and all(a.predicted >= b.predicted - 1e-12 for a, b in pairwise(rows))
    assert all(row.predicted_kld == curves.base_kld + row.predicted for row in rows)
    assert all(row.file_bytes == truth.layout.file_bytes(row.changes) for row in rows)
    assert all(row.predicted_kld is None for row in frontier(curves, truth.layout, "ppl"))


def test_unreachable_says_the_nearest_reachable_size(
    model: DamageModel, points: Sequence[PointRow], truth: Truth
) -> None:
    least = smallest(points, truth)
    with pytest.raises(AnswerIsNo, match=f"{least:,} bytes"):
        plan(model, truth, least - 1)
    assert plan(model, truth, least).decision.chosen.file_bytes == least


def test_a_plan_of_collapsed_files_is_refused(
    model: DamageModel, points: Sequence[PointRow], truth: Truth
) -> None:
    broken = Score(nll=np.full(8, np.nan), kld=np.full(8, np.nan))
    planning = budget_plan(model, truth.reference(), smallest(points, truth))
    with pytest.raises(AnswerIsNo, match="collapsed"):
        drive(planning, lambda ask: broken if ask.changes else truth.score(NOTHING))


def test_a_plan_from_curves_alone_is_what_would_be_measured_first(
    model: DamageModel, curves: Curves, truth: Truth
) -> None:
    budget = truth.layout.file_bytes()
    planned = plan_unmeasured(curves, truth.layout, Target(file_bytes=budget), KLD)
    planning = budget_plan(model, truth.reference(), budget)
    assert [ask.changes for ask in next(planning).asks] == [NOTHING]
    assert planned.changes == planning.send((truth.score(NOTHING),)).asks[0].changes
    assert planned.measured_kld is None and planned.candidates[0].measured_kld is None


def test_json_has_the_contract_and_names_every_group_once(curves: Curves, truth: Truth) -> None:
    layout, session = truth.layout, TrueSession.of(truth)
    budget = layout.file_bytes()
    planned = plan_budget(curves, cast(Session, session), Target(file_bytes=budget))
    told = as_json(planned)
    wanted = {"mode", "budget_bytes", "base", "groups", "predicted_delta_pct", "measured_delta_pct", "ci_pct"}
    assert wanted <= told.keys() and told["mode"] == "budget"
    assert [row["name"] for row in told["groups"]] == list(layout.groups), "one row a group, in order"
    assert told["file_bytes"] <= told["budget_bytes"] == budget
    assert sum(row["bytes_saved"] for row in told["groups"]) == told["bytes_saved"]
    assert planned.file_bytes == layout.file_bytes(planned.changes)
    for row in planned.groups:
        assert row.chosen_type != row.base_type, "no row changes a group to what it is"


def test_a_plan_survives_its_file(curves: Curves, truth: Truth, tmp_path: Path) -> None:
    target = Target(file_bytes=truth.layout.file_bytes())
    planned = plan_budget(curves, cast(Session, TrueSession.of(truth)), target)
    write_artifact(tmp_path / "plan.json", planned)
    assert read_artifact(tmp_path / "plan.json", BudgetPlan, "plan again") == planned


# --- a plan does not depend on what was planned before


def test_a_plan_after_another_budget_is_the_plan_alone(curves: Curves, truth: Truth, tmp_path: Path) -> None:
    """Budgets X and Y from one curves.json, measured and not: the answer to Y is the same with and without X.

    IQ types do six times what rounding says, so that planning X learns a great deal.
    """
    path = tmp_path / "curves.json"
    write_artifact(path, curves)
    before = path.read_bytes()
    bad = dict.fromkeys(FINE_LADDER, 6.0)
    larger, smaller = (Target(file_bytes=truth.layout.file_bytes() - less) for less in (0, 900_000))

    def planned(target: Target) -> BudgetPlan:
        return plan_budget(read(path), cast(Session, TrueSession.of(truth, bad)), target)

    def unmeasured(target: Target) -> BudgetPlan:
        return plan_unmeasured(read(path), truth.layout, target, KLD)

    alone = planned(smaller), unmeasured(smaller)
    planned(larger)
    after = planned(smaller), unmeasured(smaller)
    assert after == alone
    assert path.read_bytes() == before, "curves.json is written once"
    foretold = {(row.group, row.type): row.kld for row in alone[1].points}
    learned = {(row.group, row.type): row.kld for row in alone[0].points}
    assert foretold.keys() == learned.keys() and foretold != learned, "what plans taught is in plan.json"


def test_iq_types_that_the_plan_wants_are_measured_for_it_while_the_passes_last(
    curves: Curves, truth: Truth
) -> None:
    target = Target(file_bytes=truth.layout.file_bytes() - 900_000)
    session = TrueSession.of(truth)
    planned = plan_budget(curves, cast(Session, session), target)
    assert session.probed and len(planned.responses) == len(session.probed)
    assert all(response.type in FINE_LADDER for response in planned.responses)
    sizes = [truth.layout.part_bytes(probe.part, probe.qtype) for probe in session.probed]
    assert sizes == sorted(sizes, reverse=True), "the largest parts first"
    spent = replace(TrueSession.of(truth), limit=curves.chunks_scored)
    assert plan_budget(curves, cast(Session, spent), target).responses == ()


# --- curves.json is read strictly


def read(path: Path) -> Curves:
    return read_artifact(path, Curves, "run `cerebellum measure --budget` again")


def test_curves_survive_their_file(curves: Curves, tmp_path: Path) -> None:
    write_artifact(tmp_path / "curves.json", curves)
    assert read(tmp_path / "curves.json") == curves


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        ((), [], "an array where an object was wanted"),
        (("format",), 2, "has format 2, this version reads format 3"),
        (("chunks",), "16", "chunks: wanted int, got str"),
        (("passses",), 1.0, "unknown key 'passses'"),
        (("method", "precice"), 0.1, "method: has the unknown key 'precice'"),
        (("responses", 0, "kld"), {"mean": 0.1, "low": 0.0, "high": 0.2}, "has no key 'se'"),
        (("rounding", "at_base", "attn_q.2"), None, "rounding.at_base"),
    ],
)
def test_a_damaged_curves_json_is_one_line_with_file_and_key(
    curves: Curves, tmp_path: Path, at: tuple[Any, ...], value: Any, told: str
) -> None:
    content: Any = {"": as_json(curves)}
    inner = content
    for key in ("", *at)[:-1]:
        inner = inner[key]
    inner[("", *at)[-1]] = value
    path = tmp_path / "curves.json"
    path.write_text(json.dumps(content[""]), encoding="utf-8")
    with pytest.raises(BadInput) as refused:
        read(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and told in message and "measure --budget" in message
    assert len(message.splitlines()) == 1


# --- what the plan costs in the other measure


def test_gaining_in_one_measure_at_the_cost_of_the_other_is_said(model: DamageModel, truth: Truth) -> None:
    base = truth.score(NOTHING)

    def score(ask: WholeAsk) -> Score:
        found = truth.score(ask.changes)
        return replace(found, nll=base.nll + 0.03) if ask.changes else base

    decision = drive(budget_plan(model, truth.reference(), truth.layout.file_bytes()), score)
    assert "higher perplexity" in (tradeoff(decision, KLD) or "")


def test_a_rival_of_the_base_itself_is_said_too(model: DamageModel, truth: Truth) -> None:
    """Every change moves away from the source here and lowers the perplexity: the base ships, with a word."""
    base = truth.score(NOTHING)
    moved = Score(nll=base.nll - 0.03, kld=base.kld + 0.1)
    planning = budget_plan(model, truth.reference(), truth.layout.file_bytes())
    decision = drive(planning, lambda ask: moved if ask.changes else base)
    assert decision.chosen.changes == {} and "lower perplexity (-2.96%)" in (tradeoff(decision, KLD) or "")


# --- bytes


@pytest.mark.parametrize("layout", [by_role(), by_layer()], ids=["by role", "by layer"])
def test_predicted_bytes_are_the_bytes_of_the_file(tmp_path: Path, layout: Layout) -> None:
    from cerebellum.build import build

    source = open_source(DEMO_MODEL)
    wanted = {"ssm_in": "Q5_K", "ffn_down_exps": "Q2_K", "attn_k": "Q4_K"}
    parts = {part.name: part for part in layout.roles()}
    changes = {name: qtype for role, qtype in wanted.items() for name in parts[role].groups[-2:]}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        recipe = Recipe(
            source=source,
            layout=layout,
            matrix=None,
            engine=LlamaEngine(EngineSettings()),
            folder=tmp_path / "shards",
            threads=1,
        )
        for tried in (NOTHING, changes):
            out = tmp_path / "out.gguf"
            build(source, layout.base, Shards(recipe, ledger), tried, out, split_above=1 << 40)
            assert out.stat().st_size == layout.file_bytes(tried)


def test_base_points_are_zero_and_no_point_repeats_the_base(points: Sequence[PointRow], truth: Truth) -> None:
    for point in points:
        assert (point.type is None) == (point.kld is not None and point.kld.mean == 0.0)
        assert truth.layout.base_types([point.group]) != (point.type,)
