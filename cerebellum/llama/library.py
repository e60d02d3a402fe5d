"""llama.cpp's shared libraries: found, initialised once, silenced, and asked who they are."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


class GgmlInit(ctypes.Structure):
    """``struct ggml_init_params``: how many bytes of tensor structs a context holds, and no data."""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


_INT = ctypes.c_int
_I64 = ctypes.c_int64
_SIZE = ctypes.c_size_t
_BOOL = ctypes.c_bool
_PTR = ctypes.c_void_p
_TEXT = ctypes.c_char_p
_F32 = ctypes.POINTER(ctypes.c_float)
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # name -> (result, arguments...), as ggml.h has them
    "ggml_quantize_chunk": (_SIZE, _INT, _F32, _PTR, _I64, _I64, _I64, _F32),
    "ggml_validate_row_data": (_BOOL, _INT, _PTR, _SIZE),
    "ggml_op_name": (_TEXT, _INT),
    "ggml_version": (_TEXT,),
    "ggml_commit": (_TEXT,),
    "ggml_init": (_PTR, GgmlInit),
    "ggml_free": (None, _PTR),
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_graph_overhead": (_SIZE,),
    "ggml_new_tensor": (_PTR, _PTR, _INT, _INT, ctypes.POINTER(_I64)),
    "ggml_set_name": (_PTR, _PTR, _TEXT),
    "ggml_set_input": (None, _PTR),
    "ggml_set_output": (None, _PTR),
    "ggml_nbytes": (_SIZE, _PTR),
    "ggml_mul_mat": (_PTR, _PTR, _PTR, _PTR),
    "ggml_mul_mat_id": (_PTR, _PTR, _PTR, _PTR, _PTR),
    "ggml_get_rows": (_PTR, _PTR, _PTR, _PTR),
    "ggml_argmax": (_PTR, _PTR, _PTR),
    "ggml_soft_max": (_PTR, _PTR, _PTR),
    "ggml_reshape_2d": (_PTR, _PTR, _PTR, _I64, _I64),
    "ggml_view_3d": (_PTR, _PTR, _PTR, _I64, _I64, _I64, _SIZE, _SIZE, _SIZE),
    "ggml_cont": (_PTR, _PTR, _PTR),
    "ggml_add": (_PTR, _PTR, _PTR, _PTR),
    "ggml_sub": (_PTR, _PTR, _PTR, _PTR),
    "ggml_mul": (_PTR, _PTR, _PTR, _PTR),
    "ggml_exp": (_PTR, _PTR, _PTR),
    "ggml_sqr": (_PTR, _PTR, _PTR),
    "ggml_cast": (_PTR, _PTR, _PTR, _INT),
    "ggml_cpy": (_PTR, _PTR, _PTR, _PTR),
    "ggml_sum_rows": (_PTR, _PTR, _PTR),
    "ggml_out_prod": (_PTR, _PTR, _PTR, _PTR),
    "ggml_backend_buffer_clear": (None, _PTR, ctypes.c_uint8),
    "ggml_new_graph": (_PTR, _PTR),
    "ggml_build_forward_expand": (None, _PTR, _PTR),
    "ggml_gallocr_new": (_PTR, _PTR),
    "ggml_gallocr_alloc_graph": (_BOOL, _PTR, _PTR),
    "ggml_gallocr_free": (None, _PTR),
    "ggml_backend_tensor_get": (None, _PTR, _PTR, _SIZE, _SIZE),
    "ggml_backend_tensor_set": (None, _PTR, _PTR, _SIZE, _SIZE),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_PTR, _PTR, _PTR),
    "ggml_backend_buft_alloc_buffer": (_PTR, _PTR, _SIZE),
    "ggml_backend_buft_get_device": (_PTR, _PTR),
    "ggml_backend_buft_name": (_TEXT, _PTR),
    "ggml_backend_buft_is_host": (_BOOL, _PTR),
    "ggml_backend_buffer_get_type": (_PTR, _PTR),
    "ggml_backend_buffer_get_size": (_SIZE, _PTR),
    "ggml_backend_buffer_set_usage": (None, _PTR, _INT),
    "ggml_backend_buffer_get_usage": (_INT, _PTR),
    "ggml_backend_buffer_free": (None, _PTR),
    "ggml_backend_graph_compute": (_INT, _PTR, _PTR),
    "ggml_backend_free": (None, _PTR),
    "ggml_backend_dev_init": (_PTR, _PTR, _TEXT),
    "ggml_backend_dev_type": (_INT, _PTR),
    "ggml_backend_dev_name": (_TEXT, _PTR),
    "ggml_backend_dev_description": (_TEXT, _PTR),
    "ggml_backend_dev_memory": (None, _PTR, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)),
    "ggml_backend_dev_buffer_type": (_PTR, _PTR),
    "ggml_backend_dev_supports_op": (_BOOL, _PTR, _PTR),
    "ggml_backend_dev_backend_reg": (_PTR, _PTR),
    "ggml_backend_reg_get_proc_address": (_PTR, _PTR, _TEXT),
}


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


Bindings = Any
"""llama-cpp-python's module of C functions, which has no types of its own."""

Pointer = Any
"""A pointer that llama.cpp gave: ctypes has a class for each, none of which says more."""

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
    for name, (restype, *argtypes) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype = restype
        function.argtypes = argtypes
    return lib


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of the pinned llama.cpp."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


@cache
def decoder(type_number: int) -> Callable[[int, int, int], None]:
    """Returns ggml's ``to_float`` of a type, for the addresses of packed rows and floats and their number."""
    lib = ggml()
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    traits = lib.ggml_get_type_traits(type_number).contents
    if not traits.to_float:
        raise BadInput(f"{traits.type_name.decode()}: this build of llama.cpp cannot read such weights")
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return prototype(traits.to_float)


@cache
def build_id() -> str:
    """Names the engine's numerics: bindings, ggml version and commit, and its devices."""
    import llama_cpp

    version = ggml().ggml_version().decode()
    commit = ggml().ggml_commit().decode()
    names = "+".join(device.name for device in devices())
    return f"llama-cpp-python {llama_cpp.__version__}, ggml {version} ({commit}), {names}"


CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


@dataclass(frozen=True, kw_only=True)
class Device:
    """A compute device as ggml lists it. ``free`` and ``total`` memory in bytes, ``is_cpu`` the processor."""

    address: int
    name: str
    description: str
    free: int
    total: int
    is_cpu: bool


@cache
def _registry() -> ctypes.CDLL:
    lib = _load("ggml", "ggml_backend_dev_count")
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    return lib


def devices() -> list[Device]:
    """Every device that llama.cpp could use on this machine, the CPU among them."""
    llama()
    lib = _registry()
    return [device_at(lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count())]


def device_at(address: int) -> Device:
    """Describes the device at an address, with the memory that is free now."""
    lib = ggml()
    free, total = device_memory(address)
    return Device(
        address=address,
        name=lib.ggml_backend_dev_name(address).decode(),
        description=lib.ggml_backend_dev_description(address).decode(),
        free=free,
        total=total,
        is_cpu=lib.ggml_backend_dev_type(address) == CPU_DEVICE,
    )


def device_memory(address: int) -> tuple[int, int]:
    """(free, total) bytes of a device, now. Of the CPU ggml calls all memory free."""
    free = ctypes.c_size_t()
    total = ctypes.c_size_t()
    ggml().ggml_backend_dev_memory(address, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


@cache
def cpu_device() -> int:
    """The address of the processor as a device."""
    return next(device.address for device in devices() if device.is_cpu)


def gpus() -> list[Device]:
    """The devices that are not the CPU."""
    return [device for device in devices() if not device.is_cpu]


def system_info() -> str:
    """llama.cpp's one line on the instructions it was built for."""
    text: str = llama().llama_print_system_info().decode()
    return text.strip(" |\n")
