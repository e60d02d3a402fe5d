"""Puts one benchmark to one model: questions -> prompts -> asks -> replies -> one answer a question."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cerebellum.bench.artifacts import Answer, LetterAnswer, LoglikelihoodAnswer
from cerebellum.bench.audit import is_mojibake
from cerebellum.bench.tasks import (
    LETTER,
    LOGLIKELIHOOD,
    ORIGINAL,
    Question,
    Task,
    letter_prompt,
    letters,
    read_letter,
)
from cerebellum.engine.asking import Ask, Asker, Reply, TokenIds, shared_prefix
from cerebellum.errors import BadInput

ANSWER_TYPES: Mapping[str, type[Answer]] = {LETTER: LetterAnswer, LOGLIKELIHOOD: LoglikelihoodAnswer}
"""The line of evidence that each protocol writes."""

PART = 512  # questions scored and, where asked for, generated together

Known = Mapping[str, tuple[str, Mapping[str, int]]]
"""The questions that have their answers: by id, the prompt's SHA-256 and the labels that they were asked with."""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Is one benchmark in one protocol, with the questions chosen and the turns and tokens of
    text asked for.
    """

    task: Task
    protocol: str
    questions: tuple[Question, ...]
    rotations: int = 1
    generate: int = 0

    @property
    def name(self) -> str:
        """Returns the name that the exam's file of answers begins with: ``arc_challenge.letter``."""
        return f"{self.task.name}.{self.protocol}"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Holds a question as the model gets it: one ask for each turn of the options or, by loglikelihood, a
    single one.

    ``truncated`` says that the prompt was longer than the model's context and was cut from the left.
    """

    question: Question
    prompt_sha256: str
    asks: tuple[Ask, ...]
    truncated: bool
    mojibake: bool
    letter_endings: tuple[tuple[int, ...], ...] = ()
    """For each letter, which endings of an ask spell it (with and without a space)."""


def parts(exam: Exam) -> list[Exam]:
    """Cuts an exam into parts that can be asked apart, by different workers even.

    Questions that are scored together share decodes, on which the last bits of their answers depend. So the cuts
    follow from the exam alone, and not from what has its answer already.
    """
    starts = range(0, len(exam.questions), PART)
    return [replace(exam, questions=exam.questions[start : start + PART]) for start in starts]


def unanswered(asker: Asker, exam: Exam, known: Known) -> list[Prepared]:
    """Prepares the exam's questions and returns those that have no answer in these words and with these labels."""
    prepared = [prepare(asker, exam, question) for question in exam.questions]
    return [p for p in prepared if known.get(p.question.id) != (p.prompt_sha256, dict(p.question.golds))]


def answers(asker: Asker, exam: Exam, prepared: Sequence[Prepared]) -> Iterator[Answer]:
    """Yields an answer for every prepared question, in the order in which they are done."""
    for start in range(0, len(prepared), PART):
        block = prepared[start : start + PART]
        raw = dict(asker.generate([p.asks[0].prompt for p in block], exam.generate)) if exam.generate else {}
        asks = [(number, ask) for number, p in enumerate(block) for ask in p.asks]
        first = np.cumsum([0] + [len(p.asks) for p in block])
        replies: dict[int, dict[int, Reply]] = defaultdict(dict)
        for index, reply in asker.score([ask for _, ask in asks]):
            number = asks[index][0]
            replies[number][index - int(first[number])] = reply
            if len(replies[number]) == len(block[number].asks):
                in_order = [reply for _, reply in sorted(replies.pop(number).items())]
                yield answer_of(asker, exam, block[number], in_order, raw.get(number))


def prepare(asker: Asker, exam: Exam, question: Question) -> Prepared:
    """Makes the prompts of a question in the exam's protocol and turns them into tokens.

    Raises BadInput where the vocabulary has no token for a letter or the chat template cannot be rendered.
    """
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
    """Returns, for each letter, the single tokens that spell it: alone, after a space, after a line break.

    Raises BadInput where the vocabulary has none for a letter.
    """
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
    prompt = pairs[0][0]
    longest = max(len(ending) for _, ending in pairs)
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
    """Returns the tokens of a context and of what follows it, as lm-evaluation-harness cuts them.

    Both are tokenized together, so that a merge over the seam is the model's own; spaces at the end of the
    context go with the continuation.
    """
    kept = context.rstrip()
    whole = asker.tokenize(context + continuation, parse_special=parse_special)
    prompt = asker.tokenize(kept, parse_special=parse_special)
    return prompt, whole[len(prompt) :] or asker.tokenize(continuation, add_special=False)


def answer_of(
    asker: Asker, exam: Exam, prepared: Prepared, replies: Sequence[Reply], raw: str | None
) -> Answer:
    """Returns the line of evidence for one question, from its replies and the text that was generated."""
    if exam.protocol == LETTER:
        return _letter_answer(asker, exam, prepared, replies, raw)
    return _loglikelihood_answer(prepared, replies[0])


def _letter_answer(
    asker: Asker, exam: Exam, prepared: Prepared, replies: Sequence[Reply], raw: str | None
) -> LetterAnswer:
    """Reads the letter replies, one for each turn; log-probabilities stay by letter as it was shown.

    The chosen places are in the options' original order. ``letter`` is the likeliest letter before any turn,
    ``letter_rotated`` the option with the highest mean probability over all turns, and ``generated`` the
    letter that the generated text names.
    """
    question = prepared.question
    rows = np.array([_letter_log_probs(prepared, reply) for reply in replies])
    by_option = np.array([np.roll(row, turn) for turn, row in enumerate(rows)])
    finite = bool(np.isfinite(rows).all())
    found: dict[str, int | None] = {"letter": _best(by_option[0])}
    if exam.rotations > 1:
        found["letter_rotated"] = _best(np.exp(by_option).mean(axis=0))
    if exam.generate:
        letter = read_letter(raw or "", letters(question))
        found["generated"] = None if letter is None else letters(question).index(letter)
    return LetterAnswer(
        id=question.id,
        subject=question.subject,
        prompt_sha256=prepared.prompt_sha256,
        prompt_tokens=len(prepared.asks[0].prompt),
        truncated=prepared.truncated,
        mojibake=prepared.mojibake,
        options=question.options,
        golds=dict(question.golds),
        finite=finite,
        answers=found,
        correct=_correct(question, found),
        letters=letters(question),
        letter_log_probs=_rounded(rows) if finite else (),
        top_tokens=tuple(asker.text((reply.top_token,)) for reply in replies),
        raw=raw,
    )


def _letter_log_probs(prepared: Prepared, reply: Reply) -> list[float]:
    """Returns, in nats, the log of the summed probability of the tokens that spell each letter."""
    totals = [scored.total for scored in reply.endings]
    return [
        float(np.logaddexp.reduce([totals[ending] for ending in endings]))
        for endings in prepared.letter_endings
    ]


def _loglikelihood_answer(prepared: Prepared, reply: Reply) -> LoglikelihoodAnswer:
    """Reads the reply to a question whose options were scored as continuations.

    ``acc`` chooses by the highest total, ``acc_norm`` per character (both as lm-evaluation-harness does) and
    ``acc_token`` per token without those that all options begin with, as llama-perplexity --hellaswag and
    --multiple-choice do.
    """
    question = prepared.question
    shared = shared_prefix(prepared.asks[0].endings)
    totals = np.array([scored.total for scored in reply.endings])
    per_character = totals / [max(1, len(option)) for option in question.options]
    own = [scored.log_probs[shared:] or scored.log_probs for scored in reply.endings]
    per_token = np.array([np.mean(log_probs) for log_probs in own])
    finite = bool(np.isfinite(totals).all())
    found = {"acc": _best(totals), "acc_norm": _best(per_character), "acc_token": _best(per_token)}
    return LoglikelihoodAnswer(
        id=question.id,
        subject=question.subject,
        prompt_sha256=prepared.prompt_sha256,
        prompt_tokens=len(prepared.asks[0].prompt),
        truncated=prepared.truncated,
        mojibake=prepared.mojibake,
        options=question.options,
        golds=dict(question.golds),
        finite=finite,
        answers=found,
        correct=_correct(question, found),
        token_log_probs=_rounded(scored.log_probs for scored in reply.endings) if finite else (),
        shared_tokens=shared,
    )


def _correct(question: Question, chosen: Mapping[str, int | None]) -> dict[str, bool]:
    """Compares the option chosen by each metric with the original labels."""
    gold = question.golds[ORIGINAL]
    return {metric: place == gold for metric, place in chosen.items()}


def _best(values: npt.NDArray[np.floating]) -> int | None:
    """Returns the place of the largest value, the first of equals, or None where one is not a number."""
    return None if np.isnan(values).any() or not np.isfinite(values).any() else int(values.argmax())


def _rounded(rows: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    """Rounds nats to six digits, which keeps the evidence readable and far below what could matter."""
    return tuple(tuple(round(float(x), 6) for x in row) for row in rows)


def _sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
