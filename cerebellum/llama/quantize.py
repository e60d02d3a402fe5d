"""Tensor bytes to tensor bytes of another type, by ggml's own quantizers, on all cores.

Rows are independent, so cutting a tensor into row blocks gives the bytes that llama-quantize gives.
A block never crosses from one expert's matrix into the next: each expert has its own importance.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType

from cerebellum.engine.pool import begun_in_order
from cerebellum.engine.protocols import Bytes, Floats, QuantizeJob
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.gguf.types import fits, needs_imatrix, row_bytes
from cerebellum.llama.library import decoder, ggml

_BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32 for each thread at a time: within a core's cache


@dataclass(frozen=True)
class _Rows:
    start: int
    stop: int
    expert: int


def quantize(job: QuantizeJob, threads: int) -> Iterator[Bytes]:
    """Begins at once, and yields the converted bytes in order; raises BadInput where it cannot.

    All jobs share one pool of threads, so a job that is begun before the one ahead is read keeps them busy at
    the seams of tensors. The result of a whole tensor may wait in memory.
    """
    if job.from_type == job.to_type:
        return iter([job.raw])
    _check(job)
    return begun_in_order((partial(_convert, job, rows) for rows in _row_blocks(job.shape)), threads)


def _check(job: QuantizeJob) -> None:
    if not fits(job.to_type, job.shape):
        raise BadInput(f"{job.name}: rows of {job.shape[0]} cannot be {job.to_type.name}")
    if job.importance is None:
        if needs_imatrix(job.to_type):
            raise BadInput(
                f"{job.name}: {job.to_type.name} needs an importance matrix and has no entry in it"
            )
        return
    wanted = job.shape[0] * _experts(job.shape)
    if job.importance.size != wanted:
        raise BadInput(
            f"{job.name}: the importance matrix has {job.importance.size} values, the tensor needs {wanted}"
        )


def _experts(shape: tuple[int, ...]) -> int:
    return shape[2] if len(shape) > 2 else 1


def _row_blocks(shape: tuple[int, ...]) -> Iterator[_Rows]:
    per_expert = shape[1] if len(shape) > 1 else 1
    step = max(1, _BLOCK_ELEMENTS // shape[0])
    for expert in range(_experts(shape)):
        first = expert * per_expert
        for start in range(first, first + per_expert, step):
            yield _Rows(start, min(start + step, first + per_expert), expert)


def _convert(job: QuantizeJob, rows: _Rows) -> Bytes:
    n_per_row = job.shape[0]
    n_rows = rows.stop - rows.start
    source_row = row_bytes(job.from_type, n_per_row)
    raw = job.raw[rows.start * source_row : rows.stop * source_row]
    values = to_float(raw, job.from_type, n_per_row)
    if not np.isfinite(values).all():
        raise BadInput(f"{job.name}: the source holds values that are not finite; nothing to quantize")
    out = np.empty(n_rows * row_bytes(job.to_type, n_per_row), np.uint8)
    weights = None
    if job.importance is not None:
        weights = _pointer(job.importance[rows.expert * n_per_row :])
    lib = ggml()
    out_pointer = out.ctypes.data_as(ctypes.c_void_p)
    written = lib.ggml_quantize_chunk(
        int(job.to_type), _pointer(values), out_pointer, 0, n_rows, n_per_row, weights
    )
    if written != out.size or not lib.ggml_validate_row_data(int(job.to_type), out_pointer, out.size):
        raise CerebellumError(f"{job.name}: ggml made invalid {job.to_type.name} data")
    return out


def _pointer(values: Floats) -> ctypes._Pointer[ctypes.c_float]:
    return values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def to_float(raw: Bytes, type_: GGMLQuantizationType, n_per_row: int) -> Floats:
    """Converts rows of any ggml type to float32 by ggml's own code; contiguous, (rows * n_per_row,).

    gguf-py gives the same bits and takes ten to eighty times as long.
    """
    packed = np.ascontiguousarray(raw)
    if type_ == GGMLQuantizationType.F32:
        return packed.view(np.float32)
    n_rows, rest = divmod(packed.size, row_bytes(type_, n_per_row))
    if rest:
        raise ValueError(f"{packed.size} bytes are no whole rows of {n_per_row} at {type_.name}")
    values = np.empty(n_rows * n_per_row, np.float32)
    decoder(int(type_))(packed.ctypes.data, values.ctypes.data, values.size)
    return values


def encoded(job: QuantizeJob) -> Bytes:
    """Returns the bytes that ``quantize`` yields in one piece, worked out on this thread alone.

    For samples of many tensors at many types, where a thread each is worth more than threads inside one.
    """
    _check(job)
    return np.concatenate([_convert(job, rows) for rows in _row_blocks(job.shape)])


def round_trip(job: QuantizeJob) -> Floats:
    """Returns the tensor's values as they come back from ``to_type``, worked out on this thread alone."""
    return to_float(encoded(job), job.to_type, job.shape[0])
