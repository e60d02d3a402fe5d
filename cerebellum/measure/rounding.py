"""How much every type rounds every group: squared error weighted by the importance matrix.

No model runs: some rows of each tensor are quantized by ggml itself and read back. What a group costs at
different types is very nearly proportional to this error (the linearity theorem of Malinovskii et al.
2024, "HIGGS", arXiv:2411.17525), so a few measurements fix the height of its whole curve: sensitivity.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from cerebellum.base import Base
from cerebellum.gguf import fits, is_quantized, needs_imatrix, parse_type
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.llama.quantize import QuantizeJob, quantize, to_float
from cerebellum.measure.curves import BASE, kinds_for
from cerebellum.plan.limit import Sizes
from cerebellum.progress import Reporter
from cerebellum.source import Source

_LEAST_ROWS, _LEAST_ELEMENTS = 64, 1 << 18  # of a tensor, spread evenly over its experts and rows


@dataclass(frozen=True, kw_only=True)
class RoundingErrors:
    """Group -> type name (or BASE) -> summed squared error of its weights, by importance.

    In units of the activations' mean square; only ratios between groups and types are used. The types
    of a group are those that a plan may give it. ``at_anchor`` is where its damage counts from.
    """

    anchor: str
    at_anchor: Mapping[str, float]
    of: Mapping[str, Mapping[str, float]]

    def above(self, name: str, kind: str) -> float:
        """The error of a group at ``kind`` above that at the anchor."""
        return 0.0 if kind == self.anchor else self.of[name][kind] - self.at_anchor[name]

    def kinds(self, name: str) -> list[str]:
        """The types that a plan may give a group."""
        return [kind for kind in self.of[name] if kind != BASE]

    @property
    def all_kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for name in self.of for kind in self.kinds(name)))

    def as_json(self) -> dict[str, Any]:
        return {"anchor": self.anchor, "at_anchor": self.at_anchor, "groups": self.of}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundingErrors:
        return cls(anchor=value["anchor"], at_anchor=value["at_anchor"], of=value["groups"])


def rounding_errors(
    source: Source,
    matrix: ImportanceMatrix | None,
    sizes: Sizes,
    kinds: Sequence[str],
    anchor: str,
    threads: int,
    reporter: Reporter,
) -> RoundingErrors:
    """Of every group that can take the anchor, at its base types and at all of ``kinds`` it can take."""
    found: dict[str, dict[str, float]] = {}
    at_anchor: dict[str, float] = {}
    names = [name for name in sizes.groups if sizes.legal(name, anchor)]
    with reporter.task("rounding errors of every type", len(names)) as tick:
        for name in names:
            fallback = _usual_importance(matrix, name, sizes)
            tensors = sizes.groups[name].tensors
            samples = [Sample(source, matrix, tensor, threads, fallback) for tensor in tensors]
            at_anchor[name] = _error(samples, parse_type(anchor))
            found[name] = {BASE: sum(sample.base_error(sizes.base) for sample in samples)} | {
                kind: _error(samples, parse_type(kind))
                for kind in kinds_for(name, kinds, sizes)
                if all(sample.takes(parse_type(kind)) for sample in samples)
            }
            tick()
    return RoundingErrors(anchor=anchor, at_anchor=at_anchor, of=found)


def _error(samples: Sequence[Sample], kind: GGMLQuantizationType) -> float:
    return sum(sample.error(kind) for sample in samples)


def _usual_importance(matrix: ImportanceMatrix | None, name: str, sizes: Sizes) -> float:
    """The mean importance in a group's role, for those of its tensors that have no entry of their own."""
    role = sizes.groups[name].role
    tensors = [t for group in sizes.groups.values() if group.role == role for t in group.tensors]
    known = [entry for t in tensors if matrix and (entry := matrix.importance(t)) is not None]
    return float(np.mean([entry.mean() for entry in known])) if known else 1.0


class Sample:
    """Some rows of one tensor, as many of each expert, in full precision with their importance."""

    def __init__(
        self,
        source: Source,
        matrix: ImportanceMatrix | None,
        name: str,
        threads: int,
        fallback: float = 1.0,
    ) -> None:
        self.name, self._threads, self._fallback = name, threads, fallback
        tensor = source.tensors[name]
        self._columns, self._experts = tensor.shape[0], tensor.shape[2] if len(tensor.shape) > 2 else 1
        self._per_expert = tensor.n_elements // self._columns // self._experts
        wanted = -(-max(_LEAST_ROWS, -(-_LEAST_ELEMENTS // self._columns)) // self._experts)
        spread = np.linspace(0, self._per_expert - 1, min(wanted, self._per_expert))
        self._rows = np.unique(spread.astype(int))
        self._raw, self._type = self._sampled(source), tensor.type
        self._importance = matrix.importance(name) if matrix else None
        self._exact = to_float(self._raw, self._type, self._columns)

    def _sampled(self, file: Source) -> NDArray[np.uint8]:
        """The bytes of the chosen rows in the source, or in another file with the same tensors."""
        rows = file.read(self.name).reshape(self._experts, self._per_expert, -1)[:, self._rows]
        return np.ascontiguousarray(rows).ravel()

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self._columns, len(self._rows), self._experts)

    def takes(self, kind: GGMLQuantizationType) -> bool:
        """Whether the rows can be of this type, and the matrix has what it needs."""
        return fits(kind, self._shape) and not (needs_imatrix(kind) and self._importance is None)

    def base_error(self, base: Base) -> float:
        """Of the base: of its own bytes where it was given as a file."""
        kind = base.types[self.name]
        if base.file is None:
            return self.error(kind)
        return self._weighted(to_float(self._sampled(base.file), kind, self._columns))

    def error(self, kind: GGMLQuantizationType) -> float:
        """Of the whole tensor at a type, from these rows."""
        if not is_quantized(kind) or kind == self._type:
            return 0.0
        job = QuantizeJob(
            name=self.name,
            raw=self._raw,
            shape=self._shape,
            from_type=self._type,
            to_type=kind,
            importance=self._importance,
        )
        return self._weighted(
            to_float(np.concatenate(list(quantize(job, self._threads))), kind, self._columns)
        )

    def _weighted(self, rounded: NDArray[np.float32]) -> float:
        columns, n_rows, experts = self._shape
        squares = np.square(self._exact - rounded).reshape(experts, n_rows, columns).sum(axis=1)
        weights = self._fallback if self._importance is None else self._importance.reshape(experts, columns)
        return float((squares * weights).sum(dtype=np.float64)) * self._per_expert / n_rows
