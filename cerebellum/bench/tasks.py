"""Knows the question benchmarks: where the questions come from, and what they look like in each protocol.

In the protocol `letter` the model sees the question with lettered options through its own chat template
(a plain prompt where it has none) and answers with the likeliest letter; model cards publish this. In
`loglikelihood` each option is scored as a continuation of the question, as lm-evaluation-harness defines
hellaswag, arc_challenge and mmlu's continuation variant; it suits models without chat.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from cerebellum.bench.chat import render_chat
from cerebellum.engine.asking import Vocabulary
from cerebellum.errors import BadInput

LETTER = "letter"
LOGLIKELIHOOD = "loglikelihood"
PROTOCOLS = (LETTER, LOGLIKELIHOOD)

ORIGINAL = "original"
CORRECTED = "corrected"
PUBLISHED = "published_subset"
"""The sets of labels: as the benchmark has them, after a review, and those of an earlier evaluation."""

PROMPT_VERSION = 1  # 1: first release. Part of the key of every answer; bump it with any wording below
DATA_VARIABLE = "CEREBELLUM_DATA"
SAMPLES = Path(__file__).parents[1] / "data" / "benchmarks"

_MMLU_REDUX = "edinburgh-dawg/mmlu-redux-2.0"


@dataclass(frozen=True, kw_only=True)
class Question:
    """Is one question; ``golds`` holds the right option, counted from 0, for each set of labels that covers
    it.

    ``stem`` is the question for people and for the letter protocol, ``context`` what the options continue in
    the loglikelihood protocol.
    """

    id: str
    subject: str | None
    stem: str
    context: str
    options: tuple[str, ...]
    golds: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Describes a benchmark: its file, its place on the Hub, and how a row becomes a question."""

    name: str
    title: str
    file: str
    instruction: str
    parse: Callable[[int, object], Question]
    fetch: Callable[[_Hub], Iterable[object]]


def questions_file(task: Task, data: Path | None = None) -> Path | None:
    """Returns the file of the questions in ``data`` or else in CEREBELLUM_DATA, or None where there is no
    folder.

    The plain file is taken where there is no gzipped one. With None the questions come from the Hub.
    """
    folder = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if folder is None:
        return None
    path = folder / task.file
    plain = path.with_suffix("")
    return plain if not path.exists() and plain.exists() else path


def load_questions(task: Task, data: Path | None = None) -> list[Question]:
    """Returns every question in the benchmark's order, from its file or else from the Hub.

    Raises BadInput where neither can be read, or the rows are not this benchmark's.
    """
    path = questions_file(task, data)
    rows = _read_rows(path) if path else _fetch_rows(task)
    try:
        return [task.parse(index, row) for index, row in enumerate(rows)]
    except (msgspec.ValidationError, ValueError) as error:
        where = path or "the Hub"
        raise BadInput(f"{where}: not the questions of {task.name} ({error}); fetch them again") from error


def choose(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    """Returns ``limit`` questions (0: all) in a seeded order, so that a larger limit only adds questions.

    The first N of a benchmark are not a sample of it: HellaSwag's come from one of its two sources, MMLU's
    from one subject.
    """
    order = np.random.default_rng(seed).permutation(len(questions))
    return [questions[i] for i in order[: limit or len(questions)]]


def letters(question: Question) -> str:
    """Returns ``ABCD``, or as many letters as there are options; ARC's numbers are letters here too."""
    return string.ascii_uppercase[: len(question.options)]


def rotated(question: Question, turns: int) -> tuple[str, ...]:
    """Returns the options, each moved ``turns`` places up: option i is shown at place (i - turns) mod n."""
    turns %= len(question.options)
    return question.options[turns:] + question.options[:turns]


def letter_prompt(task: Task, question: Question, vocabulary: Vocabulary, turns: int = 0) -> str:
    """Returns the question with lettered options, up to where the letter comes, in the model's own chat
    format.
    """
    shown = zip(letters(question), rotated(question, turns), strict=True)
    options = "\n".join(f"{letter}. {option.strip()}" for letter, option in shown)
    instruction = f"{task.instruction} Reply with the letter of the right option only."
    text = f"{instruction}\n\n{question.stem}\n\n{options}"
    if vocabulary.chat_template is None:
        return f"{text}\n\nAnswer:"
    return render_chat(vocabulary, [{"role": "user", "content": text}])


_LETTER_PATTERNS = (
    r"^\W*([{}])(?![\w'])(?! [a-z])",  # "B", "(B)", "**B.** because", but not "A planet turns"
    r"(?i:answer|option|choice)(?i:\s+is|\s*:)*\W*\b([{}])\b(?!')(?! [a-z])",  # "The answer is: B"
    r"\\boxed\{{\W*([{}])\b",
    r"(?m)^\W*([{}])[.):]",  # a line that begins with "B."
)


def read_letter(text: str, allowed: str) -> str | None:
    """Returns the letter that generated text answers with, or None where it names none of the allowed.

    Every letter has the same rules: what could be the article "A" or the pronoun "I" is no answer.
    """
    visible = re.sub(r"(?s)<think>.*?(</think>|$)", "", text).replace("```", " ").strip()
    for pattern in _LETTER_PATTERNS:
        found = re.search(pattern.format(allowed), visible)
        if found:
            return found[1]
    return None


def _read_rows(path: Path) -> list[object]:
    """Returns the rows of a file of JSON lines, gzipped or not."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; give --data DIR with the benchmark files") from error
    except (OSError, EOFError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); fetch it again") from error


def _fetch_rows(task: Task) -> Iterable[object]:
    try:
        import datasets
    except ImportError as error:
        raise BadInput(
            f"{task.name}: no questions at hand; give --data DIR or set {DATA_VARIABLE}, "
            "or pip install 'cerebellum-gguf[bench]' to fetch them"
        ) from error
    try:
        return list(task.fetch(datasets))
    except Exception as error:  # whatever a network or the Hub may raise
        raise BadInput(f"{task.name}: cannot be fetched ({error}); give --data DIR") from error


def _hellaswag_text(text: str) -> str:
    """Returns a text with lm-evaluation-harness's cleaning: the brackets are left over from the
    WikiHow part.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


class _HellaswagRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what is used of a row of HellaSwag; ``line`` is where a sample's row stood in the whole file."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    label: int
    line: int | None = None


def _hellaswag(index: int, raw: object) -> Question:
    row = msgspec.convert(raw, _HellaswagRow, strict=False)
    cleaned = _hellaswag_text(f"{row.activity_label}: {row.ctx_a} {row.ctx_b.capitalize()}")
    return Question(
        id=f"hellaswag/{index if row.line is None else row.line}",  # the rows' own `ind` is not unique
        subject=None,
        stem=cleaned,
        context=cleaned,
        options=tuple(_hellaswag_text(ending) for ending in row.endings),
        golds={ORIGINAL: row.label},
    )


class _ArcRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what is used of a row of ARC-Challenge; ``answer`` counts the choices from 0."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int


def _arc(_index: int, raw: object) -> Question:
    row = msgspec.convert(raw, _ArcRow, strict=False)
    return Question(
        id=row.id,
        subject=None,
        stem=row.question,
        context=f"Question: {row.question}\nAnswer:",
        options=row.choices,
        golds={ORIGINAL: row.answer},
    )


class _MmluRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what is used of a row of MMLU-Redux; answers count the choices from 0.

    ``error_type`` is the verdict of its reviewers, ``correct_answer_idx`` the places they hold right, and
    ``cerebellum_idx`` is there for the 2,400 questions of an earlier published evaluation.
    """

    id: str
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int
    error_type: str
    correct_answer_idx: tuple[int, ...] | None
    cerebellum_idx: int | None = None


def _mmlu_redux(_index: int, raw: object) -> Question:
    row = msgspec.convert(raw, _MmluRow, strict=False)
    golds = {ORIGINAL: row.answer}
    corrected = _corrected(row)
    if corrected is not None:
        golds[CORRECTED] = corrected
    if row.cerebellum_idx is not None:
        golds[PUBLISHED] = row.answer
    stem = row.question.strip()
    return Question(
        id=row.id,
        subject=row.subject,
        stem=stem,
        context=f"Question: {stem}\nAnswer:",
        options=row.choices,
        golds=golds,
    )


def _corrected(row: _MmluRow) -> int | None:
    """Returns the label after MMLU-Redux's review, or None for a question found broken or left open."""
    if row.error_type == "ok":
        return row.answer
    found = row.correct_answer_idx or ()
    return found[0] if row.error_type == "wrong_groundtruth" and len(found) == 1 else None


class _Hub(Protocol):
    """Describes what is used of the `datasets` library."""

    def load_dataset(self, path: str, name: str | None = None, *, split: str) -> Iterable[object]: ...

    def get_dataset_config_names(self, path: str) -> list[str]: ...


def _fetch_hellaswag(hub: _Hub) -> Iterable[object]:
    return hub.load_dataset("Rowan/hellaswag", split="validation")


class _HubChoices(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the options of a row of ARC on the Hub, and the letter or number before each."""

    text: tuple[str, ...]
    label: tuple[str, ...]


class _HubArcRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what is used of a row of ARC on the Hub, under its names there."""

    id: str
    question: str
    choices: _HubChoices
    answerKey: str


def _fetch_arc(hub: _Hub) -> Iterator[object]:
    for raw in hub.load_dataset("allenai/ai2_arc", "ARC-Challenge", split="test"):
        row = msgspec.convert(raw, _HubArcRow, strict=False)
        yield {
            "id": row.id,
            "question": row.question,
            "choices": row.choices.text,
            "answer": row.choices.label.index(row.answerKey),
        }


class _HubMmluRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what is used of a row of MMLU-Redux on the Hub; ``correct_answer`` is the reviewers' text."""

    question: str
    choices: tuple[str, ...]
    answer: int
    error_type: str
    correct_answer: str | int | None = None


def _fetch_mmlu_redux(hub: _Hub) -> Iterator[object]:
    for subject in hub.get_dataset_config_names(_MMLU_REDUX):
        for index, raw in enumerate(hub.load_dataset(_MMLU_REDUX, subject, split="test")):
            row = msgspec.convert(raw, _HubMmluRow, strict=False)
            place = _reviewed_place(str(row.correct_answer or "").strip())
            yield {
                "id": f"{subject}/{index}",
                "subject": subject,
                "question": row.question,
                "choices": row.choices,
                "answer": row.answer,
                "error_type": row.error_type,
                "correct_answer_idx": None if place is None else [place],
            }


def _reviewed_place(text: str) -> int | None:
    """Returns the place that a reviewer names by one letter or one digit, or None for anything else."""
    if text in tuple("ABCD"):
        return "ABCD".index(text)
    return int(text) if text in tuple("0123") else None


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="hellaswag",
            title="HellaSwag",
            file="hellaswag_val.jsonl.gz",
            instruction="Choose the ending that continues the text best.",
            parse=_hellaswag,
            fetch=_fetch_hellaswag,
        ),
        Task(
            name="arc_challenge",
            title="ARC-Challenge",
            file="arc_challenge_test.jsonl.gz",
            instruction="Answer the science question.",
            parse=_arc,
            fetch=_fetch_arc,
        ),
        Task(
            name="mmlu_redux",
            title="MMLU-Redux",
            file="mmlu_redux.jsonl.gz",
            instruction="Answer the question.",
            parse=_mmlu_redux,
            fetch=_fetch_mmlu_redux,
        ),
    )
}


def task_named(name: str) -> Task:
    """Returns the benchmark of that name; BadInput lists the names where there is none."""
    if name not in TASKS:
        raise BadInput(f"--tasks {name}: no such benchmark; there are {', '.join(TASKS)}")
    return TASKS[name]
