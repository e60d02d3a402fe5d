"""The demo model's shapes with a damage that is known: what planning should find out, without a model."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from gguf import GGMLQuantizationType
from msgspec.structs import replace

from cerebellum.base import preset_base
from cerebellum.gguf import bits_per_weight, parse_type
from cerebellum.groups import make_groups
from cerebellum.layout import Layout
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.measure.artifacts import Curves, Response, RoundingErrors
from cerebellum.measure.curves import (
    Curving,
    Planning,
    Probe,
    ProbeAsk,
    Reference,
    Score,
    WholeAsk,
    measure_layers,
    measure_response,
    measure_roles,
    role_probes,
)
from cerebellum.measure.method import Method
from cerebellum.measure.probe import MeasurementBudget
from cerebellum.plan.damage import DamageModel, fit_damage
from cerebellum.settings import DEMO_MODEL, FINE_LADDER, K_LADDER, Budget, Bytes
from cerebellum.source import open_source
from cerebellum.verdicts import NOTHING, Changes, drive

T = TypeVar("T")

ANCHOR = "Q8_0"
TYPES = (*K_LADDER, *FINE_LADDER)
BITS = {qtype: bits_per_weight(parse_type(qtype)) for qtype in TYPES}
CHUNKS = 16
METHOD = Method()


@dataclass(frozen=True)
class OneByOne:
    """A desk with one worker, who begins with a question when the answer is asked for."""

    answer: Callable[[ProbeAsk], Score]

    def want(self, who: int, asks: Sequence[ProbeAsk], likely: Sequence[ProbeAsk]) -> None:
        pass

    def ready(self, ask: ProbeAsk) -> bool:
        return True

    def wait(self) -> None:
        raise AssertionError("nothing to wait for")


@cache
def layout_of(spans: int) -> Layout:
    source = open_source(DEMO_MODEL)
    base = preset_base(LlamaEngine(EngineSettings()), source, "Q3_K_M", None, has_imatrix=False)
    return Layout.of(source, make_groups(source, spans=spans), base)


def by_role() -> Layout:
    return layout_of(1)


def by_layer() -> Layout:
    return layout_of(8)


class Truth:
    """Damage is a group's sensitivity times its rounding error, which falls fourfold with each bit.

    SSM groups are ten times as sensitive, layer 0 of ``ssm_in`` twenty times that. ``noise`` is that of
    a chunk, as a share of the damage.
    """

    def __init__(self, layout: Layout, noise: float = 0.05) -> None:
        self.layout, self.noise = layout, noise
        self.errors = RoundingErrors(
            anchor=ANCHOR,
            at_anchor={name: self._error(name, BITS[ANCHOR]) for name in layout.groups},
            at_base={name: self._error(name, self._base_bits(name)) for name in layout.groups},
            of={
                name: {qtype: self._error(name, bits) for qtype, bits in BITS.items()}
                for name in layout.groups
            },
        )

    def _error(self, name: str, bits: float) -> float:
        return float(self.layout.groups[name].parameters * 4.0**-bits)

    def _base_bits(self, name: str) -> float:
        base = self.layout.group_types(name).values()
        return float(np.mean([bits_per_weight(type_) for type_ in base]))

    def sensitivity(self, name: str) -> float:
        role, _, layers = name.partition(".")
        high = 10 if role.startswith("ssm") else 1
        high *= 20 if (role, layers) == ("ssm_in", "0") else 1
        return 2e-7 * high * (1 + 0.01 * len(role))

    def damage(self, changes: Changes, factors: Mapping[str, float] | None = None) -> float:
        """Above the anchor; with ``factors``, types do more than rounding says."""
        total = 0.0
        for name in self.layout.groups:
            qtype = changes.get(name)
            factor = (factors or {}).get(qtype or "", 1.0)
            total += self.sensitivity(name) * self.errors.above(name, qtype) * factor
        return total

    def score(self, changes: Changes, n: int = CHUNKS, factors: Mapping[str, float] | None = None) -> Score:
        """Chunks differ in how hard they are, and each variant has some noise of its own."""
        damage = self.damage(changes, factors)
        hardness = np.random.default_rng(0).normal(1, 0.2, CHUNKS)
        hardness /= hardness.mean()
        own = np.random.default_rng(zlib.crc32(repr(sorted(changes.items())).encode()))
        chunks = damage * (hardness + self.noise * own.normal(size=CHUNKS))[:n]
        return Score(nll=2.0 + chunks + 0.01 * own.normal(size=CHUNKS)[:n], kld=0.001 + chunks)

    def reference(self) -> Reference:
        return Reference(anchor=self.score(self.layout.anchored(ANCHOR)), base=self.score(NOTHING))

    def scored(self, ask: ProbeAsk) -> Score:
        return self.score(ask.probe.changes(self.layout, ANCHOR), ask.n)

    def measure(self, probe: Probe, largest: float = 0.0) -> Response:
        return drive(measure_response(probe, self.reference(), METHOD, CHUNKS, largest), self.scored)

    def responses(self, probes: int = 60) -> tuple[Response, ...]:
        """Of all roles at all K-quants, and of halves while ``probes`` last."""
        reference = self.reference()
        roles = role_probes(self.layout, K_LADDER, ANCHOR)
        found = measure_roles(roles, reference, METHOD, CHUNKS, OneByOne(self.scored))
        asked: set[Probe] = set()

        def scored(ask: ProbeAsk) -> Score:
            asked.add(ask.probe)
            return self.scored(ask)

        halves = measure_layers(
            found, self.errors, self.layout, reference, METHOD, CHUNKS, lambda: len(asked) + 2 <= probes
        )
        return found + drive(halves, scored)

    def curves(self, probes: int = 60) -> Curves:
        """What the measure stage would write, had it measured no more than ``probes`` halves."""
        reference = self.reference()
        return Curves(
            base=self.layout.base.label,
            text="made up",
            text_sha256="0" * 64,
            ctx=512,
            seed=1,
            chunks=CHUNKS,
            tokens_scored=512 * 1000,
            passes=1.0,
            anchor_kld=0.0,
            base_kld=0.02,
            base_above_anchor=reference.damage(reference.base),
            responses=self.responses(probes),
            rounding=self.errors,
            method=METHOD,
        )

    def model(self, responses: Sequence[Response] | None = None, probes: int = 60) -> DamageModel:
        """The fit to the truth's own responses, or to others."""
        curves = self.curves(probes)
        if responses is not None:
            curves = replace(curves, responses=tuple(responses))
        return fit_damage(curves, self.layout)


@dataclass(kw_only=True)
class TrueSession:
    """A measuring session over a known truth; ``factors`` are what types do in whole plans beside rounding."""

    truth: Truth
    goal: Budget
    limit: int = 2000
    seed: int = 1
    factors: Mapping[str, float] | None = None
    probed: list[Probe] | None = None

    @classmethod
    def of(cls, truth: Truth, factors: Mapping[str, float] | None = None) -> TrueSession:
        return cls(truth=truth, goal=Budget(sizes=(Bytes(n_bytes=0),)), factors=factors, probed=[])

    @property
    def layout(self) -> Layout:
        return self.truth.layout

    @property
    def presets(self) -> dict[str, dict[str, GGMLQuantizationType]]:
        return {}

    def measure_reference(self) -> Reference:
        return self.truth.reference()

    @property
    def method(self) -> Method:
        return METHOD

    def run(self, curving: Curving[T], budget: MeasurementBudget) -> T:
        def scored(ask: ProbeAsk) -> Score:
            assert self.probed is not None
            if ask.probe not in self.probed:
                self.probed.append(ask.probe)
            budget.charge(ask.probe.changes(self.layout, ANCHOR), ask.n)
            return self.truth.scored(ask)

        return drive(curving, scored)

    def ahead(self, probes: Sequence[Probe]) -> AbstractContextManager[None]:
        return nullcontext()

    def budget_after(self, curves: Curves) -> MeasurementBudget:
        return MeasurementBudget(limit=self.limit, beforehand=curves.chunks_scored)

    def plan(self, planning: Planning[T]) -> T:
        return drive(planning, self.score_plan)

    def score_plan(self, ask: WholeAsk) -> Score:
        return self.truth.score(ask.changes, ask.n or CHUNKS, factors=self.factors)
