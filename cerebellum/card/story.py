"""What a story tells of its evidence. There are three stories, one for each goal of a run.

The stage and the templates know only what stands here, so neither asks what the goal was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cerebellum.card.evidence import Evidence, GroupRow
from cerebellum.page.markdown import Sentence
from cerebellum.page.pictures import Picture


@dataclass(frozen=True, kw_only=True)
class Column:
    """Names a column of the table of groups: its title, and which of the cells of a group stand in it."""

    title: str
    cell: str


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """Another size of the same run, to be drawn beside this one: ``kld`` is from the source, nats a token."""

    label: str
    n_bytes: int
    kld: float


KLD = Column(title="KL divergence", cell="kld")


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What the templates say that differs from story to story.

    ``card_costs`` and ``report_cost`` are the columns that follow the bytes saved in the table of groups of
    the card and of the report. ``rates`` introduces a chart that only one story has, and ``untouched`` says which
    tensors stay as they are, where that is other than what the method protects.
    """

    chosen_by: str
    groups: str
    colours: str
    rates: str
    divergence_from: str
    card_costs: tuple[Column, ...]
    report_cost: Column
    untouched: str = ""


class Story(Protocol):
    """Tells a finished run to people.

    Nothing outside of a story asks what the goal was: the stage chooses the story once, and templates
    show what it gives them.
    """

    @property
    def evidence(self) -> Evidence:
        """Returns what the story is told from; the stage takes from it what both stories have in common."""

    def lead(self) -> Sentence:
        """Says in one sentence what the file is.

        It is asked only where some group was changed; an unchanged file has one sentence for both
        goals.
        """

    def method(self) -> Sentence:
        """Says how the groups were measured and chosen, with this run's own figures and never with
        those of another run.
        """

    def doubts(self) -> list[Sentence]:
        """Says what the measurements of this goal leave open; the card prints these sentences among
        its limits, beside those of every run.
        """

    def findings(self) -> list[Sentence]:
        """Says what this run found, the most important first.

        A sentence is there only where the intervals bear it out.
        """

    def drawings(self, others: Sequence[Shipped] = ()) -> dict[str, Picture]:
        """Draws every chart that there is data for, by name; ``others`` are the other sizes of the run.

        The names are those of the PNG files, and the templates put each chart where they know its
        name.
        """

    def rate(self, row: GroupRow) -> str:
        """Says what a group's damage is for each unit of bytes; ``none`` where it has no price of
        its own.
        """

    def wording(self) -> Wording:
        """Returns the words and columns that the templates put around the numbers, so that no
        template has to ask what the goal was.
        """
