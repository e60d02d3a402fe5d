"""Measured responses + rounding errors -> what every group costs at every type.

The damage of a group at a type is its sensitivity times the type's rounding error there (rounding.py);
damages of groups add up. That is one linear model for everything measured, from half a role at one type to
a whole plan: sensitivities are its non-negative least squares, drawn towards those of their role. It leaves
out a few percent that belong to a role and type together; where those were measured, they count.

What whole plans did beyond the sum of their parts is learned as a share of each role's and each type's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from cerebellum.measure.curves import BASE, KLD, PPL, Effect, Part, Point, Response, base_kinds, roles
from cerebellum.measure.race import Changes
from cerebellum.measure.rounding import RoundingErrors
from cerebellum.plan.limit import Sizes
from cerebellum.stats.paired import NORMAL_95, Interval

_LAYERS_SD = 0.5  # of a group's sensitivity around its role's, before it was measured
_MODEL_SD = 0.1  # of a damage around what the linear model says
_WHOLE_SD = 0.03  # of the damage of a whole plan, beyond what types and roles explain
_LESSON_SD = 0.15  # of what a type, or a role, does in a whole plan around what it did alone
_OBJECTIVES_SD = 0.5  # of a sensitivity of the NLL around that of the divergence
_CROSS_SHARE = 0.05  # of the anchor's own damage: an error of every damage measured above it
_FLOOR = 0.05  # of its prior, below which no sensitivity is believed; of a factor, too
_LEAST_DAMAGE = 1e-7  # nats/token: parts that do nothing are worth next to nothing, not nothing

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Whole(Effect):
    """A whole plan that was measured: its changes from the base, and its damage above the anchor."""

    changes: Changes


@dataclass(frozen=True, kw_only=True)
class Fit:
    """``heights`` (groups,) nats per unit of rounding error, with their ``covariance``.

    ``departures``: (role, type) -> how many times the linear model's damage was measured alone.
    ``lessons``: role or type -> by how much, as a share, it did more in whole plans.
    """

    heights: Vector
    covariance: Matrix
    departures: Mapping[tuple[str, str], float] = field(default_factory=dict)
    lessons: Mapping[str, float] = field(default_factory=dict)

    def drawn(self, rng: np.random.Generator) -> Fit:
        """Another fit that the measurements allow, drawn in units of each height's own spread."""
        sd = np.sqrt(np.diag(self.covariance))
        correlation = self.covariance / np.outer(sd, sd)
        drawn = self.heights + sd * rng.multivariate_normal(np.zeros(len(sd)), correlation, method="eigh")
        return replace(self, heights=np.maximum(drawn, _FLOOR * self.heights))


class Sensitivities:
    """The model of one run; groups that were never measured, or only collapsed, stay at their base."""

    def __init__(
        self,
        responses: Sequence[Response],
        errors: RoundingErrors,
        sizes: Sizes,
        anchor_kld: float = 0.0,
    ) -> None:
        """``anchor_kld``: what the anchor itself loses, nats/token; damages mix with it a little."""
        self.sizes, self.errors = sizes, errors
        self.responses = [r for r in responses if r.kld is not None]
        self._collapsed = [r for r in responses if r.kld is None]
        self._blur = _CROSS_SHARE * anchor_kld
        heard = {r.part for r in self.responses if self._rounds(r)}
        self._roles = {part.name: part for part in roles(sizes) if part in heard}
        self.groups = [name for name in errors.of if sizes.groups[name].role in self._roles]
        self._number = {name: number for number, name in enumerate(self.groups)}

    def points(self, wholes: Sequence[Whole] = (), rng: np.random.Generator | None = None) -> list[Point]:
        """Every group at its base and at every type it may take, as changes against the base.

        With ``rng``, of a fit drawn from what the measurements allow, for plans that differ.
        """
        fits = {objective: self._fit(objective, wholes) for objective in (KLD, PPL)} if self.groups else {}
        if rng is not None:
            fits = {objective: fit.drawn(rng) for objective, fit in fits.items()}
        return [
            point
            for name in self.sizes.groups
            for point in (self._curve(name, fits) if name in self._number else [self._kept(name)])
        ]

    def _rounds(self, response: Response) -> bool:
        """Whether the type rounds the part at all: weights that are all zero say nothing."""
        return sum(self.errors.above(name, response.kind) for name in response.part.groups) != 0

    # --- the fit

    def _fit(self, objective: str, wholes: Sequence[Whole]) -> Fit:
        fit = self._of_divergence if objective == KLD else self._of_nll
        return replace(fit, lessons=self._lessons(fit, wholes, objective))

    @cached_property
    def _of_divergence(self) -> Fit:
        """To the parts alone; layers are like their role until they were looked at."""
        role_heights = {name: self._role_height(part) for name, part in self._roles.items()}
        prior = np.array([role_heights[self.sizes.groups[name].role] for name in self.groups])
        fit = _least_squares(prior, _LAYERS_SD * prior, [self._row(r, KLD) for r in self._known])
        return replace(fit, departures=self._departures(fit.heights))

    @cached_property
    def _of_nll(self) -> Fit:
        """To the parts alone. Of a calibrated model the divergence is the expected change of the NLL, which
        is too noisy to tell types apart."""
        prior = self._of_divergence.heights
        return _least_squares(prior, _OBJECTIVES_SD * prior, [self._row(r, PPL) for r in self._known])

    @cached_property
    def _known(self) -> list[Response]:
        """Of groups that have a sensitivity."""
        return [r for r in self.responses if set(r.part.groups) <= self._number.keys()]

    def _role_height(self, part: Part) -> float:
        """Weighted least squares through the origin over the types of a whole role."""
        rows = [self._row(r, KLD) for r in self.responses if r.part == part]
        error = np.array([row.coefficients.sum() for row in rows])
        damage, sd = np.array([row.value for row in rows]), np.array([row.sd for row in rows])
        height = float((error * damage / sd**2).sum() / (error**2 / sd**2).sum())
        largest, blur = float(np.abs(damage).max()), max(self._blur, _LEAST_DAMAGE)
        return max(height, max(_FLOOR * largest, blur * _FLOOR) / float(np.abs(error).max()))

    def _row(self, response: Response, objective: str) -> _Row:
        damage = response.damage(objective)
        assert damage is not None
        row = np.zeros(len(self.groups))
        for name in response.part.groups:
            row[self._number[name]] = self.errors.above(name, response.kind)
        return _Row.of(row, damage, _MODEL_SD, self._blur)

    def _departures(self, heights: Vector) -> dict[tuple[str, str], float]:
        """Measured over modelled for each role and type, drawn towards 1 as far as noise allows.

        Of the largest part that was measured at it: the whole role, as a rule.
        """
        largest: dict[tuple[str, str], Response] = {}
        for response in sorted(filter(self._rounds, self._known), key=lambda r: len(r.part.groups)):
            largest[self.sizes.groups[response.part.groups[0]].role, response.kind] = response
        found = {}
        for key, response in largest.items():
            row = self._row(response, KLD)
            modelled = float(row.coefficients @ heights)
            error = max(row.noise / abs(modelled), 1e-6)
            weights = np.array([1 / _MODEL_SD**2, 1 / error**2])
            ratio = float(weights @ np.array([1.0, row.value / modelled]) / weights.sum())
            found[key] = max(ratio, _FLOOR)
        return found

    def _lessons(self, fit: Fit, wholes: Sequence[Whole], objective: str) -> dict[str, float]:
        """What whole plans did beyond the sum of their parts, shared out among types and roles.

        Ridge regression: each may have done some ``_LESSON_SD`` more or less than alone.
        """
        base = {kind for name in self.groups for kind in self._kinds(name, BASE)}
        names = [*self._roles, *dict.fromkeys((*self.errors.all_kinds, *sorted(base)))]
        rows, seen = [], []
        for whole in wholes:
            damage = whole.damage(objective)
            if damage is None:
                continue
            shares, total = self._shares(fit, whole.changes)
            row = _Row.of(np.array([shares.get(name, 0.0) for name in names]), damage, _WHOLE_SD, self._blur)
            rows.append(row.coefficients * _LESSON_SD / row.sd)
            seen.append((row.value - total) / row.sd)
        if not rows:
            return {}
        design = np.vstack([rows, np.eye(len(names))])
        found = np.linalg.lstsq(design, np.append(seen, np.zeros(len(names))))[0] * _LESSON_SD
        return dict(zip(names, found.tolist(), strict=True))

    def _shares(self, fit: Fit, changes: Changes) -> tuple[dict[str, float], float]:
        """The damage of a plan by role and by type, and in all."""
        shares: dict[str, float] = {}
        for name, height in zip(self.groups, fit.heights, strict=True):
            kinds = self._kinds(name, changes.get(name, BASE))
            damage = float(height * self._error(name, changes.get(name, BASE), fit))
            role = self.sizes.groups[name].role
            shares[role] = shares.get(role, 0.0) + damage
            for kind in kinds:
                shares[kind] = shares.get(kind, 0.0) + damage / len(kinds)
        return shares, sum(shares.get(role, 0.0) for role in self._roles)

    # --- what it says

    def _kinds(self, name: str, kind: str) -> list[str]:
        part = Part(name=name, groups=(name,))
        return sorted(base_kinds(part, self.sizes)) if kind == BASE else [kind]

    def _error(self, name: str, kind: str, fit: Fit) -> float:
        """Rounding error of a group above the anchor, times what was measured beside it."""
        role = self.sizes.groups[name].role
        lessons = fit.lessons.get(role, 0.0)
        factors = [
            fit.departures.get((role, each), 1.0) * max(1 + lessons + fit.lessons.get(each, 0.0), _FLOOR)
            for each in self._kinds(name, kind)
        ]
        return self.errors.above(name, kind) * float(np.mean(factors))

    def _curve(self, name: str, fits: Mapping[str, Fit]) -> Iterator[Point]:
        part = Part(name=name, groups=(name,))
        kinds = [kind for kind in self.errors.kinds(name) if self._allowed(name, kind)]
        for kind in (BASE, *kinds):
            if base_kinds(part, self.sizes) == {kind}:
                continue
            kld, nll = (self._change(name, kind, fits[objective]) for objective in (KLD, PPL))
            yield Point(part=part, kind=kind, n_bytes=part.n_bytes(kind, self.sizes), kld=kld, nll=nll)

    def _allowed(self, name: str, kind: str) -> bool:
        """Whether no part of the group collapsed at this type, or at one that rounds less."""
        error = self.errors.of[name][kind]
        broken = (r.kind for r in self._collapsed if name in r.part.groups)
        return all(error < self.errors.of[name][other] for other in broken)

    def _change(self, name: str, kind: str, fit: Fit) -> Interval:
        number = self._number[name]
        error = self._error(name, kind, fit) - self._error(name, BASE, fit)
        mean = float(fit.heights[number] * error)
        sd = np.hypot(error * np.sqrt(fit.covariance[number, number]), _MODEL_SD * mean)
        half = NORMAL_95 * float(sd)
        n = max((r.kld.n for r in self.responses if r.kld and name in r.part.groups), default=0)
        return Interval(mean=mean, low=mean - half, high=mean + half, n=n, population=n)

    def _kept(self, name: str) -> Point:
        part = Part(name=name, groups=(name,))
        zero = Interval(mean=0.0, low=0.0, high=0.0, n=0, population=0)
        return Point(part=part, kind=BASE, n_bytes=part.n_bytes(BASE, self.sizes), kld=zero, nll=zero)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One observation: ``coefficients`` (groups,) @ heights = ``value`` give or take ``sd``.

    ``noise`` is the part of ``sd`` that is not the model's.
    """

    coefficients: Vector
    value: float
    sd: float
    noise: float

    @classmethod
    def of(cls, coefficients: Vector, damage: Interval, model_sd: float, blur: float) -> _Row:
        noise = float(np.hypot((damage.high - damage.low) / 2 / NORMAL_95, blur))
        sd = max(float(np.hypot(noise, model_sd * damage.mean)), 1e-12)
        return cls(coefficients=coefficients, value=damage.mean, sd=sd, noise=noise)


def _least_squares(prior: Vector, spread: Vector, rows: Sequence[_Row]) -> Fit:
    """Bayesian linear regression with a normal prior, its mean kept above a floor.

    Solved in units of the prior's spread, so that all columns are of one size.
    """
    scaled = np.array([row.coefficients * spread / row.sd for row in rows])
    floor = _FLOOR * prior
    design = np.vstack([scaled, np.eye(len(prior))])
    wanted = np.append(
        [(row.value - row.coefficients @ floor) / row.sd for row in rows], (prior - floor) / spread
    )
    found, _ = nnls(design, wanted)
    covariance = np.linalg.inv(design.T @ design) * np.outer(spread, spread)
    return Fit(heights=floor + found * spread, covariance=covariance)
