"""One model in one exam: what its answers lie under, what is still to be asked, and what came of it."""

from __future__ import annotations

import time
from pathlib import Path

from cerebellum.bench.answers import ANSWER_TYPES, Exam, answers, parts, unanswered
from cerebellum.bench.evidence import Answers
from cerebellum.bench.scores import Examinee, Sitting
from cerebellum.bench.tasks import PROMPT_VERSION
from cerebellum.engine.asking import Asker
from cerebellum.progress import Reporter


def opened_answers(folder: Path, exam: Exam, examinee: Examinee, engine: str) -> Answers:
    """Opens the evidence of a model in an exam, as an engine of this identity answers."""
    key: dict[str, str | int] = {
        "task": exam.task.name,
        "protocol": exam.protocol,
        "model_sha256": examinee.sha256,
        "engine": engine,
        "prompt_version": PROMPT_VERSION,
        "rotations": exam.rotations,
        "generate": exam.generate,
    }
    return Answers(folder, exam.name, key, ANSWER_TYPES[exam.protocol])


def sit(asker: Asker, exam: Exam, examinee: Examinee, folder: Path, reporter: Reporter) -> Sitting:
    """Asks what the evidence does not answer yet and returns all answers; each is written as it comes."""
    with opened_answers(folder, exam, examinee, asker.identity) as kept:
        known = kept.known
        missing = [unanswered(asker, part, known) for part in parts(exam)]
        asked = sum(map(len, missing))
        started = time.perf_counter()
        if asked:
            with reporter.task(f"{examinee.name}: {exam.name}", asked) as tick:
                for prepared in missing:
                    for answer in answers(asker, exam, prepared):
                        kept.append(answer)
                        tick()
        return sitting(exam, examinee, kept, asked, time.perf_counter() - started)


def sitting(exam: Exam, examinee: Examinee, kept: Answers, asked: int, seconds: float) -> Sitting:
    """Returns a sitting that has ended: every question of the exam has its answer."""
    return Sitting(
        exam=exam,
        examinee=examinee,
        evidence=kept.path,
        answers=tuple(kept.by_id[question.id] for question in exam.questions),
        asked=asked,
        seconds=seconds,
    )
