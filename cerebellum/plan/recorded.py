"""Plans by budget from measurements made elsewhere: what was recorded, and a stated model for the rest.

Where only some demotions of a group were measured, its damage at other types is modelled: it falls by a
factor of four with every bit of a weight, as squared rounding error does, and its height is fixed by the
group's recorded demotion. A group that nobody measured stays at its base. Only a header is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from cerebellum.gguf import bits_per_weight, parse_type
from cerebellum.layout import Layout
from cerebellum.plan.artifacts import BudgetPlan, PointRow
from cerebellum.plan.budget import plan_points
from cerebellum.plan.limit import make_units
from cerebellum.plan.target import Target
from cerebellum.settings import K_LADDER, PPL
from cerebellum.stats.estimate import Estimate
from cerebellum.verdicts import Measurement

MODEL = "damage proportional to 4^-bits, fixed by each group's recorded demotion"


def plan_recorded(measurements: Sequence[Measurement], layout: Layout, target: Target) -> BudgetPlan:
    """Returns the plan of least modelled damage within a target, which names the model it rests on.

    Its objective is the NLL, for a divergence from the source was not recorded.
    """
    points = recorded_points(measurements, layout)
    return replace(plan_points(points, layout, target, PPL), model=MODEL)


def recorded_points(measurements: Sequence[Measurement], layout: Layout) -> tuple[PointRow, ...]:
    """Returns every group at every K-quant: recorded where it was recorded, modelled elsewhere, nats a token."""
    recorded = _shared_out(measurements, layout)
    points: list[PointRow] = []
    for name in layout.groups:
        demotions = recorded.get(name, {})
        legal = [qtype for qtype in K_LADDER if layout.legal(name, qtype)] if demotions else []
        for qtype in (None, *legal):
            known = None if qtype is None else demotions.get(qtype)
            nll = known or Estimate.exact(_modelled(name, qtype, demotions, layout))
            n_bytes = layout.group_bytes(name, qtype)
            points.append(PointRow(group=name, type=qtype, bytes=n_bytes, kld=None, nll=nll))
    return tuple(points)


def _shared_out(measurements: Sequence[Measurement], layout: Layout) -> dict[str, dict[str, Estimate]]:
    """Returns the recorded changes by group and type; a joint record is shared out by the bytes it saved."""
    found: dict[str, dict[str, Estimate]] = {}
    for unit in make_units(measurements, layout):
        if unit.measurement.delta is None:
            continue
        delta = Estimate.from_interval(unit.measurement.delta)
        for name, qtype in unit.changes.items():
            share = layout.bytes_saved({name: qtype}) / unit.bytes_saved
            found.setdefault(name, {})[qtype] = delta * share
    return found


def _modelled(name: str, qtype: str | None, recorded: Mapping[str, Estimate], layout: Layout) -> float:
    """Returns the recorded demotion scaled by the squared rounding error of a type; no error of it is claimed."""
    if qtype is None:
        return 0.0
    smallest = min(recorded, key=lambda each: layout.group_bytes(name, each))
    at_base = _squared_error(name, None, layout)
    unit = _squared_error(name, smallest, layout) - at_base
    return recorded[smallest].mean * (_squared_error(name, qtype, layout) - at_base) / unit


def _squared_error(name: str, qtype: str | None, layout: Layout) -> float:
    """Returns the mean of 4^-bits over a group's weights: proportional to the squared rounding error."""
    total = 0.0
    weights = 0
    for tensor, at_base in layout.group_types(name).items():
        bits = bits_per_weight(at_base if qtype is None else parse_type(qtype))
        n = layout.tensors[tensor].n_elements
        total += n * 4.0**-bits
        weights += n
    return total / weights
