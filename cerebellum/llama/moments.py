"""Products of activations, read out of llama.cpp while it decodes: what feeding errors back needs to know.

Where the importance matrix keeps the mean square of every input column (activations.py), this keeps the
means of products of columns that lie within one span. Weights that read the same activation (q, k and v; gate
and up) are found in the graph itself, whatever the model calls them, and share one sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from cerebellum.engine.protocols import ColumnProducts, Floats, Tokens, Watch
from cerebellum.errors import BadInput
from cerebellum.llama.activations import (
    MIN_ROWS,
    Collector,
    read_f32,
    read_i32,
    source_of,
    watch,
    weight_name,
)
from cerebellum.llama.graphs import F32
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
    watch(collector, model, shape, chunks, tick)
    return collector.products()


class MomentCollector(Collector):
    """Sums products of the watched inputs; ``products`` after the last decode."""

    def __init__(self, watched: Mapping[str, Watch]) -> None:
        super().__init__()
        self._watched = watched
        self._first_reader: dict[tuple[int, int, Watch, int], str] = {}
        self._shares: dict[str, str] = {}
        self._sums: dict[str, ColumnProducts] = {}

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
        values = read_f32(source_of(node, 1))  # (ne3, ne2, ne1, ne0)
        n_experts = int(weight.ne[2])
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
        for name, sums in self._sums.items():
            if not (np.isfinite(sums.spans).all() and np.isfinite(sums.rest).all()):
                raise BadInput(f"{name}: activations are not finite; the model or the text is broken")
        return {name: self._sums[first] for name, first in self._shares.items() if first in self._sums}


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
