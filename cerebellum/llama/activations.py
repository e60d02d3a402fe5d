"""Mean squared activations per input column, read out of llama.cpp while it decodes.

llama.cpp's ``cb_eval`` shows every graph node before (``ask``) and after it is computed. For
MUL_MAT and MUL_MAT_ID the second operand is the activation; the importance of a weight column is
the mean of its squares (llama-imatrix's definition), kept per expert for MUL_MAT_ID.

What several weights read is summed once. On a GPU it is summed there, by a product with ones or with the
routing, and read when all chunks are through; in main memory it is summed where it lies.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.protocols import ColumnSquares, Floats, Tokens
from cerebellum.engine.timings import timed
from cerebellum.errors import BadInput
from cerebellum.llama.graphs import BF16, F32, Graph, Sums, Workbench, device_of
from cerebellum.llama.library import GgmlTensor, Pointer, ggml
from cerebellum.llama.model import Context, ContextShape

MIN_ROWS = 16  # llama-imatrix leaves smaller batches out
_LAST = b"result_norm"  # only the output head comes after it, and that has no importance


class Collector(ABC):
    """A ``cb_eval`` that keeps something of the matrix products it sees; ``error`` is the first that it met.

    Call ``new_graph`` before every decode.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    @abstractmethod
    def new_graph(self) -> None:
        """Forgets which structs were seen: the next graph has its own."""

    def callback(self, address: int, ask: bool) -> bool:
        """Is told of every node, before it is computed and, where it asked for that, after.

        Exceptions, Ctrl-C too, cannot cross C, so the first is kept in ``error``.
        """
        try:
            node = GgmlTensor.from_address(address)
            op = ggml().ggml_op_name(node.op)
            if op not in (b"MUL_MAT", b"MUL_MAT_ID"):
                return self._other(node, ask)
            routed = op == b"MUL_MAT_ID"
            if ask:
                return self._wanted(node, routed=routed)
            self._collect(node, routed=routed)
            return True
        except BaseException as error:
            self.error = self.error or error
            return not ask

    def _other(self, node: GgmlTensor, ask: bool) -> bool:
        """Says whether to stop at any other node, or, after the fact, whether to go on."""
        return not ask

    @abstractmethod
    def _wanted(self, node: GgmlTensor, *, routed: bool) -> bool:
        """Says whether the graph must stop at this product."""

    @abstractmethod
    def _collect(self, node: GgmlTensor, *, routed: bool) -> None:
        """Keeps what it came for, of a product that was just computed."""


def sum_squares(
    model: Pointer, shape: ContextShape, chunks: Iterable[Tokens], tick: Callable[[], None]
) -> Mapping[str, ColumnSquares]:
    """Decodes chunks, several at a time, and sums the squares that every weight meets."""
    collector = ActivationCollector()
    try:
        watch((collector,), model, shape, chunks, tick)
        return collector.sums()
    finally:
        collector.close()


class _Audience:
    """Several collectors that watch one decode: each is shown, after it is computed, what it asked for."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._collectors = collectors
        self._asking: list[Collector] = []

    def callback(self, address: int, ask: bool) -> bool:
        """A ``cb_eval``: llama.cpp computes a node that somebody asked for before it goes on to the next."""
        if ask:
            self._asking = [one for one in self._collectors if one.callback(address, True)]
            return bool(self._asking)
        return all([one.callback(address, False) for one in self._asking])

    def new_graph(self) -> None:
        for one in self._collectors:
            one.new_graph()

    def check(self) -> None:
        """Raises the first error that one of them met."""
        for one in self._collectors:
            if one.error:
                raise one.error


def watch(
    collectors: Sequence[Collector],
    model: Pointer,
    shape: ContextShape,
    chunks: Iterable[Tokens],
    tick: Callable[[], None],
) -> None:
    """Decodes chunks, several at a time, and shows every node to all collectors; raises the first error of one.

    The decode runs on another thread: Ctrl-C reaches Python's main thread only, and raised in there, in a
    callback that C called, it would be lost.
    """
    audience = _Audience(collectors)
    context = Context(model, shape, audience.callback)
    try:
        with ThreadPoolExecutor(max_workers=1) as worker:
            for batch in _batches(chunks, shape.sequences):
                with timed("importance matrix"):
                    audience.new_graph()
                    # An output at every token: without, the last layer drops rows that no logit needs.
                    worker.submit(context.decode, batch, 0).result()
                audience.check()
                for _ in batch:
                    tick()
    finally:
        context.close()


def _batches(chunks: Iterable[Tokens], size: int) -> Iterator[list[Tokens]]:
    waiting = iter(chunks)
    while batch := list(islice(waiting, size)):
        yield batch


@dataclass(frozen=True)
class _Read:
    """What is summed: the activation's struct, the routing's (0 where there is none), and for how many
    matrices; weights that agree in all three share their sums."""

    activation: int
    routing: int
    matrices: int


class ActivationCollector(Collector):
    """Sums squares; ``sums`` after the last decode."""

    def __init__(self) -> None:
        super().__init__()
        self._first_reader: dict[_Read, str] = {}
        self._shares: dict[str, str] = {}
        self._host: dict[str, ColumnSquares] = {}
        self._device = _DeviceSums()

    def new_graph(self) -> None:
        """Forgets which structs were seen: the next graph has its own."""
        self._first_reader.clear()

    def _other(self, node: GgmlTensor, ask: bool) -> bool:
        """Ends the graph at the last norm: what follows is not worth its time."""
        return bool(node.name == _LAST) if ask else node.name != _LAST

    def _wanted(self, node: GgmlTensor, *, routed: bool) -> bool:
        """Whether the graph must stop at this product: it is the first to read its activation."""
        name = weight_name(source_of(node, 0))
        activation = source_of(node, 1)
        enough = routed or activation.ne[1] >= MIN_ROWS
        if not (name.startswith("blk.") and enough and activation.type == F32):
            return False
        first = self._first_reader.setdefault(_read_of(node, routed), name)
        if self._shares.setdefault(name, first) != first:
            raise BadInput(f"{name}: read with other weights than in the first chunk; sum it with none")
        return first == name

    def _collect(self, node: GgmlTensor, *, routed: bool) -> None:
        weight = source_of(node, 0)
        activation = source_of(node, 1)
        name = weight_name(weight)
        matrices = int(weight.ne[2])
        ids_TK = read_i32(source_of(node, 2)) if routed else None
        if not on_host(activation) and (routed or matrices == 1) and is_packed(activation):
            self._device.add(name, node.src[1], ids_TK, matrices)
            return
        values = read_f32(activation)  # (ne3, ne2, ne1, ne0)
        found = _dense_sums(values, matrices) if ids_TK is None else _routed_sums(values[0], ids_TK, matrices)
        entry = self._host.get(name)
        if entry is None:
            self._host[name] = found
        else:
            entry.squares += found.squares
            entry.counts += found.counts

    def sums(self) -> dict[str, ColumnSquares]:
        """What every weight met; BadInput where that is not finite."""
        found = self._host | self._device.read()
        for name, entry in found.items():
            if not np.isfinite(entry.squares).all():
                raise BadInput(f"{name}: activations are not finite; the model or the text is broken")
        return {name: found[first] for name, first in self._shares.items() if first in found}

    def close(self) -> None:
        self._device.close()


class DeviceTotals:
    """Sums that stay on the GPU that the first activation lies on, until all chunks are through."""

    def __init__(self) -> None:
        self._bench: Workbench | None = None
        self._kept: list[Sums] = []

    def bench(self, activation: int) -> Workbench:
        """Returns what runs graphs where the activations are."""
        if self._bench is None:
            self._bench = Workbench(device_of(buffer_of(GgmlTensor.from_address(activation))))
        return self._bench

    def sums(self, bench: Workbench, shape: Sequence[int]) -> Sums:
        """Returns sums of nothing yet; MemoryError where the GPU has no room for them."""
        self._kept.append(Sums(bench, shape))
        return self._kept[-1]

    def close(self) -> None:
        """Frees what lies on the GPU."""
        for sums in self._kept:
            sums.close()
        self._kept.clear()
        if self._bench is not None:
            self._bench.close()
            self._bench = None


class _DeviceSums(DeviceTotals):
    """Sums of squares: one (columns, matrices) tensor for each first reader."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, Sums] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def add(self, name: str, activation: int, ids_TK: NDArray[np.int32] | None, matrices: int) -> None:
        """Adds an activation's squares, (columns, rows), times the routing, (matrices, rows)."""
        bench = self.bench(activation)
        struct = GgmlTensor.from_address(activation)
        columns = int(struct.ne[0])
        per_token = int(struct.ne[1])
        n_rows = int(np.prod(struct.ne[1:4]))
        if ids_TK is None:
            routing_RE = np.ones((n_rows, 1), np.float32)
            counts = np.array([n_rows])
        else:
            routing_RE, counts = _routing(ids_TK, matrices, per_token)
        if name not in self._sums:
            self._sums[name] = self.sums(bench, (columns, matrices))
        self._counts[name] = self._counts.get(name, 0) + counts.astype(np.int64)
        graph = Graph(bench, f"{columns} x {n_rows} x {matrices}")
        routing = graph.given(routing_RE)
        squares = graph.node("sqr", graph.over(activation, (columns, n_rows)))
        # Products of float32 may keep ten bits of a factor: squares go in as two parts that have fewer.
        high = graph.node("cast", graph.node("cast", squares, BF16), F32)
        low = graph.node("sub", squares, high)
        both = graph.node("add", graph.node("out_prod", high, routing), graph.node("out_prod", low, routing))
        self._sums[name].grow(graph, both)
        graph.run()

    def read(self) -> dict[str, ColumnSquares]:
        """Returns the sums of every first reader."""
        return {
            name: ColumnSquares(squares=sums.read().astype(np.float64), counts=self._counts[name])
            for name, sums in self._sums.items()
        }


def _routing(
    ids_TK: NDArray[np.int32], n_experts: int, per_token: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(which row goes to which expert, (rows, experts) of 0 and 1; rows of each expert).

    With one row a token, all of the token's experts read it; else each expert has a row of its own.
    """
    n_tokens, used = ids_TK.shape
    experts = ids_TK.ravel()
    rows = np.arange(n_tokens * used) if per_token > 1 else np.repeat(np.arange(n_tokens), used)
    routing_RE = np.zeros((int(rows[-1]) + 1, n_experts), np.float32)
    routing_RE[rows, experts] = 1
    return routing_RE, np.bincount(experts, minlength=n_experts)


def _routed_sums(values_TKC: Floats, ids_TK: NDArray[np.int32], n_experts: int) -> ColumnSquares:
    """Per-expert column sums; the middle axis is 1 when every expert of a token sees the same row.

    Rows are sorted by expert and summed in runs. A matrix product would do, but BLAS threads spin
    against llama.cpp's own and slow the decode five times on two cores.
    """
    n_tokens, used = ids_TK.shape
    columns = values_TKC.shape[-1]
    squares = np.square(values_TKC)
    rows = np.broadcast_to(squares, (n_tokens, used, columns)).reshape(-1, columns)
    experts = ids_TK.ravel()
    order = np.argsort(experts, kind="stable")
    counts = np.bincount(experts, minlength=n_experts).astype(np.int64)
    seen = np.flatnonzero(counts)
    starts = np.cumsum(counts)[seen] - counts[seen]
    sums = np.zeros((n_experts, columns))
    sums[seen] = np.add.reduceat(rows[order], starts, axis=0)
    return ColumnSquares(squares=sums, counts=counts)


def _dense_sums(values: Floats, n_matrices: int) -> ColumnSquares:
    """Column sums of an ordinary product; 3-D weights keep a row of sums for each matrix."""
    columns = values.shape[-1]
    per_slice = np.einsum("abrc,abrc->abc", values, values).reshape(-1, columns)
    sums = np.zeros((n_matrices, columns))
    np.add.at(sums, np.arange(len(per_slice)) % n_matrices, per_slice)
    rows = values.size // columns // n_matrices
    return ColumnSquares(squares=sums, counts=np.full(n_matrices, rows, np.int64))


def _read_of(node: GgmlTensor, routed: bool) -> _Read:
    routing = int(node.src[2]) if routed else 0
    return _Read(int(node.src[1]), routing, int(source_of(node, 0).ne[2]))


def source_of(node: GgmlTensor, index: int) -> GgmlTensor:
    return GgmlTensor.from_address(node.src[index])


def weight_name(tensor: GgmlTensor) -> str:
    """``CUDA0#blk.0.attn_k.weight#0`` -> ``blk.0.attn_k.weight``: copies carry their device's name."""
    parts: list[str] = tensor.name.decode().split("#")
    return parts[1] if len(parts) > 1 else parts[0]


def buffer_of(tensor: GgmlTensor) -> int:
    """A view has no buffer of its own."""
    while not tensor.buffer and tensor.view_src:
        tensor = GgmlTensor.from_address(tensor.view_src)
    return int(tensor.buffer)


def on_host(tensor: GgmlTensor) -> bool:
    buffer_type = ggml().ggml_backend_buffer_get_type(buffer_of(tensor))
    return bool(ggml().ggml_backend_buft_is_host(buffer_type))


def is_packed(tensor: GgmlTensor) -> bool:
    expected = 4
    for n, stride in zip(tensor.ne, tensor.nb, strict=True):
        if stride != expected:
            return False
        expected *= n
    return True


def read_f32(tensor: GgmlTensor) -> Floats:
    return _read(tensor, np.dtype(np.float32), 4).view(np.float32)


def read_i32(tensor: GgmlTensor) -> NDArray[np.int32]:
    return _read(tensor, np.dtype(np.int32), 2).view(np.int32)


def _read(tensor: GgmlTensor, dtype: np.dtype[np.generic], dims: int) -> NDArray[np.generic]:
    """A tensor's elements as (ne[dims-1], ..., ne[0]), strides honoured: in main memory where it lies, good
    while the callback runs, from elsewhere a copy."""
    shape = tuple(int(n) for n in tensor.ne[:dims])
    strides = tuple(int(n) for n in tensor.nb[:dims])
    extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + dtype.itemsize
    if on_host(tensor):
        buffer = np.ctypeslib.as_array((ctypes.c_uint8 * extent).from_address(tensor.data))
    else:
        buffer = np.empty(extent, np.uint8)
        address = ctypes.addressof(tensor)
        ggml().ggml_backend_tensor_get(address, buffer.ctypes.data_as(ctypes.c_void_p), 0, extent)
    return np.ndarray(shape[::-1], dtype, buffer, strides=strides[::-1])
