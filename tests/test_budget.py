"""Budget planning without a model: what it proposes, learns, ships and refuses; bytes exact to the file."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cerebellum.base import preset_base
from cerebellum.budget import BudgetPlan, budget_json, budget_plan, frontier
from cerebellum.curves import (
    BASE,
    K_LADDER,
    PPL,
    Point,
    Score,
    candidates,
    effort,
    fine_candidates,
    measure_curves,
    measure_point,
    point_from_json,
    roles,
)
from cerebellum.errors import AnswerIsNo
from cerebellum.groups import make_groups
from cerebellum.ledger import Ledger
from cerebellum.plan import Sizes
from cerebellum.shards import Recipe, Shards
from cerebellum.source import open_source
from cerebellum.sweep import Changes
from cerebellum.workspace import DEMO_MODEL
from cerebellum.zoom import halves, leaves, refined, zoom

BITS = {BASE: 3.4, "Q2_K": 2.6, "Q3_K": 3.4, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.6, "Q8_0": 8.5}


def sizes_of(spans: int) -> Sizes:
    source = open_source(DEMO_MODEL)
    groups = {g.name: g for g in make_groups(source, spans=spans) if not g.protected}
    return Sizes(tensors=source.tensors, groups=groups, base=preset_base(source, "Q3_K_M", None))


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return sizes_of(1)


@pytest.fixture(scope="module")
def by_layer() -> Sizes:
    return sizes_of(8)


def weight(name: str) -> float:
    """SSM groups are ten times as sensitive; no two groups are alike, so that there are no ties."""
    return (10 if name.startswith("ssm") else 1) * (1 + 0.01 * len(name))


def score(changes: Changes, interaction: float = 0.0) -> Score:
    """Damage falls fourfold with each bit; every changed group may add ``interaction`` of its own."""
    damage = sum(weight(name) * (4.0 ** -BITS[kind] - 4.0 ** -BITS[BASE]) for name, kind in changes.items())
    total = 0.1 + damage + interaction * len(changes)
    return Score(nll=np.full(8, 2.0 + total), kld=np.full(8, total))


def layered(changes: Changes) -> Score:
    """Layer 0 carries nearly all of the damage of Mamba's input; elsewhere layers are alike."""
    damage = 0.0
    for name, kind in changes.items():
        role, layer = name.rsplit(".", 1)
        height = weight(role) * (20 if (role, layer) == ("ssm_in", "0") else 1)
        damage += height * (4.0 ** -BITS[kind] - 4.0 ** -BITS[BASE])
    noise = 1e-6 * np.random.default_rng(len(str(changes))).normal(size=8)
    return Score(nll=2.1 + damage + noise, kld=0.1 + damage + noise)


@pytest.fixture(scope="module")
def points(sizes: Sizes) -> tuple[Point, ...]:
    return measure_curves(sizes, candidates(sizes, K_LADDER), score)


@pytest.fixture(scope="module")
def zoomed(by_layer: Sizes) -> tuple[Point, ...]:
    coarse = measure_curves(by_layer, candidates(by_layer, K_LADDER), layered)
    found = zoom(coarse, by_layer, lambda t: measure_point(t, by_layer, layered, layered({})), 60)
    return (*coarse, *found)


def plan(
    points: tuple[Point, ...], sizes: Sizes, budget: int, interaction: float = 0.0
) -> tuple[BudgetPlan, list[Changes]]:
    planning = budget_plan(points, sizes, budget)
    asked = []
    try:
        changes = next(planning)
        while True:
            asked.append(changes)
            changes = planning.send((score(changes, interaction), score({})))
    except StopIteration as stop:
        return stop.value, asked


def test_the_base_itself_fits_its_own_size_exactly(points: tuple[Point, ...], sizes: Sizes) -> None:
    found, _ = plan(points, sizes, sizes.whole_file_bytes())
    assert found.chosen.n_bytes <= sizes.whole_file_bytes()
    assert found.chosen.predicted < 0, "sparing the sensitive groups must beat the preset at its own size"
    assert {found.chosen.changes[name] for name in ("ssm_in", "ssm_out")} <= {"Q4_K", "Q5_K", "Q6_K", "Q8_0"}


def test_the_base_ships_where_every_change_measures_worse(points: tuple[Point, ...], sizes: Sizes) -> None:
    found, asked = plan(points, sizes, sizes.whole_file_bytes(), interaction=1.0)
    assert asked and found.chosen.changes == {}
    assert found.chosen.how == "the base itself"


def test_never_over_budget_along_the_whole_frontier(points: tuple[Point, ...], sizes: Sizes) -> None:
    curve = frontier(points, sizes, steps=12)
    assert [c.n_bytes for c in curve] == sorted(c.n_bytes for c in curve)
    damages = [c.predicted for c in curve]
    assert all(a >= b - 1e-12 for a, b in pairwise(damages))


def test_unreachable_says_the_nearest_reachable_size(points: tuple[Point, ...], sizes: Sizes) -> None:
    smallest = frontier(points, sizes, steps=2)[0].n_bytes
    with pytest.raises(AnswerIsNo, match=f"{smallest:,} bytes"):
        plan(points, sizes, smallest - 1)
    assert plan(points, sizes, smallest)[0].chosen.n_bytes == smallest


def test_a_plan_of_collapsed_files_is_refused(points: tuple[Point, ...], sizes: Sizes) -> None:
    planning = budget_plan(points, sizes, frontier(points, sizes, steps=2)[0].n_bytes)
    broken = Score(nll=np.full(8, np.nan), kld=np.full(8, np.nan))
    next(planning)
    with pytest.raises(AnswerIsNo, match="collapsed"):
        while True:
            planning.send((broken, score({})))


def test_it_learns_that_demotions_cost_more_together(points: tuple[Point, ...], sizes: Sizes) -> None:
    """Together demotions do four times their sum here: the next proposal demotes less."""
    planning = budget_plan(points, sizes, sizes.whole_file_bytes() - 900_000)
    asked: list[Changes] = []
    try:
        changes = next(planning)
        while True:
            asked.append(changes)
            parts = [score({name: kind}).kld[0] - 0.1 for name, kind in changes.items()]
            total = 0.1 + sum(part * (4 if part > 0 else 1) for part in parts)
            changes = planning.send((Score(nll=np.full(8, total), kld=np.full(8, total)), score({})))
    except StopIteration as stop:
        found: BudgetPlan = stop.value
    assert len({tuple(sorted(changes.items())) for changes in asked}) == len(asked) > 1
    assert found.factors.demotions > 2 and 0.5 < found.factors.promotions < 1.5
    means = [candidate.kld.mean for candidate in found.candidates if candidate.kld]
    assert found.chosen.kld is not None and found.chosen.kld.mean == min(means) < means[0]


def test_json_has_the_contract_and_names_every_group(points: tuple[Point, ...], sizes: Sizes) -> None:
    planned = budget_json(plan(points, sizes, sizes.whole_file_bytes())[0], sizes)
    wanted = {"mode", "budget_bytes", "base", "groups", "predicted_delta_pct", "measured_delta_pct", "ci_pct"}
    assert wanted <= planned.keys()
    assert [row["name"] for row in planned["groups"]] == list(sizes.groups)
    assert planned["file_bytes"] <= planned["budget_bytes"]


def test_gaining_in_one_measure_at_the_cost_of_the_other_is_said(
    points: tuple[Point, ...], sizes: Sizes
) -> None:
    planning = budget_plan(points, sizes, sizes.whole_file_bytes())
    try:
        changes = next(planning)
        while True:
            found = score(changes)
            changes = planning.send((replace(found, nll=score({}).nll + 0.03), score({})))
    except StopIteration as stop:
        assert "higher perplexity" in budget_json(stop.value, sizes)["tradeoff"]


def test_a_rival_of_the_base_itself_is_said_too(points: tuple[Point, ...], sizes: Sizes) -> None:
    """Every change moves away from the source here and lowers the perplexity: the base ships, with a word."""
    planning = budget_plan(points, sizes, sizes.whole_file_bytes())
    try:
        changes = next(planning)
        while True:
            found = score(changes, interaction=1.0)
            changes = planning.send((replace(found, nll=score({}).nll - 0.03), score({})))
    except StopIteration as stop:
        told = budget_json(stop.value, sizes)
    assert told["bytes_saved"] == 0 and "lower perplexity (-2.96%)" in told["tradeoff"]


def test_layers_are_told_apart_only_where_they_differ(zoomed: tuple[Point, ...], by_layer: Sizes) -> None:
    names = [leaf.part.name for leaf in leaves(zoomed, by_layer)]
    assert "ssm_in.0" in names and "ssm_in.1" in names
    assert "ffn_gate_exps" in names and "attn_q" in names, "alike layers stay together"
    shares = {leaf.part.name: leaf.share for leaf in leaves(zoomed, by_layer) if leaf.role.name == "ssm_in"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["ssm_in.0"] == pytest.approx(20 / 23, rel=0.01)


def test_the_curve_of_a_layer_is_its_share_of_the_role(zoomed: tuple[Point, ...], by_layer: Sizes) -> None:
    point = next(p for p in refined(zoomed, by_layer) if (p.part.name, p.kind) == ("ssm_in.0", "Q4_K"))
    truth = layered({"ssm_in.0": "Q4_K"}).kld.mean() - 0.1
    assert point.kld is not None and point.kld.mean == pytest.approx(truth, rel=0.02)
    assert point.n_bytes == by_layer.file_bytes("ssm_in.0", "Q4_K")


def test_a_plan_by_layer_beats_one_by_role(zoomed: tuple[Point, ...], by_layer: Sizes) -> None:
    whole = tuple(p for p in zoomed if p.part in roles(by_layer))
    budget = by_layer.whole_file_bytes()
    found, coarse = (next(budget_plan(tried, by_layer, budget)) for tried in (zoomed, whole))
    assert layered(found).kld.mean() < layered(coarse).kld.mean()


def test_halves_hold_every_layer_once(by_layer: Sizes) -> None:
    for part in roles(by_layer):
        first, second = halves(part, by_layer)
        assert first.groups + second.groups == part.groups
        assert part.n_bytes(BASE, by_layer) == sum(half.n_bytes(BASE, by_layer) for half in (first, second))


def test_the_whole_set_of_curves_costs_two_passes_at_most() -> None:
    for population in (530, 1000, 5000):
        spent = effort(2.0, 72, population)
        assert spent.chunks * (72 + spent.probes + spent.fine) <= 2 * population
        assert spent.chunks >= 8 and spent.probes > 0


def test_iq_types_are_tried_only_beside_what_was_chosen(points: tuple[Point, ...], sizes: Sizes) -> None:
    chosen = [p for p in points if (p.part.name, p.kind) == ("ffn_down_exps", "Q3_K")]
    tried = fine_candidates(points, chosen, sizes)
    assert {(part.name, kind) for part, kind in tried} == {
        ("ffn_down_exps", kind) for kind in ("IQ3_XXS", "IQ3_S", "IQ4_XS")
    }


def test_points_survive_json(zoomed: tuple[Point, ...]) -> None:
    again = [point_from_json(point.as_json()) for point in zoomed]
    assert [p.part for p in again] == [p.part for p in zoomed]
    assert [p.damage(PPL) and p.damage(PPL).mean for p in again] == [
        p.damage(PPL) and p.damage(PPL).mean for p in zoomed
    ]


@pytest.mark.parametrize("spans", [1, 8])
def test_predicted_bytes_are_the_bytes_of_the_file(tmp_path: Path, spans: int) -> None:
    from cerebellum.build import build

    source, sizes = open_source(DEMO_MODEL), sizes_of(spans)
    wanted = {"ssm_in": "Q5_K", "ffn_down_exps": "Q2_K", "attn_k": "Q4_K"}
    parts = {part.name: part for part in roles(sizes)}
    changes = {name: kind for role, kind in wanted.items() for name in parts[role].groups[-2:]}
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
