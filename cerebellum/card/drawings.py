"""Charts that both stories have, and what helps to draw the others.

A chart that the run has no data for is not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from cerebellum.card.evidence import Evidence, GroupRow
from cerebellum.card.numbers import Change, percent
from cerebellum.page.charts import Cell, estimates_chart, heat_map
from cerebellum.page.charts import EstimateMark as Interval
from cerebellum.page.pictures import Picture, picture

AGAINST_BASE = "change of perplexity against the base"


def named(pictures: Sequence[Picture | None]) -> dict[str, Picture]:
    """Returns those charts that there was data for, by name, in the order given, which is the order of
    the card.
    """
    return {found.name: found for found in pictures if found is not None}


def sensitivity(evidence: Evidence, name: Callable[[GroupRow], str], limit: float | None) -> Picture | None:
    """Draws the change of perplexity of each group alone with its interval, the smallest on top."""
    known = [(row, row.change) for row in evidence.alone if row.change is not None]
    if not known:
        return None
    known.sort(key=lambda pair: pair[1].mean)
    estimates = [interval(name(row), change, row.verdict) for row, change in known]
    return picture(
        "sensitivity",
        "Change of perplexity for each group alone, with its interval",
        lambda width: estimates_chart(width, estimates, limit, AGAINST_BASE),
    )


def interval(name: str, change: Change, verdict: str = "") -> Interval:
    """Makes the row of a chart from a change of perplexity, with its mean written beside it for those
    who read numbers.
    """
    told = percent(change.mean)
    return Interval(name=name, mean=change.mean, low=change.low, high=change.high, verdict=verdict, text=told)


def layers(cells: Sequence[Cell], title: str, told: Callable[[float], str]) -> Picture | None:
    """Draws damage by role and layer, only of roles that were measured in more than one span of layers:
    a role measured whole has one colour and nothing to tell.
    """
    spans = Counter(cell.role for cell in cells)
    zoomed = [cell for cell in cells if spans[cell.role] > 1]
    if not zoomed:
        return None
    return picture("layers", title, lambda width: heat_map(width, zoomed, told))


def predicted(evidence: Evidence, limit: float | None) -> Picture | None:
    """Draws what the parts said, what the whole was, and what a text said that had no part in choosing."""
    whole = evidence.whole
    reported = evidence.run.reported
    of_parts = evidence.plan.predicted_delta_pct
    if whole is None or of_parts is None or reported is None or len(evidence.changed) < 2:
        return None
    rows = [
        interval("sum of the parts", Change(mean=of_parts, low=of_parts, high=of_parts)),
        interval("measured together", whole),
        interval("on the report text", reported),
    ]
    return picture(
        "predicted",
        "Predicted against measured",
        lambda width: estimates_chart(width, rows, limit, AGAINST_BASE),
    )
