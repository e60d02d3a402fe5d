"""The replay of benchmarks/ must be able to fail: rules broken on purpose err too often, the shipped one does not."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def replay() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("replay")
    finally:
        sys.path.remove(str(BENCHMARKS))


def asked(replay: ModuleType, sabotage: str | None, **changed: object) -> Namespace:
    ways = (replay.SABOTAGED[sabotage],) if sabotage else (replay.SHIPPED,)
    few = {"thresholds": [3.0], "races": 60, "nasty": 30, "orders": 6, "seed": 1}
    return Namespace(ways=ways, sabotage=sabotage, sections=None, names=["embedded"], **(few | changed))


def errors(replay: ModuleType, sabotage: str | None, races: int = 60) -> bool:
    (row,) = replay.hardest_rows(asked(replay, sabotage, races=races), "embedded")
    return bool(replay.judged("hardest", row))


@pytest.mark.parametrize(("sabotage", "races"), [("looks", 60), ("share", 150)])
def test_a_broken_rule_is_seen(replay: ModuleType, sabotage: str, races: int) -> None:
    assert errors(replay, sabotage, races)


def test_the_shipped_rule_is_not_blamed(replay: ModuleType) -> None:
    assert not errors(replay, None)


def test_too_many_errors_end_with_one(
    replay: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"rule": "looks", "never tolerant": replay.rate(9, 60)}
    monkeypatch.setattr(replay, "RECORDED", {"hardest": lambda _asked, _name: iter([wrong])})
    assert replay.replay(asked(replay, "looks")) == 1
    assert "more errors than allowed" in capsys.readouterr().out


def test_the_oracle_and_the_replay_have_one_truth(replay: ModuleType) -> None:
    """What the oracle ships stays under the limit by the population's own reckoning, and saves what it says."""
    population = replay.load("embedded").population
    assert population.interaction.per_nat > 0 and population.interaction.scatter > 0
    ran = replay.run_once(population, replay.SHIPPED, 3.0, np.random.default_rng(3))
    best = replay.best_possible(population, 3.0)
    assert 0.8 * best < ran.bytes_saved <= 1.1 * best
    assert ran.true_pct < 3.2 and not ran.wrong_tolerant
