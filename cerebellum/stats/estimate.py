"""A mean with its standard error: what measurements become before anyone asks for an interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cerebellum.stats.paired import CONFIDENCE, Floats, Interval, student_quantile


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """``mean`` and its standard error ``se`` in one unit, from ``n`` chunks.

    Sums and multiples are estimates again; bounds are made only by ``interval``, where Student's quantile
    for ``n`` chunks widens them. Storing bounds instead and dividing them by 1.96 later would inflate the
    standard error of 4 chunks by 62%.
    """

    mean: float
    se: float
    n: int

    @classmethod
    def of(cls, values_N: Floats) -> Estimate:
        """Returns the mean of one value a chunk, (N,), for text like this: no finite-population correction."""
        values = np.asarray(values_N, np.float64)
        return cls(mean=float(values.mean()), se=_standard_error(values), n=len(values))

    @classmethod
    def exact(cls, mean: float) -> Estimate:
        """Returns a number that is known or foretold, with no error of its own; no chunk stands behind it."""
        return cls(mean=mean, se=0.0, n=0)

    @classmethod
    def from_interval(cls, interval: Interval) -> Estimate:
        """Returns the estimate whose Student interval at the usual confidence is ``interval``.

        Bounds that come without a count of chunks say nothing of an error, and are dropped.
        """
        half = (interval.high - interval.low) / 2
        if interval.n < 1 or not half:
            return cls(mean=interval.mean, se=0.0, n=interval.n)
        if interval.n == 1 or not math.isfinite(half):
            return cls(mean=interval.mean, se=math.inf, n=interval.n)
        return cls(mean=interval.mean, se=half / student_quantile(CONFIDENCE, interval.n - 1), n=interval.n)

    def __add__(self, other: Estimate) -> Estimate:
        """Adds an estimate with an independent error: squared standard errors add up.

        The sum counts as many chunks as the part with the fewest, which keeps its interval on the safe side.
        """
        return Estimate(
            mean=self.mean + other.mean,
            se=math.hypot(self.se, other.se),
            n=_fewest((self, other)),
        )

    def __mul__(self, factor: float) -> Estimate:
        """Scales the mean and its error."""
        return Estimate(mean=self.mean * factor, se=self.se * abs(factor), n=self.n)

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """Returns Student's interval for ``n`` chunks; without width where the number is exact."""
        half = self.se * student_quantile(confidence, self.n - 1) if self.se else 0.0
        return Interval(
            mean=self.mean, low=self.mean - half, high=self.mean + half, n=self.n, population=self.n
        )


def together(estimates: Iterable[Estimate]) -> Estimate:
    """Adds estimates whose errors go together, as those of one role's layers do: standard errors add up."""
    known = list(estimates)
    return Estimate(
        mean=sum(estimate.mean for estimate in known),
        se=sum(estimate.se for estimate in known),
        n=_fewest(known),
    )


def ratio_estimate(values_N: Floats, reference_N: Floats, reference_mean: float) -> Estimate:
    """Returns the mean of ``values_N``, were it over the chunks on which the reference has ``reference_mean``.

    A few chunks may be harder than the rest; a reference that is known on all of them says by how much. This
    is the ratio estimator (Cochran, Sampling Techniques, 1977, 6.2) with the standard error of its
    residuals. Where the reference is not surely positive on these chunks, the plain mean stands.
    """
    values = np.asarray(values_N, np.float64)
    reference = np.asarray(reference_N, np.float64)
    own = Estimate.of(reference)
    if not (own.interval().low > 0 and reference_mean > 0):
        return Estimate.of(values)
    ratio = float(values.mean()) / own.mean
    residuals = values - ratio * reference
    return Estimate(mean=float(values.mean()), se=_standard_error(residuals), n=len(values)) * (
        reference_mean / own.mean
    )


def nested_sum(values_N: Floats, values_n: Floats) -> Estimate:
    """Returns the sum of two means over nested chunks: one on all ``N``, one on the first ``n`` of them.

    Both vary with the same chunks, so their errors are not independent: each chunk's share in the whole
    sum is taken first, and the standard error is that of these shares.
    """
    many = np.asarray(values_N, np.float64)
    few = np.asarray(values_n, np.float64)
    if len(few) > len(many):
        raise ValueError(f"{len(few)} chunks are not the first of {len(many)}")
    shares = many - many.mean()
    shares[: len(few)] += (few - few.mean()) * len(many) / len(few)
    return Estimate(mean=float(many.mean() + few.mean()), se=_standard_error(shares), n=len(few))


def _standard_error(values: Floats) -> float:
    """Returns the standard error of a mean; without end for a single value, which says nothing of spread."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _fewest(estimates: Iterable[Estimate]) -> int:
    """Returns the fewest chunks behind some estimates; exact numbers need none and do not count."""
    return min((estimate.n for estimate in estimates if estimate.n), default=0)
