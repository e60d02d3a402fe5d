"""Question benchmarks, paired: every model answers the same questions, every answer is kept.

questions -> prompts -> asks -> replies -> one record a question (evidence) -> scores, pairs, audit
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cerebellum.bench.answers import Exam, Prepared, answers, prepare
from cerebellum.bench.evidence import Evidence, held
from cerebellum.bench.scores import Candidate, Sitting, bench_json
from cerebellum.bench.tasks import (
    LETTER,
    PROMPT_VERSION,
    PROTOCOLS,
    choose,
    load_questions,
    questions_file,
    task_named,
)
from cerebellum.engine.asking import Asker
from cerebellum.files import sha256_file
from cerebellum.llama.asker import open_asker
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.progress import Reporter
from cerebellum.source import open_source

Opener = Callable[[Sequence[Path]], AbstractContextManager[Asker]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked of the bench. ``limit`` 0 means every question, ``generate`` 0 no generated text.

    ``rotations`` asks every letter question that often, its options turned by one place each time.
    """

    tasks: tuple[str, ...] = ("hellaswag", "arc_challenge", "mmlu_redux")
    protocols: tuple[str, ...] = PROTOCOLS
    limit: int = 0
    seed: int = 1
    rotations: int = 1
    generate: int = 0
    data: Path | None = None


def bench(
    candidates: Sequence[Candidate], request: Request, opener: Opener, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """bench.json: the first candidate against each of the others, on the same questions."""
    exams = make_exams(request)
    sittings: list[Sitting] = []
    for candidate in candidates:
        with held(folder), opener(candidate.paths) as asker:
            sittings += [sit(asker, exam, candidate, folder, reporter) for exam in exams]
    return bench_json(candidates, request_json(request), sittings)


def request_json(request: Request) -> dict[str, Any]:
    """What was asked, the files of questions by name and content: where they lie is nobody's business."""
    files = {name: questions_file(task_named(name), request.data) for name in request.tasks}
    data = {name: {"file": f.name, "sha256": sha256_file(f)} if f else None for name, f in files.items()}
    return asdict(request) | {"data": data}


def bench_files(
    models: Sequence[Path], request: Request, settings: EngineSettings, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """The first file against each of the others."""
    candidates = distinct([candidate_from(m) for m in models])
    return bench(candidates, request, llama_opener(settings), folder, reporter)


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates whose names tell them apart: files of one name get the first digits of their sha256."""
    often = Counter(candidate.name for candidate in candidates)
    return [replace(c, name=f"{c.name} {c.sha256[:8]}") if often[c.name] > 1 else c for c in candidates]


def llama_opener(settings: EngineSettings) -> Opener:
    return lambda paths: open_asker(LlamaEngine(settings), paths)


def candidate_from(path: Path, name: str | None = None) -> Candidate:
    source = open_source(path, allow_requantize=True)
    paths = tuple(file.path for file in source.files)
    return Candidate(name=name or path.name, paths=paths, sha256=source.sha256())


def make_exams(request: Request) -> list[Exam]:
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


def sit(asker: Asker, exam: Exam, candidate: Candidate, folder: Path, reporter: Reporter) -> Sitting:
    """Asks what the evidence does not answer yet; each answer is written as it comes."""
    key = {
        "task": exam.task.name,
        "protocol": exam.protocol,
        "model_sha256": candidate.sha256,
        "engine": asker.identity,
        "prompt_version": PROMPT_VERSION,
        "rotations": exam.rotations,
        "generate": exam.generate,
    }
    with Evidence(folder, exam.name, key) as evidence:
        sitting = Sitting(exam=exam, candidate=candidate, evidence=evidence.path)
        prepared = [prepare(asker, exam, question) for question in exam.questions]
        missing = [p for p in prepared if not _known(evidence, p)]
        started = time.perf_counter()
        if missing:
            with reporter.task(f"{candidate.name}: {exam.name}", len(missing)) as tick:
                for record in answers(asker, exam, missing):
                    evidence.append(record)
                    tick()
        sitting.asked, sitting.seconds = len(missing), time.perf_counter() - started
        sitting.records = [evidence.records[p.question.id] for p in prepared]
    return sitting


def _known(evidence: Evidence, p: Prepared) -> bool:
    return evidence.known(p.question.id, p.prompt_sha256, p.question.golds)
