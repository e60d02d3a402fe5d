"""Which type llama.cpp itself would give each tensor for a preset such as Q3_K_M.

The answer comes from llama_model_quantize's dry run, so presets, architectures and fallbacks are
llama.cpp's own and never restated here. The dry run reports only through the log, a line a tensor:
``[  3/ 58] blk.0.attn_k.weight - [256, 128, 1, 1], type = f16, size = 0.063 MiB -> 0.01 MiB (q3_K)``
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

from gguf import GGMLQuantizationType, LlamaFileType

from cerebellum.errors import BadInput
from cerebellum.gguf import parse_type, preset_label
from cerebellum.llama.library import LOG, Bindings, llama

_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (?P<name>\S+) +- \[.*?\], type = +(?P<source>\S+), size = +[\d.]+ MiB"
    r"(?: -> +[\d.]+ MiB \((?P<target>\S+)\))?$",
    re.MULTILINE,
)


def preset_types(
    source: Path, preset: LlamaFileType, *, has_imatrix: bool, allow_requantize: bool = False
) -> dict[str, GGMLQuantizationType]:
    """Tensor name -> the type llama-quantize would write, fallbacks included. Loads no weights."""
    lib = llama()
    params = lib.llama_model_quantize_default_params()
    params.ftype = int(preset)
    params.dry_run = True
    params.allow_requantize = allow_requantize
    marker = _any_imatrix(lib)  # only its presence matters to the choice of types
    if has_imatrix:
        params.imatrix = marker
    with LOG.captured() as fragments:
        status = lib.llama_model_quantize(os.fsencode(source), b"", ctypes.byref(params))
    if status != 0:
        raise BadInput(f"{source}: llama.cpp cannot plan {preset_label(preset)}: {LOG.last_error()}")
    found = {
        match["name"]: parse_type(match["target"] or match["source"])
        for match in _LINE.finditer("".join(fragments))
    }
    if not found:
        raise BadInput(f"{source}: this build of llama.cpp reports no types; see `cerebellum doctor`")
    return found


def _any_imatrix(lib: Bindings) -> ctypes.Array[ctypes.Structure]:
    entry = lib.llama_model_imatrix_data
    value = (ctypes.c_float * 1)(1.0)
    array: ctypes.Array[ctypes.Structure] = (entry * 2)()
    array[0].name = b"present"
    array[0].data = value
    array[0].size = 1
    return array
