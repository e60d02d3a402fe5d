"""Key findings: sentences that the numbers of this run bear out, and no others.

Each function looks for one thing and says nothing where the intervals do not tell it apart. There is
no sentence here that could be printed without having looked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from cerebellum.evidence import Change, Evidence, GroupRow
from cerebellum.html import Code, Sentence
from cerebellum.tables import count, size

MEGA, GIGA = 1e6, 1e9

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
        _verdicts,
        _rates,
        _families,
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


def with_interval(change: Change) -> str:
    """+1.07% [+0.96, +1.18]."""
    bounds = (change.low, change.high)
    like = (change.mean, *bounds)
    low, high = (percent(bound, like).removesuffix("%") for bound in bounds)
    return f"{percent(change.mean, like)} [{low}, {high}]"


def unit_of(evidence: Evidence) -> tuple[float, str]:
    """Damage is told per GB, or per MB where the model is small."""
    whole = evidence.plan["base_tensor_bytes"]
    return (GIGA, "GB") if whole >= GIGA else (MEGA, "MB")


def rate(row: GroupRow, unit: float) -> Change | None:
    """Percent of perplexity for each unit of bytes saved, with its interval."""
    if row.change is None or row.bytes_saved <= 0 or row.together_with:
        return None
    units = row.bytes_saved / unit
    return Change(mean=row.change.mean / units, low=row.change.low / units, high=row.change.high / units)


def rated(evidence: Evidence) -> list[tuple[GroupRow, Change]]:
    """Groups with a rate, the cheapest byte first."""
    unit, _ = unit_of(evidence)
    found = [(row, per) for row in evidence.rows if (per := rate(row, unit)) is not None]
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
    change = evidence.reported
    smaller = f"{size(abs(saved))} ({abs(share):.1f}%) {'smaller' if saved >= 0 else 'larger'} than the base"
    text = evidence.report["text"]
    if change.excludes(0):
        yield (f"{smaller}, for {with_interval(change)} of perplexity on ", Code(text), ".")
    else:
        yield (
            f"{smaller}, with no change of perplexity that could be told on ",
            Code(text),
            f": {with_interval(change)}.",
        )


def _verdicts(evidence: Evidence) -> Iterator[Sentence]:
    limit = evidence.limit
    if limit is None:
        return
    for verdict, words in (
        ("tolerant", f"under +{limit:g}%, the whole interval"),
        ("sensitive", f"over +{limit:g}%, the whole interval"),
        ("undecided", f"on neither side of +{limit:g}% for sure"),
        ("collapsed", "broken, with logits that were no longer finite"),
    ):
        rows = [row for row in evidence.rows if row.verdict == verdict]
        if rows:
            yield (
                f"{verdict.capitalize()} ({words}): {len(rows)} of {len(evidence.rows)}, ",
                *_names(rows),
                ".",
            )


def _rates(evidence: Evidence) -> Iterator[Sentence]:
    """The cheapest and the dearest byte, if their intervals are apart."""
    ranked, (_, name) = rated(evidence), unit_of(evidence)
    if len(ranked) < 2:
        return
    (cheap, low), (dear, high) = ranked[0], ranked[-1]
    if low.high >= high.low:
        yield (f"No group's bytes were surely dearer than another's: the intervals per {name} overlap.",)
        return
    times = f", {high.mean / low.mean:.0f} times as much" if low.low > 0 and high.mean > 2 * low.mean else ""
    yield (
        f"Each {name} saved in ",
        Code(cheap.name),
        f" cost {percent(low.mean)} of perplexity, in ",
        Code(dear.name),
        f" {percent(high.mean)}{times}.",
    )


def _families(evidence: Evidence) -> Iterator[Sentence]:
    """Damage per byte of whole families: the sum of their parts over the bytes of their parts."""
    unit, name = unit_of(evidence)
    told = []
    for family, _ in _FAMILIES:
        rows = [row for row in evidence.rows if family_of(row.role) == family and rate(row, unit) is not None]
        saved = sum(row.bytes_saved for row in rows)
        if rows and saved:
            damage = sum(row.change.mean for row in rows if row.change)
            told.append((damage / saved * unit, family))
    if len(told) > 1:
        parts = "; ".join(f"{family} {percent(per)}" for per, family in sorted(told))
        yield (f"By family, damage per {name} saved: {parts}.",)


def family_of(role: str) -> str | None:
    """The first family whose mark is in the role; experts come before plain feed-forward."""
    return next((family for family, marks in _FAMILIES if any(mark in role for mark in marks)), None)


def _cheaper_bytes_kept(evidence: Evidence) -> Iterator[Sentence]:
    """A limit on each group is blind to bytes: say so where it kept cheaper ones than it gave up."""
    ranked = rated(evidence)
    taken = [(row, per) for row, per in ranked if row.changed]
    kept = [(row, per) for row, per in ranked if not row.changed]
    if not taken or not kept:
        return
    dearest, cheapest = taken[-1], kept[0]
    if cheapest[1].high < dearest[1].low:
        _, name = unit_of(evidence)
        yield (
            "The limit on each group is blind to bytes: it demoted ",
            Code(dearest[0].name),
            f" at {percent(dearest[1].mean)} per {name} and kept ",
            Code(cheapest[0].name),
            f", which would have cost {percent(cheapest[1].mean)}.",
        )


def _additivity(evidence: Evidence) -> Iterator[Sentence]:
    """Whether the whole was more or less than the sum of its parts."""
    shipped, predicted = evidence.shipped, evidence.plan.get("predicted_delta_pct")
    if shipped is None or predicted is None:
        return
    whole = (
        f"measured together {with_interval(shipped.change)}, the sum of the parts said {percent(predicted)}"
    )
    if not shipped.change.excludes(predicted):
        yield (f"The parts added up: {whole}.",)
    else:
        word = "more" if shipped.change.mean > predicted else "less"
        yield (f"The whole did {word} damage than its parts: {whole}.",)


def _divergence(evidence: Evidence) -> Iterator[Sentence]:
    shipped = evidence.shipped
    if shipped is None or shipped.kld is None:
        return
    same = (
        f"; the most likely token was the same {100 * shipped.agreement:.1f}% of the time"
        if shipped.agreement
        else ""
    )
    kld = shipped.kld
    yield (f"KL divergence from the base {kld.mean:.4g} nats a token [{kld.low:.4g}, {kld.high:.4g}]{same}.",)


def _effort(evidence: Evidence) -> Iterator[Sentence]:
    scored, whole = evidence.measured.get("tokens_scored"), evidence.measured.get("tokens_full")
    if scored and whole and scored < whole:
        yield (
            f"The verdicts took {count(scored)} scored tokens; the whole text for every variant would have "
            f"been {count(whole)}, {whole / scored:.1f} times as many.",
        )


def _benchmarks(evidence: Evidence) -> Iterator[Sentence]:
    """Only differences that the pairing tells apart, and how many it does not."""
    paired = [b for b in evidence.benchmarks if b.p is not None and b.base_accuracy is not None]
    for bench in paired:
        assert bench.p is not None and bench.base_accuracy is not None
        if bench.p < 0.05:
            word = "better" if bench.accuracy > bench.base_accuracy else "worse"
            yield (Code(bench.task), f" is {word} than the base (McNemar p = {bench.p:.2g}).")
    alike = [b for b in paired if b.p is not None and b.p >= 0.05]
    if alike:
        names, least = ", ".join(bench.task for bench in alike), min(b.p or 0.0 for b in alike)
        yield (f"No difference to the base could be told on {names} (McNemar p of {least:.2g} or more).",)
