"""Rounding errors, probes and the fit: what a few measurements say of every group at every type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import pytest
from headers import Model, write_header
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from synthetic import ANCHOR, CHUNKS, METHOD, Truth, by_layer, by_role

from cerebellum.base import file_base, preset_base
from cerebellum.codec import as_json
from cerebellum.engine.protocols import QuantizeJob
from cerebellum.gguf import TensorSource, parse_type, write_gguf
from cerebellum.groups import make_groups
from cerebellum.imatrix import Entry, ImportanceMatrix
from cerebellum.layout import Layout
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.measure.artifacts import Response, RoundingErrors
from cerebellum.measure.curves import Probe, ProbeAsk, Reference, Score, halves, measure_response, role_probes
from cerebellum.measure.rounding import rounding_errors
from cerebellum.plan.artifacts import PointRow
from cerebellum.plan.damage import DamageModel, WholePlan, fit_damage
from cerebellum.progress import Silent
from cerebellum.settings import DEMO_MODEL, FINE_LADDER, K_LADDER, KLD, PPL
from cerebellum.shards import Recipe, Shards
from cerebellum.source import Source, open_source
from cerebellum.stats.estimate import Estimate, nested_sum, ratio_estimate, together
from cerebellum.stats.paired import superpopulation_interval
from cerebellum.verdicts import NOTHING, drive

ENGINE = LlamaEngine(EngineSettings())


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(by_layer())


@pytest.fixture(scope="module")
def fitted(truth: Truth) -> DamageModel:
    return truth.model()


# --- rounding errors


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(DEMO_MODEL)


def matrix_of(source: Source, name: str, path: Path) -> ImportanceMatrix:
    """One expert's columns count a hundredfold."""
    path.write_bytes(b"made up")
    columns, _, experts = source.tensors[name].shape
    sums = np.ones((experts, columns), np.float32)
    sums[0] = 100
    entry = Entry(sums=sums, counts=np.ones(experts, np.int64))
    return ImportanceMatrix(path=path, entries={name: entry}, datasets=(), chunk_count=1)


def errors_of(
    source: Source, layout: Layout, qtypes: Sequence[str], matrix: ImportanceMatrix | None = None
) -> RoundingErrors:
    return rounding_errors(ENGINE, source, matrix, layout, qtypes, ANCHOR, METHOD, 2, Silent())


def test_sampled_errors_are_those_of_whole_tensors(source: Source, tmp_path: Path) -> None:
    """Every row quantized and read back, weighted by hand, against the sample."""
    from cerebellum.ledger import Ledger

    layout, name = by_layer(), "blk.3.ffn_gate_exps.weight"
    matrix = matrix_of(source, name, tmp_path / "imatrix")
    group = next(g for g in layout.groups.values() if name in g.tensors)
    only = changed(layout, groups={group.name: group})
    found = errors_of(source, only, ("Q2_K", "IQ3_S"), matrix)
    exact = ENGINE.to_float(source.read(name), source.tensors[name].type, 256).reshape(8, -1, 256)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        recipe = Recipe(
            source=source,
            layout=layout,
            matrix=matrix,
            engine=ENGINE,
            folder=tmp_path / "shards",
            threads=2,
        )
        shards = Shards(recipe, ledger)
        for qtype in ("Q2_K", "IQ3_S"):
            raw = np.concatenate(list(shards.tensor(name, parse_type(qtype)).chunks()))
            squares = np.square(exact - ENGINE.to_float(raw, parse_type(qtype), 256).reshape(exact.shape))
            importance = matrix.importance(name)
            assert importance is not None
            whole = float((squares.sum(axis=1) * importance.reshape(8, 256)).sum())
            assert found.of[group.name][qtype] == pytest.approx(whole, rel=0.05)


def test_errors_fall_with_bits_and_the_base_is_its_types(source: Source) -> None:
    layout = by_role()
    found = errors_of(source, layout, K_LADDER)
    for name in layout.groups:
        ladder = [found.of[name][qtype] for qtype in K_LADDER]
        assert ladder == sorted(ladder, reverse=True) and ladder[-1] > 0
        (base,) = set(layout.base_types([name])) & set(K_LADDER) or {None}
        if base:
            assert found.at_base[name] == pytest.approx(found.of[name][base])


def test_the_error_of_a_base_file_is_that_of_its_bytes(source: Source, tmp_path: Path) -> None:
    """A base made without a matrix is not what we would make of its types with one."""
    name = "blk.3.ffn_gate_exps.weight"
    layout = by_layer()
    group = next(g for g in layout.groups.values() if name in g.tensors)
    tensors = [
        TensorSource(
            name=t.name,
            shape=t.shape,
            type=layout.base.types[t.name],
            chunks=lambda t=t: ENGINE.quantize(
                QuantizeJob(
                    name=t.name,
                    raw=source.read(t.name),
                    shape=t.shape,
                    from_type=t.type,
                    to_type=layout.base.types[t.name],
                ),
                2,
            ),
        )
        for t in source.tensors.values()
    ]
    path = tmp_path / "base.gguf"
    write_gguf(path, layout.base.records, tensors)
    matrix = matrix_of(source, name, tmp_path / "imatrix")
    given = changed(layout, groups={group.name: group}, base=file_base(source, path))
    found = errors_of(source, given, ("Q3_K",), matrix)
    assert found.at_base[group.name] > 1.02 * found.of[group.name]["Q3_K"]


def test_types_that_need_a_matrix_are_not_offered_without_one(source: Source) -> None:
    layout = by_role()
    found = errors_of(source, changed(layout, groups={"attn_q": layout.groups["attn_q"]}), FINE_LADDER)
    assert list(found.of["attn_q"]) == found.all_types == ["IQ3_S", "IQ4_XS"]


def test_rows_of_no_multiple_of_256_get_the_types_of_32_element_blocks(tmp_path: Path) -> None:
    path = tmp_path / "narrow.gguf"
    write_header(path, Model(architecture="llama", width=576, inner=1536, heads=9, heads_kv=3))
    narrow = open_source(path)
    layout = Layout.of(narrow, make_groups(narrow), preset_base(ENGINE, narrow, "Q3_K_M", None))
    probes = role_probes(layout, K_LADDER, ANCHOR)
    smallest = {probe.part.name: probe.qtype for probe in reversed(probes)}
    assert smallest["attn_q"] == "Q4_0" and smallest["ffn_down"] == "Q2_K", "the smallest of each"
    assert "Q5_1" in layout.ladder("attn_q", (*K_LADDER, *FINE_LADDER))
    assert layout.ladder("ffn_down", ("Q2_K", "Q4_K")) == ["Q2_K", "Q4_K"]


# --- estimates


values = st.lists(st.floats(-5, 5), min_size=4, max_size=40).map(np.array)


@given(values)
def test_an_estimate_gives_students_interval_and_comes_back_from_it(values_N: np.ndarray) -> None:
    found, wanted = Estimate.of(values_N), superpopulation_interval(values_N)
    told = found.interval()
    assert told.n == wanted.n == len(values_N)
    for bound in ("mean", "low", "high"):
        assert getattr(told, bound) == pytest.approx(getattr(wanted, bound), abs=1e-6)
    again = Estimate.from_interval(told)
    assert (again.mean, again.n) == (pytest.approx(found.mean), found.n)
    assert again.se == pytest.approx(found.se, abs=1e-9)


def test_sums_and_multiples_of_estimates() -> None:
    a, b = Estimate(mean=1.0, se=0.3, n=8), Estimate(mean=2.0, se=0.4, n=4)
    assert a + b == Estimate(mean=3.0, se=pytest.approx(0.5), n=4), "independent errors: squares add up"
    assert together([a, b]) == Estimate(mean=3.0, se=pytest.approx(0.7), n=4), "errors that go together"
    assert a * -2 == Estimate(mean=-2.0, se=0.6, n=8)
    assert a + Estimate.exact(1.0) == Estimate(mean=2.0, se=0.3, n=8), "an exact number needs no chunks"
    assert together([]) == Estimate.exact(0.0)


def test_what_is_exact_has_no_width_and_one_chunk_says_nothing_of_more() -> None:
    exact = Estimate.exact(0.5).interval()
    assert (exact.low, exact.high, exact.n) == (0.5, 0.5, 0)
    single = Estimate.of(np.array([1.0]))
    assert single.interval().low == -np.inf and single.interval().high == np.inf
    bounds_of_unknown_origin = Estimate.from_interval(changed(exact, low=0.0, high=1.0))
    assert bounds_of_unknown_origin == Estimate.exact(0.5)


def test_four_chunks_are_not_blamed_for_students_quantile() -> None:
    """Bounds divided by 1.96 gave four chunks 1.62 times their standard error."""
    found = Estimate.of(np.array([1.0, 2.0, 3.0, 4.0]))
    half = found.interval().high - found.mean
    assert found.se == pytest.approx(np.sqrt(5 / 3) / 2) and half / 1.96 / found.se == pytest.approx(
        1.62, abs=0.01
    )


def test_means_over_nested_chunks_share_their_errors() -> None:
    """Two thousand texts: the spread of the sum is the standard error that is claimed for it."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(2000):
        common = rng.normal(0, 1, 24)
        found.append(nested_sum(1 - common + rng.normal(0, 0.5, 24), (2 + common)[:12]))
    spread = np.std([each.mean for each in found])
    claimed = np.sqrt(np.mean([each.se**2 for each in found]))
    assert claimed == pytest.approx(spread, rel=0.05)
    assert np.mean([each.mean for each in found]) == pytest.approx(3, abs=0.02) and found[0].n == 12
    paired = np.array([0.1, 0.3, 0.2, 0.5])
    same = nested_sum(paired - 1, 1 - paired)
    assert same.mean == pytest.approx(0) and same.se == pytest.approx(0), "what cancels has no error"


# --- probes


def test_chunks_that_are_harder_than_the_rest_are_allowed_for() -> None:
    hard = np.array([1.3, 1.2, 1.1, 0.4])
    anchor, base = Score(nll=np.zeros(4), kld=np.zeros(4)), Score(nll=hard, kld=0.1 * hard)
    kld = Reference(anchor=anchor, base=base).damage(Score(nll=hard[:3], kld=0.03 * hard[:3])).kld
    assert kld is not None and kld.mean == pytest.approx(0.03) and kld.n == 3
    assert kld.se == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_a_ratio_covers_at_its_level(seed: int) -> None:
    """Ninety-five of a hundred intervals hold the mean over all chunks; 80 of 100 draws at the least."""
    rng = np.random.default_rng(seed)
    reference = rng.gamma(20, 0.05, 400)
    values = 0.3 * reference + rng.normal(0, 0.03, 400)
    held = 0
    for _ in range(100):
        chosen = rng.choice(400, 8, replace=False)
        found = ratio_estimate(values[chosen], reference[chosen], float(reference.mean())).interval()
        held += found.low <= values.mean() <= found.high
    assert held >= 80


def test_without_a_sure_reference_the_plain_mean_stands() -> None:
    values, reference = np.array([1.0, 2.0, 3.0]), np.array([-1.0, 0.0, 1.0])
    assert ratio_estimate(values, reference, 0.5) == Estimate.of(values)


def test_a_whole_plan_is_compared_with_the_anchor_on_the_same_chunks(truth: Truth) -> None:
    """Its divergence is paired with the anchor's; of its NLL, known on more chunks, the mean is the old sum."""
    changes = truth.layout.anchored("Q4_K")
    plan, base, reference = truth.score(changes), truth.score(NOTHING), truth.reference()
    first = Reference(
        anchor=Score(nll=reference.anchor.nll[:8], kld=reference.anchor.kld),
        base=Score(nll=reference.base.nll[:8], kld=reference.base.kld),
    )
    found = first.damage_of_plan(plan, base)
    assert found.kld is not None and found.nll is not None
    assert found.kld.mean == pytest.approx((plan.kld - reference.anchor.kld).mean())
    wanted = (plan.nll - base.nll).mean() + (base.nll - reference.anchor.nll)[:8].mean()
    assert found.nll.mean == pytest.approx(wanted)
    collapsed = first.damage_of_plan(Score(nll=plan.nll, kld=np.full(CHUNKS, np.nan)), base)
    assert collapsed.kld is None and collapsed.nll is None


def test_probes_stop_when_no_decision_hangs_on_more(truth: Truth) -> None:
    part = truth.layout.roles()[0]
    small, large = Probe(part=part, qtype="Q2_K"), Probe(part=part, qtype="Q6_K")
    assert chunks_of(truth.measure(small)) < CHUNKS, "known to a tenth before the end"
    assert chunks_of(truth.measure(large, largest=1.0)) == 4, "slight beside its role's largest"
    noisy = Truth(by_layer(), noise=2.0)
    assert chunks_of(noisy.measure(small)) == CHUNKS


def chunks_of(response: Response) -> int:
    assert response.kld is not None
    return response.kld.n


def test_a_collapsed_part_is_measured_no_further() -> None:
    asked = []

    def broken(ask: ProbeAsk) -> Score:
        asked.append(ask.n)
        return Score(nll=np.full(ask.n, np.nan), kld=np.full(ask.n, np.nan))

    truth = Truth(by_layer())
    probe = Probe(part=truth.layout.roles()[0], qtype="Q2_K")
    response = drive(measure_response(probe, truth.reference(), METHOD, 16), broken)
    assert response.kld is None and response.nll is None and asked == [4]


def test_halves_hold_every_layer_once() -> None:
    layout = by_layer()
    for part in layout.roles():
        first, second = halves(part.groups, layout)
        assert first.groups + second.groups == part.groups
        assert layout.part(part.groups) == part


def test_parts_are_named_after_their_runs_of_layers() -> None:
    layout = by_layer()
    assert layout.part(["ffn_up_exps.0", "ffn_up_exps.1", "ffn_up_exps.4"]).name == "ffn_up_exps.0-1+4"
    assert layout.part(["ssm_in.1", "ssm_in.3"]).name == "ssm_in.1-3", "neighbours in their role"


def test_layers_are_looked_at_where_they_differ(truth: Truth) -> None:
    names = {response.part for response in truth.responses()}
    assert {"ssm_in.0-1", "ssm_in.0", "ssm_in.1"} <= names
    assert "ffn_gate_exps.0-2" in names and "ffn_gate_exps.0" not in names, "alike layers stay together"


def test_probing_ends_with_what_it_may_cost(truth: Truth) -> None:
    roles_alone = len(role_probes(truth.layout, K_LADDER, ANCHOR))
    assert len(truth.responses(probes=5)) == roles_alone + 4


# --- the fit


def points_at(points: Sequence[PointRow], start: str) -> set[str | None]:
    return {point.type for point in points if point.group.startswith(start)}


def above_anchor(points: Sequence[PointRow], name: str, qtype: str) -> float:
    own = {point.type: point.kld.mean for point in points if point.group == name and point.kld}
    return own[qtype] - own["Q8_0"]


def test_every_group_at_every_type_is_foretold(truth: Truth, fitted: DamageModel) -> None:
    for point in fitted.points():
        name, errors = point.group, truth.errors
        above = errors.above(name, point.type) - errors.above(name, None)
        assert point.kld is not None
        whole = truth.sensitivity(name) * errors.above(name, None)
        assert point.kld.mean == pytest.approx(truth.sensitivity(name) * above, rel=0.25, abs=0.05 * whole)


def test_types_that_were_measured_count_more_than_the_model(truth: Truth) -> None:
    """One role does twice at Q4_K what rounding says; the model alone would never know."""
    responses = [
        replace(r, kld=r.kld and r.kld * 2.0) if (r.part, r.type) == ("ffn_up_exps", "Q4_K") else r
        for r in truth.responses()
    ]
    both = [truth.model(each).points() for each in (truth.responses(), responses)]
    before, after = (above_anchor(points, "ffn_up_exps.3", "Q4_K") for points in both)
    assert 1.3 < after / before < 2.1
    same = [above_anchor(points, "ffn_up_exps.3", "Q2_K") for points in both]
    assert same[1] == pytest.approx(same[0], rel=0.2)


def test_a_whole_plan_teaches_its_parts(truth: Truth, fitted: DamageModel) -> None:
    """A plan with all of one role at Q2_K did 1.5 times what was foretold: that role gets dearer."""
    changes = {name: "Q2_K" for name in truth.layout.groups if name.startswith("ffn_down_exps")}
    before = fitted.points()
    added = 0.5 * sum(above_anchor(before, name, "Q2_K") for name in changes)
    total = truth.damage(changes) + added
    whole = WholePlan(changes=changes, kld=Estimate(mean=total, se=0.005 * total, n=48), nll=None)
    after = fitted.learning([whole]).points()
    for name in changes:
        assert above_anchor(after, name, "Q2_K") > 1.03 * above_anchor(before, name, "Q2_K")
    assert fitted.learning([whole]).learning([]).points() == before, "learning never adds up"


def test_a_collapsed_type_and_all_coarser_ones_are_no_options(truth: Truth) -> None:
    responses = [
        replace(r, kld=None, nll=None) if (r.part, r.type) == ("attn_v", "Q3_K") else r
        for r in truth.responses()
    ]
    points = truth.model(responses).points()
    types = points_at(points, "attn_v.2")
    assert "Q4_K" in types and not types & {"Q3_K", "Q2_K", "IQ2_XXS", "IQ3_XXS"}
    assert "Q2_K" in points_at(points, "attn_k.2")


def test_a_role_that_was_never_measured_stays_at_its_base(truth: Truth) -> None:
    responses = [r for r in truth.responses() if not r.part.startswith("attn_q")]
    points = truth.model(responses).points()
    assert points_at(points, "attn_q") == {None}
    assert {point.group for point in points} == set(truth.layout.groups)


def test_parts_that_do_nothing_and_weights_that_are_zero_break_nothing(truth: Truth) -> None:
    """Layers that llama.cpp never evaluates have no damage; weights of zeros have no rounding error."""
    zero = Estimate(mean=0.0, se=0.0, n=4)
    responses = tuple(replace(r, kld=zero) if r.part.startswith("attn_q") else r for r in truth.responses())
    none = {name: 0.0 for name in ("attn_v.2", "attn_v.5")}
    errors = replace(
        truth.errors,
        of=truth.errors.of | {name: dict.fromkeys(truth.errors.of[name], 0.0) for name in none},
        at_base=truth.errors.at_base | none,
        at_anchor=truth.errors.at_anchor | none,
    )
    curves = replace(truth.curves(), responses=responses, rounding=errors)
    points = fit_damage(curves, truth.layout).points()
    assert points_at(points, "attn_v.2") == {None}
    assert 0 <= above_anchor(points, "attn_q.2", "Q2_K") < 1e-6
    assert np.isfinite([p.kld.mean for p in points if p.kld]).all()


def test_nothing_is_left_where_everything_collapsed(truth: Truth) -> None:
    broken = [replace(r, kld=None, nll=None) for r in truth.responses(probes=0)]
    points = truth.model(broken).points()
    assert {p.type for p in points} == {None} and len(points) == len(truth.layout.groups)


def test_small_damages_do_not_drown_large_ones(truth: Truth) -> None:
    """A type near the anchor measured as zero, by luck with next to no spread, says nothing of the role."""
    zero = Estimate(mean=1e-9, se=1e-9, n=4)
    responses = tuple(
        replace(r, kld=zero) if (r.part, r.type) == ("ffn_gate_exps", "Q6_K") else r
        for r in truth.responses()
    )
    curves = replace(truth.curves(), responses=responses, anchor_kld=0.001)
    points = fit_damage(curves, truth.layout).points()
    expected = truth.sensitivity("ffn_gate_exps.3") * truth.errors.above("ffn_gate_exps.3", "Q2_K")
    assert above_anchor(points, "ffn_gate_exps.3", "Q2_K") == pytest.approx(expected, rel=0.3)


def test_drawn_plans_stay_within_what_was_measured(truth: Truth, fitted: DamageModel) -> None:
    draws = [fitted.drawn(np.random.default_rng(seed)).points() for seed in range(20)]
    found = np.array([above_anchor(points, "ssm_in.0", "Q2_K") for points in draws])
    expected = truth.sensitivity("ssm_in.0") * truth.errors.above("ssm_in.0", "Q2_K")
    assert found.std() > 0 and abs(found.mean() / expected - 1) < 0.3


def test_by_perplexity_the_divergence_is_the_prior(fitted: DamageModel) -> None:
    """Of the parts alone; what the base as a whole taught belongs to each measure for itself."""
    alone = {objective: changed(fit, learned={}) for objective, fit in fitted.fitted.items()}
    for point in changed(fitted, fitted=alone).points():
        kld, nll = point.damage(KLD), point.damage(PPL)
        assert kld is not None and nll is not None
        assert nll.mean == pytest.approx(kld.mean, rel=1.5, abs=1e-9)


def test_the_numbers_that_nobody_measured_stand_in_the_curves(truth: Truth) -> None:
    told = as_json(truth.curves(probes=0))["method"]
    assert len(told) == 32 and told["apart"] == 1.0 and told["model_sd"] == 0.1
