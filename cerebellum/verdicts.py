"""What every stage shares: a change of the base, a limit on damage, a measurement, and the one pump.

The pump: whatever decides without I/O is a generator that yields what it wants to know and is sent the answer, so
that the same logic runs on an engine, on a replayed ledger and in a unit test. What it returns is the result. It
may yield a ``Batch`` of questions that do not depend on each other, which many workers can then work on at once;
since a decision sees the answers that it asked for and nothing else, it is the same however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar, cast, overload

from cerebellum.stats.paired import Interval, as_nats

TOLERANT = "tolerant"
SENSITIVE = "sensitive"
UNDECIDED = "undecided"
COLLAPSED = "collapsed"

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Result = TypeVar("Result")
AskedOf = TypeVar("AskedOf", contravariant=True)
Answered = TypeVar("Answered", covariant=True)

SET_ASIDE = "set aside"
"""No verdict: a combination not worth the chunks that it would take yet, left for another; it never ships."""

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

    @property
    def forgiving_nats(self) -> float:
        """The limit with the indifference, nats a token: what looks tolerant is so once it is surely under this."""
        return as_nats(self.limit_pct + self.indifference_pct)

    def verdict(self, delta: Interval | None) -> str:
        """Decides when a bound clears the limit, or clears it but for the indifference; None has collapsed."""
        if delta is None:
            return COLLAPSED
        strict = as_nats(max(self.limit_pct - self.indifference_pct, -99.0))
        if delta.high < self.nats or (delta.mean < self.nats and delta.high < self.forgiving_nats):
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
    ``set_aside`` says that measuring stopped without a verdict, since going on would have cost more than it was worth;
    ``warnings`` are sentences about chunks that no interval withstands. ``read`` counts the chunks that the
    verdict rests on, from the first of their order, and is 0 where nobody said; others may be in the ledger.
    """

    changes: Changes
    delta: Interval | None
    trace: tuple[Interval, ...] = field(default=(), compare=False)
    kld: Interval | None = None
    top1: float | None = None
    set_aside: bool = False
    warnings: tuple[str, ...] = ()
    read: int = field(default=0, compare=False)

    def verdict(self, threshold: Threshold) -> str:
        """Returns the verdict against a limit, or that it was set aside without one."""
        found = threshold.verdict(self.delta)
        return SET_ASIDE if self.set_aside and found == UNDECIDED else found

    def with_divergence(self, kld: Interval, top1: float) -> Measurement:
        """Returns the same measurement with what is known of its divergence from the base."""
        return replace(self, kld=kld, top1=top1)


@dataclass(frozen=True, kw_only=True)
class Batch(Generic[Asked]):
    """Questions whose answers do not depend on each other; the answers are sent as a tuple in the same order.

    ``likely`` are questions that will probably be asked next, the likeliest first. Whoever has nothing better to
    do may work on them; nothing hears of it before they are asked.
    """

    asks: tuple[Asked, ...]
    likely: tuple[Asked, ...] = ()


Asking = Generator[Batch[Asked], tuple[Answer, ...], Result]
"""What decides without I/O and asks in batches."""


class Desk(Protocol[AskedOf, Answered]):
    """Answers questions, several of which may be under way at once."""

    def want(self, who: int, asks: Sequence[AskedOf], likely: Sequence[AskedOf]) -> None:
        """Hears what a generator wants from now on; what it wanted before and is not begun is forgotten."""
        ...

    def ready(self, ask: AskedOf) -> bool:
        """Says whether ``answer`` would not have to wait."""
        ...

    def wait(self) -> None:
        """Returns once something more is known."""
        ...

    def answer(self, ask: AskedOf) -> Answered:
        """Returns the answer, after waiting for it if need be."""
        ...


@overload
def drive(asking: Asking[Asked, Answer, Result], answer: Callable[[Asked], Answer]) -> Result: ...


@overload
def drive(asking: Generator[Asked, Answer, Result], answer: Callable[[Asked], Answer]) -> Result: ...


def drive(
    asking: Asking[Asked, Answer, Result] | Generator[Asked, Answer, Result],
    answer: Callable[[Asked], Answer],
) -> Result:
    """Runs a generator to its end, answering its questions one after another, and returns its result."""
    try:
        question = next(asking)
        while True:
            if isinstance(question, Batch):
                question = asking.send(tuple(map(answer, question.asks)))  # type: ignore[arg-type]
            else:
                question = asking.send(answer(cast(Asked, question)))  # type: ignore[arg-type]
    except StopIteration as stop:
        result: Result = stop.value
        return result


def drive_together(
    askings: Sequence[Asking[Asked, Answer, Result]], desk: Desk[Asked, Answer]
) -> tuple[Result, ...]:
    """Runs generators side by side and returns their results in the order given.

    Each goes on as soon as all that it asked is answered, whatever the others wait for, so the order in which
    answers come is nothing that it could see.
    """
    return _drive([_Talk.begun(asking) for asking in askings], desk)


@dataclass(frozen=True)
class _End(Generic[Result]):
    """What a generator that has ended returned."""

    result: Result


@dataclass(kw_only=True)
class _Talk(Generic[Asked, Answer, Result]):
    """A generator under way, with what it asks now or, at its end, returned."""

    asking: Asking[Asked, Answer, Result]
    batch: Batch[Asked] | _End[Result]

    @classmethod
    def begun(cls, asking: Asking[Asked, Answer, Result]) -> _Talk[Asked, Answer, Result]:
        """Starts a generator, up to what it asks first."""
        return cls(asking=asking, batch=_moved(lambda: next(asking)))

    def hear(self, answers: tuple[Answer, ...]) -> None:
        """Sends the generator what it asked for, and goes on to what it asks next."""
        self.batch = _moved(lambda: self.asking.send(answers))

    @property
    def result(self) -> Result:
        """What the generator returned, once it has ended."""
        return cast(_End[Result], self.batch).result


def _moved(step: Callable[[], Batch[Asked]]) -> Batch[Asked] | _End[Result]:
    """Takes a generator one step on."""
    try:
        return step()
    except StopIteration as stop:
        return _End(stop.value)


def _drive(talks: Sequence[_Talk[Asked, Answer, Result]], desk: Desk[Asked, Answer]) -> tuple[Result, ...]:
    for who, talk in enumerate(talks):
        _tell(who, talk, desk)
    while going := [(who, talk) for who, talk in enumerate(talks) if isinstance(talk.batch, Batch)]:
        moved = False
        for who, talk in going:
            while isinstance(talk.batch, Batch) and all(map(desk.ready, talk.batch.asks)):
                moved = True
                talk.hear(tuple(desk.answer(ask) for ask in talk.batch.asks))
                _tell(who, talk, desk)
        if not moved:
            desk.wait()
    return tuple(talk.result for talk in talks)


def _tell(who: int, talk: _Talk[Asked, Answer, Result], desk: Desk[Asked, Answer]) -> None:
    if isinstance(talk.batch, Batch):
        desk.want(who, talk.batch.asks, talk.batch.likely)
    else:
        desk.want(who, (), ())


def side_by_side(
    *askings: Asking[Asked, Answer, Result], likely: tuple[Asked, ...] = ()
) -> Asking[Asked, Answer, tuple[Result, ...]]:
    """Asks for several generators at once, as one: each batch holds what all of them want now."""
    talks = [_Talk.begun(asking) for asking in askings]
    while going := [talk for talk in talks if isinstance(talk.batch, Batch)]:
        batches = [cast(Batch[Asked], talk.batch) for talk in going]
        answers = iter(
            (
                yield Batch(
                    asks=tuple(ask for batch in batches for ask in batch.asks),
                    likely=(*likely, *(ask for batch in batches for ask in batch.likely)),
                )
            )
        )
        for talk, batch in zip(going, batches, strict=True):
            talk.hear(tuple(next(answers) for _ in batch.asks))
    return tuple(talk.result for talk in talks)
