"""What to measure next, and when to stop. No I/O: generators yield an ``Ask`` and are sent the answer.

So the same logic runs on an engine, on a replayed ledger and in a unit test. A race advances all
undecided candidates together, in blocks that grow, until a confidence sequence puts each on one side
of the threshold; near-ties that nobody cares about are called either way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cerebellum.stats.paired import Interval, as_nats, mean_interval
from cerebellum.stats.sequential import StoppingRule, looks

TOLERANT, SENSITIVE, UNDECIDED, COLLAPSED = "tolerant", "sensitive", "undecided", "collapsed"

Vector = NDArray[np.float64]
Changes = Mapping[str, str]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Please measure the base with ``changes`` on these ``chunks`` of the text.

    The answer is the mean NLL of each chunk, nats/token, in that order; NaN where not finite.
    """

    changes: Changes
    chunks: tuple[int, ...]


Sweep = Generator[Ask, Vector, T]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """``limit_pct`` on the increase of perplexity; within ``indifference_pct`` of it any verdict will do."""

    limit_pct: float
    indifference_pct: float = 0.0

    @property
    def nats(self) -> float:
        return as_nats(self.limit_pct)

    def verdict(self, delta: Interval | None) -> str:
        """Decided when a bound clears the limit, or clears it but for the indifference."""
        if delta is None:
            return COLLAPSED
        forgiving = as_nats(self.limit_pct + self.indifference_pct)
        strict = as_nats(max(self.limit_pct - self.indifference_pct, -99.0))
        if delta.high < self.nats or (delta.mean < self.nats and delta.high < forgiving):
            return TOLERANT
        if delta.low > self.nats or (delta.mean >= self.nats and delta.low > strict):
            return SENSITIVE
        return UNDECIDED

    def near_tie(self, delta: Interval | None) -> bool:
        """Whether the verdict leans on the indifference."""
        if delta is None or self.verdict(delta) == UNDECIDED:
            return False
        return bool(delta.low <= self.nats <= delta.high)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The paired change of some groups at one type against the base, on ``delta.n`` chunks.

    ``delta`` is in nats/token; None when the logits were not finite: the variant collapsed.
    ``trace`` holds the interval at every look. ``kld`` (nats/token) and ``top1`` are against the base.
    """

    changes: Changes
    delta: Interval | None
    trace: tuple[Interval, ...] = field(default=(), compare=False)
    kld: Interval | None = None
    top1: float | None = None

    def with_divergence(self, kld: Interval, top1: float) -> Measurement:
        return replace(self, kld=kld, top1=top1)

    def as_json(self, threshold: Threshold) -> dict[str, Any]:
        """A row of measurements.json, the format that ``plan --measurements`` reads."""
        kinds = sorted(set(self.changes.values()))
        return {
            "groups": sorted(self.changes),
            "type": kinds[0] if len(kinds) == 1 else dict(self.changes),
            **interval_json(self.delta),
            "verdict": threshold.verdict(self.delta),
            "near_tie": threshold.near_tie(self.delta),
            "kld_mean": self.kld.mean if self.kld else None,
            "kld_ci": _finite_pair(self.kld),
            "top1_agreement": self.top1,
            "trace": [interval_json(look) for look in self.trace],
        }


def interval_json(delta: Interval | None) -> dict[str, Any]:
    """A paired change as artifacts hold it; null where nothing was measured or an interval has no end."""
    if delta is None:
        return {"delta_pct": None, "ci_pct": None, "chunks": None}
    mean, low, high = delta.percent()
    finite = bool(np.isfinite([low, high]).all())
    return {"delta_pct": mean, "ci_pct": [low, high] if finite else None, "chunks": delta.n}


def _finite_pair(interval: Interval | None) -> list[float] | None:
    if interval is None or not np.isfinite([interval.low, interval.high]).all():
        return None
    return [interval.low, interval.high]


def chunk_order(n_chunks: int, seed: int) -> tuple[int, ...]:
    """The one seeded order in which base and all variants visit the chunks of a text."""
    return tuple(int(i) for i in np.random.default_rng(seed).permutation(n_chunks))


def measure_fixed(
    candidates: Iterable[Changes], chunks: tuple[int, ...], population: int
) -> Sweep[tuple[Measurement, ...]]:
    """Every candidate alone on the same ``chunks``; Student intervals, no stopping."""
    base = yield Ask(changes={}, chunks=chunks)
    found = []
    for changes in candidates:
        difference = (yield Ask(changes=changes, chunks=chunks)) - base
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
    undecided, base = list(runners), np.empty(0)
    for look in looks(settings.burn_in, settings.growth, settings.max_chunks):
        if not undecided:
            break
        base = np.append(base, (yield Ask(changes={}, chunks=settings.order[len(base) : look])))
        for runner in undecided:
            chunks = settings.order[len(runner.differences) : look]
            answer = yield Ask(changes=runner.changes, chunks=chunks)
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
