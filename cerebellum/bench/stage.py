"""Asks every model the same benchmark questions, keeps every answer and pairs the models by question.

questions -> prompts -> asks -> replies -> one answer a question (evidence) -> scores, pairs, audit
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cerebellum.bench.answers import Exam
from cerebellum.bench.artifacts import BenchResults, DataFile, RequestRow
from cerebellum.bench.evidence import held
from cerebellum.bench.scores import Examinee, Sitting, bench_results
from cerebellum.bench.sittings import sit
from cerebellum.bench.tasks import (
    LETTER,
    PROTOCOLS,
    choose,
    load_questions,
    questions_file,
    task_named,
)
from cerebellum.bench.workers import Askers, ask_together
from cerebellum.engine.asking import Opener
from cerebellum.files import sha256_file
from cerebellum.measure.crew import Crew
from cerebellum.progress import Reporter
from cerebellum.source import open_source


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """Says what is asked of the bench.

    ``limit`` questions of each benchmark (0: all of them) are chosen in an order that ``seed`` decides.
    ``rotations`` asks every letter question so often, with its options turned by one place each time, and
    ``generate`` is the most tokens of text to generate for one (0: none). ``data`` is the folder of the
    benchmark files; without it they are looked for in CEREBELLUM_DATA, then on the Hub.
    """

    tasks: tuple[str, ...] = ("hellaswag", "arc_challenge", "mmlu_redux")
    protocols: tuple[str, ...] = PROTOCOLS
    limit: int = 0
    seed: int = 1
    rotations: int = 1
    generate: int = 0
    data: Path | None = None


def bench(
    examinees: Sequence[Examinee],
    request: BenchRequest,
    opener: Opener,
    folder: Path,
    reporter: Reporter,
    crew: Crew | None = None,
) -> BenchResults:
    """Asks all examinees the same questions and returns bench.json: the first against each of the others.

    The answers lie in ``folder``, and what they hold already is not asked again. One model is open at a
    time; with a ``crew`` its workers ask, each with a model of its own, and get the same answers. Raises BadInput
    where the questions are missing or another bench holds the folder.
    """
    exams = make_exams(request)
    sittings: list[Sitting] = []
    if crew is not None:
        sittings = ask_together(crew, examinees, exams, folder, reporter)
    else:
        for examinee in examinees:
            with held(folder), opener(examinee.paths) as asker:
                sittings += [sit(asker, exam, examinee, folder, reporter) for exam in exams]
    return bench_results(examinees, request_row(request), sittings)


def request_row(request: BenchRequest) -> RequestRow:
    """Returns the request as bench.json repeats it: files by name and content, not by where they lie."""
    files = {name: questions_file(task_named(name), request.data) for name in request.tasks}
    return RequestRow(
        tasks=request.tasks,
        protocols=request.protocols,
        limit=request.limit,
        seed=request.seed,
        rotations=request.rotations,
        generate=request.generate,
        data={
            name: DataFile(file=path.name, sha256=sha256_file(path)) if path else None
            for name, path in files.items()
        },
    )


def bench_files(
    models: Sequence[Path],
    request: BenchRequest,
    opener: Opener,
    folder: Path,
    reporter: Reporter,
    askers: Askers | None = None,
) -> BenchResults:
    """Benches GGUF files, the first against each of the others; see ``bench``. With ``askers``, workers ask."""
    examinees = distinct([examinee_from(model) for model in models])
    if askers is None:
        return bench(examinees, request, opener, folder, reporter)
    crew = askers.crew(examinees, make_exams(request), reporter)
    try:
        return bench(examinees, request, opener, folder, reporter, crew)
    finally:
        crew.close()


def distinct(examinees: Sequence[Examinee]) -> list[Examinee]:
    """Returns the examinees with names that differ: equal ones get the first digits of their SHA-256."""
    often = Counter(examinee.name for examinee in examinees)
    return [replace(e, name=f"{e.name} {e.sha256[:8]}") if often[e.name] > 1 else e for e in examinees]


def examinee_from(path: Path, name: str | None = None) -> Examinee:
    """Returns the model at ``path`` with all of its splits, named ``name`` or as its file is.

    Reads every byte for the SHA-256. Raises BadInput where the files cannot be read or are no model.
    """
    source = open_source(path, allow_requantize=True)
    return Examinee(name=name or path.name, paths=source.paths, sha256=source.sha256())


def make_exams(request: BenchRequest) -> list[Exam]:
    """Returns every benchmark in every protocol with its questions chosen; only letters are turned."""
    exams = []
    for task in (task_named(name) for name in request.tasks):
        questions = tuple(choose(load_questions(task, request.data), request.limit, request.seed))
        for protocol in request.protocols:
            by_letter = protocol == LETTER
            exams.append(
                Exam(
                    task=task,
                    protocol=protocol,
                    questions=questions,
                    rotations=request.rotations if by_letter else 1,
                    generate=request.generate if by_letter else 0,
                )
            )
    return exams
