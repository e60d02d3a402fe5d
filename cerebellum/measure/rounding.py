"""How much every type rounds every group: squared error weighted by the importance matrix.

No model runs: some rows of each tensor are quantized by ggml itself and read back. What a group costs at
different types is very nearly proportional to this error (the linearity theorem of Malinovskii et al.
2024, "HIGGS", arXiv:2411.17525), so a few measurements fix the height of its whole curve: plan/damage.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cerebellum.base import Base
from cerebellum.codec import Artifact, Record, read_artifact, write_artifact
from cerebellum.encode.encoders import Encoder, moments_of
from cerebellum.engine.protocols import QuantizeJob
from cerebellum.engine.workers import HOST, Lane, Room
from cerebellum.errors import BadInput
from cerebellum.gguf import fits, is_quantized, needs_imatrix, parse_type
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.layout import Layout
from cerebellum.measure.artifacts import RoundingErrors
from cerebellum.measure.crew import Errand
from cerebellum.measure.method import Method
from cerebellum.measure.worker import WorkRoom
from cerebellum.progress import Reporter, Silent
from cerebellum.settings import FINE_LADDER, Budget
from cerebellum.source import Source
from cerebellum.workspace import Workspace

_EVERY = 8  # of the sampled rows IQ types get one in so many
_COMPARED = GGMLQuantizationType.Q3_K


class RoundingRecipe(Record, frozen=True, kw_only=True):
    """Everything that the rounding errors of a run depend on.

    ``source``, ``matrix`` and a ``base`` that was given as a file are SHA-256 sums; any other base is its
    tensors' types. ``engine`` is the build that quantizes, with the second moments that it feeds back by.
    """

    engine: str
    source: str
    matrix: str
    base: str | dict[str, str]
    groups: tuple[str, ...]
    types: tuple[str, ...]
    anchor: str
    sample_rows: int
    sample_elements: int


class RoundingFile(Artifact, frozen=True, kw_only=True):
    """rounding.json: rounding errors with what they were made from, kept because IQ types take minutes."""

    format: Literal[3] = 3
    made_from: RoundingRecipe
    errors: RoundingErrors


def read_or_make_errors(workspace: Workspace, goal: Budget, method: Method) -> RoundingErrors:
    """Returns the errors in rounding.json if they were made from just this; makes and keeps them otherwise."""
    base = workspace.base
    path = workspace.path("rounding.json")
    recipe = RoundingRecipe(
        engine=workspace.encoder.build,
        source=workspace.source_fingerprint,
        matrix=workspace.matrix.sha256,
        base=base.file.fingerprint if base.file else workspace.layout.type_names(),
        groups=tuple(workspace.layout.groups),
        types=goal.offered,
        anchor=goal.anchor,
        sample_rows=method.sample_rows,
        sample_elements=method.sample_elements,
    )
    if path.exists():
        with suppress(BadInput):  # another version's: these are a cache, and are made again
            kept = read_artifact(path, RoundingFile, "it is made again")
            if kept.made_from == recipe:
                return kept.errors
    found = _by_crew(workspace, goal, method) if workspace.crew else None
    if found is None:
        found = rounding_errors(
            workspace.encoder,
            workspace.source,
            workspace.matrix,
            workspace.layout,
            goal.offered,
            goal.anchor,
            method,
            workspace.settings.threads,
            workspace.reporter,
        )
    write_artifact(path, RoundingFile(made_from=recipe, errors=found))
    return found


def rounding_errors(
    engine: Encoder,
    source: Source,
    matrix: ImportanceMatrix | None,
    layout: Layout,
    qtypes: Sequence[str],
    anchor: str,
    method: Method,
    threads: int,
    reporter: Reporter,
    among: Sequence[str] | None = None,
) -> RoundingErrors:
    """Returns the errors of every group that can be at the anchor: in the base, and at all of ``qtypes`` it can be.

    Every (tensor, type) is a task of its own, since one sample is too small for more than one thread. Types that
    need an importance matrix quantize ten times as slowly and come last. ``among`` are the groups to look at,
    all where nobody says.
    """
    wanted_names = layout.groups if among is None else among
    names = [name for name in wanted_names if layout.legal(name, anchor)]
    # Every task multiplies a little; BLAS would start as many threads again for each of them, and all would wait.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(max_workers=threads) as pool:
        read = _samples(pool, engine, source, matrix, layout, names, method)
        ladders = {name: _possible(read[name], layout.ladder(name, qtypes)) for name in names}
        wanted = [(name, qtype) for name in names for qtype in dict.fromkeys((None, anchor, *ladders[name]))]
        wanted.sort(key=lambda pair: pair[1] is not None and needs_imatrix(parse_type(pair[1])))
        begun = {pair: _begin(pool, read[pair[0]], pair[1], layout.base) for pair in wanted}
        found: dict[tuple[str, str | None], float] = {}
        with reporter.task("rounding errors of every type", len(begun)) as tick:
            for pair, futures in begun.items():
                found[pair] = sum(future.result() for future in futures)
                tick()
    return RoundingErrors(
        anchor=anchor,
        at_anchor={name: found[name, anchor] for name in names},
        at_base={name: found[name, None] for name in names},
        of={name: {qtype: found[name, qtype] for qtype in ladders[name]} for name in names},
    )


@dataclass(frozen=True, kw_only=True)
class RoundingTask:
    """Work out the rounding errors of one group, in a worker; every number is what the others' way gives."""

    name: str
    qtypes: tuple[str, ...]
    anchor: str
    method: Method

    @property
    def lane(self) -> Lane:
        """The processor alone is busy."""
        return HOST

    def run(self, room: Room) -> RoundingErrors:
        """Returns the group's errors, in the form of those of all groups."""
        assert isinstance(room, WorkRoom)
        recipe = room.recipe
        return rounding_errors(
            recipe.engine,
            recipe.source,
            recipe.matrix,
            recipe.layout,
            self.qtypes,
            self.anchor,
            self.method,
            recipe.threads,
            Silent(),
            among=[self.name],
        )


def _by_crew(workspace: Workspace, goal: Budget, method: Method) -> RoundingErrors:
    """Has the workers work out the errors, a group at a time."""
    assert workspace.crew is not None
    names = list(workspace.layout.groups)
    errands = [
        Errand(
            about=f"rounding errors of {name}",
            task=RoundingTask(name=name, qtypes=goal.offered, anchor=goal.anchor, method=method),
        )
        for name in names
    ]
    parts: dict[str, RoundingErrors] = {}
    with workspace.reporter.task("rounding errors of every group", len(errands)) as tick:
        for number, found in workspace.crew.run(errands):
            assert isinstance(found, RoundingErrors)
            parts[names[number]] = found
            tick()
    in_order = [parts[name] for name in names]
    return RoundingErrors(
        anchor=goal.anchor,
        at_anchor={name: error for part in in_order for name, error in part.at_anchor.items()},
        at_base={name: error for part in in_order for name, error in part.at_base.items()},
        of={name: errors for part in in_order for name, errors in part.of.items()},
    )


def _samples(
    pool: ThreadPoolExecutor,
    engine: Encoder,
    source: Source,
    matrix: ImportanceMatrix | None,
    layout: Layout,
    names: Sequence[str],
    method: Method,
) -> dict[str, list[Sample]]:
    """Reads some rows of every tensor of every group, on all threads of the pool."""
    begun: dict[str, list[Future[Sample]]] = {}
    for name in names:
        usual = _usual_importance(matrix, name, layout)
        tensors = layout.groups[name].tensors
        begun[name] = [
            pool.submit(Sample, engine, source, matrix, tensor, method, usual) for tensor in tensors
        ]
    return {name: [future.result() for future in futures] for name, futures in begun.items()}


def _possible(samples: Sequence[Sample], qtypes: Sequence[str]) -> list[str]:
    """Returns those types that all tensors of a group can take with the matrix that there is."""
    return [qtype for qtype in qtypes if all(sample.takes(parse_type(qtype)) for sample in samples)]


def _begin(
    pool: ThreadPoolExecutor, samples: Sequence[Sample], qtype: str | None, base: Base
) -> list[Future[float]]:
    """Begins to work out the error of every tensor of a group at a type, or in the base."""
    if qtype is None:
        return [pool.submit(sample.base_error, base) for sample in samples]
    return [pool.submit(sample.error, parse_type(qtype)) for sample in samples]


def _usual_importance(matrix: ImportanceMatrix | None, name: str, layout: Layout) -> float:
    """Returns the mean importance in a group's role, for those of its tensors that have no entry of their own."""
    role = layout.groups[name].role
    tensors = [t for group in layout.groups.values() if group.role == role for t in group.tensors]
    known = [entry for t in tensors if matrix and (entry := matrix.importance(t)) is not None]
    return float(np.mean([entry.mean() for entry in known])) if known else 1.0


class Sample:
    """Some rows of one tensor, as many of each expert, in full precision with their importance.

    They are spread evenly over the rows; ``fallback`` weighs all columns of a tensor that the matrix lacks. Where
    the encoder feeds errors back, an error is that of the tensor's output: columns that make up for each other
    would otherwise count as if they did harm.

    IQ types, which quantize ten times as slowly, get every eighth row of these. Their error there is scaled by what
    Q3_K has on all rows over what it has on those: a ratio estimate (Cochran 1977, chapter 6), since rows that one
    type rounds badly are rounded badly by all.
    """

    def __init__(
        self,
        engine: Encoder,
        source: Source,
        matrix: ImportanceMatrix | None,
        name: str,
        method: Method,
        fallback: float = 1.0,
    ) -> None:
        tensor = source.tensors[name]
        self.name = name
        self._engine = engine
        self._moments = moments_of(engine)
        self._fallback = fallback
        self._type = tensor.type
        self._columns = tensor.shape[0]
        self._experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
        self._per_expert = tensor.n_elements // self._columns // self._experts
        least = max(method.sample_rows, math.ceil(method.sample_elements / self._columns))
        wanted = math.ceil(least / self._experts)
        spread = np.linspace(0, self._per_expert - 1, min(wanted, self._per_expert))
        self._rows = np.unique(spread.astype(int))
        self._raw = self._sampled(source)
        self._importance = matrix.importance(name) if matrix else None
        self._exact = engine.to_float(self._raw, self._type, self._columns)
        self._scale_of_few: float | None = None

    def _sampled(self, file: Source) -> NDArray[np.uint8]:
        """Returns the bytes of the chosen rows in the source, or in another file with the same tensors."""
        rows = file.read(self.name).reshape(self._experts, self._per_expert, -1)[:, self._rows]
        return np.ascontiguousarray(rows).ravel()

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self._columns, len(self._rows), self._experts)

    def takes(self, type_: GGMLQuantizationType) -> bool:
        """Says whether the rows can be of this type, and the matrix has what it needs."""
        return fits(type_, self._shape) and not (needs_imatrix(type_) and self._importance is None)

    def base_error(self, base: Base) -> float:
        """Returns the error of the base: that of its own bytes where it was given as a file."""
        type_ = base.types[self.name]
        if base.file is None:
            return self.error(type_)
        return self._weighted(self._engine.to_float(self._sampled(base.file), type_, self._columns))

    def error(self, type_: GGMLQuantizationType) -> float:
        """Returns the error of the whole tensor at a type, as these rows have it."""
        if not is_quantized(type_) or type_ == self._type:
            return 0.0
        if type_.name in FINE_LADDER and len(self._rows) >= 2 * _EVERY and self.takes(_COMPARED):
            return self._error(type_, _EVERY) * self._scaling()
        return self._error(type_, 1)

    def _scaling(self) -> float:
        """Returns what the sample's error is of that of its few rows, at the type they are compared by."""
        if self._scale_of_few is None:
            few = self._error(_COMPARED, _EVERY)
            self._scale_of_few = self._error(_COMPARED, 1) / few if few > 0 else 1.0
        return self._scale_of_few

    def _error(self, type_: GGMLQuantizationType, every: int) -> float:
        """Returns the tensor's error as every so manieth row of the sample has it."""
        columns, n_rows, experts = self._shape
        raw = self._raw.reshape(experts, n_rows, -1)[:, ::every]
        job = QuantizeJob(
            name=self.name,
            raw=np.ascontiguousarray(raw).ravel(),
            shape=(columns, raw.shape[1], experts),
            from_type=self._type,
            to_type=type_,
            importance=self._importance,
        )
        return self._weighted(self._engine.round_trip(job), every)

    def _weighted(self, rounded: NDArray[np.float32], every: int = 1) -> float:
        columns, n_sampled, experts = self._shape
        exact = self._exact.reshape(experts, n_sampled, columns)[:, ::every]
        n_rows = int(exact.shape[1])
        errors = exact - rounded.reshape(exact.shape)
        squares = np.square(errors).sum(axis=1)
        weights = self._fallback if self._importance is None else self._importance.reshape(experts, columns)
        weighted = squares * weights
        total = 0.0
        for expert, rows in enumerate(errors):
            spans = self._moments.of(self.name, expert) if self._moments else ()
            if spans:
                weighted[expert] = 0.0
                total += sum(span.squared(rows) for span in spans)
        return (float(weighted.sum(dtype=np.float64)) + total) * self._per_expert / n_rows
