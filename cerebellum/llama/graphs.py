"""Tensors in buffers of their own and small graphs over them, on any of llama.cpp's devices.

Addresses are ints: ggml owns what they point to, and each class here frees what it made.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cerebellum.errors import CerebellumError
from cerebellum.llama.library import GgmlInit, GgmlTensor, cpu_device, device_memory, ggml

F32 = 0
I32 = 26
BF16 = 30
_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_MAX_NODES = 64  # of one of our graphs

Values = TypeVar("Values", bound=np.generic)


class Arena:
    """A ggml context of tensor structs without data."""

    def __init__(self, tensors: int, *, graph: bool = False) -> None:
        lib = ggml()
        size = lib.ggml_tensor_overhead() * (tensors + 1) + (lib.ggml_graph_overhead() if graph else 0)
        self.address: int = lib.ggml_init(GgmlInit(size, None, True))
        if not self.address:
            raise CerebellumError("ggml has no memory for tensor headers")

    def tensor(self, type_number: int, shape: Sequence[int]) -> int:
        """A new tensor of ``shape``, row length first; it has no data yet."""
        dims = (ctypes.c_int64 * len(shape))(*shape)
        return int(ggml().ggml_new_tensor(self.address, type_number, len(shape), dims))

    def close(self) -> None:
        ggml().ggml_free(self.address)


class Block:
    """All tensors of an arena in one buffer of a buffer type; ``n_bytes`` is what the buffer takes."""

    def __init__(self, arena: Arena, buffer_type: int, *, weights: bool = False) -> None:
        lib = ggml()
        self._arena = arena
        self._buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(arena.address, buffer_type)
        if not self._buffer:
            arena.close()
            raise MemoryError("no room on the device")
        self.n_bytes = int(lib.ggml_backend_buffer_get_size(self._buffer))
        if weights:
            lib.ggml_backend_buffer_set_usage(self._buffer, _WEIGHTS)

    def close(self) -> None:
        ggml().ggml_backend_buffer_free(self._buffer)
        self._arena.close()

    def clear(self) -> None:
        """Makes all of it zeros, where it lies."""
        ggml().ggml_backend_buffer_clear(self._buffer, 0)


def fill(tensor: int, values: NDArray[np.generic]) -> None:
    """Copies ``values`` into a tensor of just as many bytes."""
    packed = np.ascontiguousarray(values)
    if packed.nbytes != ggml().ggml_nbytes(tensor):
        raise CerebellumError(f"{packed.nbytes} bytes for a tensor of {ggml().ggml_nbytes(tensor)}")
    ggml().ggml_backend_tensor_set(tensor, packed.ctypes.data, 0, packed.nbytes)


def device_of(buffer: int) -> int:
    """The device that a buffer lies on; memory that is mapped or repacked is the CPU's."""
    return device_of_type(ggml().ggml_backend_buffer_get_type(buffer))


def device_of_type(buffer_type: int) -> int:
    """The device that buffers of a kind are of."""
    return int(ggml().ggml_backend_buft_get_device(buffer_type) or cpu_device())


class Workbench:
    """Runs graphs on one device, in scratch memory that is kept from one graph to the next.

    Graphs of different kinds take turns, so each kind has scratch of its own and is never laid out anew.
    """

    def __init__(self, device: int) -> None:
        self.buffer_type: int = ggml().ggml_backend_dev_buffer_type(device)
        self._device = device
        self._backend: int = ggml().ggml_backend_dev_init(device, None)
        if not self._backend:
            raise CerebellumError("llama.cpp cannot start another queue on the device")
        self._scratch: dict[str, int] = {}

    def free_bytes(self) -> int:
        """Returns how much memory of the device nobody has taken; of a CPU ggml says all of it."""
        return device_memory(self._device)[0]

    def scratch(self, kind: str) -> int:
        """The allocator of one kind of graph."""
        if kind not in self._scratch:
            self._scratch[kind] = ggml().ggml_gallocr_new(self.buffer_type)
        return self._scratch[kind]

    def compute(self, graph: int) -> None:
        status = ggml().ggml_backend_graph_compute(self._backend, graph)
        if status != 0:
            raise CerebellumError(f"the device failed on a graph of ours: ggml status {status}")

    def close(self) -> None:
        for allocator in self._scratch.values():
            ggml().ggml_gallocr_free(allocator)
        ggml().ggml_backend_free(self._backend)


class Sums:
    """A float32 tensor of ``shape``, row length first, that stays on a device and that graphs add to; zero at first."""

    def __init__(self, bench: Workbench, shape: Sequence[int]) -> None:
        arena = Arena(1)
        self.shape = tuple(shape)
        self.tensor = arena.tensor(F32, shape)
        self._block = Block(arena, bench.buffer_type)
        self._block.clear()

    def grow(self, graph: Graph, addend: int, part: int | None = None) -> None:
        """Adds a tensor of the same shape when the graph runs, or, to one ``part`` of the last dimension, one of the
        shape of that.
        """
        shape = self.shape if part is None else self.shape[:-1]
        offset = 0 if part is None else 4 * math.prod(shape) * part
        there = graph.over(self.tensor, shape, offset)
        total = graph.node("add", addend, there)
        graph.keep(graph.node("cpy", total, graph.over(self.tensor, shape, offset)))

    def read(self) -> NDArray[np.float32]:
        """Returns the sums, the row length last."""
        values = np.empty(self.shape[::-1], np.float32)
        ggml().ggml_backend_tensor_get(self.tensor, values.ctypes.data, 0, values.nbytes)
        return values

    def close(self) -> None:
        """Frees the tensor."""
        self._block.close()


class Graph:
    """One small graph, built node by node, run once."""

    def __init__(self, bench: Workbench, kind: str) -> None:
        self._bench = bench
        self._kind = kind
        self._arena = Arena(_MAX_NODES, graph=True)
        self._graph: int = ggml().ggml_new_graph(self._arena.address)
        self._inputs: list[tuple[int, NDArray[np.generic]]] = []
        self._outputs: list[tuple[int, NDArray[np.generic]]] = []

    def given(self, values: NDArray[np.generic], shape: Sequence[int] | None = None) -> int:
        """A tensor that holds ``values`` (float32 or int32); ``shape`` has the row length first."""
        number = F32 if values.dtype == np.float32 else I32
        tensor = self._arena.tensor(number, shape or values.shape[::-1])
        ggml().ggml_set_input(tensor)
        self._inputs.append((tensor, np.ascontiguousarray(values)))
        return tensor

    def over(self, other: int, shape: Sequence[int], offset: int = 0) -> int:
        """A float32 leaf over another tensor's bytes from ``offset``; a view would drag its graph in."""
        there = GgmlTensor.from_address(other)
        tensor = self._arena.tensor(F32, shape)
        leaf = GgmlTensor.from_address(tensor)
        leaf.data = there.data + offset
        leaf.buffer = there.buffer
        return tensor

    def node(self, op: str, *operands: int) -> int:
        """The result of ``ggml_<op>`` on tensors (and numbers, where the operation takes any)."""
        return int(getattr(ggml(), f"ggml_{op}")(self._arena.address, *operands))

    def read(self, tensor: int, dtype: type[Values]) -> NDArray[Values]:
        """An array that holds the tensor's elements once ``run`` is over, flat."""
        shape = GgmlTensor.from_address(tensor).ne
        values: NDArray[Values] = np.empty(int(np.prod(shape[:4])), dtype)
        self.keep(tensor)
        self._outputs.append((tensor, values))
        return values

    def keep(self, tensor: int) -> None:
        """Makes the graph work a tensor out, for the sake of what it writes to."""
        ggml().ggml_set_output(tensor)
        ggml().ggml_build_forward_expand(self._graph, tensor)

    def run(self) -> None:
        """Computes everything asked for, fills the arrays that ``read`` gave, and frees the graph."""
        lib = ggml()
        try:
            if not lib.ggml_gallocr_alloc_graph(self._bench.scratch(self._kind), self._graph):
                raise MemoryError("no room on the device for a graph's scratch")
            for tensor, given in self._inputs:
                lib.ggml_backend_tensor_set(tensor, given.ctypes.data, 0, given.nbytes)
            self._bench.compute(self._graph)
            for tensor, wanted in self._outputs:
                lib.ggml_backend_tensor_get(tensor, wanted.ctypes.data, 0, wanted.nbytes)
        finally:
            self._arena.close()
