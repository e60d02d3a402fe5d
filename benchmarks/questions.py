"""Questions a second, and the same scores: the bench against one question at a time and llama-perplexity.

    python benchmarks/questions.py MODEL --data DIR --llama-perplexity BIN [--task hellaswag] [--limit 400]

Everything runs on the same questions, in the same process or right after it. Stock llama.cpp gets its
own file formats: --hellaswag six lines a question, --multiple-choice a binary file.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cerebellum.answers import Exam, answers, prepare
from cerebellum.llama.asking import Ask
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.llama.sequences import Room, Sequences, open_asker
from cerebellum.tasks import LOGLIKELIHOOD, TASKS, Question, choose, load_questions

STOCK_CTX = 512


def main() -> None:
    args = parse(sys.argv[1:])
    task = TASKS[args.task]
    questions = [q for q in load_questions(task, args.data) if len(q.options) == 4]
    chosen = tuple(choose(questions, args.limit, 1))
    exam = Exam(task=task, protocol=LOGLIKELIHOOD, questions=chosen)
    found: dict[str, Any] = {"model": args.model.name, "task": args.task, "questions": len(chosen)}
    engine = LlamaEngine(EngineSettings(threads=args.threads))
    found["ours"] = timed(lambda: ours(engine, args, exam), len(chosen))
    print("ours", found["ours"], file=sys.stderr)
    few = Exam(task=task, protocol=LOGLIKELIHOOD, questions=chosen[: args.slow_limit])
    if few.questions:
        for name, split in (("one_question_at_a_time", False), ("one_option_at_a_time", True)):
            found[name] = timed(
                lambda split=split: one_at_a_time(engine, args, few, split=split), args.slow_limit
            )
            print(name, found[name], file=sys.stderr)
    if args.llama_perplexity:
        for name, extra in (("stock", []), ("stock_np128", ["-np", "128", "-c", "16"])):
            if name in args.stock:
                found[name] = timed(lambda extra=extra: stock(args, chosen, extra), len(chosen))
                print(name, found[name], file=sys.stderr)
    print(json.dumps(found, indent=2))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", choices=list(TASKS), default="hellaswag")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--slow-limit", type=int, default=40, help="questions for the one-at-a-time runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=int, help="of the context [default: what suits the machine]")
    parser.add_argument("--llama-perplexity", type=Path)
    parser.add_argument("--stock", nargs="*", default=["stock", "stock_np128"])
    return parser.parse_args(arguments)


def timed(work: Callable[[], dict[str, Any]], n: int) -> dict[str, Any]:
    started = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - started
    return found | {"questions": n, "seconds": round(seconds, 2), "per_second": round(n / seconds, 2)}


def ours(engine: LlamaEngine, args: argparse.Namespace, exam: Exam) -> dict[str, Any]:
    with open_asker(engine, [args.model], Room(cells=args.cells)) as asker:
        prepared = [prepare(asker, exam, question) for question in exam.questions]
        records = list(answers(asker, exam, prepared))
        metrics = ("acc", "acc_norm", "acc_token")
        right = {metric: sum(bool(r["correct"][metric]) for r in records) for metric in metrics}
        return {"right": right, "decoded_tokens": asker.decoded_tokens}


def one_at_a_time(
    engine: LlamaEngine, args: argparse.Namespace, exam: Exam, *, split: bool
) -> dict[str, Any]:
    """A question a call; with ``split``, each option with its own decode of the prompt as well."""
    with open_asker(engine, [args.model], Room(cells=STOCK_CTX, sequences=8)) as asker:
        for question in exam.questions:
            for ask in prepare(asker, exam, question).asks:
                _score(asker, ask, split)
        return {"decoded_tokens": asker.decoded_tokens}


def _score(asker: Sequences, ask: Ask, split: bool) -> None:
    alone = [Ask(prompt=ask.prompt, endings=(ending,)) for ending in ask.endings] if split else [ask]
    for single in alone:
        list(asker.score([single]))


def stock(args: argparse.Namespace, questions: Sequence[Question], extra: Sequence[str]) -> dict[str, Any]:
    """llama-perplexity's own score, from the last line that it prints."""
    if extra:  # one context of 2048 cells for up to 128 sequences, as many as ours has
        extra = ["-np", "128", "-c", str(max(16, 2048 // 128))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions"
        mode = write_hellaswag(path, questions) if args.task == "hellaswag" else write_binary(path, questions)
        command = [str(args.llama_perplexity), "-m", str(args.model), "-t", str(args.threads), *mode, *extra]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = re.findall(r"^(\d+)\t\s*([\d.]+)", done.stdout, re.M)
    if done.returncode or not rows:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-500:]}")
    n, percent = rows[-1]
    return {
        "right": round(int(n) * float(percent) / 100),
        "answered": int(n),
        "command": " ".join(command[3:]),
    }


def write_hellaswag(path: Path, questions: Sequence[Question]) -> list[str]:
    lines = []
    for q in questions:
        lines += [q.context, str(q.golds["original"]), *q.options]
    path.write_text("\n".join(line.replace("\n", " ") for line in lines) + "\n", encoding="utf-8")
    return ["-f", str(path), "--hellaswag", "--hellaswag-tasks", str(len(questions))]


def write_binary(path: Path, questions: Sequence[Question]) -> list[str]:
    tasks = [_binary(q) for q in questions]
    head = struct.pack("<I", len(tasks))
    place, places = len(head) + 4 * len(tasks), []
    for task in tasks:
        places.append(place)
        place += len(task)
    path.write_bytes(head + struct.pack(f"<{len(places)}I", *places) + b"".join(tasks))
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


if __name__ == "__main__":
    main()
