"""The time that is left, from the pace of each part of the work so far: one average over all says nothing.

A chunk on the model and a weight to quantize take very different times, and the first minutes have other shares of
both than the last. Where shards are made beside the model, the slower of the two counts; else they add up.
"""

from __future__ import annotations

from dataclasses import dataclass

from cerebellum.engine.timings import seconds_so_far

_MODEL = ("decoding", "scoring", "swapping", "opening")
_SHARDS = ("quantizing",)
_MINUTE = 90  # seconds from which on minutes are told


@dataclass(frozen=True, kw_only=True)
class Work:
    """An amount of work: chunks through the model, and weights into shards."""

    chunks: int
    weights: int


@dataclass(frozen=True, kw_only=True)
class Left:
    """Seconds that are left at most of the model and of the shards, and whether both go on at once."""

    model: float
    shards: float
    at_once: bool

    @property
    def seconds(self) -> float:
        """The seconds until all is done."""
        return max(self.model, self.shards) if self.at_once else self.model + self.shards

    def told(self) -> str:
        """Returns it for people; the parts only where both take a noticeable share."""
        text = f"{duration(self.seconds)} left at most"
        if min(self.model, self.shards) < self.seconds / 10:
            return text
        return f"{text} (model {duration(self.model)}, shards {duration(self.shards)})"


def time_left(done: Work, left: Work, *, at_once: bool) -> Left | None:
    """Returns the time that the work left takes at the pace of that done; None before any pace is known."""
    model = seconds_so_far(_MODEL)
    if not done.chunks or not model:
        return None
    each_weight = seconds_so_far(_SHARDS) / done.weights if done.weights else 0.0
    return Left(
        model=max(left.chunks, 0) * model / done.chunks,
        shards=max(left.weights, 0) * each_weight,
        at_once=at_once,
    )


def duration(seconds: float) -> str:
    """Returns seconds for people: ``40 s``, ``12 min``."""
    return f"{seconds / 60:.0f} min" if seconds > _MINUTE else f"{seconds:.0f} s"
