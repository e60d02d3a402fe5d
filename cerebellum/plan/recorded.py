"""Response curves from measurements made elsewhere: what was recorded, and a stated model for the rest.

Where only some demotions of a group were measured, its damage at other types is modelled: it falls by a
factor of four with every bit of a weight, as squared rounding error does, and its height is fixed by the
group's recorded demotion. A group that nobody measured stays at its base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cerebellum.gguf import bits_per_weight, parse_type
from cerebellum.measure.curves import BASE, K_LADDER, Part, Point, roles
from cerebellum.measure.race import Measurement
from cerebellum.plan.limit import Sizes, make_units
from cerebellum.stats.paired import Interval

MODEL = "damage proportional to 4^-bits, fixed by each group's recorded demotion"


def recorded_points(measurements: Sequence[Measurement], sizes: Sizes) -> tuple[Point, ...]:
    """Every group at every K-quant: recorded where it was recorded, modelled elsewhere, nats/token.

    Changes are of the NLL; a divergence from the source was not recorded and is None.
    """
    recorded = _shared_out(measurements, sizes)
    points: list[Point] = []
    for part in roles(sizes):
        demotions = recorded.get(part.name, {})
        kinds = [k for k in K_LADDER if sizes.legal(part.groups[0], k)] if demotions else []
        for kind in (BASE, *kinds):
            nll = demotions.get(kind) or _modelled(part, kind, demotions, sizes)
            n_bytes = part.n_bytes(kind, sizes)
            points.append(Point(part=part, kind=kind, n_bytes=n_bytes, kld=None, nll=nll))
    return tuple(points)


def _shared_out(measurements: Sequence[Measurement], sizes: Sizes) -> dict[str, dict[str, Interval]]:
    """Group -> type -> change; a joint record is shared out by the bytes it saved."""
    found: dict[str, dict[str, Interval]] = {}
    for unit in make_units(measurements, sizes):
        delta = unit.measurement.delta
        if delta is None:
            continue
        for name, kind in unit.changes.items():
            share = sizes.bytes_saved({name: kind}) / unit.bytes_saved
            low, mean, high = (value * share for value in (delta.low, delta.mean, delta.high))
            shared = Interval(mean=mean, low=low, high=high, n=delta.n, population=delta.population)
            found.setdefault(name, {})[kind] = shared
    return found


def _modelled(part: Part, kind: str, recorded: Mapping[str, Interval], sizes: Sizes) -> Interval:
    """The recorded demotion, scaled by the squared rounding error of ``kind``; no interval is claimed."""
    mean = 0.0
    if kind != BASE:
        known = min(recorded, key=lambda k: part.n_bytes(k, sizes))
        base = _squared_error(part, BASE, sizes)
        unit = _squared_error(part, known, sizes) - base
        mean = recorded[known].mean * (_squared_error(part, kind, sizes) - base) / unit
    return Interval(mean=mean, low=mean, high=mean, n=0, population=0)


def _squared_error(part: Part, kind: str, sizes: Sizes) -> float:
    """Mean of 4^-bits over a part's weights: proportional to the squared rounding error."""
    total, weights = 0.0, 0
    for name in part.groups:
        for tensor, base in sizes.base_types(name).items():
            bits = bits_per_weight(base if kind == BASE else parse_type(kind))
            n = sizes.tensors[tensor].n_elements
            total, weights = total + n * 4.0**-bits, weights + n
    return total / weights
