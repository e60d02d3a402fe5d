"""Questions a second, and the same answers: the bench against stock llama-perplexity, question by question.

    python benchmarks/questions.py MODEL --data DIR --llama-perplexity BIN [--task hellaswag] [--limit 400]

Every run answers the same questions: the bench in batches, one question at a time, one option at a
time, and llama-perplexity's --hellaswag or --multiple-choice with its defaults and with questions
batched. llama-perplexity prints a running mean, so which of its answers were right can be told; where
two runs disagree, the bench's own margin says by how much the answer was decided. JSON goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cerebellum.bench.answers import Exam, answers, prepare
from cerebellum.bench.artifacts import LoglikelihoodAnswer
from cerebellum.bench.tasks import LOGLIKELIHOOD, TASKS, Question, choose, load_questions
from cerebellum.engine.asking import Ask
from cerebellum.llama.asker import Room, Sequences, open_asker
from cerebellum.llama.native import EngineSettings, LlamaEngine

ROOM = re.compile(r"(\d+)x(\d+)")  # cells of the context x tokens of a decode
STOCK = {
    "stock": [],  # one question a decode, four sequences
    "stock_np128": ["-np", "128", "-c", "16"],  # 2,048 cells for up to 32 questions
    "stock_np128_8k": ["-np", "128", "-c", "64", "-b", "2048", "-ub", "2048"],
}


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One run: which questions it had right, in the order of the questions, and what it cost."""

    name: str
    right: tuple[bool, ...]
    seconds: float
    details: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        n = len(self.right)
        rate = round(n / self.seconds, 2)
        return {
            "questions": n,
            "right": sum(self.right),
            "seconds": round(self.seconds, 2),
            "per_second": rate,
        } | self.details


def main() -> None:
    args = parse(sys.argv[1:])
    task = TASKS[args.task]
    questions = [q for q in load_questions(task, args.data) if stock_can_read(q)]
    exam = Exam(task=task, protocol=LOGLIKELIHOOD, questions=tuple(choose(questions, args.limit, 1)))
    runs, records = [], {}
    for answered, found in every_run(args, exam):
        print(answered.name, answered.as_json(), file=sys.stderr, flush=True)
        runs.append(answered)
        records = records or found
    found = {
        "model": args.model.name,
        "task": args.task,
        "gpu_layers": args.gpu_layers,
        "runs": {run.name: run.as_json() for run in runs},
        "disagreements": [differences(exam, records, a, b) for a, b in pairs(runs)],
    }
    print(json.dumps(found, indent=1))


def stock_can_read(question: Question) -> bool:
    """Four options, none of them the beginning of all: --multiple-choice reads past the end of such."""
    options = question.options
    return len(options) == 4 and not any(all(o.startswith(start) for o in options) for start in options)


def pairs(runs: Sequence[Answered]) -> list[tuple[Answered, Answered]]:
    """The bench's first run with each other run, and stock llama.cpp's with each other."""
    stocks = [run for run in runs if run.name in STOCK]
    return [(runs[0], run) for run in runs[1:]] + [(stocks[0], run) for run in stocks[1:]]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", choices=list(TASKS), default="hellaswag")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--slow-limit", type=int, default=40, help="questions for the one-at-a-time runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--room", nargs="*", default=[], help="more runs: CELLSxPIECE, such as 8192x2048")
    parser.add_argument("--llama-perplexity", type=Path)
    parser.add_argument("--stock", nargs="*", choices=list(STOCK), default=["stock", "stock_np128"])
    return parser.parse_args(arguments)


Records = dict[str, LoglikelihoodAnswer]


def every_run(args: argparse.Namespace, exam: Exam) -> Iterator[tuple[Answered, Records]]:
    engine = LlamaEngine(EngineSettings(threads=args.threads, gpu_layers=args.gpu_layers))
    rooms = {"ours": Room()} | {f"ours_{text}": room(text) for text in args.room}
    for name, size in rooms.items():
        yield ours(name, engine, args.model, exam, size)
    few = Exam(task=exam.task, protocol=exam.protocol, questions=exam.questions[: args.slow_limit])
    if few.questions:
        yield one_at_a_time("one_question_at_a_time", engine, args.model, few, split=False), {}
        yield one_at_a_time("one_option_at_a_time", engine, args.model, few, split=True), {}
    if args.llama_perplexity:
        for name in args.stock:
            yield stock(name, args, exam.questions), {}


def room(text: str) -> Room:
    found = ROOM.fullmatch(text)
    if not found:
        raise SystemExit(f"--room {text}: wanted CELLSxPIECE, such as 8192x2048")
    return Room(cells=int(found[1]), piece=int(found[2]))


def ours(name: str, engine: LlamaEngine, model: Path, exam: Exam, size: Room) -> tuple[Answered, Records]:
    started = time.perf_counter()
    with open_asker(engine, [model], size) as asker:
        loaded = time.perf_counter()
        prepared = [prepare(asker, exam, question) for question in exam.questions]
        ready = time.perf_counter()
        found = answers(asker, exam, prepared)
        records = {r.id: r for r in found if isinstance(r, LoglikelihoodAnswer)}
        done = time.perf_counter()
    metrics = ("acc", "acc_norm", "acc_token")
    return Answered(
        name=name,
        right=tuple(bool(records[q.id].correct["acc_token"]) for q in exam.questions),
        seconds=done - started,
        details={
            "load_seconds": round(loaded - started, 2),
            "tokenize_seconds": round(ready - loaded, 2),
            "decoded_tokens": asker.decoded_tokens,
            **{m: sum(r.correct[m] for r in records.values()) for m in metrics},
        },
    ), records


def one_at_a_time(name: str, engine: LlamaEngine, model: Path, exam: Exam, *, split: bool) -> Answered:
    """A question a call; with ``split``, each option with its own decode of the prompt as well."""
    started = time.perf_counter()
    with open_asker(engine, [model], Room(cells=512, sequences=8)) as asker:
        loaded = time.perf_counter()
        right = tuple(_asked_alone(asker, exam, question, split) for question in exam.questions)
        tokens = asker.decoded_tokens
    seconds = time.perf_counter() - started
    details = {"load_seconds": round(loaded - started, 2), "decoded_tokens": tokens}
    return Answered(name=name, right=right, seconds=seconds, details=details)


def _asked_alone(asker: Sequences, exam: Exam, question: Question, split: bool) -> bool:
    (ask,) = prepare(asker, exam, question).asks
    alone = [Ask(prompt=ask.prompt, endings=(ending,)) for ending in ask.endings] if split else [ask]
    endings = [ending for single in alone for _, reply in asker.score([single]) for ending in reply.endings]
    shared = _shared_tokens(ask)
    means = [np.mean(ending.log_probs[shared:] or ending.log_probs) for ending in endings]
    return int(np.argmax(means)) == question.golds["original"]


def _shared_tokens(ask: Ask) -> int:
    same = [len(set(tokens)) == 1 for tokens in zip(*ask.endings, strict=False)]
    return same.index(False) if False in same else len(same)


def differences(exam: Exam, records: Records, a: Answered, b: Answered) -> dict[str, Any]:
    """On the questions that both had: how many they disagree on, and how near each of those is."""
    n = min(len(a.right), len(b.right))
    apart = [q for q, x, y in zip(exam.questions[:n], a.right, b.right, strict=False) if x != y]
    gaps = sorted(round(margin(records[q.id]), 4) for q in apart)
    everywhere = [margin(records[q.id]) for q in exam.questions[:n]]
    return {
        "runs": [a.name, b.name],
        "questions": n,
        "right": [sum(a.right[:n]), sum(b.right[:n])],
        "only_one_right": len(apart),
        "margins_nats_per_token": gaps,
        "questions_nearer_than_largest": sum(m <= max(gaps, default=-1.0) for m in everywhere),
    }


def margin(record: LoglikelihoodAnswer) -> float:
    """The bench's best ending less its second best, nats per token: how clear the answer is."""
    shared = record.shared_tokens
    means = sorted(float(np.mean(row[shared:] or row)) for row in record.token_log_probs)
    return means[-1] - means[-2]


def stock(name: str, args: argparse.Namespace, questions: Sequence[Question]) -> Answered:
    """llama-perplexity's answers, from the running mean that it prints.

    Its log is written by another thread and now and then loses its last lines, so it gets three tries.
    """
    with tempfile.TemporaryDirectory() as folder:
        write, places = FORMATS.get(args.task, (write_binary, list[int]))
        mode = write(Path(folder) / "questions", questions)
        engine = ["-t", str(args.threads), "-ngl", str(args.gpu_layers)]
        command = [str(args.llama_perplexity), "-m", str(args.model), *engine, *mode, *STOCK[name]]
        for _ in range(3):
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            seconds = time.perf_counter() - started
            right = right_from(done.stdout)
            if len(right) == len(questions):
                break
        else:
            raise SystemExit(f"{' '.join(command)}: {done.stderr[-800:]}")
    in_order = dict(zip(places(range(len(questions))), right, strict=True))
    details = {"command": " ".join([*engine, mode[-1], *STOCK[name]])}
    return Answered(
        name=name, right=tuple(in_order[i] for i in range(len(questions))), seconds=seconds, details=details
    )


def right_from(output: str) -> list[bool]:
    """Lines of "number, percent so far" -> whether each was right."""
    rows = [(int(n), float(p)) for n, p in re.findall(r"^(\d+)\t\s*([\d.]+)", output, re.M)]
    counts = [0] + [round(n * percent / 100) for n, percent in rows]
    return [bool(after - before) for before, after in pairwise(counts)]


def hellaswag_order(places: Sequence[int]) -> list[int]:
    """The order in which --hellaswag takes its questions: std::mt19937(1) and libstdc++'s distribution."""
    generator, left, order = np.random.RandomState(1), list(places), []
    while left:
        order.append(left.pop(_uniform(generator, len(left))))
    return order


def _uniform(generator: np.random.RandomState, n: int) -> int:
    """Lemire's method, as std::uniform_int_distribution(0, n - 1) does it from 32 random bits."""
    while True:
        product = int(generator.randint(0, 2**32, dtype=np.uint32)) * n
        if (product & 0xFFFFFFFF) >= 2**32 % n:
            return product >> 32


def write_hellaswag(path: Path, questions: Sequence[Question]) -> list[str]:
    lines = []
    for q in questions:
        lines += [q.context, str(q.golds["original"]), *q.options]
    path.write_text("\n".join(line.replace("\n", " ") for line in lines) + "\n", encoding="utf-8")
    return ["-f", str(path), "--hellaswag-tasks", str(len(questions)), "--hellaswag"]


def write_binary(path: Path, questions: Sequence[Question]) -> list[str]:
    tasks = [_binary(q) for q in questions]
    head = struct.pack("<I", len(tasks))
    places = np.cumsum([len(head) + 4 * len(tasks), *map(len, tasks)])[:-1]
    path.write_bytes(head + struct.pack(f"<{len(places)}I", *places.tolist()) + b"".join(tasks))
    return ["-bf", str(path), "--multiple-choice"]


def _binary(question: Question) -> bytes:
    """struct multiple_choice_task: question, mc1 (answers, labels), an empty mc2."""
    gold = question.golds["original"]
    labels = [int(i == gold) for i in range(len(question.options))]
    first = struct.pack("<I", len(labels)) + b"".join(map(_text, question.options))
    return _text(question.context) + first + struct.pack(f"<{len(labels)}i", *labels) + struct.pack("<I", 0)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw


Format = tuple[Callable[[Path, Sequence[Question]], list[str]], Callable[[Sequence[int]], list[int]]]
FORMATS: dict[str, Format] = {"hellaswag": (write_hellaswag, hellaswag_order)}


if __name__ == "__main__":
    main()
