"""Steps: what parts cost where a plan lies, measured around the best whole plan and not around the anchor.

Where a plan does much more than the sum of its parts, the parts' damages from the anchor no longer say which of them
to spare. A *step* is a measured plan with one part (a role, or some layers of it) at another type: one type finer, one
cheaper, or the nearest of the other family, K-quants or IQ types. Beside the plan on the same chunks it says what the
part costs there. The belief is Gaussian (kriging; Rasmussen and Williams, Gaussian Processes for Machine Learning,
2006, 2.2): the damage of a part at a type counts some times what the fit says, a factor that is made up of one for
all, one a part, one a type and one a family. Rows are differences of plans, so that nothing is asked of the total: what
all plans here have in common does not matter to a choice between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from msgspec.structs import replace as replace_fields
from numpy.typing import NDArray

from cerebellum.layout import Layout, Part
from cerebellum.measure.artifacts import Effect
from cerebellum.measure.curves import Planning, WholeAsk, halves
from cerebellum.measure.method import Method
from cerebellum.plan.allocation import Allocation, Proposal
from cerebellum.plan.artifacts import PointRow
from cerebellum.plan.damage import DamageModel
from cerebellum.plan.search import Search
from cerebellum.settings import FINE_LADDER, KLD, Objective
from cerebellum.verdicts import Batch, Changes

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Cell = tuple[str, str]
"""A part, by its name, at a type."""

FINER = "finer"
CHEAPER = "cheaper"
OTHER = "other family"

_CLOSE = 1.03  # types whose bytes differ by less are none finer than the other


@dataclass(frozen=True, kw_only=True)
class Step:
    """A plan that was measured, ``around``, with one part at other types.

    The fit foretells ``before`` and ``after`` of the part, nats a token above the anchor. ``effect`` is the change
    against the plan on the same ``chunks``, there once it was measured.
    """

    around: Proposal
    part: Part
    way: str
    points: Mapping[str, PointRow]
    before: float
    after: float
    chunks: int = 0
    effect: Effect | None = None

    @property
    def changes(self) -> Changes:
        """The groups of the whole that leave the base, with their types."""
        whole = [self.points.get(point.group, point) for point in self.around.points]
        return {point.group: point.type for point in whole if point.type is not None}


def is_off(search: Search, objective: Objective, method: Method) -> bool:
    """Says whether a measured proposal surely does other damage than the sum of its parts foretold."""
    for proposal in search.proposals:
        measured, predicted = proposal.measured(objective), proposal.predicted(objective)
        if measured is None or predicted is None:
            continue
        interval = measured.interval()
        above = search.above_anchor(proposal, objective)
        if above is not None and abs(interval.mean - predicted) - (interval.high - interval.mean) > (
            method.beyond * abs(above)
        ):
            return True
    return False


def propose_by_steps(
    model: DamageModel, search: Search, file_bytes: int, objective: Objective, affordable: int
) -> Planning[tuple[Step, ...]]:
    """Measures steps around the best plan and what they propose, a few times over; returns the steps.

    Steps of a round may cost an ``affordable`` number of chunks. A proposal that is better is what the next round
    steps from; where none was, the next is made from what this round taught, more cautiously.
    """
    method = model.observed.method
    taken: list[Step] = []
    parts: tuple[Part, ...] = ()
    around: Proposal | None = None
    caution = 1.0
    for _ in range(method.step_rounds):
        best = search.best(objective)
        if best is None:
            break
        if around is None or best.changes != around.changes:
            around, caution = best, 1.0
            parts = parts or parts_of(model, around, objective)
            taken += yield from _measured(steps_around(model, around, parts, objective), affordable, method)
        else:
            caution *= 2
        cells = Cells.of_parts(model, parts, objective)
        local = LocalDamage.of(cells, search, around, taken)
        bold = local.best(around, file_bytes, 0.0)
        careful = local.best(around, file_bytes, caution)
        yield from search.measure(bold, careful)
    return tuple(taken)


def parts_of(model: DamageModel, around: Proposal, objective: Objective) -> tuple[Part, ...]:
    """Returns the roles, those with the most damage cut in halves by layer, until there are ``step_parts``."""
    layout = model.observed.layout
    at = {point.group: point.type for point in around.points}
    measured = set(model.observed.groups)

    def damage(part: Part) -> float:
        return sum(model.above(name, at[name], objective) for name in part.groups)

    parts = [part for part in layout.roles() if measured >= set(part.groups)]
    while len(parts) < model.observed.method.step_parts:
        whole = max((part for part in parts if len(part.groups) > 1), key=damage, default=None)
        if whole is None:
            break
        place = parts.index(whole)
        parts[place : place + 1] = halves(whole.groups, layout)
    return tuple(parts)


def steps_around(
    model: DamageModel, around: Proposal, parts: Sequence[Part], objective: Objective
) -> list[Step]:
    """Returns all steps from a plan, those that move the most damage first."""
    curves: dict[str, list[PointRow]] = {}
    for point in model.points():
        if point.damage(objective) is not None:
            curves.setdefault(point.group, []).append(point)
    layout = model.observed.layout
    at = {point.group: point for point in around.points}
    found = []
    for part in parts:
        for way in (FINER, CHEAPER, OTHER):
            moves = {name: _moved(at[name], curves[name], way, layout) for name in part.groups}
            points = {name: point for name, point in moves.items() if point is not None}
            if points:
                before, after = (
                    sum(model.above(name, each[name].type, objective) for name in points)
                    for each in (at, points)
                )
                found.append(
                    Step(around=around, part=part, way=way, points=points, before=before, after=after)
                )
    return sorted(found, key=lambda step: -(step.before + step.after))


def _moved(at: PointRow, curve: Sequence[PointRow], way: str, layout: Layout) -> PointRow | None:
    """Returns the point of a group one step away, or None where there is none."""
    fine = _is_fine(at, layout)
    own = [point for point in curve if _is_fine(point, layout) == fine]
    if way == FINER:
        larger = [point for point in own if point.bytes > at.bytes * _CLOSE]
        return min(larger, key=lambda point: point.bytes, default=None)
    if way == CHEAPER:
        smaller = [point for point in own if point.bytes * _CLOSE < at.bytes]
        return max(smaller, key=lambda point: point.bytes, default=None)
    others = [point for point in curve if _is_fine(point, layout) != fine]
    return min(others, key=lambda point: abs(np.log(point.bytes / at.bytes)), default=None)


def _is_fine(point: PointRow, layout: Layout) -> bool:
    types = layout.base_types([point.group]) if point.type is None else (point.type,)
    return set(types) <= set(FINE_LADDER)


def _measured(steps: Sequence[Step], affordable: int, method: Method) -> Planning[tuple[Step, ...]]:
    """Measures steps from one plan, as many as are ``affordable`` in chunks, the first ones first."""
    if not steps:
        return ()
    known = steps[0].around.score
    assert known is not None
    n = min(method.step_chunks, len(known.kld))
    wanted = steps[: max(1, affordable // n)]
    doing = "steps around the best plan, {} of {}: "
    asks = [
        WholeAsk(changes=step.changes, n=n, doing=doing.format(number, len(wanted)))
        for number, step in enumerate(wanted, start=1)
    ]
    scores = yield Batch(asks=tuple(asks))
    beside = known.first(n)
    return tuple(
        replace(step, chunks=n, effect=score.change(beside))
        for step, score in zip(wanted, scores, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The parts at their types: what the belief has a factor of, each with the damage that the fit foretells of it."""

    model: DamageModel
    objective: Objective
    part_of: Mapping[str, str]
    of: tuple[Cell, ...]

    @classmethod
    def of_parts(cls, model: DamageModel, parts: Sequence[Part], objective: Objective) -> Cells:
        """Returns every type that some group of a part may have, or has in the base."""
        part_of = {name: part.name for part in parts for name in part.groups}
        observed = model.observed
        cells = {
            (part_of[name], each): None
            for name in part_of
            for qtype in (None, *observed.errors.of[name])
            for each in observed.types(name, qtype)
        }
        return cls(model=model, objective=objective, part_of=part_of, of=tuple(cells))

    def of_group(self, name: str, qtype: str | None) -> Vector:
        """Returns the damage of a group at a type in its cells, (cells,), nats a token above the anchor's."""
        found = np.zeros(len(self.of))
        if name in self.part_of:
            types = self.model.observed.types(name, qtype)
            damage = self.model.above(name, qtype, self.objective)
            for each in types:
                found[self._number[self.part_of[name], each]] += damage / len(types)
        return found

    def of_plan(self, changes: Changes) -> Vector:
        """Returns the damage of a whole plan in all cells, (cells,)."""
        return sum((self.of_group(name, changes.get(name)) for name in self.part_of), np.zeros(len(self.of)))

    def prior(self) -> Matrix:
        """Returns the covariance of the factors before anything was measured; their mean is 1."""
        method = self.model.observed.method
        part = np.array([part for part, _ in self.of])
        kind = np.array([qtype for _, qtype in self.of])
        family = np.array([qtype in FINE_LADDER for _, qtype in self.of])
        same_part, same_type, same_family = (
            (each[:, None] == each).astype(np.float64) for each in (part, kind, family)
        )
        kinds = same_type + same_family
        return np.asarray(method.whole_sd**2 * (1 + same_part) + method.kind_sd**2 * (1 + same_part) * kinds)

    @cached_property
    def _number(self) -> dict[Cell, int]:
        return {cell: number for number, cell in enumerate(self.of)}


@dataclass(frozen=True, kw_only=True)
class LocalDamage:
    """What every part at every type costs beside measured plans, as factors on what the fit says of it.

    ``factors`` (cells,) are the belief's mean, ``covariance`` (cells, cells) says how sure it is.
    """

    cells: Cells
    factors: Vector
    covariance: Matrix

    @classmethod
    def of(cls, cells: Cells, search: Search, around: Proposal, steps: Sequence[Step]) -> LocalDamage:
        """Learns from all steps, and from how much other proposals differ from the one that was stepped from."""
        pairs = [(step.around.changes, step.changes, step.effect) for step in steps]
        beside = around.score
        for other in search.proposals:
            if other.score is not None and beside is not None and other is not around:
                pairs.append((around.changes, other.changes, other.score.change(beside)))
        prior = cells.prior()
        rows, seen, sd = [], [], []
        for here, there, effect in pairs:
            change = effect.damage(cells.objective) if effect is not None else None
            if change is not None:
                rows.append(cells.of_plan(there) - cells.of_plan(here))
                seen.append(change.mean)
                sd.append(max(np.hypot(change.se, _own_sd(cells, rows[-1])), 1e-12))
        if not rows:
            return cls(cells=cells, factors=np.ones(len(prior)), covariance=prior)
        return cls._conditioned(cells, prior, np.array(rows), np.array(seen), np.array(sd))

    @classmethod
    def _conditioned(cls, cells: Cells, prior: Matrix, rows: Matrix, seen: Vector, sd: Vector) -> LocalDamage:
        """Conditions the prior on ``rows`` @ factors = ``seen``, give or take ``sd``."""
        design = rows / sd[:, None]
        spread = prior @ design.T
        gain = np.linalg.solve(design @ spread + np.eye(len(sd)), spread.T).T
        misfit = seen / sd - design.sum(axis=1)
        floor = cells.model.observed.method.floor
        factors = np.maximum(1.0 + gain @ misfit, floor)
        return cls(cells=cells, factors=factors, covariance=prior - gain @ spread.T)

    def best(self, around: Proposal, file_bytes: int, caution: float) -> Proposal | None:
        """Returns the best proposal within a size.

        Against each move from the plan stepped from count ``caution`` of the belief's standard deviations of it.
        """
        model, objective = self.cells.model, self.cells.objective
        at = {point.group: point.type for point in around.points}
        plain = {(point.group, point.type): point for point in model.points()}
        wary = [self._warily(point, at[point.group], caution) for point in plain.values()]
        how = "steps taken together" + (", with caution" if caution else "")
        found = Allocation(wary, model.observed.layout, objective).best(file_bytes, how)
        if found is None:
            return None
        points = tuple(plain[point.group, point.type] for point in found.points)
        return self._told(replace(found, points=points), around)

    def _told(self, proposal: Proposal, around: Proposal) -> Proposal:
        """Returns a proposal with what is foretold of it: the plan stepped from as measured, and all moves from it."""
        objective = self.cells.objective
        measured, summed = around.measured(objective), proposal.predicted(objective)
        if measured is None or summed is None:
            return proposal
        moved = self.cells.of_plan(proposal.changes) - self.cells.of_plan(around.changes)
        return replace(proposal, beyond={objective: measured.mean + float(self.factors @ moved) - summed})

    def _warily(self, point: PointRow, at: str | None, caution: float) -> PointRow:
        """Returns a point with its damage beside the plan stepped from, made worse by ``caution``."""
        known = point.damage(self.cells.objective)
        if known is None:
            return point
        here = self.cells.of_group(point.group, at)
        move = self.cells.of_group(point.group, point.type) - here
        sd = np.hypot(np.sqrt(max(float(move @ self.covariance @ move), 0.0)), _own_sd(self.cells, move))
        wary = replace(known, mean=float(self.factors @ move + caution * sd))
        return replace_fields(point, **{"kld" if self.cells.objective == KLD else "nll": wary})


def _own_sd(cells: Cells, moved: Vector) -> float:
    """Returns what the factors leave out of a difference of two plans, nats a token."""
    return cells.model.observed.method.model_sd * float(np.abs(moved).sum())
