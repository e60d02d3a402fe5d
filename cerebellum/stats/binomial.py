"""Computes accuracies and their paired differences: Wilson, McNemar, and what a number of questions can show.

Two models that answered the same questions differ only where one is right and the other wrong. Those
discordant pairs carry all the evidence; an unpaired comparison of two accuracies throws it away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """Holds ``successes`` of ``n`` questions with the interval of their share, low and high as fractions of
    1.
    """

    successes: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Returns the share of successes as a fraction of 1."""
        return self.successes / self.n


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Proportion:
    """Returns Wilson's score interval, which never leaves [0, 1] and is right at both ends (Wilson 1927).

    Raises ValueError where there is no question.
    """
    if n < 1:
        raise ValueError("an accuracy needs at least one question")
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Proportion(successes=successes, n=n, low=float(interval.low), high=float(interval.high))


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Compares two models on the same ``n`` questions; ``difference`` is the accuracy of a minus that of b.

    All shares are fractions of 1. ``only_a`` and ``only_b`` count the questions that just one has right, and
    ``p_value`` is McNemar's exact, two-sided. ``detectable`` is the difference that a test on this many
    questions would find with probability ``POWER``, given how often the two disagree.
    """

    n: int
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p_value: float
    detectable: float
    smallest_significant: float | None


def paired(a: Sequence[bool], b: Sequence[bool], confidence: float = CONFIDENCE) -> Paired:
    """Compares two models by whether each was right or wrong, question by question, in the same order.

    Raises ValueError where the two have different numbers of questions, or none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} answers cannot be paired with {len(b)}")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = len(a)
    low, high = bonett_price(only_a, only_b, n, confidence)
    return Paired(
        n=n,
        only_a=only_a,
        only_b=only_b,
        difference=(only_a - only_b) / n,
        low=low,
        high=high,
        p_value=mcnemar_exact(only_a, only_b),
        detectable=detectable_difference(n, discordance(only_a, only_b, n)),
        smallest_significant=smallest_significant(only_a + only_b, n),
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Returns the two-sided p-value of the question whether a fair coin tossed the discordant pairs; 1 for
    none.
    """
    total = only_a + only_b
    return float(binomtest(only_a, total, 0.5).pvalue) if total else 1.0


def bonett_price(only_a: int, only_b: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the interval of a paired difference: Wald's with one pair added to each discordant cell.

    Bonett and Price 2012, Statistics in Medicine 31: it holds its coverage on small samples, and has width
    even where no pair disagrees.
    """
    p_a = (only_a + 1) / (n + 2)
    p_b = (only_b + 1) / (n + 2)
    half = float(norm.ppf(0.5 + confidence / 2)) * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / (n + 2))
    return max(-1.0, p_a - p_b - half), min(1.0, p_a - p_b + half)


def discordance(only_a: int, only_b: int, n: int) -> float:
    """Returns the share of questions on which the two disagree, never 0: it counts one pair more."""
    return min(1.0, (only_a + only_b + 1) / (n + 1))


def detectable_difference(
    n: int, disagreement: float, alpha: float = 1 - CONFIDENCE, power: float = POWER
) -> float:
    """Returns the smallest difference of accuracies that McNemar's test on ``n`` questions finds with
    ``power``.

    Connor 1987 (Biometrics 43): z_a sqrt(psi) + z_b sqrt(psi - d^2) = d sqrt(n), solved for d. A difference
    of d takes a disagreement of d at least, so where psi is too little for n questions, it grows with d; two
    models that agree on 40 questions of 40 may still differ by 18 points. It is never less than what the
    exact test takes, six pairs on one side at 5%, and 1 where nothing could be found.
    """
    z_a = float(norm.ppf(1 - alpha / 2))
    z_b = float(norm.ppf(power))

    def excess(d: float) -> float:
        psi = max(disagreement, d)
        return d * math.sqrt(n) - z_a * math.sqrt(psi) - z_b * math.sqrt(psi - d * d)

    fewest = math.ceil(math.log2(2 / alpha))
    return min(1.0, max(fewest / n, float(brentq(excess, 0.0, 1.0)))) if excess(1.0) > 0 else 1.0


def smallest_significant(discordant: int, n: int, alpha: float = 1 - CONFIDENCE) -> float | None:
    """Returns the smallest difference that would have been significant with so many discordant pairs.

    None where no split of them could be, because fewer than six pairs never are at 5%.
    """
    rarer = int(binom.ppf(alpha / 2, discordant, 0.5)) if discordant else 0
    while rarer >= 0 and mcnemar_exact(rarer, discordant - rarer) >= alpha:
        rarer -= 1
    return (discordant - 2 * rarer) / n if rarer >= 0 and discordant else None
