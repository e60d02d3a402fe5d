"""llama.cpp's shared libraries: found, initialised once, silenced, and asked who they are."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from cerebellum.errors import BadInput

_GGML_MAX_DIMS = 4
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR


class GgmlTensor(ctypes.Structure):
    """``struct ggml_tensor`` as ggml.h of the pinned llama.cpp lays it out (64-bit)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _GGML_MAX_DIMS),
        ("nb", ctypes.c_size_t * _GGML_MAX_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


class _Log:
    """Receives every line llama.cpp logs: keeps the errors, and all of it while captured."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.errors: list[str] = []
        self._captured: list[str] | None = None

    def receive(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace")
        with self._lock:
            if self._captured is not None:
                self._captured.append(line)
            if level == _ERROR_LEVEL:
                self.errors = [*self.errors[-19:], line.strip()]

    @contextmanager
    def captured(self) -> Iterator[list[str]]:
        """Collects log fragments (a line may come in several) while the block runs."""
        lines: list[str] = []
        self._captured = lines
        try:
            yield lines
        finally:
            self._captured = None

    def last_error(self) -> str:
        return self.errors[-1] if self.errors else "llama.cpp gave no reason"


LOG = _Log()
_KEPT: list[Any] = []


@cache
def llama() -> Any:
    """The ``llama_cpp`` C bindings, backend initialised, log redirected. Imported on first use."""
    try:
        from llama_cpp import llama_cpp as bindings
    except (ImportError, OSError, RuntimeError) as error:
        raise BadInput(
            f"llama-cpp-python cannot be loaded ({error}): pip install llama-cpp-python==0.3.36, "
            "or point LLAMA_CPP_LIB_PATH at a build of the same llama.cpp"
        ) from error
    callback = bindings.llama_log_callback(LOG.receive)
    bindings.llama_log_set(callback, ctypes.c_void_p(0))
    bindings.llama_backend_init()
    _KEPT.append(callback)  # C keeps the pointer, so Python must keep it too
    return bindings


def library_folder() -> Path:
    """Where the shared libraries lie: LLAMA_CPP_LIB_PATH, or inside llama-cpp-python."""
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    return Path(override) if override else Path(llama().__file__).parent / "lib"


def _load(name: str, symbol: str) -> ctypes.CDLL:
    """A ggml library, as llama.cpp itself loaded it where the system allows to look a symbol up so.

    Wheels hold libggml-base.so and libggml-base.so.0 as two files: opened by name, it would be loaded a
    second time, with a device registry of its own.
    """
    own = ctypes.CDLL(llama()._lib._name)
    if hasattr(own, symbol):
        return own
    for suffix in (".so", ".dylib", ".dll"):
        for prefix in ("lib", ""):
            path = library_folder() / f"{prefix}{name}{suffix}"
            if path.exists():
                return ctypes.CDLL(str(path))
    raise BadInput(f"{library_folder()} holds no {name} library: reinstall llama-cpp-python")


@cache
def ggml() -> ctypes.CDLL:
    """``libggml-base`` next to llama.cpp, with the signatures Cerebellum calls."""
    llama()  # loads the dependencies first
    lib = _load("ggml-base", "ggml_quantize_chunk")
    f32, i64, ptr = ctypes.POINTER(ctypes.c_float), ctypes.c_int64, ctypes.c_void_p
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, f32, ptr, i64, i64, i64, f32]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ptr, ctypes.c_size_t]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_backend_tensor_get.argtypes = [ptr, ptr, ctypes.c_size_t, ctypes.c_size_t]
    lib.ggml_backend_tensor_get.restype = None
    lib.ggml_op_name.argtypes = [ctypes.c_int]
    lib.ggml_op_name.restype = ctypes.c_char_p
    lib.ggml_version.restype = ctypes.c_char_p
    lib.ggml_commit.restype = ctypes.c_char_p
    return lib


@cache
def build_id() -> str:
    """Names the engine's numerics: bindings, ggml version and commit, and its devices."""
    import llama_cpp

    version = ggml().ggml_version().decode()
    commit = ggml().ggml_commit().decode()
    names = "+".join(device.name for device in devices())
    return f"llama-cpp-python {llama_cpp.__version__}, ggml {version} ({commit}), {names}"


class Device:
    """A compute device as ggml lists it; memory in bytes."""

    def __init__(self, name: str, description: str, free: int, total: int) -> None:
        self.name, self.description, self.free, self.total = name, description, free, total


@cache
def _registry() -> ctypes.CDLL:
    lib = _load("ggml", "ggml_backend_dev_count")
    ptr, size_p = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.argtypes, lib.ggml_backend_dev_get.restype = [ctypes.c_size_t], ptr
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = [ptr], ctypes.c_char_p
    lib.ggml_backend_dev_memory.argtypes = [ptr, size_p, size_p]
    return lib


def devices() -> list[Device]:
    """Every device that llama.cpp could use on this machine, the CPU among them."""
    llama()
    lib, found = _registry(), []
    for index in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name = lib.ggml_backend_dev_name(device).decode()
        text = lib.ggml_backend_dev_description(device).decode()
        found.append(Device(name, text, free.value, total.value))
    return found


def system_info() -> str:
    """llama.cpp's one line on the instructions it was built for."""
    text: str = llama().llama_print_system_info().decode()
    return text.strip(" |\n")
