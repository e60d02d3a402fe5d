"""Texts to test rules on: differences of twelve groups, recorded or drawn, and what can be done to them.

A population is a finite text: a rule's promise is about random orders of its chunks, whatever the values are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cerebellum.measure.race import ChunkAsk, ChunkScores
from cerebellum.verdicts import Changes

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

SCORED = 255  # tokens of a chunk of 512 that count
GROUPS, CHUNKS = 12, 530  # of the drawn populations: the demo's
VECTORS = Path(__file__).parent / "results" / "replay_vectors.npz"


@dataclass(frozen=True, kw_only=True)
class Population:
    """Differences ``nll_GN`` and divergences ``kld_GN`` of every group on every chunk, nats/token.

    A combination is the sum of its groups and, for every nat of that, ``interaction`` of it more: the whole does
    more than its parts, by the square of what it does. ``recentred`` puts every combination's mean there, so
    that it lies where a verdict would be wrong.
    """

    groups: tuple[str, ...]
    nll_GN: Matrix
    kld_GN: Matrix | None
    bytes_saved: Mapping[str, int] = field(default_factory=dict)
    interaction: float = 0.0
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
            whole = whole * (1 + self.interaction * float(whole.mean()))
            if self.recentred is not None:
                whole = whole - whole.mean() + self.recentred
        return np.asarray(whole)

    def _places(self, changes: Changes) -> list[int]:
        return [self.groups.index(name) for name in changes]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A family of recorded vectors: the groups alone, and combinations beside them for checks."""

    name: str
    alone: Population
    combinations: Mapping[tuple[str, ...], tuple[Vector, Vector]]

    @property
    def interaction(self) -> float:
        """What recorded combinations do beyond the sum of their parts, for each nat of it: least squares."""
        sums = np.array([sum(self.alone.truth({n: ""}) for n in names) for names in self.combinations])
        wholes = np.array([float(nll.mean()) for nll, _ in self.combinations.values()])
        return float((sums**2 @ (wholes - sums)) / (sums**2 @ sums**2)) if len(sums) else 0.0


def load() -> Iterator[Recorded]:
    """Reads results/replay_vectors.npz: arrays base/type/groups/nll and base/type/groups/kld, and bytes."""
    with np.load(VECTORS) as stored:
        arrays = {key: stored[key].astype(np.float64) for key in stored}
    for family in dict.fromkeys("/".join(key.split("/")[:2]) for key in arrays):
        parts = [key.split("/")[2] for key in arrays if key.startswith(family) and key.endswith("/nll")]
        groups = tuple(name for name in parts if "+" not in name)
        joint = [name for name in parts if "+" in name]

        def vectors(names: Sequence[str], kind: str, family: str = family) -> Matrix:
            return np.stack([arrays[f"{family}/{name}/{kind}"] for name in names])

        saved = dict(zip(groups, (int(arrays[f"{family}/{name}/bytes"]) for name in groups), strict=True))
        alone = Population(
            groups=groups, nll_GN=vectors(groups, "nll"), kld_GN=vectors(groups, "kld"), bytes_saved=saved
        )
        pairs = {tuple(n.split("+")): (vectors([n], "nll")[0], vectors([n], "kld")[0]) for n in joint}
        yield Recorded(name=family.replace("/", " to "), alone=alone, combinations=pairs)


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
