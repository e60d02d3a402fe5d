"""What to measure against a limit, and when to stop. No I/O: generators yield ``ChunkAsk``s, are sent the answers.

So the same logic runs on an engine, on a replayed ledger and in a unit test. A race advances all
undecided candidates together, in blocks that grow, until a rule puts each on one side of the threshold;
near-ties that nobody cares about are called either way. What all of them need for the next look is one batch.
A look sees the chunks from the first of the order to the look's number and no others, so that chunks which idle
workers have scored ahead change no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cerebellum.measure.bundles import Bundles
from cerebellum.stats.paired import Interval
from cerebellum.stats.sequential import (
    PROVEN,
    Rule,
    Sample,
    chance_below,
    chunk_spread,
    chunks_to_tell,
    foretold_sd,
)
from cerebellum.stats.unusual import unusual
from cerebellum.verdicts import SENSITIVE, UNDECIDED, Asking, Batch, Changes, Measurement, Threshold

Vector = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ChunkAsk:
    """Please measure the base with ``changes`` on these ``chunks`` of the text."""

    changes: Changes
    chunks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkScores:
    """The answer to a ``ChunkAsk``, a value a chunk in the order asked, both in nats/token.

    ``nll_N`` is the mean NLL, not finite where the variant has collapsed. ``kld_N`` is the mean KL divergence
    from the base, NaN for chunks where nobody measured it; None where it was measured on none.
    """

    nll_N: Vector
    kld_N: Vector | None = None


Sweep = Asking[ChunkAsk, ChunkScores, T]

_FORGIVEN = 0.25  # of the indifference, on the side where a combination would be given up
_A_LOOK = 15  # chunks that it costs about to read a candidate up to its next look
_UNLIKELY = 0.3  # below this chance of being under the limit, the least that is given up
_AHEAD = 2  # looks beyond the next one whose chunks idle workers may score


def chunk_order(n_chunks: int, seed: int) -> tuple[int, ...]:
    """The one seeded order in which base and all variants visit the chunks of a text."""
    return tuple(int(i) for i in np.random.default_rng(seed).permutation(n_chunks))


def fresh_order(n_chunks: int, seed: int, together: int = 1) -> tuple[int, ...]:
    """Another order from the same seed, independent of ``chunk_order``: that of the combinations.

    Where ``together`` chunks share a decode, whole decodes change places: their chunks came together by chance. A last
    one that has fewer stays the last, so that looks end where decodes do.

    The noise of the groups on the first chunks of their order decides which combination is tried. Read on
    the same chunks, it would look better than it is: with sharp bounds at their full level one in four
    combinations just over the limit passed.
    """
    drawn = np.random.default_rng((seed, 1)).permutation(n_chunks)
    place = {int(chunk): number for number, chunk in enumerate(drawn)}
    every = Bundles.of(chunk_order(n_chunks, seed), together).every
    moved = sorted(every, key=lambda bundle: (len(bundle) < together, place[bundle[0]]))
    return tuple(chunk for bundle in moved for chunk in bundle)


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """``order``: the chunks in the order they are visited; ``looks``: how many are in at each look, at most all.

    ``scored_per_chunk`` tokens of a chunk count. ``worth`` is how many chunks what a candidate promises is worth: it is
    set aside without a verdict where going on would cost more, see ``sets_aside``; None waits for verdicts. Where
    there is one, the candidates are such as may ship, and none is given up for lying near the limit: see ``gives_up``.
    """

    order: tuple[int, ...]
    looks: tuple[int, ...]
    threshold: Threshold
    rule: Rule
    scored_per_chunk: int
    worth: float | None = None

    def gives_up(self, delta: Interval) -> bool:
        """Whether a candidate that may ship is over the limit, not merely within the indifference below it.

        Any verdict will do there, but one of the two costs bytes: a combination at +1.95% of +2% was given up as
        often as not. A quarter of the indifference remains, so that no long text is read to its end for a tie.
        """
        nearer = replace(self.threshold, indifference_pct=_FORGIVEN * self.threshold.indifference_pct)
        return nearer.verdict(delta) == SENSITIVE

    def sets_aside(self, delta: Interval) -> bool:
        """Whether to go on with a candidate that may ship costs more chunks than what it promises is worth.

        It does where its chance to be under the limit, by what was read so far, times its worth is less than a few
        chunks; or where it would take more chunks yet than it is worth, for it lies close to the limit. Nothing is
        proven by it, so that looking again has no price.
        """
        if self.worth is None or delta.se is None or not 0 < delta.n < delta.population:
            return False
        holds = chance_below(self.threshold.nats, delta.mean, delta.se)
        nearest = self.threshold.forgiving_nats - min(delta.mean, self.threshold.nats)
        whole = chunks_to_tell(chunk_spread(delta), nearest, PROVEN, delta.population)
        return holds < min(_A_LOOK / self.worth, _UNLIKELY) or whole - delta.n > self.worth


@dataclass
class _Runner:
    """A candidate under way: its paired differences and divergences so far, nats/token."""

    changes: Changes
    differences: Vector = field(default_factory=lambda: np.empty(0))
    divergences: Vector = field(default_factory=lambda: np.empty(0))
    trace: list[Interval] = field(default_factory=list)
    collapsed: bool = False
    set_aside: bool = False

    def advance(self, difference: Vector, divergence: Vector | None) -> None:
        self.differences = np.append(self.differences, difference)
        if divergence is not None:
            self.divergences = np.append(self.divergences, divergence[np.isfinite(divergence)])
        self.collapsed = not np.isfinite(self.differences).all()

    def sample(self, scored_per_chunk: int) -> Sample:
        kld = float(self.divergences.mean()) if len(self.divergences) else 0.0
        return Sample(
            values_N=self.differences, foretold_sd=foretold_sd(kld, scored_per_chunk) if kld > 0 else None
        )

    def measurement(self, order: Sequence[int]) -> Measurement:
        if self.collapsed:
            return Measurement(
                changes=dict(self.changes),
                delta=None,
                trace=tuple(self.trace),
                read=len(self.differences),
            )
        return Measurement(
            changes=dict(self.changes),
            delta=self.trace[-1],
            trace=tuple(self.trace),
            set_aside=self.set_aside,
            warnings=unusual(self.differences, order),
            read=len(self.differences),
        )


def race(candidates: Sequence[Changes], settings: RaceSettings) -> Sweep[tuple[Measurement, ...]]:
    """All candidates against one threshold, each for as long as it takes to decide.

    Candidates that are nearest to a verdict go first in each round, so that an interrupted race has
    settled as many as it could.
    """
    runners = [_Runner(changes=changes) for changes in candidates]
    undecided = list(runners)
    base = np.empty(0)
    for number, look in enumerate(settings.looks):
        if not undecided:
            break
        answers = yield _batch(undecided, len(base), number, settings)
        base = np.append(base, answers[0].nll_N)
        for runner, answer in zip(undecided, answers[1:], strict=True):
            done = len(runner.differences)
            runner.advance(answer.nll_N - base[done:look], answer.kld_N)
        _look(runners, undecided, settings)
        undecided = sorted(
            (runner for runner in undecided if not _settled(runner, settings)),
            key=lambda runner: -_distance(runner.trace[-1], settings.threshold.nats),
        )
    return tuple(runner.measurement(settings.order) for runner in runners)


def _batch(
    undecided: Sequence[_Runner], base_done: int, number: int, settings: RaceSettings
) -> Batch[ChunkAsk]:
    """Asks for the base and all undecided at a look; likely are the looks after it, the least decided first."""
    look = settings.looks[number]
    asks = [ChunkAsk(changes={}, chunks=settings.order[base_done:look])]
    asks += [
        ChunkAsk(changes=runner.changes, chunks=settings.order[len(runner.differences) : look])
        for runner in undecided
    ]
    likely = []
    for later in settings.looks[number + 1 : number + 1 + _AHEAD]:
        chunks = settings.order[look:later]
        likely.append(ChunkAsk(changes={}, chunks=chunks))
        likely += [ChunkAsk(changes=runner.changes, chunks=chunks) for runner in reversed(undecided)]
        look = later
    return Batch(asks=tuple(asks), likely=tuple(likely))


def _look(runners: Sequence[_Runner], undecided: Sequence[_Runner], settings: RaceSettings) -> None:
    """Gives the undecided their intervals; the decided still tell how well divergences foretell the spread."""
    sound = [runner for runner in runners if not runner.collapsed]
    samples = [runner.sample(settings.scored_per_chunk) for runner in sound]
    for runner, delta in zip(sound, settings.rule.intervals(samples), strict=True):
        if any(runner is other for other in undecided):
            runner.trace.append(delta)
            runner.set_aside = delta.n < settings.looks[-1] and settings.sets_aside(delta)


def _settled(runner: _Runner, settings: RaceSettings) -> bool:
    if runner.collapsed or runner.set_aside:
        return True
    delta = runner.trace[-1]
    verdict = settings.threshold.verdict(delta)
    if verdict == SENSITIVE and settings.worth is not None:
        return settings.gives_up(delta)
    return verdict != UNDECIDED


def _distance(delta: Interval, threshold_nats: float) -> float:
    """How many half-widths the mean lies from the threshold."""
    return abs(delta.mean - threshold_nats) / max(delta.high - delta.mean, 1e-12)
