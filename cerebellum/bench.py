"""Question benchmarks, paired: every model answers the same questions, every answer is kept.

questions -> prompts -> asks -> replies -> one record a question (evidence) -> scores, pairs, audit
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cerebellum.audit import audit, is_mojibake
from cerebellum.errors import BadInput
from cerebellum.evidence import Evidence, Record
from cerebellum.llama.asking import Ask, Asker, Reply, TokenIds, shared_prefix
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.llama.sequences import open_asker
from cerebellum.progress import Reporter
from cerebellum.source import open_source
from cerebellum.stats.binomial import Proportion, paired, wilson
from cerebellum.tasks import (
    LETTER,
    ORIGINAL,
    PROMPT_VERSION,
    PROTOCOLS,
    Question,
    Task,
    choose,
    letter_prompt,
    letters,
    load_questions,
    read_letter,
    task_named,
)

FORMAT = 1  # 1: first release of bench.json and of the evidence lines
_BLOCK = 512  # questions prepared and, where asked for, generated together

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


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to be asked: its files, first the one with the metadata."""

    name: str
    paths: tuple[Path, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Exam:
    """One benchmark in one protocol, with the questions chosen."""

    task: Task
    protocol: str
    questions: tuple[Question, ...]
    rotations: int = 1
    generate: int = 0

    @property
    def name(self) -> str:
        return f"{self.task.name}.{self.protocol}"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A question as the model gets it: one ask for each rotation or, by loglikelihood, a single one."""

    question: Question
    prompt_sha256: str
    asks: tuple[Ask, ...]
    truncated: bool
    mojibake: bool
    letter_endings: tuple[tuple[int, ...], ...] = ()
    """For each letter, which endings of an ask spell it (with and without a space)."""


@dataclass
class Sitting:
    """What one model did in one exam: its records in the exam's order, and the work of this session."""

    exam: Exam
    candidate: Candidate
    evidence: Path
    records: list[Record] = field(default_factory=list)
    asked: int = 0
    seconds: float = 0.0


def bench(
    candidates: Sequence[Candidate], request: Request, opener: Opener, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """bench.json: the first candidate against each of the others, on the same questions."""
    exams = make_exams(request)
    sittings: list[Sitting] = []
    for candidate in candidates:
        with opener(candidate.paths) as asker:
            sittings += [sit(asker, exam, candidate, folder, reporter) for exam in exams]
    return bench_json(candidates, request, sittings)


def bench_files(
    models: Sequence[Path], request: Request, settings: EngineSettings, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """The first file against each of the others."""
    return bench([candidate_from(m) for m in models], request, llama_opener(settings), folder, reporter)


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


def answers(asker: Asker, exam: Exam, prepared: Sequence[Prepared]) -> Iterator[Record]:
    """A record for every question, in the order in which they are done."""
    for start in range(0, len(prepared), _BLOCK):
        block = prepared[start : start + _BLOCK]
        raw = _generated(asker, exam, block)
        asks = [(number, ask) for number, p in enumerate(block) for ask in p.asks]
        first = np.cumsum([0] + [len(p.asks) for p in block])
        replies: dict[int, dict[int, Reply]] = defaultdict(dict)
        for index, reply in asker.score([ask for _, ask in asks]):
            number = asks[index][0]
            replies[number][index - int(first[number])] = reply
            if len(replies[number]) == len(block[number].asks):
                in_order = [reply for _, reply in sorted(replies.pop(number).items())]
                yield record_of(asker, exam, block[number], in_order, raw.get(number))


def _generated(asker: Asker, exam: Exam, block: Sequence[Prepared]) -> dict[int, str]:
    if not exam.generate:
        return {}
    return dict(asker.generate([p.asks[0].prompt for p in block], exam.generate))


def prepare(asker: Asker, exam: Exam, question: Question) -> Prepared:
    if exam.protocol == LETTER:
        return _prepare_letter(asker, exam, question)
    return _prepare_loglikelihood(asker, question)


def _prepare_letter(asker: Asker, exam: Exam, question: Question) -> Prepared:
    by_letter = letter_tokens(asker, letters(question))
    flat = [token for tokens in by_letter for token in tokens]
    places = np.cumsum([0] + [len(tokens) for tokens in by_letter])
    turns = range(min(exam.rotations, len(question.options)))
    texts = [letter_prompt(exam.task, question, asker.vocabulary, turn) for turn in turns]
    chat = asker.vocabulary.chat_template is not None
    prompts = [asker.tokenize(text, parse_special=chat) for text in texts]
    asks = [
        Ask(prompt=prompt[-asker.context_length :], endings=tuple((token,) for token in flat))
        for prompt in prompts
    ]
    return Prepared(
        question=question,
        prompt_sha256=_sha256(texts),
        asks=tuple(asks),
        truncated=any(len(prompt) > asker.context_length for prompt in prompts),
        mojibake=any(map(is_mojibake, texts)),
        letter_endings=tuple(tuple(range(int(a), int(b))) for a, b in pairwise(places)),
    )


def letter_tokens(asker: Asker, allowed: str) -> list[tuple[int, ...]]:
    """For each letter the single tokens that spell it: alone, after a space, after a line break."""
    found = []
    for letter in allowed:
        last = {asker.tokenize(before + letter, add_special=False)[-1] for before in ("", " ", "\n")}
        found.append(tuple(sorted(token for token in last if asker.text((token,)).strip() == letter)))
        if not found[-1]:
            raise BadInput(
                f"the vocabulary has no token for the letter {letter}; use --protocol loglikelihood"
            )
    return found


def _prepare_loglikelihood(asker: Asker, question: Question) -> Prepared:
    pairs = [encode_pair(asker, question.context, f" {option}") for option in question.options]
    prompt, longest = pairs[0][0], max(len(ending) for _, ending in pairs)
    room = max(1, asker.context_length - longest + 1)
    ask = Ask(prompt=prompt[-room:], endings=tuple(ending for _, ending in pairs))
    text = [question.context, *question.options]
    return Prepared(
        question=question,
        prompt_sha256=_sha256(text),
        asks=(ask,),
        truncated=len(prompt) > room,
        mojibake=any(map(is_mojibake, text)),
    )


def encode_pair(
    asker: Asker, context: str, continuation: str, *, parse_special: bool = False
) -> tuple[TokenIds, TokenIds]:
    """Tokens of a context and of what follows it, as lm-evaluation-harness cuts them.

    Both are tokenized together, so that a merge over the seam is the model's own; spaces at the end
    of the context go with the continuation.
    """
    kept = context.rstrip()
    whole = asker.tokenize(context + continuation, parse_special=parse_special)
    prompt = asker.tokenize(kept, parse_special=parse_special)
    return prompt, whole[len(prompt) :] or asker.tokenize(continuation, add_special=False)


def record_of(
    asker: Asker, exam: Exam, prepared: Prepared, replies: Sequence[Reply], raw: str | None
) -> Record:
    """One line of evidence."""
    question = prepared.question
    record: dict[str, Any] = {
        "id": question.id,
        "subject": question.subject,
        "prompt_sha256": prepared.prompt_sha256,
        "prompt_tokens": len(prepared.asks[0].prompt),
        "truncated": prepared.truncated,
        "mojibake": prepared.mojibake,
        "options": list(question.options),
        "golds": dict(question.golds),
    }
    if exam.protocol == LETTER:
        record |= _letter_fields(asker, exam, prepared, replies, raw)
    else:
        record |= _loglikelihood_fields(question, prepared.asks[0], replies[0])
    gold = question.golds[ORIGINAL]
    record["correct"] = {metric: answer == gold for metric, answer in record["answers"].items()}
    return record


def _letter_fields(
    asker: Asker, exam: Exam, prepared: Prepared, replies: Sequence[Reply], raw: str | None
) -> dict[str, Any]:
    """Log-probabilities are by letter as shown; answers are places in the original order."""
    rows = np.array([_letter_log_probs(prepared, reply) for reply in replies])
    by_option = np.array([np.roll(row, turn) for turn, row in enumerate(rows)])
    finite = bool(np.isfinite(rows).all())
    found: dict[str, int | None] = {"letter": _best(by_option[0])}
    if exam.rotations > 1:
        found["letter_rotated"] = _best(np.exp(by_option).mean(axis=0))
    if exam.generate:
        letter = read_letter(raw or "", letters(prepared.question))
        found["generated"] = None if letter is None else letters(prepared.question).index(letter)
    return {
        "letters": letters(prepared.question),
        "letter_log_probs": _rounded(rows) if finite else [],
        "top_tokens": [asker.text((reply.top_token,)) for reply in replies],
        "raw": raw,
        "finite": finite,
        "answers": found,
    }


def _letter_log_probs(prepared: Prepared, reply: Reply) -> list[float]:
    """Log of the summed probability of the tokens that spell each letter."""
    totals = [scored.total for scored in reply.endings]
    return [
        float(np.logaddexp.reduce([totals[ending] for ending in endings]))
        for endings in prepared.letter_endings
    ]


def _loglikelihood_fields(question: Question, ask: Ask, reply: Reply) -> dict[str, Any]:
    """acc: highest total; acc_norm: per character (lm-evaluation-harness); acc_token: per token.

    acc_token leaves out the tokens that all options begin with, as llama-perplexity --hellaswag and
    --multiple-choice do.
    """
    shared = shared_prefix(ask.endings)
    totals = np.array([scored.total for scored in reply.endings])
    per_character = totals / [max(1, len(option)) for option in question.options]
    own = [scored.log_probs[shared:] or scored.log_probs for scored in reply.endings]
    per_token = np.array([np.mean(log_probs) for log_probs in own])
    finite = bool(np.isfinite(totals).all())
    return {
        "token_log_probs": _rounded([scored.log_probs for scored in reply.endings]) if finite else [],
        "shared_tokens": shared,
        "finite": finite,
        "answers": {"acc": _best(totals), "acc_norm": _best(per_character), "acc_token": _best(per_token)},
    }


def _best(values: Any) -> int | None:
    """The place of the largest; the first of equals, as everywhere; None where one is not a number."""
    values = np.asarray(values)
    return None if np.isnan(values).any() or not np.isfinite(values).any() else int(values.argmax())


def _rounded(rows: Any) -> list[list[float]]:
    return [[round(float(x), 6) for x in row] for row in rows]


def _sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def bench_json(
    candidates: Sequence[Candidate], request: Request, sittings: Sequence[Sitting]
) -> dict[str, Any]:
    """Everything that a card or a person may want, from the records alone."""
    audits = [{**_where(s), **audit(s.records)} for s in sittings]
    first = [s for s in sittings if s.candidate is candidates[0]]
    others = [s for s in sittings if s.candidate is not candidates[0]]
    pairs = [(a, b) for a in first for b in others if a.exam is b.exam]
    return {
        "format": FORMAT,
        "models": [{"name": c.name, "sha256": c.sha256} for c in candidates],
        "request": asdict(request) | {"data": str(request.data) if request.data else None},
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
