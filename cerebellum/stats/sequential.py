"""When to stop: bounds of a mean that hold at every look, over a finite text read in random order.

The truth sought is the mean over all N chunks of the text, visited in random order without
replacement. The centred partial sum S_n is then a discrete Brownian bridge, and
``S_n / (1 - n/N)`` is Brownian motion at the time ``tau = n N / (N - n)`` (Doob's transformation of
the bridge): the finite-population correction of a *sequence* of intervals is a change of clock. At n = N
the clock is infinite, the width zero and the answer exact.

Three rules, for three questions (docs/STATISTICS.md says what each promises):

- ``SpendingRule``: is the mean below a limit? A share of the level is spent at each planned look, and the
  spread is foretold by the KL divergence that is measured anyway. The rule of the groups and combinations.
- ``StoppingRule``: the same question, with a bound for all times and nothing but the differences. It asks for
  more chunks; where no divergence was measured it stands in, being off on skewed differences a third as often.
- ``FixedWidth``: how large is the mean, to within so much? The stop looks at the spread alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

from cerebellum.stats.paired import CONFIDENCE, Interval, student_quantile

Vector = NDArray[np.float64]

_SPENT_BY_FIRST = 0.1
_SPENDING_POWER = 0.3
"""A tenth of the level at the first look, the rest as 1 - 0.9 (first/n)^0.3: simulated, benchmarks/replay.py."""

_PRIOR_SCALE = 1.2
_PRIOR_SCALE_DEGREES = 10
"""Measured over foretold standard deviation before a run has measured its own, and what that is worth."""

PROVEN = 2.5
"""About how many standard errors from the limit a mean lies when a bound clears it: for forecasts of chunks."""

_PRIOR_DEGREES = 4
_PRIOR_MARGIN = 1.1
"""What a foretold standard deviation is worth beside a measured one, and how much wider it is taken."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Paired differences of one variant, a value a chunk; ``foretold_sd`` of a chunk, where KL was measured."""

    values_N: Vector
    foretold_sd: float | None = None


class Rule(Protocol):
    """Turns what was measured so far into intervals, each bound wrong with chance ``alpha`` over all looks."""

    @property
    def alpha(self) -> float: ...

    def intervals(self, samples: Sequence[Sample]) -> list[Interval]:
        """Returns the interval of each sample; all samples of a run are given, since they share what they teach."""
        ...


def foretold_sd(kld_mean: float, tokens: int) -> float:
    """Returns the standard deviation of a chunk's mean difference that a divergence foretells, nats/token.

    A token's change of NLL has, given its context, the divergence as its mean and about twice the divergence
    as its variance (the second-order expansion of the log-likelihood ratio), and ``tokens`` of them are averaged.
    """
    return math.sqrt(2 * max(kld_mean, 0.0) / tokens)


@dataclass(frozen=True, kw_only=True)
class SpendingRule:
    """Spends ``alpha``, each side, over planned ``looks``; a union bound, whatever joins the looks.

    The bound of a look is Student's, at the look's share of the level. Where the divergence was measured, the
    variance is a weighted mean of the measured and the foretold one, and a few chunks have as many degrees of
    freedom more as the foretold one is worth. How far the two differ on this text, the groups of the run teach
    together: a constant instead would take the family error from 2% to 10% where it is a quarter too small.
    """

    alpha: float
    population: int
    looks: tuple[int, ...]

    def intervals(self, samples: Sequence[Sample]) -> list[Interval]:
        """Returns an interval for each sample; its length must be one of the looks."""
        scale = learnt_scale(samples)
        return [self._interval(sample, scale) for sample in samples]

    def _interval(self, sample: Sample, scale: float) -> Interval:
        n = len(sample.values_N)
        mean = float(np.mean(sample.values_N))
        if n >= self.population:
            return _around(mean, 0.0, 0.0, n, self.population)
        if n < 2:
            return _around(mean, math.inf, math.inf, n, self.population)
        degrees, spread = _pooled(sample, scale)
        se = spread / math.sqrt(clock(n, self.population))
        level = self.alpha * spending(self.looks, self.population)[n]
        return _around(mean, se, se * upper_quantile(level, degrees), n, self.population)


@lru_cache(maxsize=64)
def spending(looks: tuple[int, ...], population: int) -> dict[int, float]:
    """Returns the share of the level that each look spends; they add up to one, and the whole text takes none."""
    before_the_end = [n for n in looks if n < population]
    if not before_the_end:
        return {}
    spent = [1 - (1 - _SPENT_BY_FIRST) * (before_the_end[0] / n) ** _SPENDING_POWER for n in before_the_end]
    shares = np.diff(spent, prepend=0.0) / spent[-1]
    return dict(zip(before_the_end, (float(share) for share in shares), strict=True))


def learnt_scale(samples: Sequence[Sample]) -> float:
    """Returns the measured standard deviation over the foretold one, as all samples of a run have it."""
    total = _PRIOR_SCALE_DEGREES * _PRIOR_SCALE**2
    degrees = float(_PRIOR_SCALE_DEGREES)
    for sample in samples:
        n = len(sample.values_N)
        if sample.foretold_sd and n > 1:
            total += (n - 1) * float(np.var(sample.values_N, ddof=1)) / sample.foretold_sd**2
            degrees += n - 1
    return math.sqrt(total / degrees)


def _pooled(sample: Sample, scale: float) -> tuple[int, float]:
    """Returns degrees of freedom and standard deviation of a chunk, with the foretold one where there is one."""
    own = len(sample.values_N) - 1
    variance = float(np.var(sample.values_N, ddof=1))
    if not sample.foretold_sd:
        return own, math.sqrt(variance)
    prior = (_PRIOR_MARGIN * scale * sample.foretold_sd) ** 2
    degrees = _PRIOR_DEGREES + own
    return degrees, math.sqrt((_PRIOR_DEGREES * prior + own * variance) / degrees)


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """``alpha``: chance that a bound is ever wrong, each side; ``population``: chunks in the text.

    The boundary is the one-sided asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and
    Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences" (2021): with probability
    1 - alpha, for all times together, the mean is below

        mean_n + sd_n sqrt( 2 (tau rho^2 + 1) / (tau^2 rho^2)  log(1 + sqrt(tau rho^2 + 1) / (2 alpha)) ).

    Two things are not in the paper: the clock tau of a text that ends, and Student's quantile of equal tail in
    place of the boundary's normal one, which pays for a standard deviation estimated from a handful of chunks.
    The boundary is tightest when ``tightest_at`` chunks are in, which is where decisions cluster.
    """

    alpha: float
    population: int
    tightest_at: int = 24

    def interval(self, values_N: NDArray[np.floating]) -> Interval:
        """Returns both bounds after these chunks; each holds at all looks together with chance 1 - alpha."""
        n = len(values_N)
        mean = float(np.mean(values_N))
        if n >= self.population:
            return _around(mean, 0.0, 0.0, n, self.population)
        spread = float(np.std(values_N, ddof=1)) if n > 1 else math.inf
        half = spread * multiplier(n, self.population, self.alpha, self.tightest_at)
        return _around(mean, spread / math.sqrt(clock(n, self.population)), half, n, self.population)

    def intervals(self, samples: Sequence[Sample]) -> list[Interval]:
        """Returns the interval of each sample from its own differences alone."""
        return [self.interval(sample.values_N) for sample in samples]


@dataclass(frozen=True, kw_only=True)
class FixedWidth:
    """How large is a mean, to within a width that was asked for: the stop looks at the spread, not at the mean.

    Such an interval needs no correction for the looks but a small one, since spread and mean of normal values
    are independent (Stein 1945, Annals of Mathematical Statistics 16; Chow and Robbins 1965, 36). Stopping at
    the first n that is narrow enough prefers spreads that came out small: Student's quantile is widened by
    sqrt(1 + 4/n), which brings the coverage back to 95% in simulations (benchmarks/replay.py).
    """

    population: int
    confidence: float = CONFIDENCE

    def interval(self, values_N: NDArray[np.floating]) -> Interval:
        """Returns the interval after these chunks, for a stop that only looks at intervals' widths."""
        n = len(values_N)
        mean = float(np.mean(values_N))
        if n >= self.population:
            return _around(mean, 0.0, 0.0, n, self.population)
        spread = float(np.std(values_N, ddof=1)) if n > 1 else math.inf
        se = spread / math.sqrt(clock(n, self.population))
        half = se * student_quantile(self.confidence, n - 1) * math.sqrt(1 + 4 / n)
        return _around(mean, se, half, n, self.population)


def clock(n: int, population: int) -> float:
    """Returns how many independent draws ``n`` chunks of a text are worth: without end when all are in."""
    return n * population / (population - n) if n < population else math.inf


def chunk_spread(delta: Interval) -> float:
    """Returns the standard deviation of a chunk behind an interval, nats/token; infinite where it was not kept."""
    if delta.se is None or not 0 < delta.n < delta.population:
        return math.inf
    return delta.se * math.sqrt(clock(delta.n, delta.population))


def chance_below(limit: float, mean: float, sd: float) -> float:
    """Returns the chance of a normal value to lie below a limit; without a spread, whether it does."""
    return float(norm.cdf((limit - mean) / sd)) if sd > 0 else float(mean < limit)


def chunks_to_tell(spread: float, distance: float, errors: float, population: int) -> float:
    """Returns after how many chunks a ``distance`` is so many standard ``errors``: the clock read backwards."""
    tau = (errors * spread / max(distance, 1e-12)) ** 2
    return tau * population / (population + tau)


def _around(mean: float, se: float, half: float, n: int, population: int) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n, population=population, se=se)


@lru_cache(maxsize=4096)
def upper_quantile(alpha: float, degrees: int) -> float:
    """Returns Student's quantile with ``alpha`` above it."""
    return float(student_t.isf(alpha, degrees))


@lru_cache(maxsize=4096)
def multiplier(n: int, population: int, alpha: float, tightest_at: int) -> float:
    """Returns the half-width of ``StoppingRule`` after ``n`` chunks, in standard deviations of a chunk."""
    if n < 2:
        return math.inf
    tau = clock(n, population)
    rho2 = _rho_squared(alpha, tightest_at)
    log_term = math.log1p(math.sqrt(tau * rho2 + 1) / (2 * alpha))
    quantile = math.sqrt(2 * (tau * rho2 + 1) / (tau * rho2) * log_term)
    return _student(quantile, n - 1) / math.sqrt(tau)


def _rho_squared(alpha: float, tightest_at: int) -> float:
    """Returns the tuning for the least width at one time, at 2 alpha because the bound is one-sided.

    The paper has -2 log a + log(1 - 2 log a). With log(-2 log a) + 1 in its place the width is within 0.01% of the
    least.
    """
    log = -2 * math.log(2 * alpha)
    return (log + math.log(log) + 1) / tightest_at if log > 1 else 1 / tightest_at


def _student(quantile: float, degrees: int) -> float:
    """The t quantile with the upper tail that ``quantile`` has under the normal law."""
    return float(student_t.isf(norm.sf(quantile), degrees))


def looks(first: int, growth: float, limit: int, together: int = 1) -> tuple[int, ...]:
    """How many chunks are in at each look: from ``first``, growing geometrically, ending at ``limit``.

    All but the last are multiples of ``together``, the chunks that one decode takes: less than a whole decode
    would cost as much.
    """
    found: list[int] = []
    n = float(first)
    while (whole := math.ceil(n / together) * together) < limit:
        if not found or whole > found[-1]:
            found.append(whole)
        n = max(n * growth, n + 1)
    return (*found, limit)


def union_share(alpha: float, members: int) -> float:
    """The level of each member of a family whose chance of any error is to stay below ``alpha``.

    A union bound. Holm's steps would gain nothing: a verdict settles one of two opposite hypotheses,
    so every member, settled or not, keeps one true hypothesis that must not be rejected.
    """
    return alpha / max(members, 1)


def combination_share(alpha: float, number: int) -> float:
    """Returns the level of the ``number``-th combination (from 1): 1/(k(k+1)), which adds up to one without end."""
    return alpha / (number * (number + 1))
