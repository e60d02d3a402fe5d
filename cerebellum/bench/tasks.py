"""Question benchmarks: where the questions come from, and what they look like in each protocol.

letter          the question with lettered options through the model's chat template (a plain prompt
                where it has none); the answer is the likeliest letter. What model cards publish.
loglikelihood   each option as a continuation of the question, as lm-evaluation-harness defines
                hellaswag, arc_challenge and mmlu's continuation variant. For models without chat.
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
from typing import Any

import numpy as np

from cerebellum.bench.chat import render_chat
from cerebellum.engine.asking import Vocabulary
from cerebellum.errors import BadInput

LETTER, LOGLIKELIHOOD = "letter", "loglikelihood"
PROTOCOLS = (LETTER, LOGLIKELIHOOD)
ORIGINAL, CORRECTED, PUBLISHED = "original", "corrected", "published_subset"

PROMPT_VERSION = 1  # 1: first release. Part of the key of every answer; bump it with any wording below
DATA_VARIABLE = "CEREBELLUM_DATA"
SAMPLES = Path(__file__).parents[1] / "data" / "benchmarks"

Row = Mapping[str, Any]
_MMLU_REDUX = "edinburgh-dawg/mmlu-redux-2.0"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question. ``golds`` holds the right option for each set of labels that covers it.

    ``stem`` is the question for people and for the letter protocol, ``context`` what the options
    continue in the loglikelihood protocol.
    """

    id: str
    subject: str | None
    stem: str
    context: str
    options: tuple[str, ...]
    golds: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark: its file, its place on the Hub, how a row becomes a question."""

    name: str
    title: str
    file: str
    instruction: str
    parse: Callable[[int, Row], Question]
    fetch: Callable[[Any], Iterable[Row]]


def questions_file(task: Task, data: Path | None = None) -> Path | None:
    """The file in ``data``, else in CEREBELLUM_DATA, plain where there is no gzipped one; None: the Hub."""
    folder = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if folder is None:
        return None
    path = folder / task.file
    plain = path.with_suffix("")
    return plain if not path.exists() and plain.exists() else path


def load_questions(task: Task, data: Path | None = None) -> list[Question]:
    """Every question, in the benchmark's order: from its file, else from the Hub."""
    path = questions_file(task, data)
    rows = _read_rows(path) if path else _fetch_rows(task)
    try:
        return [task.parse(index, row) for index, row in enumerate(rows)]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        where = path or "the Hub"
        raise BadInput(f"{where}: not the questions of {task.name} ({error!r}); fetch them again") from error


def choose(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    """``limit`` questions (0: all) in a seeded order, so that a larger limit only adds questions.

    The first N of a benchmark are not a sample of it: HellaSwag's come from one of its two sources,
    MMLU's from one subject.
    """
    order = np.random.default_rng(seed).permutation(len(questions))
    return [questions[i] for i in order[: limit or len(questions)]]


def letters(question: Question) -> str:
    """``ABCD``, or as many as there are options; ARC's numbers are letters here too."""
    return string.ascii_uppercase[: len(question.options)]


def rotated(question: Question, turns: int) -> tuple[str, ...]:
    """The options, each moved ``turns`` places up: option i is shown at place (i - turns) mod n."""
    turns %= len(question.options)
    return question.options[turns:] + question.options[:turns]


def letter_prompt(task: Task, question: Question, vocabulary: Vocabulary, turns: int = 0) -> str:
    """The question with lettered options, up to where the letter comes."""
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
    """The letter that generated text answers with; None where it names none of the allowed.

    Every letter has the same rules: what could be the article "A" or the pronoun "I" is no answer.
    """
    visible = re.sub(r"(?s)<think>.*?(</think>|$)", "", text).replace("```", " ").strip()
    for pattern in _LETTER_PATTERNS:
        found = re.search(pattern.format(allowed), visible)
        if found:
            return found[1]
    return None


def _read_rows(path: Path) -> list[Row]:
    """JSON lines, gzipped or not."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; give --data DIR with the benchmark files") from error
    except (OSError, EOFError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); fetch it again") from error


def _fetch_rows(task: Task) -> Iterable[Row]:
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
    """lm-evaluation-harness's cleaning: brackets are left over from the WikiHow part."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(index: int, row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    cleaned = _hellaswag_text(context)
    return Question(
        id=f"hellaswag/{row.get('line', index)}",  # `ind` is not unique; a sample says its lines
        subject=None,
        stem=cleaned,
        context=cleaned,
        options=tuple(_hellaswag_text(ending) for ending in row["endings"]),
        golds={ORIGINAL: int(row["label"])},
    )


def _arc(_index: int, row: Row) -> Question:
    return Question(
        id=str(row["id"]),
        subject=None,
        stem=row["question"],
        context=f"Question: {row['question']}\nAnswer:",
        options=tuple(row["choices"]),
        golds={ORIGINAL: int(row["answer"])},
    )


def _mmlu_redux(_index: int, row: Row) -> Question:
    golds = {ORIGINAL: int(row["answer"])}
    corrected = _corrected(row)
    if corrected is not None:
        golds[CORRECTED] = corrected
    if row.get("cerebellum_idx") is not None:
        golds[PUBLISHED] = int(row["answer"])
    return Question(
        id=str(row["id"]),
        subject=str(row["subject"]),
        stem=row["question"].strip(),
        context=f"Question: {row['question'].strip()}\nAnswer:",
        options=tuple(row["choices"]),
        golds=golds,
    )


def _corrected(row: Row) -> int | None:
    """The label after MMLU-Redux's review; None for a question that it found broken or left open."""
    if row["error_type"] == "ok":
        return int(row["answer"])
    found = row["correct_answer_idx"]
    if row["error_type"] == "wrong_groundtruth" and found and len(found) == 1:
        return int(found[0])
    return None


def _fetch_hellaswag(hub: Any) -> Iterator[Row]:
    yield from hub.load_dataset("Rowan/hellaswag", split="validation")


def _fetch_arc(hub: Any) -> Iterator[Row]:
    for row in hub.load_dataset("allenai/ai2_arc", "ARC-Challenge", split="test"):
        labels = list(row["choices"]["label"])
        yield {
            "id": row["id"],
            "question": row["question"],
            "choices": list(row["choices"]["text"]),
            "answer": labels.index(row["answerKey"]),
        }


def _fetch_mmlu_redux(hub: Any) -> Iterator[Row]:
    for subject in hub.get_dataset_config_names(_MMLU_REDUX):
        for index, row in enumerate(hub.load_dataset(_MMLU_REDUX, subject, split="test")):
            raw = str(row.get("correct_answer") or "").strip()
            place = "ABCD".find(raw) if raw in tuple("ABCD") else (int(raw) if raw in tuple("0123") else None)
            yield {
                "id": f"{subject}/{index}",
                "subject": subject,
                "question": row["question"],
                "choices": list(row["choices"]),
                "answer": row["answer"],
                "error_type": row["error_type"],
                "correct_answer_idx": None if place is None else [place],
            }


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
    if name not in TASKS:
        raise BadInput(f"--tasks {name}: no such benchmark; there are {', '.join(TASKS)}")
    return TASKS[name]
