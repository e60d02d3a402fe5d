"""What is wrong with a benchmark's answers, before anyone believes its score.

A score can be wrong in silence: answers that the parser misses, a model that says B to everything,
prompts cut at the context, text damaged on the way. Each has a check here, and a check that fails is a
sentence with its numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cerebellum.bench.evidence import Record

MAX_UNREAD = 0.02  # share of questions whose answer could not be read
MIN_LETTER_MASS = 0.01  # below this the letters are not what the model was about to say
MAX_MOJIBAKE = 0.01  # share of prompts; MMLU-Redux itself carries 4 damaged questions of 5,700
CLUSTER_SHARE, CLUSTER_RATIO, CLUSTER_MIN = 0.5, 1.8, 20

_MOJIBAKE = re.compile("\ufffd|Ã[\u0080-\u00bf]|â€|Â[\u0080-\u00bf]")


def is_mojibake(text: str) -> bool:
    """UTF-8 read as Latin-1, or bytes that were no UTF-8 at all."""
    return _MOJIBAKE.search(text) is not None


def audit(records: Sequence[Record]) -> dict[str, Any]:
    """Counts over one model's answers to one benchmark, and ``problems`` in words; none means passed."""
    n = len(records)
    counts = {
        "questions": n,
        "not_finite": sum(not record["finite"] for record in records),
        "unread": sum(_unread(record) for record in records),
        "empty": sum(record.get("raw") is not None and not record["raw"].strip() for record in records),
        "truncated": sum(record["truncated"] for record in records),
        "mojibake_prompts": sum(record["mojibake"] for record in records),
        "mojibake_answers": sum(is_mojibake(record.get("raw") or "") for record in records),
    }
    problems = [text for text in (_count_problems(counts, n) + _clusters(records)) if text]
    shares = {metric: chosen_shares(records, metric) for metric in _metrics(records)}
    return counts | {
        "chosen_shares": shares,
        "letter_bias": letter_bias(records),
        "turned": turned(records),
        "problems": problems,
    }


def _unread(record: Record) -> bool:
    """A letter that nobody could read: the letters have no probability, or the text names none."""
    if any(answer is None for answer in record["answers"].values()):
        return True
    masses = [sum(math.exp(x) for x in row) for row in record.get("letter_log_probs", [])]
    return bool(masses) and min(masses) < MIN_LETTER_MASS


def _count_problems(counts: Mapping[str, int], n: int) -> list[str]:
    def over(name: str, limit: float, words: str) -> str:
        return f"{counts[name]} of {n} {words}" if counts[name] > limit * n else ""

    return [
        over("not_finite", 0, "questions got probabilities that are not finite: the model has collapsed"),
        over("truncated", 0, "prompts are longer than the model's context and were cut"),
        over("unread", MAX_UNREAD, "answers could not be read"),
        over("empty", MAX_UNREAD, "generated answers are empty"),
        over("mojibake_prompts", MAX_MOJIBAKE, "prompts hold damaged characters"),
        over("mojibake_answers", MAX_UNREAD, "generated answers hold damaged characters"),
    ]


def _clusters(records: Sequence[Record]) -> list[str]:
    """One option's place chosen far more often than it is right, metric by metric.

    ``acc`` favours short options, and ARC-Challenge lists 62% of its shortest first: there a place is held
    to how often it has the shortest, where that is more.
    """
    found = []
    golds = Counter(record["golds"]["original"] for record in records)
    shortest = Counter(_shortest(record["options"]) for record in records)
    for metric in _metrics(records):
        chosen = Counter(r["answers"][metric] for r in records if r["answers"][metric] is not None)
        total = sum(chosen.values())
        if total < CLUSTER_MIN:
            continue
        place, count = chosen.most_common(1)[0]
        share, right = count / total, golds[place] / len(records)
        usual = max(right, shortest[place] / len(records)) if metric == "acc" else right
        if share > CLUSTER_SHARE and share > CLUSTER_RATIO * usual:
            found.append(
                f"{metric}: option {'ABCDE'[place]} is chosen {100 * share:.0f}% of the time and right "
                f"{100 * right:.0f}%: the score says little about knowledge"
            )
    return found


def _shortest(options: Sequence[str]) -> int:
    return min(range(len(options)), key=lambda place: len(options[place]))


def chosen_shares(records: Sequence[Record], metric: str) -> list[float]:
    """How often each place A, B, C, ... is chosen, as fractions of the answers read."""
    chosen = [r["answers"][metric] for r in records if r["answers"][metric] is not None]
    places = max((len(r["options"]) for r in records), default=0)
    counts = Counter(chosen)
    return [round(counts[place] / len(chosen), 4) for place in range(places)] if chosen else []


def letter_bias(records: Sequence[Record]) -> list[float]:
    """Mean probability of each letter when every option has stood at every letter; empty otherwise.

    Content is the same for all letters then, so 1/n for each is a model without a liking for a letter.
    """
    asked = [r["letter_log_probs"] for r in _fully_turned(records)]
    probabilities = [[math.exp(x) for x in row] for rows in asked for row in rows]
    shares = [[p / sum(row) for p in row] for row in probabilities]
    return [round(sum(column) / len(shares), 4) for column in zip(*shares, strict=True)]


def turned(records: Sequence[Record]) -> dict[str, Any] | None:
    """The same questions with their options turned through all four letters; None where they were not.

    ``letter_shares`` is how often each letter is the answer, whatever stands there: 0.25 each without a
    liking. ``accuracy_pct`` is by turn: what the score would have been, had the options come in that order.
    ``same_option_pct`` of the questions get the same option in all four turns.
    """
    full = _fully_turned(records)
    if not full:
        return None
    letters = [[row.index(max(row)) for row in record["letter_log_probs"]] for record in full]
    options = [[(letter + turn) % 4 for turn, letter in enumerate(row)] for row in letters]
    golds = [record["golds"]["original"] for record in full]
    said = Counter(letter for row in letters for letter in row)
    right = [sum(row[turn] == gold for row, gold in zip(options, golds, strict=True)) for turn in range(4)]
    return {
        "questions": len(full),
        "letter_shares": [round(said[letter] / (4 * len(full)), 4) for letter in range(4)],
        "accuracy_pct": [100 * n / len(full) for n in right],
        "same_option_pct": 100 * sum(len(set(row)) == 1 for row in options) / len(full),
    }


def _fully_turned(records: Sequence[Record]) -> list[Record]:
    """Those of four options that were asked four times."""
    return [r for r in records if len(r["options"]) == 4 == len(r.get("letter_log_probs", ()))]


def _metrics(records: Sequence[Record]) -> list[str]:
    return list(records[0]["answers"]) if records else []
