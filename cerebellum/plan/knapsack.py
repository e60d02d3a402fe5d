"""Solves the multiple-choice knapsack: one option for every item, least damage, never over the budget.

It is an integer program, solved by HiGHS through SciPy to a gap of zero. Bytes are integers to the end: the
solver works in floats, so its answer is added up again exactly, and the bound is tightened if a rounding let
it over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Choice = tuple[int, ...]
"""The index of the chosen option for every item."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of an item: the bytes that it takes and the damage that it does, in any unit, negative for a gain."""

    n_bytes: int
    damage: float


def solve(items: Sequence[Sequence[Option]], budget_bytes: int) -> Choice | None:
    """Returns the choice of least total damage within ``budget_bytes``, or None where nothing fits.

    Raises RuntimeError if the solver stops without a proof of optimality.
    """
    unit = math.gcd(*(option.n_bytes for item in items for option in item)) or 1
    limit = budget_bytes // unit
    while True:
        choice = _solve_once(items, unit, limit)
        if choice is None or total_bytes(items, choice) <= budget_bytes:
            return choice
        limit -= 1


def frontier(items: Sequence[Sequence[Option]]) -> Iterator[Choice]:
    """Yields choices from the smallest to the least damage, each the best of its own size.

    They are those on the lower convex hull of all choices, which need no search: every item climbs its own
    hull, and the step that gains most for its bytes comes first (Lagrange multipliers; Everett 1963).
    """
    climbs = [_climb(item) for item in items]
    choice = [climb[0] for climb in climbs]
    yield tuple(choice)
    steps = [
        (_slope(item[low], item[high]), number, high)
        for number, (item, climb) in enumerate(zip(items, climbs, strict=True))
        for low, high in pairwise(climb)
    ]
    for _, number, index in sorted(steps):
        choice[number] = index
        yield tuple(choice)


def _climb(item: Sequence[Option]) -> list[int]:
    """Returns the options on the lower convex hull of one item, from the smallest to the least damage."""
    order = sorted(range(len(item)), key=lambda index: (item[index].n_bytes, item[index].damage))
    hull = order[:1]
    for index in order[1:]:
        if item[index].damage >= item[hull[-1]].damage:
            continue
        while len(hull) > 1 and _slope(item[hull[-2]], item[hull[-1]]) >= _slope(item[hull[-1]], item[index]):
            hull.pop()
        hull.append(index)
    return hull


def _slope(low: Option, high: Option) -> float:
    """Returns the change of damage for each byte more; both are on one hull, so the bytes differ."""
    return (high.damage - low.damage) / (high.n_bytes - low.n_bytes)


def total_bytes(items: Sequence[Sequence[Option]], choice: Choice) -> int:
    """Returns the exact bytes of a choice."""
    return sum(item[index].n_bytes for item, index in zip(items, choice, strict=True))


def total_damage(items: Sequence[Sequence[Option]], choice: Choice) -> float:
    """Returns the damage of a choice if damages add up."""
    return math.fsum(item[index].damage for item, index in zip(items, choice, strict=True))


def _solve_once(items: Sequence[Sequence[Option]], unit: int, limit: int) -> Choice | None:
    damage = np.array([option.damage for item in items for option in item])
    scale = float(np.abs(damage).max()) or 1.0
    n_bytes = np.array([option.n_bytes // unit for item in items for option in item], np.float64)
    constraints = [
        LinearConstraint(_membership(items), lb=1, ub=1),
        LinearConstraint(n_bytes[None], ub=limit),
    ]
    found = milp(
        damage / scale,
        integrality=np.ones_like(damage),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.status == 2:  # infeasible
        return None
    if found.status != 0:
        raise RuntimeError(f"the solver stopped without proof: {found.message}")
    return _choice(items, found.x)


def _membership(items: Sequence[Sequence[Option]]) -> coo_array:
    """Returns the constraint that each item has one option: a row an item, whose options add up to one."""
    rows = np.repeat(np.arange(len(items)), [len(item) for item in items])
    return coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))


def _choice(items: Sequence[Sequence[Option]], x: np.ndarray) -> Choice:
    parts = np.split(x, np.cumsum([len(item) for item in items])[:-1])
    return tuple(int(part.argmax()) for part in parts)
