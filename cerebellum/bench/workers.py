"""Has workers ask the questions side by side: what a worker does, and what becomes of its answers.

A task is a part of an exam and one model, and gives all answers of it that are missing. It is the same part that one
process asks at a time, so that every answer is the same, bit for bit. Who asks what is the crew's affair, and only
this process writes answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from cerebellum.bench.answers import Exam, Known, answers, parts, unanswered
from cerebellum.bench.artifacts import Answer, LetterAnswer, LoglikelihoodAnswer
from cerebellum.bench.evidence import Answers, held
from cerebellum.bench.scores import Examinee, Sitting
from cerebellum.bench.sittings import opened_answers, sitting
from cerebellum.engine.asking import Asker, KeptAsker
from cerebellum.engine.workers import MODEL, Lane, Pool, Room
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.measure.crew import Anchors, Column, Crew, Errand
from cerebellum.measure.worker import EngineRoom, MakeEngine
from cerebellum.progress import Reporter

_COMPARED = 4  # questions that every worker answers first where there is no base to compare workers by


@runtime_checkable
class AskingRoom(Room, Protocol):
    """A worker's room in which a model can be asked."""

    def asker(self, paths: Sequence[Path]) -> Asker:
        """Returns the model of these files, open; whatever else the worker had open is closed."""
        ...


@dataclass(frozen=True, kw_only=True)
class PartAnswers:
    """What an ExamTask gives: the answers that were missing, and the seconds that they took."""

    answers: tuple[Answer, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ExamTask:
    """Ask a model the questions of ``part`` that are not ``known``; ``sizes`` are the bytes of its files."""

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    part: Exam
    known: Known

    @classmethod
    def of(cls, examinee: Examinee, part: Exam, known: Known) -> ExamTask:
        """Makes the task, with as much of what is known as belongs to the part."""
        ids = [question.id for question in part.questions]
        return cls(
            paths=tuple(path.absolute() for path in examinee.paths),
            sizes=tuple(path.stat().st_size for path in examinee.paths),
            part=part,
            known={id: known[id] for id in ids if id in known},
        )

    @property
    def lane(self) -> Lane:
        """A model runs."""
        return MODEL

    def run(self, room: Room) -> PartAnswers:
        """Returns the answers. Raises BadInput where this machine has not the files that are meant."""
        assert isinstance(room, AskingRoom)
        for path, size in zip(self.paths, self.sizes, strict=True):
            if not path.is_file() or path.stat().st_size != size:
                raise BadInput(
                    f"{path}: is not there, or is another file, on the machine of a worker; "
                    "put models on a disk that all machines share"
                )
        asker = room.asker(self.paths)
        missing = unanswered(asker, self.part, self.known)
        started = time.perf_counter()
        found = tuple(answers(asker, self.part, missing))
        return PartAnswers(answers=found, seconds=time.perf_counter() - started)


@dataclass(kw_only=True)
class _Desk:
    """A model in an exam while workers ask it."""

    examinee: Examinee
    exam: Exam
    kept: Answers
    asked: int = 0
    seconds: float = 0.0

    def errands(self) -> list[tuple[_Desk, Exam, Errand]]:
        """Returns what workers have to do, part by part."""
        known = self.kept.known
        cut = parts(self.exam)
        found = []
        first = 1
        for part in cut:
            about = f"{self.examinee.name}: {self.exam.name}"
            if len(cut) > 1:
                about += f", questions {first} to {first + len(part.questions) - 1}"
            first += len(part.questions)
            task = ExamTask.of(self.examinee, part, known)
            found.append((self, part, Errand(about=about, task=task, opens=self.examinee.sha256)))
        return found

    def take(self, part: Exam, result: object) -> None:
        """Writes the answers of a part, unless they are not those that were asked for."""
        assert isinstance(result, PartAnswers)
        wanted = {question.id for question in part.questions}
        came = {answer.id for answer in result.answers}
        if (
            len(came) < len(result.answers)
            or not came <= wanted
            or not wanted <= came | self.kept.by_id.keys()
        ):
            raise CerebellumError(
                f"{self.examinee.name}: {self.exam.name}: a worker gave other answers than it was asked for; "
                "nothing was written of them"
            )
        for answer in result.answers:
            self.kept.append(answer)
        self.asked += len(result.answers)
        self.seconds += result.seconds


def ask_together(
    crew: Crew, examinees: Sequence[Examinee], exams: Sequence[Exam], folder: Path, reporter: Reporter
) -> list[Sitting]:
    """Has workers ask all models all that the evidence does not answer yet; a part is written as it comes."""
    engine = crew.identity
    with held(folder), ExitStack() as stack:
        desks: dict[tuple[str, int], _Desk] = {}
        for examinee in examinees:
            for number, exam in enumerate(exams):
                if (examinee.sha256, number) not in desks:  # the same file twice is asked once
                    kept = stack.enter_context(opened_answers(folder, exam, examinee, engine))
                    desks[examinee.sha256, number] = _Desk(examinee=examinee, exam=exam, kept=kept)
        _ask(crew, list(desks.values()), reporter)
        sat = [(e, desks[e.sha256, number]) for e in examinees for number in range(len(exams))]
        return [
            sitting(d.exam, e, d.kept, d.asked, d.seconds)
            if d.examinee is e
            else sitting(d.exam, e, d.kept, 0, 0)
            for e, d in sat
        ]


def _ask(crew: Crew, desks: Sequence[_Desk], reporter: Reporter) -> None:
    units = [unit for desk in desks for unit in desk.errands()]
    with reporter.task(f"parts of benchmarks, asked by {crew.size} workers", len(units)) as tick:
        for number, result in crew.run([errand for _, _, errand in units]):
            desk, part, _ = units[number]
            desk.take(part, result)
            tick()


# --- workers for questions alone, where nothing was measured before


@dataclass(frozen=True, kw_only=True)
class Askers:
    """How workers for questions alone are started, and the identity of the engine that they must have."""

    hire: Callable[[], Pool]
    identity: str

    def crew(self, examinees: Sequence[Examinee], exams: Sequence[Exam], reporter: Reporter) -> Crew:
        """Starts them. They are compared by the first questions of the first model before they are used."""
        few = replace(exams[0], questions=exams[0].questions[:_COMPARED], generate=0)
        anchors = Anchors(
            task=ExamTask.of(examinees[0], few, {}),
            identity=self.identity,
            known=None,
            column=_column,
            record=lambda _: None,
            said="the first questions",
        )
        return Crew(self.hire(), reporter, lambda: anchors, None)


def _column(result: object) -> Column:
    """Returns all log-probabilities of some answers, one after the other."""
    assert isinstance(result, PartAnswers)
    rows: list[Sequence[float]] = []
    for answer in sorted(result.answers, key=lambda one: one.id):
        if isinstance(answer, LetterAnswer):
            rows += answer.letter_log_probs
        elif isinstance(answer, LoglikelihoodAnswer):
            rows += answer.token_log_probs
    return np.array([value for row in rows for value in row], np.float32)


class AskRoom(EngineRoom):
    """A worker's engine, and the model that it asks."""

    def __init__(self, make_engine: MakeEngine) -> None:
        super().__init__(make_engine)
        self._kept = KeptAsker(self.engine.asker)

    def asker(self, paths: Sequence[Path]) -> Asker:
        """Returns the model of these files, open."""
        return self._kept.of(paths)

    def close(self) -> None:
        """Frees the model."""
        self._kept.close()


@dataclass(frozen=True, kw_only=True)
class MakeAskRoom:
    """Makes the room of a worker that only asks, in the worker."""

    make_engine: MakeEngine

    def __call__(self) -> AskRoom:
        """Starts the engine; a model is opened when it is asked."""
        return AskRoom(self.make_engine)
