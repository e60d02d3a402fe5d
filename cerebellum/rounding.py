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

from cerebellum.curves import BASE
from cerebellum.gguf import fits, is_quantized, needs_imatrix, parse_type
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.llama.quantize import QuantizeJob, quantize, to_float
from cerebellum.plan import Sizes
from cerebellum.progress import Reporter
from cerebellum.source import Source

_LEAST_ROWS, _LEAST_ELEMENTS = 64, 1 << 18  # of a tensor, spread evenly over its experts and rows


@dataclass(frozen=True, kw_only=True)
class RoundingErrors:
    """Group -> type name (or BASE) -> summed squared error of its weights, by importance.

    In units of the activations' mean square; only ratios between groups and types are used. A type
    that a group cannot take is not there. ``offered`` are the types that a plan may choose.
    """

    of: Mapping[str, Mapping[str, float]]
    anchor: str
    offered: tuple[str, ...]

    def above(self, name: str, kind: str) -> float:
        """The error of a group at ``kind`` above that at the anchor, where its damage counts from."""
        return self.of[name][kind] - self.of[name][self.anchor]

    def kinds(self, name: str) -> list[str]:
        """The types that a plan may give a group."""
        return [kind for kind in self.offered if kind in self.of[name]]

    def as_json(self) -> dict[str, Any]:
        return {"anchor": self.anchor, "offered": list(self.offered), "groups": self.of}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundingErrors:
        return cls(of=value["groups"], anchor=value["anchor"], offered=tuple(value["offered"]))


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
    wanted = dict.fromkeys((*kinds, anchor))
    names = [name for name in sizes.groups if sizes.legal(name, anchor)]
    with reporter.task("rounding errors of every type", len(names)) as tick:
        for name in names:
            samples = [Sample(source, matrix, tensor, threads) for tensor in sizes.groups[name].tensors]
            errors = {
                kind: sum(sample.error(parse_type(kind)) for sample in samples)
                for kind in wanted
                if all(sample.takes(parse_type(kind)) for sample in samples)
            }
            base = sum(sample.error(sizes.base.types[sample.name]) for sample in samples)
            found[name] = {BASE: base, **errors}
            tick()
    return RoundingErrors(of=found, anchor=anchor, offered=tuple(kinds))


class Sample:
    """Some rows of one tensor, as many of each expert, in full precision with their importance."""

    def __init__(self, source: Source, matrix: ImportanceMatrix | None, name: str, threads: int) -> None:
        self.name, self._threads = name, threads
        tensor = source.tensors[name]
        columns, experts = tensor.shape[0], tensor.shape[2] if len(tensor.shape) > 2 else 1
        per_expert = tensor.n_elements // columns // experts
        wanted = -(-max(_LEAST_ROWS, -(-_LEAST_ELEMENTS // columns)) // experts)
        rows = np.unique(np.linspace(0, per_expert - 1, min(wanted, per_expert)).astype(int))
        raw = source.read(name).reshape(experts, per_expert, -1)[:, rows]
        self._raw, self._type = np.ascontiguousarray(raw).ravel(), tensor.type
        self._shape = (columns, len(rows), experts)
        self._weight = per_expert / len(rows)
        self._importance = matrix.importance(name) if matrix else None
        self._exact = to_float(self._raw, self._type, columns)

    def takes(self, kind: GGMLQuantizationType) -> bool:
        """Whether the rows can be of this type, and the matrix has what it needs."""
        return fits(kind, self._shape) and not (needs_imatrix(kind) and self._importance is None)

    def error(self, kind: GGMLQuantizationType) -> float:
        """Of the whole tensor, from these rows."""
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
        columns, n_rows, experts = self._shape
        rounded = to_float(np.concatenate(list(quantize(job, self._threads))), kind, columns)
        squares = np.square(self._exact - rounded).reshape(experts, n_rows, columns).sum(axis=1)
        weights = 1.0 if self._importance is None else self._importance.reshape(experts, columns)
        return float((squares * weights).sum(dtype=np.float64)) * self._weight
