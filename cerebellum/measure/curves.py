"""Response curves: what every role costs at every type it may take, measured.

A part of the model is measured at a type while all else is at the *anchor*, a type so fine that it does
next to no damage (Q8_0). Its damage is then the whole of the KL divergence from the source above the
anchor's: from a base that is damaged itself, the same change drowns in cross terms with that damage, five
to ten times as much noise (docs/LOG.md). What is measured is a ``Part``: all groups of one role, or, where
it was looked at more closely (``zoom.py``), the groups of some of its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cerebellum.errors import BadInput
from cerebellum.gguf import bits_per_weight, block_size, parse_type
from cerebellum.groups import span_name
from cerebellum.measure.race import Changes
from cerebellum.plan.limit import Sizes
from cerebellum.stats.paired import Interval, ratio_interval, superpopulation_interval
from cerebellum.stats.sequential import looks

BASE = "base"
ANCHOR = "Q8_0"
K_LADDER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
FINE_LADDER = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")

KLD, PPL = "kld", "ppl"
OBJECTIVES = (KLD, PPL)

_FIRST_LOOK, _GROWTH = 4, 2.0
_PRECISE = 0.1  # half-width of the interval, as a share of the damage, that no decision needs to better
_SLIGHT = 0.1  # of the role's largest damage: a type surely below it is known well enough

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Groups that are measured at one type together: a role, or some neighbouring layers of it."""

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


def part_of(names: Sequence[str], sizes: Sizes) -> Part:
    """Groups of one role as a part: the role itself, or named after its runs of layers."""
    role = sizes.groups[names[0]].role
    whole = [name for name, group in sizes.groups.items() if group.role == role]
    if len(whole) == len(names):
        return Part(name=role, groups=tuple(names))
    runs: list[list[str]] = []
    for name in names:
        beside = runs and whole.index(name) == whole.index(runs[-1][-1]) + 1
        runs[-1].append(name) if beside else runs.append([name])
    layers = ([layer for name in run for layer in sizes.groups[name].layers] for run in runs)
    spans = "+".join(span_name("", sorted(run)).lstrip(".") for run in layers)
    return Part(name=f"{role}.{spans}", groups=tuple(names))


def anchored(sizes: Sizes, anchor: str) -> Changes:
    """All groups that can take the anchor at it; what cannot stays at its base types throughout."""
    return {name: anchor for name in sizes.groups if sizes.legal(name, anchor)}


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


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """The anchor and the base on the same chunks: all that any part or plan gets."""

    anchor: Score
    base: Score

    def above(self, score: Score) -> tuple[Interval | None, Interval | None]:
        """(divergence, NLL) of a variant above the anchor; None where it collapsed.

        It may be known of the first chunks only; the base's own damage says how hard those are.
        """
        if not score.finite:
            return None, None
        n = len(score.kld)
        damage, base = score.kld - self.anchor.kld[:n], self.base.kld - self.anchor.kld
        nll = superpopulation_interval(score.nll - self.anchor.nll[: len(score.nll)])
        return ratio_interval(damage, base[:n], float(base.mean())), nll


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a change does to the divergence from the source and to the NLL, nats/token; None: not known."""

    kld: Interval | None
    nll: Interval | None

    def damage(self, objective: str) -> Interval | None:
        return self.kld if objective == KLD else self.nll


@dataclass(frozen=True, kw_only=True)
class Damage(Effect):
    """The effect of a part at a type."""

    part: Part
    kind: str

    def as_json(self) -> dict[str, Any]:
        return {
            "group": self.part.name,
            "members": list(self.part.groups),
            "type": self.kind,
            "kld": nats_json(self.kld),
            "nll": nats_json(self.nll),
        }


class Response(Damage):
    """Measured: a part at a type with the rest at the anchor, its damage above the anchor's.

    None where the variant collapsed.
    """


@dataclass(frozen=True, kw_only=True)
class Point(Damage):
    """Foretold: a group at a type as a plan sees it, its change against the base.

    ``n_bytes`` in the file, padding included.
    """

    n_bytes: int

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "bytes": self.n_bytes}


def nats_json(interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "chunks": interval.n}


def response_from_json(row: Mapping[str, Any]) -> Response:
    """The inverse of ``Response.as_json``; BadInput where a field is missing."""
    return Response(**_damage_from_json(row))


def point_from_json(row: Mapping[str, Any]) -> Point:
    """The inverse of ``Point.as_json``; BadInput where a field is missing."""
    return Point(**_damage_from_json(row, n_bytes="bytes"))


def _damage_from_json(row: Mapping[str, Any], **beside: str) -> dict[str, Any]:
    """The fields of a ``Damage``, and those ``beside`` it by their keys."""
    try:
        kld, nll = (nats_from_json(row[key]) for key in ("kld", "nll"))
        part = Part(name=row["group"], groups=tuple(row.get("members", (row["group"],))))
        more = {field: row[key] for field, key in beside.items()}
        return {"part": part, "kind": row["type"], "kld": kld, "nll": nll, **more}
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"curves.json: not as this version writes it ({type(error).__name__}: {error}); "
            "run `cerebellum run --budget` again"
        ) from error


def nats_from_json(value: Mapping[str, Any] | None) -> Interval | None:
    if value is None:
        return None
    n = int(value["chunks"])
    return Interval(mean=value["mean"], low=value["low"], high=value["high"], n=n, population=n)


Tried = tuple[Part, str]
"""A part and the type it is tried at."""


def candidates(sizes: Sizes, ladder: Sequence[str], anchor: str) -> list[Tried]:
    """Every role at every type of the ladder that all its rows can take, the smallest first."""
    found: list[Tried] = []
    for part in roles(sizes):
        if not all(sizes.legal(name, anchor) for name in part.groups):
            continue
        each = [kinds_for(name, ladder, sizes) for name in part.groups]
        common = [kind for kind in each[0] if all(kind in kinds for kinds in each) and kind != anchor]
        found += [(part, kind) for kind in sorted(common, key=lambda kind: bits_per_weight(parse_type(kind)))]
    return found


def kinds_for(name: str, ladder: Sequence[str], sizes: Sizes) -> list[str]:
    """The types of the ladder that a group's rows can take; rows that are no multiple of 256 get all
    types of 32-element blocks, which is what llama.cpp has in their stead."""
    legal = sizes.groups[name].legal_types
    if any(block_size(parse_type(kind)) > 32 for kind in legal):
        return [kind for kind in dict.fromkeys(ladder) if kind in legal]
    return list(legal)


def base_kinds(part: Part, sizes: Sizes) -> set[str]:
    """The types that a part's tensors have in the base."""
    return {kind.name for name in part.groups for kind in sizes.base_types(name).values()}


def measure_response(
    tried: Tried, score: Callable[[int], Score], yardstick: Yardstick, most: int, largest: float = 0.0
) -> Response:
    """One part at one type, on ``most`` chunks or as many as it takes; ``score`` has its first n.

    It stops where its damage is known to a tenth, or is surely below a tenth of ``largest``, the most
    that its role did at any type so far: no decision hangs on more.
    """
    for n in looks(min(_FIRST_LOOK, most), _GROWTH, most):
        kld, nll = yardstick.above(score(n))
        if kld is None or kld.high < _SLIGHT * largest or kld.high - kld.mean < _PRECISE * kld.mean:
            break
    return Response(part=tried[0], kind=tried[1], kld=kld, nll=nll)


def measure_curves(
    tried: Sequence[Tried], measure: Callable[[Tried, float], Response]
) -> tuple[Response, ...]:
    """All of ``tried``, the smallest type of every role first: it says what is slight for the others."""
    found: list[Response] = []
    for pair in tried:
        own = [r.kld.mean for r in found if r.part == pair[0] and r.kld is not None]
        found.append(measure(pair, max(own, default=0.0)))
    return tuple(found)
