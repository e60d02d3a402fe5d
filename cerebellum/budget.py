"""Response curves + a budget in bytes -> the best plan that fits. Loads no model; asks for measurements.

The knapsack assumes that damages add up. What it proposes is therefore measured whole; from how far
the sum of the parts was off it learns a factor for demotions and one for promotions, and solves again.
The best *measured* plan ships, the unchanged base among them where it fits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np

from cerebellum.allocate import Choice, Option, solve
from cerebellum.curves import BASE, K_LADDER, KLD, PPL, Point, Score, base_kinds, of_whole_roles
from cerebellum.errors import AnswerIsNo
from cerebellum.gguf import parse_type
from cerebellum.plan import Sizes
from cerebellum.stats.paired import Interval, as_percent, superpopulation_interval
from cerebellum.sweep import Changes, interval_json
from cerebellum.zoom import refined

_ROUNDS = 3  # proposals from the finest curves, each after learning from the one before
_PRIOR_SD = 0.5  # of a factor around 1, before anything was measured
_FACTORS = (0.2, 5.0)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """How much of the sum of the parts the whole does: of the demotions, and of the promotions."""

    demotions: float = 1.0
    promotions: float = 1.0

    def of(self, damage: float) -> float:
        return damage * (self.demotions if damage > 0 else self.promotions)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A combination: one point of every part. Damages against the base, in nats of the objective.

    ``how`` says which curves proposed it.
    """

    how: str
    points: tuple[Point, ...]
    n_bytes: int
    predicted: float
    score: Score | None = None
    kld: Interval | None = None
    nll: Interval | None = None

    @property
    def changes(self) -> Changes:
        """Group of the layout -> type, of all that leave the base."""
        return {name: kind for point in self.points for name, kind in point.part.at(point.kind).items()}

    def damage(self, objective: str) -> float:
        """Measured where it was measured; a collapsed one is never the best."""
        if self.score is None:
            return self.predicted
        interval = self.kld if objective == KLD else self.nll
        return np.inf if interval is None else interval.mean


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """``chosen`` of ``candidates``, the best measured within ``budget_bytes`` of file."""

    budget_bytes: int
    objective: str
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    factors: Factors


class Allocation:
    """The knapsack over points; a collapsed type is never an option."""

    def __init__(
        self, points: Sequence[Point], sizes: Sizes, objective: str = KLD, how: str = "all curves"
    ) -> None:
        self.sizes, self.objective, self.how = sizes, objective, how
        by_part: dict[str, list[Point]] = {}
        for point in points:
            if point.damage(objective) is not None:
                by_part.setdefault(point.part.name, []).append(point)
        self.curves = list(by_part.values())
        self.fixed = sizes.fixed_bytes()

    def best(self, budget_bytes: int, factors: Factors | None = None) -> Candidate | None:
        """The least predicted damage whose file is within the budget."""
        factors = factors or Factors()
        items = [
            [Option(n_bytes=p.n_bytes, damage=factors.of(self._damage(p))) for p in curve]
            for curve in self.curves
        ]
        choice = solve(items, budget_bytes - self.fixed)
        return None if choice is None else self.candidate(choice)

    def candidate(self, choice: Choice) -> Candidate:
        points = tuple(curve[index] for curve, index in zip(self.curves, choice, strict=True))
        return Candidate(
            how=self.how,
            points=points,
            n_bytes=self.fixed + sum(point.n_bytes for point in points),
            predicted=sum(self._damage(point) for point in points),
        )

    def smallest(self) -> int:
        """Bytes of the smallest file that the measured types allow."""
        return self.fixed + sum(min(p.n_bytes for p in curve) for curve in self.curves)

    def largest(self) -> int:
        return self.fixed + sum(max(p.n_bytes for p in curve) for curve in self.curves)

    def _damage(self, point: Point) -> float:
        damage = point.damage(self.objective)
        assert damage is not None
        return damage.mean


Answer = tuple[Score, Score] | None
"""A combination's score and the base's on the same chunks, or None where nothing can be measured."""


def budget_plan(
    points: Sequence[Point], sizes: Sizes, budget_bytes: int, objective: str = KLD
) -> Generator[Changes, Answer, BudgetPlan]:
    """Yields each combination it wants scored; is sent its ``Answer``.

    Raises AnswerIsNo, with the nearest reachable size, where nothing fits or all that fits collapsed.
    """
    measured: list[Candidate] = []
    factors = Factors()
    for allocation in _allocations(points, sizes, objective):
        candidate = allocation.best(budget_bytes, factors)
        if candidate is None and not measured:
            raise _unreachable(budget_bytes, allocation)
        if candidate is None or any(candidate.changes == known.changes for known in measured):
            continue
        answer = yield candidate.changes
        if answer is None:
            return _plan(candidate, (candidate,), budget_bytes, objective, factors)
        _, base = answer
        measured.append(_measured(candidate, answer))
        factors = learned(measured, objective)
    measured += _base_itself(points, sizes, budget_bytes, measured, base)
    chosen = min(measured, key=lambda candidate: candidate.damage(objective))
    if not np.isfinite(chosen.damage(objective)):
        raise AnswerIsNo(
            f"every plan of {budget_bytes:,} bytes that was measured collapsed (no finite logits); "
            "give a larger budget"
        )
    return _plan(chosen, tuple(measured), budget_bytes, objective, factors)


def _unreachable(budget_bytes: int, allocation: Allocation) -> AnswerIsNo:
    return AnswerIsNo(
        f"a budget of {budget_bytes:,} bytes cannot be reached: the smallest file that the measured "
        f"types allow has {allocation.smallest():,} bytes"
    )


def _plan(
    chosen: Candidate, candidates: tuple[Candidate, ...], budget: int, objective: str, factors: Factors
) -> BudgetPlan:
    return BudgetPlan(
        budget_bytes=budget, objective=objective, chosen=chosen, candidates=candidates, factors=factors
    )


def _allocations(points: Sequence[Point], sizes: Sizes, objective: str) -> Iterator[Allocation]:
    """The finest curves; whole roles; whole roles without IQ types; the finest again, having learned."""
    parts = refined(points, sizes)
    whole = of_whole_roles(points, sizes)
    plain = [point for point in whole if point.kind in (BASE, *K_LADDER)]
    yield Allocation(parts, sizes, objective)
    yield Allocation(whole, sizes, objective, "whole roles")
    yield Allocation(plain, sizes, objective, "whole roles, K-quants alone")
    yield from repeat(Allocation(parts, sizes, objective, "all curves, having learned"), _ROUNDS - 1)


def _measured(candidate: Candidate, answer: tuple[Score, Score]) -> Candidate:
    score, base = answer
    kld, nll = score.change(base)
    return replace(candidate, score=score, kld=kld, nll=nll)


def _base_itself(
    points: Sequence[Point], sizes: Sizes, budget: int, measured: Sequence[Candidate], score: Score
) -> list[Candidate]:
    """The base as a candidate, where it fits and is not there: nothing changed, nothing lost."""
    n_bytes = sizes.whole_file_bytes()
    if n_bytes > budget or any(not candidate.changes for candidate in measured):
        return []
    unchanged = tuple(point for point in of_whole_roles(points, sizes) if point.kind == BASE)
    base = Candidate(how="the base itself", points=unchanged, n_bytes=n_bytes, predicted=0.0)
    return [_measured(base, (score, score))]


def learned(measured: Sequence[Candidate], objective: str) -> Factors:
    """The factors that explain what was measured: least squares, drawn towards 1 by the prior."""
    rows, seen = [[1 / _PRIOR_SD, 0.0], [0.0, 1 / _PRIOR_SD]], [1 / _PRIOR_SD, 1 / _PRIOR_SD]
    for candidate in measured:
        whole = candidate.kld if objective == KLD else candidate.nll
        if whole is None:
            continue
        parts = [d.mean for p in candidate.points if (d := p.damage(objective)) is not None]
        error = max((whole.high - whole.low) / 4, 1e-9)
        rows.append([sum(d for d in parts if d > 0) / error, sum(d for d in parts if d < 0) / error])
        seen.append(whole.mean / error)
    demotions, promotions = np.clip(np.linalg.lstsq(np.array(rows), np.array(seen))[0], *_FACTORS)
    return Factors(demotions=float(demotions), promotions=float(promotions))


def frontier(points: Sequence[Point], sizes: Sizes, steps: int = 24, objective: str = KLD) -> list[Candidate]:
    """The best predicted plan at ``steps`` sizes from the smallest file to the largest."""
    allocation = Allocation(refined(points, sizes), sizes, objective)
    sizes_wanted = np.linspace(allocation.smallest(), allocation.largest(), steps)
    found = [allocation.best(int(size)) for size in sizes_wanted]
    return [candidate for candidate in found if candidate is not None]


def tradeoff(plan: BudgetPlan) -> str | None:
    """What the chosen plan costs in the measure it was not chosen by, if that is sure; None if nothing."""
    chosen = plan.chosen
    if chosen.kld is None or chosen.nll is None:
        return None
    if chosen.kld.mean < 0 < chosen.nll.low:
        return "closer to the source than the base (KL divergence), but with a higher perplexity on the text"
    if chosen.nll.mean < 0 < chosen.kld.low:
        return "a lower perplexity on the text than the base, but farther from the source (KL divergence)"
    return _rival(plan)


def _rival(plan: BudgetPlan) -> str | None:
    """Another candidate that is surely better by the other measure."""
    other = PPL if plan.objective == KLD else KLD
    rivals = [c for c in plan.candidates if c.changes and c.kld and c.nll and c is not plan.chosen]
    for rival in sorted(rivals, key=lambda candidate: candidate.damage(other)):
        ours, theirs = plan.chosen.score, rival.score
        if ours is None or theirs is None:
            continue
        vectors = (theirs.nll - ours.nll) if other == PPL else (theirs.kld - ours.kld)
        gain = superpopulation_interval(vectors)
        if gain.high < 0:
            name = "perplexity" if other == PPL else "KL divergence"
            told = f"{as_percent(gain.mean):+.2f}%" if other == PPL else f"{gain.mean:+.5f} nats"
            return f"another measured plan of {rival.n_bytes:,} bytes has a lower {name} ({told})"
    return None


def budget_json(plan: BudgetPlan, sizes: Sizes) -> dict[str, Any]:
    """plan.json in budget mode: the contract's keys, and every candidate that was measured."""
    chosen = plan.chosen
    measured = interval_json(chosen.nll)
    nll = _sum_of_parts(chosen, PPL)
    return {
        "mode": "budget",
        "budget_bytes": plan.budget_bytes,
        "base": sizes.base.label,
        "objective": plan.objective,
        "groups": [_row(point, sizes) for point in chosen.points],
        "predicted_delta_pct": None if nll is None else as_percent(nll),
        "measured_delta_pct": measured["delta_pct"],
        "ci_pct": measured["ci_pct"],
        "predicted_kld": _sum_of_parts(chosen, KLD),
        "measured_kld": chosen.kld.mean if chosen.kld else None,
        "kld_ci": [chosen.kld.low, chosen.kld.high] if chosen.kld else None,
        "tradeoff": tradeoff(plan),
        "joint_factors": {"demotions": plan.factors.demotions, "promotions": plan.factors.promotions},
        "candidates": [_candidate_json(candidate) for candidate in plan.candidates],
        "file_bytes": chosen.n_bytes,
        "base_tensor_bytes": sizes.total({}),
        "tensor_bytes": sizes.total(chosen.changes),
        "bytes_saved": sizes.bytes_saved(chosen.changes),
        "tensor_types": sizes.tensor_types(chosen.changes),
    }


def _sum_of_parts(candidate: Candidate, objective: str) -> float | None:
    """None where a part was never measured in this way."""
    damages = [point.damage(objective) for point in candidate.points]
    known = [damage.mean for damage in damages if damage is not None]
    return sum(known) if len(known) == len(damages) else None


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "how": candidate.how,
        "changes": {p.part.name: p.kind for p in candidate.points if p.kind != BASE},
        "variant": dict(candidate.changes),
        "file_bytes": candidate.n_bytes,
        "predicted_kld": _sum_of_parts(candidate, KLD),
        "measured_kld": candidate.kld.mean if candidate.kld else None,
        "kld_ci": [candidate.kld.low, candidate.kld.high] if candidate.kld else None,
        **interval_json(candidate.nll),
    }


def _row(point: Point, sizes: Sizes) -> dict[str, Any]:
    kind, part = point.kind, point.part
    alone = interval_json(point.nll)
    saved = sizes.bytes_saved(part.at(kind))
    verdict = "kept" if kind == BASE else ("demoted" if saved > 0 else "promoted")
    return {
        "name": part.name,
        "role": sizes.groups[part.groups[0]].role,
        "layers": sorted(layer for name in part.groups for layer in sizes.groups[name].layers),
        "members": list(part.groups),
        "tensors": sum(len(sizes.groups[name].tensors) for name in part.groups),
        "base_type": "+".join(sorted(base_kinds(part, sizes))),
        "chosen_type": kind if kind == BASE else parse_type(kind).name,
        "bytes_saved": saved,
        "delta_pct": alone["delta_pct"],
        "ci_pct": alone["ci_pct"],
        "kld_change": point.kld.mean if point.kld else None,
        "chunks": point.kld.n if point.kld else None,
        "verdict": verdict,
        "decision": verdict,
        "measured_with": [],
    }
