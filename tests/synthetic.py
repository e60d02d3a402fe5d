"""The demo model's shapes with a damage that is known: what planning should find out, without a model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cache

import numpy as np

from cerebellum.base import preset_base
from cerebellum.gguf import bits_per_weight, parse_type
from cerebellum.groups import make_groups
from cerebellum.measure.curves import (
    BASE,
    FINE_LADDER,
    K_LADDER,
    Response,
    Score,
    Tried,
    Yardstick,
    anchored,
    candidates,
    measure_curves,
    measure_response,
)
from cerebellum.measure.race import Changes
from cerebellum.measure.rounding import RoundingErrors
from cerebellum.measure.zoom import zoom
from cerebellum.plan.damage import Sensitivities, Whole
from cerebellum.plan.limit import Sizes
from cerebellum.source import open_source
from cerebellum.workspace import DEMO_MODEL

ANCHOR = "Q8_0"
KINDS = (*K_LADDER, *FINE_LADDER)
BITS = {kind: bits_per_weight(parse_type(kind)) for kind in KINDS}
CHUNKS = 16


@cache
def sizes_of(spans: int) -> Sizes:
    source = open_source(DEMO_MODEL)
    groups = {g.name: g for g in make_groups(source, spans=spans) if not g.protected}
    return Sizes(tensors=source.tensors, groups=groups, base=preset_base(source, "Q3_K_M", None))


def by_role() -> Sizes:
    return sizes_of(1)


def by_layer() -> Sizes:
    return sizes_of(8)


class Truth:
    """Damage is a group's height times its rounding error, which falls fourfold with each bit.

    SSM groups are ten times as sensitive, layer 0 of ``ssm_in`` twenty times that. ``noise`` is that of
    a chunk, as a share of the damage.
    """

    def __init__(self, sizes: Sizes, noise: float = 0.05) -> None:
        self.sizes, self.noise = sizes, noise
        of = {name: self._errors(name) for name in sizes.groups}
        self.errors = RoundingErrors(
            anchor=ANCHOR, at_anchor={name: errors[ANCHOR] for name, errors in of.items()}, of=of
        )

    def _errors(self, name: str) -> dict[str, float]:
        weights = self.sizes.groups[name].parameters
        base = self.sizes.base_types(name).values()
        bits = float(np.mean([bits_per_weight(kind) for kind in base]))
        return {kind: weights * 4.0**-b for kind, b in {BASE: bits, **BITS}.items()}

    def height(self, name: str) -> float:
        role, _, layers = name.partition(".")
        high = 10 if role.startswith("ssm") else 1
        high *= 20 if (role, layers) == ("ssm_in", "0") else 1
        return 2e-7 * high * (1 + 0.01 * len(role))

    def damage(self, changes: Changes, factors: Mapping[str, float] | None = None) -> float:
        """Above the anchor; with ``factors``, types do more than rounding says."""
        total = 0.0
        for name in self.sizes.groups:
            kind = changes.get(name, BASE)
            total += self.height(name) * self.errors.above(name, kind) * (factors or {}).get(kind, 1.0)
        return total

    def score(self, changes: Changes, n: int = CHUNKS, factors: Mapping[str, float] | None = None) -> Score:
        """Chunks differ in how hard they are, and each variant has some noise of its own."""
        damage = self.damage(changes, factors)
        hardness = np.random.default_rng(0).normal(1, 0.2, CHUNKS)
        hardness /= hardness.mean()
        own = np.random.default_rng(zlib.crc32(repr(sorted(changes.items())).encode()))
        chunks = damage * (hardness + self.noise * own.normal(size=CHUNKS))[:n]
        return Score(nll=2.0 + chunks + 0.01 * own.normal(size=CHUNKS)[:n], kld=0.001 + chunks)

    def yardstick(self) -> Yardstick:
        return Yardstick(anchor=self.score(anchored(self.sizes, ANCHOR)), base=self.score({}))

    def base_whole(self) -> Whole:
        kld, nll = self.yardstick().above(self.score({}))
        return Whole(changes={}, kld=kld, nll=nll)

    def measure(self, tried: Tried, largest: float = 0.0) -> Response:
        part, kind = tried
        changes = {**anchored(self.sizes, ANCHOR), **part.at(kind)}
        return measure_response(tried, lambda n: self.score(changes, n), self.yardstick(), CHUNKS, largest)

    def responses(self, probes: int = 60) -> tuple[Response, ...]:
        """Of all roles at all K-quants, and of halves while ``probes`` last."""
        found = measure_curves(candidates(self.sizes, K_LADDER, ANCHOR), self.measure)
        asked: list[Tried] = []

        def probe(tried: Tried) -> Response:
            asked.append(tried)
            return self.measure(tried)

        return found + zoom(found, self.errors, self.sizes, probe, lambda: len(asked) + 2 <= probes)

    def sensitivities(self, probes: int = 60) -> Sensitivities:
        return Sensitivities(self.responses(probes), self.errors, self.sizes)
