"""How many chunks a combination will take to decide, foretold from what is believed of it and how its chunks spread.

A sequential test reads about as many chunks as its bound needs to fit between the mean and the limit: the square of
spread over distance, on the clock of a text that ends (``stats/sequential.py``). A combination close to the limit
that saves 2% more can so take ten times the chunks. No guarantee rests on this: it decides what is tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

from cerebellum.plan.foretold import Belief, Mask
from cerebellum.stats.paired import Interval
from cerebellum.stats.sequential import PROVEN, chunk_spread, chunks_to_tell
from cerebellum.verdicts import Threshold

_LEFT = 1.0
"""How many standard errors over the limit a combination lies when it is set aside, as ``PROVEN`` when it is proven."""

_LEAST_CHUNKS = 4
_PLACES = norm.ppf(
    (np.arange(11) + 0.5) / 11
)  # where a belief is looked at: the middles of eleven equal parts


class Effort:
    """The chunks that combinations of some parts will take, knowing the ones that were measured before."""

    def __init__(self, parts: Sequence[Interval], threshold: Threshold) -> None:
        self._spreads = np.array([chunk_spread(part) for part in parts])
        self._population = min((part.population for part in parts), default=0)
        self._threshold = threshold
        self._beside_parts = 1.0
        self._read = 0

    def learn(self, members: Mask, delta: Interval) -> None:
        """Takes in how the chunks of a combination spread, beside its parts, and how far it was read."""
        self._read = max(self._read, delta.n)
        foretold, seen = self._of_parts(members), chunk_spread(delta)
        if 0 < foretold < math.inf and 0 < seen < math.inf:
            self._beside_parts = seen / foretold

    def chunks(self, members: Mask, belief: Belief) -> float:
        """Returns the chunks expected, with those of the base that nobody has read; none where nothing is known.

        A combination under the limit may look for its proof up to the indifference beyond it.
        """
        spread = self._beside_parts * self._of_parts(members)
        if not 0 < spread < math.inf:
            return 0.0
        limit, over = self._threshold.nats, self._threshold.forgiving_nats
        expected = []
        for truth in belief.mean + belief.sd * _PLACES:
            under = truth < limit
            distance = over - truth if under else truth - limit
            n = chunks_to_tell(spread, distance, PROVEN if under else _LEFT, self._population)
            n = min(max(n, _LEAST_CHUNKS), self._population)
            expected.append(n + max(n - self._read, 0.0))
        return float(np.mean(expected))

    def _of_parts(self, members: Mask) -> float:
        """Returns the spread that chunks would have if those of the parts were independent, nats/token."""
        return math.sqrt(float((self._spreads[members] ** 2).sum()))
