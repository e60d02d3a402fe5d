"""What to measure against a limit, and when to stop. No I/O: generators yield an ``ChunkAsk``, are sent the answer.

So the same logic runs on an engine, on a replayed ledger and in a unit test. A race advances all
undecided candidates together, in blocks that grow, until a confidence sequence puts each on one side
of the threshold; near-ties that nobody cares about are called either way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cerebellum.stats.paired import Interval, mean_interval
from cerebellum.stats.sequential import StoppingRule, looks
from cerebellum.verdicts import UNDECIDED, Changes, Measurement, Threshold

Vector = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ChunkAsk:
    """Please measure the base with ``changes`` on these ``chunks`` of the text.

    The answer is the mean NLL of each chunk, nats/token, in that order; NaN where not finite.
    """

    changes: Changes
    chunks: tuple[int, ...]


Sweep = Generator[ChunkAsk, Vector, T]


def chunk_order(n_chunks: int, seed: int) -> tuple[int, ...]:
    """The one seeded order in which base and all variants visit the chunks of a text."""
    return tuple(int(i) for i in np.random.default_rng(seed).permutation(n_chunks))


def measure_fixed(
    candidates: Iterable[Changes], chunks: tuple[int, ...], population: int
) -> Sweep[tuple[Measurement, ...]]:
    """Every candidate alone on the same ``chunks``; Student intervals, no stopping."""
    base = yield ChunkAsk(changes={}, chunks=chunks)
    found = []
    for changes in candidates:
        difference = (yield ChunkAsk(changes=changes, chunks=chunks)) - base
        delta = mean_interval(difference, population) if np.isfinite(difference).all() else None
        found.append(Measurement(changes=dict(changes), delta=delta))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """``order``: the chunks in the order they are visited, ``max_chunks`` of them at most.

    The first look comes after ``burn_in`` chunks, where Student's correction is no longer absurd; each
    block grows by ``growth``, so that models are switched rarely and little is measured in vain.
    """

    order: tuple[int, ...]
    max_chunks: int
    threshold: Threshold
    rule: StoppingRule
    burn_in: int = 8
    growth: float = 1.5


@dataclass
class _Runner:
    """A candidate under way: its paired differences so far, nats/token."""

    changes: Changes
    differences: Vector = field(default_factory=lambda: np.empty(0))
    trace: list[Interval] = field(default_factory=list)
    collapsed: bool = False

    def measurement(self) -> Measurement:
        delta = None if self.collapsed else self.trace[-1]
        return Measurement(changes=dict(self.changes), delta=delta, trace=tuple(self.trace))


def race(candidates: Sequence[Changes], settings: RaceSettings) -> Sweep[tuple[Measurement, ...]]:
    """All candidates against one threshold, each for as long as it takes to decide.

    Candidates that are nearest to a verdict go first in each round, so that an interrupted race has
    settled as many as it could.
    """
    runners = [_Runner(changes=changes) for changes in candidates]
    undecided = list(runners)
    base = np.empty(0)
    for look in looks(settings.burn_in, settings.growth, settings.max_chunks):
        if not undecided:
            break
        base = np.append(base, (yield ChunkAsk(changes={}, chunks=settings.order[len(base) : look])))
        for runner in undecided:
            chunks = settings.order[len(runner.differences) : look]
            answer = yield ChunkAsk(changes=runner.changes, chunks=chunks)
            _advance(runner, answer - base[len(runner.differences) : look], settings)
        undecided = sorted(
            (runner for runner in undecided if not _settled(runner, settings)),
            key=lambda runner: -_distance(runner.trace[-1], settings.threshold.nats),
        )
    return tuple(runner.measurement() for runner in runners)


def _advance(runner: _Runner, difference: Vector, settings: RaceSettings) -> None:
    runner.differences = np.append(runner.differences, difference)
    if not np.isfinite(difference).all():
        runner.collapsed = True
        return
    runner.trace.append(settings.rule.interval(runner.differences))


def _settled(runner: _Runner, settings: RaceSettings) -> bool:
    return runner.collapsed or settings.threshold.verdict(runner.trace[-1]) != UNDECIDED


def _distance(delta: Interval, threshold_nats: float) -> float:
    """How many half-widths the mean lies from the threshold."""
    return abs(delta.mean - threshold_nats) / max(delta.high - delta.mean, 1e-12)
