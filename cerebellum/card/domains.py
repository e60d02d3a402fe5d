"""What the report text says of each of its domains, for the card, the report and the command line alike.

A claim about domains is one of several that could have been made, so it rests on wider intervals: all of them hold
together with the usual confidence (a union bound over the domains).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cerebellum.card.numbers import Change, nats, percent, with_interval
from cerebellum.stats.estimate import Estimate
from cerebellum.stats.paired import CONFIDENCE, Interval, as_nats, as_percent
from cerebellum.verify import DomainReport, Report

_NOT_KNOWN = "not measured"


@dataclass(frozen=True, kw_only=True)
class DomainCells:
    """Is a row of the table of domains, as it is shown. Divergences are in nats a token, from the source."""

    name: str
    chunks: str
    base: str
    result: str
    change: str
    kld_base: str
    kld_result: str
    kld_change: str


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A domain with one change of it, at the 95% of the artifact and at what all domains hold together."""

    name: str
    shown: Change
    sure: Change


def domain_cells(report: Report) -> list[DomainCells]:
    """Writes the domains of a report text in its order; of a text that is one there are none."""
    return [_cells(domain) for domain in report.domains]


def _cells(domain: DomainReport) -> DomainCells:
    found = domain.divergence
    ppl = ("not finite" if m.ppl is None else f"{m.ppl:.4f}" for m in (domain.base, domain.result))
    base, result = ppl
    return DomainCells(
        name=domain.name,
        chunks=f"{domain.chunks:,} of {domain.of_chunks:,}",
        base=base,
        result=result,
        change=_percent(domain),
        kld_base=_nats(found.base, found.base_ci).replace("+", "") if found else _NOT_KNOWN,
        kld_result=_nats(found.result, found.result_ci).replace("+", "") if found else _NOT_KNOWN,
        kld_change=_nats(found.change, found.change_ci) if found else _NOT_KNOWN,
    )


def _percent(domain: DomainReport) -> str:
    """Writes the change of perplexity; a single chunk says nothing of an interval, and the cell says that."""
    if domain.delta_pct is not None and domain.ci_pct[0] is None:
        return f"{percent(domain.delta_pct)}, no interval"
    return with_interval(Change.of(domain.delta_pct, domain.ci_pct))


def _nats(mean: float | None, bounds: tuple[float | None, float | None]) -> str:
    change = Change.of(mean, bounds)
    if change is None:
        return "not finite"
    if bounds[0] is None:
        return f"{nats(change.mean)}, no interval"
    return f"{nats(change.mean)} [{nats(change.low)}, {nats(change.high)}]"


def across_domains(report: Report) -> Iterator[str]:
    """Says whether the file gains in one domain at another's cost, in perplexity and in divergence from the source.

    It says nothing of a text that is one, and claims a difference only where the intervals bear it out.
    """
    if len(report.domains) < 2:
        return
    yield from _told(
        list(_perplexities(report.domains)), "perplexity", lambda value: percent(value), tell_alike=True
    )
    yield from _told(list(_divergences(report.domains)), "KL divergence from the source", nats)


def over_in_some(report: Report, limit: float) -> Iterator[str]:
    """Names domains whose perplexity surely rises by more than a limit (percent) that all of them share.

    Nothing is said where the whole report text rises by more: that is told of the whole.
    """
    over = [one for one in _perplexities(report.domains) if one.sure.low > limit]
    if over and (report.delta_pct or 0.0) <= limit:
        named = _listed(over, lambda value: percent(value))
        yield f"The limit of +{limit:g}% is about all domains together: perplexity surely rises by more on {named}."


def _told(
    seen: Sequence[_Seen], noun: str, written: Callable[[float], str], *, tell_alike: bool = False
) -> Iterator[str]:
    gains = [one for one in seen if one.sure.high < 0]
    costs = [one for one in seen if one.sure.low > 0]
    if gains and costs:
        yield (
            f"It gains in some domains at the cost of others: against the base, {noun} falls on "
            f"{_listed(gains, written)} and rises on {_listed(costs, written)}."
        )
        return
    if len(seen) < 2:
        return
    least = min(seen, key=lambda one: one.sure.high)
    most = max(seen, key=lambda one: one.sure.low)
    if least.sure.high < most.sure.low:
        yield f"Domains do not bear the change alike: {noun} by {_listed([least, most], written)}."
    elif tell_alike:
        yield f"No two of its {len(seen)} domains could be told apart by their change of {noun}."


def _listed(seen: Sequence[_Seen], written: Callable[[float], str]) -> str:
    return ", ".join(
        f"{one.name} ({written(one.shown.mean)} [{written(one.shown.low)}, {written(one.shown.high)}])"
        for one in seen
    )


def _perplexities(domains: Sequence[DomainReport]) -> Iterator[_Seen]:
    for domain in domains:
        shown = Change.of(domain.delta_pct, domain.ci_pct)
        if shown is not None:
            logs = Change(mean=as_nats(shown.mean), low=as_nats(shown.low), high=as_nats(shown.high))
            wide = _widened(logs, domain.chunks, len(domains))
            sure = Change(mean=shown.mean, low=as_percent(wide.low), high=as_percent(wide.high))
            yield _Seen(name=domain.name, shown=shown, sure=sure)


def _divergences(domains: Sequence[DomainReport]) -> Iterator[_Seen]:
    for domain in domains:
        found = domain.divergence
        shown = Change.of(found.change, found.change_ci) if found else None
        if found is not None and shown is not None:
            yield _Seen(name=domain.name, shown=shown, sure=_widened(shown, found.chunks, len(domains)))


def _widened(change: Change, n: int, of: int) -> Change:
    """Returns a change with the interval that holds together with ``of`` others; of one chunk it has no end."""
    interval = Interval(mean=change.mean, low=change.low, high=change.high, n=n, population=n)
    wide = Estimate.from_interval(interval).interval(1 - (1 - CONFIDENCE) / of)
    if n < 2:
        return Change(mean=change.mean, low=float("-inf"), high=float("inf"))
    return Change(mean=change.mean, low=wide.low, high=wide.high)
