"""Planning without a model: bytes a hand can derive, and combinations that hold or are not shipped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import (
    MATRIX_Q2,
    MATRIX_Q3,
    Bench,
    T,
    hybrid_base,
    hybrid_shapes,
    measure_fixed,
    measured,
    run_sweep,
    write_hybrid,
)

from cerebellum import codec
from cerebellum.errors import BadInput
from cerebellum.groups import make_groups
from cerebellum.layout import Layout
from cerebellum.measure.artifacts import MeasurementRow, read_recorded
from cerebellum.plan.effort import Effort
from cerebellum.plan.foretold import Belief, Foretold, Part, frontier
from cerebellum.plan.limit import (
    Chosen,
    Trial,
    Unit,
    limit_plan,
    make_units,
    plan_from,
    threshold_plan,
)
from cerebellum.settings import Limit
from cerebellum.source import open_source
from cerebellum.stats.paired import Interval, as_nats, as_percent
from cerebellum.verdicts import SET_ASIDE, Measurement, Threshold, drive

LIMIT_PCT = 3.0
THRESHOLD = Threshold(limit_pct=LIMIT_PCT)
ASKED = Limit(max_increase_pct=LIMIT_PCT, indifference_pct=0.0)
LIMIT = as_nats(LIMIT_PCT)

Combination = Mapping[str, str]


def as_json(value: Any) -> Any:
    """What a reader of the file sees: lists, no tuples."""
    return json.loads(json.dumps(codec.as_json(value), allow_nan=False))


def unit(name: str, mean: float | None, n_bytes: int) -> Unit:
    changes = {name: "Q2_K"}
    return Unit(changes=changes, bytes_saved=n_bytes, measurement=measured(changes, mean))


def followed(
    units: tuple[Unit, ...], answer: Callable[[Combination], Measurement | None]
) -> tuple[Chosen, list[Combination]]:
    """Runs the planning to its end; every combination it asked for."""
    asked: list[Combination] = []

    def recorded(trial: Trial) -> Measurement | None:
        asked.append(trial.changes)
        return answer(trial.changes)

    return drive(threshold_plan(units, THRESHOLD), recorded), asked


def additive(units: tuple[Unit, ...], factor: float = 1.0) -> Callable[[Combination], Measurement]:
    parts = {name: u.measurement.delta.mean for u in units if u.measurement.delta for name in u.changes}
    return lambda changes: measured(changes, factor * sum(parts[name] for name in changes))


def test_groups_under_the_limit_go_down_together() -> None:
    units = (unit("a", 0.01, 100), unit("b", 0.015, 100), unit("c", 0.2, 100))
    plan, asked = followed(units, additive(units))
    assert asked == [{"a": "Q2_K", "b": "Q2_K"}]
    assert plan.changes == {"a": "Q2_K", "b": "Q2_K"}
    assert plan.measured is not None and plan.measured.delta.mean == pytest.approx(0.025)
    assert plan.predicted_nats == pytest.approx(0.025)


def test_a_sum_that_foretells_an_overshoot_is_never_tried() -> None:
    """Together they are far over the limit; without the costliest byte they hold."""
    units = (unit("a", 0.012, 100), unit("b", 0.014, 1000), unit("c", 0.009, 500))
    plan, asked = followed(units, additive(units))
    assert [set(combination) for combination in asked] == [{"b", "c"}]
    assert set(plan.changes) == {"b", "c"}


def test_a_whole_worse_than_its_parts_makes_the_next_smaller() -> None:
    units = tuple(unit(name, 0.007, 100 + place) for place, name in enumerate("abcd"))
    plan, asked = followed(units, additive(units, 1.5))
    assert len(asked[0]) > len(plan.changes) == 2
    assert plan.measured is not None and plan.measured.delta.mean == pytest.approx(0.021)


def test_the_limit_is_spent() -> None:
    """Where the whole is better than its parts, more is tried until the limit has no room."""
    units = tuple(unit(name, 0.009, 100) for name in "abcd")
    plan, asked = followed(units, additive(units, 0.7))
    assert len(plan.changes) == 4 and asked[-1] == plan.changes
    assert [len(combination) for combination in asked] == sorted(len(c) for c in asked)


def test_a_combination_that_never_holds_leaves_what_was_measured_alone() -> None:
    units = tuple(unit(name, 0.01, n_bytes) for name, n_bytes in zip("abc", (10, 30, 20), strict=True))
    plan, asked = followed(units, lambda changes: measured(changes, 1.0))
    assert all(len(combination) > 1 for combination in asked)
    assert set(plan.changes) == {"b"} and plan.measured == units[1].measurement


def test_a_combination_that_collapses_is_left() -> None:
    units = (unit("a", 0.01, 200), unit("b", 0.01, 100))
    plan, asked = followed(units, lambda changes: measured(changes, None))
    assert set(plan.changes) == {"a"} and len(asked) == 1


def test_a_group_that_collapsed_alone_is_never_tried() -> None:
    units = (unit("a", None, 100), unit("b", 0.01, 100))
    plan, asked = followed(units, additive(units))
    assert asked == [] and set(plan.changes) == {"b"}  # b was measured alone: that is the combination


def test_at_the_limit_is_not_under_it() -> None:
    plan, asked = followed((unit("a", LIMIT, 100),), lambda changes: measured(changes, 0.0))
    assert asked == [] and plan.changes == {}


def test_no_groups_no_questions() -> None:
    plan, asked = followed((), lambda changes: None)
    assert asked == [] and plan.changes == {} and plan.measured is None


def test_what_was_set_aside_never_ships() -> None:
    """It may have looked better than the limit when it was left."""
    units = (unit("a", 0.01, 100), unit("b", 0.01, 100))
    aside = replace(measured({"a": "Q2_K", "b": "Q2_K"}, 0.02, half=0.02), set_aside=True)
    plan, asked = followed(units, lambda changes: aside)
    assert len(asked) == 1 and len(plan.changes) == 1
    assert aside.verdict(THRESHOLD) == SET_ASIDE


def spread_out(name: str, mean: float, n_bytes: int, se: float = 0.004, n: int = 20) -> Unit:
    """A group on some chunks of 500."""
    delta = Interval(mean=mean, low=mean - 3 * se, high=mean + 3 * se, n=n, population=500, se=se)
    kld = Interval(mean=mean / 0.8, low=0.0, high=1.0, n=8, population=500)
    changes = {name: "Q2_K"}
    found = Measurement(changes=changes, delta=delta, kld=kld)
    return Unit(changes=changes, bytes_saved=n_bytes, measurement=found)


def first_trial(units: tuple[Unit, ...]) -> Trial:
    return next(threshold_plan(units, THRESHOLD))


def test_a_few_bytes_are_not_worth_the_chunks_of_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """a and c save 5% more than a and b, and would take several times the chunks."""
    units = tuple(
        spread_out(name, mean, n_bytes, se=1e-3, n=400)
        for name, mean, n_bytes in (("a", 0.008, 1000), ("b", 0.008, 1000), ("c", 0.014, 1100))
    )
    assert set(first_trial(units).changes) == {"a", "b"}
    monkeypatch.setattr("cerebellum.plan.limit._PRICE", 1e-9)
    assert set(first_trial(units).changes) == {"a", "c"}


def test_what_a_combination_is_worth_is_what_the_next_best_lacks() -> None:
    """Where nothing else is as good as sure, all that it gains is at stake; with a near twin, little."""
    alone = (spread_out("a", 0.010, 1000), spread_out("b", 0.012, 1000))
    twin = (spread_out("a", 0.010, 1000), spread_out("b", 0.0101, 1000), spread_out("c", 0.0099, 990))
    assert first_trial(alone).worth > 5 * first_trial(twin).worth > 0


def test_after_two_tries_only_what_was_measured_is_a_fallback() -> None:
    """One after the other would else be left for the next, on the first chunks that all of them share."""
    units = tuple(spread_out(name, 0.006, 1000 - place) for place, name in enumerate("abcdef"))
    plan = threshold_plan(units, THRESHOLD)
    trial = next(plan)
    worth = [trial.worth]
    for _ in range(2):
        damage = 0.0075 * len(trial.changes)
        trial = plan.send(replace(measured(trial.changes, damage, half=0.01), set_aside=True))
        worth.append(trial.worth)
    assert worth[2] > 2 * max(worth[:2])


def test_more_chunks_are_foretold_of_what_lies_closer_and_those_read_are_the_bases() -> None:
    parts = [part.measurement.delta for part in (spread_out("a", 0.01, 1), spread_out("b", 0.01, 1))]
    effort = Effort([delta for delta in parts if delta], THRESHOLD)
    both = np.ones(2, np.bool_)

    def chunks(mean: float) -> float:
        return effort.chunks(both, Belief(mean=mean, sd=1e-4))

    far, near = chunks(LIMIT - 0.012), chunks(LIMIT - 0.004)
    assert 4 <= far < near < chunks(LIMIT) <= 1000  # to the end, and the base with it
    read = Interval(mean=0.02, low=0.01, high=0.03, n=400, population=500)
    effort.learn(both, read)
    assert chunks(LIMIT - 0.004) == pytest.approx(near / 2)


def test_what_hands_wrote_down_is_planned_as_it_was_published() -> None:
    """Without chunks nothing tells how sure a number is: all that the limit allows, together."""
    units = tuple(
        Unit(changes={name: "Q2_K"}, bytes_saved=100, measurement=measured({name: "Q2_K"}, 0.02, n=0))
        for name in "ab"
    )
    plan, asked = followed(units, lambda changes: None)
    assert len(asked) == 1 and set(plan.changes) == {"a", "b"} and plan.measured is None


DAMAGE = st.one_of(st.none(), st.floats(-0.05, 0.1))
UNITS = st.lists(st.tuples(DAMAGE, st.integers(1, 10**9)), max_size=8)


@given(UNITS, st.lists(DAMAGE, min_size=12, max_size=12))
@example(rows=[(0.0, 1), (2.8e-155, 1)], answers=[0.0625] + [None] * 11)  # its square is no normal number
@settings(max_examples=300, deadline=None)
def test_nothing_ships_that_was_measured_at_or_over_the_limit(
    rows: list[tuple[float | None, int]], answers: list[float | None]
) -> None:
    """Whatever the engine answers: the planning ends, and what ships was measured as it ships."""
    units = tuple(unit(f"g{i}", mean, n_bytes) for i, (mean, n_bytes) in enumerate(rows))
    left = iter(answers)
    plan, asked = followed(units, lambda changes: measured(changes, next(left)))
    assert len(asked) <= 12
    assert all(len(combination) > 1 for combination in asked)
    assert all(one not in asked[:place] for place, one in enumerate(asked))
    under = {n for u in units if u.measurement.delta and u.measurement.delta.mean < LIMIT for n in u.changes}
    assert set(plan.changes) <= under
    if under:
        assert plan.measured is not None and plan.measured.delta is not None
        assert plan.measured.changes == plan.changes
        assert plan.measured.delta.mean < LIMIT


@given(UNITS)
@settings(max_examples=150, deadline=None)
def test_planning_again_from_what_was_measured_ends_the_same(rows: list[tuple[float | None, int]]) -> None:
    units = tuple(unit(f"g{i}", mean, n_bytes) for i, (mean, n_bytes) in enumerate(rows))
    whole = additive(units, 1.2)
    plan, asked = followed(units, whole)
    again = drive(threshold_plan(units, THRESHOLD, [whole(changes) for changes in asked]), lambda trial: None)
    assert again.changes == plan.changes


# ---- what is foretold ----


def part(mean: float, se: float, kld: float | None = None, n: int = 8) -> Part:
    delta = Interval(mean=mean, low=mean - 2 * se, high=mean + 2 * se, n=n, population=500, se=se)
    return Part(delta=delta, kld=kld)


def test_divergence_corrects_what_few_chunks_say() -> None:
    """The demo's attn_q reads -0.14% on 8 chunks; its divergence says that it does harm."""
    foretold = Foretold(
        [part(-0.0014, 0.002, 0.0024), part(0.0106, 0.003, 0.0117), part(0.017, 0.003, 0.042)]
    )
    assert 0 < foretold.parts[0] < 0.0024
    assert foretold.parts[1] == pytest.approx(0.0106, abs=0.002)


def test_a_measured_whole_rescales_its_parts() -> None:
    foretold = Foretold([part(0.01, 0.002, 0.012) for _ in range(4)])
    everything = np.ones(4, np.bool_)
    before = foretold.of(everything).under(0.04)
    foretold.learn(everything, part(0.06, 0.001).delta)
    assert foretold.parts.sum() == pytest.approx(0.06, rel=0.1)
    assert foretold.of(everything).under(0.04) < 0.01 < before


@given(st.lists(st.tuples(st.floats(-0.01, 0.05), st.integers(1, 1000)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_frontier_saves_what_an_enumeration_saves(items: list[tuple[float, int]]) -> None:
    """Within the rounding of damages to a four-hundredth of the most."""
    damages, saved = [d for d, _ in items], [n for _, n in items]
    most = 0.04
    found = frontier(damages, saved, most)
    masks = [np.array([i >> k & 1 for k in range(len(items))], np.bool_) for i in range(2 ** len(items))]
    spare = most * (1 - len(items) / 800)
    counted = np.maximum(damages, 0.0)
    best = max(int(np.dot(mask, saved)) for mask in masks if counted[mask].sum() <= spare)
    assert max((int(np.dot(mask, saved)) for mask in found), default=0) >= best
    assert all(counted[mask].sum() <= most * (1 + len(items) / 800) for mask in found)


# ---- bytes ----


def test_bytes_that_a_hand_can_derive(bench: Bench) -> None:
    """A 256-element block has 110 bytes at Q3_K and 84 at Q2_K; two layers of experts are four matrices."""
    layout = bench.layout
    assert layout.raw_bytes("ssm_in") == MATRIX_Q3 == 28_160
    assert layout.raw_bytes("ssm_in", "Q2_K") == MATRIX_Q2 == 21_504
    assert layout.bytes_saved({"ssm_in": "Q2_K"}) == 6_656
    assert layout.bytes_saved({"ffn_gate_exps": "Q2_K", "ssm_in": "Q2_K"}) == 5 * 6_656
    # 4 + 4 routed, 2 shared, ssm_in, attn_q at Q3_K; embeddings F16; the rest F32
    plain = 2 * 300 * 256 + 4 * (5 * 256 + 2 * 2 * 256 + 8)
    assert layout.tensor_bytes({}) == 12 * MATRIX_Q3 + plain
    assert layout.tensor_bytes({"ssm_in": "Q2_K"}) == layout.tensor_bytes({}) - 6_656


def test_what_saves_nothing_or_does_not_fit_is_no_candidate(tmp_path: Path) -> None:
    shapes = {**hybrid_shapes(), "blk.1.attn_q.weight": (576, 4)}
    source = open_source(write_hybrid(tmp_path / "odd.gguf", shapes))
    groups = {g.name: g for g in make_groups(source) if not g.protected}
    layout = Layout(tensors=source.tensors, groups=groups, base=hybrid_base(source))
    assert {"attn_q": "Q2_K"} not in layout.demotions("Q2_K")
    assert {"ssm_in": "Q2_K"} in layout.demotions("Q2_K")
    assert layout.why_not("attn_q", "Q2_K") == "illegal"
    assert layout.why_not("ssm_in", "Q4_K") == "nothing to save"
    assert layout.why_not("ssm_in", "Q3_K") == "nothing to save"
    assert layout.demotions("Q6_K") == [{"attn_q": "Q6_K"}] or layout.demotions("Q6_K") == []
    plan = plan_from([measured({"ssm_in": "Q2_K"}, 0.01)], layout, ASKED)
    rows = {row["name"]: row for row in as_json(limit_plan(plan, layout, ASKED))["groups"]}
    assert rows["attn_q"]["verdict"] == "illegal" and rows["attn_q"]["bytes_saved"] == 0
    assert rows["attn_q"]["decision"] == "kept" and rows["ssm_in"]["decision"] == "demoted"
    assert as_json(limit_plan(plan, layout, ASKED))["tensor_types"]["blk.1.attn_q.weight"] == T.F16.name


# ---- joint and single measurements ----


def test_a_joint_measurement_goes_down_together_or_not_at_all(bench: Bench) -> None:
    joint = measured({"ssm_in": "Q2_K", "attn_q": "Q2_K"}, 0.02)
    alone = measured({"ffn_gate_exps": "Q2_K"}, 0.5)
    plan = plan_from([joint, alone], bench.layout, ASKED)
    assert set(plan.changes) == {"ssm_in", "attn_q"} and plan.measured == joint
    found = as_json(limit_plan(plan, bench.layout, ASKED))
    rows = {row["name"]: row for row in found["groups"]}
    assert rows["ssm_in"]["measured_with"] == ["attn_q"]
    assert rows["ssm_in"]["bytes_saved"] == 6_656
    assert rows["ffn_down_exps"]["verdict"] == "not measured"
    assert found["measured_delta_pct"] == pytest.approx(as_percent(0.02))


def test_groups_measured_alone_are_planned_alone(bench: Bench) -> None:
    both = [
        measured({"ssm_in": "Q2_K", "attn_q": "Q2_K"}, 0.029),
        measured({"ssm_in": "Q2_K"}, 0.01),
        measured({"attn_q": "Q2_K"}, 0.01),
    ]
    assert [dict(u.changes) for u in make_units(both, bench.layout)] == [
        {"ssm_in": "Q2_K"},
        {"attn_q": "Q2_K"},
    ]
    plan = plan_from(both, bench.layout, ASKED)
    assert plan.measured == both[0] and set(plan.changes) == {"ssm_in", "attn_q"}


def test_a_combination_that_nobody_measured_says_so(bench: Bench) -> None:
    singles = [measured({"ssm_in": "Q2_K"}, 0.01), measured({"attn_q": "Q2_K"}, 0.01)]
    found = as_json(limit_plan(plan_from(singles, bench.layout, ASKED), bench.layout, ASKED))
    assert found["measured_delta_pct"] is None and found["ci_pct"] is None
    assert found["predicted_delta_pct"] == pytest.approx(as_percent(0.02))


CONTRACT = {"mode", "threshold_pct", "base", "groups", "predicted_delta_pct", "measured_delta_pct", "ci_pct"}
GROUP_CONTRACT = {
    "name",
    "tensors",
    "base_type",
    "chosen_type",
    "bytes_saved",
    "delta_pct",
    "ci_pct",
    "chunks",
    "verdict",
}


def test_plan_json_keeps_its_contract(bench: Bench) -> None:
    measurements = [measured({"ssm_in": "Q2_K"}, 0.01), measured({"attn_q": "Q2_K"}, None)]
    found = as_json(limit_plan(plan_from(measurements, bench.layout, ASKED), bench.layout, ASKED))
    assert set(found) >= CONTRACT
    assert all(set(row) >= GROUP_CONTRACT for row in found["groups"])
    assert found["mode"] == "threshold" and found["threshold_pct"] == LIMIT_PCT
    rows = {row["name"]: row for row in found["groups"]}
    assert rows["attn_q"]["verdict"] == "collapsed" and rows["attn_q"]["delta_pct"] is None
    assert rows["ssm_in"]["chosen_type"] == "Q2_K" and rows["attn_q"]["chosen_type"] == "base"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# ---- from the engine to the plan ----


def test_on_the_fake_engine_the_tolerant_are_demoted_and_the_whole_is_measured(bench: Bench) -> None:
    """0.01 + 0.05 nats would be over 3%; 0.01 alone holds. ssm_in and ffn_down_exps never come up."""
    layout, chunks = bench.layout, tuple(range(6))
    ledger, measurer, shards = bench.session()
    with ledger:
        singles = run_sweep(measure_fixed(layout.demotions("Q2_K"), chunks, 20), measurer, shards)
        units = make_units(singles, layout)
        plan, asked = followed(
            units, lambda c: run_sweep(measure_fixed([c], chunks, 20), measurer, shards)[0]
        )
        measurer.close()
    assert set(plan.changes) == {"ffn_gate_shexp", "attn_q"}
    assert len(asked) == 1
    assert plan.measured is not None and plan.measured.delta.mean == pytest.approx(0.01, rel=0.1)
    assert set(bench.engine.scored.values()) == {1}


# ---- measurements.json ----


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_measurements_are_read_as_a_hand_writes_them(tmp_path: Path) -> None:
    rows = [
        {"groups": ["a", "b"], "type": "q2_k", "delta_pct": 1.9},
        {"groups": ["c"], "type": "Q2_K", "delta_pct": -0.5, "ci_pct": [-1, 0.1], "chunks": 9},
        {"groups": ["d"], "type": "Q2_K", "delta_pct": None, "verdict": "collapsed"},
    ]
    joint, single, gone = read_recorded(written(tmp_path / "m.json", {"measurements": rows}))
    assert joint.changes == {"a": "Q2_K", "b": "Q2_K"} and joint.delta.mean == pytest.approx(as_nats(1.9))
    assert (single.delta.low, single.delta.n) == (pytest.approx(as_nats(-1)), 9)
    assert gone.delta is None


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        {},
        {"measurements": [{"groups": ["a"], "type": "Q2_K"}]},
        {"measurements": [{"type": "Q2_K", "delta_pct": 1}]},
        {"measurements": [{"groups": ["a"], "type": "Q2_K", "delta_pct": "much"}]},
        {"measurements": [{"groups": ["a"], "type": "Q2_K", "delta_pct": None}]},
        {"measurements": [{"groups": ["a"], "type": "Q9_Z", "delta_pct": 1}]},
        {"measurements": [{"groups": ["a"], "type": "Q2_K", "delta_pct": -100}]},
    ],
)
def test_measurements_that_are_none_are_refused_in_a_line(tmp_path: Path, content: Any) -> None:
    with pytest.raises(BadInput) as caught:
        read_recorded(written(tmp_path / "m.json", content))
    assert len(str(caught.value).splitlines()) == 1


def test_a_group_that_the_model_lacks_is_refused_by_name(bench: Bench) -> None:
    with pytest.raises(BadInput, match="ffn_nowhere"):
        plan_from([measured({"ffn_nowhere": "Q2_K"}, 0.01)], bench.layout, ASKED)


def test_a_measurement_at_an_illegal_type_is_refused(tmp_path: Path) -> None:
    shapes = {**hybrid_shapes(), "blk.1.attn_q.weight": (576, 4)}
    source = open_source(write_hybrid(tmp_path / "odd.gguf", shapes))
    groups = {g.name: g for g in make_groups(source) if not g.protected}
    layout = Layout(tensors=source.tensors, groups=groups, base=hybrid_base(source))
    with pytest.raises(BadInput, match="576"):
        plan_from([measured({"attn_q": "Q2_K"}, 0.01)], layout, ASKED)


def test_measurements_come_back_whole(tmp_path: Path) -> None:
    """Planning reads measurements.json and writes it again: trace, divergence and agreement stay."""
    row = {
        "groups": ["ssm_in"],
        "type": "Q2_K",
        "delta_pct": 1.5,
        "ci_pct": [1.0, 2.0],
        "chunks": 12,
        "verdict": "tolerant",
        "near_tie": False,
        "kld_mean": 0.006,
        "kld_ci": [0.005, 0.007],
        "top1_agreement": 0.91,
        "trace": [
            {"delta_pct": 1.25, "ci_pct": None, "chunks": 1},
            {"delta_pct": 1.5, "ci_pct": [1.0, 2.0], "chunks": 12},
        ],
    }
    path = tmp_path / "measurements.json"
    path.write_text(json.dumps({"measurements": [row]}))
    (found,) = read_recorded(path)
    again = as_json(MeasurementRow.of_measurement(found, Threshold(limit_pct=3.0)))
    assert {key: again[key] for key in row if key not in ("delta_pct", "ci_pct", "trace")} == {
        key: row[key] for key in row if key not in ("delta_pct", "ci_pct", "trace")
    }
    assert again["ci_pct"] == pytest.approx(row["ci_pct"])
    assert [look["chunks"] for look in again["trace"]] == [1, 12]
    assert again["trace"][0]["ci_pct"] is None
    assert again["trace"][1]["ci_pct"] == pytest.approx([1.0, 2.0])
