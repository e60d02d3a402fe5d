"""Looks at a model from outside before this process opens it: what llama.cpp cannot bear ends it without a word.

llama.cpp answers some models with an abort or a segmentation fault, which no Python sees. So what it is known not
to bear is refused from the header, and the first opening, of vocabulary and one token, is a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from gguf import GGMLQuantizationType as Types

from cerebellum import files
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.gguf import TensorInfo
from cerebellum.settings import DEMO_MODEL
from cerebellum.source import Source

_NO_WEIGHTS = frozenset({Types.I8, Types.I16, Types.I32, Types.I64, Types.F64})
_TABLES = ("tid2eid",)  # matrices of whole numbers that are no weights
_ROPE_SCALINGS = frozenset({"none", "linear", "yarn", "longrope"})
_MOST = {"block_count": 512, "expert_count": 512}  # LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS
_CTX = 8
_SAID = "said: "
_PLACE = re.compile(r"^(?:\S*/)?[\w.-]+\.(?:c|cpp|h|cu):\d+: |^\w+: (?:error loading model: )?")
_SLOWEST_DISK = 10 << 20  # bytes a second


def admit(source: Source) -> None:
    """Raises BadInput, with llama.cpp's own first reason, where a model cannot be opened here.

    The model that comes with Cerebellum is not tried: it is opened in every test.
    """
    check_contents(source)
    if source.path.resolve() != DEMO_MODEL.resolve():
        try_opening(source.path, source.n_bytes)


def check_contents(source: Source) -> None:
    """Raises BadInput where the header holds what llama.cpp is known to end the process over."""
    for tensor in source.tensors.values():
        wanted = _wanted_type(tensor)
        if wanted is not None:
            raise BadInput(
                f"{source.path}: {tensor.name!a} is {tensor.type.name}, and llama.cpp runs {wanted}; "
                "convert the model again with convert_hf_to_gguf.py"
            )
    for key, most in _MOST.items():
        count = source.arch_value(key, 0)
        if isinstance(count, int) and count > most:
            raise BadInput(
                f"{source.path}: its {key} is {count:,}, and llama.cpp takes {most} at most; convert it again"
            )
    scaling = source.arch_value("rope.scaling.type", "none")
    if scaling not in _ROPE_SCALINGS:
        raise BadInput(
            f"{source.path}: its rope.scaling.type is {scaling!a}, and llama.cpp knows "
            f"{', '.join(sorted(_ROPE_SCALINGS))}; convert the model again"
        )


def _wanted_type(tensor: TensorInfo) -> str | None:
    """Says what llama.cpp wants a tensor to be that it could not compute with, or None where it can."""
    if any(part in tensor.name for part in _TABLES):
        return None
    is_vector = all(n == 1 for n in tensor.shape[1:])
    if (is_vector or "norm" in tensor.name) and tensor.type != Types.F32:
        return "norms and other vectors in F32 only"
    return "weights in floats or quantized types only" if tensor.type in _NO_WEIGHTS else None


def try_opening(path: Path, n_bytes: int) -> None:
    """Opens a model in a process of its own and lets it decode; BadInput says in a line why that fails.

    The pages of the file that this reads stay in memory, so that the opening that counts is quicker.
    """
    environment = files.own_environment(
        GGML_NO_BACKTRACE="1",
        CUDA_VISIBLE_DEVICES="",  # what is tried is the model, and a card takes a second to start
    )
    try:
        done = files.DISK.spawn(lambda: _opened_by(path, environment, 600 + n_bytes / _SLOWEST_DISK))
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"{path}: llama.cpp does not get done with opening it; give another model") from error
    except OSError as error:
        raise BadInput(
            f"{sys.executable}: cannot be started to try {path} ({error.strerror or error}); run again"
        ) from error
    if done.returncode != 0:
        raise BadInput(f"{path}: {_what_happened(done.returncode)}: {_first_reason(done.stderr)}")


def _opened_by(
    path: Path, environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[bytes]:
    """Runs this file as a program of its own, and waits for it."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "cerebellum.llama.guard", os.fspath(path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=seconds,
    )


def _what_happened(code: int) -> str:
    if code >= 0:
        return "llama.cpp cannot use it"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", as where there is no memory left" if name == "SIGKILL" else ""
    return f"llama.cpp ends its process over it ({name}{memory})"


def _first_reason(stderr: bytes) -> str:
    """Returns the first error that was logged: those that follow only say that it could not be loaded."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    said = [line.removeprefix(_SAID) for line in lines if line.startswith(_SAID)]
    aborted = [line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line or "what():" in line]
    reason = next(iter((*said, *aborted, *lines)), "it gave no reason")
    return _PLACE.sub("", reason)[:300]


def _open_once(path: Path) -> None:
    """Reads the vocabulary and decodes two tokens, the second only because scoring wants a target."""
    import numpy as np

    from cerebellum.llama.library import llama
    from cerebellum.llama.native import EngineSettings, LlamaEngine

    bindings = llama()
    log = bindings.llama_log_callback(_say_errors)
    bindings.llama_log_set(log, ctypes.c_void_p(0))
    engine = LlamaEngine(EngineSettings(threads=min(os.cpu_count() or 1, 8), repack=False))
    engine.tokenize(path, b"a")
    with engine.open([path], _CTX) as model:
        model.logits(np.zeros(2, np.int32))


def _say_errors(level: int, text: bytes, _user_data: object) -> None:
    """Writes errors at once, because an abort leaves no time for it later."""
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        os.write(2, _SAID.encode() + text.strip() + b"\n")


def main(arguments: Sequence[str]) -> int:
    """Is the process that opens the model: 0 where that went well, 3 where llama.cpp refused."""
    with suppress(ImportError, ValueError):  # an abort of ours is expected, and no core is of use
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _open_once(Path(arguments[0]))
    except CerebellumError as error:
        os.write(2, f"{error}\n".encode("utf-8", "replace"))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
