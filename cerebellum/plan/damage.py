"""The damage model: what every group costs at every type, from measured responses and rounding errors.

The damage of a group at a type is its sensitivity times the type's rounding error there (measure/rounding.py);
damages of groups add up. That is one linear model for everything measured, from half a role at one type to
a whole plan: sensitivities are its non-negative least squares, drawn towards those of their role. It leaves
out a few percent that belong to a role and type together; where those were measured, they count.

What whole plans did beyond the sum of their parts is learned as a share of each role's and each type's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from cerebellum.layout import Layout
from cerebellum.measure.artifacts import Curves, Effect, Response, RoundingErrors
from cerebellum.measure.method import Method
from cerebellum.plan.artifacts import PointRow
from cerebellum.settings import KLD, OBJECTIVES, PPL, Objective
from cerebellum.stats.estimate import Estimate
from cerebellum.verdicts import Changes

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


class WholePlan(Effect, frozen=True, kw_only=True):
    """A whole plan that was measured: its changes from the base, and its damage above the anchor's."""

    changes: Changes


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The model in one measure: ``sensitivities`` (groups,), nats per unit of rounding error, and ``covariance``.

    ``measured_over_modelled`` says of a role at a type how many times the linear model's damage was measured
    alone; ``learned`` says of a role or a type by what share it did more in whole plans.
    """

    sensitivities: Vector
    covariance: Matrix
    measured_over_modelled: Mapping[tuple[str, str], float] = field(default_factory=dict)
    learned: Mapping[str, float] = field(default_factory=dict)

    def drawn(self, rng: np.random.Generator, floor: float) -> Fitted:
        """Returns another fit that the measurements allow, drawn in units of each sensitivity's own spread."""
        sd = np.sqrt(np.diag(self.covariance))
        correlation = self.covariance / np.outer(sd, sd)
        draw = sd * rng.multivariate_normal(np.zeros(len(sd)), correlation, method="eigh")
        lowest = floor * self.sensitivities
        return replace(self, sensitivities=np.maximum(self.sensitivities + draw, lowest))


@dataclass(frozen=True, kw_only=True)
class DamageModel:
    """Foretells the change of every group at every type; groups that were never measured stay at their base.

    ``fitted`` has the fit by objective, and is empty where nothing survived its measurement. Learning and
    drawing give another model and leave this one as it was.
    """

    observed: Observed
    base: WholePlan
    fitted: Mapping[Objective, Fitted]

    def learning(self, plans: Sequence[WholePlan]) -> DamageModel:
        """Returns the model that has learned from the base as a whole and from these plans, and nothing else."""
        wholes = [self.base, *plans]
        return replace(
            self,
            fitted={
                objective: replace(fit, learned=_lessons(self.observed, fit, wholes, objective))
                for objective, fit in self.fitted.items()
            },
        )

    def drawn(self, rng: np.random.Generator) -> DamageModel:
        """Returns a model drawn from what the measurements allow, so that other plans come out best."""
        floor = self.observed.method.floor
        return replace(
            self, fitted={objective: fit.drawn(rng, floor) for objective, fit in self.fitted.items()}
        )

    def above(self, name: str, qtype: str | None, objective: Objective) -> float:
        """Returns the damage of a group at a type (None: at the base) above the anchor's, 0 where none was measured."""
        if objective not in self.fitted or name not in self.observed.groups:
            return 0.0
        fit = self.fitted[objective]
        number = self.observed.groups.index(name)
        return float(fit.sensitivities[number] * self.observed.error(name, qtype, fit))

    def points(self) -> tuple[PointRow, ...]:
        """Returns every group at its base and at every type it may take, as changes against the base."""
        measured = set(self.observed.groups) if self.fitted else set()
        return tuple(
            point
            for name in self.observed.layout.groups
            for point in (self._curve(name) if name in measured else [base_point(name, self.observed.layout)])
        )

    def _curve(self, name: str) -> Iterator[PointRow]:
        layout = self.observed.layout
        in_base = layout.base_types([name])
        chunks = self.observed.chunks_of(name)
        allowed = [qtype for qtype in self.observed.errors.of[name] if self.observed.survives(name, qtype)]
        for qtype in (None, *allowed):
            if in_base != (qtype,):
                yield PointRow(
                    group=name,
                    type=qtype,
                    bytes=layout.group_bytes(name, qtype),
                    kld=self._change(name, qtype, KLD, chunks),
                    nll=self._change(name, qtype, PPL, chunks),
                )

    def _change(self, name: str, qtype: str | None, objective: Objective, chunks: int) -> Estimate:
        """Returns the change against the base; the linear model's own error is a share of it."""
        fit = self.fitted[objective]
        number = self.observed.groups.index(name)
        error = self.observed.error(name, qtype, fit) - self.observed.error(name, None, fit)
        mean = float(fit.sensitivities[number] * error)
        of_sensitivity = error * np.sqrt(fit.covariance[number, number])
        se = float(np.hypot(of_sensitivity, self.observed.method.model_sd * mean))
        return Estimate(mean=mean, se=se, n=chunks)


def base_point(name: str, layout: Layout) -> PointRow:
    """Returns a group at its base types, where by definition it changes nothing."""
    zero = Estimate.exact(0.0)
    return PointRow(group=name, type=None, bytes=layout.group_bytes(name), kld=zero, nll=zero)


def fit_damage(curves: Curves, layout: Layout, responses: Sequence[Response] = ()) -> DamageModel:
    """Fits sensitivities to the curves and to further ``responses``, and learns from the base as a whole.

    A group's prior is its role's sensitivity. The prior of a sensitivity of the NLL is that of the divergence:
    of a calibrated model the divergence is the expected change of the NLL, which is too noisy to tell types
    apart.
    """
    observed = Observed.of(curves, layout, (*curves.responses, *responses))
    above = curves.base_above_anchor
    base = WholePlan(changes={}, kld=above.kld, nll=above.nll)
    if not observed.groups:
        return DamageModel(observed=observed, base=base, fitted={})
    method = curves.method
    by_role = {role: _role_sensitivity(observed, role) for role in observed.roles}
    prior = np.array([by_role[layout.groups[name].role] for name in observed.groups])
    rows = {
        objective: [observed.row(response, objective) for response in observed.known]
        for objective in OBJECTIVES
    }
    of_divergence = _least_squares(prior, method.layers_sd * prior, rows[KLD], method.floor)
    found = of_divergence.sensitivities
    of_nll = _least_squares(found, method.objectives_sd * found, rows[PPL], method.floor)
    ratios = _measured_over_modelled(observed, found)
    fitted = {KLD: replace(of_divergence, measured_over_modelled=ratios), PPL: of_nll}
    return DamageModel(observed=observed, base=base, fitted=fitted).learning(())


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What was measured, as rows of one linear model whose unknowns are the sensitivities of ``groups``.

    ``roles`` maps every role that was measured as a whole to its groups; ``blur`` is an error of every damage
    above the anchor, nats a token, for damages mix with the anchor's own a little.
    """

    layout: Layout
    errors: RoundingErrors
    method: Method
    blur: float
    responses: tuple[Response, ...]
    collapsed: tuple[Response, ...]
    roles: Mapping[str, tuple[str, ...]]
    groups: tuple[str, ...]

    @classmethod
    def of(cls, curves: Curves, layout: Layout, responses: Sequence[Response]) -> Observed:
        """Sorts responses into those with a damage and those that collapsed, and finds what they tell of."""
        errors = curves.rounding
        survived = tuple(response for response in responses if response.kld is not None)
        heard = {response.groups for response in survived if errors.summed(response.groups, response.type)}
        roles = {part.name: part.groups for part in layout.roles() if part.groups in heard}
        return cls(
            layout=layout,
            errors=errors,
            method=curves.method,
            blur=curves.method.cross_share * curves.anchor_kld,
            responses=survived,
            collapsed=tuple(response for response in responses if response.kld is None),
            roles=roles,
            groups=tuple(name for name in errors.of if layout.groups[name].role in roles),
        )

    @property
    def known(self) -> list[Response]:
        """The responses of groups that have a sensitivity."""
        return [response for response in self.responses if set(response.groups) <= set(self.groups)]

    def row(self, response: Response, objective: Objective) -> _Row:
        """Returns a response as a row: the rounding error of each of its groups, and its damage."""
        damage = response.damage(objective)
        assert damage is not None
        coefficients = np.zeros(len(self.groups))
        for name in response.groups:
            coefficients[self.groups.index(name)] = self.errors.above(name, response.type)
        return _Row.of(coefficients, damage, self.method.model_sd, self.blur)

    def survives(self, name: str, qtype: str) -> bool:
        """Says whether no part of the group collapsed at this type, or at one that rounds less."""
        own = self.errors.of[name]
        broken = (response.type for response in self.collapsed if name in response.groups)
        return all(own[qtype] < own[other] for other in broken)

    def chunks_of(self, name: str) -> int:
        """Returns the most chunks that a part with this group was measured on."""
        counts = (r.kld.n for r in self.responses if r.kld and name in r.groups)
        return max(counts, default=0)

    def types(self, name: str, qtype: str | None) -> tuple[str, ...]:
        """Returns the types of a group's tensors: one, or those that they have in the base."""
        return self.layout.base_types([name]) if qtype is None else (qtype,)

    def error(self, name: str, qtype: str | None, fit: Fitted) -> float:
        """Returns the rounding error of a group above the anchor, times how much more was measured than modelled."""
        role = self.layout.groups[name].role
        of_role = fit.learned.get(role, 0.0)
        factors = [
            fit.measured_over_modelled.get((role, each), 1.0)
            * max(1 + of_role + fit.learned.get(each, 0.0), self.method.floor)
            for each in self.types(name, qtype)
        ]
        return self.errors.above(name, qtype) * sum(factors) / len(factors)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One observation: ``coefficients`` @ the unknowns = ``value`` give or take ``sd``.

    ``noise`` is the part of ``sd`` that is the measurement's and not the model's.
    """

    coefficients: Vector
    value: float
    sd: float
    noise: float

    @classmethod
    def of(cls, coefficients: Vector, damage: Estimate, model_sd: float, blur: float) -> _Row:
        noise = float(np.hypot(damage.se, blur))
        sd = max(float(np.hypot(noise, model_sd * damage.mean)), 1e-12)
        return cls(coefficients=coefficients, value=damage.mean, sd=sd, noise=noise)


def _role_sensitivity(observed: Observed, role: str) -> float:
    """Returns a role's sensitivity: weighted least squares through the origin over the types of the whole role."""
    names = observed.roles[role]
    method = observed.method
    rows = [observed.row(response, KLD) for response in observed.responses if response.groups == names]
    error = np.array([row.coefficients.sum() for row in rows])
    damage = np.array([row.value for row in rows])
    weight = np.array([row.sd for row in rows]) ** -2
    found = float((error * damage * weight).sum() / (error**2 * weight).sum())
    largest = float(np.abs(damage).max())
    least = method.floor * max(largest, observed.blur, method.least_damage)
    return max(found, least / float(np.abs(error).max()))


def _measured_over_modelled(observed: Observed, sensitivities: Vector) -> dict[tuple[str, str], float]:
    """Returns measured over modelled damage of each role at each type, drawn towards 1 as far as noise allows.

    It is that of the largest part that was measured at the type: the whole role, as a rule.
    """
    method = observed.method
    largest: dict[tuple[str, str], Response] = {}
    for response in sorted(observed.known, key=lambda response: len(response.groups)):
        if observed.errors.summed(response.groups, response.type):
            role = observed.layout.groups[response.groups[0]].role
            largest[role, response.type] = response
    found = {}
    for key, response in largest.items():
        row = observed.row(response, KLD)
        modelled = float(row.coefficients @ sensitivities)
        error = max(row.noise / abs(modelled), 1e-6)
        weights = np.array([method.model_sd, error]) ** -2
        ratio = float(weights @ np.array([1.0, row.value / modelled]) / weights.sum())
        found[key] = max(ratio, method.floor)
    return found


def _lessons(
    observed: Observed, fit: Fitted, plans: Sequence[WholePlan], objective: Objective
) -> dict[str, float]:
    """Shares out what whole plans did beyond the sum of their parts among types and roles.

    It is ridge regression: each may have done some ``lesson_sd`` more or less than alone.
    """
    method = observed.method
    alone = replace(fit, learned={})
    in_base = sorted({qtype for name in observed.groups for qtype in observed.types(name, None)})
    names = [*observed.roles, *dict.fromkeys((*observed.errors.all_types, *in_base))]
    rows: list[Vector] = []
    seen: list[float] = []
    for plan in plans:
        damage = plan.damage(objective)
        if damage is None:
            continue
        shares = _shares(observed, alone, plan.changes)
        total = sum(shares.get(role, 0.0) for role in observed.roles)
        coefficients = np.array([shares.get(name, 0.0) for name in names])
        row = _Row.of(coefficients, damage, method.plan_sd, observed.blur)
        rows.append(row.coefficients * method.lesson_sd / row.sd)
        seen.append((row.value - total) / row.sd)
    if not rows:
        return {}
    design = np.vstack([rows, np.eye(len(names))])
    wanted = np.append(seen, np.zeros(len(names)))
    found = np.linalg.lstsq(design, wanted)[0] * method.lesson_sd
    return dict(zip(names, found.tolist(), strict=True))


def _shares(observed: Observed, fit: Fitted, changes: Changes) -> dict[str, float]:
    """Returns the damage of a plan as the parts alone foretell it, by role, and once more by type."""
    shares: dict[str, float] = {}
    for name, sensitivity in zip(observed.groups, fit.sensitivities, strict=True):
        qtypes = observed.types(name, changes.get(name))
        damage = float(sensitivity * observed.error(name, changes.get(name), fit))
        role = observed.layout.groups[name].role
        shares[role] = shares.get(role, 0.0) + damage
        for qtype in qtypes:
            shares[qtype] = shares.get(qtype, 0.0) + damage / len(qtypes)
    return shares


def _least_squares(prior: Vector, spread: Vector, rows: Sequence[_Row], floor: float) -> Fitted:
    """Solves Bayesian linear regression with a normal prior, its mean kept above ``floor`` of the prior.

    It is solved in units of the prior's spread, so that all columns are of one size.
    """
    scaled = np.array([row.coefficients * spread / row.sd for row in rows])
    lowest = floor * prior
    design = np.vstack([scaled, np.eye(len(prior))])
    misfit = [(row.value - row.coefficients @ lowest) / row.sd for row in rows]
    found, _ = nnls(design, np.append(misfit, (prior - lowest) / spread))
    covariance = np.linalg.inv(design.T @ design) * np.outer(spread, spread)
    return Fitted(sensitivities=lowest + found * spread, covariance=covariance)
