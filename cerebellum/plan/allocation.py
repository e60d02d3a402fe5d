"""A combination of types that fits a size: one point of every group, chosen by an exact knapsack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cerebellum.layout import Layout
from cerebellum.measure.artifacts import Effect
from cerebellum.measure.curves import Score
from cerebellum.plan import knapsack
from cerebellum.plan.artifacts import PointRow
from cerebellum.plan.knapsack import Choice, Option, solve
from cerebellum.settings import Objective
from cerebellum.stats.estimate import Estimate
from cerebellum.verdicts import Changes


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A combination, one point of every group, with the exact bytes of its file; ``how`` says what proposed it.

    ``score`` and ``effect``, its change against the base, are there once it was measured whole. ``beyond`` is what
    steps foretell of the whole beyond the sum of its points, nats a token by objective.
    """

    how: str
    points: tuple[PointRow, ...]
    file_bytes: int
    beyond: Mapping[Objective, float] = field(default_factory=dict)
    score: Score | None = None
    effect: Effect | None = None

    @property
    def changes(self) -> Changes:
        """The groups that leave the base, with their types."""
        return {point.group: point.type for point in self.points if point.type is not None}

    def predicted(self, objective: Objective) -> float | None:
        """Returns the sum of the parts against the base; None where one was never measured in this way."""
        known = [damage.mean for point in self.points if (damage := point.damage(objective)) is not None]
        return sum(known) if len(known) == len(self.points) else None

    def foretold(self, objective: Objective) -> float | None:
        """Returns what is foretold of the whole against the base: the sum of its parts, and what steps add to it."""
        predicted = self.predicted(objective)
        return None if predicted is None else predicted + self.beyond.get(objective, 0.0)

    def measured(self, objective: Objective) -> Estimate | None:
        """Returns the change against the base as measured; None where it was not, or where it collapsed."""
        return None if self.effect is None else self.effect.damage(objective)

    def badness(self, objective: Objective) -> float:
        """Returns what proposals are compared by: the measured change, without end where it collapsed."""
        change = self.measured(objective)
        return np.inf if change is None else change.mean

    def scored(self, score: Score, base: Score) -> Proposal:
        """Returns the proposal with what was measured of it; ``base`` is on the same chunks."""
        return replace(self, score=score, effect=score.change(base))


class Allocation:
    """The knapsack over points: one of each group, the least predicted damage within a size of file.

    A type whose damage is unknown, because the group collapsed at it, is never an option.
    """

    def __init__(self, points: Sequence[PointRow], layout: Layout, objective: Objective) -> None:
        self._objective = objective
        by_group: dict[str, list[PointRow]] = {}
        for point in points:
            if point.damage(objective) is not None:
                by_group.setdefault(point.group, []).append(point)
        self._curves = list(by_group.values())
        self._fixed = layout.fixed_bytes()

    def best(self, file_bytes: int, how: str = "the sum of the parts") -> Proposal | None:
        """Returns the best proposal whose file is no larger than ``file_bytes``, or None where nothing fits."""
        choice = solve(self._options(), file_bytes - self._fixed)
        return None if choice is None else self._proposal(choice, how)

    def smallest(self) -> int:
        """Returns the bytes of the smallest file that the known types allow."""
        return self._fixed + sum(min(point.bytes for point in curve) for curve in self._curves)

    def frontier(self, steps: int) -> list[Proposal]:
        """Returns proposals from the smallest file to the least damage, ``steps`` at most, evenly by size.

        Each is the best of its own size.
        """
        found = [self._proposal(choice, "the frontier") for choice in knapsack.frontier(self._options())]
        sizes = [proposal.file_bytes for proposal in found]
        wanted = np.linspace(sizes[0], sizes[-1], steps)
        return [found[index] for index in sorted(set(np.searchsorted(sizes, wanted).tolist()))]

    def _options(self) -> list[list[Option]]:
        return [
            [Option(n_bytes=point.bytes, damage=self._damage(point)) for point in curve]
            for curve in self._curves
        ]

    def _proposal(self, choice: Choice, how: str) -> Proposal:
        points = tuple(curve[index] for curve, index in zip(self._curves, choice, strict=True))
        n_bytes = self._fixed + sum(point.bytes for point in points)
        return Proposal(how=how, points=points, file_bytes=n_bytes)

    def _damage(self, point: PointRow) -> float:
        damage = point.damage(self._objective)
        assert damage is not None
        return damage.mean
