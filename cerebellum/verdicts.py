"""What every stage shares: a change of the base, a limit on damage, a measurement, and the one pump.

The pump: whatever decides without I/O is a generator that yields what it wants to know and is sent the answer, so
that the same logic runs on an engine, on a replayed ledger and in a unit test. What it returns is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from cerebellum.stats.paired import Interval, as_nats

TOLERANT = "tolerant"
SENSITIVE = "sensitive"
UNDECIDED = "undecided"
COLLAPSED = "collapsed"

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Result = TypeVar("Result")

SET_ASIDE = "set aside"
"""No verdict: a combination that is probably over the limit, left for another; nothing that ships depends on it."""

Changes = Mapping[str, str]
"""A variant in code: group name -> type name. Groups that are not named stay at the base."""

NOTHING: Changes = {}
"""The base itself."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A limit on the increase of perplexity, in percent; within ``indifference_pct`` of it any verdict will do."""

    limit_pct: float
    indifference_pct: float = 0.0

    @property
    def nats(self) -> float:
        """The limit in nats a token."""
        return as_nats(self.limit_pct)

    def verdict(self, delta: Interval | None) -> str:
        """Decides when a bound clears the limit, or clears it but for the indifference; None has collapsed."""
        if delta is None:
            return COLLAPSED
        forgiving = as_nats(self.limit_pct + self.indifference_pct)
        strict = as_nats(max(self.limit_pct - self.indifference_pct, -99.0))
        if delta.high < self.nats or (delta.mean < self.nats and delta.high < forgiving):
            return TOLERANT
        if delta.low > self.nats or (delta.mean >= self.nats and delta.low > strict):
            return SENSITIVE
        return UNDECIDED

    def near_tie(self, delta: Interval | None) -> bool:
        """Says whether the verdict leans on the indifference: the interval holds the limit itself."""
        if delta is None or self.verdict(delta) == UNDECIDED:
            return False
        return bool(delta.low <= self.nats <= delta.high)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The paired change of some groups against the base, on ``delta.n`` chunks.

    ``delta`` is in nats a token, and None where the logits were not finite: the variant has collapsed.
    ``trace`` holds the interval at every look. ``kld`` (nats a token) and ``top1`` are against the base.
    ``set_aside`` says that measuring stopped without a verdict, since the limit was probably exceeded;
    ``warnings`` are sentences about chunks that no interval withstands.
    """

    changes: Changes
    delta: Interval | None
    trace: tuple[Interval, ...] = field(default=(), compare=False)
    kld: Interval | None = None
    top1: float | None = None
    set_aside: bool = False
    warnings: tuple[str, ...] = ()

    def verdict(self, threshold: Threshold) -> str:
        """Returns the verdict against a limit, or that it was set aside without one."""
        found = threshold.verdict(self.delta)
        return SET_ASIDE if self.set_aside and found == UNDECIDED else found

    def with_divergence(self, kld: Interval, top1: float) -> Measurement:
        """Returns the same measurement with what is known of its divergence from the base."""
        return replace(self, kld=kld, top1=top1)


def drive(asking: Generator[Asked, Answer, Result], answer: Callable[[Asked], Answer]) -> Result:
    """Runs a generator to its end, answering each of its questions, and returns its result."""
    try:
        question = next(asking)
        while True:
            question = asking.send(answer(question))
    except StopIteration as stop:
        result: Result = stop.value
        return result
