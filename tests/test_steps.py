"""Steps around a whole plan: where parts do not add up they find what the sum of the parts cannot know."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import numpy as np
import pytest
from synthetic import CHUNKS, TrueSession, Truth, by_layer

from cerebellum.codec import as_json, read_artifact, write_artifact
from cerebellum.layout import Layout
from cerebellum.measure.artifacts import Curves
from cerebellum.measure.curves import Score, WholeAsk
from cerebellum.measure.probe import Session
from cerebellum.plan import budget
from cerebellum.plan.artifacts import BudgetPlan
from cerebellum.plan.budget import Decision, budget_plan, plan_budget
from cerebellum.plan.damage import DamageModel
from cerebellum.plan.steps import CHEAPER, FINER, OTHER, Cells, LocalDamage, is_off, parts_of, steps_around
from cerebellum.plan.target import Target
from cerebellum.settings import FINE_LADDER, KLD, PPL
from cerebellum.stats.estimate import Estimate
from cerebellum.verdicts import drive

LESS = 900_000
"""Bytes below the base's file, where damages are large."""


class Interacting(Truth):
    """Damages that do not add up: roles add to each other's by pairs, and IQ types by their amplitudes.

    Alone beside the anchor, every part does what it does in ``Truth``. A chunk's noise is a sum over groups, so that
    plans which have most in common differ by little noise.
    """

    def __init__(self, layout: Layout, cross: float = 0.7, seed: int = 0) -> None:
        self.cross = cross
        self.pairs = np.random.default_rng(seed).uniform(size=(64, 64)) ** 3
        super().__init__(layout)

    def damage(self, changes: dict[str, str], factors: object = None) -> float:
        own = self.own(changes)
        roles: dict[str, float] = {}
        for name, damage in own.items():
            role = self.layout.groups[name].role
            roles[role] = roles.get(role, 0.0) + damage
        amplitudes = np.sqrt([roles[role] for role in sorted(roles)])
        mixed = float(amplitudes @ np.triu(self.pairs[: len(roles), : len(roles)], 1) @ amplitudes)
        fine = sum(np.sqrt(damage) for name, damage in own.items() if changes.get(name) in FINE_LADDER)
        return sum(own.values()) + self.cross * (mixed + fine**2 / 15)

    def own(self, changes: dict[str, str]) -> dict[str, float]:
        """The damage of every group alone."""
        return {
            name: max(self.sensitivity(name) * self.errors.above(name, changes.get(name)), 0.0)
            for name in self.layout.groups
        }

    def score(self, changes: dict[str, str], n: int = CHUNKS, factors: object = None) -> Score:
        hardness = np.random.default_rng(0).normal(1, 0.2, CHUNKS)
        noise = np.zeros(CHUNKS)
        for name, damage in self.own(changes).items():
            seed = zlib.crc32(f"{name} {changes.get(name)}".encode())
            noise += np.sqrt(damage) * np.random.default_rng(seed).normal(size=CHUNKS)
        whole = self.damage(changes)
        chunks = (whole * hardness / hardness.mean() + 0.1 * np.sqrt(whole) * noise)[:n]
        return Score(nll=2.0 + chunks, kld=0.001 + chunks)


@dataclass(kw_only=True)
class Asked:
    """Answers from a truth, and remembers what was asked for."""

    truth: Truth
    asks: list[WholeAsk] = field(default_factory=list)

    def __call__(self, ask: WholeAsk) -> Score:
        self.asks.append(ask)
        return self.truth.score(ask.changes, ask.n or CHUNKS)


@pytest.fixture(scope="module")
def truth() -> Interacting:
    return Interacting(by_layer())


@pytest.fixture(scope="module")
def curves(truth: Interacting) -> Curves:
    return truth.curves()


@pytest.fixture(scope="module")
def model(truth: Interacting) -> DamageModel:
    return truth.model()


def decided(model: DamageModel, truth: Truth, asked: Asked | None = None, affordable: int = 1000) -> Decision:
    size = truth.layout.file_bytes() - LESS
    planning = budget_plan(model, truth.reference(), size, affordable=affordable)
    return drive(planning, asked or Asked(truth=truth))


@pytest.fixture(scope="module")
def stepped(model: DamageModel, truth: Interacting) -> Decision:
    return decided(model, truth)


def test_steps_find_a_better_plan_where_lessons_find_none(
    model: DamageModel, truth: Interacting, stepped: Decision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "is_off", lambda *_: False)
    taught = decided(model, truth)
    without, found = (truth.damage(dict(each.chosen.changes)) for each in (taught, stepped))
    assert stepped.steps and not taught.steps
    assert found < 0.95 * without
    later = [
        truth.damage(dict(each.changes)) for each in stepped.proposals[2:] if each.how.startswith("steps")
    ]
    assert max(later) < min(truth.damage(dict(each.changes)) for each in taught.proposals[2:] if each.changes)


def test_what_steps_foretell_is_nearer_than_the_sum_of_the_parts(stepped: Decision) -> None:
    for proposal in stepped.proposals:
        measured, foretold, predicted = (
            proposal.measured(KLD),
            proposal.foretold(KLD),
            proposal.predicted(KLD),
        )
        if proposal.how.startswith("steps"):
            assert measured is not None and foretold is not None and predicted is not None
            assert abs(measured.mean - foretold) < 0.5 * abs(measured.mean - predicted)


def test_no_steps_are_taken_where_damages_add_up() -> None:
    truth = Truth(by_layer())
    asked = Asked(truth=truth)
    assert decided(truth.model(), truth, asked).steps == ()
    assert all(ask.n is None for ask in asked.asks)


def test_steps_cost_what_they_may_and_each_is_asked_for_once(model: DamageModel, truth: Interacting) -> None:
    asked = Asked(truth=truth)
    affordable = 10 * CHUNKS
    found = decided(model, truth, asked, affordable)
    of_steps = [ask for ask in asked.asks if ask.n is not None]
    rounds = {step.around.how for step in found.steps}
    assert len(of_steps) == len(found.steps) <= 10 * len(rounds)
    assert {ask.n for ask in of_steps} == {CHUNKS}
    assert of_steps[3].doing == "steps around the best plan, 4 of 10: "
    keys = [tuple(sorted(ask.changes.items())) for ask in asked.asks]
    assert len(set(keys)) == len(keys)


def test_a_step_moves_one_part_one_type(model: DamageModel, stepped: Decision) -> None:
    around = stepped.proposals[1]
    parts = parts_of(model, around, KLD)
    assert len(parts) == model.observed.method.step_parts
    assert sorted(name for part in parts for name in part.groups) == sorted(model.observed.groups)
    here = {point.group: point for point in around.points}
    for step in steps_around(model, around, parts, KLD):
        assert set(step.points) <= set(step.part.groups)
        for name, point in step.points.items():
            before = here[name]
            if step.way == OTHER:
                assert point.type in FINE_LADDER, "from K-quants alone"
            else:
                assert point.type not in FINE_LADDER
                assert (point.bytes > before.bytes) == (step.way == FINER) != (step.way == CHEAPER)


def test_a_collapsed_step_teaches_nothing_and_breaks_nothing(model: DamageModel, truth: Interacting) -> None:
    def answer(ask: WholeAsk) -> Score:
        score = truth.score(dict(ask.changes), ask.n or CHUNKS)
        return score if ask.n is None else replace(score, kld=score.kld * np.nan)

    size = truth.layout.file_bytes() - LESS
    found = drive(budget_plan(model, truth.reference(), size), answer)
    assert found.steps and all(step.effect is not None and step.effect.kld is None for step in found.steps)


def test_a_part_that_counts_three_times_is_known_by_its_steps(model: DamageModel, stepped: Decision) -> None:
    """Only the row of a step of one part is given: its factor is learned, that of the others hardly."""
    step = next(step for step in stepped.steps if step.way == CHEAPER)
    assert step.effect is not None and step.effect.kld is not None
    thrice = replace(step.effect.kld, mean=3 * (step.after - step.before), se=1e-6)
    step = replace(step, effect=msgspec.structs.replace(step.effect, kld=thrice))
    cells = Cells.of_parts(model, parts_of(model, step.around, KLD), KLD)
    search = budget.Search(base=cast(Score, None), reference=cast(budget.Reference, None))
    local = LocalDamage.of(cells, search, step.around, [step])
    moved = cells.of_plan(step.changes) - cells.of_plan(step.around.changes)
    assert float(local.factors @ moved) == pytest.approx(3 * moved.sum(), rel=0.1)
    others = [
        factor for (part, _), factor in zip(cells.of, local.factors, strict=True) if part != step.part.name
    ]
    assert max(others) < 2.5
    assert not is_off(search, KLD, model.observed.method), "nothing was measured"


@pytest.mark.parametrize("above", [-0.05, 0.05])
def test_what_its_parts_foretold_is_not_off_whatever_the_sign_of_the_damage(
    model: DamageModel, above: float
) -> None:
    """By perplexity a text that the source does not know can get better."""
    foretold = SimpleNamespace(
        measured=lambda _: Estimate(mean=0.01, se=0.0025, n=96), predicted=lambda _: 0.01
    )
    search = SimpleNamespace(proposals=[foretold], above_anchor=lambda *_: above)
    assert not is_off(cast(budget.Search, search), PPL, model.observed.method)


def test_steps_are_in_plan_json_and_a_plan_without_them_is_read(
    curves: Curves, truth: Interacting, tmp_path: Path
) -> None:
    target = Target(file_bytes=truth.layout.file_bytes() - LESS)
    plan = plan_budget(curves, cast(Session, TrueSession.of(truth)), target)
    path = tmp_path / "plan.json"
    write_artifact(path, plan)
    assert plan.steps and read_artifact(path, BudgetPlan, "plan again") == plan
    for row in plan.steps:
        assert plan.candidates[row.around].changes and row.chunks == CHUNKS
        assert row.kld_ci is not None and row.measured_kld is not None
    older = as_json(plan)
    del older["steps"]
    path.write_text(json.dumps(older), encoding="utf-8")
    assert read_artifact(path, BudgetPlan, "plan again").steps == ()
