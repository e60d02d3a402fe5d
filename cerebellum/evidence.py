"""The artifacts of a run folder, read once and joined: what the card and the report are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cerebellum.errors import BadInput
from cerebellum.workspace import read_json

BASE = "base"

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of perplexity in percent, with its interval."""

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

    @property
    def changed(self) -> bool:
        return self.chosen_type != BASE


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
    """One task, in fractions of its questions; the base's and the p of their pairing where known."""

    task: str
    protocol: str
    n: int
    accuracy: float
    interval: tuple[float, float] | None
    base_accuracy: float | None
    p: float | None


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

    @property
    def limit(self) -> float | None:
        return self.plan.get("threshold_pct")

    @property
    def report(self) -> Json:
        found: Json = self.verify["report"]
        return found

    @property
    def reported(self) -> Change:
        """The finished file against the base on the report text."""
        return Change(
            mean=self.report["delta_pct"], low=self.report["ci_pct"][0], high=self.report["ci_pct"][1]
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
    read = {
        name: read_json(folder / f"{name}.json")
        for name in ("source", "groups", "measurements", "plan", "verify", "manifest")
    }
    bench = folder / "bench.json"
    try:
        rows, combinations = _rows(read), tuple(_combinations(read["measurements"]))
        return Evidence(
            source=read["source"],
            measured=read["measurements"],
            plan=read["plan"],
            verify=read["verify"],
            manifest=read["manifest"],
            rows=rows,
            combinations=combinations,
            benchmarks=tuple(_benchmarks(read_json(bench))) if bench.exists() else (),
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadInput(
            f"{folder}: its artifacts are not as Cerebellum writes them ({type(error).__name__}: {error}); "
            "run the stages again"
        ) from error


def _rows(read: Mapping[str, Any]) -> tuple[GroupRow, ...]:
    described = {group["name"]: group for group in read["groups"]}
    alone = {m["groups"][0]: m for m in read["measurements"]["measurements"] if len(m["groups"]) == 1}
    plan = read["plan"]
    return tuple(
        _row(row, described.get(row["name"], {}), alone.get(row["name"], {}), plan) for row in plan["groups"]
    )


def _row(row: Json, group: Json, measured: Json, plan: Json) -> GroupRow:
    chosen = row["chosen_type"]
    return GroupRow(
        name=row["name"],
        role=group.get("role", row["name"]),
        layers=tuple(group.get("layers", ())),
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
    )


def _looks(trace: Sequence[Json]) -> Iterator[Look]:
    """Those after which there was an interval at all."""
    for step in trace:
        bounds: Any = step.get("ci_pct") or (None, None)
        if step.get("delta_pct") is not None and None not in bounds:
            low, high = bounds
            yield Look(chunks=step["chunks"], change=Change(mean=step["delta_pct"], low=low, high=high))


def _combinations(measured: Json) -> Iterator[Combination]:
    for row in measured["measurements"]:
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


def _benchmarks(bench: Any) -> Iterator[Benchmark]:
    """bench.json: a list of tasks, or an object with one."""
    tasks: Any = bench["tasks"] if isinstance(bench, dict) and "tasks" in bench else bench
    rows = tasks.values() if isinstance(tasks, dict) else tasks
    for row in rows:
        base = row.get("base")
        yield Benchmark(
            task=str(row["task"]),
            protocol=str(row.get("protocol", "")),
            n=int(row["n"]),
            accuracy=float(row["accuracy"]),
            interval=(row["ci"][0], row["ci"][1]) if row.get("ci") else None,
            base_accuracy=base.get("accuracy") if isinstance(base, dict) else base,
            p=row.get("mcnemar_p"),
        )
