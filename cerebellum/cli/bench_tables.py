"""bench.json as tables. Takes the JSON, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

_LABELS = {"original": "", "corrected": ", corrected labels", "published_subset": ", published 2,400"}


def bench_tables(found: Mapping[str, Any]) -> list[Table | Text]:
    """Scores, pairs where there is something to pair with, what the audit found, and the time."""
    shown: list[Table | Text] = [scores_table(found["scores"])]
    if found["paired"]:
        shown.append(pairs_table(found["paired"]))
    shown += [_turned(check) for check in found["audit"]["checks"] if check["turned"]]
    shown += [_problem(check, text) for check in found["audit"]["checks"] for text in check["problems"]]
    shown += [_session(row) for row in found["session"] if row["asked"]]
    return shown


def scores_table(scores: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("model", "benchmark", "metric", "right", "accuracy", "chance", title="Scores")
    for column in (3, 5):
        table.columns[column].justify = "right"
    for row in scores:
        low, high = row["ci_pct"]
        table.add_row(
            escape(row["model"]),
            _benchmark(row),
            row["metric"],
            f"{row['correct']:,} of {row['n']:,}",
            f"{row['accuracy_pct']:.1f}% [{low:.1f}, {high:.1f}]",
            f"{row['chance_pct']:.1f}%",
        )
    return table


def pairs_table(pairs: Sequence[Mapping[str, Any]]) -> Table:
    title = "Paired differences (McNemar's exact test)"
    table = Table(
        "against", "benchmark", "metric", "difference", "only right", "p", "could show", title=title
    )
    for row in pairs:
        low, high = row["ci_pct"]
        decided = row["p_value"] < 0.05
        table.add_row(
            escape(row["against"]),
            _benchmark(row),
            row["metric"],
            Text(
                f"{row['difference_pct']:+.1f} [{low:+.1f}, {high:+.1f}]",
                style="bold" if decided else "",
            ),
            f"{row['only_model']} : {row['only_against']}",
            f"{row['p_value']:.3g}",
            f"±{row['detectable_pct']:.1f}",
        )
    return table


def _benchmark(row: Mapping[str, Any]) -> str:
    return f"{row['task']} ({row['protocol']}{_LABELS.get(row['labels'], '')})"


def _turned(check: Mapping[str, Any]) -> Text:
    found = check["turned"]
    shares = ", ".join(f"{a} {100 * s:.0f}%" for a, s in zip("ABCD", found["letter_shares"], strict=True))
    rights = ", ".join(f"{value:.1f}" for value in found["accuracy_pct"])
    where = f"{check['model']}, {check['task']}"
    same = f"the same option in all four: {found['same_option_pct']:.0f}%"
    return Text(f"{where}, options turned: says {shares}; right in % by turn {rights}; {same}", style="dim")


def _problem(check: Mapping[str, Any], text: str) -> Text:
    where = f"{check['model']}, {check['task']} ({check['protocol']})"
    return Text(f"audit: {where}: {text}", style="bold red")


def _session(row: Mapping[str, Any]) -> Text:
    rate = row["asked"] / row["seconds"] if row["seconds"] else 0.0
    again = f", {row['reused']} answered before" if row["reused"] else ""
    where = f"{row['model']}, {row['task']} ({row['protocol']})"
    return Text(f"{where}: {row['asked']} asked in {row['seconds']:.1f} s, {rate:.1f}/s{again}", style="dim")
