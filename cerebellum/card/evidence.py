"""The artifacts of a run folder, read once and joined: what the card and the report are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cerebellum.errors import BadInput
from cerebellum.stats.paired import as_percent
from cerebellum.workspace import read_curves, read_json

BASE = "base"

Json = Mapping[str, Any]
_NEEDED = ("source", "groups", "plan", "verify", "manifest")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change with its interval: of perplexity in percent, of KL divergence in nats a token."""

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return value < self.low or value > self.high


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was known after so many chunks, on the way to a verdict."""

    chunks: int
    change: Change


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One group: what it was, what was seen, what was decided. ``change`` is None if nothing was."""

    name: str
    role: str
    layers: tuple[int, ...]
    tensors: int
    parameters: int
    base_type: str
    chosen_type: str
    tried_type: str
    bytes_saved: int
    change: Change | None
    chunks: int | None
    verdict: str
    together_with: tuple[str, ...]
    kld: Change | None
    agreement: float | None
    trace: tuple[Look, ...]
    near_tie: bool
    members: tuple[str, ...]
    """The groups it stands for: several where a budget gave neighbouring layers the same type."""

    @property
    def changed(self) -> bool:
        return self.chosen_type != BASE


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One group at one type: bytes in the file, change of KL divergence from the source in nats a token
    (against the base's own), change of perplexity in percent; None where the model broke."""

    group: str
    role: str
    layers: tuple[int, ...]
    kind: str
    base_type: str
    n_bytes: int
    kld: Change | None
    change: Change | None


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A combination that a budget proposed and that was measured whole; KL divergence as of a point."""

    n_bytes: int
    kld: float
    shipped: bool


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Groups that were measured together."""

    groups: tuple[str, ...]
    change: Change
    verdict: str
    chunks: int | None
    kld: Change | None
    agreement: float | None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One way of scoring one benchmark, in percent of its questions; ``difference`` to the base,
    with McNemar's p, where both were asked the same questions."""

    task: str
    protocol: str
    metric: str
    n: int
    accuracy: Change
    base: float | None
    difference: Change | None
    p: float | None
    detectable: float | None
    """The smallest difference that these questions would have shown, in points, 8 times of 10."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the audit of a benchmark found: a model, where, and a sentence with its numbers."""

    model: str
    where: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A finished run. The raw artifacts stay at hand for what is only shown, never computed with."""

    source: Json
    measured: Json
    plan: Json
    verify: Json
    manifest: Json
    rows: tuple[GroupRow, ...]
    combinations: tuple[Combination, ...]
    benchmarks: tuple[Benchmark, ...]
    problems: tuple[Problem, ...]
    curves: tuple[CurvePoint, ...]

    @property
    def base_kld(self) -> float:
        """By budget: KL divergence of the base itself from the source, nats a token."""
        return float(self.measured["base_kld"])

    @property
    def limit(self) -> float | None:
        return self.plan.get("threshold_pct")

    @property
    def report(self) -> Json:
        found: Json = self.verify["report"]
        return found

    @property
    def reported(self) -> Change | None:
        """The finished file against the base on the report text; None where it is not finite."""
        return _change(self.report["delta_pct"], self.report["ci_pct"])

    @property
    def whole(self) -> Change | None:
        """What was shipped, measured whole on the selection text."""
        return _change(self.plan.get("measured_delta_pct"), self.plan.get("ci_pct"))

    @property
    def divergence(self) -> Change | None:
        """By budget: KL divergence from the source of what was shipped, against the base's."""
        return _change(self.plan.get("measured_kld"), self.plan.get("kld_ci"))

    @property
    def proposals(self) -> tuple[Proposal, ...]:
        """Combinations measured for a budget."""
        return tuple(
            Proposal(
                n_bytes=row["file_bytes"],
                kld=row["measured_kld"],
                shipped=row["file_bytes"] == self.plan["file_bytes"]
                and row["measured_kld"] == self.plan["measured_kld"],
            )
            for row in self.plan.get("candidates", ())
            if row.get("measured_kld") is not None
        )

    @property
    def changed(self) -> tuple[GroupRow, ...]:
        return tuple(row for row in self.rows if row.changed)

    @property
    def shipped(self) -> Combination | None:
        """The measurement of exactly what was shipped, if it was made of the whole."""
        wanted = {row.name for row in self.changed}
        return next((c for c in self.combinations if set(c.groups) == wanted), None)


def read_evidence(folder: Path) -> Evidence:
    """Everything the run folder holds; BadInput names the artifact that is missing or is not ours."""
    read = {name: read_json(folder / f"{name}.json") for name in _NEEDED}
    try:
        by_budget = read["plan"].get("mode") == "budget"
        measured = read_curves(folder) if by_budget else read_json(folder / "measurements.json")
        points = tuple(_points(measured)) if by_budget else ()
        path = folder / "bench.json"
        bench = read_json(path) if path.exists() else None
        return Evidence(
            source=read["source"],
            measured=measured,
            plan=read["plan"],
            verify=read["verify"],
            manifest=read["manifest"],
            rows=_rows(read, measured, points),
            combinations=tuple(_combinations(measured)),
            benchmarks=tuple(_benchmarks(bench)) if bench else (),
            problems=tuple(_problems(bench)) if bench else (),
            curves=points,
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadInput(
            f"{folder}: its artifacts are not as Cerebellum writes them ({type(error).__name__}: {error}); "
            "run the stages again"
        ) from error


def _rows(read: Json, measured: Json, points: Sequence[CurvePoint]) -> tuple[GroupRow, ...]:
    described = {group["name"]: group for group in read["groups"]}
    alone = {m["groups"][0]: m for m in measured.get("measurements", ()) if len(m["groups"]) == 1}
    plan = read["plan"]
    rows = [
        _row(row, described.get(row["name"], {}), alone.get(row["name"], {}), plan) for row in plan["groups"]
    ]
    return tuple(_with_step(row, points) for row in rows)


def _with_step(row: GroupRow, points: Sequence[CurvePoint]) -> GroupRow:
    """By budget: what its curve says of the chosen type; of a group that was kept, of one step down."""
    own = together(points, row.members)
    if not own:
        return row
    base = next(point.n_bytes for point in own if point.kind == BASE)
    chosen = next((point for point in own if point.kind == row.chosen_type), None)
    if row.changed:
        return replace(row, kld=chosen.kld if chosen else None)
    step = max((p for p in own if p.n_bytes < base), key=lambda point: point.n_bytes, default=None)
    if step is None:
        return replace(row, verdict="nothing smaller")
    saved = base - step.n_bytes
    return replace(row, tried_type=step.kind, bytes_saved=saved, change=step.change, kld=step.kld)


def together(points: Sequence[CurvePoint], members: Sequence[str]) -> list[CurvePoint]:
    """The curve of several groups at one type: bytes and changes add up; types that all of them have.

    A group whose base has a type has no other point for it.
    """
    curves = [{p.kind: p for p in points if p.group == name} for name in members]
    if not all(curves):
        return []
    if len({curve[BASE].base_type for curve in curves}) > 1:
        for curve in curves:
            own = curve[BASE].base_type
            curve.setdefault(own, replace(curve[BASE], kind=own))
    common = [kind for kind in curves[0] if all(kind in curve for curve in curves)]
    return [_added([curve[kind] for curve in curves]) for kind in common]


def _added(points: Sequence[CurvePoint]) -> CurvePoint:
    return replace(
        points[0],
        layers=tuple(layer for point in points for layer in point.layers),
        n_bytes=sum(point.n_bytes for point in points),
        kld=_sum([point.kld for point in points]),
        change=_sum([point.change for point in points]),
    )


def _sum(changes: Sequence[Change | None]) -> Change | None:
    known = [change for change in changes if change is not None]
    if len(known) < len(changes):
        return None
    low, mean, high = (sum(getattr(change, part) for change in known) for part in ("low", "mean", "high"))
    return Change(low=low, mean=mean, high=high)


def _points(curves: Json) -> Iterator[CurvePoint]:
    """Of every group that a plan may treat apart, as the fit has it (sensitivity.py)."""
    for row in curves["points"]:
        kld, nll = row["kld"], row["nll"]
        yield CurvePoint(
            group=row["group"],
            role=row.get("role", row["group"]),
            layers=tuple(row.get("layers", ())),
            base_type="+".join(row.get("base_types", ())),
            kind=row["type"],
            n_bytes=row["bytes"],
            kld=Change(mean=kld["mean"], low=kld["low"], high=kld["high"]) if kld else None,
            change=Change(**{key: as_percent(nll[key]) for key in ("mean", "low", "high")}) if nll else None,
        )


def _row(row: Json, group: Json, measured: Json, plan: Json) -> GroupRow:
    chosen = row["chosen_type"]
    return GroupRow(
        name=row["name"],
        role=row.get("role") or group.get("role", row["name"]),
        layers=tuple(row.get("layers") or group.get("layers", ())),
        tensors=row["tensors"],
        parameters=group.get("parameters", 0),
        base_type=row["base_type"],
        chosen_type=chosen,
        tried_type=chosen if chosen != BASE else plan.get("demote", ""),
        bytes_saved=row["bytes_saved"],
        change=_change(row.get("delta_pct"), row.get("ci_pct")),
        chunks=row.get("chunks"),
        verdict=row["verdict"],
        together_with=tuple(row.get("measured_with", ())),
        kld=_change(measured.get("kld_mean"), measured.get("kld_ci")),
        agreement=measured.get("top1_agreement"),
        trace=tuple(_looks(measured.get("trace") or ())),
        near_tie=bool(row.get("near_tie")),
        members=tuple(row.get("members") or (row["name"],)),
    )


def _looks(trace: Sequence[Json]) -> Iterator[Look]:
    """Those after which there was an interval at all."""
    for step in trace:
        bounds: Any = step.get("ci_pct") or (None, None)
        if step.get("delta_pct") is not None and None not in bounds:
            low, high = bounds
            yield Look(chunks=step["chunks"], change=Change(mean=step["delta_pct"], low=low, high=high))


def _combinations(measured: Json) -> Iterator[Combination]:
    for row in measured.get("measurements", ()):
        change = _change(row["delta_pct"], row.get("ci_pct"))
        if len(row["groups"]) > 1 and change is not None:
            yield Combination(
                groups=tuple(row["groups"]),
                change=change,
                verdict=row["verdict"],
                chunks=row.get("chunks"),
                kld=_change(row.get("kld_mean"), row.get("kld_ci")),
                agreement=row.get("top1_agreement"),
            )


def _change(mean: float | None, interval: Sequence[float | None] | None) -> Change | None:
    """None where nothing was measured; a mean without an interval is its own."""
    if mean is None:
        return None
    low, high = interval or (mean, mean)
    return Change(mean=mean, low=mean if low is None else low, high=mean if high is None else high)


def _benchmarks(bench: Json) -> Iterator[Benchmark]:
    """The first model of bench.json is the finished file, the second its base."""
    names = [model["name"] for model in bench["models"]]
    scores = {(row["model"], *_way(row)): row for row in bench["scores"]}
    pairs = {(row["against"], *_way(row)): row for row in bench["paired"]}
    for row in bench["scores"]:
        if row["model"] != names[0]:
            continue
        base = scores.get((names[1], *_way(row))) if len(names) > 1 else None
        pair = pairs.get((names[1], *_way(row))) if len(names) > 1 else None
        yield Benchmark(
            task=row["task"],
            protocol=row["protocol"],
            metric=row["metric"] if row["labels"] == "original" else f"{row['metric']}, {row['labels']}",
            n=row["n"],
            accuracy=_interval(row["accuracy_pct"], row["ci_pct"]),
            base=base["accuracy_pct"] if base else None,
            difference=_interval(pair["difference_pct"], pair["ci_pct"]) if pair else None,
            p=pair["p_value"] if pair else None,
            detectable=pair.get("detectable_pct") if pair else None,
        )


def _problems(bench: Json) -> Iterator[Problem]:
    for check in bench["audit"].get("checks", ()):
        for text in check["problems"]:
            where = f"{check['task']} ({check['protocol']})"
            yield Problem(model=check["model"], where=where, text=text)


def _way(row: Json) -> tuple[str, str, str, str]:
    """What was asked and how it was scored."""
    return (row["task"], row["protocol"], row["metric"], row["labels"])


def _interval(mean: float, bounds: Sequence[float]) -> Change:
    return Change(mean=mean, low=bounds[0], high=bounds[1])
