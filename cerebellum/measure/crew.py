"""Hands out what is wanted to many workers, and takes in what comes back. It decides nothing about the model.

Only this process writes the ledger: workers return vectors. Who works on what follows four rules, in this order: go
on with the variant that is open; take one that nobody works on, a resident one first; make a shard that is missing;
help with a variant that others work on. Errands, which have nothing to do with variants, go before all
of them, first to a worker that has their model open. What is surely wanted goes before what is likely. A worker that
dies is replaced and its tasks are given out again; a variant that three die on, at the same decode, or an errand that
three die on, ends the run by its name.

Chunks are given out by whole decodes (bundles.py), so that no number depends on who is asked for what. Every worker
first scores the first decode of the base, or two where that is a chunk alone. One whose numbers are not those of the
others, bit for bit, or whose engine has another name, is not used: no paired difference may be one between two kinds
of arithmetic.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.timings import book_beside, timed
from cerebellum.engine.workers import HOST, MODEL, Done, Lane, Outcome, Pool, Task
from cerebellum.errors import CerebellumError
from cerebellum.measure.bundles import Bundle
from cerebellum.measure.scorer import Found
from cerebellum.measure.worker import Scored, ScoreTask, ShardTask
from cerebellum.progress import Reporter
from cerebellum.shards import ShardJob, Shards, Variant
from cerebellum.verdicts import NOTHING, Changes

_MOST_DEATHS = 3
_QUICK = 0.5  # seconds: where tasks are shorter, each worker has its next one already
_TASK_SECONDS = 0.1  # a task has at least so much to do, where a chunk takes less
_AHEAD = 1  # guesses for each worker, of one who asks: what is likeliest comes first, and the rest fails the more often
_TOLD_EVERY = 10.0  # seconds between two lines of progress
_PATIENCE = 5.0  # seconds between two looks at the clock while nothing comes back

Column = NDArray[np.float32]
"""NLL of the anchor chunks by token, nats, (chunks, scored tokens)."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Chunks of a variant that somebody wants: their NLL, and for some their divergence from the reference.

    The ``variant`` is given, or named by its ``changes`` where its shards may have to be made first.
    """

    nll: tuple[int, ...]
    kld: tuple[int, ...] = ()
    variant: Variant | None = None
    changes: Changes = field(default_factory=dict)
    label: str = ""


class Book(Protocol):
    """What wishes are about: a text, a reference, and the ledger in which answers are written."""

    def missing(self, variant: Variant, wish: Wish) -> list[Bundle]:
        """Returns the decodes with chunks of a wish that the ledger lacks, in the order of the wish."""
        ...

    def task(self, variant: Variant, bundles: Sequence[Bundle]) -> ScoreTask:
        """Returns what a worker has to do for some decodes."""
        ...

    def record(self, variant: Variant, found: Found) -> None:
        """Writes a chunk into the ledger, unless it is there."""
        ...

    def reference_first(self, variant: Variant, bundle: Bundle) -> Variant | None:
        """Returns the reference where its own measurement of the decode should come first, or None."""
        ...

    def kept(self) -> tuple[Variant, tuple[Bundle, ...]] | None:
        """Returns the reference and the decodes of which its predictions are kept, or None without one."""
        ...


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """What every worker does first, such as chunks of the base; ``known`` is what the ledger has of them.

    ``column`` takes the numbers to compare out of a result, ``record`` keeps the result of the first worker, and
    ``said`` names for people what the numbers are of.
    """

    task: Task
    identity: str
    known: Column | None
    column: Callable[[object], Column]
    record: Callable[[object], None]
    said: str


@dataclass(frozen=True, kw_only=True)
class Errand:
    """A task that has nothing to do with variants, and its name for people.

    ``opens`` names the model that a worker has open afterwards, in the place of the one that it measures. Such an
    errand may take minutes, so that none is queued behind another one.
    """

    about: str
    task: Task
    opens: str = ""


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A task that is under way, and what becomes of its result; ``about`` names it for people."""

    worker: int
    task: Task
    about: str
    land: Callable[[object], None]
    variant: Variant | None = None
    bundles: tuple[Bundle, ...] = ()
    is_check: bool = False
    opens: str = ""


@dataclass(kw_only=True)
class _Hand:
    """What is known of one worker: whether its numbers were compared, what it has prepared, opened and staged."""

    flights: list[int] = field(default_factory=list)
    proven: bool = False
    prepared: Book | None = None
    showing: str = ""
    resident: set[str] = field(default_factory=set)


@dataclass(kw_only=True)
class _Survey:
    """What can be given out now: decodes by variant, in the order they are wanted, and shards that are missing."""

    bundles: dict[str, list[Bundle]] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)
    jobs: list[ShardJob] = field(default_factory=list)

    @property
    def paths(self) -> set[Path]:
        """The files of the shards."""
        return {job.path for job in self.jobs}

    @property
    def left(self) -> int:
        """How many decodes nobody has taken."""
        return sum(map(len, self.bundles.values()))

    def add(self, variant: Variant, bundle: Bundle) -> None:
        """Takes in a decode, once."""
        self.variants.setdefault(variant.digest, variant)
        wanted = self.bundles.setdefault(variant.digest, [])
        if bundle not in wanted:
            wanted.append(bundle)

    def take(self, digest: str, n: int) -> tuple[Bundle, ...]:
        """Takes the first decodes of a variant out."""
        taken = tuple(self.bundles[digest][:n])
        self.bundles[digest] = self.bundles[digest][n:]
        return taken


@dataclass(kw_only=True)
class _Pace:
    """How fast it goes: seconds of a decode on one worker and of a task, chunks so far."""

    decode_seconds: float = 0.0
    task_seconds: float = math.inf
    scored: int = 0
    started: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    def book(self, decodes: int, chunks: int, seconds: float) -> None:
        """Takes in a task; the mean leans on the last ones."""
        self.scored += chunks
        self.decode_seconds = _leaning(self.decode_seconds or seconds / decodes, seconds / decodes)
        self.task_seconds = seconds if math.isinf(self.task_seconds) else _leaning(self.task_seconds, seconds)

    @property
    def task_decodes(self) -> int:
        """Decodes of a task: one, or more where that is over at once."""
        wanted = _TASK_SECONDS / self.decode_seconds if self.decode_seconds else 1
        return math.ceil(min(wanted, 64))

    @property
    def queued(self) -> int:
        """Tasks that a worker has at a time."""
        return 2 if self.task_seconds < _QUICK else 1


class Crew:
    """Workers, and what each of them does. ``anchors`` and ``shards`` are asked for when they are needed.

    Without ``shards`` the workers have no base and no variants, and run errands alone.
    """

    def __init__(
        self,
        pool: Pool,
        reporter: Reporter,
        anchors: Callable[[], Anchors],
        shards: Callable[[], Shards] | None,
    ) -> None:
        self._pool = pool
        self._reporter = reporter
        self._anchors = anchors
        self._shards_there = shards
        self._hands = {worker: _Hand() for worker in range(pool.size)}
        self._flights: dict[int, _Flight] = {}
        self._tickets = 0
        self._errands: list[_Flight] = []
        self._book: Book | None = None
        self._wishes: dict[int, tuple[Sequence[Wish], Sequence[Wish]]] = {}
        self._resolved: dict[frozenset[tuple[str, str]], Variant] = {}
        self._deaths: Counter[tuple[str, Bundle]] = Counter()
        self._column: Column | None = None
        self._notes: set[str] = set()
        self._pace = _Pace()

    @property
    def size(self) -> int:
        """How many workers are in use."""
        return len(self._hands)

    @property
    def identity(self) -> str:
        """The engine that all workers in use have."""
        return self._anchors().identity

    def _shards(self) -> Shards:
        assert self._shards_there is not None
        return self._shards_there()

    # --- what is wanted

    def open_book(self, book: Book) -> None:
        """Turns to another text or reference; what was wanted before is wanted no more."""
        if book is not self._book:
            self._book = book
            self._wishes.clear()

    def want(self, who: int, wishes: Sequence[Wish], likely: Sequence[Wish]) -> None:
        """Hears what ``who`` wants from now on, in the open book."""
        self._wishes[who] = (wishes, likely)

    def has(self, wish: Wish) -> bool:
        """Says whether the ledger has all of a wish."""
        variant = self._variant(wish)
        return variant is not None and self._book is not None and not self._book.missing(variant, wish)

    def fetch(self, wish: Wish) -> None:
        """Waits until the ledger has all of a wish."""
        self.want(-1, (wish,), ())
        while not self.has(wish):
            self.wait()
        self.want(-1, (), ())

    def make(self, jobs: Sequence[ShardJob]) -> None:
        """Has shards made by whoever is free, and waits for them."""
        for job in jobs:
            self._errands.append(self._shard_flight(job))
        while self._errands or any(flight.task.lane == HOST for flight in self._flights.values()):
            self.wait()

    def run(self, errands: Sequence[Errand]) -> Iterator[tuple[int, object]]:
        """Runs errands, and yields (number, result) as they end."""
        ended: list[tuple[int, object]] = []
        for number, errand in enumerate(errands):
            land = _Landing(number, ended)
            self._errands.append(
                _Flight(worker=-1, task=errand.task, about=errand.about, land=land, opens=errand.opens)
            )
        for _ in errands:
            while not ended:
                self.wait()
            yield ended.pop(0)

    def wait(self) -> None:
        """Keeps all workers busy, and returns once something has come back.

        What is only likely is begun when whoever decides has nothing more to say, and not just when something has come
        back: what that makes sure is then not known yet.
        """
        self._fill(ahead=True)
        if not self._flights:
            raise CerebellumError("something is wanted that no worker can do; please report this")
        with timed("waiting"):
            ended = self._pool.wait(_PATIENCE)
        for done in ended:
            self._take(done)
        self._fill(ahead=False)
        self._tell()

    def settle(self) -> None:
        """Begins nothing more, waits for what is under way, and closes the book: no worker prepares for it any more."""
        self._wishes.clear()
        while any(flight.variant is not None for flight in self._flights.values()):
            self.wait()
        self._book = None

    def close(self) -> None:
        """Ends all workers."""
        self._pool.close()

    # --- giving out

    def _fill(self, *, ahead: bool) -> None:
        """Gives every worker something to do, each its first task before any its second.

        What is only likely is never a second task, and is one decode: what is surely wanted would wait behind it.
        """
        surely, likely = self._surveys()
        lanes: tuple[Lane, ...] = (MODEL, HOST) if self._pool.on_cards else (MODEL,)
        for depth in range(1, self._pace.queued + 1):
            for lane in lanes:
                for worker in self._hands:
                    if self._busy(worker, lane) < depth:
                        guesses = likely if ahead and depth == 1 else _Survey()
                        flight = self._choose(worker, lane, surely, guesses)
                        if flight is not None:
                            self._begin(worker, flight)

    def _busy(self, worker: int, lane: Lane) -> int:
        flights = [self._flights[ticket] for ticket in self._hands[worker].flights]
        return sum(not self._pool.on_cards or flight.task.lane == lane for flight in flights)

    def _surveys(self) -> tuple[_Survey, _Survey]:
        """Looks through all wishes, the sure ones and then the likely ones, for what nobody works on."""
        begun = {(f.variant.digest, b) for f in self._flights.values() if f.variant for b in f.bundles}
        making = {f.task.job.path for f in self._flights.values() if isinstance(f.task, ShardTask)}
        surely = self._survey([wish for wishes, _ in self._wishes.values() for wish in wishes], begun, making)
        if not all(hand.proven for hand in self._hands.values()):
            base = [job for job in self._base_jobs() if job.path not in making | surely.paths]
            surely.jobs = [*base, *surely.jobs]
        begun |= {(digest, bundle) for digest, bundles in surely.bundles.items() for bundle in bundles}
        making |= {job.path for job in surely.jobs}
        likely = self._survey(
            [wish for _, wishes in self._wishes.values() for wish in wishes[: _AHEAD * self.size]],
            begun,
            making,
        )
        return surely, likely

    def _survey(self, wishes: Sequence[Wish], begun: set[tuple[str, Bundle]], making: set[Path]) -> _Survey:
        found = _Survey()
        for wish in wishes:
            variant = self._variant(wish)
            if variant is None:
                missing = self._shards().missing(wish.changes)
                found.jobs += [job for job in missing if job.path not in making | found.paths]
                continue
            assert self._book is not None
            lacking = self._book.missing(variant, wish)
            if lacking and (gone := self._shards().removed(variant)):
                found.jobs += [job for job in gone if job.path not in making | found.paths]
                continue
            for bundle in lacking:
                first = None if self._pool.on_cards else self._book.reference_first(variant, bundle)
                one = first or variant
                if (one.digest, bundle) not in begun:
                    found.add(one, bundle)
        return found

    def _base_jobs(self) -> list[ShardJob]:
        """The shards of the base that are not there: each worker begins with the base, where there is one."""
        if self._shards_there is None:
            return []
        shards = self._shards()
        return shards.missing(NOTHING) or shards.removed(shards.variant(NOTHING))

    def _variant(self, wish: Wish) -> Variant | None:
        """The variant of a wish, once all of its shards are there."""
        if wish.variant is not None:
            return wish.variant
        key = frozenset(wish.changes.items())
        if key not in self._resolved:
            shards = self._shards()
            if shards.missing(wish.changes):
                return None
            self._resolved[key] = shards.variant(wish.changes, wish.label)
        return self._resolved[key]

    def _choose(self, worker: int, lane: Lane, surely: _Survey, likely: _Survey) -> _Flight | None:
        """Picks what a worker does next, by the rules at the top of this file; None where there is nothing."""
        hand = self._hands[worker]
        does_host = lane == HOST or not self._pool.on_cards
        does_models = lane == MODEL
        if does_models and not hand.proven and not self._base_jobs():
            return self._proof(worker)
        does_models = does_models and hand.proven
        for kind in (lane, HOST) if does_host else (lane,):
            if (kind == HOST or does_models) and (errand := self._errand(worker, kind)):
                return errand
        if does_models and self._pool.on_cards and self._book is not None and hand.prepared is not self._book:
            hand.prepared = self._book
            if (kept := self._book.kept()) is not None:
                return self._scoring(worker, kept[0], kept[1])
        for survey in (surely, likely):
            most = self._pace.task_decodes if survey is surely else 1
            if does_models and (flight := self._untouched(worker, survey, most)):
                return flight
            if does_host and survey.jobs:
                return self._shard_flight(survey.jobs.pop(0))
            if does_models and (flight := self._split(worker, survey, most)):
                return flight
        return None

    def _errand(self, worker: int, lane: Lane) -> _Flight | None:
        """Takes an errand out: one whose model the worker has open, else one that no other has, else the first."""
        hand = self._hands[worker]
        idle = not self._busy(worker, lane)
        able = [one for one in self._errands if one.task.lane == lane and (idle or not one.opens)]
        elsewhere = {self._hands[other].showing for other in self._hands if other != worker}
        here = (one for one in able if one.opens == hand.showing)
        untouched = (one for one in able if one.opens not in elsewhere)
        chosen = next(chain(here, untouched, able), None)
        if chosen is None:
            return None
        self._errands.remove(chosen)
        if chosen.opens and chosen.opens != hand.showing:
            hand.showing = chosen.opens
            hand.resident.clear()
            hand.prepared = None
        return chosen

    def _proof(self, worker: int) -> _Flight | None:
        """Has a new worker score the anchor chunks; it gets nothing else before they are compared."""
        if any(self._flights[ticket].is_check for ticket in self._hands[worker].flights):
            return None
        anchors = self._anchors()
        return _Flight(
            worker=worker,
            task=anchors.task,
            about="base, to compare workers",
            land=lambda _: None,
            is_check=True,
        )

    def _untouched(self, worker: int, survey: _Survey, most: int) -> _Flight | None:
        """Goes on with the variant that the worker shows, or begins one that nobody else works on."""
        hand = self._hands[worker]
        elsewhere = {f.variant.digest for f in self._flights.values() if f.variant and f.worker != worker}
        free = [digest for digest, bundles in survey.bundles.items() if bundles and digest not in elsewhere]
        showing = [digest for digest in survey.bundles if digest == hand.showing and survey.bundles[digest]]
        staged = [digest for digest in free if digest in hand.resident]
        chosen = next(iter((*showing, *staged, *free)), None)
        return None if chosen is None else self._of(worker, survey, chosen, most)

    def _split(self, worker: int, survey: _Survey, most: int) -> _Flight | None:
        """Helps with the variant that has the most left."""
        digest = max(survey.bundles, key=lambda one: len(survey.bundles[one]), default=None)
        if digest is None or not survey.bundles[digest]:
            return None
        return self._of(worker, survey, digest, most)

    def _of(self, worker: int, survey: _Survey, digest: str, most: int) -> _Flight:
        fair = math.ceil(survey.left / self.size)
        bundles = survey.take(digest, max(1, min(most, fair)))
        return self._scoring(worker, survey.variants[digest], bundles)

    def _scoring(self, worker: int, variant: Variant, bundles: tuple[Bundle, ...]) -> _Flight:
        book = self._book
        assert book is not None
        hand = self._hands[worker]
        hand.showing = variant.digest
        hand.resident.add(variant.digest)

        def land(result: object) -> None:
            assert isinstance(result, Scored)
            chunks = sorted(chain.from_iterable(bundles))
            came = sorted(found.chunk for found in result.found)
            if came != chunks:
                raise CerebellumError(
                    f"{variant.label}: worker {worker + 1} was asked for the chunks {chunks} and gave {came}; "
                    "nothing was recorded of them"
                )
            for found in result.found:
                book.record(variant, found)

        return _Flight(
            worker=worker,
            task=book.task(variant, bundles),
            about=variant.label,
            land=land,
            variant=variant,
            bundles=bundles,
        )

    def _shard_flight(self, job: ShardJob) -> _Flight:
        def land(result: object) -> None:
            assert result is None or isinstance(result, str)
            self._shards().adopt(job, result)

        return _Flight(worker=-1, task=ShardTask(job=job), about=f"making {job.said}", land=land)

    def _begin(self, worker: int, flight: _Flight) -> None:
        ticket = self._tickets
        self._tickets += 1
        self._flights[ticket] = flight
        self._hands[worker].flights.append(ticket)
        self._pool.begin(worker, ticket, flight.task)

    # --- taking in

    def _take(self, done: Done) -> None:
        flight = self._flights.get(done.ticket)
        if flight is None:  # lost with its worker, and given out again
            return
        if done.died:
            self._bury(done.worker)
            return
        del self._flights[done.ticket]
        self._hands[done.worker].flights.remove(done.ticket)
        if done.outcome is not None:
            self._hear(done.outcome, flight)
        if flight.is_check:
            self._prove(done)
        elif done.error is not None:
            raise done.error
        elif done.outcome is not None:
            for place in flight.bundles or ((),):
                self._deaths.pop((flight.about, place), None)
            flight.land(done.outcome.result)

    def _hear(self, outcome: Outcome, flight: _Flight) -> None:
        """Books times and passes notes on, each once."""
        book_beside(outcome.seconds)
        if isinstance(outcome.result, Scored) and outcome.result.found:
            self._pace.book(max(1, len(flight.bundles)), len(outcome.result.found), outcome.wall)
        for note in outcome.notes:
            if note not in self._notes:
                self._notes.add(note)
                self._reporter.note(note)

    def _bury(self, worker: int) -> None:
        """Puts another worker in the place of a dead one; its tasks are wanted again by themselves."""
        hand = self._hands[worker]
        lost = [self._flights.pop(ticket) for ticket in hand.flights]
        under_way = next((flight for flight in lost if flight.task.lane == MODEL), lost[0])
        places = under_way.bundles or ((),)
        self._deaths.update((under_way.about, place) for place in places)
        self._errands += [flight for flight in lost if flight.variant is None and not flight.is_check]
        self._hands[worker] = _Hand()
        if max(self._deaths[under_way.about, place] for place in places) >= _MOST_DEATHS:
            raise CerebellumError(
                f"{under_way.about}: {_MOST_DEATHS} workers died on it one after the other, of memory perhaps; all "
                "that was measured or answered before is kept: run again with fewer workers, or without --workers"
            )
        self._reporter.note(f"worker {worker + 1} died on {under_way.about}; another one goes on")
        self._pool.renew(worker)

    def _prove(self, done: Done) -> None:
        """Takes a worker into use if its engine and its anchor chunks are those of the others."""
        reason = str(done.error) if done.error else self._difference(done.outcome)
        if not reason:
            self._hands[done.worker].proven = True
            return
        del self._hands[done.worker]
        if not self._hands:
            raise CerebellumError(f"no worker can be used: {reason}")
        self._reporter.note(f"worker {done.worker + 1} is not used: {reason}")

    def _difference(self, outcome: Outcome | None) -> str:
        """Says how a worker's arithmetic differs from what the ledger's measurements were made by, or nothing."""
        assert outcome is not None
        anchors = self._anchors()
        if outcome.identity != anchors.identity:
            return f"its engine ({outcome.where}) is {outcome.identity}, this run's is {anchors.identity}"
        column = anchors.column(outcome.result)
        if self._column is None:
            self._column = anchors.known
        if self._column is None:
            self._column = column
            anchors.record(outcome.result)
        if column.shape != self._column.shape or not np.array_equal(column, self._column, equal_nan=True):
            off = (
                float(np.nanmax(np.abs(column - self._column)))
                if column.shape == self._column.shape
                else np.nan
            )
            return (
                f"on {anchors.said} its log-likelihoods ({outcome.where}) differ by up to {off:.2g} nats from "
                "what was found before; machines of one kind are needed"
            )
        return ""

    # --- telling

    def _tell(self) -> None:
        """Says every ten seconds what each worker does, how fast it goes, and how long what is wanted takes."""
        now = time.monotonic()
        pace = self._pace
        if now - pace.told < _TOLD_EVERY:
            return
        pace.told = now
        told = f"{self.size} workers"
        if self._errands:
            told += f", {len(self._errands)} tasks wait"
        told += self._measuring(now)
        doing = []
        for worker, hand in self._hands.items():
            about = self._flights[hand.flights[0]].about if hand.flights else "idle"
            doing.append(f"{worker + 1}: {about}")
        self._reporter.note(f"{told}; {'; '.join(doing)}")

    def _measuring(self, now: float) -> str:
        """Says how fast chunks are scored and how long those take that are asked for, where some are."""
        pace = self._pace
        rate = pace.scored / max(now - pace.started, 1e-9)
        waiting = [bundle for bundles in self._surveys()[0].bundles.values() for bundle in bundles]
        under_way = [bundle for flight in self._flights.values() for bundle in flight.bundles]
        left = sum(map(len, (*waiting, *under_way)))
        if not left:
            return ""
        told = f", {pace.scored} chunks scored, {rate:.1f} a second"
        return told + (f", {left / rate:.0f} s left of what is asked" if rate > 0 else "")


@dataclass(frozen=True)
class _Landing:
    """Puts a result where whoever waits for it looks."""

    number: int
    ended: list[tuple[int, object]]

    def __call__(self, result: object) -> None:
        self.ended.append((self.number, result))


def _leaning(mean: float, last: float) -> float:
    return 0.8 * mean + 0.2 * last
