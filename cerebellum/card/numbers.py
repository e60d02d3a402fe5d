"""Numbers as the card and the report write them: changes with their intervals, in percent or in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cerebellum.stats.estimate import Estimate
from cerebellum.stats.paired import as_percent

PERCENT = "percent"
NATS = "nats"
_MINUS = "\u2212"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change with its interval: of perplexity in percent, of KL divergence in nats a token.

    Artifacts hold some changes as bounds and some as estimates. Here they become one thing to tell; sums of
    bounds are on the safe side, for they let all errors go the same way.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float | None, bounds: Sequence[float | None] | None) -> Change | None:
        """Returns None where nothing was measured; a mean without an interval is its own interval."""
        if mean is None:
            return None
        low, high = bounds or (mean, mean)
        return cls(mean=mean, low=mean if low is None else low, high=mean if high is None else high)

    @classmethod
    def in_nats(cls, estimate: Estimate | None) -> Change | None:
        """Returns an estimate with its 95% interval in the unit of the estimate; None stays None,
        for a collapsed variant has no damage to tell.
        """
        if estimate is None:
            return None
        interval = estimate.interval()
        return cls(mean=interval.mean, low=interval.low, high=interval.high)

    @classmethod
    def in_percent(cls, estimate: Estimate | None) -> Change | None:
        """Returns an estimated change of the NLL, nats a token, as a change of perplexity in percent.

        Bounds are turned one by one, so the interval is no longer symmetric.
        """
        found = cls.in_nats(estimate)
        if found is None:
            return None
        return cls(mean=as_percent(found.mean), low=as_percent(found.low), high=as_percent(found.high))

    def __add__(self, other: Change) -> Change:
        """Adds means and bounds, as if both errors went the same way.

        That widens the sum where errors are independent, and is never too narrow.
        """
        return Change(mean=self.mean + other.mean, low=self.low + other.low, high=self.high + other.high)

    def __truediv__(self, units: float) -> Change:
        """Divides the mean and its bounds by a positive number of units, which turns a damage into
        a price of bytes.
        """
        return Change(mean=self.mean / units, low=self.low / units, high=self.high / units)

    def excludes(self, value: float) -> bool:
        """Says whether the interval lies on one side of ``value``.

        Only then may a sentence claim a difference; the mean alone never decides.
        """
        return value < self.low or value > self.high


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What damage is told in: ``unit`` is PERCENT of perplexity or NATS of KL divergence.

    ``noun`` names the damage at the head of a chart, ``words`` follow a number in a sentence.
    """

    unit: str
    noun: str
    words: str

    def told(self, value: float) -> str:
        """Writes a damage in this unit, with the digits that people need to compare two of them."""
        return percent(value) if self.unit == PERCENT else nats(value)


DIVERGENCE = Scale(unit=NATS, noun="KL divergence, nats a token,", words="nats a token of KL divergence")
PERPLEXITY = Scale(unit=PERCENT, noun="change of perplexity", words="of perplexity")


@dataclass(frozen=True, kw_only=True)
class ByteUnit:
    """The unit that bytes are told in where a rate is for each of them: GB, or MB of a small model."""

    name: str
    n_bytes: float

    @classmethod
    def for_model(cls, n_bytes: int) -> ByteUnit:
        """Chooses the unit by the bytes of the whole base, so that one card never mixes two: GB
        from a billion bytes, else MB.
        """
        return cls(name="GB", n_bytes=1e9) if n_bytes >= 1e9 else cls(name="MB", n_bytes=1e6)

    def of(self, n_bytes: float) -> float:
        """Returns bytes as a number of units; a damage divided by it is the price of a byte, in a
        size that people can picture.
        """
        return n_bytes / self.n_bytes


def percent(value: float, like: Sequence[float] = ()) -> str:
    """Writes a change of perplexity with the digits that its size (or that of its interval) calls for:
    +12.9%, +1.07%, +0.002%.
    """
    largest = max((abs(x) for x in (value, *like) if math.isfinite(x)), default=0.0)
    digits = 0 if largest >= 100 else 1 if largest >= 10 else 2 if largest >= 0.1 else 3
    return f"{value:+.{digits}f}%".replace("-", _MINUS)


def bounds(change: Change) -> tuple[str, str]:
    """Writes both bounds with the digits of the widest of the three numbers, without a percent sign."""
    like = (change.mean, change.low, change.high)
    return percent(change.low, like).removesuffix("%"), percent(change.high, like).removesuffix("%")


def with_interval(change: Change | None) -> str:
    """Writes a change of perplexity with its interval, all three with the digits of the widest: +1.07%
    [+0.96, +1.18]. A change that is not there is not finite.
    """
    if change is None:
        return "not finite"
    low, high = bounds(change)
    return f"{percent(change.mean, (change.mean, change.low, change.high))} [{low}, {high}]"


def nats(value: float) -> str:
    """Writes a change of KL divergence in nats a token: +0.0127, or with six digits where four would
    round most of it away.
    """
    return f"{value:+.{4 if abs(value) >= 0.001 else 6}f}".replace("-", _MINUS)


def points(change: Change) -> str:
    """Writes a difference of two percentages, in points, with its interval: −0.2 [−0.9, +0.5].

    It has no percent sign, because a percentage of a percentage would be read into it.
    """
    return f"{change.mean:+.1f} [{change.low:+.1f}, {change.high:+.1f}]".replace("-", _MINUS)


def spans(numbers: Sequence[int]) -> str:
    """Writes ascending numbers as runs, so that 40 layers fit into a cell of a table: 0, 1, 3, 4
    becomes 0–1, 3–4.
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in found)
