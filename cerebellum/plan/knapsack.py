"""Multiple-choice knapsack: one option for every item, least damage, never over the budget.

Solved as an integer program by HiGHS through SciPy, to a gap of zero. Bytes are integers to the end:
the solver works in floats, so its answer is added up again exactly and the bound tightened if a
rounding let it over.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Choice = tuple[int, ...]
"""The index of the chosen option for every item."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """``n_bytes`` it takes, ``damage`` it does (any unit; may be negative)."""

    n_bytes: int
    damage: float


def solve(items: Sequence[Sequence[Option]], budget_bytes: int) -> Choice | None:
    """The choice of least total damage within ``budget_bytes``.

    None when nothing fits. Raises RuntimeError if the solver stops without a proof of optimality.
    """
    unit = math.gcd(*(option.n_bytes for item in items for option in item)) or 1
    limit = budget_bytes // unit
    while True:
        choice = _solve_once(items, unit, limit)
        if choice is None or total_bytes(items, choice) <= budget_bytes:
            return choice
        limit -= 1


def total_bytes(items: Sequence[Sequence[Option]], choice: Choice) -> int:
    """Exact bytes of a choice."""
    return sum(item[index].n_bytes for item, index in zip(items, choice, strict=True))


def total_damage(items: Sequence[Sequence[Option]], choice: Choice) -> float:
    """Damage of a choice if damages add up."""
    return math.fsum(item[index].damage for item, index in zip(items, choice, strict=True))


def _solve_once(items: Sequence[Sequence[Option]], unit: int, limit: int) -> Choice | None:
    damage = np.array([option.damage for item in items for option in item])
    scale = float(np.abs(damage).max()) or 1.0
    n_bytes = np.array([option.n_bytes // unit for item in items for option in item], np.float64)
    constraints = [
        LinearConstraint(_membership(items), lb=1, ub=1),
        LinearConstraint(n_bytes[None], ub=limit),
    ]
    with _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS prints a line to file descriptor 1 now and then, told to be quiet or not."""
    try:
        kept = os.dup(1)
    except OSError:  # closed: there is nothing to keep clean
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _membership(items: Sequence[Sequence[Option]]) -> coo_array:
    """One row an item: its options add up to one."""
    rows = np.repeat(np.arange(len(items)), [len(item) for item in items])
    return coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))


def _choice(items: Sequence[Sequence[Option]], x: np.ndarray) -> Choice:
    parts = np.split(x, np.cumsum([len(item) for item in items])[:-1])
    return tuple(int(part.argmax()) for part in parts)
