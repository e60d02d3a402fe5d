"""Damages + a budget in bytes -> the best plan that fits. Loads no model; asks for measurements.

The knapsack assumes that damages add up. What it proposes is therefore measured whole, what the parts got
wrong is learned (sensitivity.py), and it is solved again; then for damages drawn from what is still not
known. The best *measured* plan ships, the unchanged base among them where it fits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from cerebellum.errors import AnswerIsNo
from cerebellum.gguf import parse_type
from cerebellum.measure.curves import BASE, FINE_LADDER, KLD, PPL, Point, Score, base_kinds, part_of
from cerebellum.measure.race import Changes, interval_json
from cerebellum.plan.damage import Sensitivities, Whole
from cerebellum.plan.knapsack import Choice, Option, solve
from cerebellum.plan.limit import Sizes
from cerebellum.stats.paired import Interval, as_percent, superpopulation_interval

_LEARNED, _DRAWN = 2, 2  # proposals after the first two: having learned, and of damages drawn


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A combination: one point of every group. Damages against the base, in nats of the objective.

    ``how`` says what proposed it.
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


class Damages(Protocol):
    """What every group costs at every type, given the candidates that were measured so far."""

    def points(
        self, measured: Sequence[Candidate], rng: np.random.Generator | None = None
    ) -> Sequence[Point]: ...


@dataclass(frozen=True)
class Known:
    """Points that no measurement changes: from a file, or recorded elsewhere."""

    found: Sequence[Point]

    def points(
        self, measured: Sequence[Candidate], rng: np.random.Generator | None = None
    ) -> Sequence[Point]:
        return self.found


@dataclass(frozen=True)
class Learning:
    """Sensitivities that learn from whole plans; ``base`` is the base's own damage above the anchor."""

    sensitivities: Sensitivities
    base: Whole

    def points(
        self, measured: Sequence[Candidate], rng: np.random.Generator | None = None
    ) -> Sequence[Point]:
        wholes = [self.base, *(self._whole(candidate) for candidate in measured)]
        return self.sensitivities.points(wholes, rng)

    def _whole(self, candidate: Candidate) -> Whole:
        kld, nll = (
            None if change is None or base is None else _sum(change, base)
            for change, base in ((candidate.kld, self.base.kld), (candidate.nll, self.base.nll))
        )
        return Whole(changes=candidate.changes, kld=kld, nll=nll)


def _sum(a: Interval, b: Interval) -> Interval:
    """Of independent means, whose squared half-widths add up."""
    mean, half = a.mean + b.mean, float(np.hypot(a.high - a.mean, b.high - b.mean))
    return replace(a, mean=mean, low=mean - half, high=mean + half)


class Allocation:
    """The knapsack over points; a collapsed type is never an option."""

    def __init__(
        self, points: Sequence[Point], sizes: Sizes, objective: str = KLD, how: str = "the sum of the parts"
    ) -> None:
        self.sizes, self.objective, self.how = sizes, objective, how
        by_part: dict[str, list[Point]] = {}
        for point in points:
            if point.damage(objective) is not None:
                by_part.setdefault(point.part.name, []).append(point)
        self.curves = list(by_part.values())
        self.fixed = sizes.fixed_bytes()

    def best(self, budget_bytes: int) -> Candidate | None:
        """The least predicted damage whose file is within the budget."""
        items = [[Option(n_bytes=p.n_bytes, damage=self._damage(p)) for p in curve] for curve in self.curves]
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
        """Bytes of the smallest file that the known types allow."""
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
    damages: Damages, sizes: Sizes, budget_bytes: int, objective: str = KLD, seed: int = 1
) -> Generator[Changes, Answer, BudgetPlan]:
    """Yields each combination it wants scored; is sent its ``Answer``.

    Raises AnswerIsNo, with the nearest reachable size, where nothing fits or all that fits collapsed.
    """
    measured: list[Candidate] = []
    for how, points in _proposals(damages, measured, seed):
        allocation = Allocation(points, sizes, objective, how)
        candidate = allocation.best(budget_bytes)
        if candidate is None and not measured:
            raise unreachable(budget_bytes, allocation.smallest())
        if candidate is None or any(candidate.changes == known.changes for known in measured):
            continue
        answer = yield candidate.changes
        if answer is None:
            return _plan(candidate, (candidate,), budget_bytes, objective)
        base = answer[1]
        measured.append(_measured(candidate, answer))
    measured += _base_itself(points, sizes, budget_bytes, measured, base)
    chosen = min(measured, key=lambda candidate: candidate.damage(objective))
    if not np.isfinite(chosen.damage(objective)):
        raise AnswerIsNo(
            f"every plan of {budget_bytes:,} bytes that was measured collapsed (no finite logits); "
            "give a larger budget"
        )
    return _plan(chosen, tuple(measured), budget_bytes, objective)


def _proposals(
    damages: Damages, measured: Sequence[Candidate], seed: int
) -> Iterator[tuple[str, Sequence[Point]]]:
    """What to put into the knapsack; ``measured`` grows meanwhile.

    K-quants alone are quicker to run, and a check on the IQ types.
    """
    points = damages.points(())
    yield "the sum of the parts", points
    yield "K-quants alone", [point for point in points if point.kind not in FINE_LADDER]
    for _ in range(_LEARNED):
        yield "having learned", damages.points(measured)
    rng = np.random.default_rng(seed)
    for _ in range(_DRAWN):
        yield "damages drawn", damages.points(measured, rng)


def unreachable(budget_bytes: int, smallest: int) -> AnswerIsNo:
    """The answer to a budget under the ``smallest`` file, in bytes."""
    return AnswerIsNo(
        f"a budget of {budget_bytes:,} bytes cannot be reached: the smallest file that these types allow "
        f"has {smallest:,} bytes; nothing was written"
    )


def _plan(chosen: Candidate, candidates: tuple[Candidate, ...], budget: int, objective: str) -> BudgetPlan:
    return BudgetPlan(budget_bytes=budget, objective=objective, chosen=chosen, candidates=candidates)


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
    unchanged = tuple(point for point in points if point.kind == BASE)
    base = Candidate(how="the base itself", points=unchanged, n_bytes=n_bytes, predicted=0.0)
    return [_measured(base, (score, score))]


def frontier(points: Sequence[Point], sizes: Sizes, steps: int = 24, objective: str = KLD) -> list[Candidate]:
    """The best predicted plan at ``steps`` sizes from the smallest file to the largest."""
    allocation = Allocation(points, sizes, objective)
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


def budget_json(plan: BudgetPlan, sizes: Sizes, base_kld: float | None = None) -> dict[str, Any]:
    """plan.json in budget mode: the contract's keys, and every candidate that was measured.

    ``base_kld`` is the base's own KL divergence from the source, to which changes are to be added.
    """
    chosen = plan.chosen
    measured = interval_json(chosen.nll)
    nll = _sum_of_parts(chosen, PPL)
    return {
        "mode": "budget",
        "budget_bytes": plan.budget_bytes,
        "base": sizes.base.label,
        "objective": plan.objective,
        "groups": [_row(point, sizes) for point in merged(chosen.points, sizes)],
        "predicted_delta_pct": None if nll is None else as_percent(nll),
        "measured_delta_pct": measured["delta_pct"],
        "ci_pct": measured["ci_pct"],
        "base_kld": base_kld,
        "predicted_kld": _sum_of_parts(chosen, KLD),
        "measured_kld": chosen.kld.mean if chosen.kld else None,
        "kld_ci": [chosen.kld.low, chosen.kld.high] if chosen.kld else None,
        "tradeoff": tradeoff(plan),
        "candidates": [_candidate_json(candidate, sizes) for candidate in plan.candidates],
        "file_bytes": chosen.n_bytes,
        "base_tensor_bytes": sizes.total({}),
        "tensor_bytes": sizes.total(chosen.changes),
        "bytes_saved": sizes.bytes_saved(chosen.changes),
        "tensor_types": sizes.tensor_types(chosen.changes),
    }


def merged(points: Sequence[Point], sizes: Sizes) -> list[Point]:
    """Neighbouring layers of a role that go from the same base types to the same type, as one point."""

    def key(point: Point) -> tuple[str, str, tuple[str, ...]]:
        role = sizes.groups[point.part.groups[0]].role
        return role, point.kind, tuple(sorted(base_kinds(point.part, sizes)))

    runs = (list(run) for _, run in groupby(points, key))
    return [_together(run, sizes) if len(run) > 1 else run[0] for run in runs]


def _together(run: Sequence[Point], sizes: Sizes) -> Point:
    names = [name for point in run for name in point.part.groups]
    return Point(
        part=part_of(names, sizes),
        kind=run[0].kind,
        n_bytes=sum(point.n_bytes for point in run),
        kld=_total([point.kld for point in run]),
        nll=_total([point.nll for point in run]),
    )


def _total(intervals: Sequence[Interval | None]) -> Interval | None:
    """Bounds add up too: layers of a role share much of their uncertainty."""
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return None
    low, mean, high = (sum(getattr(i, bound) for i in known) for bound in ("low", "mean", "high"))
    return replace(known[0], low=low, mean=mean, high=high)


def _sum_of_parts(candidate: Candidate, objective: str) -> float | None:
    """None where a part was never measured in this way."""
    damages = [point.damage(objective) for point in candidate.points]
    known = [damage.mean for damage in damages if damage is not None]
    return sum(known) if len(known) == len(damages) else None


def _candidate_json(candidate: Candidate, sizes: Sizes) -> dict[str, Any]:
    together = merged(candidate.points, sizes)
    return {
        "how": candidate.how,
        "changes": {point.part.name: point.kind for point in together if point.kind != BASE},
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
