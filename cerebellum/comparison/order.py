"""Which of several files does less damage, pair by pair, until the order is sure. Decides without I/O.

A generator yields what it wants read, is sent the divergences and ends with the order of every pair. A file whose
pairs are all settled is read no further, since nothing about it is open.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cerebellum.comparison.judgement import LESS, MORE, OPEN, TIE, Order, Standing
from cerebellum.stats.paired import Interval
from cerebellum.stats.sequential import union_share
from cerebellum.stats.strata import Looks, StrataMean, Stratum

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ReadOn:
    """Please read the first ``n`` chunks of every text, in its order, with these files."""

    files: tuple[int, ...]
    n: int


Divergences = Mapping[int, Sequence[Vector]]
"""The answer: by file, for each text, the mean KL divergence of each chunk from the source, nats a token."""


@dataclass(frozen=True, kw_only=True)
class PairOrder:
    """How the damage of ``a`` stands to that of ``b``, files by their number.

    ``difference`` is a's mean divergence less b's over the texts, nats a token, at the level of the pair at its last
    look. ``wrong`` is a bound of the chance that its sign is wrong, whenever it was looked at.
    """

    a: int
    b: int
    order: Order
    difference: Interval
    wrong: float

    def turned(self) -> PairOrder:
        """Returns the same as seen from the other file."""
        d = self.difference
        return PairOrder(
            a=self.b,
            b=self.a,
            order=_TURNED[self.order],
            difference=Interval(mean=-d.mean, low=-d.high, high=-d.low, n=d.n, population=d.population),
            wrong=self.wrong,
        )


_TURNED: Mapping[Order, Order] = {LESS: MORE, MORE: LESS, TIE: TIE, OPEN: OPEN}


@dataclass(frozen=True, kw_only=True)
class OrderSettings:
    """How many ``files`` there are, the chunks of each text, when to look, and how sure to be.

    All orders together are wrong with chance ``alpha``. Two files are alike where their damages surely differ by
    less than ``tie`` of the smaller one.
    """

    files: int
    populations: tuple[int, ...]
    looks: Looks
    alpha: float
    tie: float


@dataclass(frozen=True, kw_only=True)
class Ordered:
    """What came out: every pair once, the look at which each file was read last, and who collapsed."""

    pairs: tuple[PairOrder, ...]
    last_look: tuple[int, ...]
    collapsed: frozenset[int]
    sure: bool


def order_files(settings: OrderSettings) -> Generator[ReadOn, Divergences, Ordered]:
    """Yields what to read next, until every pair is settled or the texts, or the looks, are at their end."""
    state = _State(settings)
    for look, n in enumerate(settings.looks.at):
        active = state.active()
        if not active:
            break
        state.take((yield ReadOn(files=active, n=n)), look)
    return Ordered(
        pairs=tuple(state.pairs.values()),
        last_look=tuple(state.last_look),
        collapsed=frozenset(state.collapsed),
        sure=not state.active(),
    )


class _State:
    """What was read so far, and what of the pairs it settled."""

    def __init__(self, settings: OrderSettings) -> None:
        self._settings = settings
        self._read: dict[int, Sequence[Vector]] = {}
        self.pairs: dict[tuple[int, int], PairOrder] = {}
        self.last_look = [0] * settings.files
        self.collapsed: set[int] = set()
        self._share = union_share(settings.alpha, math.comb(settings.files, 2))

    def active(self) -> tuple[int, ...]:
        """Returns the files of the pairs that are open; at first all of them."""
        numbers = range(self._settings.files)
        if not self._read:
            return tuple(numbers)
        unsettled = [
            pair
            for pair in combinations(numbers, 2)
            if not self.collapsed & set(pair) and self.pairs[pair].order == OPEN
        ]
        return tuple(number for number in numbers if any(number in pair for pair in unsettled))

    def take(self, found: Divergences, look: int) -> None:
        """Takes in what was read at a look, and settles what it settles."""
        self._read |= found
        for number, texts in found.items():
            self.last_look[number] = look
            if not all(np.isfinite(text).all() for text in texts):
                self.collapsed.add(number)
        for pair in combinations(sorted(found), 2):
            if not self.collapsed & set(pair) and self._is_open(pair):
                self.pairs[pair] = self._compared(pair, look)

    def _is_open(self, pair: tuple[int, int]) -> bool:
        return pair not in self.pairs or self.pairs[pair].order == OPEN

    def _compared(self, pair: tuple[int, int], look: int) -> PairOrder:
        a, b = (self._read[number] for number in pair)
        populations = self._settings.populations
        strata = [
            Stratum(values_N=x - y, population=population)
            for x, y, population in zip(a, b, populations, strict=True)
        ]
        found = StrataMean.of(strata)
        spent = self._settings.looks.shares[look]
        level = self._share * spent
        difference = found.interval(level)
        wrong = min(1.0, found.wrong_sign() / spent) if spent else found.wrong_sign()
        alike = self._settings.tie * min(float(np.mean([text.mean() for text in texts])) for texts in (a, b))
        order = OPEN
        if difference.high < 0:
            order = LESS
        elif difference.low > 0:
            order = MORE
        if (-alike < difference.low and difference.high < alike) or difference.low == difference.high == 0:
            order = TIE
        return PairOrder(a=pair[0], b=pair[1], order=order, difference=difference, wrong=wrong)


# --- who survives


@dataclass(frozen=True, kw_only=True)
class Stand:
    """Where a file stands: beaten, or matched, by a file ``by`` that is no larger; or it survives all of these.

    ``confidence`` is that of the standing by itself; None where it is open or collapsed. ``open_to`` are the files
    that are no larger and may be better.
    """

    standing: Standing
    by: int | None = None
    confidence: float | None = None
    open_to: tuple[int, ...] = ()


def stands(ordered: Ordered, n_bytes: Sequence[int]) -> tuple[Stand, ...]:
    """Returns where each file stands: who is not beaten in both size and damage.

    A file's rivals are those that are no larger. A claim about one rival is wrong with a chance of ``wrong`` at
    most, so that of all together is at most the sum.
    """
    found = []
    for number in range(len(n_bytes)):
        if number in ordered.collapsed:
            found.append(Stand(standing="collapsed"))
            continue
        rivals = [
            pair
            for one in ordered.pairs
            for pair in (one, one.turned())
            if pair.a == number and _is_rival(pair, n_bytes)
        ]
        found.append(_stand(rivals))
    return tuple(found)


def _is_rival(pair: PairOrder, n_bytes: Sequence[int]) -> bool:
    """Says whether b may take a's place: it is no larger; of two alike in size and damage the first keeps its own."""
    if pair.order == TIE and n_bytes[pair.b] == n_bytes[pair.a]:
        return pair.b < pair.a
    return n_bytes[pair.b] <= n_bytes[pair.a]


def _stand(rivals: Sequence[PairOrder]) -> Stand:
    """Returns where a file stands, given how its damage stands to those of its rivals."""
    better = [pair for pair in rivals if pair.order == MORE]
    if better:
        surest = min(better, key=lambda pair: pair.wrong)
        return Stand(standing="beaten", by=surest.b, confidence=_sure(surest.wrong * len(rivals)))
    alike = [pair for pair in rivals if pair.order == TIE]
    if alike:
        return Stand(standing="matched", by=alike[0].b)
    unknown = [pair for pair in rivals if pair.order == OPEN]
    if unknown:
        return Stand(standing="open", open_to=tuple(pair.b for pair in unknown))
    return Stand(standing="survives", confidence=_sure(sum(pair.wrong for pair in rivals)))


def _sure(wrong: float) -> float:
    return max(0.0, 1 - wrong)
