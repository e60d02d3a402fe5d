"""The story of a run under a limit: which groups may be demoted, and what each verdict rests on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from cerebellum.card.domains import over_in_some
from cerebellum.card.drawings import layers, named, predicted, sensitivity
from cerebellum.card.evidence import Combination, GroupRow, LimitEvidence
from cerebellum.card.findings import additivity, benchmarks, confidence, domains, listed, outcome
from cerebellum.card.numbers import PERCENT, Change, percent, with_interval
from cerebellum.card.story import Column, Shipped, Wording
from cerebellum.page.charts import Cell, Panel, Rate, paths_chart, rates_chart, sizes_chart
from cerebellum.page.charts import Point as Dot
from cerebellum.page.markdown import Code, Sentence
from cerebellum.page.pictures import Picture, picture
from cerebellum.units import count
from cerebellum.verdicts import COLLAPSED, SENSITIVE, TOLERANT, UNDECIDED

_UNCHANGED = "Nothing was changed: no group was found that the limit allows at this type."

_FAMILIES = (
    ("routed experts", ("_exps", "_chexps")),
    ("shared experts", ("_shexp",)),
    ("state-space layers", ("ssm_", "time_mix_", "shortconv.")),
    ("attention", ("attn_",)),
    ("feed-forward layers", ("ffn_",)),
)
"""Families of roles with the marks of their names; the first that matches counts, so experts come first."""


@dataclass(frozen=True)
class LimitStory:
    """Tells a run under a limit: verdicts against it, bytes by their price, the whole against its parts."""

    evidence: LimitEvidence

    def lead(self) -> Sentence:
        """Says how many groups were demoted and to which types, and that each of them was measured
        on real text.
        """
        evidence = self.evidence
        at = " and ".join(sorted({row.chosen_type for row in evidence.changed if row.chosen_type}))
        changed = f"{len(evidence.changed)} of {len(evidence.rows)} tensor groups"
        base = evidence.plan.base
        return (f"llama.cpp's {base} with {changed} at {at}, chosen by measuring each on real text.",)

    def method(self) -> Sentence:
        """Says on how many chunks each group was read, out of how many, and with what confidence
        all verdicts hold together.
        """
        measured = self.evidence.measured
        tried = [row for row in self.evidence.rows if row.change is not None]
        chunks = [row.chunks for row in tried if row.chunks] or [0]
        read = f"{max(chunks):,}"
        if min(chunks) < max(chunks):
            read = f"{min(chunks):,} to {max(chunks):,}"
        sure = ""
        if any(row.trace for row in tried):
            level = f"{100 - 100 * measured.alpha:g}%"
            ends = f"{100 - 200 * measured.alpha:g}%"
            sure = (
                f" A verdict stops as soon as it holds; all verdicts hold together with {level} confidence, the "
                f"intervals beside them, which have two ends, with {ends}."
            )
        return (
            f"{len(tried)} groups of tensors were each brought to another type alone and read {read} of "
            f"{measured.chunks_in_text:,} chunks of {measured.ctx} tokens of ",
            Code(measured.text),
            f", paired with the base chunk by chunk.{sure}",
        )

    def doubts(self) -> list[Sentence]:
        """Names the groups that were changed although their verdict is another than tolerant, which
        happens where somebody planned by hand or with another limit, and chunks that no interval withstands.
        """
        doubtful = [row for row in self.evidence.changed if row.verdict != TOLERANT]
        changed: list[Sentence] = [
            (Code(row.name), f" was changed although its verdict is {row.verdict}.") for row in doubtful
        ]
        rows = self.evidence.measured.measurements
        return changed + [
            (Code(" + ".join(row.groups)), f": {warning}. No interval from so few chunks withstands that.")
            for row in rows
            for warning in row.warnings
        ]

    def findings(self) -> list[Sentence]:
        """Says what this run found, the most important first: what was saved, the verdicts, the
        price of bytes, and whether the parts foretold the whole.
        """
        evidence = self.evidence
        return list(
            chain(
                outcome(evidence, _UNCHANGED),
                _over_the_limit(evidence),
                ((line,) for line in over_in_some(evidence.run.report, evidence.limit)),
                domains(evidence),
                _verdicts(evidence),
                _cheap_and_dear(evidence),
                _families(evidence),
                _cheaper_bytes_kept(evidence),
                additivity(evidence),
                _divergence(evidence),
                _effort(evidence),
                confidence(evidence),
                benchmarks(evidence),
            )
        )

    def drawings(self, others: Sequence[Shipped] = ()) -> dict[str, Picture]:
        """Draws the verdicts, the price of bytes, layers where a role was told apart, every variant
        by size, and how each verdict was reached.
        """
        evidence = self.evidence
        return named(
            [
                sensitivity(evidence, lambda row: row.name, evidence.limit),
                _rates(evidence),
                layers(_cells(evidence), "Damage by role and layer", percent),
                _sizes(evidence),
                _paths(evidence),
                predicted(evidence, evidence.limit),
            ]
        )

    def rate(self, row: GroupRow) -> str:
        """Says what a group's damage is for each unit of bytes saved, on the scale of this run;
        ``none`` where it saves nothing alone.
        """
        per = self.evidence.rate(row)
        return self.evidence.scale.told(per.mean) if per else "none"

    def wording(self) -> Wording:
        """Returns the words of a limit; what each group costs for a unit of bytes has a column of its own."""
        evidence = self.evidence
        price = Column(title=f"for each {evidence.unit.name}", cell="rate")
        return Wording(
            chosen_by=f"limit +{evidence.limit:g}% each",
            groups="What happens to perplexity when one group of tensors alone is brought to "
            f"{evidence.plan.demote}. The line through each dot is its interval; a dashed line is the limit.",
            colours="Green: under the limit. Red: over it. Grey: undecided.",
            rates=f"Damage ({evidence.scale.noun.rstrip(',')}) divided by the bytes it saves: "
            "what a group costs for what it gives.",
            divergence_from=f"from the base; so is the damage for each {evidence.unit.name}",
            card_costs=(price,),
            report_cost=price,
        )


# --- findings


def _over_the_limit(evidence: LimitEvidence) -> Iterator[Sentence]:
    """Says so where the report text does not bear the limit out: it is kept only on the text that chooses."""
    limit = evidence.limit
    change = evidence.run.reported
    if change is not None and change.mean > limit:
        sure = "surely " if change.low > limit else ""
        held = f" It held on the text that chose: {with_interval(evidence.whole)}." if evidence.whole else ""
        yield (f"On the report text that is {sure}over the limit of +{limit:g}%.{held}",)


def _verdicts(evidence: LimitEvidence) -> Iterator[Sentence]:
    """Lists the groups of each verdict, the near ties, and the tolerant ones that were kept all the same."""
    limit = evidence.limit
    clear = [row for row in evidence.rows if not row.near_tie]
    for verdict, words in (
        (TOLERANT, f"under +{limit:g}%, the whole interval"),
        (SENSITIVE, f"over +{limit:g}%, the whole interval"),
        (UNDECIDED, f"on neither side of +{limit:g}% for sure"),
        (COLLAPSED, "broken, with logits that were no longer finite"),
    ):
        rows = [row for row in clear if row.verdict == verdict]
        yield from listed(f"{verdict.capitalize()} ({words})", rows, evidence)
    room = evidence.plan.indifference_pct
    for verdict, words in (
        (TOLERANT, f"surely under +{limit + room:g}%, not surely under +{limit:g}%"),
        (SENSITIVE, f"surely over +{limit - room:g}%, not surely over +{limit:g}%"),
    ):
        ties = [row for row in evidence.rows if row.near_tie and row.verdict == verdict]
        yield from listed(f"Near ties ({words})", ties, evidence)
    if any(combination.change.mean > limit for combination in evidence.combinations):
        back = [row for row in evidence.rows if row.verdict == TOLERANT and not row.changed]
        yield from listed(f"Kept all the same, for together they went over +{limit:g}%", back, evidence)


def _cheap_and_dear(evidence: LimitEvidence) -> Iterator[Sentence]:
    """Names the cheapest and the dearest byte if their intervals are apart; if they overlap it says
    that no order was found, which is a finding too.
    """
    ranked = evidence.rated
    scale = evidence.scale
    if len(ranked) < 2:
        return
    (cheap, low), (dear, high) = ranked[0], ranked[-1]
    unit = evidence.unit.name
    if low.high >= high.low:
        yield (f"No group's bytes were surely dearer than another's: the intervals per {unit} overlap.",)
        return
    times = f", {high.mean / low.mean:.0f} times as much" if low.low > 0 and high.mean > 2 * low.mean else ""
    yield (
        f"Each {unit} saved in ",
        Code(cheap.name),
        f" cost {scale.told(low.mean)} {scale.words}, in ",
        Code(dear.name),
        f" {scale.told(high.mean)}{times}.",
    )


def _families(evidence: LimitEvidence) -> Iterator[Sentence]:
    """Tells the damage for each unit of bytes of whole families, if the cheapest and the dearest are
    apart for sure.
    """
    told = [(found, name) for name, _ in _FAMILIES if (found := _family(name, evidence)) is not None]
    told.sort(key=lambda pair: pair[0].mean)
    if len(told) < 2 or told[0][0].high >= told[-1][0].low:
        return
    scale = evidence.scale
    parts = "; ".join(f"{name} {scale.told(found.mean)}" for found, name in told)
    yield (f"By family, for each {evidence.unit.name} saved: {parts} {scale.words}.",)


def _family(name: str, evidence: LimitEvidence) -> Change | None:
    """Divides the sum of a family's damages by the sum of its bytes; None of a family without a rate."""
    rows = [row for row in evidence.rows if family_of(row.role) == name and evidence.rate(row)]
    found = [damage for row in rows if (damage := evidence.damage(row)) is not None]
    if not found:
        return None
    return sum(found[1:], start=found[0]) / evidence.unit.of(sum(row.bytes_saved for row in rows))


def family_of(role: str) -> str | None:
    """Returns the first family whose mark is in the role; experts come before plain feed-forward."""
    return next((family for family, marks in _FAMILIES if any(mark in role for mark in marks)), None)


def _cheaper_bytes_kept(evidence: LimitEvidence) -> Iterator[Sentence]:
    """Says where the limit kept cheaper bytes than it gave up: on each group alone, it is blind to bytes."""
    taken = [(row, per) for row, per in evidence.rated if row.changed]
    kept = [(row, per) for row, per in evidence.rated if not row.changed]
    if not taken or not kept:
        return
    (dear, high), (cheap, low) = taken[-1], kept[0]
    scale = evidence.scale
    if low.high < high.low:
        yield (
            "The limit on each group is blind to bytes: it demoted ",
            Code(dear.name),
            f" at {scale.told(high.mean)} per {evidence.unit.name} and kept ",
            Code(cheap.name),
            f", which would have cost {scale.told(low.mean)} {scale.words}.",
        )


def _divergence(evidence: LimitEvidence) -> Iterator[Sentence]:
    """Tells how far the predictions of what was shipped moved from the base's, where that was measured."""
    shipped = evidence.shipped
    if shipped is None or shipped.kld is None:
        return
    same = ""
    if shipped.agreement is not None:
        same = f"; the most likely token was the same {100 * shipped.agreement:.1f}% of the time"
    kld = shipped.kld
    told = f"{kld.mean:.4g} nats a token [{kld.low:.4g}, {kld.high:.4g}]"
    yield (f"KL divergence from the base {told}{same}.",)


def _effort(evidence: LimitEvidence) -> Iterator[Sentence]:
    """Compares the tokens that were scored with what every variant on the whole text would have taken:
    the saving of stopping early.
    """
    scored = evidence.measured.tokens_scored
    whole = evidence.measured.tokens_full
    if 0 < scored < whole:
        yield (
            f"The verdicts took {count(scored)} scored tokens; the whole text for every variant would have "
            f"been {count(whole)}, {whole / scored:.1f} times as many.",
        )


# --- charts


def _rates(evidence: LimitEvidence) -> Picture | None:
    """Draws the damage for each unit of bytes saved, the cheapest on top, where there are two to compare."""
    ranked = evidence.rated
    scale = evidence.scale
    if len(ranked) < 2:
        return None
    rates = [
        Rate(
            name=row.name,
            value=per.mean,
            low=per.low,
            high=per.high,
            changed=row.changed,
            text=scale.told(per.mean),
        )
        for row, per in ranked
    ]
    label = f"{scale.noun} for each {evidence.unit.name} saved"
    return picture(
        "rates",
        f"Damage for each {evidence.unit.name} saved",
        lambda width: rates_chart(width, rates, label, scale.unit == PERCENT),
    )


def _cells(evidence: LimitEvidence) -> list[Cell]:
    """Returns the change of perplexity, in percent, of each group that lies in layers; what lies
    outside of them has no place on the map.
    """
    return [
        Cell(role=row.role, layers=row.layers, delta=row.change.mean)
        for row in evidence.alone
        if row.layers and row.change
    ]


def _sizes(evidence: LimitEvidence) -> Picture | None:
    """Draws the base, each variant that was measured, and what was shipped, by size and damage."""
    saved = {row.name: row.bytes_saved for row in evidence.rows}
    dots = [
        _dot(evidence, row.name, row.bytes_saved, row.change, row.verdict)
        for row in evidence.alone
        if row.change
    ]
    for found in evidence.combinations:
        if all(name in saved for name in found.groups):
            dots.append(_combination_dot(evidence, found, sum(saved[name] for name in found.groups)))
    if len(dots) < 2:
        return None
    nothing = Change(mean=0, low=0, high=0)
    base = _dot(evidence, "base", 0, nothing, verdict="", label="base")
    return picture(
        "sizes",
        "Size and damage of everything that was measured",
        lambda width: sizes_chart(width, [base, *dots], evidence.unit.name, evidence.limit),
    )


def _combination_dot(evidence: LimitEvidence, found: Combination, saved: int) -> Dot:
    label = "shipped" if found == evidence.shipped else ""
    return _dot(evidence, " + ".join(found.groups), saved, found.change, found.verdict, label)


def _dot(
    evidence: LimitEvidence, name: str, saved: int, change: Change, verdict: str, label: str = ""
) -> Dot:
    """Makes the dot of a variant that saves so many bytes of the base's tensors."""
    return Dot(
        name=name,
        size=evidence.unit.of(evidence.plan.base_tensor_bytes - saved),
        delta=change.mean,
        low=change.low,
        high=change.high,
        verdict=verdict,
        label=label,
    )


def _paths(evidence: LimitEvidence) -> Picture | None:
    """Draws how verdicts were reached, only where that was recorded and one at least took a second look."""
    rows = [row for row in evidence.rows if row.trace]
    if max((len(row.trace) for row in rows), default=0) < 2:
        return None
    panels = [
        Panel(
            name=row.name,
            verdict=row.verdict,
            chunks=[look.chunks for look in row.trace],
            means=[look.change.mean for look in row.trace],
            lows=[look.change.low for look in row.trace],
            highs=[look.change.high for look in row.trace],
        )
        for row in rows
    ]
    return picture(
        "paths",
        "How each verdict was reached over chunks",
        lambda width: paths_chart(width, panels, evidence.limit),
    )
