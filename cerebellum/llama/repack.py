"""Whether the processor's kernels for repacked weights can be trusted; a process of its own tries them first.

llama.cpp keeps weights of some types in buffers of another layout, for kernels of their own. Those for Intel's AMX end
the process at their first product where GCC before 12.4 or 13.3 built them: it leaves out the stores of the tile
configuration (llama.cpp issue 20824 and pull request 26954). Stock bindings crash there as well. So where a build has
such kernels, a small product is computed with them elsewhere, and without them here if that does not end well.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from functools import cache

import numpy as np

from cerebellum import files
from cerebellum.llama.graphs import Arena, Block, Graph, Workbench, fill
from cerebellum.llama.library import cpu_device, ggml, system_info

WITHOUT_AMX = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
"""What cmake is told so that llama.cpp has no kernels for AMX."""

NOTE = (
    "this llama.cpp's kernels for Intel AMX end the process, for an old GCC built them; weights are not repacked "
    f'instead, which is slower. CMAKE_ARGS="{WITHOUT_AMX}" pip install --force-reinstall --no-deps --no-cache-dir '
    "llama-cpp-python==0.3.36 builds it without them"
)

_Q8_0 = 8
_COLUMNS, _ROWS, _TOKENS = 256, 64, 32
"""Whole tiles of 16 rows and 64 bytes, and enough tokens for the tiles to be used."""

_BLOCK = 32  # weights of a Q8_0 block, which is a float16 scale and as many int8 codes
_SECONDS = 120.0


@cache
def repacking_works() -> bool:
    """Says whether models may be opened with repacked weights; only builds with kernels for AMX are tried."""
    if "AMX_INT8 = 1" not in system_info():
        return True
    try:
        done = files.DISK.spawn(_tried)
    except (subprocess.TimeoutExpired, OSError):
        return False
    return done.returncode == 0


def _tried() -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "cerebellum.llama.repack"],
        env=files.own_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_SECONDS,
    )


@cache
def extra_buffer_types() -> tuple[int, ...]:
    """Returns the processor's buffer types that repack weights, in the order in which the loader tries them."""
    lib = ggml()
    cpu = cpu_device()
    registry = lib.ggml_backend_dev_backend_reg(cpu)
    found = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not found:
        return ()
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)(cpu)
    extra: list[int] = []
    while listed[len(extra)]:
        extra.append(int(listed[len(extra)]))
    return tuple(extra)


def product_is_right(buffer_type: int) -> bool:
    """Computes ones times a Q8_0 matrix of ones, (rows, tokens), in such a buffer; every element is the row length."""
    bench = Workbench(cpu_device())
    arena = Arena(1)
    weight = arena.tensor(_Q8_0, (_COLUMNS, _ROWS))
    block = Block(arena, buffer_type, weights=True)
    one = np.concatenate([np.ones(1, np.float16).view(np.uint8), np.ones(_BLOCK, np.uint8)])
    fill(weight, np.tile(one, _COLUMNS * _ROWS // _BLOCK))
    graph = Graph(bench, "trial")
    product = graph.read(
        graph.node("mul_mat", weight, graph.given(np.ones((_TOKENS, _COLUMNS), np.float32))), np.float32
    )
    graph.run()
    block.close()
    bench.close()
    return bool(np.allclose(product, _COLUMNS, rtol=0.01))


def main() -> int:
    """Is the process that tries: 0 where the product was right, or where there is nothing to try."""
    amx = [each for each in extra_buffer_types() if ggml().ggml_backend_buft_name(each) == b"AMX"]
    return 0 if all(map(product_is_right, amx)) else 1


if __name__ == "__main__":
    sys.exit(main())
