"""Coarse to fine: the layers of a role apart, as far as measurements say that they differ.

A role is cut in two halves by layer, each is measured alone at one cheap type, and if they do not cost
the same per byte, each half is cut again, the most damaging first. What a part costs at the other types
follows from its share of that damage and the curve of its role: the shape of a curve is a property of
the types and of what the tensors do, its height one of the layers. Plans made of it are measured whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cerebellum.curves import BASE, Part, Point, Tried, base_kinds, roles
from cerebellum.groups import span_name
from cerebellum.plan import Sizes
from cerebellum.stats.paired import Interval

_APART = 2.0  # standard errors between the halves' damages per byte
_LEAST_SHARE = 0.1  # of what its bytes alone would give a part; noise may make a share negative
_NORMAL_95 = 1.96

Probe = Callable[[Tried], Point]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A part that takes a type of its own, with its share of its role's damage."""

    role: Part
    part: Part
    share: float


def halves(part: Part, sizes: Sizes) -> tuple[Part, Part]:
    """The earlier and the later layers of a part of at least two groups."""
    middle = len(part.groups) // 2
    return _named(part.groups[:middle], sizes), _named(part.groups[middle:], sizes)


def _named(names: Sequence[str], sizes: Sizes) -> Part:
    layers = sorted(layer for name in names for layer in sizes.groups[name].layers)
    return Part(name=span_name(sizes.groups[names[0]].role, layers), groups=tuple(names))


def zoom(points: Sequence[Point], sizes: Sizes, probe: Probe, n_probes: int) -> tuple[Point, ...]:
    """Measures halves with ``probe`` while they differ and ``n_probes`` last; returns what it measured."""
    found: list[Point] = []
    kinds = {part: _probe_kind(part, points, sizes) for part in roles(sizes)}
    queue = [(part, kind, _stake(part, kind, points)) for part, kind in kinds.items() if kind]
    while queue and len(found) + 2 <= n_probes:
        part, kind, _ = queue.pop(int(np.argmax([stake for _, _, stake in queue])))
        if len(part.groups) < 2:
            continue
        first, second = (probe((half, kind)) for half in halves(part, sizes))
        found += [first, second]
        if _differ(first, second, sizes):
            queue += [(half.part, kind, _stake(half.part, kind, found)) for half in (first, second)]
    return tuple(found)


def _probe_kind(part: Part, points: Sequence[Point], sizes: Sizes) -> str | None:
    """The smallest type below the base that the role survived: there its layers say most."""
    base = part.n_bytes(BASE, sizes)
    own = [p for p in points if p.part == part and p.kld is not None and p.n_bytes < base]
    return min(own, key=lambda point: point.n_bytes).kind if own else None


def _stake(part: Part, kind: str, points: Sequence[Point]) -> float:
    found = next(p for p in points if p.part == part and p.kind == kind)
    return abs(found.kld.mean) if found.kld else np.inf


def _differ(a: Point, b: Point, sizes: Sizes) -> bool:
    """Whether two halves surely cost differently per byte saved; a collapse differs from anything else."""
    if a.kld is None or b.kld is None:
        return a.kld is not b.kld
    (rate_a, error_a), (rate_b, error_b) = (_rate(point, sizes) for point in (a, b))
    return bool(abs(rate_a - rate_b) > _APART * np.hypot(error_a, error_b))


def _rate(point: Point, sizes: Sizes) -> tuple[float, float]:
    """Damage per byte saved, and its standard error."""
    assert point.kld is not None
    saved = max(point.part.n_bytes(BASE, sizes) - point.n_bytes, 1)
    return point.kld.mean / saved, (point.kld.high - point.kld.low) / 2 / _NORMAL_95 / saved


def leaves(points: Sequence[Point], sizes: Sizes) -> tuple[Leaf, ...]:
    """The finest parts that measurements justify: every role, or what it was cut into."""
    found: list[Leaf] = []
    for role in roles(sizes):
        found += _leaves(Leaf(role=role, part=role, share=1.0), points, sizes)
    return tuple(found)


def _leaves(leaf: Leaf, points: Sequence[Point], sizes: Sizes) -> list[Leaf]:
    if len(leaf.part.groups) < 2:
        return [leaf]
    pair = halves(leaf.part, sizes)
    probes = [next((p for p in points if p.part == half and p.kind != BASE), None) for half in pair]
    first, second = probes
    if first is None or second is None or not _differ(first, second, sizes):
        return [leaf]
    shares = _shares(first, second, sizes)
    cut = [
        replace(leaf, part=half, share=leaf.share * share) for half, share in zip(pair, shares, strict=True)
    ]
    return [fine for part in cut for fine in _leaves(part, points, sizes)]


def _shares(first: Point, second: Point, sizes: Sizes) -> tuple[float, float]:
    """Of their common damage; never below a tenth of what their bytes alone would give them."""
    if first.kld is None or second.kld is None:
        return (1.0, 1.0)
    saved = np.array([p.part.n_bytes(BASE, sizes) - p.n_bytes for p in (first, second)], np.float64)
    damage = np.array([first.kld.mean, second.kld.mean])
    even = saved / saved.sum()
    share = np.maximum(damage / damage.sum() if damage.sum() > 0 else even, _LEAST_SHARE * even)
    share /= share.sum()
    return float(share[0]), float(share[1])


def refined(points: Sequence[Point], sizes: Sizes) -> tuple[Point, ...]:
    """The curves of all leaves: measured for whole roles, for their layers by share."""
    by_role = {role: [p for p in points if p.part == role] for role in roles(sizes)}
    return tuple(
        point
        for leaf in leaves(points, sizes)
        for point in (
            by_role[leaf.role] if leaf.part == leaf.role else _scaled(leaf, by_role[leaf.role], sizes)
        )
    )


def _scaled(leaf: Leaf, curve: Sequence[Point], sizes: Sizes) -> list[Point]:
    """A role's curve at the height of some of its layers, zero where those layers have their base type.

    Presets give some layers of a role a better type than others; the curve then starts elsewhere for them.
    """
    at = {point.kind: point for point in curve}
    own = base_kinds(leaf.part, sizes) & at.keys()
    starts = [at[kind] for kind in own] if own != base_kinds(leaf.role, sizes) else []
    scaled = []
    for point in curve:
        n_bytes = leaf.part.n_bytes(point.kind, sizes)
        kld, nll = (
            _moved(interval, leaf.share, [] if point.kind == BASE else zeros)
            for interval, zeros in (
                (point.kld, [p.kld for p in starts]),
                (point.nll, [p.nll for p in starts]),
            )
        )
        scaled.append(replace(point, part=leaf.part, n_bytes=n_bytes, kld=kld, nll=nll))
    return scaled


def _moved(interval: Interval | None, share: float, zeros: Sequence[Interval | None]) -> Interval | None:
    """``share`` of an interval, counted from the mean of ``zeros``."""
    if interval is None:
        return None
    zero = float(np.mean([z.mean for z in zeros if z is not None])) if any(zeros) else 0.0
    low, mean, high = ((value - zero) * share for value in (interval.low, interval.mean, interval.high))
    return replace(interval, low=low, mean=mean, high=high)
