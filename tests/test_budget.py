"""Budget planning without a model: what it proposes, ships and refuses; bytes exact to the file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cerebellum.base import preset_base
from cerebellum.budget import budget_json, budget_plan, frontier
from cerebellum.curves import BASE, K_LADDER, Point, Score, candidates, measure_curves
from cerebellum.errors import AnswerIsNo
from cerebellum.groups import make_groups
from cerebellum.ledger import Ledger
from cerebellum.plan import Sizes
from cerebellum.shards import Recipe, Shards
from cerebellum.source import open_source
from cerebellum.sweep import Changes
from cerebellum.workspace import DEMO_MODEL

BITS = {BASE: 3.4, "Q2_K": 2.6, "Q3_K": 3.4, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.6, "Q8_0": 8.5}


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    source = open_source(DEMO_MODEL)
    groups = {g.name: g for g in make_groups(source) if not g.protected}
    return Sizes(tensors=source.tensors, groups=groups, base=preset_base(source, "Q3_K_M", None))


def weight(name: str) -> float:
    """SSM groups are ten times as sensitive; no two groups are alike, so that there are no ties."""
    return (10 if name.startswith("ssm") else 1) * (1 + 0.01 * len(name))


def score(changes: Changes, interaction: float = 0.0) -> Score:
    """Damage falls fourfold with each bit; every changed group may add ``interaction`` of its own."""
    damage = sum(weight(name) * (4.0 ** -BITS[kind] - 4.0 ** -BITS[BASE]) for name, kind in changes.items())
    total = 0.1 + damage + interaction * len(changes)
    return Score(nll=np.full(8, 2.0 + total), kld=np.full(8, total))


@pytest.fixture(scope="module")
def points(sizes: Sizes) -> tuple[Point, ...]:
    return measure_curves(sizes, candidates(sizes, K_LADDER), score)


def plan(points: tuple[Point, ...], sizes: Sizes, budget: int, interaction: float = 0.0):
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
    assert found.chosen.damage < 0, "sparing the sensitive groups must beat the preset at its own size"
    assert {found.chosen.changes[name] for name in ("ssm_in", "ssm_out")} <= {"Q4_K", "Q5_K", "Q6_K", "Q8_0"}


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


def test_a_misprediction_makes_it_look_at_runners_up(points: tuple[Point, ...], sizes: Sizes) -> None:
    budget = sizes.whole_file_bytes()
    assert len(plan(points, sizes, budget)[1]) == 1
    found, asked = plan(points, sizes, budget, interaction=0.001)
    assert len(asked) == 4
    assert found.chosen.damage == min(candidate.damage for candidate in found.candidates)


def test_json_has_the_contract_and_names_every_group(points: tuple[Point, ...], sizes: Sizes) -> None:
    planned = budget_json(plan(points, sizes, sizes.whole_file_bytes())[0], sizes)
    wanted = {"mode", "budget_bytes", "base", "groups", "predicted_delta_pct", "measured_delta_pct", "ci_pct"}
    assert wanted <= planned.keys()
    assert [row["name"] for row in planned["groups"]] == list(sizes.groups)
    assert planned["file_bytes"] <= planned["budget_bytes"]


def test_predicted_bytes_are_the_bytes_of_the_file(tmp_path: Path, sizes: Sizes) -> None:
    from cerebellum.build import build

    source = open_source(DEMO_MODEL)
    changes = {"ssm_in": "Q5_K", "ffn_down_exps": "Q2_K", "attn_k": "Q4_K"}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        recipe = Recipe(
            source=source,
            base=sizes.base,
            matrix=None,
            groups=make_groups(source),
            folder=tmp_path / "shards",
            threads=1,
        )
        for tried in ({}, changes):
            out = tmp_path / "out.gguf"
            build(source, sizes.base, Shards(recipe, ledger), tried, out)
            assert out.stat().st_size == sizes.whole_file_bytes(tried)
