"""Decides what to measure of a model's parts and for how long, so that every group has a curve. Opens no model.

Generators yield what they want scored (``ProbeAsk``) and are sent the scores; each role has its own, so that many
workers can measure several at once. Which chunks a decision sees follows from the seeded order alone.

A part is measured at a type while all else is at the *anchor*, a type so fine that it does next to no damage
(Q8_0). Its damage is then the whole of the KL divergence from the source above the anchor's: from a base that
is damaged itself, the same change drowns in cross terms with that damage, five to ten times as much noise
(docs/LOG.md). First every role is measured at every type, then the layers of a role apart, from coarse to
fine, as far as measurements say that they differ. That later layers have larger weights needs no measurement:
rounding errors say it (rounding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cerebellum.gguf import bits_per_weight, parse_type
from cerebellum.layout import Layout, Part
from cerebellum.measure.artifacts import Effect, Response, RoundingErrors
from cerebellum.measure.method import Method
from cerebellum.stats.estimate import Estimate, nested_sum, ratio_estimate
from cerebellum.stats.sequential import looks
from cerebellum.verdicts import Asking, Batch, Changes, Desk, drive_together, side_by_side

Vector = NDArray[np.float64]
T = TypeVar("T")

_PARTS_AHEAD = 4
"""Parts whose halves idle workers may score before it is known that they are wanted."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One part at one type, to be measured with all else at the anchor; its answer is a Response."""

    part: Part
    qtype: str

    def changes(self, layout: Layout, anchor: str) -> Changes:
        """Returns the variant that has the part at its type and every other group at the anchor."""
        return {**layout.anchored(anchor), **self.part.at(self.qtype)}

    def answered(self, effect: Effect) -> Response:
        """Returns the response: this probe with what was found."""
        return Response(
            part=self.part.name,
            groups=self.part.groups,
            type=self.qtype,
            kld=effect.kld,
            nll=effect.nll,
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """A variant on some chunks: mean NLL and mean KL divergence from the source of each, nats a token.

    Both start at the first chunk of the seeded order; the NLL may be known of more chunks than the divergence.
    """

    nll: Vector
    kld: Vector

    @property
    def finite(self) -> bool:
        """Says whether the variant gave numbers on every chunk; one that did not has collapsed."""
        return bool(np.isfinite(self.nll).all() and np.isfinite(self.kld).all())

    def first(self, n: int) -> Score:
        """Returns the score on the first ``n`` chunks of the seeded order."""
        return Score(nll=self.nll[:n], kld=self.kld[:n])

    def change(self, base: Score) -> Effect:
        """Returns the change against the base on the same chunks, paired chunk by chunk."""
        if not self.finite:
            return Effect(kld=None, nll=None)
        return Effect(kld=Estimate.of(self.kld - base.kld), nll=Estimate.of(self.nll - base.nll))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Scores of the anchor and the base on every chunk that parts get; damages are measured from the anchor's.

    The base's own damage says how hard each chunk is, so that a part may be measured on the first chunks only
    and still be compared with one that got them all.
    """

    anchor: Score
    base: Score

    def damage(self, score: Score) -> Effect:
        """Returns the damage of a variant above the anchor's, from the chunks on which it was scored."""
        if not score.finite:
            return Effect(kld=None, nll=None)
        nll = Estimate.of(score.nll - self.anchor.nll[: len(score.nll)])
        return Effect(kld=self._divergence(score), nll=nll)

    def damage_of_plan(self, score: Score, base: Score) -> Effect:
        """Returns the damage of a whole plan above the anchor's; ``base`` is on the same chunks as the plan.

        A plan's NLL is known on more chunks than the anchor's. Its change against the base is taken from all
        of them, the base's damage above the anchor from the first, and their error chunk by chunk.
        """
        if not score.finite:
            return Effect(kld=None, nll=None)
        shared = min(len(score.nll), len(self.anchor.nll))
        above_anchor = base.nll[:shared] - self.anchor.nll[:shared]
        nll = nested_sum(score.nll - base.nll, above_anchor)
        return Effect(kld=self._divergence(score), nll=nll)

    def _divergence(self, score: Score) -> Estimate:
        n = len(score.kld)
        base = self.base.kld - self.anchor.kld
        return ratio_estimate(score.kld - self.anchor.kld[:n], base[:n], float(base.mean()))


@dataclass(frozen=True, kw_only=True)
class ProbeAsk:
    """Please score a probe on the first ``n`` chunks of the seeded order."""

    probe: Probe
    n: int


@dataclass(frozen=True, kw_only=True)
class WholeAsk:
    """Please score a whole plan: on all chunks that whole plans get, or on the first ``n`` where that is given.

    ``doing`` tells people what it is for.
    """

    changes: Changes
    n: int | None = None
    doing: str = "whole plans: "


Curving = Asking[ProbeAsk, Score, T]
Planning = Asking[WholeAsk, Score, T]
"""What decides without I/O and asks for the scores of parts, or of whole plans."""


def role_probes(layout: Layout, qtypes: Sequence[str], anchor: str) -> list[Probe]:
    """Returns every role at every type that all its rows can take, the smallest type of a role first.

    A role that cannot be at the anchor is left out: nothing could be measured beside it.
    """
    found: list[Probe] = []
    for part in layout.roles():
        if not all(layout.legal(name, anchor) for name in part.groups):
            continue
        each = [layout.ladder(name, qtypes) for name in part.groups]
        common = [qtype for qtype in each[0] if all(qtype in one for one in each) and qtype != anchor]
        common.sort(key=lambda qtype: bits_per_weight(parse_type(qtype)))
        found += [Probe(part=part, qtype=qtype) for qtype in common]
    return found


def measure_response(
    probe: Probe,
    reference: Reference,
    method: Method,
    most: int,
    largest: float = 0.0,
    then: tuple[ProbeAsk, ...] = (),
) -> Curving[Response]:
    """Measures one probe on ``most`` chunks, or on as few as settle it; ``then`` is what is likely to follow.

    It is settled once its damage is known precisely, or is surely slight beside ``largest``, the most that
    its role did at any type so far: no decision hangs on more.
    """
    wanted = [ProbeAsk(probe=probe, n=n) for n in looks(min(method.first_look, most), method.growth, most)]
    for number, ask in enumerate(wanted):
        (score,) = yield Batch(asks=(ask,), likely=(*then, *wanted[number + 1 : number + 2]))
        found = reference.damage(score)
        if found.kld is None:
            break
        damage = found.kld.interval()
        is_slight = damage.high < method.slight * largest
        if is_slight or damage.high - damage.mean < method.precise * damage.mean:
            break
    return probe.answered(found)


def measure_roles(
    probes: Sequence[Probe], reference: Reference, method: Method, most: int, desk: Desk[ProbeAsk, Score]
) -> tuple[Response, ...]:
    """Measures all types of all roles, the roles side by side: nothing that one does is seen by another."""
    roles = [list(own) for _, own in groupby(probes, key=lambda probe: probe.part)]
    found = drive_together([_measure_role(role, reference, method, most) for role in roles], desk)
    return tuple(response for role in found for response in role)


def _measure_role(
    probes: Sequence[Probe], reference: Reference, method: Method, most: int
) -> Curving[tuple[Response, ...]]:
    """Measures the smallest type of a role first; its damage says which larger types need no precision."""
    found: list[Response] = []
    first = min(method.first_look, most)
    for number, probe in enumerate(probes):
        own = [response.kld.mean for response in found if response.kld is not None]
        then = tuple(ProbeAsk(probe=later, n=first) for later in probes[number + 1 :])
        largest = max(own, default=0.0)
        found.append((yield from measure_response(probe, reference, method, most, largest, then)))
    return tuple(found)


def measure_layers(
    responses: Sequence[Response],
    errors: RoundingErrors,
    layout: Layout,
    reference: Reference,
    method: Method,
    most: int,
    affordable: Callable[[], bool],
) -> Curving[tuple[Response, ...]]:
    """Measures the halves of parts while two more measurements are ``affordable``, the most damaging part first.

    A role is cut in two by layer and each half is measured at one cheap type. Where the halves are surely not
    equally sensitive to rounding, each is cut again.
    """
    found: list[Response] = []
    queue = [response for response in _smallest_types(responses) if len(response.groups) > 1]
    while queue and affordable():
        damages = [abs(response.kld.mean) if response.kld else np.inf for response in queue]
        whole = queue.pop(int(np.argmax(damages)))
        asked = [measure_response(probe, reference, method, most) for probe in _half_probes(whole, layout)]
        likely = _next_halves(queue, layout, min(method.first_look, most))
        first, second = yield from side_by_side(*asked, likely=likely)
        found += [first, second]
        if _differ(first, second, errors, method):
            queue += [response for response in (first, second) if len(response.groups) > 1]
    return tuple(found)


def _half_probes(whole: Response, layout: Layout) -> tuple[Probe, ...]:
    return tuple(Probe(part=half, qtype=whole.type) for half in halves(whole.groups, layout))


def _next_halves(queue: Sequence[Response], layout: Layout, first: int) -> tuple[ProbeAsk, ...]:
    """Returns the first look at the halves of the parts that will be cut next, unless a new part comes between."""
    by_damage = sorted(queue, key=lambda response: -abs(response.kld.mean) if response.kld else -np.inf)
    return tuple(
        ProbeAsk(probe=probe, n=first)
        for whole in by_damage[:_PARTS_AHEAD]
        for probe in _half_probes(whole, layout)
    )


def halves(names: Sequence[str], layout: Layout) -> tuple[Part, Part]:
    """Returns the earlier and the later layers of at least two groups of one role."""
    middle = len(names) // 2
    return layout.part(names[:middle]), layout.part(names[middle:])


def _smallest_types(responses: Sequence[Response]) -> list[Response]:
    """Returns every role at the smallest type that it survived, which comes first: there its layers say most."""
    first: dict[tuple[str, ...], Response] = {}
    for response in responses:
        if response.kld is not None:
            first.setdefault(response.groups, response)
    return list(first.values())


def _differ(a: Response, b: Response, errors: RoundingErrors, method: Method) -> bool:
    """Says whether two halves are surely not equally sensitive; a collapse differs from anything else."""
    if a.kld is None or b.kld is None:
        return a.kld is not b.kld
    rounded = (errors.summed(a.groups, a.type), errors.summed(b.groups, b.type))
    if min(rounded) <= 0:
        return False
    difference = (a.kld * (1 / rounded[0]) + b.kld * (-1 / rounded[1])).interval()
    return abs(difference.mean) > method.apart * (difference.high - difference.mean)
