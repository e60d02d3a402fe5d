"""llama.cpp as an engine, through llama-cpp-python's low-level bindings."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from threadpoolctl import threadpool_limits

from cerebellum.engine.asking import Asker
from cerebellum.engine.protocols import (
    Bytes,
    ColumnProducts,
    ColumnSquares,
    Floats,
    QuantizeJob,
    Tokenized,
    Tokens,
    Watch,
)
from cerebellum.engine.speed import Speed
from cerebellum.engine.timings import timed
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.llama.activations import sum_squares
from cerebellum.llama.library import LOG, Bindings, Pointer, build_id, cpu_device, ggml, gpus, llama
from cerebellum.llama.model import ContextShape, LlamaModel, ResidentModel
from cerebellum.llama.moments import column_products, squares_and_products
from cerebellum.llama.placement import Placement, place
from cerebellum.llama.presets import preset_types
from cerebellum.llama.quantize import encoded, quantize, round_trip, to_float
from cerebellum.llama.repack import NOTE as REPACK_NOTE
from cerebellum.llama.repack import extra_buffer_types, repacking_works
from cerebellum.llama.speed import measure_speed

_UBATCH = 512  # llama.cpp's default; on a CPU a larger one is no faster
GPU_TOKENS = 2048  # tokens of one decode on a GPU: llama-perplexity's own number
_GPU_UBATCH = 4096  # the longest chunk that a GPU is given in one graph
_STAGED_SHARE = 4  # of main memory, one part goes to staged shards where there is no GPU
_EXPERTS = (
    rb"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # the weights that llama.cpp's --cpu-moe keeps off the GPU
)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How models are run; none of it touches a file.

    ``threads`` of the CPU; ``gpu_layers`` to offload (-1: all). With ``gpu_room`` the GPU takes no more than so many
    bytes of weights: of each model as many layers as fit, the routed experts of the first ones leaving first.
    ``decode_tokens`` go into one decode (0: what suits the machine), ``staged_bytes`` of shards are kept ready to
    be swapped in (None: what the device has left). Without ``repack`` a model opens sooner and runs more slowly on
    a CPU.
    """

    threads: int = os.cpu_count() or 1
    gpu_layers: int = 0
    gpu_room: int | None = None
    decode_tokens: int = 0
    staged_bytes: int | None = None
    repack: bool = True

    @property
    def wants_gpu(self) -> bool:
        return self.gpu_layers != 0


class LlamaEngine:
    """Opens GGUF shards in this process. Stateless but for its settings.

    ``note`` hears, in a line, of everything that is done another and slower way than usual.
    """

    def __init__(
        self, settings: EngineSettings | None = None, note: Callable[[str], None] = lambda _: None
    ) -> None:
        self.settings = settings or EngineSettings()
        self.note = note
        self._told: set[str] = set()

    @property
    def on_gpu(self) -> bool:
        """Whether models are run on a GPU: one is asked for and there."""
        return self.settings.wants_gpu and bool(gpus())

    @cached_property
    def identity(self) -> str:
        """Names all that can change a number, the kind of card among it; the device is asked once, this is often."""
        settings = self.settings
        parts = [build_id()]
        if settings.gpu_layers:
            parts.append(f"{settings.gpu_layers} layers offloaded")
        if settings.gpu_room is not None:
            parts.append(f"what fits into {settings.gpu_room >> 20} MiB")
        if not self._repacks:
            parts.append("weights not repacked")
        if self._decode_tokens:
            parts.append(f"{self._decode_tokens} tokens a decode in fixed company")
        if self.on_gpu:
            parts.append("+".join(dict.fromkeys(device.description for device in gpus())))
        return ", ".join(parts)

    @property
    def build(self) -> str:
        return build_id()

    @property
    def _decode_tokens(self) -> int:
        """Tokens of one decode where several chunks go into one, else 0."""
        return self.settings.decode_tokens or (GPU_TOKENS if self.on_gpu else 0)

    def importance(
        self, paths: Sequence[Path], ctx: int, chunks: Iterable[Tokens], tick: Callable[[], None]
    ) -> Mapping[str, ColumnSquares]:
        """Decodes the chunks with ``cb_eval`` watching every matrix product."""
        with self.weights(paths) as model:
            return sum_squares(model, self._shape(ctx), chunks, tick)

    def moments(
        self,
        paths: Sequence[Path],
        ctx: int,
        chunks: Iterable[Tokens],
        watched: Mapping[str, Watch],
        tick: Callable[[], None],
    ) -> Mapping[str, ColumnProducts]:
        """Decodes the chunks with ``cb_eval`` watching the inputs that were asked for."""
        with self._alone(), self.weights(paths) as model:
            return column_products(model, self._shape(ctx), chunks, watched, tick)

    def importance_and_moments(
        self,
        paths: Sequence[Path],
        ctx: int,
        chunks: Iterable[Tokens],
        watched: Mapping[str, Watch],
        n_watched: int,
        tick: Callable[[], None],
    ) -> tuple[Mapping[str, ColumnSquares], Mapping[str, ColumnProducts]]:
        """Decodes the chunks once, with ``cb_eval`` watching for both."""
        with self._alone(), self.weights(paths) as model:
            return squares_and_products(model, self._shape(ctx), chunks, watched, n_watched, tick)

    def _alone(self) -> AbstractContextManager[object]:
        """On a CPU BLAS gets one thread: its own would spin against llama.cpp's, six times as slow on two cores."""
        return nullcontext() if self.on_gpu else threadpool_limits(1, user_api="blas")

    def preset_types(
        self, source: Path, preset: LlamaFileType, *, has_imatrix: bool, allow_requantize: bool = False
    ) -> dict[str, GGMLQuantizationType]:
        return preset_types(source, preset, has_imatrix=has_imatrix, allow_requantize=allow_requantize)

    def quantize(self, job: QuantizeJob, threads: int) -> Iterator[Bytes]:
        return quantize(job, threads)

    def to_float(self, raw: Bytes, type_: GGMLQuantizationType, n_per_row: int) -> Floats:
        return to_float(raw, type_, n_per_row)

    def encoded(self, job: QuantizeJob) -> Bytes:
        return encoded(job)

    def round_trip(self, job: QuantizeJob) -> Floats:
        return round_trip(job)

    def speed(self, paths: Sequence[Path]) -> Speed:
        """Times a prompt and generation on the model over ``paths``."""
        with self.weights(paths) as model:
            return measure_speed(model, self.settings.threads)

    @property
    def machine(self) -> str:
        """Names the graphics card that is used, or the threads of the processor."""
        cards = [device.description for device in gpus()] if self.on_gpu else []
        return ", ".join(cards) if cards else f"{self.settings.threads} threads"

    def asker(self, paths: Sequence[Path]) -> AbstractContextManager[Asker]:
        from cerebellum.llama.asker import open_asker  # it opens models through this engine

        return open_asker(self, paths)

    def can_swap(self, weights: int, staged: int) -> bool:
        """Whether all weights lie on one device: all on the CPU, or all on the only GPU, beside those staged."""
        if not self.on_gpu:
            return True
        if self.settings.gpu_layers > 0 or len(gpus()) > 1:
            return False
        return self.settings.gpu_room is None or weights + staged <= self.settings.gpu_room

    def chunks_together(self, ctx: int) -> int:
        """Several chunks a decode on a GPU, one on a CPU."""
        return max(1, self._decode_tokens // ctx)

    def tokenize(self, path: Path, text: bytes, *, special: bool = False) -> Tokenized:
        """Tokens of ``text`` exactly as llama-perplexity has them (specials added, none parsed but by ``special``)."""
        lib = llama()
        with self.weights([path], vocab_only=True) as model:
            vocab = lib.llama_model_get_vocab(model)
            bos = lib.llama_vocab_bos(vocab) if lib.llama_vocab_get_add_bos(vocab) else None
            return Tokenized(tokens=_tokenize(lib, vocab, text, special), bos=bos)

    def vocab_size(self, path: Path) -> int:
        """How many tokens the model's vocabulary has; loads nothing else."""
        with self.weights([path], vocab_only=True) as model:
            return int(llama().llama_vocab_n_tokens(llama().llama_model_get_vocab(model)))

    @contextmanager
    def open(self, paths: Sequence[Path], ctx: int) -> Iterator[LlamaModel]:
        """A model over ``paths`` (first the shard with the metadata), for chunks of ``ctx`` tokens."""
        with self.weights(paths) as model:
            opened = LlamaModel(model, self._shape(ctx), on_gpu=self.on_gpu, note=self.note)
            try:
                yield opened
            finally:
                opened.close()

    @contextmanager
    def resident(self, paths: Sequence[Path], ctx: int) -> Iterator[ResidentModel]:
        """A model over ``paths`` that other shards can be swapped into."""
        with self.weights(paths) as model:
            with timed("opening"):
                opened = ResidentModel(
                    model,
                    paths,
                    self._shape(ctx),
                    on_gpu=self.on_gpu,
                    room=self._room(),
                    extra=extra_buffer_types() if self._repacks else (),
                    note=self.note,
                )
            try:
                yield opened
            finally:
                opened.close()

    def _room(self) -> int | None:
        if self.settings.staged_bytes is not None or self.on_gpu:
            return self.settings.staged_bytes
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _STAGED_SHARE

    def _shape(self, ctx: int) -> ContextShape:
        """Several chunks a decode on a GPU, in one graph where they fit; one on a CPU."""
        sequences = self.chunks_together(ctx)
        tokens = ctx * sequences
        ubatch = tokens if self.on_gpu and tokens <= _GPU_UBATCH else min(ctx, _UBATCH)
        return ContextShape(ctx=ctx, sequences=sequences, ubatch=ubatch, threads=self.settings.threads)

    @contextmanager
    def weights(
        self, paths: Sequence[Path], *, vocab_only: bool = False, no_alloc: bool = False
    ) -> Iterator[Any]:
        """The model over ``paths``; with ``no_alloc`` its tensors have shapes and no bytes."""
        lib = llama()
        params = lib.llama_model_default_params()
        params.vocab_only = vocab_only
        params.use_extra_bufts = not vocab_only and self._repacks
        placed = Placement(gpu_layers=0) if vocab_only else self._place(paths)
        params.n_gpu_layers = 9999 if placed.gpu_layers < 0 else placed.gpu_layers
        overrides = _overrides(placed.cpu_expert_layers)  # must outlive the load
        if overrides is not None:
            params.tensor_buft_overrides = ctypes.addressof(overrides)
        if no_alloc:
            params.no_alloc = True
            params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # llama.cpp aborts where it would map the file
            params.split_mode = lib.LLAMA_SPLIT_MODE_NONE
        with timed("opening"):
            model = self._load(paths, params)
        try:
            yield model
        finally:
            lib.llama_model_free(model)

    def _load(self, paths: Sequence[Path], params: Any) -> Pointer:
        lib = llama()
        if len(paths) == 1:  # where it is the first of several files, llama.cpp finds the others
            model = lib.llama_model_load_from_file(os.fsencode(paths[0]), params)
        else:
            names = (ctypes.c_char_p * len(paths))(*(os.fsencode(path) for path in paths))
            model = lib.llama_model_load_from_splits(names, len(paths), params)
        if not model:
            raise BadInput(f"{paths[0]}: llama.cpp cannot load it: {LOG.last_error()}")
        return model

    @property
    def _repacks(self) -> bool:
        """Whether weights are repacked for the CPU; where a build's kernels for that are broken, it is told once."""
        if not self.settings.repack:
            return False
        if not repacking_works() and REPACK_NOTE not in self._told:
            self._told.add(REPACK_NOTE)
            self.note(REPACK_NOTE)
        return repacking_works()

    def _place(self, paths: Sequence[Path]) -> Placement:
        """Where the weights of the model over ``paths`` go; a model that does not fit whole is told of, once a form."""
        room = self.settings.gpu_room
        if room is None or self.settings.gpu_layers == 0:
            return Placement(gpu_layers=self.settings.gpu_layers)
        placed = place(paths, room)
        if not placed.whole and placed.line not in self._told:
            self._told.add(placed.line)
            self.note(f"{paths[0].name}: {placed.line}")
        return placed


class _Override(ctypes.Structure):
    """``struct llama_model_tensor_buft_override``."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def _overrides(n_layers: int) -> ctypes.Array[_Override] | None:
    """Where weights go against the rule: the experts of the first layers into main memory."""
    if not n_layers:
        return None
    host = ggml().ggml_backend_dev_buffer_type(cpu_device())
    overrides = (_Override * (n_layers + 1))()  # the last one is empty and ends the list
    for layer in range(n_layers):
        overrides[layer] = _Override(b"blk\\.%d%s" % (layer, _EXPERTS), host)
    return overrides


def _tokenize(lib: Bindings, vocab: Pointer, text: bytes, special: bool) -> Tokens:
    room = len(text) + 2
    buffer = (ctypes.c_int32 * room)()
    count = lib.llama_tokenize(vocab, text, len(text), buffer, room, True, special)
    if count < 0:
        raise CerebellumError(f"llama_tokenize wants room for {-count} tokens, had {room}")
    return np.ctypeslib.as_array(buffer)[:count].astype(np.int32)
