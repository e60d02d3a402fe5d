"""Texts to test rules on: differences of twelve groups, recorded or drawn, and what can be done to them.

A population is a finite text: a rule's promise is about random orders of its chunks, whatever the values are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cerebellum.measure.race import ChunkAsk, ChunkScores
from cerebellum.verdicts import Changes

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

SCORED = 255  # tokens of a chunk of 512 that count
GROUPS, CHUNKS = 12, 530  # of the drawn populations: the demo's
RESULTS = Path(__file__).parent / "results"


def vectors_path(name: str) -> Path:
    """Returns where a recording lies."""
    return RESULTS / f"replay-{name}.npz"


@lru_cache(maxsize=4)
def _surprises(groups: int) -> Vector:
    """Returns a standard normal number for every set of groups, (2^groups,), the same each time."""
    return np.random.default_rng(15).standard_normal(2**groups)


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """What wholes do beyond the sum of their parts, s nats: a factor 1 + ``per_nat`` s + a surprise of its own.

    ``scatter`` is the standard deviation of the surprises, as a share of s; nothing can foretell them. Chunks scatter
    less about a whole of k groups than about the sum of its parts: k^-``damping`` of it.
    """

    per_nat: float = 0.0
    scatter: float = 0.0
    damping: float = 0.0

    def factors(self, sets_SG: NDArray[np.bool_], sums_S: Vector) -> Vector:
        """Returns by what to multiply the sums of some sets of groups, (S,); a group alone is itself."""
        numbers = sets_SG @ (1 << np.arange(sets_SG.shape[1]))
        found = 1 + self.per_nat * sums_S + self.scatter * _surprises(sets_SG.shape[1])[numbers]
        return np.where(sets_SG.sum(1) > 1, found, 1.0)


@dataclass(frozen=True, kw_only=True)
class Population:
    """Differences ``nll_GN`` and divergences ``kld_GN`` of every group on every chunk, nats/token.

    A combination is the sum of its groups times the factor of its ``interaction``. ``recentred`` puts every
    combination's mean there, so that it lies where a verdict would be wrong.
    """

    groups: tuple[str, ...]
    nll_GN: Matrix
    kld_GN: Matrix | None
    bytes_saved: Mapping[str, int] = field(default_factory=dict)
    interaction: Interaction = Interaction()
    recentred: float | None = None

    @property
    def chunks(self) -> int:
        """Chunks in the text."""
        return int(self.nll_GN.shape[1])

    def answer(self, ask: ChunkAsk) -> ChunkScores:
        """Answers a race as an engine would; the base is zero."""
        chunks = list(ask.chunks)
        if not ask.changes:
            return ChunkScores(nll_N=np.zeros(len(chunks)))
        kld = self.kld_GN[self._places(ask.changes)][:, chunks].sum(0) if self.kld_GN is not None else None
        return ChunkScores(nll_N=self._whole(ask.changes)[chunks], kld_N=kld)

    def truth(self, changes: Changes) -> float:
        """Returns the mean over the whole text, nats/token."""
        return float(self._whole(changes).mean())

    def at(self, mean: float) -> Population:
        """Returns the same text with every group's mean moved to ``mean``: the hardest question there is."""
        moved = self.nll_GN - self.nll_GN.mean(axis=1, keepdims=True) + mean
        return replace(self, nll_GN=moved)

    def _whole(self, changes: Changes) -> Vector:
        whole = self.nll_GN[self._places(changes)].sum(0)
        if len(changes) > 1:
            members = np.isin(self.groups, list(changes))
            mean = whole.mean(keepdims=True)
            about = (whole - mean) * len(changes) ** -self.interaction.damping
            whole = about + mean * self.interaction.factors(members[None], mean)
            if self.recentred is not None:
                whole = whole - whole.mean() + self.recentred
        return np.asarray(whole)

    def _places(self, changes: Changes) -> list[int]:
        return [self.groups.index(name) for name in changes]


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A combination as it was recorded, a value a chunk."""

    groups: tuple[str, ...]
    nll_N: Vector
    kld_N: Vector


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A recorded model: what made it, its groups alone with the interaction seen, and the combinations behind that."""

    about: Mapping[str, object]
    population: Population
    wholes: tuple[Whole, ...]


def load(name: str) -> Recorded:
    """Reads results/replay-NAME.npz: about (JSON), GROUPS/nll, GROUPS/kld and GROUPS/bytes, groups joined by ``+``.

    Where only some chunks were compared with the base, the divergences of the others are drawn from those.
    """
    with np.load(vectors_path(name)) as stored:
        arrays = {key: stored[key] for key in stored}
    about = json.loads(str(arrays["about"]))
    keys = [key.removesuffix("/nll") for key in arrays if key.endswith("/nll")]
    groups = tuple(key for key in keys if "+" not in key)
    rng = np.random.default_rng(1)
    places = rng.integers(
        int(np.isfinite(arrays[f"{groups[0]}/kld"]).sum()), size=len(arrays[f"{groups[0]}/kld"])
    )

    def kld(key: str) -> Vector:
        values = arrays[f"{key}/kld"].astype(np.float64)
        return np.where(np.isfinite(values), values, values[np.isfinite(values)][places])

    alone = Population(
        groups=groups,
        nll_GN=np.stack([arrays[f"{group}/nll"].astype(np.float64) for group in groups]),
        kld_GN=np.stack([kld(group) for group in groups]),
        bytes_saved={group: int(arrays[f"{group}/bytes"]) for group in groups},
    )
    wholes = tuple(
        Whole(groups=tuple(key.split("+")), nll_N=arrays[f"{key}/nll"].astype(np.float64), kld_N=kld(key))
        for key in keys
        if "+" in key
    )
    return Recorded(
        about=about, population=replace(alone, interaction=interaction(alone, wholes)), wholes=wholes
    )


def interaction(alone: Population, wholes: Sequence[Whole]) -> Interaction:
    """Returns what recorded combinations do beyond the sum of their parts: least squares, and what that leaves."""
    if not wholes:
        return Interaction()
    sums = np.array([sum(alone.truth({name: ""}) for name in whole.groups) for whole in wholes])
    beyond = np.array([float(whole.nll_N.mean()) for whole in wholes]) / sums - 1
    per_nat = float(sums @ beyond / (sums @ sums))
    rest = beyond - per_nat * sums
    spreads = np.array([_spread(alone, whole) for whole in wholes])
    sizes = np.log([len(whole.groups) for whole in wholes])
    return Interaction(
        per_nat=per_nat,
        scatter=math.sqrt(float(rest @ rest) / max(len(rest) - 1, 1)),
        damping=-float(sizes @ np.log(spreads) / (sizes @ sizes)),
    )


def _spread(alone: Population, whole: Whole) -> float:
    """Returns the standard deviation of a whole's chunks over that of the sum of its parts."""
    places = [alone.groups.index(name) for name in whole.groups]
    return float(whole.nll_N.std() / alone.nll_GN[places].sum(0).std())


Draw = Callable[[np.random.Generator], Matrix]


def _outlier(rng: np.random.Generator) -> Matrix:
    values = rng.standard_normal((GROUPS, CHUNKS))
    values[:, 0] = 50.0
    return values


def _outliers(rng: np.random.Generator) -> Matrix:
    values = rng.standard_normal((GROUPS, CHUNKS))
    values[:, : CHUNKS // 50] *= 20.0
    return values


def _topics(rng: np.random.Generator) -> Matrix:
    """Articles of 3 to 14 chunks, each with a level of its own."""
    lengths = rng.integers(3, 15, CHUNKS)
    article = np.repeat(np.arange(CHUNKS), lengths)[:CHUNKS]
    return np.asarray(
        rng.standard_normal((GROUPS, CHUNKS))[:, article] + rng.standard_normal((GROUPS, CHUNKS))
    )


NASTY: Mapping[str, Draw] = {
    "normal": lambda rng: rng.standard_normal((GROUPS, CHUNKS)),
    "topics (articles of 3 to 14 chunks)": _topics,
    "heavy tails (t, 3 degrees)": lambda rng: rng.standard_t(3, (GROUPS, CHUNKS)),
    "heavier tails (t, 2 degrees)": lambda rng: rng.standard_t(2, (GROUPS, CHUNKS)),
    "skew 0.8 (gamma)": lambda rng: rng.gamma(6.25, 1.0, (GROUPS, CHUNKS)),
    "skew 1.4 (chi-square, 4 degrees)": lambda rng: rng.chisquare(4, (GROUPS, CHUNKS)),
    "skew 6 (lognormal)": lambda rng: rng.lognormal(0, 1, (GROUPS, CHUNKS)),
    "one chunk 50 sd out": _outlier,
    "2% of chunks 20 times as wide": _outliers,
}


def drawn(
    draw: Draw, rng: np.random.Generator, *, kld_scale: float = 1.0, kld_scatter: float = 0.25
) -> Population:
    """Draws a text with a standard deviation of 0.01 nats a chunk, and divergences that foretell it.

    They foretell the spread of the ordinary chunks (1.48 median absolute deviations: outliers are not foretold),
    with a log-scatter of 0.25 over groups, as on the demo; ``kld_scale`` makes what they foretell of all groups
    that much too large.
    """
    values = draw(rng)
    values = 0.01 * (values - values.mean(1, keepdims=True)) / values.std(1, ddof=1, keepdims=True)
    ordinary = 1.4826 * np.median(np.abs(values - np.median(values, 1, keepdims=True)), 1, keepdims=True)
    foretold = ordinary / 1.07 * kld_scale * np.exp(kld_scatter * rng.standard_normal((GROUPS, 1)))
    kld = SCORED / 2 * foretold**2 * np.exp(0.2 * rng.standard_normal((GROUPS, CHUNKS)) - 0.02)
    names = tuple(f"g{place}" for place in range(GROUPS))
    return Population(groups=names, nll_GN=values, kld_GN=kld, bytes_saved=dict.fromkeys(names, 1000))
