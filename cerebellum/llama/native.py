"""llama.cpp as an engine, through llama-cpp-python's low-level bindings."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from cerebellum.engine.asking import Asker
from cerebellum.engine.protocols import Bytes, ColumnSquares, Floats, Logits, QuantizeJob, Tokenized, Tokens
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.llama.activations import ActivationCollector
from cerebellum.llama.library import LOG, build_id, llama
from cerebellum.llama.presets import preset_types
from cerebellum.llama.quantize import quantize, to_float

_MAX_UBATCH = 512  # llama.cpp's default; a larger one changes compute buffers, not results

TensorCallback = Callable[[int, bool], bool]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """``threads`` of the CPU; ``gpu_layers`` to offload (-1: all). Neither touches a file."""

    threads: int = os.cpu_count() or 1
    gpu_layers: int = 0


class LlamaModel:
    """One llama_context over one list of shards. Made by ``LlamaEngine.open``, which frees it."""

    def __init__(self, context: Any, vocab_size: int, ctx: int) -> None:
        self._lib, self._context, self._ctx = llama(), context, ctx
        self._batch = self._lib.llama_batch_init(ctx, 0, 1)
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def logits(self, tokens_T: Tokens) -> Logits:
        first = len(tokens_T) // 2
        self._decode(tokens_T, first)
        rows = len(tokens_T) - first
        pointer = self._lib.llama_get_logits(self._context)
        if not pointer:
            raise CerebellumError(f"llama.cpp returned no logits: {LOG.last_error()}")
        view = np.ctypeslib.as_array(pointer, shape=(rows, self._vocab_size))
        return view[:-1].copy()  # llama.cpp reuses its buffer for the next chunk

    def evaluate(self, tokens_T: Tokens) -> None:
        """Decodes a chunk with an output at every token, so that callbacks see whole activations.

        Without outputs llama.cpp drops the rows of the last layer that no logit needs.
        """
        # On another thread: Ctrl-C reaches Python's main thread only, and raised in there, in a callback
        # that C called, it would be lost.
        with ThreadPoolExecutor(max_workers=1) as worker:
            worker.submit(self._decode, tokens_T, 0).result()

    def _decode(self, tokens_T: Tokens, first: int) -> None:
        if len(tokens_T) > self._ctx:
            raise ValueError(f"a chunk of {len(tokens_T)} tokens for a context of {self._ctx}")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._fill(tokens_T, first)
        status = self._lib.llama_decode(self._context, self._batch)
        if status != 0:
            raise CerebellumError(f"llama_decode returned {status}: {LOG.last_error()}")

    def _fill(self, tokens_T: Tokens, first: int) -> None:
        batch, n = self._batch, len(tokens_T)
        batch.n_tokens = n
        np.ctypeslib.as_array(batch.token, (n,))[:] = tokens_T
        np.ctypeslib.as_array(batch.pos, (n,))[:] = np.arange(n)
        np.ctypeslib.as_array(batch.n_seq_id, (n,))[:] = 1
        wanted = np.ctypeslib.as_array(batch.logits, (n,))
        wanted[:] = 0
        wanted[first:] = 1
        for i in range(n):
            batch.seq_id[i][0] = 0

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)


class LlamaEngine:
    """Opens GGUF shards in this process. Stateless but for its settings."""

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()

    @property
    def identity(self) -> str:
        offload = f", {self.settings.gpu_layers} layers offloaded" if self.settings.gpu_layers else ""
        return build_id() + offload

    @property
    def build(self) -> str:
        return build_id()

    def importance(
        self, paths: Sequence[Path], ctx: int, chunks: Iterable[Tokens], tick: Callable[[], None]
    ) -> Mapping[str, ColumnSquares]:
        """Decodes the chunks with ``cb_eval`` watching every matrix product."""
        collector = ActivationCollector()
        with self.open(paths, ctx, collector.callback) as model:
            for tokens_T in chunks:
                model.evaluate(tokens_T)
                if collector.error:
                    raise collector.error
                tick()
        return collector.sums

    def preset_types(
        self, source: Path, preset: LlamaFileType, *, has_imatrix: bool, allow_requantize: bool = False
    ) -> dict[str, GGMLQuantizationType]:
        return preset_types(source, preset, has_imatrix=has_imatrix, allow_requantize=allow_requantize)

    def quantize(self, job: QuantizeJob, threads: int) -> Iterator[Bytes]:
        return quantize(job, threads)

    def to_float(self, raw: Bytes, type_: GGMLQuantizationType, n_per_row: int) -> Floats:
        return to_float(raw, type_, n_per_row)

    def asker(self, paths: Sequence[Path]) -> AbstractContextManager[Asker]:
        from cerebellum.llama.asker import open_asker  # it opens models through this engine

        return open_asker(self, paths)

    def tokenize(self, path: Path, text: bytes) -> Tokenized:
        """Tokens of ``text`` exactly as llama-perplexity has them (specials added, none parsed)."""
        lib = llama()
        with self.weights([path], vocab_only=True) as model:
            vocab = lib.llama_model_get_vocab(model)
            bos = lib.llama_vocab_bos(vocab) if lib.llama_vocab_get_add_bos(vocab) else None
            return Tokenized(tokens=_tokenize(lib, vocab, text), bos=bos)

    def vocab_size(self, path: Path) -> int:
        """How many tokens the model's vocabulary has; loads nothing else."""
        with self.weights([path], vocab_only=True) as model:
            return int(llama().llama_vocab_n_tokens(llama().llama_model_get_vocab(model)))

    @contextmanager
    def open(
        self, paths: Sequence[Path], ctx: int, callback: TensorCallback | None = None
    ) -> Iterator[LlamaModel]:
        """A model over ``paths`` (first the shard with the metadata), for chunks of ``ctx`` tokens.

        ``callback(tensor_address, ask)`` is llama.cpp's ``cb_eval``: it sees every graph node.
        """
        lib = llama()
        with self.weights(paths) as model:
            # The C side keeps the function pointer, so it must outlive the context.
            c_callback = lib.ggml_backend_sched_eval_callback(_as_c(callback))
            context = lib.llama_init_from_model(model, self._context_params(ctx, c_callback, callback))
            if not context:
                raise BadInput(f"{paths[0]}: no context of {ctx} tokens: {LOG.last_error()}")
            opened = LlamaModel(context, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), ctx)
            try:
                yield opened
            finally:
                opened.close()

    @contextmanager
    def weights(
        self, paths: Sequence[Path], *, vocab_only: bool = False, no_alloc: bool = False
    ) -> Iterator[Any]:
        """The model over ``paths``; with ``no_alloc`` its tensors have shapes and no bytes."""
        lib = llama()
        params = lib.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0 if vocab_only else self._gpu_layers()
        if no_alloc:
            params.no_alloc = True
            params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # llama.cpp aborts where it would map the file
            params.split_mode = lib.LLAMA_SPLIT_MODE_NONE
        if len(paths) == 1:  # where it is the first of several files, llama.cpp finds the others
            model = lib.llama_model_load_from_file(os.fsencode(paths[0]), params)
        else:
            names = (ctypes.c_char_p * len(paths))(*(os.fsencode(path) for path in paths))
            model = lib.llama_model_load_from_splits(names, len(paths), params)
        if not model:
            raise BadInput(f"{paths[0]}: llama.cpp cannot load it: {LOG.last_error()}")
        try:
            yield model
        finally:
            lib.llama_model_free(model)

    def _gpu_layers(self) -> int:
        return 9999 if self.settings.gpu_layers < 0 else self.settings.gpu_layers

    def _context_params(self, ctx: int, c_callback: Any, callback: TensorCallback | None) -> Any:
        params = llama().llama_context_default_params()
        params.n_ctx = params.n_batch = ctx
        params.n_ubatch = min(ctx, _MAX_UBATCH)
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = self.settings.threads
        params.no_perf = True
        if callback is not None:
            params.cb_eval = c_callback
        return params


def _as_c(callback: TensorCallback | None) -> Callable[[int, bool, object], bool]:
    return lambda tensor, ask, _data: bool(callback and callback(tensor, ask))


def _tokenize(lib: Any, vocab: Any, text: bytes) -> Tokens:
    room = len(text) + 2
    buffer = (ctypes.c_int32 * room)()
    count = lib.llama_tokenize(vocab, text, len(text), buffer, room, True, False)
    if count < 0:
        raise CerebellumError(f"llama_tokenize wants room for {-count} tokens, had {room}")
    return np.ctypeslib.as_array(buffer)[:count].astype(np.int32)
