"""Tensor bytes to tensor bytes of another type, by ggml's own quantizers, on all cores.

Rows are independent, so cutting a tensor into row blocks gives the bytes that llama-quantize gives.
A block never crosses from one expert's matrix into the next: each expert has its own importance.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants

from cerebellum.engine.protocols import Bytes, Floats, QuantizeJob
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.gguf.types import fits, needs_imatrix, row_bytes
from cerebellum.llama.library import ggml

_BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32 for each thread at a time


@dataclass(frozen=True)
class _Rows:
    start: int
    stop: int
    expert: int


def quantize(job: QuantizeJob, threads: int) -> Iterator[Bytes]:
    """Yields the converted bytes in order, a few MiB at a time; raises BadInput where it cannot."""
    if job.from_type == job.to_type:
        yield job.raw
        return
    _check(job)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        pending: deque[Future[Bytes]] = deque()
        for rows in _row_blocks(job.shape):
            pending.append(pool.submit(_convert, job, rows))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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
    n_per_row, n_rows = job.shape[0], rows.stop - rows.start
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
    """Rows of any ggml type as float32, contiguous, shape (rows * n_per_row,)."""
    if type_ == GGMLQuantizationType.F32:
        return np.ascontiguousarray(raw).view(np.float32)
    if type_ == GGMLQuantizationType.F16:
        return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)
    if type_ == GGMLQuantizationType.BF16:
        return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    rows = np.ascontiguousarray(raw).reshape(-1, row_bytes(type_, n_per_row))
    return np.ascontiguousarray(quants.dequantize(rows, type_), np.float32).reshape(-1)
