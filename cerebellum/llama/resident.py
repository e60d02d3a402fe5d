"""Weights that stay: tensors of an open model replaced in place, without loading it again.

A loaded model is a set of ``ggml_tensor`` structs that say where bytes lie and of which type they are. A
shard's tensors are put into buffers of our own, of the kind that llama.cpp's loader would choose, and the
structs are made to point there. Logits are then bit for bit those of a fresh load, under two conditions:
the new bytes lie where the loader would have put them (kernels for repacked and plain weights round
differently), and llama.cpp makes its graph anew (a captured CUDA graph compares addresses and strides, which
two types can share). Nothing is patched before the structs have been compared with the files' headers.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cerebellum.engine.protocols import CannotSwap
from cerebellum.gguf import GgufFile, TensorInfo, read_gguf
from cerebellum.llama.graphs import F32, I32, Arena, Block, device_of_type, fill
from cerebellum.llama.library import GgmlTensor, Pointer, cpu_device, device_memory, ggml, llama

_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_MAX_SOURCES = 10
_ROWS_OF = b"GET_ROWS"  # what a graph does with embeddings that are no head
_LEAF = 0  # GGML_OP_NONE
_ROWS = 512  # of the made-up activation in llama.cpp's own question whether a buffer type will do
_GPU_RESERVE = 1 << 30  # bytes of a GPU that stay free of staged weights, for scratch


@dataclass(frozen=True, kw_only=True)
class Use:
    """Where a weight is: its struct's address, and the operation that reads it."""

    address: int
    op: bytes


@dataclass(frozen=True, kw_only=True)
class State:
    """What a struct says of its bytes, all that is changed by a swap."""

    type: int
    buffer: int
    nb: tuple[int, ...]
    data: int
    extra: int | None

    @classmethod
    def of(cls, address: int) -> State:
        t = GgmlTensor.from_address(address)
        return cls(type=t.type, buffer=t.buffer, nb=tuple(t.nb), data=t.data, extra=t.extra)

    def put(self, address: int) -> None:
        t = GgmlTensor.from_address(address)
        t.type = self.type
        t.buffer = self.buffer
        t.nb[:] = self.nb
        t.data = self.data
        t.extra = self.extra


class WeightFinder:
    """A ``cb_eval`` that notes every weight which a graph reads. Give it one decoded token."""

    def __init__(self) -> None:
        self.uses: dict[str, list[Use]] = {}
        self.error: BaseException | None = None

    def callback(self, address: int, ask: bool) -> bool:
        try:
            if ask:
                self._note(GgmlTensor.from_address(address))
        except BaseException as error:  # cannot cross C
            self.error = self.error or error
        return not ask

    def _note(self, node: GgmlTensor) -> None:
        for index in range(_MAX_SOURCES):
            if not node.src[index]:
                return
            leaf = int(node.src[index])
            tensor = GgmlTensor.from_address(leaf)
            while tensor.view_src:
                leaf = int(tensor.view_src)
                tensor = GgmlTensor.from_address(leaf)
            if tensor.op != _LEAF or not tensor.buffer:
                continue
            if ggml().ggml_backend_buffer_get_usage(tensor.buffer) != _WEIGHTS:
                continue
            known = self.uses.setdefault(tensor.name.decode(), [])
            if all(use.address != leaf for use in known):
                known.append(Use(address=leaf, op=ggml().ggml_op_name(node.op)))


class Staged:
    """The tensors of one shard on the device, ready to be pointed at."""

    def __init__(self, path: Path, places: Sequence[tuple[int, int, TensorInfo]]) -> None:
        """``places``: (struct's address, buffer type, tensor of the shard), each tensor once or more."""
        self.states: dict[int, State] = {}
        self._blocks: list[Block] = []
        self.n_bytes = 0
        file = read_gguf(path)
        try:
            for buffer_type in dict.fromkeys(place[1] for place in places):
                self._stage(file, buffer_type, [(a, t) for a, b, t in places if b == buffer_type])
        except BaseException:
            self.close()
            raise

    def _stage(self, file: GgufFile, buffer_type: int, wanted: Sequence[tuple[int, TensorInfo]]) -> None:
        arena = Arena(len(wanted))
        made = [arena.tensor(int(tensor.type), _dims(tensor)) for _, tensor in wanted]
        for new, (_, tensor) in zip(made, wanted, strict=True):
            ggml().ggml_set_name(new, tensor.name.encode())
        block = Block(arena, buffer_type, weights=True)
        self._blocks.append(block)
        self.n_bytes += block.n_bytes
        for new, (address, tensor) in zip(made, wanted, strict=True):
            fill(new, file.data(tensor))
            self.states[address] = State.of(new)

    def close(self) -> None:
        for block in self._blocks:
            block.close()
        self._blocks.clear()


class Weights:
    """The weights of one open model: what they were when it was loaded, and what they are now.

    ``anew`` makes llama.cpp build its next graph from nothing. ``room`` is how many bytes staged shards may
    take together, None for what a GPU has left.
    """

    def __init__(
        self,
        model: Pointer,
        paths: Sequence[Path],
        uses: dict[str, list[Use]],
        anew: Callable[[], None],
        room: int | None = None,
        extra: Sequence[int] = (),
    ) -> None:
        """``extra`` are the buffer types for repacked weights that the model was opened with."""
        self._extra = tuple(extra)
        self._uses = uses
        self._anew = anew
        self._room = room
        self._experts_used = _experts_used(model)
        self._home = {use.address: State.of(use.address) for found in uses.values() for use in found}
        self._base = tuple(paths)
        self._applied: dict[int, State] = {}
        self._staged: OrderedDict[Path, Staged] = OrderedDict()
        self._choices: dict[tuple[int, int, bytes, tuple[int, ...]], int | None] = {}
        self._device = self._check(paths)

    def _check(self, paths: Sequence[Path]) -> int:
        """The one device that all swappable weights lie on; CannotSwap unless structs and headers agree.

        Embeddings may lie in main memory beside a GPU: a graph takes rows of them there, and no products.
        """
        if len(paths) < 2:
            raise CannotSwap("the model is one file, not shards")
        homes: set[int] = set()
        for path in paths[1:]:
            for tensor in read_gguf(path).tensors:
                if tensor.name not in self._uses:
                    raise CannotSwap(f"{tensor.name} was not seen in the graph")
                for use in self._uses[tensor.name]:
                    _compare(use.address, tensor)
                    home = _whose_memory(self._home_type(use))
                    if home != cpu_device() or use.op != _ROWS_OF:
                        homes.add(home)
        if len(homes) > 1:
            raise CannotSwap(f"its weights lie on {len(homes)} devices")
        return homes.pop() if homes else cpu_device()

    def swap(self, shards: Sequence[Path]) -> None:
        """The base with these shards in place of its own; none of them is the base itself.

        CannotSwap where they do not fit beside what is there, or have no place on the device. The weights
        are then the base's.
        """
        wanted: dict[int, State] = {}
        keep = set(shards)
        try:
            for path in shards:
                wanted |= self._stage(path, keep).states
        except CannotSwap:
            self._point({})
            raise
        self._point(wanted)

    def _point(self, wanted: dict[int, State]) -> None:
        changed = {a: s for a, s in wanted.items() if self._applied.get(a) != s}
        returned = [address for address in self._applied if address not in wanted]
        for address in returned:
            self._home[address].put(address)
        for address, state in changed.items():
            state.put(address)
        self._applied = dict(wanted)
        if returned or changed:
            self._anew()

    def _stage(self, path: Path, keep: set[Path]) -> Staged:
        """A shard on the device: from earlier, or now, in the room of those unused for longest."""
        if path in self._staged:
            self._staged.move_to_end(path)
            return self._staged[path]
        places = self._places(read_gguf(path))
        there = (tensor for _, kind, tensor in places if _whose_memory(kind) == self._device)
        needed = sum(tensor.n_bytes for tensor in there)
        while not self._fits(needed):
            self._evict(keep, path)
        while True:
            try:
                self._staged[path] = Staged(path, places)
                return self._staged[path]
            except MemoryError:
                self._evict(keep, path)

    def _fits(self, needed: int) -> bool:
        if self._room is not None:
            return sum(staged.n_bytes for staged in self._staged.values()) + needed <= self._room
        return device_memory(self._device)[0] - needed >= _GPU_RESERVE

    def _evict(self, keep: set[Path], wanted: Path) -> None:
        """Frees the shard that was not used for longest; one that a struct points at goes home first."""
        oldest = next((path for path in self._staged if path not in keep), None)
        if oldest is None:
            raise CannotSwap(f"{wanted.name} does not fit beside the model")
        self._point({a: s for a, s in self._applied.items() if a not in self._staged[oldest].states})
        self._staged.pop(oldest).close()

    def _places(self, file: GgufFile) -> list[tuple[int, int, TensorInfo]]:
        places = []
        for tensor in file.tensors:
            for use in self._uses.get(tensor.name, ()):
                buffer_type = self._buffer_type(use, int(tensor.type))
                if buffer_type is None:
                    raise CannotSwap(f"{tensor.name}: its device has no place for {tensor.type.name}")
                places.append((use.address, buffer_type, tensor))
        if {place[2].name for place in places} != {tensor.name for tensor in file.tensors}:
            raise CannotSwap(f"{file.path.name} has tensors that the graph does not use")
        return places

    def _buffer_type(self, use: Use, type_number: int) -> int | None:
        """Where the loader would put this weight at a type, chosen as the loader does."""
        home = self._home_type(use)
        dims = tuple(GgmlTensor.from_address(use.address).ne)
        key = (home, type_number, use.op, dims)
        if key not in self._choices:
            device = _whose_memory(home)
            candidates = [home]
            if device == cpu_device():
                candidates = [*self._extra, ggml().ggml_backend_dev_buffer_type(device)]
            fitting = (
                candidate
                for candidate in candidates
                if _will_do(device, candidate, type_number, dims, use.op, self._experts_used)
            )
            self._choices[key] = next(fitting, None)
        return self._choices[key]

    def _home_type(self, use: Use) -> int:
        return int(ggml().ggml_backend_buffer_get_type(self._home[use.address].buffer))

    def close(self) -> None:
        """Points every struct at its first bytes again, which llama.cpp frees, and frees the rest."""
        self._point({})
        for staged in self._staged.values():
            staged.close()
        self._staged.clear()


def _whose_memory(buffer_type: int) -> int:
    """The device whose memory a kind of buffer is; memory that a GPU's driver pins is the CPU's."""
    return cpu_device() if ggml().ggml_backend_buft_is_host(buffer_type) else device_of_type(buffer_type)


def _compare(address: int, tensor: TensorInfo) -> None:
    """CannotSwap unless the struct is what ggml.h and the file's header say of it."""
    struct = GgmlTensor.from_address(address)
    same = (
        struct.name.decode() == tensor.name
        and struct.type == int(tensor.type)
        and tuple(struct.ne) == _dims(tensor)
        and ggml().ggml_nbytes(address) == tensor.n_bytes
    )
    if not same:
        raise CannotSwap(f"{tensor.name}: this build's tensors are not laid out as the pinned one's")


def _dims(tensor: TensorInfo) -> tuple[int, ...]:
    return (*tensor.shape, 1, 1, 1)[:4]


def _will_do(
    device: int, buffer_type: int, type_number: int, dims: Sequence[int], op: bytes, experts_used: int
) -> bool:
    """llama.cpp's own question: does the device support the operation on a weight in such a buffer?"""
    lib = ggml()
    arena = Arena(8)
    try:
        weight = arena.tensor(type_number, dims)
        if op == b"MUL_MAT":
            other = arena.tensor(F32, (dims[0], _ROWS, *dims[2:]))
            node = lib.ggml_mul_mat(arena.address, weight, other)
        elif op == b"MUL_MAT_ID":
            other = arena.tensor(F32, (dims[0], experts_used, _ROWS))
            node = lib.ggml_mul_mat_id(arena.address, weight, other, arena.tensor(I32, (experts_used, _ROWS)))
        elif op == _ROWS_OF:
            node = lib.ggml_get_rows(arena.address, weight, arena.tensor(I32, (_ROWS,)))
        else:
            return False
        buffer = lib.ggml_backend_buft_alloc_buffer(buffer_type, 0)
        GgmlTensor.from_address(weight).buffer = buffer
        supported = bool(lib.ggml_backend_dev_supports_op(device, node))
        lib.ggml_backend_buffer_free(buffer)
        return supported
    finally:
        arena.close()


def _experts_used(model: Pointer) -> int:
    architecture = _metadata(model, "general.architecture")
    return int(_metadata(model, f"{architecture}.expert_used_count") or 1)


def _metadata(model: Pointer, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    count = llama().llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if count >= 0 else ""
