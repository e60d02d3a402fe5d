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
    buffer_of,
    is_packed,
    on_host,
    read_f32,
    read_i32,
    source_of,
    watch,
    weight_name,
)
from cerebellum.llama.graphs import F32, Arena, Block, Graph, Workbench, device_of, fill
from cerebellum.llama.library import GgmlTensor, Pointer, ggml
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
    """One tensor of sums on the GPU: of ``n_spans`` spans of ``span`` columns, from column ``start`` on."""

    tensor: int
    block: Block
    start: int
    span: int
    n_spans: int

    @classmethod
    def zero(cls, bench: Workbench, start: int, span: int, n_spans: int) -> _Total:
        """Returns sums of nothing yet; MemoryError where the GPU has no room for them."""
        arena = Arena(1)
        tensor = arena.tensor(F32, (span, span, n_spans))
        total = cls(
            tensor=tensor,
            block=Block(arena, bench.buffer_type),
            start=start,
            span=span,
            n_spans=n_spans,
        )
        fill(tensor, np.zeros(span * span * n_spans, np.float32))
        return total

    def grow(self, graph: Graph, rows: int, n_rows: int, columns: int) -> None:
        """Adds the products of rows, a float32 tensor of (columns, n_rows), to the sums when the graph runs."""
        shape = (self.span, n_rows, self.n_spans)
        view = graph.node("view_3d", rows, *shape, 4 * columns, 4 * self.span, 4 * self.start)
        packed = graph.node("cont", view)
        there = graph.over(self.tensor, (self.span, self.span, self.n_spans))
        products = graph.node("out_prod", packed, packed)
        graph.keep(graph.node("cpy", graph.node("add", products, there), self.tensor))

    def read(self) -> Floats:
        """Returns the sums, (n_spans, span, span)."""
        values = np.empty((self.n_spans, self.span, self.span), np.float32)
        ggml().ggml_backend_tensor_get(self.tensor, values.ctypes.data, 0, values.nbytes)
        return values


class _DeviceProducts:
    """Sums of products that stay on the GPU: of whole spans, and of what is left, for each first reader.

    The GPU multiplies with ten bits or more of each factor; a mean over thousands of rows hardly feels that.
    """

    def __init__(self) -> None:
        self._bench: Workbench | None = None
        self._totals: dict[str, tuple[_Total, ...]] = {}
        self._counts: dict[str, int] = {}
        self._readers: dict[str, int] = {}

    def add(self, name: str, activation: int, span: int, readers: int) -> None:
        """Adds an activation's products, each row as often as it has ``readers``."""
        struct = GgmlTensor.from_address(activation)
        columns = int(struct.ne[0])
        n_rows = int(np.prod(struct.ne[1:4]))
        if self._bench is None:
            self._bench = Workbench(device_of(buffer_of(struct)))
        if name not in self._totals:
            self._totals[name] = self._zeros(self._bench, columns, span)
        self._counts[name] = self._counts.get(name, 0) + n_rows * readers
        self._readers[name] = readers
        graph = Graph(self._bench, f"products, {columns} x {n_rows} by {span}")
        rows = graph.over(activation, (columns, n_rows))
        for total in self._totals[name]:
            total.grow(graph, rows, n_rows, columns)
        graph.run()

    @staticmethod
    def _zeros(bench: Workbench, columns: int, span: int) -> tuple[_Total, ...]:
        n_spans = columns // span
        rest = columns % span
        whole = (_Total.zero(bench, 0, span, n_spans),) if n_spans else ()
        return (*whole, _Total.zero(bench, n_spans * span, rest, 1)) if rest else whole

    def read(self) -> dict[str, ColumnProducts]:
        """Returns the sums of every first reader."""
        return {name: self._read(name) for name in self._totals}

    def _read(self, name: str) -> ColumnProducts:
        totals = self._totals[name]
        last = totals[-1]
        readers = self._readers[name]
        columns = last.start + last.span * last.n_spans
        sums = ColumnProducts.empty(1, columns, totals[0].span, same_rows=readers > 1)
        for total in totals:
            into = sums.rest if total.start else sums.spans[0]
            into[:] = total.read() * np.float32(readers)
        sums.counts[0] = self._counts[name]
        return sums

    def close(self) -> None:
        """Frees the sums."""
        for totals in self._totals.values():
            for total in totals:
                total.block.close()
        self._totals.clear()
        if self._bench is not None:
            self._bench.close()
            self._bench = None


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
