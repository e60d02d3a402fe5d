"""Finds what is wrong with a benchmark's answers, before anyone believes its score.

A score can be wrong in silence: answers that the parser misses, a model that says B to everything, prompts
cut at the context, text damaged on the way. Each has a check here, and a check that fails is a sentence with
its numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cerebellum.bench.artifacts import Answer, AuditCheck, LetterAnswer, Turned, Where
from cerebellum.bench.tasks import ORIGINAL

MAX_UNREAD = 0.02  # share of questions whose answer nobody could read, or whose text is empty or damaged
MIN_LETTER_MASS = 0.01  # below this the letters are not what the model was about to say
MAX_MOJIBAKE = 0.01  # share of prompts; MMLU-Redux itself carries 4 damaged questions of 5,700

CLUSTER_SHARE = 0.5
CLUSTER_RATIO = 1.8
CLUSTER_MIN = 20
"""A place is a cluster when it has more than CLUSTER_SHARE of the answers and more than CLUSTER_RATIO times
the share that would be right; with fewer than CLUSTER_MIN answers that could be chance."""

_MOJIBAKE = re.compile("\ufffd|Ã[\u0080-\u00bf]|â€|Â[\u0080-\u00bf]")


def is_mojibake(text: str) -> bool:
    """Says whether the text is UTF-8 that was read as Latin-1, or bytes that were no UTF-8 at all."""
    return _MOJIBAKE.search(text) is not None


def audit(where: Where, answers: Sequence[Answer]) -> AuditCheck:
    """Checks one model's answers to one exam and returns what it counted, and its problems in words."""
    counts = _Counts.of(answers)
    return AuditCheck(
        model=where.model,
        task=where.task,
        protocol=where.protocol,
        questions=counts.questions,
        not_finite=counts.not_finite,
        unread=counts.unread,
        empty=counts.empty,
        truncated=counts.truncated,
        mojibake_prompts=counts.mojibake_prompts,
        mojibake_answers=counts.mojibake_answers,
        chosen_shares={metric: chosen_shares(answers, metric) for metric in _metrics(answers)},
        letter_bias=letter_bias(answers),
        turned=turned(answers),
        problems=(*counts.problems(), *_clusters(answers)),
    )


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """Counts answers that cannot be believed, by what is wrong with them."""

    questions: int
    not_finite: int
    unread: int
    empty: int
    truncated: int
    mojibake_prompts: int
    mojibake_answers: int

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> _Counts:
        """Counts over the answers of one exam."""
        written = [a.raw for a in answers if isinstance(a, LetterAnswer) and a.raw is not None]
        return cls(
            questions=len(answers),
            not_finite=sum(not answer.finite for answer in answers),
            unread=sum(_unread(answer) for answer in answers),
            empty=sum(not text.strip() for text in written),
            truncated=sum(answer.truncated for answer in answers),
            mojibake_prompts=sum(answer.mojibake for answer in answers),
            mojibake_answers=sum(is_mojibake(text) for text in written),
        )

    def problems(self) -> list[str]:
        """Returns a sentence for each count that is more than its share of the questions allows."""
        found = (
            (
                self.not_finite,
                0.0,
                "questions got probabilities that are not finite: the model has collapsed",
            ),
            (self.truncated, 0.0, "prompts are longer than the model's context and were cut"),
            (self.unread, MAX_UNREAD, "answers could not be read"),
            (self.empty, MAX_UNREAD, "generated answers are empty"),
            (self.mojibake_prompts, MAX_MOJIBAKE, "prompts hold damaged characters"),
            (self.mojibake_answers, MAX_UNREAD, "generated answers hold damaged characters"),
        )
        n = self.questions
        return [f"{count} of {n} {words}" for count, share, words in found if count > share * n]


def _unread(answer: Answer) -> bool:
    """Says whether nobody could read a letter: the letters have no probability, or the text names none."""
    if any(chosen is None for chosen in answer.answers.values()):
        return True
    rows = answer.letter_log_probs if isinstance(answer, LetterAnswer) else ()
    masses = [sum(math.exp(x) for x in row) for row in rows]
    return bool(masses) and min(masses) < MIN_LETTER_MASS


def _clusters(answers: Sequence[Answer]) -> list[str]:
    """Returns a sentence for each metric by which one place is chosen far more often than it is right.

    ``acc`` favours short options, and ARC-Challenge lists 62% of its shortest first: there a place is held
    to how often it has the shortest, where that is more.
    """
    found = []
    golds = Counter(answer.golds[ORIGINAL] for answer in answers)
    shortest = Counter(_shortest(answer.options) for answer in answers)
    for metric in _metrics(answers):
        chosen = Counter(_chosen(answers, metric))
        total = sum(chosen.values())
        if total < CLUSTER_MIN:
            continue
        place, count = chosen.most_common(1)[0]
        share = count / total
        right = golds[place] / len(answers)
        usual = max(right, shortest[place] / len(answers)) if metric == "acc" else right
        if share > CLUSTER_SHARE and share > CLUSTER_RATIO * usual:
            found.append(
                f"{metric}: option {'ABCDE'[place]} is chosen {100 * share:.0f}% of the time and right "
                f"{100 * right:.0f}%: the score says little about knowledge"
            )
    return found


def _shortest(options: Sequence[str]) -> int:
    return min(range(len(options)), key=lambda place: len(options[place]))


def _chosen(answers: Sequence[Answer], metric: str) -> list[int]:
    """Returns the options chosen by a metric, without the answers that nobody could read."""
    chosen = (answer.answers[metric] for answer in answers)
    return [place for place in chosen if place is not None]


def chosen_shares(answers: Sequence[Answer], metric: str) -> tuple[float, ...]:
    """Returns how often each place A, B, C, ... is chosen, as fractions of the answers that were read."""
    chosen = _chosen(answers, metric)
    if not chosen:
        return ()
    places = max(len(answer.options) for answer in answers)
    counts = Counter(chosen)
    return tuple(round(counts[place] / len(chosen), 4) for place in range(places))


def letter_bias(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Returns the mean probability of each letter when every option has stood at every letter, else nothing.

    The content is the same for all letters then, so 1/n for each is a model without a liking for a letter.
    """
    asked = [answer.letter_log_probs for answer in _fully_turned(answers)]
    probabilities = [[math.exp(x) for x in row] for rows in asked for row in rows]
    shares = [[p / sum(row) for p in row] for row in probabilities]
    return tuple(round(sum(column) / len(shares), 4) for column in zip(*shares, strict=True))


def turned(answers: Sequence[Answer]) -> Turned | None:
    """Returns how the answers change as the options turn through all four letters, or None if none did."""
    full = _fully_turned(answers)
    if not full:
        return None
    letters = [[row.index(max(row)) for row in answer.letter_log_probs] for answer in full]
    options = [[(letter + turn) % 4 for turn, letter in enumerate(row)] for row in letters]
    golds = [answer.golds[ORIGINAL] for answer in full]
    said = Counter(letter for row in letters for letter in row)
    right = [sum(row[turn] == gold for row, gold in zip(options, golds, strict=True)) for turn in range(4)]
    return Turned(
        questions=len(full),
        letter_shares=tuple(round(said[letter] / (4 * len(full)), 4) for letter in range(4)),
        accuracy_pct=tuple(100 * n / len(full) for n in right),
        same_option_pct=100 * sum(len(set(row)) == 1 for row in options) / len(full),
    )


def _fully_turned(answers: Sequence[Answer]) -> list[LetterAnswer]:
    """Returns the answers to questions of four options that were asked in all four turns."""
    return [
        answer
        for answer in answers
        if isinstance(answer, LetterAnswer) and len(answer.options) == 4 == len(answer.letter_log_probs)
    ]


def _metrics(answers: Sequence[Answer]) -> list[str]:
    return list(answers[0].answers) if answers else []
