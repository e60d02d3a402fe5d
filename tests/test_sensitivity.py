"""Rounding errors, probes and the fit: what a few measurements say of every group at every type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from headers import Model, write_header
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import ANCHOR, CHUNKS, Truth, by_layer, by_role

from cerebellum.base import file_base, preset_base
from cerebellum.errors import BadInput
from cerebellum.gguf import TensorSource, parse_type, write_gguf
from cerebellum.groups import make_groups
from cerebellum.imatrix import Entry, ImportanceMatrix
from cerebellum.llama.quantize import QuantizeJob, quantize, to_float
from cerebellum.measure.curves import (
    FINE_LADDER,
    K_LADDER,
    KLD,
    PPL,
    Response,
    Score,
    Yardstick,
    candidates,
    kinds_for,
    measure_response,
    part_of,
    response_from_json,
    roles,
)
from cerebellum.measure.rounding import RoundingErrors, rounding_errors
from cerebellum.measure.zoom import halves
from cerebellum.plan.damage import Sensitivities, Whole
from cerebellum.plan.limit import Sizes
from cerebellum.progress import Silent
from cerebellum.shards import Recipe, Shards
from cerebellum.source import Source, open_source
from cerebellum.stats.paired import Interval, ratio_interval, superpopulation_interval
from cerebellum.workspace import DEMO_MODEL


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(by_layer())


@pytest.fixture(scope="module")
def fitted(truth: Truth) -> Sensitivities:
    return truth.sensitivities()


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


def errors_of(source: Source, sizes: Sizes, kinds: tuple[str, ...]) -> RoundingErrors:
    return rounding_errors(source, None, sizes, kinds, ANCHOR, 2, Silent())


def test_sampled_errors_are_those_of_whole_tensors(source: Source, tmp_path: Path) -> None:
    """Every row quantized and read back, weighted by hand, against the sample."""
    from cerebellum.ledger import Ledger

    sizes, name = by_layer(), "blk.3.ffn_gate_exps.weight"
    matrix = matrix_of(source, name, tmp_path / "imatrix")
    group = next(g for g in sizes.groups.values() if name in g.tensors)
    only = replace(sizes, groups={group.name: group})
    found = rounding_errors(source, matrix, only, ("Q2_K", "IQ3_S"), ANCHOR, 2, Silent())
    exact = to_float(source.read(name), source.tensors[name].type, 256).reshape(8, -1, 256)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        recipe = Recipe(
            source=source,
            base=sizes.base,
            matrix=matrix,
            groups=make_groups(source),
            folder=tmp_path / "shards",
            threads=2,
        )
        shards = Shards(recipe, ledger)
        for kind in ("Q2_K", "IQ3_S"):
            raw = np.concatenate(list(shards.tensor(name, parse_type(kind)).chunks()))
            squares = np.square(exact - to_float(raw, parse_type(kind), 256).reshape(exact.shape))
            importance = matrix.importance(name)
            assert importance is not None
            whole = float((squares.sum(axis=1) * importance.reshape(8, 256)).sum())
            assert found.of[group.name][kind] == pytest.approx(whole, rel=0.05)


def test_errors_fall_with_bits_and_the_base_is_its_types(source: Source) -> None:
    sizes = by_role()
    found = errors_of(source, sizes, K_LADDER)
    for name in sizes.groups:
        ladder = [found.of[name][kind] for kind in K_LADDER]
        assert ladder == sorted(ladder, reverse=True) and ladder[-1] > 0
        (base,) = {kind.name for kind in sizes.base_types(name).values()} & set(K_LADDER) or {None}
        if base:
            assert found.of[name]["base"] == pytest.approx(found.of[name][base])


def test_the_error_of_a_base_file_is_that_of_its_bytes(source: Source, tmp_path: Path) -> None:
    """A base made without a matrix is not what we would make of its types with one."""
    name = "blk.3.ffn_gate_exps.weight"
    sizes = by_layer()
    group = next(g for g in sizes.groups.values() if name in g.tensors)
    tensors = [
        TensorSource(
            name=t.name,
            shape=t.shape,
            type=sizes.base.types[t.name],
            chunks=lambda t=t: quantize(
                QuantizeJob(
                    name=t.name,
                    raw=source.read(t.name),
                    shape=t.shape,
                    from_type=t.type,
                    to_type=sizes.base.types[t.name],
                ),
                2,
            ),
        )
        for t in source.tensors.values()
    ]
    path = tmp_path / "base.gguf"
    write_gguf(path, sizes.base.records, tensors)
    matrix = matrix_of(source, name, tmp_path / "imatrix")
    given = replace(sizes, groups={group.name: group}, base=file_base(source, path))
    found = rounding_errors(source, matrix, given, ("Q3_K",), ANCHOR, 2, Silent())
    assert found.of[group.name]["base"] > 1.02 * found.of[group.name]["Q3_K"]


def test_types_that_need_a_matrix_are_not_offered_without_one(source: Source) -> None:
    sizes = by_role()
    found = errors_of(source, replace(sizes, groups={"attn_q": sizes.groups["attn_q"]}), FINE_LADDER)
    assert found.kinds("attn_q") == ["IQ3_S", "IQ4_XS"]
    assert RoundingErrors.from_json(found.as_json()) == found


def test_rows_of_no_multiple_of_256_get_the_types_of_32_element_blocks(tmp_path: Path) -> None:
    path = tmp_path / "narrow.gguf"
    write_header(path, Model(architecture="llama", width=576, inner=1536, heads=9, heads_kv=3))
    narrow = open_source(path)
    groups = {group.name: group for group in make_groups(narrow) if not group.protected}
    base = preset_base(narrow, "Q3_K_M", None, has_imatrix=True)
    sizes = Sizes(tensors=narrow.tensors, groups=groups, base=base)
    tried = {part.name: kind for part, kind in reversed(candidates(sizes, K_LADDER, ANCHOR))}
    assert tried["attn_q"] == "Q4_0" and tried["ffn_down"] == "Q2_K", "the smallest of each"
    assert "Q5_1" in kinds_for("attn_q", (*K_LADDER, *FINE_LADDER), sizes)
    assert kinds_for("ffn_down", ("Q2_K", "Q4_K"), sizes) == ["Q2_K", "Q4_K"]


# --- probes


def test_chunks_that_are_harder_than_the_rest_are_allowed_for() -> None:
    hard = np.array([1.3, 1.2, 1.1, 0.4])
    anchor, base = Score(nll=np.zeros(4), kld=np.zeros(4)), Score(nll=hard, kld=0.1 * hard)
    kld, _ = Yardstick(anchor=anchor, base=base).above(Score(nll=hard[:3], kld=0.03 * hard[:3]))
    assert kld is not None and kld.mean == pytest.approx(0.03) and kld.n == 3
    assert kld.high - kld.low == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_a_ratio_covers_at_its_level(seed: int) -> None:
    """Ninety-five of a hundred intervals hold the mean over all chunks; 80 of 100 draws at the least."""
    rng = np.random.default_rng(seed)
    yardstick = rng.gamma(20, 0.05, 400)
    values = 0.3 * yardstick + rng.normal(0, 0.03, 400)
    held = 0
    for _ in range(100):
        chosen = rng.choice(400, 8, replace=False)
        found = ratio_interval(values[chosen], yardstick[chosen], float(yardstick.mean()))
        held += found.low <= values.mean() <= found.high
    assert held >= 80


def test_without_a_sure_yardstick_the_plain_mean_stands() -> None:
    values, yardstick = np.array([1.0, 2.0, 3.0]), np.array([-1.0, 0.0, 1.0])
    assert ratio_interval(values, yardstick, 0.5) == superpopulation_interval(values)


def test_probes_stop_when_no_decision_hangs_on_more(truth: Truth) -> None:
    part = roles(truth.sizes)[0]
    assert chunks_of(truth.measure((part, "Q2_K"))) < CHUNKS, "known to a tenth before the end"
    assert chunks_of(truth.measure((part, "Q6_K"), largest=1.0)) == 4, "slight beside its role's largest"
    noisy = Truth(by_layer(), noise=2.0)
    assert chunks_of(noisy.measure((part, "Q2_K"))) == CHUNKS


def chunks_of(response: Response) -> int:
    assert response.kld is not None
    return response.kld.n


def test_a_collapsed_part_is_measured_no_further() -> None:
    asked = []

    def broken(n: int) -> Score:
        asked.append(n)
        return Score(nll=np.full(n, np.nan), kld=np.full(n, np.nan))

    truth = Truth(by_layer())
    response = measure_response((roles(truth.sizes)[0], "Q2_K"), broken, truth.yardstick(), 16)
    assert response.kld is None and response.nll is None and asked == [4]


def test_halves_hold_every_layer_once() -> None:
    sizes = by_layer()
    for part in roles(sizes):
        first, second = halves(part, sizes)
        assert first.groups + second.groups == part.groups
        assert part_of(part.groups, sizes) == part


def test_parts_are_named_after_their_runs_of_layers() -> None:
    sizes = by_layer()
    assert part_of(["ffn_up_exps.0", "ffn_up_exps.1", "ffn_up_exps.4"], sizes).name == "ffn_up_exps.0-1+4"
    assert part_of(["ssm_in.1", "ssm_in.3"], sizes).name == "ssm_in.1-3", "neighbours in their role"


def test_layers_are_looked_at_where_they_differ(truth: Truth) -> None:
    names = {response.part.name for response in truth.responses()}
    assert {"ssm_in.0-1", "ssm_in.0", "ssm_in.1"} <= names
    assert "ffn_gate_exps.0-2" in names and "ffn_gate_exps.0" not in names, "alike layers stay together"


def test_probing_ends_with_what_it_may_cost(truth: Truth) -> None:
    roles_alone = len(candidates(truth.sizes, K_LADDER, ANCHOR))
    assert len(truth.responses(probes=5)) == roles_alone + 4


# --- the fit


def test_every_group_at_every_type_is_foretold(truth: Truth, fitted: Sensitivities) -> None:
    for point in fitted.points():
        name, kind = point.part.name, point.kind
        above = truth.errors.above(name, kind) - truth.errors.above(name, "base")
        assert point.kld is not None
        whole = truth.height(name) * truth.errors.above(name, "base")
        assert point.kld.mean == pytest.approx(truth.height(name) * above, rel=0.25, abs=0.05 * whole)


def test_types_that_were_measured_count_more_than_the_model(truth: Truth) -> None:
    """One role does twice at Q4_K what rounding says; the model alone would never know."""
    responses = [
        replace(r, kld=scaled(r.kld, 2.0)) if (r.part.name, r.kind) == ("ffn_up_exps", "Q4_K") else r
        for r in truth.responses()
    ]
    fits = [Sensitivities(rs, truth.errors, truth.sizes).points() for rs in (truth.responses(), responses)]
    before, after = (above_anchor(points, "ffn_up_exps.3", "Q4_K") for points in fits)
    assert 1.3 < after / before < 2.1
    same = [above_anchor(points, "ffn_up_exps.3", "Q2_K") for points in fits]
    assert same[1] == pytest.approx(same[0], rel=0.2)


def scaled(interval: Interval | None, factor: float) -> Interval:
    assert interval is not None
    low, mean, high = (factor * value for value in (interval.low, interval.mean, interval.high))
    return replace(interval, low=low, mean=mean, high=high)


def above_anchor(points: list, name: str, kind: str) -> float:
    own = {point.kind: point.kld.mean for point in points if point.part.name == name}
    return own[kind] - own["Q8_0"]


def test_a_whole_plan_teaches_its_parts(truth: Truth, fitted: Sensitivities) -> None:
    """A plan with all of one role at Q2_K did 1.5 times what was foretold: that role gets dearer."""
    changes = {name: "Q2_K" for name in truth.sizes.groups if name.startswith("ffn_down_exps")}
    before = fitted.points()
    added = 0.5 * sum(above_anchor(before, name, "Q2_K") for name in changes)
    total = truth.damage(changes) + added
    seen = Interval(mean=total, low=total * 0.99, high=total * 1.01, n=48, population=48)
    whole = Whole(changes=changes, kld=seen, nll=None)
    after = fitted.points([truth.base_whole(), whole])
    for name in changes:
        assert above_anchor(after, name, "Q2_K") > 1.03 * above_anchor(before, name, "Q2_K")


def test_a_collapsed_type_and_all_coarser_ones_are_no_options(truth: Truth) -> None:
    responses = [
        replace(r, kld=None, nll=None) if (r.part.name, r.kind) == ("attn_v", "Q3_K") else r
        for r in truth.responses()
    ]
    points = Sensitivities(responses, truth.errors, truth.sizes).points()
    kinds = {p.kind for p in points if p.part.name == "attn_v.2"}
    assert "Q4_K" in kinds and not kinds & {"Q3_K", "Q2_K", "IQ2_XXS", "IQ3_XXS"}
    assert "Q2_K" in {p.kind for p in points if p.part.name == "attn_k.2"}


def test_a_role_that_was_never_measured_stays_at_its_base(truth: Truth) -> None:
    responses = [r for r in truth.responses() if not r.part.name.startswith("attn_q")]
    points = Sensitivities(responses, truth.errors, truth.sizes).points()
    assert {p.kind for p in points if p.part.name.startswith("attn_q")} == {"base"}
    assert {p.part.name for p in points} == set(truth.sizes.groups)


def test_parts_that_do_nothing_and_weights_that_are_zero_break_nothing(truth: Truth) -> None:
    """Layers that llama.cpp never evaluates have no damage; weights of zeros have no rounding error."""
    zero = Interval(mean=0.0, low=0.0, high=0.0, n=4, population=4)
    responses = [replace(r, kld=zero) if r.part.name.startswith("attn_q") else r for r in truth.responses()]
    errors = replace(truth.errors, of={**truth.errors.of}, at_anchor={**truth.errors.at_anchor})
    for name in ("attn_v.2", "attn_v.5"):
        errors.of[name] = dict.fromkeys(errors.of[name], 0.0)
        errors.at_anchor[name] = 0.0
    points = Sensitivities(responses, errors, truth.sizes).points()
    assert {p.kind for p in points if p.part.name == "attn_v.2"} == {"base"}
    assert 0 <= above_anchor(points, "attn_q.2", "Q2_K") < 1e-6
    assert np.isfinite([p.kld.mean for p in points if p.kld]).all()


def test_nothing_is_left_where_everything_collapsed(truth: Truth) -> None:
    broken = [replace(r, kld=None, nll=None) for r in truth.responses(probes=0)]
    points = Sensitivities(broken, truth.errors, truth.sizes).points()
    assert {p.kind for p in points} == {"base"} and len(points) == len(truth.sizes.groups)


def test_small_damages_do_not_drown_large_ones(truth: Truth) -> None:
    """A type near the anchor measured as zero, by luck with next to no spread, says nothing of the role."""
    zero = Interval(mean=1e-9, low=-1e-9, high=3e-9, n=4, population=4)
    responses = [
        replace(r, kld=zero) if (r.part.name, r.kind) == ("ffn_gate_exps", "Q6_K") else r
        for r in truth.responses()
    ]
    points = Sensitivities(responses, truth.errors, truth.sizes, anchor_kld=0.001).points()
    height = truth.height("ffn_gate_exps.3")
    expected = height * truth.errors.above("ffn_gate_exps.3", "Q2_K")
    assert above_anchor(points, "ffn_gate_exps.3", "Q2_K") == pytest.approx(expected, rel=0.3)


def test_drawn_plans_stay_within_what_was_measured(truth: Truth, fitted: Sensitivities) -> None:
    draws = [fitted.points((), np.random.default_rng(seed)) for seed in range(20)]
    found = np.array([above_anchor(points, "ssm_in.0", "Q2_K") for points in draws])
    expected = truth.height("ssm_in.0") * truth.errors.above("ssm_in.0", "Q2_K")
    assert found.std() > 0 and abs(found.mean() / expected - 1) < 0.3


def test_by_perplexity_the_divergence_is_the_prior(truth: Truth, fitted: Sensitivities) -> None:
    for point in fitted.points():
        kld, nll = point.damage(KLD), point.damage(PPL)
        assert kld is not None and nll is not None
        assert nll.mean == pytest.approx(kld.mean, rel=1.5, abs=1e-9)


def test_responses_survive_json(truth: Truth) -> None:
    for response in truth.responses(probes=2):
        again = response_from_json(response.as_json())
        assert (again.part, again.kind) == (response.part, response.kind)
        assert again.kld and response.kld and again.kld.mean == response.kld.mean
    with pytest.raises(BadInput, match="run --budget"):
        response_from_json({"part": "x"})
