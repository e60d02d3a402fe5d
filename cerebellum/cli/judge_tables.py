"""Shows judge.json as tables on a console: who survives, then every text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from cerebellum.cli.tables import shown
from cerebellum.comparison.judgement import Judgement
from cerebellum.comparison.published import ON_TEXT, SURVIVORS, summary, survivors_rows, text_rows

_STYLES = {"survives": "green", "collapsed": "bold red"}


def judge_tables(found: Judgement) -> list[Table | str]:
    """Returns the survivors, a table for each text, and how sure it all is."""
    title = f"{shown(found.source)}: size and KL divergence from it, over {len(found.texts)} texts"
    parts: list[Table | str] = [_table(title, SURVIVORS, survivors_rows(found))]
    for text in found.texts:
        named = f"{shown(text.name)}: {shown(text.file)}"
        parts.append(_table(named, ON_TEXT, text_rows(found, text.name)))
    return [*parts, *map(shown, summary(found))]


def _table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*titles, title=title)
    for row in rows:
        table.add_row(*map(shown, row), style=next((_STYLES[cell] for cell in row if cell in _STYLES), ""))
    return table
