"""Products of activations, read out of llama.cpp while it decodes: what feeding errors back needs to know.

Where the importance matrix keeps the mean square of every input column (activations.py), this keeps the
means of products of columns that lie within one span. Weights that read the same activation (q, k and v; gate
and up) are found in the graph itself, whatever the model calls them, and share one sum. On a GPU it is summed
there, and read when all chunks are through: of experts with sums of their own, the rows that were sent to one are
gathered and multiplied, one expert after the other. What the GPU has no room for is summed on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.protocols import ColumnProducts, ColumnSquares, Floats, Tokens, Watch
from cerebellum.errors import BadInput
from cerebellum.llama.activations import (
    MIN_ROWS,
    ActivationCollector,
    Collector,
    DeviceTotals,
    is_packed,
    on_host,
    read_f32,
    read_i32,
    source_of,
    watch,
    weight_name,
)
from cerebellum.llama.graphs import F32, Graph, Sums
from cerebellum.llama.library import GgmlTensor, Pointer
from cerebellum.llama.model import ContextShape

_SPARE_BYTES = 1 << 30  # of the GPU's memory, left for gathered rows and for whoever else uses it


def column_products(
    model: Pointer,
    shape: ContextShape,
    chunks: Iterable[Tokens],
    watched: Mapping[str, Watch],
    tick: Callable[[], None],
) -> Mapping[str, ColumnProducts]:
    """Decodes chunks and sums the products of the columns that the watched weights read."""
    collector = MomentCollector(watched)
    try:
        watch((collector,), model, shape, chunks, tick)
        return collector.products()
    finally:
        collector.close()


def squares_and_products(
    model: Pointer,
    shape: ContextShape,
    chunks: Iterable[Tokens],
    watched: Mapping[str, Watch],
    n_watched: int,
    tick: Callable[[], None],
) -> tuple[Mapping[str, ColumnSquares], Mapping[str, ColumnProducts]]:
    """Decodes chunks once, and sums the squares that every weight meets in all of them, products in the first."""
    squares = ActivationCollector()
    products = MomentCollector(watched)
    inputs = list(chunks)
    try:
        watch((squares, products), model, shape, inputs[:n_watched], tick)
        if inputs[n_watched:]:
            watch((squares,), model, shape, inputs[n_watched:], tick)
        return squares.sums(), products.products()
    finally:
        squares.close()
        products.close()


class MomentCollector(Collector):
    """Sums products of the watched inputs; ``products`` after the last decode."""

    def __init__(self, watched: Mapping[str, Watch]) -> None:
        super().__init__()
        self._watched = watched
        self._first_reader: dict[tuple[int, int, Watch, int], str] = {}
        self._shares: dict[str, str] = {}
        self._sums: dict[str, ColumnProducts] = {}
        self._device = _DeviceProducts()

    def new_graph(self) -> None:
        """Forgets which activations were seen, for the next graph may have others at the same addresses."""
        self._first_reader.clear()

    def _wanted(self, node: GgmlTensor, *, routed: bool) -> bool:
        """Says whether the graph must stop at this product: a watched weight is the first to read its input."""
        weight = source_of(node, 0)
        activation = source_of(node, 1)
        name = weight_name(weight)
        enough = routed or activation.ne[1] >= MIN_ROWS
        if name not in self._watched or not enough or activation.type != F32:
            return False
        routing = int(node.src[2]) if routed else 0
        read = (int(node.src[1]), routing, self._watched[name], int(weight.ne[2]))
        return self._shares.setdefault(name, self._first_reader.setdefault(read, name)) == name

    def _collect(self, node: GgmlTensor, *, routed: bool) -> None:
        weight = source_of(node, 0)
        name = weight_name(weight)
        watch = self._watched[name]
        activation = source_of(node, 1)
        n_experts = int(weight.ne[2])
        readers = _readers(node, watch, n_experts, routed=routed)
        if not on_host(activation) and is_packed(activation):
            if readers and self._device.add(name, int(node.src[1]), watch.span, readers):
                return
            if routed and not watch.pooled and self._device.add_routed(name, node, watch.span):
                return
        values = read_f32(activation)  # (ne3, ne2, ne1, ne0)
        sums = self._sums.get(name)
        if sums is None:
            same_rows = routed and values.shape[2] == 1
            kept = 1 if watch.pooled else n_experts
            sums = ColumnProducts.empty(kept, values.shape[-1], watch.span, same_rows=same_rows)
            self._sums[name] = sums
        parts = _routed(node, values[0]) if routed else _dense(values, n_experts)
        for expert, rows in parts:
            sums.add(0 if watch.pooled else expert, rows)

    def products(self) -> dict[str, ColumnProducts]:
        """Returns what every weight met; BadInput where that is not finite."""
        found = self._sums | self._device.read()
        for name, sums in found.items():
            if not (_is_finite(sums.spans) and _is_finite(sums.rest)):
                raise BadInput(f"{name}: activations are not finite; the model or the text is broken")
        return {name: found[first] for name, first in self._shares.items() if first in found}

    def close(self) -> None:
        """Frees what lies on the GPU."""
        self._device.close()


@dataclass(frozen=True, kw_only=True)
class _Total:
    """Sums of the products within some spans of columns, from column ``start`` on: (span, span, n_spans, experts)."""

    start: int
    sums: Sums

    def grow(self, graph: Graph, rows: int, n_rows: int, expert: int) -> None:
        """Adds the products of rows, a float32 tensor of (columns, n_rows), to an expert's sums when the graph runs."""
        span, _, n_spans, _ = self.sums.shape
        columns = int(GgmlTensor.from_address(rows).ne[0])
        strides = (4 * columns, 4 * span, 4 * self.start)
        view = graph.node("view_3d", rows, span, n_rows, n_spans, *strides)
        packed = graph.node("cont", view)
        self.sums.grow(graph, graph.node("out_prod", packed, packed), expert)


@dataclass(kw_only=True)
class _Input:
    """What is summed of one input on the GPU: sums, the rows of each expert, how often a row counts, and whether all
    experts of a token read the same row."""

    totals: tuple[_Total, ...]
    counts: NDArray[np.int64]
    readers: int
    same_rows: bool

    def read(self) -> ColumnProducts:
        """Returns the sums as they are now."""
        last = self.totals[-1]
        span = self.totals[0].sums.shape[0]
        columns = last.start + last.sums.shape[0] * last.sums.shape[2]
        found = ColumnProducts.empty(len(self.counts), columns, span, same_rows=self.same_rows)
        for total in self.totals:
            values = total.sums.read()
            if self.readers > 1:
                values *= np.float32(self.readers)
            if total.start:
                found.rest = values[:, 0]
            else:
                found.spans = values
        found.counts = self.counts
        return found


class _DeviceProducts(DeviceTotals):
    """Sums of products: of whole spans, and of what is left, for each first reader.

    The GPU multiplies with ten bits or more of each factor; a mean over thousands of rows hardly feels that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inputs: dict[str, _Input | None] = {}

    def add(self, name: str, activation: int, span: int, readers: int) -> bool:
        """Adds an activation's products, each row as often as it has ``readers``; False where there is no room."""
        struct = GgmlTensor.from_address(activation)
        found = self._input(name, activation, span, (1, readers), same_rows=readers > 1)
        if found is None:
            return False
        columns = int(struct.ne[0])
        n_rows = int(np.prod(struct.ne[1:4]))
        found.counts[0] += n_rows * readers
        graph = Graph(self.bench(activation), f"products, {columns} x {n_rows} by {span}")
        rows = graph.over(activation, (columns, n_rows))
        for total in found.totals:
            total.grow(graph, rows, n_rows, 0)
        graph.run()
        return True

    def add_routed(self, name: str, node: GgmlTensor, span: int) -> bool:
        """Adds the products of the rows that each expert was sent, to its own sums; False where there is no room."""
        activation = int(node.src[1])
        struct = source_of(node, 1)
        columns, per_token = (int(n) for n in struct.ne[:2])
        n_experts = int(source_of(node, 0).ne[2])
        found = self._input(name, activation, span, (n_experts, 1), same_rows=per_token == 1)
        if found is None:
            return False
        rows_of = _rows_of_experts(read_i32(source_of(node, 2)), per_token)
        # The most rows first, so that scratch memory is laid out for the largest graph and need not grow.
        for expert, rows in sorted(rows_of.items(), key=lambda one: -len(one[1])):
            found.counts[expert] += len(rows)
            graph = Graph(self.bench(activation), f"products of experts, {columns} by {span}")
            all_rows = graph.over(activation, (columns, int(np.prod(struct.ne[1:4]))))
            gathered = graph.node("get_rows", all_rows, graph.given(rows))
            for total in found.totals:
                total.grow(graph, gathered, len(rows), expert)
            graph.run()
        return True

    def _input(
        self, name: str, activation: int, span: int, kept: tuple[int, int], *, same_rows: bool
    ) -> _Input | None:
        """Returns what is summed of an input; None where the GPU had no room for it when it was first seen.

        ``kept`` are the experts with sums of their own, and how often each row counts.
        """
        if name not in self._inputs:
            columns = int(GgmlTensor.from_address(activation).ne[0])
            totals = self._zeros(activation, columns, span, kept[0])
            counts = np.zeros(kept[0], np.int64)
            self._inputs[name] = (
                None
                if totals is None
                else _Input(totals=totals, counts=counts, readers=kept[1], same_rows=same_rows)
            )
        return self._inputs[name]

    def _zeros(self, activation: int, columns: int, span: int, experts: int) -> tuple[_Total, ...] | None:
        n_spans, rest = divmod(columns, span)
        shapes = [(0, (span, span, n_spans, experts))] if n_spans else []
        shapes += [(n_spans * span, (rest, rest, 1, experts))] if rest else []
        bench = self.bench(activation)
        needed = sum(4 * math.prod(shape) for _, shape in shapes)
        if bench.free_bytes() < needed + _SPARE_BYTES:
            return None
        try:
            return tuple(_Total(start=start, sums=self.sums(bench, shape)) for start, shape in shapes)
        except MemoryError:  # what is free may lie in pieces
            return None

    def read(self) -> dict[str, ColumnProducts]:
        """Returns the sums of every first reader that the GPU had room for."""
        return {name: found.read() for name, found in self._inputs.items() if found is not None}


def _rows_of_experts(ids_TK: NDArray[np.int32], per_token: int) -> dict[int, NDArray[np.int32]]:
    """Returns the rows of the activation that each expert reads; with one row a token, all its experts read that."""
    n_tokens, used = ids_TK.shape
    tokens = np.repeat(np.arange(n_tokens), used)
    rows = tokens if per_token == 1 else np.arange(n_tokens * used)
    experts = ids_TK.ravel()
    return {int(e): rows[experts == e].astype(np.int32) for e in np.unique(experts)}


def _is_finite(values: Floats) -> bool:
    """Says so without an array of the answers, since sums may have gigabytes; NaN is the least and the largest."""
    return not values.size or bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def _readers(node: GgmlTensor, watch: Watch, n_experts: int, *, routed: bool) -> int:
    """Returns how many matrices read each row into one sum: 0 where sums are apart for each of several matrices."""
    if not routed:
        return 1 if n_experts == 1 else 0
    one_row = int(source_of(node, 1).ne[1]) == 1
    return int(source_of(node, 2).ne[0]) if watch.pooled and one_row else 0


def _dense(values: Floats, n_matrices: int) -> Iterator[tuple[int, Floats]]:
    """Yields an ordinary product's rows; weights of three dimensions have rows for each of their matrices."""
    for number, rows in enumerate(values.reshape(-1, *values.shape[-2:])):
        yield number % n_matrices, rows


def _routed(node: GgmlTensor, values_TKC: Floats) -> Iterator[tuple[int, Floats]]:
    """Yields every expert with the rows that were sent to it; with one row a token, all its experts get that."""
    ids_TK = read_i32(source_of(node, 2))
    columns = values_TKC.shape[-1]
    rows = np.broadcast_to(values_TKC, (*ids_TK.shape, columns)).reshape(-1, columns)
    experts = ids_TK.ravel()
    for expert in np.unique(experts):
        yield int(expert), rows[experts == expert]
