"""The story of a run for a budget: where bytes went, and how near the predictions stay to the source's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from cerebellum.card.drawings import layers, named, predicted, sensitivity
from cerebellum.card.evidence import BudgetEvidence, GroupRow
from cerebellum.card.findings import additivity, benchmarks, confidence, domains, listed, outcome
from cerebellum.card.merged import points_together
from cerebellum.card.numbers import Change, nats
from cerebellum.card.story import KLD, Shipped, Wording
from cerebellum.page.charts import Cell, Curve, Step, curves_chart, frontier_chart
from cerebellum.page.charts import Point as Dot
from cerebellum.page.markdown import Code, Sentence
from cerebellum.page.pictures import Picture, picture
from cerebellum.plan.artifacts import PointRow
from cerebellum.units import size

_UNCHANGED = "Nothing was changed: no combination within the budget was better than the base."


@dataclass(frozen=True)
class BudgetStory:
    """Tells a run for a budget: what it bought, with which groups it paid, and what the whole is worth."""

    evidence: BudgetEvidence

    def lead(self) -> Sentence:
        """Says how many groups were changed and what the budget was; that the file is the best is
        claimed only of those measured.
        """
        plan = self.evidence.plan
        changed = f"{len(self.evidence.changed)} of {len(self.evidence.rows)} tensor groups"
        return (
            f"llama.cpp's {plan.base} with {changed} at other types: the best file of at most "
            f"{size(plan.budget_bytes)} that was measured.",
        )

    def method(self) -> Sentence:
        """Says how many parts were measured alone, what follows from them, and how the file was chosen."""
        measured = self.evidence.measured
        return (
            f"{len(measured.responses)} parts of the model were each measured alone at a type, all else at "
            f"{measured.rounding.anchor}, on up to {measured.chunks:,} chunks of {measured.ctx} tokens of ",
            Code(measured.text),
            ", as KL divergence from the source. Types and layers between follow from the rounding error "
            "that each type makes, weighted by the importance matrix. A knapsack chose the best sum within "
            f"{size(self.evidence.plan.budget_bytes)}; {self._measured_whole()}",
        )

    def _measured_whole(self) -> str:
        """Counts the combinations that were measured whole.

        The base is not among them, for nobody proposed it as an answer.
        """
        candidates = self.evidence.plan.candidates
        n = sum(bool(row.changes) for row in candidates if row.measured_kld is not None)
        if not n:
            return "it was shipped as it was foretold, not measured whole on the selection text."
        return (
            f"{n} of its proposals were measured whole, and the best of those was shipped.{self._stepped()}"
        )

    def _stepped(self) -> str:
        """Says what was measured beside a whole plan, where the parts did not add up."""
        steps = self.evidence.plan.steps
        if not steps:
            return ""
        chunks = sum(step.chunks for step in steps)
        return (
            " The whole was not the sum of its parts, so that parts were measured again beside the best plan so far: "
            f"{len(steps)} steps, each that plan with one part at another type, {chunks:,} chunks in all."
        )

    def doubts(self) -> list[Sentence]:
        """Says how far to trust the plan's own divergence: it was chosen for being the least on these chunks."""
        if self.evidence.plan.measured_kld is None:
            return []
        return [
            (
                "The plan's own divergence was measured on the chunks that chose it, which flatters it by 1 to 3%; "
                "the report text chose nothing within this run.",
            )
        ]

    def findings(self) -> list[Sentence]:
        """Says what this run found, the most important first: what was saved, what moved, where a
        byte was worth most, and whether the parts foretold the whole.
        """
        evidence = self.evidence
        return list(
            chain(
                outcome(evidence, _UNCHANGED),
                domains(evidence),
                _moves(evidence),
                _bargains(evidence),
                additivity(evidence),
                _divergence(evidence),
                confidence(evidence),
                benchmarks(evidence),
            )
        )

    def drawings(self, others: Sequence[Shipped] = ()) -> dict[str, Picture]:
        """Draws each group at its type, layers where a role was told apart, every role at every
        type, and the best file of every size.
        """
        evidence = self.evidence
        title = f"Damage by role and layer at the smallest type, for each {evidence.unit.name} saved"
        return named(
            [
                sensitivity(evidence, lambda row: f"{row.name} {row.tried_type}", limit=None),
                layers(list(_cells(evidence)), title, "{:+.4f} nats".format),
                _curves(evidence),
                _frontier(evidence, others),
                predicted(evidence, limit=None),
            ]
        )

    def rate(self, row: GroupRow) -> str:
        """Returns ``none``: a knapsack weighs all bytes at once, so no group has a price of its own."""
        return "none"

    def wording(self) -> Wording:
        """Returns the words of a budget.

        Damage is told as KL divergence from the source, because that is what the plan made small.
        """
        return Wording(
            chosen_by="by budget",
            groups="What happens to perplexity when one group of tensors alone is brought to the type it was "
            "shipped at, or, if it was kept, to the first smaller one. The line through each dot is its "
            "interval.",
            colours="Green: promoted. Blue: demoted. Grey: kept.",
            rates="",
            divergence_from="from the source, against the base's own",
            card_costs=(),
            report_cost=KLD,
        )


# --- findings


def _moves(evidence: BudgetEvidence) -> Iterator[Sentence]:
    """Lists what the budget bought, and the groups it paid with.

    Bytes are of whole merged rows, as the tables show them.
    """
    for title, rows in (
        ("Promoted", [row for row in evidence.changed if row.bytes_saved < 0]),
        ("Demoted", [row for row in evidence.changed if row.bytes_saved >= 0]),
    ):
        moved = sum(row.bytes_saved for row in rows)
        word = "saved" if moved >= 0 else "spent"
        yield from listed(f"{title} ({size(abs(moved))} {word})", rows, evidence)


def _bargains(evidence: BudgetEvidence) -> Iterator[Sentence]:
    """Names where a byte bought most and where one was given up for least, if those damages are sure."""
    sure = [(row, row.kld) for row in evidence.changed if row.kld is not None and row.kld.excludes(0)]
    bought = [(row, kld) for row, kld in sure if row.bytes_saved < 0 and kld.mean < 0]
    given = [(row, kld) for row, kld in sure if row.bytes_saved > 0]
    for pairs, words in ((bought, "bought most"), (given, "was given up for least")):
        slopes = [(kld.mean / evidence.unit.of(abs(row.bytes_saved)), row) for row, kld in pairs]
        for slope, best in sorted(slopes, key=lambda pair: pair[0])[:1]:
            cost = f"{nats(slope)} nats a token"
            yield (f"A {evidence.unit.name} {words} in ", Code(best.name), f" at {best.chosen_type}: {cost}.")


def _divergence(evidence: BudgetEvidence) -> Iterator[Sentence]:
    """Says whether the predictions of the file are nearer to the source's than the base's are, and by
    how much; where the interval holds zero it says neither.
    """
    found = evidence.divergence
    if found is not None:
        told = f"{nats(found.mean)} nats a token [{nats(found.low)}, {nats(found.high)}]"
        word = "nearer" if found.mean < 0 else "farther"
        if not found.excludes(0):
            word = "neither nearer nor farther, for sure,"
        yield (f"To the source's own predictions it is {word} than the base: KL divergence {told}.",)


# --- charts


def _cells(evidence: BudgetEvidence) -> Iterator[Cell]:
    """Yields for every group the KL divergence of its smallest type, for each unit of bytes that it saves."""
    for row in evidence.plan.groups:
        own = [point for point in evidence.plan.points if point.group == row.name and point.kld]
        base = next((point.bytes for point in own if point.type is None), 0)
        least = min(own, key=lambda point: point.bytes, default=None)
        if least and least.kld and row.layers and least.bytes < base:
            saved = evidence.unit.of(base - least.bytes)
            yield Cell(role=row.role, layers=row.layers, delta=least.kld.mean / saved)


def _curves(evidence: BudgetEvidence) -> Picture | None:
    """Draws the damage of each whole role at every type that all of its layers could take.

    A role with a single point has no curve.
    """
    roles = dict.fromkeys(row.role for row in evidence.plan.groups)
    curves = [curve for role in roles if len((curve := _curve(role, evidence)).steps) > 1]
    if not curves:
        return None
    return picture(
        "curves",
        "KL divergence of each role at each type, against its size",
        lambda width: curves_chart(width, curves, evidence.unit.name),
    )


def _curve(role: str, evidence: BudgetEvidence) -> Curve:
    """Makes the curve of a whole role; a step is chosen where some of its layers are shipped at that type."""
    rows = [row for row in evidence.plan.groups if row.role == role]
    chosen = {evidence.plan.changes.get(row.name) for row in rows}
    together = points_together(evidence.plan, [row.name for row in rows])
    return Curve(name=role, steps=list(_steps(together, chosen, evidence)))


def _steps(points: Sequence[PointRow], chosen: set[str | None], evidence: BudgetEvidence) -> Iterator[Step]:
    for point in sorted(points, key=lambda point: point.bytes):
        kld = Change.in_nats(point.kld)
        if kld is not None:
            yield Step(
                size=evidence.unit.of(point.bytes),
                damage=kld.mean,
                low=kld.low,
                high=kld.high,
                chosen=point.type in chosen,
            )


def _frontier(evidence: BudgetEvidence, others: Sequence[Shipped]) -> Picture | None:
    """Draws the best foretold file of each size, the base, and every combination that was measured whole."""
    plan = evidence.plan
    unit = evidence.unit
    best = [
        (unit.of(row.file_bytes), row.predicted_kld) for row in plan.frontier if row.predicted_kld is not None
    ]
    if not best or not evidence.measured_plans:
        return None
    base_kld = evidence.measured.base_kld
    dots = [_dot("base", unit.of(_base_bytes(evidence)), base_kld, verdict="")]
    for found in evidence.measured_plans:
        shipped = plan.file_label if others else "shipped"
        label = shipped if found.shipped else ""
        dots.append(_dot(label, unit.of(found.n_bytes), base_kld + found.kld, verdict="measured"))
    dots += [_dot(one.label, unit.of(one.n_bytes), one.kld, verdict="measured") for one in others]
    return picture(
        "frontier",
        "The best file of every size, and what was measured",
        lambda width: frontier_chart(width, best, dots, unit.name),
    )


def _base_bytes(evidence: BudgetEvidence) -> int:
    """Returns the bytes of the base as a file: of the shipped one, all groups back at their base types."""
    plan = evidence.plan
    moved = plan.changes
    shipped = sum(point.bytes for point in plan.points if moved.get(point.group, "") == point.type)
    at_base = sum(point.bytes for point in plan.points if point.group in moved and point.type is None)
    return plan.file_bytes - shipped + at_base


def _dot(label: str, n_units: float, damage: float, verdict: str) -> Dot:
    return Dot(name=label, size=n_units, delta=damage, low=damage, high=damage, verdict=verdict, label=label)
