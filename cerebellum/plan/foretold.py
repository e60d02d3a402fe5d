"""What a combination of groups will do, foretold from its parts and from combinations that were measured.

The damage of a group alone is measured on few chunks and is noisy: the demo's attn_q read -0.14% on 8 chunks and
is +0.24%. Its KL divergence has about a ninth of that noise and is nearly additive, but it is no change of
perplexity: groups differ in how much of it is harm. So the belief is Gaussian (Bayesian linear regression,
Bishop, Pattern Recognition and Machine Learning, 2006, 3.3): every damage is its divergence times a ratio that
all share and one of its own, corrected by what was measured of the group, and each combination that was measured
rescales them all. Nothing here decides what ships: what is foretold well saves measurements, no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cerebellum.stats.paired import CONFIDENCE, Interval, student_quantile
from cerebellum.stats.sequential import chance_below

Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]

_RATIO = 0.8
_SHARED_SD = 0.4
_OWN_SD = 0.4
"""Harm over divergence: what is expected, and its spread over models and over groups (the demo's: 0.4 to 1.6)."""

_INTERACTION_SD = 0.15
_MODEL_SD = 0.05
"""What the whole does beyond the sum of its parts, as a share: common to all combinations, and of each."""

_UNKNOWN_NATS = 1.0  # the spread of a damage about which nothing is known
_LEAST_VARIANCE = 1e-200  # nats squared: below it nothing is left to learn, and a division by it overflows


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is known of some groups alone: their change and divergence, nats/token."""

    delta: Interval
    kld: float | None


@dataclass(frozen=True, kw_only=True)
class Belief:
    """What one combination is believed to do, nats/token: a normal law."""

    mean: float
    sd: float

    def under(self, limit_nats: float) -> float:
        """Returns the chance that it lies under a limit."""
        return chance_below(limit_nats, self.mean, self.sd)


class Foretold:
    """A belief about the damage of every part and of all their combinations, nats/token."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._mean, self._cov = _prior(parts)
        self._sums = np.zeros(len(parts))
        for place, part in enumerate(parts):
            row = np.zeros(len(parts) + 1)
            row[place] = 1.0
            self._update(row, part.delta.mean, standard_error(part.delta))
        self._sums = np.maximum(self._mean[:-1], 0.0)

    @property
    def parts(self) -> Vector:
        """What each part is believed to do, within a combination."""
        return np.asarray(self._mean[:-1] + self._mean[-1] * self._sums)

    def learn(self, members: Mask, delta: Interval) -> None:
        """Takes in the measurement of a combination."""
        error = math.hypot(standard_error(delta), self._model_sd(members))
        self._update(self._row(members), delta.mean, error)

    def of(self, members: Mask) -> Belief:
        """Returns what a combination is believed to do."""
        row = self._row(members)
        sd = math.hypot(math.sqrt(max(float(row @ self._cov @ row), 0.0)), self._model_sd(members))
        return Belief(mean=float(row @ self._mean), sd=sd)

    def _row(self, members: Mask) -> Vector:
        together = float(self._sums[members].sum()) if members.sum() > 1 else 0.0
        return np.append(members.astype(np.float64), together)

    def _model_sd(self, members: Mask) -> float:
        return _MODEL_SD * float(self._sums[members].sum()) if members.sum() > 1 else 0.0

    def _update(self, row: Vector, seen: float, error: float) -> None:
        """Conditions the belief on ``row @ truth = seen``, with an error."""
        spread = self._cov @ row
        variance = float(row @ spread) + error**2
        if variance < _LEAST_VARIANCE:
            return
        self._mean = self._mean + spread * ((seen - float(row @ self._mean)) / variance)
        self._cov = self._cov - np.outer(spread, spread) / variance


def _prior(parts: Sequence[Part]) -> tuple[Vector, NDArray[np.float64]]:
    """Returns mean and covariance of the damages and, last, of the interaction, before anything was measured."""
    known = [part.kld for part in parts if part.kld is not None and part.kld > 0]
    if len(known) == len(parts):
        kld = np.array(known)
        mean = _RATIO * kld
        cov = _SHARED_SD**2 * np.outer(kld, kld) + np.diag((_OWN_SD * kld) ** 2)
    else:
        mean = np.zeros(len(parts))
        cov = np.eye(len(parts)) * _UNKNOWN_NATS**2
    whole = np.zeros((len(parts) + 1, len(parts) + 1))
    whole[:-1, :-1], whole[-1, -1] = cov, _INTERACTION_SD**2
    return np.append(mean, 0.0), whole


def standard_error(delta: Interval) -> float:
    """Returns the standard error behind an interval; where only bounds were recorded, they pass for 95% ones."""
    if delta.se is not None:
        return min(delta.se, _UNKNOWN_NATS)
    half = (delta.high - delta.low) / 2
    return min(half / student_quantile(CONFIDENCE, 10**6), _UNKNOWN_NATS)


_BINS = 400


def frontier(damages: Sequence[float], bytes_saved: Sequence[int], most: float) -> list[Mask]:
    """Returns the sets that save the most bytes for every sum of damages up to ``most``, each once.

    Dynamic programming over damages in ``most``/400: every cap at once, which an exact knapsack would be asked
    for one by one. What does no damage is in every set.
    """
    unit = most / _BINS
    weights = [round(min(max(damage, 0.0) / unit, _BINS + 1)) for damage in damages]
    best = np.zeros(_BINS + 1, np.int64)
    taken = np.zeros((len(weights), _BINS + 1), np.bool_)
    for place, (weight, n_bytes) in enumerate(zip(weights, bytes_saved, strict=True)):
        if weight > _BINS:
            continue
        with_it = np.full(_BINS + 1, -1, np.int64)
        with_it[weight:] = best[: _BINS + 1 - weight] + n_bytes
        taken[place] = with_it > best
        best = np.maximum(best, with_it)
    steps = [cap for cap in range(_BINS + 1) if cap == 0 or best[cap] > best[cap - 1]]
    return [_traced(taken, weights, cap) for cap in steps if best[cap] > 0]


def _traced(taken: NDArray[np.bool_], weights: Sequence[int], cap: int) -> Mask:
    """Follows the choices back from a cap."""
    members = np.zeros(len(weights), np.bool_)
    for place in reversed(range(len(weights))):
        if taken[place, cap]:
            members[place] = True
            cap -= weights[place]
    return members
