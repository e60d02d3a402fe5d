"""What a collector of times found, as the manifest holds it and as people read it."""

from __future__ import annotations

import msgspec

from cerebellum.codec import Record
from cerebellum.engine.timings import Timings


class PartTime(Record, frozen=True, kw_only=True):
    """One part of the work: its seconds, how often it was entered, and its seconds on other threads beside."""

    seconds: float
    times: int
    beside_seconds: float


_MAKING = ("importance matrix", "quantizing", "waiting", "hashing")  # what shards are made from and of


class StageTime(Record, frozen=True, kw_only=True):
    """A stage: its seconds, and how many of them fell into each part."""

    wall_seconds: float
    parts: dict[str, float]

    @property
    def decoding_share(self) -> float:
        """The share of decoding in what the stage took beyond making shards, what they need, and waiting for them."""
        making = sum(self.parts.get(part, 0.0) for part in _MAKING)
        return self.parts.get("decoding", 0.0) / max(self.wall_seconds - making, 1e-9)


class TimeTable(Record, frozen=True, kw_only=True):
    """Where the time of a run went; ``other_seconds`` is what no part claims."""

    wall_seconds: float
    other_seconds: float
    parts: dict[str, PartTime]
    stages: dict[str, StageTime] = msgspec.field(default_factory=dict)

    def table(self) -> str:
        """Returns a table for people, one line a part."""
        share = 100 / max(self.wall_seconds, 1e-9)
        lines = [f"{'':20}{'seconds':>9}{'share':>7}{'times':>8}{'beside':>9}"]
        for name, part in self.parts.items():
            cells = f"{part.seconds:9.2f}{part.seconds * share:6.1f}%{part.times:8}{part.beside_seconds:9.2f}"
            lines.append(f"{name:20}{cells}")
        lines.append(f"{'all else':20}{self.other_seconds:9.2f}{self.other_seconds * share:6.1f}%")
        lines.append(f"{'wall':20}{self.wall_seconds:9.2f}")
        for name, stage in self.stages.items():
            decoding = f"{100 * stage.decoding_share:5.0f}% decoding while no shard is made"
            lines.append(f"{'stage: ' + name:20}{stage.wall_seconds:9.2f}{decoding}")
        return "\n".join(lines)


def time_table(timings: Timings) -> TimeTable:
    """Returns what was collected, rounded to milliseconds."""
    parts = {
        part: PartTime(seconds=round(seconds, 3), times=times, beside_seconds=round(beside, 3))
        for part, seconds, times, beside in timings.rows()
    }
    stages = {
        name: StageTime(
            wall_seconds=round(stage.wall, 3),
            parts={part: round(seconds, 3) for part, seconds in stage.parts.items()},
        )
        for name, stage in timings.stages.items()
    }
    return TimeTable(
        wall_seconds=round(timings.wall, 3),
        other_seconds=round(timings.other, 3),
        parts=parts,
        stages=stages,
    )
