"""Holm's correction for several tests at once. It stands apart from the tests, for those load SciPy."""

from __future__ import annotations

from collections.abc import Sequence

from cerebellum.stats.paired import CONFIDENCE


def holm(p_values: Sequence[float], alpha: float = 1 - CONFIDENCE) -> list[bool]:
    """Says which of several tests are significant, all together wrong with chance ``alpha``, however related.

    Holm 1979: the smallest p-value is held to alpha / n, the next to alpha / (n - 1), up to the first miss.
    """
    found = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] > alpha / (len(p_values) - rank):
            break
        found[place] = True
    return found
