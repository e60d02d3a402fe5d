"""Computes bench.json from the answers: scores with their intervals, paired differences, audit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cerebellum.bench.answers import Exam
from cerebellum.bench.artifacts import (
    Answer,
    Audit,
    BenchResults,
    EvidenceRow,
    ModelRow,
    PairRow,
    RequestRow,
    ScoreRow,
    SessionRow,
    SubjectScore,
    Where,
)
from cerebellum.bench.audit import audit
from cerebellum.bench.tasks import ORIGINAL
from cerebellum.stats.binomial import paired, wilson


@dataclass(frozen=True, kw_only=True)
class Examinee:
    """Names a model to be asked: its files, first the one with the metadata, and their content's SHA-256."""

    name: str
    paths: tuple[Path, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """Holds what one model did in one exam: its answers in the exam's order, and the work of this session.

    ``evidence`` is the file of the answers; ``asked`` counts those that were new and took ``seconds``.
    """

    exam: Exam
    examinee: Examinee
    evidence: Path
    answers: tuple[Answer, ...]
    asked: int
    seconds: float

    @property
    def where(self) -> Where:
        """Names the model, the benchmark and the protocol of this sitting."""
        return Where(model=self.examinee.name, task=self.exam.task.name, protocol=self.exam.protocol)


def bench_results(
    examinees: Sequence[Examinee], request: RequestRow, sittings: Sequence[Sitting]
) -> BenchResults:
    """Returns bench.json: all that a card or a person may want, computed from the answers alone.

    The first examinee is paired with each of the others, exam by exam.
    """
    checks = tuple(audit(s.where, s.answers) for s in sittings)
    first = [s for s in sittings if s.examinee is examinees[0]]
    others = [s for s in sittings if s.examinee is not examinees[0]]
    pairs = [(a, b) for a in first for b in others if a.exam is b.exam]
    return BenchResults(
        models=tuple(ModelRow(name=e.name, sha256=e.sha256) for e in examinees),
        request=request,
        scores=tuple(row for s in sittings for row in _scores(s)),
        paired=tuple(row for a, b in pairs for row in _pairs(a, b)),
        audit=Audit(ok=not any(check.problems for check in checks), checks=checks),
        evidence=tuple(_evidence(s) for s in sittings),
        session=tuple(_session(s) for s in sittings),
    )


def _evidence(sitting: Sitting) -> EvidenceRow:
    where = sitting.where
    return EvidenceRow(
        model=where.model, task=where.task, protocol=where.protocol, file=sitting.evidence.name
    )


def _session(sitting: Sitting) -> SessionRow:
    where = sitting.where
    return SessionRow(
        model=where.model,
        task=where.task,
        protocol=where.protocol,
        asked=sitting.asked,
        reused=len(sitting.answers) - sitting.asked,
        seconds=round(sitting.seconds, 3),
    )


def _scores(sitting: Sitting) -> Iterator[ScoreRow]:
    """Yields an accuracy for every metric and every set of labels."""
    where = sitting.where
    for metric, labels in _metrics_and_labels(sitting.answers):
        covered = [answer for answer in sitting.answers if labels in answer.golds]
        right = [_right(answer, metric, labels) for answer in covered]
        whole = _score(right)
        yield ScoreRow(
            model=where.model,
            task=where.task,
            protocol=where.protocol,
            metric=metric,
            labels=labels,
            correct=whole.correct,
            n=whole.n,
            accuracy_pct=whole.accuracy_pct,
            ci_pct=whole.ci_pct,
            chance_pct=100 * float(np.mean([1 / len(answer.options) for answer in covered])),
            by_subject=_by_subject(covered, right),
        )


def _metrics_and_labels(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """Returns every metric with every set of labels that covers any question, the original labels first."""
    metrics = list(answers[0].answers) if answers else []
    sets = list(dict.fromkeys(name for answer in answers for name in answer.golds))
    return [(metric, labels) for metric in metrics for labels in sorted(sets, key=lambda s: s != ORIGINAL)]


def _right(answer: Answer, metric: str, labels: str) -> bool:
    """Says whether the chosen option is the right one; an answer that nobody could read is wrong."""
    return answer.answers[metric] == answer.golds[labels]


def _score(right: Sequence[bool]) -> SubjectScore:
    found = wilson(sum(right), len(right))
    return SubjectScore(
        correct=found.successes,
        n=found.n,
        accuracy_pct=100 * found.value,
        ci_pct=(100 * found.low, 100 * found.high),
    )


def _by_subject(answers: Sequence[Answer], right: Sequence[bool]) -> dict[str, SubjectScore]:
    """Returns the score of each subject, in order of the alphabet; empty where a benchmark has none."""
    found: dict[str, list[bool]] = defaultdict(list)
    for answer, ok in zip(answers, right, strict=True):
        if answer.subject is not None:
            found[answer.subject].append(ok)
    return {name: _score(oks) for name, oks in sorted(found.items())}


def _pairs(a: Sitting, b: Sitting) -> Iterator[PairRow]:
    """Yields the first model less the other on the same questions, by metric and set of labels."""
    for metric, labels in _metrics_and_labels(a.answers):
        rows = [(x, y) for x, y in zip(a.answers, b.answers, strict=True) if labels in x.golds]
        found = paired(
            [_right(x, metric, labels) for x, _ in rows], [_right(y, metric, labels) for _, y in rows]
        )
        smallest = found.smallest_significant
        yield PairRow(
            task=a.exam.task.name,
            protocol=a.exam.protocol,
            metric=metric,
            labels=labels,
            model=a.examinee.name,
            against=b.examinee.name,
            n=found.n,
            only_model=found.only_a,
            only_against=found.only_b,
            difference_pct=100 * found.difference,
            ci_pct=(100 * found.low, 100 * found.high),
            p_value=found.p_value,
            detectable_pct=100 * found.detectable,
            smallest_significant_pct=None if smallest is None else 100 * smallest,
            same_answer=sum(x.answers[metric] == y.answers[metric] for x, y in rows),
        )
