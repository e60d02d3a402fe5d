"""Means over several texts that each count alike, and how sure their sign is, whenever one looks.

Every text is a stratum of its own: chunks of each are drawn without replacement in a random order, so the mean over
texts has the variance that the strata's add up to (Cochran, Sampling Techniques, 1977, chapter 5), and Student's
degrees of freedom by Welch and Satterthwaite. What is asked is what these texts as a whole would say: a text that was
read to its end has no error left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from cerebellum.stats.paired import Floats, Interval
from cerebellum.stats.sequential import clock, looks, spending, upper_quantile

_NEVER_ENDS = 10**12


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """One value a chunk of a text, (n,), and how many chunks the text has."""

    values_N: Floats
    population: int


@dataclass(frozen=True, kw_only=True)
class StrataMean:
    """The mean over texts, its standard error, and the degrees of freedom of that; ``n`` chunks were read."""

    mean: float
    se: float
    degrees: int
    n: int

    @classmethod
    def of(cls, strata: Sequence[Stratum]) -> StrataMean:
        """Returns the mean of the texts' means. The error has no end where one chunk of a longer text was read."""
        means = [float(np.mean(stratum.values_N)) for stratum in strata]
        variances = [_variance(stratum) / len(strata) ** 2 for stratum in strata]
        total = sum(variances)
        within = [(v, len(s.values_N) - 1) for v, s in zip(variances, strata, strict=True) if v > 0]
        degrees = 0
        if within and math.isfinite(total):
            degrees = max(1, int(total**2 / sum(v**2 / max(d, 1) for v, d in within)))
        return cls(
            mean=sum(means) / len(strata),
            se=math.sqrt(total),
            degrees=degrees,
            n=sum(len(stratum.values_N) for stratum in strata),
        )

    def interval(self, alpha: float) -> Interval:
        """Returns both bounds, each wrong with chance ``alpha``."""
        half = 0.0 if self.se == 0 else math.inf
        if 0 < self.se < math.inf and alpha > 0:
            half = self.se * upper_quantile(alpha, self.degrees)
        return Interval(
            mean=self.mean, low=self.mean - half, high=self.mean + half, n=self.n, population=self.n
        )

    def wrong_sign(self) -> float:
        """Returns the chance of a mean so far from zero, were the sign the other: the one-sided p-value."""
        if self.se == 0:
            return 0.0 if self.mean else 1.0
        if not math.isfinite(self.se):
            return 1.0
        return float(student_t.sf(abs(self.mean) / self.se, self.degrees))


def _variance(stratum: Stratum) -> float:
    """Returns the variance of the mean of what was read, about that of the whole text."""
    n = len(stratum.values_N)
    if n >= stratum.population:
        return 0.0
    if n < 2:
        return math.inf
    return float(np.var(stratum.values_N, ddof=1)) / clock(n, stratum.population)


def like_these(values_N: Floats) -> Stratum:
    """Returns values as a stratum of text like this, of which there is no end."""
    return Stratum(values_N=values_N, population=_NEVER_ENDS)


@dataclass(frozen=True, kw_only=True)
class Looks:
    """When to look, by chunks of each text, and the share of the level that each look spends.

    The shares add up to one, so that whatever is claimed at any of the looks is wrong with the chance of the whole
    level at most: a union bound, as in ``SpendingRule``.
    """

    at: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def planned(cls, first: int, growth: float, limit: int, longest: int) -> Looks:
        """Returns looks from ``first`` chunks to ``limit``; a last one at the ``longest`` text's end is exact."""
        at = looks(min(first, limit), growth, limit)
        spent = spending(at, longest if limit >= longest else limit + 1)
        return cls(at=at, shares=tuple(spent.get(n, 0.0) for n in at))
