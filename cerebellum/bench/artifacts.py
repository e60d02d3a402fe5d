"""Defines the bench's artifacts: a line of evidence for each question asked, and bench.json over them all.

Evidence lines are written when a question is answered and never again. bench.json is computed from them
alone, so it can be made anew at any time. All percentages are of questions; intervals are 95%.
"""

from __future__ import annotations

from typing import Literal

from cerebellum.codec import Artifact, Record


class Answer(Record, frozen=True, kw_only=True):
    """Holds what both protocols keep of one question asked of one model: a line of evidence.

    ``prompt_sha256`` and ``golds`` tell whether an old answer is one to the question as it is asked now;
    ``golds`` maps a set of labels to the right option, counted from 0. ``answers`` maps a metric to the
    option that the model chose by it, or to None where nobody could read one; ``correct`` compares those with
    the original labels. ``finite`` is false where a probability was NaN or infinite: the model has collapsed.
    """

    id: str
    subject: str | None
    prompt_sha256: str
    prompt_tokens: int
    truncated: bool
    mojibake: bool
    options: tuple[str, ...]
    golds: dict[str, int]
    finite: bool
    answers: dict[str, int | None]
    correct: dict[str, bool]


class LetterAnswer(Answer, frozen=True, kw_only=True):
    """Holds an answer by letter; log-probabilities are in nats, a row for each turn of the options.

    A row is by letter as it was shown, so the option behind a letter differs from row to row. ``top_tokens``
    are the likeliest first tokens, turn by turn, and ``raw`` is the generated text where one was asked for.
    """

    letters: str
    letter_log_probs: tuple[tuple[float, ...], ...]
    top_tokens: tuple[str, ...]
    raw: str | None


class LoglikelihoodAnswer(Answer, frozen=True, kw_only=True):
    """Holds an answer by loglikelihood: nats of every token of every option, in the order of the options.

    ``shared_tokens`` counts the first tokens that all options have in common and that ``acc_token`` skips.
    """

    token_log_probs: tuple[tuple[float, ...], ...]
    shared_tokens: int


class ModelRow(Record, frozen=True, kw_only=True):
    """Names a model that was asked; ``sha256`` is over the bytes of its files in order."""

    name: str
    sha256: str


class DataFile(Record, frozen=True, kw_only=True):
    """Names a file of questions and its content, and not the folder it lies in."""

    file: str
    sha256: str


class RequestRow(Record, frozen=True, kw_only=True):
    """Repeats what was asked of the bench; ``data`` has None for questions that came from the Hub."""

    tasks: tuple[str, ...]
    protocols: tuple[str, ...]
    limit: int
    seed: int
    rotations: int
    generate: int
    data: dict[str, DataFile | None]


class Where(Record, frozen=True, kw_only=True):
    """Names one exam of one model: which model, which benchmark, which protocol."""

    model: str
    task: str
    protocol: str


class SubjectScore(Record, frozen=True, kw_only=True):
    """Holds the accuracy in one subject of a benchmark, with Wilson's interval."""

    correct: int
    n: int
    accuracy_pct: float
    ci_pct: tuple[float, float]


class ScoreRow(Where, frozen=True, kw_only=True):
    """Holds one accuracy with Wilson's interval: a model, a metric and a set of labels.

    ``n`` counts the questions that the set of labels covers and ``chance_pct`` is what guessing would score.
    ``by_subject`` is empty for a benchmark without subjects.
    """

    metric: str
    labels: str
    correct: int
    n: int
    accuracy_pct: float
    ci_pct: tuple[float, float]
    chance_pct: float
    by_subject: dict[str, SubjectScore]


class PairRow(Record, frozen=True, kw_only=True):
    """Compares the first model with another on the questions that both answered, in percentage points.

    ``only_model`` and ``only_against`` count the questions that just one of them has right; ``p_value`` is
    McNemar's exact, two-sided. ``detectable_pct`` is the difference that these questions find 8 times of 10,
    and ``smallest_significant_pct`` the smallest that could have been significant, None where none could.
    ``same_answer`` counts the questions on which both chose the same option, right or wrong.
    """

    task: str
    protocol: str
    metric: str
    labels: str
    model: str
    against: str
    n: int
    only_model: int
    only_against: int
    difference_pct: float
    ci_pct: tuple[float, float]
    p_value: float
    detectable_pct: float
    smallest_significant_pct: float | None
    same_answer: int


class Turned(Record, frozen=True, kw_only=True):
    """Shows the same questions with their options turned through all four letters.

    ``letter_shares`` is how often each letter is the answer, whatever option stands there: 0.25 each for a
    model without a liking. ``accuracy_pct`` is by turn: the score, had the options come in that order.
    ``same_option_pct`` of the questions get the same option in all four turns.
    """

    questions: int
    letter_shares: tuple[float, ...]
    accuracy_pct: tuple[float, ...]
    same_option_pct: float


class AuditCheck(Where, frozen=True, kw_only=True):
    """Counts what is wrong with one model's answers to one exam; ``problems`` says it in words.

    The exam passed where ``problems`` is empty. ``chosen_shares`` maps a metric to the fraction of answers
    that each place has; ``letter_bias`` is the mean probability of each letter over all turns, else empty.
    """

    questions: int
    not_finite: int
    unread: int
    empty: int
    truncated: int
    mojibake_prompts: int
    mojibake_answers: int
    chosen_shares: dict[str, tuple[float, ...]]
    letter_bias: tuple[float, ...]
    turned: Turned | None
    problems: tuple[str, ...]


class Audit(Record, frozen=True, kw_only=True):
    """Joins the checks of all exams; ``ok`` where none of them found a problem."""

    ok: bool
    checks: tuple[AuditCheck, ...]


class EvidenceRow(Where, frozen=True, kw_only=True):
    """Names the file in the bench folder that holds an exam's answers, line by line."""

    file: str


class SessionRow(Where, frozen=True, kw_only=True):
    """Counts the work of the last session: questions asked, answers reused from earlier ones, seconds."""

    asked: int
    reused: int
    seconds: float


class BenchResults(Artifact, frozen=True, kw_only=True):
    """Holds bench.json: scores of every model, and the first model paired with each of the others.

    Everything but ``session`` depends on the answers alone, so a repeated bench gives the same figures.
    """

    format: Literal[1] = 1
    models: tuple[ModelRow, ...]
    request: RequestRow
    scores: tuple[ScoreRow, ...]
    paired: tuple[PairRow, ...]
    audit: Audit
    evidence: tuple[EvidenceRow, ...]
    session: tuple[SessionRow, ...]
