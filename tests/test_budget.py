"""Budget planning without a model: what it proposes, learns, ships and refuses; bytes exact to the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from synthetic import BITS, Truth, by_layer, by_role

from cerebellum.errors import AnswerIsNo
from cerebellum.groups import make_groups
from cerebellum.ledger import Ledger
from cerebellum.measure.curves import BASE, FINE_LADDER, PPL, Point, Score, point_from_json, roles
from cerebellum.measure.race import Changes
from cerebellum.plan.budget import (
    BudgetPlan,
    Damages,
    Known,
    Learning,
    budget_json,
    budget_plan,
    frontier,
    merged,
)
from cerebellum.plan.limit import Sizes
from cerebellum.shards import Recipe, Shards
from cerebellum.source import open_source
from cerebellum.workspace import DEMO_MODEL


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(by_layer())


@pytest.fixture(scope="module")
def damages(truth: Truth) -> Learning:
    return Learning(truth.sensitivities(), truth.base_whole())


@pytest.fixture(scope="module")
def points(damages: Learning) -> Sequence[Point]:
    return damages.points(())


def plan(
    damages: Damages, truth: Truth, budget: int, measured: Mapping[str, float] | None = None
) -> tuple[BudgetPlan, list[Changes]]:
    """``measured``: type -> how many times its damage a whole plan does in truth."""
    planning = budget_plan(damages, truth.sizes, budget)
    asked = []
    try:
        changes = next(planning)
        while True:
            asked.append(changes)
            changes = planning.send((truth.score(changes, factors=measured), truth.score({})))
    except StopIteration as stop:
        return stop.value, asked


def test_it_beats_the_base_at_its_own_size(damages: Learning, truth: Truth) -> None:
    found, asked = plan(damages, truth, truth.sizes.whole_file_bytes())
    assert found.chosen.n_bytes <= truth.sizes.whole_file_bytes()
    assert truth.damage(found.chosen.changes) < 0.8 * truth.damage({})
    kinds = {found.chosen.changes[name] for name in truth.sizes.groups if name.startswith("ssm")}
    assert kinds <= {"Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS"}, "the sensitive groups are spared"
    assert len({tuple(sorted(changes.items())) for changes in asked}) == len(asked), "nothing twice"


def test_the_prediction_is_the_truth_where_damages_add_up(damages: Learning, truth: Truth) -> None:
    found, _ = plan(damages, truth, truth.sizes.whole_file_bytes() - 500_000)
    gained = truth.damage(found.candidates[0].changes) - truth.damage({})
    assert found.candidates[0].predicted == pytest.approx(gained, rel=0.05)


def test_the_base_ships_where_every_change_measures_worse(damages: Learning, truth: Truth) -> None:
    worse = dict.fromkeys(BITS, 30.0)
    found, asked = plan(damages, truth, truth.sizes.whole_file_bytes(), worse)
    assert asked and found.chosen.changes == {}
    assert found.chosen.how == "the base itself"


def test_it_learns_from_the_whole(damages: Learning, truth: Truth) -> None:
    """IQ types do six times what rounding says here: later plans have fewer, and one without ships."""
    bad = dict.fromkeys(FINE_LADDER, 6.0)
    found, asked = plan(damages, truth, truth.sizes.whole_file_bytes() - 900_000, bad)
    shares = [sum(kind in FINE_LADDER for kind in changes.values()) for changes in asked]
    assert shares[0] > 10 and shares[1] == 0 and shares[2] < shares[0]
    assert not set(found.chosen.changes.values()) & set(FINE_LADDER)
    means = [candidate.kld.mean for candidate in found.candidates if candidate.kld]
    assert found.chosen.kld is not None and found.chosen.kld.mean == min(means) < means[0]


def test_never_over_budget_along_the_whole_frontier(points: Sequence[Point], truth: Truth) -> None:
    curve = frontier(points, truth.sizes, steps=12)
    assert [c.n_bytes for c in curve] == sorted(c.n_bytes for c in curve)
    damages = [c.predicted for c in curve]
    assert all(a >= b - 1e-12 for a, b in pairwise(damages))


def test_unreachable_says_the_nearest_reachable_size(
    damages: Learning, points: Sequence[Point], truth: Truth
) -> None:
    smallest = frontier(points, truth.sizes, steps=2)[0].n_bytes
    with pytest.raises(AnswerIsNo, match=f"{smallest:,} bytes"):
        plan(damages, truth, smallest - 1)
    assert plan(damages, truth, smallest)[0].chosen.n_bytes == smallest


def test_a_plan_of_collapsed_files_is_refused(
    damages: Learning, points: Sequence[Point], truth: Truth
) -> None:
    planning = budget_plan(damages, truth.sizes, frontier(points, truth.sizes, steps=2)[0].n_bytes)
    broken = Score(nll=np.full(8, np.nan), kld=np.full(8, np.nan))
    next(planning)
    with pytest.raises(AnswerIsNo, match="collapsed"):
        while True:
            planning.send((broken, truth.score({})))


def test_another_budget_asks_for_nothing(points: Sequence[Point], truth: Truth) -> None:
    planning = budget_plan(Known(points), truth.sizes, truth.sizes.whole_file_bytes())
    proposed = next(planning)
    with pytest.raises(StopIteration) as stop:
        planning.send(None)
    assert stop.value.value.chosen.changes == proposed
    assert stop.value.value.chosen.score is None


def test_json_has_the_contract_and_names_every_group_once(damages: Learning, truth: Truth) -> None:
    sizes = truth.sizes
    planned = budget_json(plan(damages, truth, sizes.whole_file_bytes())[0], sizes, 0.02)
    wanted = {"mode", "budget_bytes", "base", "groups", "predicted_delta_pct", "measured_delta_pct", "ci_pct"}
    assert wanted <= planned.keys()
    assert sorted(name for row in planned["groups"] for name in row["members"]) == sorted(sizes.groups)
    assert planned["file_bytes"] <= planned["budget_bytes"]
    assert sum(row["bytes_saved"] for row in planned["groups"]) == planned["bytes_saved"]
    neighbours = [(row["role"], row["chosen_type"], row["base_type"]) for row in planned["groups"]]
    assert all(a != b for a, b in pairwise(neighbours)), "layers that go alike are one row"


def test_rows_of_neighbouring_layers_add_up(points: Sequence[Point], truth: Truth) -> None:
    alike = [p for p in points if p.part.name.startswith("ffn_up_exps") and p.kind == "Q4_K"]
    (row,) = merged(alike, truth.sizes)
    assert row.part.name == "ffn_up_exps" and row.n_bytes == sum(point.n_bytes for point in alike)
    assert row.kld is not None
    assert row.kld.mean == pytest.approx(sum(point.kld.mean for point in alike if point.kld))
    first, _ = merged([alike[0], *alike[1:3]], truth.sizes), alike
    assert first[0].part.name == "ffn_up_exps.0-2"


def test_gaining_in_one_measure_at_the_cost_of_the_other_is_said(damages: Learning, truth: Truth) -> None:
    planning = budget_plan(damages, truth.sizes, truth.sizes.whole_file_bytes())
    try:
        changes = next(planning)
        while True:
            found = truth.score(changes)
            changes = planning.send((replace(found, nll=truth.score({}).nll + 0.03), truth.score({})))
    except StopIteration as stop:
        assert "higher perplexity" in budget_json(stop.value, truth.sizes)["tradeoff"]


def test_a_rival_of_the_base_itself_is_said_too(damages: Learning, truth: Truth) -> None:
    """Every change moves away from the source here and lowers the perplexity: the base ships, with a word."""
    planning = budget_plan(damages, truth.sizes, truth.sizes.whole_file_bytes())
    base = truth.score({})
    try:
        next(planning)
        while True:
            planning.send((Score(nll=base.nll - 0.03, kld=base.kld + 0.1), base))
    except StopIteration as stop:
        told = budget_json(stop.value, truth.sizes)
    assert told["bytes_saved"] == 0 and "lower perplexity (-2.96%)" in told["tradeoff"]


def test_points_survive_json(points: Sequence[Point]) -> None:
    again = [point_from_json(point.as_json()) for point in points]
    assert [p.part for p in again] == [p.part for p in points]
    assert [p.damage(PPL) and p.damage(PPL).mean for p in again] == [
        p.damage(PPL) and p.damage(PPL).mean for p in points
    ]


@pytest.mark.parametrize("sizes", [by_role(), by_layer()], ids=["by role", "by layer"])
def test_predicted_bytes_are_the_bytes_of_the_file(tmp_path: Path, sizes: Sizes) -> None:
    from cerebellum.build import build

    source = open_source(DEMO_MODEL)
    wanted = {"ssm_in": "Q5_K", "ffn_down_exps": "Q2_K", "attn_k": "Q4_K"}
    parts = {part.name: part for part in roles(sizes)}
    changes = {name: kind for role, kind in wanted.items() for name in parts[role].groups[-2:]}
    spans = 1 if len(sizes.groups) == len(parts) else 8
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        recipe = Recipe(
            source=source,
            base=sizes.base,
            matrix=None,
            groups=make_groups(source, spans=spans),
            folder=tmp_path / "shards",
            threads=1,
        )
        for tried in ({}, changes):
            out = tmp_path / "out.gguf"
            build(source, sizes.base, Shards(recipe, ledger), tried, out)
            assert out.stat().st_size == sizes.whole_file_bytes(tried)


def test_base_points_are_zero_and_no_point_repeats_the_base(points: Sequence[Point], truth: Truth) -> None:
    for point in points:
        kinds = {kind.name for kind in truth.sizes.base_types(point.part.name).values()}
        assert (point.kind == BASE) == (point.kld is not None and point.kld.mean == 0.0)
        assert kinds != {point.kind}
