"""Response curves: what every role costs at every type it may take, demotions and promotions alike.

Damage at a type is the change, on the same chunks, of the KL divergence from the source (or of the NLL)
when that part of the model alone leaves its base types. KL divergence varies far less from chunk to
chunk; both are kept. What is measured is a ``Part``: all groups of one role, or, where it was looked at
more closely (``zoom.py``), the groups of some of its layers.
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

KLD, PPL = "kld", "ppl"
OBJECTIVES = (KLD, PPL)

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Groups that take one type together: a role, or some neighbouring layers of it."""

    name: str
    groups: tuple[str, ...]

    def at(self, kind: str) -> Changes:
        """The groups of the layout that leave the base."""
        return {} if kind == BASE else dict.fromkeys(self.groups, kind)

    def n_bytes(self, kind: str, sizes: Sizes) -> int:
        """Bytes in the file at ``kind`` (or BASE), padding included."""
        return sum(sizes.file_bytes(name, kind) for name in self.groups)


def roles(sizes: Sizes) -> tuple[Part, ...]:
    """Every role that may be changed, with all its groups."""
    found: dict[str, list[str]] = {}
    for name, group in sizes.groups.items():
        found.setdefault(group.role, []).append(name)
    return tuple(Part(name=role, groups=tuple(names)) for role, names in found.items())


@dataclass(frozen=True, kw_only=True)
class Score:
    """A variant on some chunks: mean NLL and mean KL divergence from the source, nats/token.

    Each has a value a chunk; the NLL may be known of more chunks than the divergence.
    """

    nll: Vector
    kld: Vector

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.nll).all() and np.isfinite(self.kld).all())

    def change(self, base: Score) -> tuple[Interval | None, Interval | None]:
        """(of the divergence, of the NLL) against the base on the same chunks; None where this collapsed."""
        if not self.finite:
            return None, None
        return superpopulation_interval(self.kld - base.kld), superpopulation_interval(self.nll - base.nll)


Scorer = Callable[[Changes], Score]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One part at one type. ``n_bytes`` in the file, padding included; damages against the base.

    ``kld`` and ``nll`` are changes in nats/token; None where the variant collapsed.
    """

    part: Part
    kind: str
    n_bytes: int
    kld: Interval | None
    nll: Interval | None

    def damage(self, objective: str) -> Interval | None:
        return self.kld if objective == KLD else self.nll

    def as_json(self) -> dict[str, Any]:
        return {
            "group": self.part.name,
            "members": list(self.part.groups),
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
        part = Part(name=row["group"], groups=tuple(row.get("members", (row["group"],))))
        return Point(part=part, kind=row["type"], n_bytes=int(row["bytes"]), kld=kld, nll=nll)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"curves.json: not a response curve ({type(error).__name__}: {error})") from error


def _interval_from_json(value: Mapping[str, Any] | None) -> Interval | None:
    if value is None:
        return None
    n = int(value["chunks"])
    return Interval(mean=value["mean"], low=value["low"], high=value["high"], n=n, population=n)


Tried = tuple[Part, str]
"""A part and the type it is tried at."""


def candidates(sizes: Sizes, ladder: Sequence[str]) -> list[Tried]:
    """Every role at every type of the ladder that all its rows can take and that is not its base."""
    wanted = [parse_type(name).name for name in ladder]
    found: list[Tried] = []
    for part in roles(sizes):
        kinds = _legal(part, wanted, sizes) or _legal(part, BLOCK32_LADDER, sizes)
        base = base_kinds(part, sizes)
        found += [(part, kind) for kind in kinds if base != {kind}]
    return found


def _legal(part: Part, kinds: Sequence[str], sizes: Sizes) -> list[str]:
    return [kind for kind in kinds if all(sizes.legal(name, kind) for name in part.groups)]


def base_kinds(part: Part, sizes: Sizes) -> set[str]:
    """The types that a part's tensors have in the base."""
    return {kind.name for name in part.groups for kind in sizes.base_types(name).values()}


def fine_candidates(points: Sequence[Point], chosen: Sequence[Point], sizes: Sizes) -> list[Tried]:
    """The IQ types that lie, in bytes, between the measured types next to one that was chosen.

    They quantize ten times as slowly as K-quants, so they are tried only where the plan could want them,
    by role, the largest first.
    """
    found: dict[tuple[str, str], Tried] = {}
    for part in sorted(roles(sizes), key=lambda part: -part.n_bytes(BASE, sizes)):
        own = [point for point in points if point.part == part]
        bytes_of = {point.kind: point.n_bytes for point in own}
        fine = [kind for kind in _legal(part, FINE_LADDER, sizes) if kind not in bytes_of]
        wanted = {point.kind for point in chosen if set(point.part.groups) <= set(part.groups)}
        for kind in (kind for kind in bytes_of if kind in wanted):
            low, high = _neighbours(bytes_of[kind], bytes_of.values())
            between = [k for k in fine if low < part.n_bytes(k, sizes) < high]
            found |= {(part.name, k): (part, k) for k in between}
    return list(found.values())


def _neighbours(at: int, known: Sequence[int] | Any) -> tuple[int, int]:
    """The next smaller and the next larger of ``known``; ``at`` itself where there is none larger."""
    return max((n for n in known if n < at), default=0), min((n for n in known if n > at), default=at)


def measure_point(tried: Tried, sizes: Sizes, score: Scorer, base: Score) -> Point:
    """One part alone, against the base on the same chunks."""
    part, kind = tried
    kld, nll = score(part.at(kind)).change(base)
    return Point(part=part, kind=kind, n_bytes=part.n_bytes(kind, sizes), kld=kld, nll=nll)


def of_whole_roles(points: Sequence[Point], sizes: Sizes) -> list[Point]:
    """The points of whole roles, without those of some of their layers."""
    whole = set(roles(sizes))
    return [point for point in points if point.part in whole]


def unchanged(sizes: Sizes, chunks: int) -> tuple[Point, ...]:
    """The base of every role, which does no damage by definition."""
    zero = Interval(mean=0.0, low=0.0, high=0.0, n=chunks, population=chunks)
    return tuple(
        Point(part=part, kind=BASE, n_bytes=part.n_bytes(BASE, sizes), kld=zero, nll=zero)
        for part in roles(sizes)
    )


def measure_curves(sizes: Sizes, tried: Sequence[Tried], score: Scorer) -> tuple[Point, ...]:
    """Every role at its base and at everything in ``tried``."""
    base = score({})
    measured = (measure_point(pair, sizes, score, base) for pair in tried)
    return (*unchanged(sizes, len(base.kld)), *measured)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How the chunks of a whole set of curves are spent; ``chunks`` for every variant."""

    chunks: int
    probes: int
    fine: int


_ROLES_SHARE, _ZOOM_SHARE = 0.6, 0.3  # of the passes; the rest is for IQ types
_LEAST, _MOST = 8, 24


def effort(passes: float, n_variants: int, population: int) -> Effort:
    """At most ``passes`` over a text of ``population`` chunks in all, where 8 chunks a variant allow it."""
    chunks = min(max(int(_ROLES_SHARE * passes * population / n_variants), _LEAST), _MOST, population)
    left = max(int(passes * population / chunks) - n_variants, 0)
    probes = min(left, int(_ZOOM_SHARE * passes * population / chunks))
    return Effort(chunks=chunks, probes=probes, fine=left - probes)
