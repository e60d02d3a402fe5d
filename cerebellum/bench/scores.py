"""Records -> bench.json: scores with their intervals, paired differences, audit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cerebellum.bench.answers import Exam
from cerebellum.bench.audit import audit
from cerebellum.bench.evidence import Record
from cerebellum.bench.tasks import ORIGINAL
from cerebellum.stats.binomial import Proportion, paired, wilson

FORMAT = 1  # 1: first release of bench.json and of the evidence lines


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to be asked: its files, first the one with the metadata."""

    name: str
    paths: tuple[Path, ...]
    sha256: str


@dataclass
class Sitting:
    """What one model did in one exam: its records in the exam's order, and the work of this session."""

    exam: Exam
    candidate: Candidate
    evidence: Path
    records: list[Record] = field(default_factory=list)
    asked: int = 0
    seconds: float = 0.0


def bench_json(
    candidates: Sequence[Candidate], request: Mapping[str, Any], sittings: Sequence[Sitting]
) -> dict[str, Any]:
    """Everything that a card or a person may want, from the records alone."""
    audits = [{**_where(s), **audit(s.records)} for s in sittings]
    first = [s for s in sittings if s.candidate is candidates[0]]
    others = [s for s in sittings if s.candidate is not candidates[0]]
    pairs = [(a, b) for a in first for b in others if a.exam is b.exam]
    return {
        "format": FORMAT,
        "models": [{"name": c.name, "sha256": c.sha256} for c in candidates],
        "request": dict(request),
        "scores": [row for s in sittings for row in _scores(s)],
        "paired": [row for a, b in pairs for row in _pairs(a, b)],
        "audit": {"ok": not any(a["problems"] for a in audits), "checks": audits},
        "evidence": [_where(s) | {"file": s.evidence.name} for s in sittings],
        "session": [
            _where(s) | {"asked": s.asked, "reused": len(s.records) - s.asked, "seconds": round(s.seconds, 3)}
            for s in sittings
        ],
    }


def _where(sitting: Sitting) -> dict[str, Any]:
    return {
        "model": sitting.candidate.name,
        "task": sitting.exam.task.name,
        "protocol": sitting.exam.protocol,
    }


def _scores(sitting: Sitting) -> Iterator[dict[str, Any]]:
    for metric, labels in _metrics_and_labels(sitting.records):
        records = [r for r in sitting.records if labels in r["golds"]]
        right = [_right(r, metric, labels) for r in records]
        yield {
            **_where(sitting),
            "metric": metric,
            "labels": labels,
            **_proportion(wilson(sum(right), len(right))),
            "chance_pct": 100 * float(np.mean([1 / len(r["options"]) for r in records])),
            "by_subject": _by_subject(records, right),
        }


def _metrics_and_labels(records: Sequence[Record]) -> list[tuple[str, str]]:
    metrics = list(records[0]["answers"]) if records else []
    sets = list(dict.fromkeys(name for r in records for name in r["golds"]))
    return [(metric, labels) for metric in metrics for labels in sorted(sets, key=lambda s: s != ORIGINAL)]


def _right(record: Record, metric: str, labels: str) -> bool:
    """An answer that could not be read is wrong."""
    return bool(record["answers"][metric] == record["golds"][labels])


def _proportion(p: Proportion) -> dict[str, Any]:
    return {
        "correct": p.successes,
        "n": p.n,
        "accuracy_pct": 100 * p.value,
        "ci_pct": [100 * p.low, 100 * p.high],
    }


def _by_subject(records: Sequence[Record], right: Sequence[bool]) -> dict[str, dict[str, Any]]:
    """Subjects in order of the alphabet; empty where a benchmark has none."""
    found: dict[str, list[bool]] = defaultdict(list)
    for record, ok in zip(records, right, strict=True):
        if record["subject"] is not None:
            found[record["subject"]].append(ok)
    return {name: _proportion(wilson(sum(oks), len(oks))) for name, oks in sorted(found.items())}


def _pairs(a: Sitting, b: Sitting) -> Iterator[dict[str, Any]]:
    """The first model less the other, on the questions that both answered."""
    for metric, labels in _metrics_and_labels(a.records):
        rows = [(x, y) for x, y in zip(a.records, b.records, strict=True) if labels in x["golds"]]
        found = paired(
            [_right(x, metric, labels) for x, _ in rows], [_right(y, metric, labels) for _, y in rows]
        )
        smallest = found.smallest_significant
        yield {
            "task": a.exam.task.name,
            "protocol": a.exam.protocol,
            "metric": metric,
            "labels": labels,
            "model": a.candidate.name,
            "against": b.candidate.name,
            "n": found.n,
            "only_model": found.only_a,
            "only_against": found.only_b,
            "difference_pct": 100 * found.difference,
            "ci_pct": [100 * found.low, 100 * found.high],
            "p_value": found.p_value,
            "detectable_pct": 100 * found.detectable,
            "smallest_significant_pct": None if smallest is None else 100 * smallest,
            "same_answer": sum(x["answers"][metric] == y["answers"][metric] for x, y in rows),
        }
