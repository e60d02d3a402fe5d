"""Perplexity and its paired change, from negative log-likelihoods per token and per chunk.

Pairing: both models read the same tokens, so the difference on a chunk has far less spread than
either perplexity. Tokens of a chunk share a context, so the chunk, not the token, is the unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

CONFIDENCE = 0.95


@cache
def student_quantile(confidence: float, degrees: int) -> float:
    """Returns Student's two-sided quantile, in standard errors; without end below one degree of freedom.

    SciPy takes half a second to load, and whoever only reads finished artifacts does not need it.
    """
    from scipy.stats import t as student_t

    return float(student_t.ppf(0.5 + confidence / 2, degrees)) if degrees > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """``ppl`` and its standard error as llama-perplexity prints them, over ``tokens`` scored tokens."""

    ppl: float
    se: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval, in the unit of the data; ``n`` chunks of ``population``.

    ``se`` is the standard error of which the half-width is a multiple, where the interval was made from one.
    """

    mean: float
    low: float
    high: float
    n: int
    population: int
    se: float | None = None

    def percent(self) -> tuple[float, float, float]:
        """(mean, low, high) of a mean in nats as percent of perplexity: 100 (exp(delta) - 1)."""
        return (as_percent(self.mean), as_percent(self.low), as_percent(self.high))


def as_percent(delta_nats: float) -> float:
    """A change of the mean NLL in nats as a change of perplexity in percent."""
    return 100.0 * math.expm1(delta_nats) if delta_nats < 700 else math.inf


def as_nats(percent: float) -> float:
    """A change of perplexity in percent as nats; the inverse of ``as_percent``."""
    return math.log1p(percent / 100.0)


def perplexity(nll: Floats) -> Perplexity:
    """exp(mean NLL) over all tokens given; se = ppl * sqrt(var / (n - 1)), as llama-perplexity."""
    values = np.asarray(nll, np.float64).ravel()
    mean = float(values.mean())
    variance = max(float((values**2).mean()) - mean * mean, 0.0)
    ppl = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(ppl=ppl, se=ppl * math.sqrt(variance / max(values.size - 1, 1)), tokens=values.size)


def mean_interval(values_N: Floats, population: int, confidence: float = CONFIDENCE) -> Interval:
    """Student-t interval of a mean over chunks, with the finite-population correction.

    ``population`` is how many chunks the text has: with all of them measured the mean is exact for
    that text and the interval has no width. One chunk out of many has an interval without end.
    """
    values = np.asarray(values_N, np.float64)
    n = values.size
    mean = float(values.mean())
    if n >= population:
        return Interval(mean=mean, low=mean, high=mean, n=n, population=population)
    if n < 2:
        return Interval(mean=mean, low=-math.inf, high=math.inf, n=n, population=population)
    # With the n - 1 variance the factor is (N - n)/N: Cochran, Sampling Techniques, 1977, theorem 2.4.
    se = float(values.std(ddof=1)) * math.sqrt((population - n) / (population * n))
    half = student_quantile(confidence, n - 1) * se
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n, population=population, se=se)


def superpopulation_interval(values_N: Floats, confidence: float = CONFIDENCE) -> Interval:
    """Student-t interval for text *like* this one: no correction, so never without width."""
    return mean_interval(values_N, population=10**12, confidence=confidence)


def without_nan(value: Any) -> Any:
    """The same JSON value with None for every number that is not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
