"""Response curves + a budget in bytes -> the best plan that fits. Loads no model; asks for measurements.

The knapsack assumes that damages add up. What it proposes is therefore measured whole, and so are the
runners-up whose predicted damage is within reach; the best *measured* plan ships.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cerebellum.allocate import Choice, Option, solve
from cerebellum.allocate.knapsack import total_bytes, total_damage
from cerebellum.curves import BASE, Point, Score
from cerebellum.errors import AnswerIsNo
from cerebellum.gguf import parse_type
from cerebellum.plan import Sizes
from cerebellum.stats.paired import Interval, as_percent, superpopulation_interval
from cerebellum.sweep import Changes, interval_json

_CANDIDATES = 4


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A combination: predicted damage (nats of KL divergence from the source, against the base)."""

    changes: Changes
    n_bytes: int
    predicted: float
    kld: Interval | None = None
    nll: Interval | None = None

    @property
    def damage(self) -> float:
        """Measured where it was measured; a collapsed one is never the best."""
        return self.kld.mean if self.kld is not None else self.predicted


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """``chosen`` of ``candidates``, the best measured within ``budget_bytes`` of file."""

    budget_bytes: int
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    points: tuple[Point, ...]


class Allocation:
    """The knapsack over measured points; a collapsed type is never an option."""

    def __init__(self, points: Sequence[Point], sizes: Sizes) -> None:
        self.sizes, self.groups = sizes, list(sizes.groups)
        usable = [point for point in points if point.kld is not None]
        self.points = [[p for p in usable if p.group == name] for name in self.groups]
        self.items = [
            [Option(n_bytes=p.n_bytes, damage=p.kld.mean if p.kld else 0.0) for p in options]
            for options in self.points
        ]

    def best(self, budget_bytes: int, excluded: Sequence[Choice] = ()) -> tuple[Choice, Candidate] | None:
        """The least predicted damage whose file is within the budget, other than those excluded."""
        choice = solve(self.items, budget_bytes - self.sizes.fixed_bytes(), excluded)
        return None if choice is None else (choice, self.candidate(choice))

    def candidate(self, choice: Choice) -> Candidate:
        chosen = [points[index] for points, index in zip(self.points, choice, strict=True)]
        return Candidate(
            changes={point.group: point.kind for point in chosen if point.kind != BASE},
            n_bytes=self.sizes.fixed_bytes() + total_bytes(self.items, choice),
            predicted=total_damage(self.items, choice),
        )

    def smallest(self) -> int:
        """Bytes of the smallest file that the measured types allow."""
        return self.sizes.fixed_bytes() + sum(min(o.n_bytes for o in item) for item in self.items)

    def largest(self) -> int:
        return self.sizes.fixed_bytes() + sum(max(o.n_bytes for o in item) for item in self.items)


def budget_plan(
    points: Sequence[Point], sizes: Sizes, budget_bytes: int
) -> Generator[Changes, tuple[Score, Score] | None, BudgetPlan]:
    """Yields each combination it wants scored; is sent (its score, the base's), or None if unmeasured.

    Raises AnswerIsNo, with the nearest reachable size, where nothing fits.
    """
    allocation = Allocation(points, sizes)
    measured: list[Candidate] = []
    excluded: list[Choice] = []
    reach = 0.0
    while len(measured) < _CANDIDATES:
        found = allocation.best(budget_bytes, excluded)
        if found is None:
            break
        choice, candidate = found
        if measured and candidate.predicted - measured[0].predicted > reach:
            break
        excluded.append(choice)
        answer = yield candidate.changes
        measured.append(_measured(candidate, answer))
        reach = max(reach, _misprediction(measured[-1]))
        if answer is None:
            break
    if not measured:
        raise AnswerIsNo(
            f"a budget of {budget_bytes:,} bytes cannot be reached: the smallest file that the measured "
            f"types allow has {allocation.smallest():,} bytes"
        )
    chosen = min(measured, key=lambda candidate: candidate.damage)
    return BudgetPlan(
        budget_bytes=budget_bytes, chosen=chosen, candidates=tuple(measured), points=tuple(points)
    )


def _measured(candidate: Candidate, answer: tuple[Score, Score] | None) -> Candidate:
    if answer is None:
        return candidate
    score, base = answer
    if not score.finite:
        infinite = Interval(mean=np.inf, low=np.inf, high=np.inf, n=len(base.kld), population=len(base.kld))
        return replace(candidate, kld=infinite, nll=None)
    kld = superpopulation_interval(score.kld - base.kld)
    nll = superpopulation_interval(score.nll - base.nll)
    return replace(candidate, kld=kld, nll=nll)


def _misprediction(candidate: Candidate) -> float:
    """How far the sum of the parts was off, nats: others that near may be better in truth."""
    return abs(candidate.damage - candidate.predicted) if np.isfinite(candidate.damage) else np.inf


def frontier(points: Sequence[Point], sizes: Sizes, steps: int = 24) -> list[Candidate]:
    """The best predicted plan at ``steps`` sizes from the smallest file to the largest."""
    allocation = Allocation(points, sizes)
    sizes_wanted = np.linspace(allocation.smallest(), allocation.largest(), steps)
    found = [allocation.best(int(size)) for size in sizes_wanted]
    return [pair[1] for pair in found if pair is not None]


def budget_json(plan: BudgetPlan, sizes: Sizes) -> dict[str, Any]:
    """plan.json in budget mode: the contract's keys, and every candidate that was measured."""
    chosen = plan.chosen
    measured = interval_json(chosen.nll) if chosen.nll else {"delta_pct": None, "ci_pct": None}
    return {
        "mode": "budget",
        "budget_bytes": plan.budget_bytes,
        "base": sizes.base.label,
        "objective": "kld",
        "groups": [_group_row(name, plan, sizes) for name in sizes.groups],
        "predicted_delta_pct": as_percent(_predicted_nll(plan)),
        "measured_delta_pct": measured["delta_pct"],
        "ci_pct": measured["ci_pct"],
        "predicted_kld": chosen.predicted,
        "measured_kld": chosen.kld.mean if chosen.kld else None,
        "kld_ci": [chosen.kld.low, chosen.kld.high] if chosen.kld else None,
        "candidates": [_candidate_json(candidate) for candidate in plan.candidates],
        "file_bytes": chosen.n_bytes,
        "base_tensor_bytes": sizes.total({}),
        "tensor_bytes": sizes.total(chosen.changes),
        "bytes_saved": sizes.bytes_saved(chosen.changes),
        "tensor_types": sizes.tensor_types(chosen.changes),
    }


def _predicted_nll(plan: BudgetPlan) -> float:
    chosen = plan.chosen.changes
    return sum(p.nll.mean for p in plan.points if p.nll is not None and chosen.get(p.group, BASE) == p.kind)


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "changes": dict(candidate.changes),
        "file_bytes": candidate.n_bytes,
        "predicted_kld": candidate.predicted,
        "measured_kld": candidate.kld.mean if candidate.kld and np.isfinite(candidate.kld.mean) else None,
        "delta_pct": candidate.nll.percent()[0] if candidate.nll else None,
    }


def _group_row(name: str, plan: BudgetPlan, sizes: Sizes) -> dict[str, Any]:
    kind = plan.chosen.changes.get(name, BASE)
    point = next(p for p in plan.points if (p.group, p.kind) == (name, kind))
    alone = interval_json(point.nll) if point.nll else {"delta_pct": None, "ci_pct": None}
    saved = 0 if kind == BASE else sizes.bytes_saved({name: kind})
    verdict = "kept" if kind == BASE else ("demoted" if saved > 0 else "promoted")
    return {
        "name": name,
        "tensors": len(sizes.groups[name].tensors),
        "base_type": "+".join(sorted({t.name for t in sizes.base_types(name).values()})),
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
