"""Key findings: sentences that the numbers of this run bear out, and no others.

Each function looks for one thing and says nothing where the intervals do not tell it apart. There is
no sentence here that could be printed without having looked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cerebellum.card.evidence import Benchmark, Change, Evidence, GroupRow
from cerebellum.page import Code, Sentence
from cerebellum.stats.binomial import holm
from cerebellum.units import count, size

MEGA, GIGA = 1e6, 1e9
_P = 0.05  # under it a difference is called one

_FAMILIES = (
    ("routed experts", ("_exps", "_chexps")),
    ("shared experts", ("_shexp",)),
    ("state-space layers", ("ssm_", "time_mix_", "shortconv.")),
    ("attention", ("attn_",)),
    ("feed-forward layers", ("ffn_",)),
)


def findings(evidence: Evidence) -> list[Sentence]:
    """What this run found, most important first."""
    looks: tuple[Callable[[Evidence], Iterator[Sentence]], ...] = (
        _outcome,
        _over_the_limit,
        _verdicts,
        _rates,
        _families,
        _bargains,
        _cheaper_bytes_kept,
        _additivity,
        _divergence,
        _effort,
        _benchmarks,
    )
    return [sentence for look in looks for sentence in look(evidence)]


def percent(value: float, like: Sequence[float] = ()) -> str:
    """With the digits that its size (or that of its interval) calls for: +12.9%, +1.07%, +0.002%."""
    largest = max((abs(x) for x in (value, *like) if math.isfinite(x)), default=0.0)
    digits = 0 if largest >= 100 else 1 if largest >= 10 else 2 if largest >= 0.1 else 3
    return f"{value:+.{digits}f}%".replace("-", "\u2212")


def with_interval(change: Change | None) -> str:
    """+1.07% [+0.96, +1.18]."""
    if change is None:
        return "not finite"
    bounds = (change.low, change.high)
    like = (change.mean, *bounds)
    low, high = (percent(bound, like).removesuffix("%") for bound in bounds)
    return f"{percent(change.mean, like)} [{low}, {high}]"


def unit_of(evidence: Evidence) -> tuple[float, str]:
    """Damage is told per GB, or per MB where the model is small."""
    whole = evidence.plan["base_tensor_bytes"]
    return (GIGA, "GB") if whole >= GIGA else (MEGA, "MB")


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What damage is told in: KL divergence where every group has it, for it is far less noisy near the
    base, else perplexity."""

    noun: str
    words: str
    of: Callable[[GroupRow], Change | None]
    told: Callable[[float], str]


def yardstick(evidence: Evidence) -> Yardstick:
    measured = [row for row in evidence.rows if row.change is not None]
    if measured and all(row.kld is not None for row in measured):
        return Yardstick(
            noun="KL divergence, nats a token,",
            words="nats a token of KL divergence",
            of=lambda row: row.kld,
            told=nats,
        )
    return Yardstick(
        noun="change of perplexity", words="of perplexity", of=lambda row: row.change, told=percent
    )


def rate(row: GroupRow, evidence: Evidence) -> Change | None:
    """Damage for each unit of bytes saved, with its interval."""
    damage, (unit, _) = yardstick(evidence).of(row), unit_of(evidence)
    if damage is None or row.bytes_saved <= 0 or row.together_with:
        return None
    units = row.bytes_saved / unit
    return Change(mean=damage.mean / units, low=damage.low / units, high=damage.high / units)


def rated(evidence: Evidence) -> list[tuple[GroupRow, Change]]:
    """Groups with a rate, the cheapest byte first."""
    found = [(row, per) for row in evidence.rows if (per := rate(row, evidence)) is not None]
    return sorted(found, key=lambda pair: pair[1].mean)


def _names(rows: Iterable[GroupRow]) -> Iterator[str | Code]:
    for place, row in enumerate(rows):
        if place:
            yield ", "
        yield Code(row.name)


def _outcome(evidence: Evidence) -> Iterator[Sentence]:
    saved = evidence.plan["bytes_saved"]
    share = 100 * saved / evidence.plan["base_tensor_bytes"]
    if not evidence.changed:
        yield ("Nothing was changed: no group was found that the limit allows at this type.",)
        return
    change, text = evidence.reported, Code(evidence.report["text"])
    smaller = f"{size(abs(saved))} ({abs(share):.1f}%) {'smaller' if saved >= 0 else 'larger'} than the base"
    if change is None:
        yield (f"{smaller}, and broken: its perplexity on ", text, " is not finite.")
    elif change.excludes(0):
        yield (f"{smaller}, its perplexity {with_interval(change)} on ", text, ".")
    else:
        told = with_interval(change)
        yield (f"{smaller}, with no change of perplexity that could be told on ", text, f": {told}.")


def _over_the_limit(evidence: Evidence) -> Iterator[Sentence]:
    """The limit is kept on the text that chooses; what another text says of it must be said."""
    limit, change = evidence.limit, evidence.reported
    if limit is not None and change is not None and change.mean > limit:
        sure = "surely " if change.low > limit else ""
        held = f" It held on the text that chose: {with_interval(evidence.whole)}." if evidence.whole else ""
        yield (f"On the report text that is {sure}over the limit of +{limit:g}%.{held}",)


def _verdicts(evidence: Evidence) -> Iterator[Sentence]:
    limit = evidence.limit
    if limit is None:
        yield from _moves(evidence)
        return
    clear = [row for row in evidence.rows if not row.near_tie]
    ties = [row for row in evidence.rows if row.near_tie]
    for verdict, words in (
        ("tolerant", f"under +{limit:g}%, the whole interval"),
        ("sensitive", f"over +{limit:g}%, the whole interval"),
        ("undecided", f"on neither side of +{limit:g}% for sure"),
        ("collapsed", "broken, with logits that were no longer finite"),
    ):
        yield from _listed(
            f"{verdict.capitalize()} ({words})", [r for r in clear if r.verdict == verdict], evidence
        )
    room = evidence.plan.get("indifference_pct", 0)
    words = f"within {room:g}% of +{limit:g}%, where either verdict will do"
    yield from _listed(f"Near ties ({words})", ties, evidence)
    back = [row for row in evidence.rows if row.verdict == "tolerant" and not row.changed]
    if any(combination.change.mean > limit for combination in evidence.combinations):
        yield from _listed(f"Kept all the same, for together they went over +{limit:g}%", back, evidence)


def _moves(evidence: Evidence) -> Iterator[Sentence]:
    """What a budget bought, and with which groups it paid."""
    for title, rows in (
        ("Promoted", [row for row in evidence.changed if row.bytes_saved < 0]),
        ("Demoted", [row for row in evidence.changed if row.bytes_saved >= 0]),
    ):
        moved = sum(row.bytes_saved for row in rows)
        word = "saved" if moved >= 0 else "spent"
        yield from _listed(f"{title} ({size(abs(moved))} {word})", rows, evidence)


def _listed(title: str, rows: Sequence[GroupRow], evidence: Evidence) -> Iterator[Sentence]:
    if rows:
        yield (f"{title}: {len(rows)} of {len(evidence.rows)}, ", *_names(rows), ".")


def _rates(evidence: Evidence) -> Iterator[Sentence]:
    """The cheapest and the dearest byte, if their intervals are apart."""
    ranked, (_, name), scale = rated(evidence), unit_of(evidence), yardstick(evidence)
    if len(ranked) < 2 or evidence.curves:
        return
    (cheap, low), (dear, high) = ranked[0], ranked[-1]
    if low.high >= high.low:
        yield (f"No group's bytes were surely dearer than another's: the intervals per {name} overlap.",)
        return
    times = f", {high.mean / low.mean:.0f} times as much" if low.low > 0 and high.mean > 2 * low.mean else ""
    yield (
        f"Each {name} saved in ",
        Code(cheap.name),
        f" cost {scale.told(low.mean)} {scale.words}, in ",
        Code(dear.name),
        f" {scale.told(high.mean)}{times}.",
    )


def _families(evidence: Evidence) -> Iterator[Sentence]:
    """Damage per byte of whole families, if the cheapest and the dearest are apart for sure."""
    _, name = unit_of(evidence)
    told = [(found, family) for family, _ in _FAMILIES if (found := _family(family, evidence)) is not None]
    told.sort(key=lambda pair: pair[0].mean)
    if len(told) < 2 or evidence.curves or told[0][0].high >= told[-1][0].low:
        return
    scale = yardstick(evidence)
    parts = "; ".join(f"{family} {scale.told(found.mean)}" for found, family in told)
    yield (f"By family, for each {name} saved: {parts} {scale.words}.",)


def _family(family: str, evidence: Evidence) -> Change | None:
    """The sum of its groups over the sum of their bytes; bounds add up too, so they are on the safe side."""
    rows = [row for row in evidence.rows if family_of(row.role) == family and rate(row, evidence)]
    found = [damage for row in rows if (damage := yardstick(evidence).of(row)) is not None]
    if not found:
        return None
    units = sum(row.bytes_saved for row in rows) / unit_of(evidence)[0]
    low, mean, high = (sum(getattr(c, part) for c in found) / units for part in ("low", "mean", "high"))
    return Change(mean=mean, low=low, high=high)


def _bargains(evidence: Evidence) -> Iterator[Sentence]:
    """By budget: where a byte bought most and where one was given up for least, in KL divergence."""
    unit, name = unit_of(evidence)
    if not evidence.curves:
        return
    sure = [row for row in evidence.changed if row.kld is not None and row.kld.excludes(0)]
    bought = [row for row in sure if row.bytes_saved < 0 and row.kld and row.kld.mean < 0]
    given = [row for row in sure if row.bytes_saved > 0]
    for rows, words in ((bought, "bought most"), (given, "was given up for least")):
        best = min(rows, key=lambda row: _slope(row, unit), default=None)
        if best is not None:
            cost = nats(_slope(best, unit))
            yield (f"A {name} {words} in ", Code(best.name), f" at {best.chosen_type}: {cost} nats a token.")


def _slope(row: GroupRow, unit: float) -> float:
    """Change of KL divergence for each unit of bytes moved, whichever way."""
    assert row.kld is not None
    return row.kld.mean / (abs(row.bytes_saved) / unit)


def family_of(role: str) -> str | None:
    """The first family whose mark is in the role; experts come before plain feed-forward."""
    return next((family for family, marks in _FAMILIES if any(mark in role for mark in marks)), None)


def _cheaper_bytes_kept(evidence: Evidence) -> Iterator[Sentence]:
    """A limit on each group is blind to bytes: say so where it kept cheaper ones than it gave up."""
    ranked = rated(evidence)
    taken = [(row, per) for row, per in ranked if row.changed]
    kept = [(row, per) for row, per in ranked if not row.changed]
    if evidence.limit is None or not taken or not kept:
        return
    (dear, high), (cheap, low) = taken[-1], kept[0]
    if low.high < high.low:
        (_, name), scale = unit_of(evidence), yardstick(evidence)
        yield (
            "The limit on each group is blind to bytes: it demoted ",
            Code(dear.name),
            f" at {scale.told(high.mean)} per {name} and kept ",
            Code(cheap.name),
            f", which would have cost {scale.told(low.mean)} {scale.words}.",
        )


def _additivity(evidence: Evidence) -> Iterator[Sentence]:
    """Whether the whole was more or less than the sum of its parts."""
    found, predicted = evidence.whole, evidence.plan.get("predicted_delta_pct")
    if found is None or predicted is None or len(evidence.changed) < 2:
        return
    whole = f"measured together {with_interval(found)}, the sum of the parts said {percent(predicted)}"
    if not found.excludes(predicted):
        yield (f"The parts added up: {whole}.",)
    else:
        word = "more" if found.mean > predicted else "less"
        yield (f"The whole did {word} damage than its parts: {whole}.",)


def _divergence(evidence: Evidence) -> Iterator[Sentence]:
    """How far the predictions moved: by limit from the base, by budget from the source."""
    shipped = evidence.shipped
    if shipped is not None and shipped.kld is not None:
        kld, same = shipped.kld, ""
        if shipped.agreement is not None:
            same = f"; the most likely token was the same {100 * shipped.agreement:.1f}% of the time"
        told = f"{kld.mean:.4g} nats a token [{kld.low:.4g}, {kld.high:.4g}]"
        yield (f"KL divergence from the base {told}{same}.",)
    found = evidence.divergence
    if found is not None:
        told = f"{nats(found.mean)} nats a token [{nats(found.low)}, {nats(found.high)}]"
        word = _side(found)
        yield (f"To the source's own predictions it is {word} than the base: KL divergence {told}.",)


def _side(change: Change) -> str:
    if not change.excludes(0):
        return "neither nearer nor farther, for sure,"
    return "nearer" if change.mean < 0 else "farther"


def nats(value: float) -> str:
    """+0.0127, −0.000059: a change of KL divergence."""
    return f"{value:+.{4 if abs(value) >= 0.001 else 6}f}".replace("-", "\u2212")


def _effort(evidence: Evidence) -> Iterator[Sentence]:
    scored, whole = evidence.measured.get("tokens_scored"), evidence.measured.get("tokens_full")
    if scored and whole and scored < whole:
        yield (
            f"The verdicts took {count(scored)} scored tokens; the whole text for every variant would have "
            f"been {count(whole)}, {whole / scored:.1f} times as many.",
        )


def _benchmarks(evidence: Evidence) -> Iterator[Sentence]:
    """Only differences that the pairing tells apart, all of them together at 5%, and what it does not."""
    paired = [b for b in evidence.benchmarks if b.p is not None]
    told = holm([b.p for b in paired if b.p is not None], _P)
    for bench in (b for b, real in zip(paired, told, strict=True) if real):
        yield from _difference(bench, len(paired))
    alike = [b for b, real in zip(paired, told, strict=True) if not real]
    if alike:
        names = ", ".join(dict.fromkeys(bench.task for bench in alike))
        yield (f"No difference to the base could be told on {names}{_could_show(alike)}.",)


def _difference(bench: Benchmark, of: int) -> Iterator[Sentence]:
    if bench.difference is None or bench.p is None:
        return
    word = "better" if bench.difference.mean > 0 else "worse"
    among = f", one of {of} comparisons" if of > 1 else ""
    how = f" ({bench.protocol}, {bench.metric}) is {word} than the base"
    yield (Code(bench.task), f"{how}: {points(bench.difference)} points, McNemar p = {bench.p:.2g}{among}.")


def _could_show(alike: Sequence[Benchmark]) -> str:
    """Silence about a difference means little where the questions are few."""
    known = [bench.detectable for bench in alike if bench.detectable is not None]
    if not known:
        return ""
    least, most = (f"{value:.1f}" for value in (min(known), max(known)))
    return f"; these questions would have shown {least if least == most else f'{least} to {most}'} points"


def points(change: Change) -> str:
    """-0.2 [-0.9, +0.5]: a difference of two percentages."""
    text = f"{change.mean:+.1f} [{change.low:+.1f}, {change.high:+.1f}]"
    return text.replace("-", "\u2212")
