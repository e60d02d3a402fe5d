"""Weights swapped in place: bit for bit a fresh load, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cerebellum.cli import doctor
from cerebellum.cli.doctor import SWAP_TYPES, _TrialShards, check_swaps
from cerebellum.engine.protocols import CannotSwap
from cerebellum.llama import resident
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.progress import Silent
from cerebellum.settings import DEMO_MODEL
from cerebellum.source import open_source

CTX = 64


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> _TrialShards:
    folder = tmp_path_factory.mktemp("shards")
    return _TrialShards(open_source(DEMO_MODEL), folder, 2)


@pytest.fixture(scope="module")
def engine() -> LlamaEngine:
    return LlamaEngine(EngineSettings(threads=1))


@pytest.fixture(scope="module")
def tokens(engine: LlamaEngine) -> np.ndarray:
    return np.random.default_rng(0).integers(100, engine.vocab_size(DEMO_MODEL), CTX, np.int32)


@pytest.mark.parametrize(
    ("types", "walk"),
    [(("Q2_K", "Q3_K", "IQ3_S"), 6), pytest.param(SWAP_TYPES, 40, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_every_group_at_every_type_whole_plans_and_walks_are_fresh_loads(
    engine: LlamaEngine, types: tuple[str, ...], walk: int
) -> None:
    report = check_swaps(DEMO_MODEL, engine, Silent(), types, walk)
    assert report.wrong == () and report.refusal == "" and report.ok
    assert report.tried > 10 * len(types)


def test_the_check_sees_a_swap_that_does_not_take(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would call anything right."""
    monkeypatch.setattr(resident.Weights, "_point", lambda self, wanted: None)
    report = check_swaps(DEMO_MODEL, engine, Silent(), types=("Q2_K",), walk=0)
    assert len(report.wrong) > 10 and not report.ok
    assert "the base" not in report.wrong


def test_shards_make_room_for_each_other(
    engine: LlamaEngine, shards: _TrialShards, tokens: np.ndarray
) -> None:
    """With room for one staged shard, the one before goes, the one that is in use not under the model."""
    name = "attn_q"
    place = 1 + list(shards.groups).index(name)
    base = shards.paths({})
    one, other = (shards.paths({name: kind})[place] for kind in ("Q2_K", "Q8_0"))
    tight = LlamaEngine(replace(engine.settings, staged_bytes=int(other.stat().st_size * 1.2)))
    with tight.resident(base, CTX) as model:
        plain = model.logits(tokens)
        model.swap([one])
        first = model.logits(tokens)
        model.swap([other])
        assert not np.array_equal(model.logits(tokens), first)
        assert model._weights is not None and len(model._weights._staged) == 1
        model.swap([one])
        assert np.array_equal(model.logits(tokens), first)
        model.swap([])
        assert np.array_equal(model.logits(tokens), plain)


def test_what_does_not_fit_leaves_the_base(
    engine: LlamaEngine, shards: _TrialShards, tokens: np.ndarray
) -> None:
    names = list(shards.groups)[:2]
    base = shards.paths({})
    paths = shards.paths(dict.fromkeys(names, "Q8_0"))[1:3]
    room = int(max(path.stat().st_size for path in paths) * 1.1)
    with LlamaEngine(replace(engine.settings, staged_bytes=room)).resident(base, CTX) as model:
        plain = model.logits(tokens)
        model.swap(paths[:1])
        with pytest.raises(CannotSwap, match="does not fit beside the model"):
            model.swap(paths)
        assert np.array_equal(model.logits(tokens), plain)


def test_a_single_file_is_not_swapped(engine: LlamaEngine, shards: _TrialShards) -> None:
    with (
        engine.resident([DEMO_MODEL], CTX) as model,
        pytest.raises(CannotSwap, match="one file"),
    ):
        model.swap(shards.paths({})[1:2])


def test_a_struct_that_is_not_what_the_header_says_is_never_patched(
    engine: LlamaEngine, shards: _TrialShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_dims", lambda tensor: (*tensor.shape[::-1], 1, 1, 1)[:4])
    with (
        engine.resident(shards.paths({}), CTX) as model,
        pytest.raises(CannotSwap, match="not laid out as the pinned one's"),
    ):
        model.swap(shards.paths({next(iter(shards.groups)): "Q2_K"})[1:2])


def test_the_report_says_why_nothing_was_swapped(
    monkeypatch: pytest.MonkeyPatch, engine: LlamaEngine
) -> None:
    def refuse(*_: object) -> int:
        raise CannotSwap("its weights lie on 2 devices")

    monkeypatch.setattr(resident.Weights, "_check", refuse)
    report = doctor.check_swaps(DEMO_MODEL, engine, Silent(), types=("Q2_K",), walk=0)
    assert report.as_json() == {
        "tried": 0,
        "wrong": [],
        "refusal": "its weights lie on 2 devices",
        "ok": False,
    }


def test_no_shard_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: LlamaEngine
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    check_swaps(DEMO_MODEL, engine, Silent(), types=(), walk=0)
    assert list(tmp_path.iterdir()) == []
