"""Neighbouring layers that a budget treats alike, as one row: plan.json has a row a group, people want fewer.

Only what is shown is merged. Nothing is decided here, and the card's tables and the command line's call the
same function, so that both show the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from msgspec.structs import replace

from cerebellum.groups import span_name
from cerebellum.measure.artifacts import Look
from cerebellum.plan.artifacts import BudgetPlan, PlanRow, PointRow
from cerebellum.stats.estimate import Estimate, together


@dataclass(frozen=True, kw_only=True)
class MergedRow:
    """Holds a row for people, and the groups of plan.json that it stands for, in the order of their
    layers.
    """

    row: PlanRow
    members: tuple[str, ...]


def merged_rows(plan: BudgetPlan) -> list[MergedRow]:
    """Joins neighbouring layers of a role that go from the same base types to the same type.

    Bytes and tensors add up. Damages add up as estimates whose errors go together, because layers of one role
    share much of their uncertainty: it comes from the same measurement of the role.
    """
    runs = groupby(plan.groups, lambda row: (row.role, row.base_type, row.chosen_type))
    return [_merged(plan, list(run)) for _, run in runs]


def _merged(plan: BudgetPlan, run: Sequence[PlanRow]) -> MergedRow:
    members = tuple(row.name for row in run)
    if len(run) == 1:
        return MergedRow(row=run[0], members=members)
    chosen = {point.group: point for point in plan.points if plan.changes.get(point.group) == point.type}
    nll = total([chosen[name].nll if name in chosen else None for name in members])
    damage = Look.of(nll.interval() if nll else None)
    row = replace(
        run[0],
        name=_name(plan, run),
        layers=tuple(sorted(layer for row in run for layer in row.layers)),
        tensors=sum(row.tensors for row in run),
        bytes_saved=sum(row.bytes_saved for row in run),
        delta_pct=damage.delta_pct,
        ci_pct=damage.ci_pct,
        chunks=min((row.chunks for row in run if row.chunks), default=None),
        kld_change=sum_known(row.kld_change for row in run),
        kld_mean=None,
        kld_ci=None,
        top1_agreement=None,
    )
    return MergedRow(row=row, members=members)


def _name(plan: BudgetPlan, run: Sequence[PlanRow]) -> str:
    """Names a run after its role where it holds all of the role's groups, else after its layers too."""
    if sum(row.role == run[0].role for row in plan.groups) == len(run):
        return run[0].role
    return span_name(run[0].role, sorted(layer for row in run for layer in row.layers))


def points_together(plan: BudgetPlan, members: Sequence[str]) -> list[PointRow]:
    """Returns what several groups would be with all of them at one type, for each type that all can take.

    A group has no point for a type that is its base type already: there its point at the base stands in,
    where the groups' base types differ. Type None is all of them at the base.
    """
    curves = [{point.type: point for point in plan.points if point.group == name} for name in members]
    if not all(None in curve for curve in curves):
        return []
    base_types = {row.name: row.base_type for row in plan.groups}
    if len({base_types[name] for name in members}) > 1:
        for name, curve in zip(members, curves, strict=True):
            curve.setdefault(base_types[name], replace(curve[None], type=base_types[name]))
    shared = [qtype for qtype in curves[0] if all(qtype in curve for curve in curves)]
    return [_added([curve[qtype] for curve in curves]) for qtype in shared]


def _added(points: Sequence[PointRow]) -> PointRow:
    if len(points) == 1:
        return points[0]
    return replace(
        points[0],
        group=" + ".join(point.group for point in points),
        bytes=sum(point.bytes for point in points),
        kld=total([point.kld for point in points]),
        nll=total([point.nll for point in points]),
    )


def total(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Adds damages of layers of one role; None where one of them is not known, for a sum of the rest
    would look better than it is.
    """
    known = [estimate for estimate in estimates if estimate is not None]
    return together(known) if len(known) == len(estimates) else None


def sum_known(values: Iterable[float | None]) -> float | None:
    """Adds numbers; None where one of them is not known, for a sum of the rest would mislead."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None
