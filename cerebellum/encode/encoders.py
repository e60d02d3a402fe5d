"""Who rounds weights: llama.cpp's encoders as they are, or ours, which feed errors back where they can.

An `Encoder` makes the bytes of shards and says in `build` what they depend on; an engine is one by itself. Ours
stands in front of an engine's: it makes the types that it knows (`encode.SUPPORTED`), feeds errors back in IQ types
that the engine made, and leaves the others (legacy types, floats) to the engine. Rows never depend on their
neighbours, so that some of them can be made again alone and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from gguf import GGMLQuantizationType

from cerebellum import encode
from cerebellum.encode.moments import Moments, Span, Watched, watch
from cerebellum.engine.pool import begun_in_order
from cerebellum.engine.protocols import Bytes, Floats, QuantizeJob
from cerebellum.errors import BadInput
from cerebellum.gguf import TensorMeta, fits, needs_imatrix, row_bytes
from cerebellum.progress import Reporter
from cerebellum.settings import OURS, EncoderName

_T = GGMLQuantizationType

FED_BACK = frozenset({_T.Q2_K, _T.Q3_K, _T.Q4_K, _T.Q5_K}) | (encode.RECODABLE - encode.SUPPORTED)
"""Types that errors are fed back in; at finer ones there is next to nothing to win (docs/LOG.md)."""

_TASK_ELEMENTS = 1 << 22  # at most: 16 MiB of float32, and moments are scaled once for so many weights


class Encoder(Protocol):
    """Makes the bytes of a tensor at another type, and reads them back. Every engine is one."""

    @property
    def build(self) -> str:
        """Names everything that can change a byte."""
        ...

    def quantize(self, job: QuantizeJob, threads: int) -> Iterator[Bytes]:
        """Yields a tensor's bytes at its new type in order; BadInput where its rows cannot take it."""
        ...

    def to_float(self, raw: Bytes, type_: GGMLQuantizationType, n_per_row: int) -> Floats:
        """Returns rows of any type as float32, contiguous, (rows * n_per_row,)."""
        ...

    def encoded(self, job: QuantizeJob) -> Bytes:
        """Returns what ``quantize`` yields in one piece, worked out on the caller's thread alone."""
        ...

    def round_trip(self, job: QuantizeJob) -> Floats:
        """Returns a tensor as it reads back at its new type, (rows * n_per_row,) float32, on the caller's thread."""
        ...


@dataclass(frozen=True, kw_only=True)
class OurEncoder:
    """Our encoder in front of an engine's; ``moments`` feed errors back in the types of FED_BACK.

    Without moments of its input a tensor's blocks are scaled back up instead (`encode.Unshrink`), since
    least squares shrink weights; fed back codes need that no more.
    """

    engine: Encoder
    moments: Moments | None

    @property
    def build(self) -> str:
        """Names the engine, our version and the moments: everything that bytes depend on but the weights."""
        fed = f"moments {self.moments.sha256}" if self.moments else "no moments"
        return f"{self.engine.build}; encoder {encode.ENCODER_VERSION}, {fed}"

    def quantize(self, job: QuantizeJob, threads: int) -> Iterator[Bytes]:
        """Begins at once, some rows a thread, and yields the bytes in order, one expert after the other."""
        if not self._makes(job):
            return self.engine.quantize(job, threads)
        _check(job)
        return begun_in_order(self._tasks(job, threads), threads)

    def _makes(self, job: QuantizeJob) -> bool:
        """Says whether the engine's bytes are not the whole story: a type of ours, or moments that change codes."""
        if job.from_type == job.to_type:
            return False
        if job.to_type in encode.SUPPORTED:
            return True
        experts = (*job.shape, 1, 1)[2]
        return any(self._spans(job, expert) for expert in range(experts))

    def _tasks(self, job: QuantizeJob, threads: int) -> Iterator[Callable[[], Bytes]]:
        columns, per_expert, experts = (*job.shape, 1, 1)[:3]
        step = encode.rows_together(per_expert * experts, columns, threads, _TASK_ELEMENTS)
        for expert in range(experts):
            importance = _part(job.importance, expert, columns)
            spans = self._spans(job, expert)
            last = (expert + 1) * per_expert
            for start in range(expert * per_expert, last, step):
                yield partial(self._rounded, job, slice(start, min(start + step, last)), importance, spans)

    def _rounded(
        self, job: QuantizeJob, rows: slice, importance: Floats | None, spans: tuple[Span, ...]
    ) -> Bytes:
        """Returns some rows of one expert at their new type, worked out on the caller's thread."""
        columns = job.shape[0]
        n_bytes = row_bytes(job.from_type, columns)
        raw = job.raw[rows.start * n_bytes : rows.stop * n_bytes]
        values = self.engine.to_float(raw, job.from_type, columns).reshape(-1, columns)
        if job.to_type in encode.SUPPORTED:
            return round_rows(values, job.to_type, importance, spans, threads=1).ravel()
        part = replace(job, raw=raw, shape=(columns, len(values)), importance=importance)
        made = self.engine.encoded(part).reshape(len(values), -1)
        return _fed_back(made, values, job.to_type, spans, threads=1).ravel()

    def _spans(self, job: QuantizeJob, expert: int) -> tuple[Span, ...]:
        if self.moments is None or job.to_type not in FED_BACK:
            return ()
        return self.moments.of(job.name, job.first_expert + expert)

    def to_float(self, raw: Bytes, type_: GGMLQuantizationType, n_per_row: int) -> Floats:
        """Returns rows as float32: our types by our own reader, which gives ggml's values, others by the engine's."""
        if type_ not in encode.SUPPORTED:
            return self.engine.to_float(raw, type_, n_per_row)
        rows = np.ascontiguousarray(raw).reshape(-1, row_bytes(type_, n_per_row))
        return encode.decode(rows, type_).ravel()

    def encoded(self, job: QuantizeJob) -> Bytes:
        """Returns a tensor's bytes at its new type, worked out on the caller's thread."""
        if not self._makes(job):
            return self.engine.encoded(job)
        _check(job)
        return np.concatenate([task() for task in self._tasks(job, threads=1)])

    def round_trip(self, job: QuantizeJob) -> Floats:
        """Returns a tensor as it reads back at its new type."""
        if not self._makes(job):
            return self.engine.round_trip(job)
        return self.to_float(self.encoded(job), job.to_type, job.shape[0])


def choose(name: EncoderName, engine: Encoder, moments: Moments | None, reporter: Reporter) -> Encoder:
    """Returns the encoder that was asked for, or the engine's where this machine cannot have ours, and says so."""
    if name != OURS:
        return engine
    reason = encode.unavailable_because()
    if reason is not None:
        reporter.note(f"weights are rounded by ggml's encoders, since ours cannot be had: {reason}")
        return engine
    return OurEncoder(engine=engine, moments=moments)


def watched_inputs(name: EncoderName, feedback: bool, tensors: Mapping[str, TensorMeta]) -> Watched | None:
    """Returns what second moments are wanted of, or None where no errors are fed back; nothing is decoded for it."""
    if name != OURS or not feedback or encode.unavailable_because() is not None:
        return None
    return watch(tensors)


def moments_of(encoder: Encoder) -> Moments | None:
    """Returns the second moments that an encoder feeds errors back by, or None where it does not."""
    return encoder.moments if isinstance(encoder, OurEncoder) else None


def round_rows(
    rows: Floats,
    kind: GGMLQuantizationType,
    importance: Floats | None,
    spans: tuple[Span, ...],
    threads: int,
) -> Bytes:
    """Returns blocks of rows of one expert, (rows, bytes of a row): errors fed back by ``spans`` where there are any,
    else scaled back up. ``importance`` is (columns,) mean squared activations.
    """
    how = None if spans else encode.Unshrink()
    raw = encode.encode(rows, kind, importance, threads=threads, unshrink=how)
    return _fed_back(raw, rows, kind, spans, threads)


def _fed_back(
    raw: Bytes, rows: Floats, kind: GGMLQuantizationType, spans: tuple[Span, ...], threads: int
) -> Bytes:
    """Changes codes in ``raw``, (rows, bytes of a row), by the moments of ``spans`` and returns it."""
    for span in spans:
        columns = span.columns
        at = slice(row_bytes(kind, columns.start), row_bytes(kind, columns.stop))
        raw[:, at] = encode.feed_back(raw[:, at], rows[:, columns], span.moments, kind, threads=threads)
    return raw


def _part(importance: Floats | None, expert: int, columns: int) -> Floats | None:
    return None if importance is None else importance[expert * columns : (expert + 1) * columns]


def _check(job: QuantizeJob) -> None:
    """Refuses what ggml's own way refuses, in the same words."""
    if not fits(job.to_type, job.shape):
        raise BadInput(f"{job.name}: rows of {job.shape[0]} cannot be {job.to_type.name}")
    if job.importance is None and needs_imatrix(job.to_type):
        raise BadInput(f"{job.name}: {job.to_type.name} needs an importance matrix and has no entry in it")
    wanted = job.shape[0] * (job.shape[2] if len(job.shape) > 2 else 1)
    if job.importance is not None and job.importance.size != wanted:
        raise BadInput(
            f"{job.name}: the importance matrix has {job.importance.size} values, the tensor needs {wanted}"
        )
