"""Measurements and exact bytes -> a plan of the published method. Loads no model; asks for what it wants measured.

Groups whose damage stays under a limit are demoted together; the combination is measured; while it is over the
limit, the group with the most damage per byte saved goes back.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from cerebellum.errors import BadInput
from cerebellum.layout import ILLEGAL, Layout
from cerebellum.measure.artifacts import Look, MeasurementRow
from cerebellum.plan.artifacts import KEPT_TYPE, LimitPlan, PlanRow
from cerebellum.settings import Limit
from cerebellum.stats.paired import as_percent
from cerebellum.verdicts import SENSITIVE, TOLERANT, Changes, Measurement, Threshold, drive

KEPT, DEMOTED = "kept", "demoted"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Groups that were measured together, which go down together or not at all."""

    changes: Changes
    bytes_saved: int
    measurement: Measurement

    @property
    def damage_per_byte(self) -> float:
        """Nats per byte saved."""
        assert self.measurement.delta is not None
        return self.measurement.delta.mean / self.bytes_saved


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What to ship. ``measured`` is the combination's own measurement, where there is one."""

    changes: Changes
    units: tuple[Unit, ...]
    measured: Measurement | None

    @property
    def predicted_nats(self) -> float:
        """The sum of the parts, nats a token: what the whole would cost if damage were additive."""
        chosen = [unit for unit in self.units if set(unit.changes) <= set(self.changes)]
        return sum(unit.measurement.delta.mean for unit in chosen if unit.measurement.delta is not None)


def demotable(layout: Layout, qtype: str) -> list[Changes]:
    """Returns one change for every group that can be demoted to a type."""
    return [{name: qtype} for name in layout.groups if layout.why_not(name, qtype) is None]


def make_units(measurements: Sequence[Measurement], layout: Layout) -> tuple[Unit, ...]:
    """Single groups where they were measured alone; a joint measurement only for groups that were not."""
    for measurement in measurements:
        _check_fits(measurement, layout)
    ordered = sorted(measurements, key=lambda m: len(m.changes))
    taken: set[str] = set()
    units = []
    for measurement in ordered:
        if taken & set(measurement.changes):
            continue
        saved = layout.bytes_saved(measurement.changes)
        if saved <= 0:
            continue
        taken |= set(measurement.changes)
        units.append(Unit(changes=measurement.changes, bytes_saved=saved, measurement=measurement))
    return tuple(units)


def _check_fits(measurement: Measurement, layout: Layout) -> None:
    """BadInput where a measurement is of another model."""
    for name, qtype in measurement.changes.items():
        if name not in layout.groups:
            raise BadInput(f"the measurements name {name!r}, a group this model lacks; see `inspect`")
        if not layout.legal(name, qtype):
            rows = sorted({layout.tensors[tensor].shape[0] for tensor in layout.groups[name].tensors})
            raise BadInput(f"the measurements have {name} at {qtype}, which rows of {rows} cannot take")


def threshold_plan(
    units: tuple[Unit, ...], threshold: Threshold
) -> Generator[Changes, Measurement | None, Chosen]:
    """Yields each combination that it wants measured, and is sent its measurement, or None if there is none.

    Returns what to ship: the first combination that holds, or that nobody measured.
    """
    chosen = [unit for unit in units if _holds(unit.measurement, threshold)]
    measured: Measurement | None = None
    while chosen:
        measured = yield _merged(chosen)
        if measured is None or _holds(measured, threshold):
            break
        chosen.remove(max(chosen, key=lambda unit: unit.damage_per_byte))
        measured = None
    return Chosen(changes=_merged(chosen), units=units, measured=measured)


def _holds(found: Measurement, threshold: Threshold) -> bool:
    """Tolerant; or never decided, with the best estimate below the limit."""
    verdict = threshold.verdict(found.delta)
    if found.delta is None or verdict == SENSITIVE:
        return False
    return verdict == TOLERANT or found.delta.mean < threshold.nats


def plan_from(measurements: Sequence[Measurement], layout: Layout, limit: Limit) -> Chosen:
    """Plans from what is known already; a combination that nobody measured stays unmeasured."""
    known = {tuple(sorted(m.changes.items())): m for m in measurements}
    planning = threshold_plan(make_units(measurements, layout), limit.threshold)
    return drive(planning, lambda changes: known.get(tuple(sorted(changes.items()))))


def _merged(units: Sequence[Unit]) -> dict[str, str]:
    return {name: qtype for unit in units for name, qtype in unit.changes.items()}


def limit_plan(chosen: Chosen, layout: Layout, limit: Limit) -> LimitPlan:
    """Returns plan.json of what was chosen: a row a group, and what all of it comes to."""
    whole = Look.of(chosen.measured.delta if chosen.measured else None)
    return LimitPlan(
        threshold_pct=limit.max_increase_pct,
        indifference_pct=limit.indifference_pct,
        base=layout.base.label,
        demote=limit.demote,
        groups=tuple(_row(name, chosen, layout, limit) for name in layout.groups),
        predicted_delta_pct=as_percent(chosen.predicted_nats),
        measured_delta_pct=whole.delta_pct if chosen.changes else 0.0,
        ci_pct=whole.ci_pct,
        base_tensor_bytes=layout.tensor_bytes(),
        tensor_bytes=layout.tensor_bytes(chosen.changes),
        bytes_saved=layout.bytes_saved(chosen.changes),
        file_bytes=layout.file_bytes(chosen.changes),
        tensor_types=layout.type_names(chosen.changes),
    )


def _row(name: str, chosen: Chosen, layout: Layout, limit: Limit) -> PlanRow:
    unit = next((unit for unit in chosen.units if name in unit.changes), None)
    seen = MeasurementRow.of_measurement(unit.measurement, limit.threshold) if unit else None
    refusal = layout.why_not(name, limit.demote)
    group = layout.groups[name]
    return PlanRow(
        name=name,
        role=group.role,
        layers=group.layers,
        tensors=len(group.tensors),
        base_type="+".join(layout.base_types([name])),
        chosen_type=chosen.changes.get(name, KEPT_TYPE),
        bytes_saved=0 if refusal == ILLEGAL else layout.bytes_saved({name: limit.demote}),
        delta_pct=seen.delta_pct if seen else None,
        ci_pct=seen.ci_pct if seen else None,
        chunks=seen.chunks if seen else None,
        verdict=seen.verdict if seen else refusal or "not measured",
        decision=DEMOTED if name in chosen.changes else KEPT,
        near_tie=bool(seen and seen.near_tie),
        measured_with=tuple(sorted(set(unit.changes) - {name})) if unit else (),
        kld_mean=seen.kld_mean if seen else None,
        kld_ci=seen.kld_ci if seen else None,
        top1_agreement=seen.top1_agreement if seen else None,
    )
