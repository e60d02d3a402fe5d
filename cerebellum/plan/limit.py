"""Measurements and exact bytes -> a plan of the published method. Loads no model; asks for what it wants measured.

Every group is measured alone; of those whose damage stays under the limit, a combination is measured whole,
and only what held ships. Which combination is tried is foretold (``foretold.py``): the one whose bytes, times the
chance that it holds, are most, less what the chunks are worth that it will take (``effort.py``). Each answer corrects
what is foretold, and more is tried while it promises more than it costs, so that the limit is spent.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace as replace_fields

from cerebellum.errors import BadInput
from cerebellum.layout import ILLEGAL, Layout
from cerebellum.measure.artifacts import Look, MeasurementRow
from cerebellum.plan.artifacts import DEMOTED, KEPT, KEPT_TYPE, LimitPlan, PlanRow
from cerebellum.plan.effort import Effort
from cerebellum.plan.foretold import Foretold, Mask, Part, frontier
from cerebellum.settings import Limit
from cerebellum.stats.paired import as_percent
from cerebellum.verdicts import SENSITIVE, SET_ASIDE, TOLERANT, Changes, Measurement, Threshold, drive

_MOST_TRIES = 8
"""Combinations that are measured at most; the level of the last is 1/72 of their share."""

_PRICE = 0.0003
"""What a chunk costs, as a share of the bytes to save: a combination that saves 1% more may take 33 chunks more."""

_WORTH = 0.005
"""Another combination is tried where it promises more than this share of the bytes saved so far, its chunks paid."""

_LIKELY = 0.1
"""A combination is tried where it has this chance to hold.

A chance of three in ten was asked for before: one run in five at +2% then never tried what an oracle ships."""

_SURE = 0.8  # the chance of one to fall back on, in what is lost where a combination is left

_TRUSTED = 2  # tries whose worth counts on another that nobody has measured

_REACH = 1.3  # how far over the limit a sum of parts may lie to be considered


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Groups that were measured together, which go down together or not at all."""

    changes: Changes
    bytes_saved: int
    measurement: Measurement

    @property
    def by_hand(self) -> bool:
        """Whether somebody wrote the measurement down without saying on how many chunks it was made.

        Nothing can be foretold of their errors. The method's first step is then taken as it was published: all
        groups that the limit allows, together.
        """
        return self.measurement.delta is not None and self.measurement.delta.n == 0


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


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A combination to measure, and how many chunks what it gains over the next best is worth."""

    changes: dict[str, str]
    worth: float = math.inf


@dataclass(frozen=True, kw_only=True)
class _Option:
    """A combination that could be tried: the bytes to gain, the chance to hold, and the chunks that it will take."""

    changes: dict[str, str]
    gain: int
    chance: float
    chunks: float


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
    units: tuple[Unit, ...], threshold: Threshold, known: Sequence[Measurement] = ()
) -> Generator[Trial, Measurement | None, Chosen]:
    """Yields each combination that it wants measured, and is sent its measurement, or None if there is none.

    Returns what to ship: of what was measured and held, that which saves the most bytes; a unit alone counts, it
    was measured too. Where nobody can measure, it is the first combination that was wanted. ``known`` are
    combinations that were measured before.
    """
    search = _Search(units, threshold)
    for measurement in known:
        search.learn(measurement)
    while (wanted := search.next()) is not None:
        measured = yield wanted
        if measured is None:
            return Chosen(changes=wanted.changes, units=units, measured=None)
        search.learn(measured)
    return Chosen(changes=search.best_changes, units=units, measured=search.best)


class _Search:
    """The combinations that were measured, the best of them, and what is foretold of the others."""

    def __init__(self, units: tuple[Unit, ...], threshold: Threshold) -> None:
        self.threshold = threshold
        self.units = [unit for unit in units if _holds(unit.measurement, threshold)]
        parts = [_part(unit.measurement) for unit in self.units]
        self.foretold = Foretold(parts)
        self.effort = Effort([part.delta for part in parts], threshold)
        self.saved = {name: unit.bytes_saved for unit in self.units for name in unit.changes}
        self.tried: list[Changes] = []
        self.best: Measurement | None = None
        self.best_bytes = 0
        for unit in self.units:
            self._keep(unit.measurement)

    @property
    def best_changes(self) -> Changes:
        """The best combination that held; nothing where none did."""
        return dict(self.best.changes) if self.best is not None else {}

    def learn(self, measurement: Measurement) -> None:
        """Takes in a combination that was measured."""
        members = self._members(measurement.changes)
        if members is None:
            return
        self.tried.append(measurement.changes)
        if measurement.delta is not None:
            self.foretold.learn(members, measurement.delta)
            self.effort.learn(members, measurement.delta)
        if _holds(measurement, self.threshold):
            self._keep(measurement)

    def next(self) -> Trial | None:
        """Returns the combination with the most to gain for its chunks; None where nothing promises enough."""
        if len(self.units) < 2 or len(self.tried) >= _MOST_TRIES:
            return None
        if not self.tried and all(unit.by_hand for unit in self.units):
            return Trial(changes=_merged(self.units))
        most = _REACH * self.threshold.nats
        found = frontier(self.foretold.parts.tolist(), [unit.bytes_saved for unit in self.units], most)
        options = [option for members in found if (option := self._option(members))]
        price = _PRICE * self._within_reach(options)
        promises = [option.chance * option.gain - price * option.chunks for option in options]
        if max(promises, default=0.0) <= _WORTH * self.best_bytes:
            return None
        best = options[int(np.argmax(promises))]
        return Trial(changes=best.changes, worth=self._lost_without(best, options) / _PRICE)

    def _option(self, members: Mask) -> _Option | None:
        """Returns a combination, unless it gains nothing, has little chance or was tried."""
        changes, gain = self._changes(members), self._bytes(members) - self.best_bytes
        belief = self.foretold.of(members)
        chance = belief.under(self.threshold.nats)
        if gain <= 0 or chance < _LIKELY or members.sum() < 2 or changes in self.tried:
            return None
        chunks = self.effort.chunks(members, belief)
        return _Option(changes=changes, gain=gain, chance=chance, chunks=chunks)

    def _within_reach(self, options: Sequence[_Option]) -> int:
        """Returns the bytes of the largest combination that probably holds, or of the best so far."""
        return self.best_bytes + max((option.gain for option in options if option.chance > 0.5), default=0)

    def _lost_without(self, best: _Option, options: Sequence[_Option]) -> float:
        """Returns the share of a combination's bytes that the next best lacks which is as good as sure to hold.

        After some tries that is only what was measured: they share their first chunks, and if those are unlike the
        text, one combination after the other would be left for the next.
        """
        trusted = len(self.tried) < _TRUSTED
        beside = (o.chance * o.gain for o in options if trusted and o.gain < best.gain and o.chance >= _SURE)
        return (best.gain - max(beside, default=0.0)) / (self.best_bytes + best.gain)

    def _keep(self, measurement: Measurement) -> None:
        members = self._members(measurement.changes)
        if members is not None and self._bytes(members) > self.best_bytes:
            self.best = measurement
            self.best_bytes = self._bytes(members)

    def _bytes(self, members: Mask) -> int:
        return sum(unit.bytes_saved for unit, used in zip(self.units, members, strict=True) if used)

    def _changes(self, members: Mask) -> dict[str, str]:
        return _merged([unit for unit, used in zip(self.units, members, strict=True) if used])

    def _members(self, changes: Changes) -> Mask | None:
        """Which units make up some changes; None where they are no combination of these."""
        members = np.array(
            [set(unit.changes.items()) <= set(changes.items()) for unit in self.units], np.bool_
        )
        return members if members.any() and self._changes(members) == dict(changes) else None


def _part(measurement: Measurement) -> Part:
    assert measurement.delta is not None
    return Part(delta=measurement.delta, kld=measurement.kld.mean if measurement.kld else None)


def _holds(found: Measurement, threshold: Threshold) -> bool:
    """Tolerant; or never decided (a fixed number of chunks), with the best estimate below the limit."""
    verdict = found.verdict(threshold)
    if found.delta is None or verdict in (SENSITIVE, SET_ASIDE):
        return False
    return verdict == TOLERANT or found.delta.mean < threshold.nats


def plan_from(measurements: Sequence[Measurement], layout: Layout, limit: Limit) -> Chosen:
    """Plans from what is known already; a combination that nobody measured stays unmeasured."""
    units = make_units(measurements, layout)
    alone = [unit.changes for unit in units]
    known = [measurement for measurement in measurements if measurement.changes not in alone]
    return drive(threshold_plan(units, limit.threshold, known), lambda trial: None)


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
    return replace_fields(
        PlanRow.kept(layout, name),
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
