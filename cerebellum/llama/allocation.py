"""llama.cpp asked what it would allocate for a model. It reads the header and loads no tensor.

``no_alloc`` makes llama.cpp build its graphs over buffers of no size; what they would take it only says
in its log, in hundredths of a MiB, so its log is what is read. Only the recurrent state is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cerebellum.errors import BadInput, CerebellumError
from cerebellum.llama.library import LOG, Pointer, llama
from cerebellum.llama.native import EngineSettings, LlamaEngine

_CACHE = re.compile(r"^llama_kv_cache: size = +([\d.]+) MiB", re.MULTILINE)
_STATE = re.compile(r"^llama_memory_recurrent: size = +([\d.]+) MiB", re.MULTILINE)
_COMPUTE = re.compile(r"^sched_reserve: +(\S+) compute buffer size = +([\d.]+) MiB", re.MULTILINE)
_HOST = re.compile(r"CPU|.*_Host")  # names of buffers in main memory, pinned ones included


@dataclass(frozen=True, kw_only=True)
class Allocated:
    """Bytes, to 0.005 MiB of each buffer; ``tensors`` is exact.

    ``compute`` is the GPU's where llama.cpp has one (``on_gpu``), else the CPU's.
    """

    tensors: int
    cache: int
    state: int
    compute: int
    on_gpu: bool


def memory_report(
    paths: Sequence[Path], context: int, *, sequences: int = 1, gpu_layers: int = -1
) -> Allocated:
    """What llama.cpp allocates for ``context`` tokens shared by ``sequences``, on its first device.

    ``gpu_layers`` of -1 are all of them. BadInput where llama.cpp cannot open the files.
    """
    lib = llama()
    engine = LlamaEngine(EngineSettings(gpu_layers=gpu_layers))
    with LOG.captured() as lines, engine.weights(paths, no_alloc=True) as model:
        opened = lib.llama_init_from_model(model, _params(context, sequences))
        if not opened:
            raise BadInput(f"{paths[0]}: no context of {context} tokens: {LOG.last_error()}")
        lib.llama_free(opened)
        tensors = lib.llama_model_size(model)
    return _read("".join(lines), tensors)


def _params(context: int, sequences: int) -> Pointer:
    """What llama-server runs with: its slots share one cache, a window's cache is not full size."""
    params = llama().llama_context_default_params()
    params.n_ctx = context
    params.n_seq_max = sequences
    params.kv_unified = sequences > 1
    params.swa_full = False
    return params


def _read(log: str, tensors: int) -> Allocated:
    buffers = [(name, float(mib)) for name, mib in _COMPUTE.findall(log)]
    if not buffers:
        raise CerebellumError("llama.cpp did not say what its compute buffers take: use the pinned build")
    on_gpu = [mib for name, mib in buffers if not _HOST.fullmatch(name)]
    return Allocated(
        tensors=tensors,
        cache=_bytes(map(float, _CACHE.findall(log))),
        state=_bytes(map(float, _STATE.findall(log))),
        compute=_bytes(on_gpu or [mib for _, mib in buffers]),
        on_gpu=bool(on_gpu),
    )


def _bytes(mib: Iterable[float]) -> int:
    return round(sum(mib) * (1 << 20))
