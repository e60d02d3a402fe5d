"""The story of a run with somebody's types: what they are against the base, and what they do as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from cerebellum.card.evidence import GivenEvidence, GroupRow
from cerebellum.card.findings import benchmarks, confidence, outcome
from cerebellum.card.numbers import with_interval
from cerebellum.card.story import Column, Shipped, Wording
from cerebellum.page.markdown import Code, Sentence
from cerebellum.page.pictures import Picture

_UNCHANGED = "Nothing was changed: the recipe has the types of the base."


@dataclass(frozen=True)
class GivenStory:
    """Tells a run whose types were given: nothing was chosen here, so there are no verdicts on groups."""

    evidence: GivenEvidence

    def lead(self) -> Sentence:
        """Names the recipe, and how much of the base it changes."""
        evidence = self.evidence
        tensors = sum(row.tensors for row in evidence.changed)
        given = f"The types of {evidence.plan.recipe}: {tensors} tensors are other than in llama.cpp's "
        return (f"{given}{evidence.plan.base}, measured against it on real text.",)

    def method(self) -> Sentence:
        """Says that the types were given, and on how much text the whole was measured."""
        plan = self.evidence.plan
        read = f"{plan.chunks:,} of {plan.of_chunks:,} chunks of {plan.ctx} tokens of "
        return (
            "The type of every tensor was given by the recipe ",
            Code(plan.recipe),
            f" and none was chosen by measuring; the whole was measured on {read}",
            Code(plan.text),
            ", paired with the base chunk by chunk.",
        )

    def doubts(self) -> list[Sentence]:
        """Says that no group was measured alone, so that nobody looks for figures that are not there."""
        return [("No group was measured alone, so nothing here says which of the types matter.",)]

    def findings(self) -> list[Sentence]:
        """Says what the recipe saved and what it costs."""
        evidence = self.evidence
        return list(
            chain(outcome(evidence, _UNCHANGED), _whole(evidence), confidence(evidence), benchmarks(evidence))
        )

    def drawings(self, others: Sequence[Shipped] = ()) -> dict[str, Picture]:
        """Draws nothing: there is one measurement, and its figure says it."""
        return {}

    def rate(self, row: GroupRow) -> str:
        """Says that no group has a price of its own."""
        return "none"

    def wording(self) -> Wording:
        """Returns the words of given types."""
        return Wording(
            chosen_by="given by a recipe",
            groups="The tensors of each role that get one type by the recipe.",
            colours="",
            rates="",
            divergence_from="from the base",
            card_costs=(),
            report_cost=Column(title="for each byte", cell="rate"),
            untouched="What the recipe does not name stays at the base's types.",
        )


def _whole(evidence: GivenEvidence) -> Iterator[Sentence]:
    """Tells the change of perplexity and the divergence of the whole on the selection text."""
    plan = evidence.plan
    if evidence.whole is None:
        return
    told = f", {plan.chunks:,} chunks: perplexity {with_interval(evidence.whole)}"
    if (kld := evidence.divergence) is not None:
        told += f", KL divergence from the base {kld.mean:.4g} nats a token [{kld.low:.4g}, {kld.high:.4g}]"
    if plan.top1_agreement is not None:
        told += f", the same most likely token {100 * plan.top1_agreement:.1f}% of the time"
    yield ("On ", Code(plan.text), f"{told}.")
