"""Paired measurements on the fake engine: what was put in comes out, once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from test_fake_run import workspace
from tiny import MATRIX_Q3, Bench, Recorder, make_bench, measure_fixed, measured, n_measured, run_sweep

from cerebellum.codec import as_json
from cerebellum.engine.fake import FakeEngine, FakeModel
from cerebellum.engine.predictions import PredictionCache
from cerebellum.engine.protocols import Logits, Tokens
from cerebellum.errors import BadInput
from cerebellum.ledger import Ledger
from cerebellum.measure.artifacts import MeasurementRow
from cerebellum.measure.measurer import Measurer, file_variant
from cerebellum.measure.race import ChunkAsk, ChunkScores, chunk_order, fresh_order
from cerebellum.measure.stage import measure_against_limit
from cerebellum.settings import Limit
from cerebellum.verdicts import (
    COLLAPSED,
    SENSITIVE,
    TOLERANT,
    UNDECIDED,
    Batch,
    Changes,
    Measurement,
    Threshold,
    drive,
)

LIMIT = Threshold(limit_pct=3.0)

ROLES = ("ffn_gate_exps", "ffn_down_exps", "ffn_gate_shexp", "ssm_in")


def alone(bench: Bench, roles: Sequence[str] = ROLES, n_chunks: int = 20) -> dict[str, Measurement]:
    ledger, measurer, shards = bench.session()
    with ledger:
        chunks = chunk_order(20, 1)[:n_chunks]
        found = run_sweep(measure_fixed([{role: "Q2_K"} for role in roles], chunks, 20), measurer, shards)
        measurer.close()
    return {next(iter(m.changes)): m for m in found}


def test_the_damage_put_in_comes_out(bench: Bench) -> None:
    bench.engine.noise = 0.0
    for role, measurement in alone(bench).items():
        assert measurement.delta is not None
        assert measurement.delta.mean == pytest.approx(bench.damage[role], abs=1e-5)


def test_pairing_takes_the_noise_out(bench: Bench) -> None:
    """The fake's noise is the text's: shared by base and variant, it leaves their difference."""
    ledger, measurer, shards = bench.session()
    with ledger:
        chunks = tuple(range(20))
        base = measurer.chunk_means(shards.variant({}), chunks)
        variant = measurer.chunk_means(shards.variant({"ssm_in": "Q2_K"}), chunks)
        measurer.close()
    assert (variant - base).std() < base.std() / 4
    assert (variant - base).mean() == pytest.approx(0.2, rel=0.05)


def test_an_interval_of_some_chunks_holds_the_mean_of_all(bench: Bench) -> None:
    all_of_them = alone(bench)["ssm_in"].delta
    some = alone(bench, n_chunks=8)["ssm_in"].delta
    assert some is not None and all_of_them is not None
    assert some.low < some.mean < some.high
    assert some.low < all_of_them.mean < some.high
    assert some.high - some.low >= all_of_them.high - all_of_them.low


def test_nothing_is_measured_twice_in_a_second_session(bench: Bench) -> None:
    first = alone(bench, n_chunks=5)
    ledger, measurer, shards = bench.session()
    with ledger:
        rows = n_measured(ledger)
        again = run_sweep(measure_fixed([{"ssm_in": "Q2_K"}], chunk_order(20, 1)[:5], 20), measurer, shards)
        assert measurer.measured == 0 and measurer.reused == 10
        assert again[0] == first["ssm_in"]
        more = run_sweep(measure_fixed([{"ssm_in": "Q2_K"}], chunk_order(20, 1)[:8], 20), measurer, shards)
        assert measurer.measured == 6 and n_measured(ledger) == rows + 6
        assert more[0].delta is not None and more[0].delta.n == 8
        measurer.close()
    assert set(bench.engine.scored.values()) == {1}


def test_what_is_in_the_ledger_opens_no_model(bench: Bench) -> None:
    alone(bench, n_chunks=5)
    opened = bench.engine.opened
    alone(bench, n_chunks=5)
    assert bench.engine.opened == opened


def test_a_model_is_loaded_once_for_a_run_of_asks(bench: Bench) -> None:
    ledger, measurer, shards = bench.session()
    with ledger:
        for chunk in range(5):
            measurer.nll(shards.variant({}), [chunk])
        assert bench.engine.opened == 1
        measurer.close()


def test_another_text_ctx_or_engine_is_another_series(bench: Bench) -> None:
    alone(bench, ["ssm_in"], n_chunks=4)
    for change in ("ctx", "text", "engine"):
        if change == "ctx":
            bench.ctx = 16
        elif change == "text":
            bench.text.write_bytes(bench.text.read_bytes()[::-1])
        else:
            bench.engine.identity = "another build"
        ledger, measurer, shards = bench.session()
        with ledger:
            measurer.nll(shards.variant({}), [0, 1])
            assert (measurer.measured, measurer.reused) == (2, 0), change
            measurer.close()


class Stopping(FakeEngine):
    """Is interrupted in the middle of its ``left``-th chunk."""

    left = 10**9

    @contextmanager
    def open(self, paths: Sequence[Path], ctx: int) -> Iterator[FakeModel]:
        with super().open(paths, ctx) as model:
            logits = model.logits

            def counted(tokens_T: Tokens) -> Logits:
                self.left -= 1
                if self.left <= 0:
                    raise KeyboardInterrupt
                return logits(tokens_T)

            model.logits = counted
            yield model


@pytest.mark.parametrize("stop", [1, 2, 7, 12])
def test_an_interrupt_loses_nothing_that_was_finished(bench: Bench, stop: int) -> None:
    bench.engine = Stopping(damage=bench.engine.damage)
    bench.engine.left = stop
    with pytest.raises(KeyboardInterrupt):
        alone(bench, ["ssm_in"], n_chunks=10)
    ledger, measurer, shards = bench.session()
    with ledger:
        rows, digest_before = n_measured(ledger), ledger.digest()
        # the chunk that was being scored while the next was interrupted may be lost, no other
        assert stop - 2 <= rows <= stop - 1
        bench.engine.left = 10**9
        sweep = measure_fixed([{"ssm_in": "Q2_K"}], chunk_order(20, 1)[:10], 20)
        run_sweep(sweep, measurer, shards)
        assert measurer.measured + rows == 20 == n_measured(ledger)
        assert ledger.digest() != digest_before
        measurer.close()
    assert sum(bench.engine.scored.values()) <= 21


def test_a_collapse_is_a_result(bench: Bench) -> None:
    bench.engine.damage = lambda tensor: math.nan if tensor.type.name == "Q2_K" else 0.0
    found = alone(bench, ["ssm_in"], n_chunks=4)["ssm_in"]
    assert found.delta is None
    assert LIMIT.verdict(found.delta) == COLLAPSED
    row = as_json(MeasurementRow.of_measurement(found, LIMIT))
    assert row["verdict"] == COLLAPSED and list(row["groups"]) == ["ssm_in"] and row["delta_pct"] is None
    json.dumps(row, allow_nan=False)
    assert alone(bench, ["ssm_in"], n_chunks=4)["ssm_in"] == found  # from the ledger, too


def scores(*nll: float) -> ChunkScores:
    return ChunkScores(nll_N=np.array(nll))


def test_one_bad_chunk_is_a_collapse() -> None:
    sweep = measure_fixed([{"a": "Q2_K"}], (0, 1), 9)
    asks = (ChunkAsk(changes={}, chunks=(0, 1)), ChunkAsk(changes={"a": "Q2_K"}, chunks=(0, 1)))
    assert next(sweep) == Batch(asks=asks)
    with pytest.raises(StopIteration) as stop:
        sweep.send((scores(1.0, 2.0), scores(1.0, np.inf)))
    assert stop.value.value[0].delta is None and stop.value.value[0].read == 2


def test_a_sweep_needs_no_engine() -> None:
    """Asks and answers alone: base first, then the changes, on the same chunks."""
    answers = {(): 1.0, ("a",): 1.5, ("b",): 1.25}
    asks = []

    def answer(ask: ChunkAsk) -> ChunkScores:
        asks.append(ask)
        return scores(*[answers[tuple(ask.changes)]] * 2)

    found = drive(measure_fixed([{"a": "Q2_K"}, {"b": "Q2_K"}], (3, 1), 2), answer)
    assert [(tuple(ask.changes), ask.chunks) for ask in asks] == [
        ((), (3, 1)),
        (("a",), (3, 1)),
        (("b",), (3, 1)),
    ]
    assert [m.delta.mean for m in found if m.delta] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [(0.01, 0.005, TOLERANT), (0.05, 0.005, SENSITIVE), (0.03, 0.02, UNDECIDED), (None, 0, COLLAPSED)],
)
def test_verdicts_need_the_whole_interval(mean: float | None, half: float, verdict: str) -> None:
    assert LIMIT.verdict(measured({"a": "Q2_K"}, mean, half).delta) == verdict


def test_the_order_of_chunks_is_the_seeds() -> None:
    assert sorted(chunk_order(100, 1)) == list(range(100))
    assert chunk_order(100, 1) == chunk_order(100, 1) != chunk_order(100, 2)
    assert chunk_order(100, 1) != tuple(range(100))
    assert sorted(fresh_order(100, 1)) == list(range(100))
    assert fresh_order(100, 1) == fresh_order(100, 1) not in (chunk_order(100, 1), chunk_order(100, 2))


def test_a_finished_file_is_measured_like_a_variant(bench: Bench) -> None:
    ledger, measurer, _shards = bench.session()
    with ledger:
        variant = file_variant(bench.source.path, "source")
        assert measurer.nll(variant, [0, 2]).shape == (2, 15)
        assert file_variant(bench.source.path, "by another name").digest == variant.digest
        measurer.close()


def divergence_from(bench: Bench, base: Changes, variant: Changes) -> float:
    """Mean KL divergence of ``variant`` from ``base``; what they have on disk stays, as after a kill."""
    ledger, _, shards = bench.session()
    cache = PredictionCache(bench.folder / "cache", range(4), 1, 100)
    with ledger:
        measurer = Measurer(bench.engine, ledger, bench.corpus(), reference=shards.variant(base), cache=cache)
        measurer.nll(shards.variant(base), range(4))
        measurer.nll(shards.variant(variant), range(4))
        found = measurer.divergence(shards.variant(variant), range(20))
        measurer.close()
    assert found is not None
    return found[0].mean


def test_divergence_from_the_base_comes_with_the_measurement(bench: Bench) -> None:
    assert divergence_from(bench, {}, {"attn_q": "Q2_K"}) == pytest.approx(0, abs=1e-6)
    assert divergence_from(bench, {}, {"ssm_in": "Q2_K"}) > 1e-3
    shutil.rmtree(bench.folder / "cache")
    assert divergence_from(bench, {}, {"ffn_gate_exps": "Q2_K"}) > 1e-4  # decoded again where it is gone
    assert len(bench.engine.scored) == 4 * 4


def test_predictions_of_another_base_are_not_compared_with(bench: Bench) -> None:
    """Runs with two bases take turns in one folder, each killed before it could clean up."""
    other, same_as_other = {"ssm_in": "Q2_K"}, {"ssm_in": "Q2_K", "attn_q": "Q2_K"}
    ledger, measurer, shards = bench.session()
    with ledger:
        measurer.nll(shards.variant(other), range(4))
    measurer.close()
    divergence_from(bench, {}, {"attn_q": "Q2_K"})
    assert divergence_from(bench, other, same_as_other) == pytest.approx(0, abs=1e-6)


# ---- against a limit ----


@pytest.mark.parametrize(("cache", "fewest"), [(None, 2), (0, 8)], ids=["with divergence", "without"])
def test_the_first_look_is_early_only_where_the_divergence_foretells_the_spread(
    tmp_path: Path, cache: int | None, fewest: int
) -> None:
    goal = Limit(max_increase_pct=3.0)
    opened = workspace(tmp_path, goal)
    opened.settings = msgspec.structs.replace(opened.settings, kld_cache_bytes=cache)
    with opened.locked():
        found = measure_against_limit(opened, goal)
    rows = found.measurements
    assert min(row.chunks for row in rows if row.chunks) == fewest
    assert all((row.kld_mean is None) == (cache == 0) for row in rows)
    assert all(row.se_nats is not None for row in rows)


def test_the_level_counts_where_the_chunks_are_fixed(tmp_path: Path) -> None:
    """Twelve times as careful, or on few chunks: the interval is wider, never Student's 95% of a single group."""
    widths = {}
    for alpha in (0.05, 0.001):
        goal = Limit(chunks=6, alpha=alpha)
        opened = workspace(tmp_path / str(alpha), goal)
        with opened.locked():
            found = measure_against_limit(opened, goal)
        bounds = [row.ci_pct for row in found.measurements if row.ci_pct]
        widths[alpha] = np.mean([high - low for low, high in bounds])
        assert {row.chunks for row in found.measurements} == {6}
    assert widths[0.001] > 1.5 * widths[0.05]


# ---- shards ----


def test_a_variant_swaps_one_path_and_is_named_by_its_contents(bench: Bench, tmp_path: Path) -> None:
    ledger, _, shards = bench.session()
    with ledger:
        base, changed = shards.variant({}), shards.variant({"ssm_in": "Q2_K"})
        different = [a != b for a, b in zip(base.paths, changed.paths, strict=True)]
        assert sum(different) == 1
        assert base.digest != changed.digest
        assert bench.layout.raw_bytes("ssm_in") == MATRIX_Q3
    twin = make_bench(tmp_path / "twin")
    ledger, _, shards = twin.session()
    with ledger:
        assert shards.variant({}).digest == base.digest


def test_a_shard_is_made_once_ever(bench: Bench) -> None:
    ledger, _, shards = bench.session()
    with ledger:
        before = {path: path.stat().st_mtime_ns for path in shards.variant({"ssm_in": "Q2_K"}).paths}
    ledger, _, shards = bench.session()
    with ledger:
        assert {p: p.stat().st_mtime_ns for p in shards.variant({"ssm_in": "Q2_K"}).paths} == before
    assert not list(bench.folder.rglob("*.partial"))


def test_variants_are_swapped_into_one_open_model(bench: Bench) -> None:
    ledger, measurer, shards = bench.session()
    with ledger:
        base = measurer.nll(shards.variant({}), [0, 1])
        changed = measurer.nll(shards.variant({"ssm_in": "Q2_K"}), [0, 1])
        measurer.nll(shards.variant({}), [2])
        assert (bench.engine.opened, bench.engine.swapped) == (1, 2)
        assert (changed > base).mean() > 0.9
        measurer.close()
    opened_afresh = dict(bench.engine.scored)
    bench.engine.cannot_swap = "there is no room"
    assert opened_afresh
    with Ledger(bench.folder / "again.sqlite") as again:
        measurer = Measurer(bench.engine, again, bench.corpus())
        assert np.array_equal(measurer.nll(shards.variant({}), [0, 1]), base)
        assert np.array_equal(measurer.nll(shards.variant({"ssm_in": "Q2_K"}), [0, 1]), changed)
        assert bench.engine.opened == 3
        measurer.close()


def test_why_variants_are_opened_afresh_is_said_once(bench: Bench) -> None:
    notes = Recorder()
    bench.engine.cannot_swap = "its weights lie on 2 devices"
    ledger, _, shards = bench.session()
    with ledger:
        measurer = Measurer(bench.engine, ledger, bench.corpus(), notes)
        for changes in ({}, {"ssm_in": "Q2_K"}, {}, {"attn_q": "Q2_K"}):
            measurer.nll(shards.variant(changes), [0, 1, 2])
        measurer.close()
    said = [note for note in notes.notes if "afresh" in note]
    assert said == ["variants are opened afresh, not swapped in: its weights lie on 2 devices"]


def test_several_chunks_at_once_are_as_many_measurements(bench: Bench) -> None:
    ledger, measurer, shards = bench.session()
    with ledger:
        alone = measurer.nll(shards.variant({}), range(5))
        measurer.close()
        bench.engine.identity, bench.engine.chunks_at_once = "fake, 4 at once", 4
        assert np.array_equal(measurer.nll(shards.variant({}), range(5)), alone)
        assert measurer.measured == 10
        measurer.close()


def test_shards_made_ahead_are_the_same_files(bench: Bench) -> None:
    wanted = [{"ssm_in": "Q2_K"}, {"attn_q": "Q2_K"}, {"ffn_down_exps": "Q2_K"}]
    ledger, measurer, shards = bench.session()
    with ledger:
        measurer.close()
        with shards.made_ahead(wanted):
            ahead = [shards.variant(changes) for changes in wanted]
    for variant in ahead:
        for path in variant.paths:
            path.unlink(missing_ok=True)
    ledger, measurer, shards = bench.session()
    with ledger:
        measurer.close()
        assert [shards.variant(changes).digest for changes in wanted] == [v.digest for v in ahead]


def test_a_shard_that_fails_ahead_fails_where_it_is_wanted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, measurer, shards = bench.session()
    with ledger:
        measurer.close()
        shards.variant({})
        monkeypatch.setattr("cerebellum.shards.write_gguf", _full_disk)
        with shards.made_ahead([{"ssm_in": "Q2_K"}]), pytest.raises(BadInput, match="the disk is full"):
            shards.variant({"ssm_in": "Q2_K"})


def _full_disk(*_: object) -> int:
    raise BadInput("the disk is full")
