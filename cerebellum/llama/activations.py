"""Mean squared activations per input column, read out of llama.cpp while it decodes.

llama.cpp's ``cb_eval`` shows every graph node before (``ask``) and after it is computed. For
MUL_MAT and MUL_MAT_ID the second operand is the activation; the importance of a weight column is
the mean of its squares (llama-imatrix's definition), kept per expert for MUL_MAT_ID.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.protocols import ColumnSquares
from cerebellum.errors import BadInput
from cerebellum.llama.library import GgmlTensor, ggml

_F32 = 0
_MIN_ROWS = 16  # llama-imatrix leaves smaller batches out

Floats = NDArray[np.float32]


@dataclass
class ActivationCollector:
    """Pass ``.callback`` to ``LlamaEngine.open``; read ``.sums`` after decoding."""

    sums: dict[str, ColumnSquares] = field(default_factory=dict)
    error: BaseException | None = None

    def callback(self, address: int, ask: bool) -> bool:
        """cb_eval. Exceptions, Ctrl-C too, cannot cross C, so the first is kept in ``error``."""
        try:
            node = GgmlTensor.from_address(address)
            op = ggml().ggml_op_name(node.op)
            if op not in (b"MUL_MAT", b"MUL_MAT_ID"):
                return not ask  # after the fact, True means: go on
            weight, activation = _source(node, 0), _source(node, 1)
            name = _weight_name(weight)
            if not ask:
                self._collect(name, node, weight, activation, routed=op == b"MUL_MAT_ID")
                return True
            enough = op == b"MUL_MAT_ID" or activation.ne[1] >= _MIN_ROWS
            return name.startswith("blk.") and enough and activation.type == _F32
        except BaseException as error:
            self.error = self.error or error
            return not ask

    def _collect(
        self, name: str, node: GgmlTensor, weight: GgmlTensor, activation: GgmlTensor, *, routed: bool
    ) -> None:
        values = _read_f32(activation)  # (ne3, ne2, ne1, ne0)
        n_experts = int(weight.ne[2])
        if routed:
            ids_TK = _read_i32(_source(node, 2))
            squares, counts = _routed_sums(values[0], ids_TK, n_experts)
        else:
            squares, counts = _dense_sums(values, n_experts)
        if not np.isfinite(squares).all():
            raise BadInput(f"{name}: activations are not finite; the model or the text is broken")
        entry = self.sums.get(name)
        if entry is None:
            self.sums[name] = ColumnSquares(squares, counts)
        else:
            entry.squares += squares
            entry.counts += counts


def _routed_sums(
    values_TKC: Floats, ids_TK: NDArray[np.int32], n_experts: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per-expert column sums; the middle axis is 1 when every expert of a token sees the same row.

    Rows are sorted by expert and summed in runs. A matrix product would do, but BLAS threads spin
    against llama.cpp's own and slow the decode five times on two cores.
    """
    n_tokens, used = ids_TK.shape
    columns = values_TKC.shape[-1]
    rows = np.broadcast_to(values_TKC, (n_tokens, used, columns)).reshape(-1, columns)
    experts = ids_TK.ravel()
    order = np.argsort(experts, kind="stable")
    counts = np.bincount(experts, minlength=n_experts).astype(np.int64)
    sums = np.zeros((n_experts, columns))
    stop = np.cumsum(counts)
    for expert in np.flatnonzero(counts):
        chosen = rows[order[stop[expert] - counts[expert] : stop[expert]]]
        sums[expert] = np.square(chosen).sum(axis=0)
    return sums, counts


def _dense_sums(values: Floats, n_matrices: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Column sums of an ordinary product; 3-D weights keep a row of sums for each matrix."""
    columns = values.shape[-1]
    squares = np.square(values, dtype=np.float32)
    per_slice = squares.sum(axis=2).reshape(-1, columns)
    sums = np.zeros((n_matrices, columns))
    np.add.at(sums, np.arange(len(per_slice)) % n_matrices, per_slice)
    rows = squares.size // columns // n_matrices
    return sums, np.full(n_matrices, rows, np.int64)


def _source(node: GgmlTensor, index: int) -> GgmlTensor:
    return GgmlTensor.from_address(node.src[index])


def _weight_name(tensor: GgmlTensor) -> str:
    """``CUDA0#blk.0.attn_k.weight#0`` -> ``blk.0.attn_k.weight``: copies carry their device's name."""
    parts: list[str] = tensor.name.decode().split("#")
    return parts[1] if len(parts) > 1 else parts[0]


def _read_f32(tensor: GgmlTensor) -> Floats:
    return _read(tensor, np.dtype(np.float32), 4).view(np.float32)


def _read_i32(tensor: GgmlTensor) -> NDArray[np.int32]:
    return _read(tensor, np.dtype(np.int32), 2).view(np.int32)


def _read(tensor: GgmlTensor, dtype: np.dtype[np.generic], dims: int) -> NDArray[np.generic]:
    """A tensor's elements as (ne[dims-1], ..., ne[0]), from any device, strides honoured."""
    shape = tuple(int(n) for n in tensor.ne[:dims])
    strides = tuple(int(n) for n in tensor.nb[:dims])
    extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + dtype.itemsize
    buffer = np.empty(extent, np.uint8)
    ggml().ggml_backend_tensor_get(
        ctypes.addressof(tensor), buffer.ctypes.data_as(ctypes.c_void_p), 0, extent
    )
    return np.ndarray(shape[::-1], dtype, buffer, strides=strides[::-1])
