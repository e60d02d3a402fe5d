"""Measurements + bytes -> Plan. Loads no model; what it wants measured, it asks for.

Threshold mode is the published method: groups whose damage stays under a limit are demoted together;
the combination is measured; while it is over the limit, the group with the most damage per byte saved
goes back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from cerebellum.base import Base
from cerebellum.errors import BadInput
from cerebellum.gguf import TensorInfo, fits, gguf_size, parse_type, tensor_bytes
from cerebellum.groups import Group
from cerebellum.measure.race import COLLAPSED, SENSITIVE, TOLERANT, Measurement, Threshold, interval_json
from cerebellum.source import Source
from cerebellum.stats.paired import Interval, as_nats, as_percent

_MEASURED = (
    *("delta_pct", "ci_pct", "chunks", "verdict", "near_tie"),
    *("kld_mean", "kld_ci", "top1_agreement"),
)
KEPT, DEMOTED, ILLEGAL, NOTHING_TO_SAVE = "kept", "demoted", "illegal", "nothing to save"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Groups that were measured together, which go down together or not at all."""

    changes: Mapping[str, str]
    bytes_saved: int
    measurement: Measurement

    @property
    def damage_per_byte(self) -> float:
        """Nats per byte saved."""
        assert self.measurement.delta is not None
        return self.measurement.delta.mean / self.bytes_saved


@dataclass(frozen=True, kw_only=True)
class _Meta:
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of each group at its base types and at any other type, from shapes alone."""

    tensors: Mapping[str, TensorInfo]
    groups: Mapping[str, Group]
    base: Base

    @classmethod
    def of(cls, source: Source, groups: Iterable[Group], base: Base) -> Sizes:
        """Of the groups of a model that may be changed."""
        free = {group.name: group for group in groups if not group.protected}
        return cls(tensors=source.tensors, groups=free, base=base)

    def base_types(self, name: str) -> dict[str, GGMLQuantizationType]:
        return {tensor: self.base.types[tensor] for tensor in self.groups[name].tensors}

    def base_bytes(self, name: str) -> int:
        return sum(tensor_bytes(t, self.tensors[n].shape) for n, t in self.base_types(name).items())

    def bytes_at(self, name: str, kind: str) -> int:
        wanted = parse_type(kind)
        return sum(tensor_bytes(wanted, self.tensors[n].shape) for n in self.groups[name].tensors)

    def legal(self, name: str, kind: str) -> bool:
        wanted = parse_type(kind)
        return all(fits(wanted, self.tensors[n].shape) for n in self.groups[name].tensors)

    def bytes_saved(self, changes: Mapping[str, str]) -> int:
        return sum(self.base_bytes(name) - self.bytes_at(name, kind) for name, kind in changes.items())

    def total(self, changes: Mapping[str, str]) -> int:
        """Bytes of all tensors of the model with ``changes``, without metadata or padding."""
        whole = sum(tensor_bytes(t, self.tensors[n].shape) for n, t in self.base.types.items())
        return whole - self.bytes_saved(changes)

    def file_bytes(self, name: str, kind: str) -> int:
        """Bytes of a group in the file at ``kind`` (or "base"), every tensor padded to the alignment."""
        types = self.base_types(name)
        if kind != "base":
            types = dict.fromkeys(types, parse_type(kind))
        return sum(self._padded(tensor_bytes(t, self.tensors[n].shape)) for n, t in types.items())

    def fixed_bytes(self) -> int:
        """Bytes of the file that no plan changes: header, metadata and protected tensors."""
        grouped = {tensor for group in self.groups.values() for tensor in group.tensors}
        metas = [_Meta(name=n, shape=self.tensors[n].shape, type=t) for n, t in self.base.types.items()]
        whole = gguf_size(self.base.records, metas, self.base.alignment)
        return whole - sum(
            self._padded(tensor_bytes(t, self.tensors[n].shape))
            for n, t in self.base.types.items()
            if n in grouped
        )

    def header_bytes(self) -> int:
        """Bytes of the file before its tensors: header, metadata and the list of tensors."""
        padded = (self._padded(self.tensor_bytes(name)) for name in self.base.types)
        return self.whole_file_bytes() - sum(padded)

    def tensor_bytes(self, name: str) -> int:
        """Bytes of one tensor in the base."""
        return tensor_bytes(self.base.types[name], self.tensors[name].shape)

    def whole_file_bytes(self, changes: Mapping[str, str] | None = None) -> int:
        """Exact bytes of the file with ``changes``: header, metadata, tensors and padding."""
        changes = changes or {}
        return self.fixed_bytes() + sum(
            self.file_bytes(name, changes.get(name, "base")) for name in self.groups
        )

    def _padded(self, n_bytes: int) -> int:
        return -(-n_bytes // self.base.alignment) * self.base.alignment

    def tensor_types(self, changes: Mapping[str, str]) -> dict[str, str]:
        """Tensor name -> type name of the whole model with ``changes``."""
        types = {name: kind.name for name, kind in self.base.types.items()}
        for group, kind in changes.items():
            types |= dict.fromkeys(self.groups[group].tensors, parse_type(kind).name)
        return types

    def why_not(self, name: str, kind: str) -> str | None:
        """Why a group cannot be demoted to ``kind``, or None if it can."""
        if not self.legal(name, kind):
            return ILLEGAL
        return None if self.bytes_saved({name: kind}) > 0 else NOTHING_TO_SAVE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to ship. ``measured`` is the combination's own measurement, where there is one."""

    changes: Mapping[str, str]
    demote: str
    threshold: Threshold
    units: tuple[Unit, ...]
    measured: Measurement | None

    @property
    def predicted_nats(self) -> float:
        """The sum of the parts, nats/token; what the whole would cost if damage were additive."""
        chosen = [u for u in self.units if set(u.changes) <= set(self.changes)]
        return sum(u.measurement.delta.mean for u in chosen if u.measurement.delta is not None)


def demotable(sizes: Sizes, kind: str) -> list[Mapping[str, str]]:
    """One candidate for every group that can be demoted to ``kind``."""
    return [{name: kind} for name in sizes.groups if sizes.why_not(name, kind) is None]


def make_units(measurements: Sequence[Measurement], sizes: Sizes) -> tuple[Unit, ...]:
    """Single groups where they were measured alone; a joint measurement only for groups that were not."""
    for measurement in measurements:
        _check_fits(measurement, sizes)
    ordered = sorted(measurements, key=lambda m: len(m.changes))
    taken: set[str] = set()
    units = []
    for measurement in ordered:
        if taken & set(measurement.changes):
            continue
        saved = sizes.bytes_saved(measurement.changes)
        if saved <= 0:
            continue
        taken |= set(measurement.changes)
        units.append(Unit(changes=measurement.changes, bytes_saved=saved, measurement=measurement))
    return tuple(units)


def _check_fits(measurement: Measurement, sizes: Sizes) -> None:
    """BadInput where a measurement is of another model."""
    for name, kind in measurement.changes.items():
        if name not in sizes.groups:
            raise BadInput(f"the measurements name {name!r}, a group this model lacks; see `inspect`")
        if not sizes.legal(name, kind):
            rows = sorted({sizes.tensors[tensor].shape[0] for tensor in sizes.groups[name].tensors})
            raise BadInput(f"the measurements have {name} at {kind}, which rows of {rows} cannot take")


def threshold_plan(
    units: tuple[Unit, ...], demote: str, threshold: Threshold
) -> Generator[Mapping[str, str], Measurement | None, Plan]:
    """Yields each combination it wants measured; is sent its measurement, or None if there is none."""
    chosen = [unit for unit in units if _holds(unit.measurement, threshold)]
    measured: Measurement | None = None
    while chosen:
        measured = yield _merged(chosen)
        if measured is None or _holds(measured, threshold):
            break
        chosen.remove(max(chosen, key=lambda unit: unit.damage_per_byte))
        measured = None
    return Plan(changes=_merged(chosen), demote=demote, threshold=threshold, units=units, measured=measured)


def _holds(found: Measurement, threshold: Threshold) -> bool:
    """Tolerant; or never decided, with the best estimate below the limit."""
    verdict = threshold.verdict(found.delta)
    if found.delta is None or verdict == SENSITIVE:
        return False
    return verdict == TOLERANT or found.delta.mean < threshold.nats


def plan_from(measurements: Sequence[Measurement], sizes: Sizes, demote: str, threshold: Threshold) -> Plan:
    """A plan from what is known already; a combination that nobody measured stays unmeasured."""
    known = {tuple(sorted(m.changes.items())): m for m in measurements}
    planning = threshold_plan(make_units(measurements, sizes), demote, threshold)
    try:
        combination = next(planning)
        while True:
            combination = planning.send(known.get(tuple(sorted(combination.items()))))
    except StopIteration as stop:
        plan: Plan = stop.value
        return plan


def _merged(units: Sequence[Unit]) -> dict[str, str]:
    return {name: kind for unit in units for name, kind in unit.changes.items()}


def plan_json(plan: Plan, sizes: Sizes) -> dict[str, Any]:
    """plan.json, as the contract has it."""
    delta = plan.measured.delta if plan.measured else None
    measured = interval_json(delta)
    return {
        "mode": "threshold",
        "threshold_pct": plan.threshold.limit_pct,
        "indifference_pct": plan.threshold.indifference_pct,
        "base": sizes.base.label,
        "demote": plan.demote,
        "groups": [_group_row(name, plan, sizes) for name in sizes.groups],
        "predicted_delta_pct": as_percent(plan.predicted_nats),
        "measured_delta_pct": measured["delta_pct"] if plan.changes else 0.0,
        "ci_pct": measured["ci_pct"],
        "base_tensor_bytes": sizes.total({}),
        "tensor_bytes": sizes.total(plan.changes),
        "bytes_saved": sizes.bytes_saved(plan.changes),
        "tensor_types": sizes.tensor_types(plan.changes),
    }


def _group_row(name: str, plan: Plan, sizes: Sizes) -> dict[str, Any]:
    unit = next((u for u in plan.units if name in u.changes), None)
    refusal = sizes.why_not(name, plan.demote)
    row: dict[str, Any] = {
        "name": name,
        "tensors": len(sizes.groups[name].tensors),
        "base_type": "+".join(sorted({t.name for t in sizes.base_types(name).values()})),
        "chosen_type": plan.changes.get(name, "base"),
        "bytes_saved": 0 if refusal == ILLEGAL else sizes.bytes_saved({name: plan.demote}),
        "delta_pct": None,
        "ci_pct": None,
        "chunks": None,
        "kld_mean": None,
        "kld_ci": None,
        "top1_agreement": None,
        "near_tie": False,
        "verdict": refusal or "not measured",
        "decision": DEMOTED if name in plan.changes else KEPT,
        "measured_with": [],
    }
    if unit is not None:
        measured = unit.measurement.as_json(plan.threshold)
        row |= {key: measured[key] for key in _MEASURED}
        row["measured_with"] = sorted(set(unit.changes) - {name})
    return row


def read_measurements(path: Path) -> tuple[Measurement, ...]:
    """measurements.json, ours or made by hand: rows of groups, type, delta_pct and optional ci_pct."""
    try:
        rows = json.loads(path.read_text())["measurements"]
        return tuple(_read_row(row) for row in rows)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path}: not a list of measurements ({type(error).__name__}: {error}); "
            'wanted {"measurements": [{"groups": [...], "type": "Q2_K", "delta_pct": 1.9}, ...]}'
        ) from error


def _read_row(row: Mapping[str, Any]) -> Measurement:
    kinds = row["type"]
    changes = kinds if isinstance(kinds, dict) else dict.fromkeys(row["groups"], parse_type(kinds).name)
    if row["delta_pct"] is None:
        if row.get("verdict") != COLLAPSED:
            raise ValueError(f"{row['groups']} has no delta_pct")
        return Measurement(changes=changes, delta=None)
    return Measurement(
        changes=changes,
        delta=_read_interval(row, (row["delta_pct"], row["delta_pct"])),
        trace=tuple(_read_interval(look, (-100.0, math.inf)) for look in row.get("trace") or ()),
        kld=_read_divergence(row),
        top1=row.get("top1_agreement"),
    )


def _read_interval(row: Mapping[str, Any], without: tuple[float, float]) -> Interval:
    """Percent to nats; ``without`` stands in where there are no bounds."""
    low, high = (_nats(float(bound)) for bound in row.get("ci_pct") or without)
    chunks = int(row.get("chunks") or 0)
    return Interval(mean=as_nats(float(row["delta_pct"])), low=low, high=high, n=chunks, population=chunks)


def _read_divergence(row: Mapping[str, Any]) -> Interval | None:
    if row.get("kld_mean") is None:
        return None
    low, high = row.get("kld_ci") or (-math.inf, math.inf)
    chunks = int(row.get("chunks") or 0)
    return Interval(mean=row["kld_mean"], low=low, high=high, n=chunks, population=chunks)


def _nats(percent: float) -> float:
    return -math.inf if percent <= -100 else as_nats(percent)
