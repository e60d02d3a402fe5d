"""Products of activations, read out of llama.cpp while it decodes: what feeding errors back needs to know.

Where the importance matrix keeps the mean square of every input column (activations.py), this keeps the
means of products of columns that lie within one span. Weights that read the same activation (q, k and v; gate
and up) are found in the graph itself, whatever the model calls them, and share one sum. On a GPU it is summed
there, but for experts that have sums of their own, and read when all chunks are through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from cerebellum.engine.protocols import ColumnProducts, Floats, Tokens, Watch
from cerebellum.errors import BadInput
from cerebellum.llama.activations import (
    MIN_ROWS,
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
from cerebellum.llama.graphs import F32, Graph, Sums, Workbench
from cerebellum.llama.library import GgmlTensor, Pointer
from cerebellum.llama.model import ContextShape


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
        watch(collector, model, shape, chunks, tick)
        return collector.products()
    finally:
        collector.close()


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
        if readers and not on_host(activation) and is_packed(activation):
            self._device.add(name, int(node.src[1]), watch.span, readers)
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
            if not (np.isfinite(sums.spans).all() and np.isfinite(sums.rest).all()):
                raise BadInput(f"{name}: activations are not finite; the model or the text is broken")
        return {name: found[first] for name, first in self._shares.items() if first in found}

    def close(self) -> None:
        """Frees what lies on the GPU."""
        self._device.close()


@dataclass(frozen=True, kw_only=True)
class _Total:
    """Sums of the products within some spans of columns, from column ``start`` on: (span, span, n_spans)."""

    start: int
    sums: Sums

    def grow(self, graph: Graph, rows: int, n_rows: int, columns: int) -> None:
        """Adds the products of rows, a float32 tensor of (columns, n_rows), to the sums when the graph runs."""
        span, _, n_spans = self.sums.shape
        strides = (4 * columns, 4 * span, 4 * self.start)
        view = graph.node("view_3d", rows, span, n_rows, n_spans, *strides)
        packed = graph.node("cont", view)
        self.sums.grow(graph, graph.node("out_prod", packed, packed))


class _DeviceProducts(DeviceTotals):
    """Sums of products: of whole spans, and of what is left, for each first reader.

    The GPU multiplies with ten bits or more of each factor; a mean over thousands of rows hardly feels that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._totals: dict[str, tuple[_Total, ...]] = {}
        self._counts: dict[str, int] = {}
        self._readers: dict[str, int] = {}

    def add(self, name: str, activation: int, span: int, readers: int) -> None:
        """Adds an activation's products, each row as often as it has ``readers``."""
        bench = self.bench(activation)
        struct = GgmlTensor.from_address(activation)
        columns = int(struct.ne[0])
        n_rows = int(np.prod(struct.ne[1:4]))
        if name not in self._totals:
            self._totals[name] = self._zeros(bench, columns, span)
        self._counts[name] = self._counts.get(name, 0) + n_rows * readers
        self._readers[name] = readers
        graph = Graph(bench, f"products, {columns} x {n_rows} by {span}")
        rows = graph.over(activation, (columns, n_rows))
        for total in self._totals[name]:
            total.grow(graph, rows, n_rows, columns)
        graph.run()

    def _zeros(self, bench: Workbench, columns: int, span: int) -> tuple[_Total, ...]:
        n_spans, rest = divmod(columns, span)
        totals = []
        if n_spans:
            totals.append(_Total(start=0, sums=self.sums(bench, (span, span, n_spans))))
        if rest:
            totals.append(_Total(start=n_spans * span, sums=self.sums(bench, (rest, rest, 1))))
        return tuple(totals)

    def read(self) -> dict[str, ColumnProducts]:
        """Returns the sums of every first reader."""
        return {name: self._read(name) for name in self._totals}

    def _read(self, name: str) -> ColumnProducts:
        totals = self._totals[name]
        last = totals[-1]
        readers = self._readers[name]
        columns = last.start + last.sums.shape[0] * last.sums.shape[2]
        sums = ColumnProducts.empty(1, columns, totals[0].sums.shape[0], same_rows=readers > 1)
        for total in totals:
            into = sums.rest if total.start else sums.spans[0]
            into[:] = total.sums.read() * np.float32(readers)
        sums.counts[0] = self._counts[name]
        return sums


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
