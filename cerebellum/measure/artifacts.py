"""What the measure stage leaves: measurements.json against a limit, curves.json for a budget.

These are types only. Whoever reads a finished run loads neither an engine nor SciPy through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from cerebellum.codec import Artifact, Record, read_loose
from cerebellum.errors import BadInput
from cerebellum.gguf import parse_type
from cerebellum.measure.method import Method
from cerebellum.settings import KLD, Objective
from cerebellum.stats.estimate import Estimate
from cerebellum.stats.paired import Interval, as_nats
from cerebellum.verdicts import COLLAPSED, SET_ASIDE, Measurement, Threshold

Bounds = tuple[float, float]


class Look(Record, frozen=True, kw_only=True):
    """The change of perplexity as it was known after so many chunks, percent; without bounds at one chunk."""

    delta_pct: float | None
    ci_pct: Bounds | None = None
    chunks: int | None = None

    @classmethod
    def of(cls, delta: Interval | None) -> Look:
        """Turns an interval in nats into percent; bounds without end are left out, for JSON has none."""
        if delta is None:
            return cls(delta_pct=None)
        mean, low, high = delta.percent()
        return cls(delta_pct=mean, ci_pct=finite_pair(low, high), chunks=delta.n)


class MeasurementRow(Look, frozen=True, kw_only=True):
    """Some groups at other types, measured together against the base. ``type`` is one, or one a group.

    Divergence (nats a token) and agreement of the most likely token are against the base. ``se_nats`` is the
    standard error of the change, nats a token; ``warnings`` are sentences about chunks that lower the trust.
    """

    groups: tuple[str, ...]
    type: str | dict[str, str]
    verdict: str
    near_tie: bool = False
    kld_mean: float | None = None
    kld_ci: Bounds | None = None
    top1_agreement: float | None = None
    se_nats: float | None = None
    warnings: tuple[str, ...] = ()
    trace: tuple[Look, ...] = ()

    @classmethod
    def of_measurement(cls, found: Measurement, threshold: Threshold) -> MeasurementRow:
        """Says what was found, with its verdict against a limit."""
        types = sorted(set(found.changes.values()))
        look = Look.of(found.delta)
        return cls(
            groups=tuple(sorted(found.changes)),
            type=types[0] if len(types) == 1 else dict(found.changes),
            delta_pct=look.delta_pct,
            ci_pct=look.ci_pct,
            chunks=look.chunks or found.read or None,
            verdict=found.verdict(threshold),
            near_tie=threshold.near_tie(found.delta),
            kld_mean=found.kld.mean if found.kld else None,
            kld_ci=finite_pair(found.kld.low, found.kld.high) if found.kld else None,
            top1_agreement=found.top1,
            se_nats=_finite(found.delta.se) if found.delta else None,
            warnings=found.warnings,
            trace=tuple(Look.of(look) for look in found.trace),
        )


class RecordedRow(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement that somebody recorded, by hand or with this program: groups, type and change suffice.

    Keys that it does not know are notes for people.
    """

    groups: tuple[str, ...]
    type: str | dict[str, str]
    delta_pct: float | None
    ci_pct: Bounds | None = None
    chunks: int | None = None
    verdict: str | None = None
    kld_mean: float | None = None
    kld_ci: Bounds | None = None
    top1_agreement: float | None = None
    se_nats: float | None = None
    warnings: tuple[str, ...] = ()
    trace: tuple[Look, ...] = ()

    def measurement(self) -> Measurement:
        """Returns it in nats; ValueError says what it lacks. A collapsed variant has no change."""
        types = self.type if isinstance(self.type, dict) else dict.fromkeys(self.groups, self.type)
        changes = {name: parse_type(qtype).name for name, qtype in types.items()}
        if self.delta_pct is None:
            if self.verdict != COLLAPSED:
                raise ValueError(f"{', '.join(self.groups)} has no delta_pct")
            return Measurement(changes=changes, delta=None, read=self.chunks or 0)
        chunks = self.chunks or 0
        kld = None
        if self.kld_mean is not None:
            low, high = self.kld_ci or (-math.inf, math.inf)
            kld = Interval(mean=self.kld_mean, low=low, high=high, n=chunks, population=chunks)
        exactly = (self.delta_pct, self.delta_pct)
        return Measurement(
            changes=changes,
            delta=replace(_interval(self.delta_pct, self.ci_pct or exactly, chunks), se=self.se_nats),
            trace=tuple(
                _interval(look.delta_pct, look.ci_pct or (-100.0, math.inf), look.chunks or 0)
                for look in self.trace
                if look.delta_pct is not None
            ),
            kld=kld,
            top1=self.top1_agreement,
            set_aside=self.verdict == SET_ASIDE,
            warnings=self.warnings,
        )


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements from anywhere: measurements.json, or a table that a hand wrote."""

    measurements: tuple[RecordedRow, ...]


def read_recorded(path: Path) -> tuple[Measurement, ...]:
    """Reads measurements.json, or a hand-written table: rows of groups, type, delta_pct and optional ci_pct.

    Raises BadInput, in one line with an example, where the file is no such list.
    """
    example = 'wanted {"measurements": [{"groups": [...], "type": "Q2_K", "delta_pct": 1.9}, ...]}'
    found = read_loose(path, Recorded, f"not a list of measurements; {example}")
    try:
        return tuple(row.measurement() for row in found.measurements)
    except ValueError as error:
        raise BadInput(f"{path}: not a list of measurements ({error}); {example}") from error


def _interval(mean_pct: float, bounds: Bounds, chunks: int) -> Interval:
    """Turns percent into nats; a bound of -100% or less has no end."""
    low, high = (-math.inf if bound <= -100 else as_nats(bound) for bound in bounds)
    return Interval(mean=as_nats(mean_pct), low=low, high=high, n=chunks, population=chunks)


class Measurements(Artifact, frozen=True, kw_only=True):
    """measurements.json: every group alone, and combinations, against the base on the selection text.

    ``tokens_full`` is what the usual way takes: the base and every variant on the whole text.
    """

    format: Literal[1] = 1
    base: str
    demote: str
    threshold_pct: float
    indifference_pct: float
    alpha: float
    text: str
    text_sha256: str
    ctx: int
    seed: int
    chunks_in_text: int
    chunks_scored: int
    tokens_scored: int
    tokens_full: int
    measurements: tuple[MeasurementRow, ...]


class Effect(Record, frozen=True, kw_only=True):
    """What a change does to the KL divergence from the source and to the NLL, nats a token.

    None where it is not known, or where the variant collapsed.
    """

    kld: Estimate | None
    nll: Estimate | None

    def damage(self, objective: Objective) -> Estimate | None:
        """Returns the effect in the measure that a budget makes least."""
        return self.kld if objective == KLD else self.nll


class Response(Effect, frozen=True, kw_only=True):
    """Measured: the groups of a part at one type, all else at the anchor; its damage above the anchor's.

    ``part`` is the name of a role, or of a role with the layers that were looked at.
    """

    part: str
    groups: tuple[str, ...]
    type: str


class RoundingErrors(Record, frozen=True, kw_only=True):
    """Summed squared rounding error of every group, weighted by the importance of its columns.

    In units of the activations' mean square; only ratios between groups and types are used. ``of`` holds the
    types that a plan may give a group, ``at_base`` what it has in the base, ``at_anchor`` where its damage
    counts from. Groups whose rows cannot be at the anchor are in none of them.
    """

    anchor: str
    at_anchor: dict[str, float]
    at_base: dict[str, float]
    of: dict[str, dict[str, float]]

    def above(self, name: str, qtype: str | None) -> float:
        """Returns the error of a group at a type (None: at the base) above that at the anchor."""
        if qtype == self.anchor:
            return 0.0
        error = self.at_base[name] if qtype is None else self.of[name][qtype]
        return error - self.at_anchor[name]

    def summed(self, names: Sequence[str], qtype: str | None) -> float:
        """Returns the error above the anchor that some groups have together at a type."""
        return sum(self.above(name, qtype) for name in names)

    @property
    def all_types(self) -> list[str]:
        """The types of all groups, each once, in the order in which groups have them."""
        return list(dict.fromkeys(qtype for errors in self.of.values() for qtype in errors))


class Curves(Artifact, frozen=True, kw_only=True):
    """curves.json: measured responses, and what a fit needs beside them. Written once, by the measure stage.

    ``chunks`` is the most that a part got; ``passes`` is what all of it cost, in passes over the text.
    ``base_kld`` is the base's own divergence from the source and ``anchor_kld`` the anchor's, nats a token.
    ``method`` holds every number that was not measured. What a plan measures later stands in plan.json.
    """

    format: Literal[3] = 3
    base: str
    text: str
    text_sha256: str
    ctx: int
    seed: int
    chunks: int
    tokens_scored: int
    passes: float
    anchor_kld: float
    base_kld: float
    base_above_anchor: Effect
    responses: tuple[Response, ...]
    rounding: RoundingErrors
    method: Method

    @property
    def chunks_scored(self) -> int:
        """How many chunks the measurement cost, each variant counted for itself."""
        return self.tokens_scored // self.ctx


def finite_pair(low: float, high: float) -> Bounds | None:
    """Returns both bounds, or None where one has no end."""
    finite = all(abs(bound) < float("inf") for bound in (low, high))
    return (low, high) if finite else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
