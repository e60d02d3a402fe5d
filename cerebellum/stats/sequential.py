"""When to stop: confidence sequences for a mean, valid at every look, over a finite text.

The truth sought is the mean over all N chunks of the text, visited in random order without
replacement. The centred partial sum S_n is then a discrete Brownian bridge, and
``S_n / (1 - n/N)`` is Brownian motion at the time ``tau = n N / (N - n)`` (Doob's transformation of
the bridge): the finite-population correction of a confidence *sequence* is a change of clock. At n = N
the clock is infinite, the width zero and the answer exact.

The boundary is the one-sided asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy
and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences" (2021): with
probability 1 - alpha, for all times together, the mean is below

    mean_n + sd_n sqrt( 2 (tau rho^2 + 1) / (tau^2 rho^2)  log(1 + sqrt(tau rho^2 + 1) / (2 alpha)) ).

It is asymptotic, and looks begin after a handful of chunks. The estimated standard deviation is paid
for as in Student's test: the boundary's normal quantile is replaced by the t quantile of equal tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

from cerebellum.stats.paired import Interval


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """``alpha``: chance that a bound is ever wrong, each side; ``population``: chunks in the text.

    The boundary is tightest when ``tightest_at`` chunks are in, which is where decisions cluster.
    """

    alpha: float
    population: int
    tightest_at: int = 24

    def interval(self, values_N: NDArray[np.floating]) -> Interval:
        """Both bounds after these chunks; each holds at all looks together with chance 1 - alpha."""
        n, mean = len(values_N), float(np.mean(values_N))
        half = 0.0
        if n < self.population:
            spread = float(np.std(values_N, ddof=1)) if n > 1 else math.inf
            half = spread * multiplier(n, self.population, self.alpha, self.tightest_at)
        return Interval(mean=mean, low=mean - half, high=mean + half, n=n, population=self.population)


@lru_cache(maxsize=4096)
def multiplier(n: int, population: int, alpha: float, tightest_at: int) -> float:
    """Half-width after ``n`` of ``population`` chunks, in standard deviations of a chunk."""
    if n < 2:
        return math.inf
    tau = n * population / (population - n)
    rho2 = _rho_squared(alpha, tightest_at)
    log_term = math.log1p(math.sqrt(tau * rho2 + 1) / (2 * alpha))
    quantile = math.sqrt(2 * (tau * rho2 + 1) / (tau * rho2) * log_term)
    return _student(quantile, n - 1) / math.sqrt(tau)


def _rho_squared(alpha: float, tightest_at: int) -> float:
    """Their rule for the width at one time, at 2 alpha because the bound is one-sided."""
    log = -2 * math.log(2 * alpha)
    return (log + math.log(log) + 1) / tightest_at if log > 1 else 1 / tightest_at


def _student(quantile: float, degrees: int) -> float:
    """The t quantile with the upper tail that ``quantile`` has under the normal law."""
    return float(student_t.isf(norm.sf(quantile), degrees))


def looks(burn_in: int, growth: float, limit: int) -> list[int]:
    """How many chunks are in at each look: from ``burn_in``, growing geometrically, ending at ``limit``."""
    found, n = [], float(burn_in)
    while n < limit:
        found.append(math.ceil(n))
        n = max(n * growth, n + 1)
    return [*found, limit]


def union_share(alpha: float, members: int) -> float:
    """The level of each member of a family whose chance of any error is to stay below ``alpha``.

    A union bound. Holm's steps would gain nothing: a verdict settles one of two opposite hypotheses,
    so every member, settled or not, keeps one true hypothesis that must not be rejected.
    """
    return alpha / max(members, 1)
