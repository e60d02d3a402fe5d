"""Where the time goes: seconds by part of the work, each second counted once.

``with timed("decoding")`` adds to the collector that is open, if any; a part inside a part is taken from the
outer one. ``with stage("measuring")`` tells which of those seconds fell into a stage. Only the thread that opened
the collector is counted by parts: what other threads do beside it is summed apart, since it costs no time of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

PARTS = (
    "decoding",
    "opening",
    "swapping",
    "scoring",
    "quantizing",
    "hashing",
    "importance matrix",
    "waiting",
    "checking",
    "building",
    "verifying",
)
"""The parts in the order of a table; anything else that is timed follows them."""


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """What a stage took, and how much of it fell into each part."""

    wall: float
    parts: dict[str, float]


@dataclass
class Timings:
    """``seconds`` and ``times`` by part, of the opening thread; ``beside``, seconds of other threads and workers.

    ``stages`` has the same seconds of the opening thread by stage.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    stages: dict[str, StageSeconds] = field(default_factory=dict)
    wall: float = 0.0

    @property
    def other(self) -> float:
        """Seconds of the run that no part claims."""
        return max(0.0, self.wall - sum(self.seconds.values()))

    def rows(self) -> list[tuple[str, float, int, float]]:
        """(part, seconds, times, seconds beside on other threads), the known parts first."""
        named = [*PARTS, *sorted((set(self.seconds) | set(self.beside)) - set(PARTS))]
        return [
            (part, self.seconds.get(part, 0.0), self.times.get(part, 0), self.beside.get(part, 0.0))
            for part in named
            if part in self.seconds or part in self.beside
        ]


class _Collector:
    """The open collector and, of its own thread, the parts under way, innermost last."""

    def __init__(self) -> None:
        self.timings: Timings | None = None
        self.thread = 0
        self.under_way: list[str] = []
        self.since = 0.0
        self.lock = threading.Lock()

    def lap(self, timings: Timings) -> None:
        """Books the time since the last lap to the innermost part."""
        now = time.perf_counter()
        if self.under_way:
            part = self.under_way[-1]
            timings.seconds[part] = timings.seconds.get(part, 0.0) + now - self.since
        self.since = now


_OPEN = _Collector()


@contextmanager
def collecting() -> Iterator[Timings]:
    """Collects all that is timed while the block runs; inside another one, it is that one."""
    if _OPEN.timings is not None:
        yield _OPEN.timings
        return
    timings = Timings()
    started = time.perf_counter()
    _OPEN.timings = timings
    _OPEN.thread = threading.get_ident()
    _OPEN.under_way = []
    try:
        yield timings
    finally:
        timings.wall = time.perf_counter() - started
        _OPEN.timings = None


def seconds_so_far(parts: Sequence[str]) -> float:
    """Returns the seconds that parts took until now, those beside the main thread too; 0 where nothing collects.

    A part that is under way counts once it ends, or another one begins inside it.
    """
    timings = _OPEN.timings
    if timings is None:
        return 0.0
    return sum(timings.seconds.get(part, 0.0) + timings.beside.get(part, 0.0) for part in parts)


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Counts the block as one time of a part; free where nothing collects."""
    timings = _OPEN.timings
    if timings is None:
        yield
    elif threading.get_ident() != _OPEN.thread:
        started = time.perf_counter()
        try:
            yield
        finally:
            with _OPEN.lock:
                timings.beside[part] = timings.beside.get(part, 0.0) + time.perf_counter() - started
    else:
        _OPEN.lap(timings)
        _OPEN.under_way.append(part)
        timings.times[part] = timings.times.get(part, 0) + 1
        try:
            yield
        finally:
            _OPEN.lap(timings)
            _OPEN.under_way.pop()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Notes what the block took, by part, as a stage; free where nothing collects. Stages do not nest."""
    timings = _OPEN.timings
    if timings is None:
        yield
        return
    _OPEN.lap(timings)
    before = dict(timings.seconds)
    started = time.perf_counter()
    try:
        yield
    finally:
        _OPEN.lap(timings)
        spent = {part: seconds - before.get(part, 0.0) for part, seconds in timings.seconds.items()}
        timings.stages[name] = StageSeconds(
            wall=time.perf_counter() - started, parts={part: left for part, left in spent.items() if left > 0}
        )


def book_beside(seconds: Mapping[str, float]) -> None:
    """Adds what a worker took, seconds by part, to what went on beside; nothing where nobody collects."""
    timings = _OPEN.timings
    if timings is not None:
        with _OPEN.lock:
            for part, spent in seconds.items():
                timings.beside[part] = timings.beside.get(part, 0.0) + spent
