"""Shows what became of a plan on a finetune: the promise, before and now, and what was measured again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from cerebellum.cli.tables import planned_tables, report_table, shown, verify_table
from cerebellum.recipes.transferred import Figure, Transferred
from cerebellum.units import nats, percent

if TYPE_CHECKING:
    from cerebellum.recipes.transfer import Done


def transfer_tables(done: Done) -> list[RenderableType]:
    """Returns the promise and how it held, the groups that were measured again, the plan and the proof of the file."""
    found = done.transferred
    again = [_again(found)] if found.again else []
    plan = [*planned_tables(done.plan)]
    return [
        _promise(found),
        *again,
        *plan,
        verify_table(done.verified),
        report_table(done.verified),
        _line(found),
    ]


def _promise(found: Transferred) -> Table:
    """Shows what the plan did on its own model beside what it does on the finetune, each against its own base."""
    table = Table("", shown(found.run_source), shown(found.source), title=f"The plan of {shown(found.run)}")
    table.add_row("perplexity against the base", _changed(found.before_pct), _changed(found.now_pct))
    if found.before_share is not None:
        shares = (found.before_share, found.now_share)
        told = ["collapsed" if share is None else f"{100 * share:.1f}%" for share in shares]
        table.add_row("share of the base's KL divergence", *told)
    table.add_row("over the promise by", "", _in_nats(found.over, "collapsed"))
    return table


def _again(found: Transferred) -> Table:
    """Shows the groups that were measured again, with what they cost before."""
    told = _changed if found.before_share is None else _in_nats
    table = Table("group", "type", "before", "now", "", title="Measured again")
    for row in found.again:
        mark = "differs" if row.differs else ""
        table.add_row(shown(row.name), shown(row.type), told(row.before), told(row.now), mark)
    return table


def _changed(figure: Figure) -> str:
    return percent(figure.mean, figure.ci)


def _in_nats(figure: Figure, unknown: str = "-") -> str:
    return unknown if figure.mean is None else nats(figure.mean, figure.ci or (None, None))


def _line(found: Transferred) -> str:
    """Says whether the promise holds on the finetune, how well that is known, and what was done about it."""
    words = {
        "holds": "still holds",
        "broken": "does not hold",
        "open": f"is neither confirmed nor refuted by {found.chunks} of {found.of_chunks} chunks",
    }
    text = f"the promise ({shown(found.promise)}) {words[found.verdict]} on {shown(found.source)}"
    if not found.fits:
        text += "; its file is over the budget, for its header is longer"
    return text + ("; the plan was revised" if found.revised else "")
