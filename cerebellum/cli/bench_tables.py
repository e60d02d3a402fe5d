"""Shows bench.json as tables and lines on a console, for people; the JSON itself is what programs read."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from cerebellum.bench.artifacts import AuditCheck, BenchResults, PairRow, ScoreRow, SessionRow, Turned
from cerebellum.cli.tables import shown
from cerebellum.errors import visible

_LABELS = {"original": "", "corrected": ", corrected labels", "published_subset": ", published 2,400"}


def bench_tables(found: BenchResults) -> list[Table | Text]:
    """Returns scores, pairs where there is something to pair with, what the audit found, and the time.

    Problems that the audit found are bold and red, so that no score is read without them.
    """
    parts: list[Table | Text] = [scores_table(found.scores)]
    if found.paired:
        parts.append(pairs_table(found.paired))
    checks = found.audit.checks
    parts += [_turned(check, check.turned) for check in checks if check.turned]
    parts += [_problem(check, text) for check in checks for text in check.problems]
    parts += [_session(row) for row in found.session if row.asked]
    return parts


def scores_table(scores: Sequence[ScoreRow]) -> Table:
    """Returns every accuracy in percent with its 95% interval, beside what guessing would score."""
    table = Table("model", "benchmark", "metric", "right", "accuracy", "chance", title="Scores")
    for column in (3, 5):
        table.columns[column].justify = "right"
    for row in scores:
        low, high = row.ci_pct
        table.add_row(
            shown(row.model),
            _benchmark(row),
            row.metric,
            f"{row.correct:,} of {row.n:,}",
            f"{row.accuracy_pct:.1f}% [{low:.1f}, {high:.1f}]",
            f"{row.chance_pct:.1f}%",
        )
    return table


def pairs_table(pairs: Sequence[PairRow]) -> Table:
    """Returns the paired differences in percentage points with their 95% intervals; those with p below 0.05
    are bold.
    """
    title = "Paired differences (McNemar's exact test)"
    table = Table(
        "against", "benchmark", "metric", "difference", "only right", "p", "could show", title=title
    )
    for row in pairs:
        low, high = row.ci_pct
        table.add_row(
            shown(row.against),
            _benchmark(row),
            row.metric,
            Text(
                f"{row.difference_pct:+.1f} [{low:+.1f}, {high:+.1f}]",
                style="bold" if row.p_value < 0.05 else "",
            ),
            f"{row.only_model} : {row.only_against}",
            f"{row.p_value:.3g}",
            f"±{row.detectable_pct:.1f}",
        )
    return table


def _benchmark(row: ScoreRow | PairRow) -> str:
    return f"{row.task} ({row.protocol}{_LABELS.get(row.labels, '')})"


def _turned(check: AuditCheck, turned: Turned) -> Text:
    letters = zip("ABCD", turned.letter_shares, strict=True)
    shares = ", ".join(f"{letter} {100 * share:.0f}%" for letter, share in letters)
    rights = ", ".join(f"{value:.1f}" for value in turned.accuracy_pct)
    where = f"{visible(check.model)}, {check.task}"
    same = f"the same option in all four: {turned.same_option_pct:.0f}%"
    return Text(f"{where}, options turned: says {shares}; right in % by turn {rights}; {same}", style="dim")


def _problem(check: AuditCheck, text: str) -> Text:
    where = f"{visible(check.model)}, {check.task} ({check.protocol})"
    return Text(f"audit: {where}: {visible(text)}", style="bold red")


def _session(row: SessionRow) -> Text:
    rate = row.asked / row.seconds if row.seconds else 0.0
    again = f", {row.reused} answered before" if row.reused else ""
    where = f"{visible(row.model)}, {row.task} ({row.protocol})"
    return Text(f"{where}: {row.asked} asked in {row.seconds:.1f} s, {rate:.1f}/s{again}", style="dim")
