"""Evidence -> charts. A chart that the run has no data for is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from cerebellum.card.evidence import BASE, Change, CurvePoint, Evidence, GroupRow, together
from cerebellum.card.findings import percent, rated, unit_of, yardstick
from cerebellum.page import (
    Cell,
    Curve,
    Estimate,
    Panel,
    Picture,
    Point,
    Rate,
    Step,
    curves_chart,
    estimates_chart,
    frontier_chart,
    heat_map,
    paths_chart,
    picture,
    rates_chart,
    sizes_chart,
)
from cerebellum.plan.knapsack import Option, solve, total_bytes, total_damage

_SIZES = 25
_BY_LIMIT = ("tolerant", "sensitive", "undecided")
AGAINST_BASE = "change of perplexity against the base"


def drawings(evidence: Evidence) -> dict[str, Picture]:
    """Every chart there is data for, by name."""
    draw: tuple[Callable[[Evidence], Picture | None], ...] = (
        _sensitivity,
        _rates,
        _layers,
        _curves,
        _frontier,
        _sizes,
        _paths,
        _predicted,
    )
    return {found.name: found for one in draw if (found := one(evidence)) is not None}


def _measured(evidence: Evidence) -> list[GroupRow]:
    return [row for row in evidence.rows if row.change is not None and not row.together_with]


def _sensitivity(evidence: Evidence) -> Picture | None:
    rows = sorted(_measured(evidence), key=lambda row: row.change.mean if row.change else 0)
    if not rows:
        return None
    estimates = [_estimate(row) for row in rows]
    return picture(
        "sensitivity",
        "Change of perplexity for each group alone, with its interval",
        lambda width: estimates_chart(width, estimates, evidence.limit, AGAINST_BASE),
    )


def _estimate(row: GroupRow) -> Estimate:
    assert row.change is not None
    return Estimate(
        name=row.name if row.verdict in _BY_LIMIT else f"{row.name} {row.tried_type}",
        mean=row.change.mean,
        low=row.change.low,
        high=row.change.high,
        verdict=row.verdict,
        text=percent(row.change.mean),
    )


def _rates(evidence: Evidence) -> Picture | None:
    ranked, (_, unit), scale = rated(evidence), unit_of(evidence), yardstick(evidence)
    if len(ranked) < 2 or evidence.curves:
        return None
    rates = [
        Rate(
            name=row.name,
            value=per.mean,
            low=per.low,
            high=per.high,
            changed=row.changed,
            text=scale.told(per.mean),
        )
        for row, per in ranked
    ]
    title, label = f"Damage for each {unit} saved", f"{scale.noun} for each {unit} saved"
    in_percent = scale.told is percent
    return picture("rates", title, lambda width: rates_chart(width, rates, label, in_percent))


def _layers(evidence: Evidence) -> Picture | None:
    """Only where a role was measured in more than one span of layers."""
    unit, name = unit_of(evidence)
    if evidence.curves:
        cells = list(_cells(evidence.curves, unit))
    else:
        rows = [row for row in _measured(evidence) if row.layers and row.change]
        cells = [Cell(role=r.role, layers=r.layers, delta=r.change.mean) for r in rows if r.change]
    spans = Counter(cell.role for cell in cells)
    zoomed = [cell for cell in cells if spans[cell.role] > 1]
    if not zoomed:
        return None
    if evidence.curves:
        title = f"Damage by role and layer at the smallest type, for each {name} saved"
        return picture("layers", title, lambda width: heat_map(width, zoomed, "{:+.4f} nats".format))
    return picture("layers", "Damage by role and layer", lambda width: heat_map(width, zoomed, percent))


def _cells(points: Sequence[CurvePoint], unit: float) -> Iterator[Cell]:
    """Of every group the KL divergence of its smallest type, for each unit of bytes that it saves."""
    for name in dict.fromkeys(point.group for point in points):
        own = [point for point in points if point.group == name and point.kld]
        base = next((point.n_bytes for point in own if point.kind == BASE), 0)
        least = min(own, key=lambda point: point.n_bytes, default=None)
        if least and least.kld and least.layers and least.n_bytes < base:
            saved = (base - least.n_bytes) / unit
            yield Cell(role=least.role, layers=least.layers, delta=least.kld.mean / saved)


def _curves(evidence: Evidence) -> Picture | None:
    """By budget: each role at every type that it could take."""
    unit, name = unit_of(evidence)
    roles = dict.fromkeys(point.role for point in evidence.curves)
    curves = [curve for role in roles if len((curve := _curve(role, evidence, unit)).steps) > 1]
    if not curves:
        return None
    title = "KL divergence of each role at each type, against its size"
    return picture("curves", title, lambda width: curves_chart(width, curves, name))


def _curve(role: str, evidence: Evidence, unit: float) -> Curve:
    """The whole role at each type; chosen is what some of its layers have in the file."""
    members = list(dict.fromkeys(point.group for point in evidence.curves if point.role == role))
    chosen = {row.chosen_type for row in evidence.rows if row.role == role}
    steps = [
        Step(
            size=point.n_bytes / unit,
            damage=point.kld.mean,
            low=point.kld.low,
            high=point.kld.high,
            chosen=point.kind in chosen,
        )
        for point in sorted(together(evidence.curves, members), key=lambda point: point.n_bytes)
        if point.kld
    ]
    return Curve(name=role, steps=steps)


def _frontier(evidence: Evidence) -> Picture | None:
    """By budget: the best sum of parts at each size, the base, and every combination measured."""
    points = [point for point in evidence.curves if point.kld]
    if not points or not evidence.proposals:
        return None
    (unit, name), kld = unit_of(evidence), evidence.base_kld
    base = sum(point.n_bytes for point in points if point.kind == BASE)
    fixed = evidence.plan["file_bytes"] - _chosen_bytes(evidence)
    best = [((fixed + n_bytes) / unit, kld + damage) for n_bytes, damage in _best(points)]
    shown = [_measured_point("base", (fixed + base) / unit, kld, verdict="")]
    for proposal in evidence.proposals:
        label = "shipped" if proposal.shipped else ""
        shown.append(_measured_point(label, proposal.n_bytes / unit, kld + proposal.kld, verdict="measured"))
    title = "The best file of every size, and what was measured"
    return picture("frontier", title, lambda width: frontier_chart(width, best, shown, name))


def _chosen_bytes(evidence: Evidence) -> int:
    """Bytes of the groups as shipped; what is left of the file no plan changes."""
    chosen = {name: row.chosen_type for row in evidence.rows for name in row.members}
    return sum(point.n_bytes for point in evidence.curves if chosen.get(point.group) == point.kind)


def _best(points: Sequence[CurvePoint]) -> list[tuple[int, float]]:
    """(bytes of the groups, summed damage) of the best choice at sizes from the least to the most."""
    names = dict.fromkeys(point.group for point in points)
    items = [
        [Option(n_bytes=p.n_bytes, damage=p.kld.mean) for p in points if p.group == name and p.kld]
        for name in names
    ]
    least, most = (sum(pick(o.n_bytes for o in item) for item in items) for pick in (min, max))
    budgets = [least + (most - least) * step // (_SIZES - 1) for step in range(_SIZES)]
    choices = [choice for budget in budgets if (choice := solve(items, budget)) is not None]
    return [(total_bytes(items, choice), total_damage(items, choice)) for choice in choices]


def _measured_point(label: str, size: float, damage: float, verdict: str) -> Point:
    return Point(name=label, size=size, delta=damage, low=damage, high=damage, verdict=verdict, label=label)


def _sizes(evidence: Evidence) -> Picture | None:
    """By limit: the base, each variant that was measured, and what was shipped."""
    if evidence.curves:
        return None
    unit, name = unit_of(evidence)
    whole = evidence.plan["base_tensor_bytes"]
    rows = _measured(evidence)
    saved = {row.name: row.bytes_saved for row in evidence.rows}
    points = [_point((row.name,), row, saved, whole / unit, unit) for row in rows]
    joint = [c for c in evidence.combinations if all(name in saved for name in c.groups)]
    for combination in joint:
        label = "shipped" if combination == evidence.shipped else ""
        size = (whole - sum(saved[group] for group in combination.groups)) / unit
        change = combination.change
        points.append(
            Point(
                name=" + ".join(combination.groups),
                size=size,
                delta=change.mean,
                low=change.low,
                high=change.high,
                verdict=combination.verdict,
                label=label,
            )
        )
    if len(points) < 2:
        return None
    base = Point(name="base", size=whole / unit, delta=0, low=0, high=0, verdict="", label="base")
    title = "Size and damage of everything that was measured"
    return picture("sizes", title, lambda width: sizes_chart(width, [base, *points], name, evidence.limit))


def _point(names: Sequence[str], row: GroupRow, saved: dict[str, int], whole: float, unit: float) -> Point:
    assert row.change is not None
    return Point(
        name=names[0],
        size=whole - saved[row.name] / unit,
        delta=row.change.mean,
        low=row.change.low,
        high=row.change.high,
        verdict=row.verdict,
    )


def _paths(evidence: Evidence) -> Picture | None:
    """Only where it was recorded how verdicts were reached, and one at least took a second look."""
    limit = evidence.limit
    rows = [row for row in evidence.rows if row.trace]
    if limit is None or max((len(row.trace) for row in rows), default=0) < 2:
        return None
    panels = [
        Panel(
            name=row.name,
            verdict=row.verdict,
            chunks=[look.chunks for look in row.trace],
            means=[look.change.mean for look in row.trace],
            lows=[look.change.low for look in row.trace],
            highs=[look.change.high for look in row.trace],
        )
        for row in rows
    ]
    title = "How each verdict was reached over chunks"
    return picture("paths", title, lambda width: paths_chart(width, panels, limit))


def _predicted(evidence: Evidence) -> Picture | None:
    """What the parts said, what the whole was, and what a text said that had no part in choosing."""
    whole, predicted = evidence.whole, evidence.plan.get("predicted_delta_pct")
    reported = evidence.reported
    if whole is None or predicted is None or reported is None or len(evidence.changed) < 2:
        return None
    rows = [
        Estimate(
            name="sum of the parts", mean=predicted, low=predicted, high=predicted, text=percent(predicted)
        ),
        _whole("measured together", whole),
        _whole("on the report text", reported),
    ]
    title = "Predicted against measured"
    return picture(
        "predicted", title, lambda width: estimates_chart(width, rows, evidence.limit, AGAINST_BASE)
    )


def _whole(name: str, change: Change) -> Estimate:
    return Estimate(name=name, mean=change.mean, low=change.low, high=change.high, text=percent(change.mean))
