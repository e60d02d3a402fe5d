"""What no interval from a few chunks withstands: a chunk far outside the others, and skewed differences.

Nothing that estimates a variance holds its level against an outlier that it has not seen (Bahadur and Savage
1956, Annals of Mathematical Statistics 27): in simulations on the hardest side, where 2.5% of runs may hold a wrong
verdict, 4% do at a skew of 1.4 and 20% at a skew of 6 (docs/STATISTICS.md). So what can be seen is said beside the
verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

OUTLIER_SD = 6.0
LARGE_SKEW = 1.0
_FEWEST = 8  # with fewer, ordinary chunks lie six standard deviations of the others out too often


def unusual(values_N: NDArray[np.floating], chunks: Sequence[int]) -> tuple[str, ...]:
    """Says in sentences what about differences of ``chunks``, a value each, should lower the trust in intervals.

    An outlier is a chunk more than six standard deviations *of the other chunks* from their mean: its own
    inflate with it. A skew is told once it is beyond one by its standard error, sqrt(6/n). On normal
    differences of 8 chunks one sample in a hundred is flagged without cause, of 30 chunks one in six hundred.
    """
    values = np.asarray(values_N, np.float64)
    if len(values) < _FEWEST or not np.isfinite(values).all() or float(np.ptp(values)) == 0.0:
        return ()
    found = [
        f"chunk {chunks[place]} lies {abs(score):.0f} standard deviations of the others from their mean"
        for place, score in enumerate(distances(values))
        if abs(score) > OUTLIER_SD
    ]
    skew = skewness(values)
    if abs(skew) > LARGE_SKEW + math.sqrt(6 / len(values)):
        found.append(f"the differences of its chunks are skewed by {skew:+.1f}")
    return tuple(found)


def distances(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns each value's distance from the mean of the others, in their standard deviations, (N,)."""
    n = len(values_N)
    centred = values_N - values_N.mean()
    total = float((centred**2).sum())
    # Leaving one out moves the mean by c/(n - 1) and takes n/(n - 1) c^2 from the sum of squares.
    left = np.maximum(total - centred**2 * n / (n - 1), 1e-300)
    return np.asarray(centred * n / (n - 1) / np.sqrt(left / (n - 2)))


def skewness(values_N: NDArray[np.float64]) -> float:
    """Returns the third standardized moment."""
    centred = values_N - values_N.mean()
    return float((centred**3).mean() / (centred**2).mean() ** 1.5)
