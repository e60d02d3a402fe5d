"""Response curves: what every group costs at every type it may take, demotions and promotions alike.

A group's damage at a type is the change, on the same chunks, of the KL divergence from the source when
that group alone leaves its base types. KL divergence varies far less from chunk to chunk than the
difference of NLLs; both are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cerebellum.errors import BadInput
from cerebellum.gguf import parse_type
from cerebellum.plan import Sizes
from cerebellum.stats.paired import Interval, superpopulation_interval
from cerebellum.sweep import Changes

BASE = "base"
K_LADDER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
FINE_LADDER = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")
BLOCK32_LADDER = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A variant on some chunks: mean NLL and mean KL divergence from the source, nats/token, (chunks,)."""

    nll: Vector
    kld: Vector

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.nll).all() and np.isfinite(self.kld).all())


Scorer = Callable[[Changes], Score]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One group at one type. ``n_bytes`` in the file, padding included; damages against the base.

    ``kld`` and ``nll`` are changes in nats/token; None where the variant collapsed.
    """

    group: str
    kind: str
    n_bytes: int
    kld: Interval | None
    nll: Interval | None

    def as_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "type": self.kind,
            "bytes": self.n_bytes,
            "kld": _interval_json(self.kld),
            "nll": _interval_json(self.nll),
        }


def _interval_json(interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "chunks": interval.n}


def point_from_json(row: Mapping[str, Any]) -> Point:
    """The inverse of ``Point.as_json``; BadInput where a field is missing."""
    try:
        kld, nll = (_interval_from_json(row[key]) for key in ("kld", "nll"))
        return Point(group=row["group"], kind=row["type"], n_bytes=int(row["bytes"]), kld=kld, nll=nll)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"curves.json: not a response curve ({type(error).__name__}: {error})") from error


def _interval_from_json(value: Mapping[str, Any] | None) -> Interval | None:
    if value is None:
        return None
    n = int(value["chunks"])
    return Interval(mean=value["mean"], low=value["low"], high=value["high"], n=n, population=n)


def candidates(sizes: Sizes, ladder: Sequence[str]) -> list[Changes]:
    """Every group at every type of the ladder that all its rows can take and that is not its base."""
    wanted = [parse_type(name).name for name in ladder]
    found: list[Changes] = []
    for name in sizes.groups:
        legal = [kind for kind in wanted if sizes.legal(name, kind)]
        legal = legal or [kind for kind in BLOCK32_LADDER if sizes.legal(name, kind)]
        base = {kind.name for kind in sizes.base_types(name).values()}
        found += [{name: kind} for kind in legal if base != {kind}]
    return found


def between_neighbours(points: Sequence[Point], chosen: Changes, sizes: Sizes) -> list[Changes]:
    """The IQ types that lie, in bytes, between the measured types next to the chosen one of each group.

    They quantize ten times as slowly as K-quants, so they are tried only where the plan could want them.
    """
    found: list[Changes] = []
    for name in sizes.groups:
        mine = sorted({p.n_bytes for p in points if p.group == name})
        at = sizes.file_bytes(name, chosen.get(name, BASE))
        below = max((n for n in mine if n < at), default=0)
        above = min((n for n in mine if n > at), default=at)
        known = {p.kind for p in points if p.group == name}
        legal = [kind for kind in FINE_LADDER if kind not in known and sizes.legal(name, kind)]
        found += [{name: kind} for kind in legal if below < sizes.file_bytes(name, kind) < above]
    return found


def measure_points(sizes: Sizes, tried: Sequence[Changes], score: Scorer, base: Score) -> tuple[Point, ...]:
    """Every candidate alone, against the base on the same chunks."""
    points = []
    for changes in tried:
        ((name, kind),) = changes.items()
        found = score(changes)
        kld = superpopulation_interval(found.kld - base.kld) if found.finite else None
        nll = superpopulation_interval(found.nll - base.nll) if found.finite else None
        n_bytes = sizes.file_bytes(name, kind)
        points.append(Point(group=name, kind=kind, n_bytes=n_bytes, kld=kld, nll=nll))
    return tuple(points)


def measure_curves(sizes: Sizes, tried: Sequence[Changes], score: Scorer) -> tuple[Point, ...]:
    """The base of every group, which does no damage by definition, and everything in ``tried``."""
    base = score({})
    zero = Interval(mean=0.0, low=0.0, high=0.0, n=len(base.kld), population=len(base.kld))
    unchanged = [
        Point(group=name, kind=BASE, n_bytes=sizes.file_bytes(name, BASE), kld=zero, nll=zero)
        for name in sizes.groups
    ]
    return (*unchanged, *measure_points(sizes, tried, score, base))


def chunks_within(passes: float, n_variants: int, population: int) -> int:
    """Chunks for each variant so that all together cost at most ``passes`` over the text; 8 to 24."""
    affordable = int(passes * population / max(n_variants, 1))
    return min(max(affordable, 8), 24, population)
