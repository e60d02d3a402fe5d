"""Coarse to fine: the layers of a role apart, as far as measurements say that they differ.

A role is cut in two halves by layer, each is measured alone at one cheap type, and where they are surely
not equally sensitive to rounding, each half is cut again, the most damaging first. That later layers have
larger weights needs no measurement: rounding errors say it (rounding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cerebellum.measure.curves import Part, Response, Tried, part_of
from cerebellum.measure.rounding import RoundingErrors
from cerebellum.plan.limit import Sizes
from cerebellum.stats.paired import NORMAL_95, Interval

_APART = 2.0  # standard errors between the halves' sensitivities

Probe = Callable[[Tried], Response]


def halves(part: Part, sizes: Sizes) -> tuple[Part, Part]:
    """The earlier and the later layers of a part of at least two groups."""
    middle = len(part.groups) // 2
    return part_of(part.groups[:middle], sizes), part_of(part.groups[middle:], sizes)


def zoom(
    responses: Sequence[Response],
    errors: RoundingErrors,
    sizes: Sizes,
    probe: Probe,
    affordable: Callable[[], bool],
) -> tuple[Response, ...]:
    """Measures halves with ``probe`` while they differ and two more are ``affordable``."""
    found: list[Response] = []
    queue = [response for response in _smallest_types(responses) if len(response.part.groups) > 1]
    while queue and affordable():
        whole = queue.pop(int(np.argmax([_stake(response) for response in queue])))
        pair = [probe((half, whole.kind)) for half in halves(whole.part, sizes)]
        found += pair
        if _differ(pair[0], pair[1], errors):
            queue += [response for response in pair if len(response.part.groups) > 1]
    return tuple(found)


def _smallest_types(responses: Sequence[Response]) -> list[Response]:
    """Of every role the smallest type that it survived, which comes first: there its layers say most."""
    first: dict[Part, Response] = {}
    for response in responses:
        if response.kld is not None:
            first.setdefault(response.part, response)
    return list(first.values())


def _stake(response: Response) -> float:
    return abs(response.kld.mean) if response.kld else np.inf


def _differ(a: Response, b: Response, errors: RoundingErrors) -> bool:
    """Whether two halves are surely not equally sensitive; a collapse differs from anything else."""
    if a.kld is None or b.kld is None:
        return a.kld is not b.kld
    first, error_a = _sensitivity(a.kld, a, errors)
    second, error_b = _sensitivity(b.kld, b, errors)
    return bool(abs(first - second) > _APART * np.hypot(error_a, error_b))


def _sensitivity(damage: Interval, response: Response, errors: RoundingErrors) -> tuple[float, float]:
    """Damage for each unit of rounding error, and its standard error; without error nothing is known."""
    error = sum(errors.above(name, response.kind) for name in response.part.groups)
    if error <= 0:
        return 0.0, np.inf
    return damage.mean / error, (damage.high - damage.mean) / NORMAL_95 / error
