"""Key findings that both stories can have: sentences that this run's numbers bear out, and no others.

Each function looks for one thing and says nothing where the intervals do not tell it apart. There is
no sentence here that could be printed without having looked. Each story lists the looks that it takes,
the most important first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cerebellum.card.domains import across_domains
from cerebellum.card.evidence import Benchmark, Evidence, GroupRow
from cerebellum.card.numbers import percent, points, with_interval
from cerebellum.page.markdown import Code, Sentence
from cerebellum.stats.holm import holm
from cerebellum.units import size

_SIGNIFICANT = 0.05
"""Below this p a difference is called one, all comparisons of a run taken together."""


def outcome(evidence: Evidence, unchanged: str) -> Iterator[Sentence]:
    """Says what was saved and what it cost on the report text, or that no cost could be told there;
    ``unchanged`` is said where nothing was changed.
    """
    if not evidence.changed:
        yield (unchanged,)
        return
    saved = evidence.plan.bytes_saved
    share = 100 * saved / evidence.plan.base_tensor_bytes
    side = "smaller" if saved >= 0 else "larger"
    smaller = f"{size(abs(saved))} ({abs(share):.1f}%) {side} than the base"
    change = evidence.run.reported
    text = Code(evidence.run.report.text)
    if change is None:
        yield (f"{smaller}, and broken: its perplexity on ", text, " is not finite.")
    elif change.excludes(0):
        yield (f"{smaller}, its perplexity {with_interval(change)} on ", text, ".")
    else:
        told = with_interval(change)
        yield (f"{smaller}, with no change of perplexity that could be told on ", text, f": {told}.")


def additivity(evidence: Evidence) -> Iterator[Sentence]:
    """Says whether the whole did more or less damage than the sum of its parts.

    Damages seldom add up, so it is told even where they did.
    """
    found = evidence.whole
    predicted = evidence.plan.predicted_delta_pct
    if found is None or predicted is None or len(evidence.changed) < 2:
        return
    whole = f"measured together {with_interval(found)}, the sum of the parts said {percent(predicted)}"
    if not found.excludes(predicted):
        yield (f"The parts added up: {whole}.",)
    else:
        word = "more" if found.mean > predicted else "less"
        yield (f"The whole did {word} damage than its parts: {whole}.",)


def benchmarks(evidence: Evidence) -> Iterator[Sentence]:
    """Names the differences that the pairing tells apart, then the benchmarks where it tells none.

    Holm's correction holds all of them together at 5%, or a card of twenty comparisons would report the
    one that chance alone makes.
    """
    paired = [bench for bench in evidence.run.benchmarks if bench.p is not None]
    told = holm([bench.p for bench in paired if bench.p is not None], _SIGNIFICANT)
    for bench in (b for b, real in zip(paired, told, strict=True) if real):
        yield from _difference(bench, len(paired))
    alike = [b for b, real in zip(paired, told, strict=True) if not real]
    if alike:
        names = ", ".join(dict.fromkeys(bench.task for bench in alike))
        yield (f"No difference to the base could be told on {names}{_could_show(alike)}.",)


def confidence(evidence: Evidence) -> Iterator[Sentence]:
    """Says where the source is surer, or less sure, than it has a right to be, by as much as the file changes the loss:
    there perplexity rewards or punishes mere flattening of predictions.
    """
    found = evidence.run.report.confidence
    if found is None or not found.matters:
        return
    word = "overconfident" if found.gap > 0 else "underconfident"
    effect = "flatters" if found.gap > 0 else "punishes"
    low, high = found.gap_ci
    yield (
        f"The source is {word} on ",
        Code(evidence.run.report.text),
        f" by {abs(found.gap):.2g} nats a token (its loss is {found.loss:.2f}, the entropy of its predictions "
        f"{found.entropy:.2f}; loss less entropy [{low:+.2g}, {high:+.2g}]), and the file changes its loss by "
        f"{found.loss_change:+.2g}: perplexity {effect} flattening there, judge by KL divergence.",
    )


def domains(evidence: Evidence) -> Iterator[Sentence]:
    """Says of a report text of several domains whether one gains at another's cost."""
    for line in across_domains(evidence.run.report):
        yield (line,)


def _difference(bench: Benchmark, of: int) -> Iterator[Sentence]:
    if bench.difference is None or bench.p is None:
        return
    word = "better" if bench.difference.mean > 0 else "worse"
    among = f", one of {of} comparisons" if of > 1 else ""
    how = f" ({bench.protocol}, {bench.metric}) is {word} than the base"
    yield (Code(bench.task), f"{how}: {points(bench.difference)} points, McNemar p = {bench.p:.2g}{among}.")


def _could_show(alike: Sequence[Benchmark]) -> str:
    """Tells what difference would have been seen 8 times of 10: silence about a difference means little
    where the questions are few.
    """
    known = [bench.detectable for bench in alike if bench.detectable is not None]
    if not known:
        return ""
    least, most = (f"{value:.1f}" for value in (min(known), max(known)))
    return f"; these questions would have shown {least if least == most else f'{least} to {most}'} points"


def listed(title: str, rows: Sequence[GroupRow], evidence: Evidence) -> Iterator[Sentence]:
    """Lists groups under a title, with how many of all they are; of no group at all it says nothing."""
    if rows:
        yield (f"{title}: {len(rows)} of {len(evidence.rows)}, ", *_names(rows), ".")


def _names(rows: Iterable[GroupRow]) -> Iterator[str | Code]:
    for place, row in enumerate(rows):
        if place:
            yield ", "
        yield Code(row.name)
