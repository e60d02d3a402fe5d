"""The sizes of one run beside each other: a row each for the table, and what each changed.

A run for one size, or against a limit, has no such table: there the whole card is about its one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cerebellum.card.cells import GroupCells, group_cells, memory_cells
from cerebellum.card.numbers import Change, with_interval
from cerebellum.card.story import Shipped, Story
from cerebellum.page.markdown import Sentence
from cerebellum.units import size
from cerebellum.verify import Check


@dataclass(frozen=True, kw_only=True)
class SizeCells:
    """Holds one size as a row of text. ``kld`` is from the source, ``change`` of perplexity against the base."""

    label: str
    file: str
    splits: str
    size: str
    kld: str
    ppl: str
    change: str
    gpus: str
    verified: str


@dataclass(frozen=True, kw_only=True)
class FurtherSize:
    """Holds what the card says of a size beyond its row: what it is, the groups it changed, what it kept, its checks.

    ``damages`` are the columns that the groups have, as those of the first size have them.
    """

    label: str
    lead: Sentence
    changed: tuple[GroupCells, ...]
    kept: tuple[GroupCells, ...]
    checks: tuple[Check, ...]


def size_cells(story: Story) -> SizeCells:
    """Writes one size; what was not measured of it says so, for a table has no blanks."""
    evidence = story.evidence
    result = evidence.run.result
    found = evidence.from_source
    ppl = evidence.run.report.result.ppl
    return SizeCells(
        label=evidence.plan.file_label,
        file=result.file,
        splits=f" and {len(result.parts) - 1} more" if result.parts else "",
        size=size(result.bytes),
        kld="not measured" if found is None else _divergence(found),
        ppl="not finite" if ppl is None else f"{ppl:.4f}",
        change=with_interval(evidence.run.reported),
        gpus=memory_cells(evidence)[0].gpus,
        verified="ok" if evidence.run.verified.ok else "FAILED",
    )


def _divergence(found: Change) -> str:
    digits = 4 if found.mean >= 0.001 else 6
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def size_table(stories: Sequence[Story]) -> list[SizeCells]:
    """Returns a row for each size, the smallest file first; none where there is only one size."""
    if len(stories) < 2:
        return []
    return [size_cells(story) for story in sorted(stories, key=lambda one: one.evidence.run.result.bytes)]


def others_shipped(stories: Sequence[Story]) -> list[Shipped]:
    """Returns the sizes but the first whose divergence from the source was measured."""
    return [
        Shipped(label=one.plan.file_label, n_bytes=one.plan.file_bytes, kld=found.mean)
        for one in (story.evidence for story in stories[1:])
        if (found := one.from_source) is not None
    ]


def further_sizes(stories: Sequence[Story]) -> list[FurtherSize]:
    """Returns what the card says of every size but the first, which it is told from at length."""
    return [
        FurtherSize(
            label=story.evidence.plan.file_label,
            lead=story.lead() if story.evidence.changed else ("The base, unchanged.",),
            changed=tuple(group_cells(row, story) for row in story.evidence.rows if row.changed),
            kept=tuple(group_cells(row, story) for row in story.evidence.rows if not row.changed),
            checks=story.evidence.run.verified.checks,
        )
        for story in stories[1:]
    ]
