"""The C encoder: compiled on first use for the processor at hand, checked against known bytes, loaded.

Compiling here and not in the package's build keeps three promises with one mechanism. `pip install` stays
one step and a wheel stays plain Python, so it cannot carry instructions that another machine lacks. The
file's name holds a digest of the source, the flags and everything the compiler predefines (its version, the
instructions it may use), so a library of another source, compiler or processor is never opened. And where
there is no compiler, nothing fails: `load` says why, and callers fall back on ggml's encoders.

The bytes must not depend on the compiler. Before a library is used at all, it encodes a fixed set of rows,
and their digest has to be the one written below; a compiler that reorders or contracts float operations is
thereby refused at run time, on whatever machine that happens. `tests/test_encode.py` builds at other
optimisation levels and for other instruction sets, and compares more bytes than fit here.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from cerebellum import files
from cerebellum.encode.grids import TABLED, table
from cerebellum.errors import BadInput
from cerebellum.gguf import block_size, row_bytes

_FOLDER = Path(__file__).parent
_SOURCES = ("kquants.c", "iquants.c", "blocks.h", "feedback.h", "halves.h")

FLAGS = (
    *("-std=c11", "-O3", "-fPIC", "-shared"),
    "-ffp-contract=off",  # a * b + c is two roundings unless the source says fmaf
    *("-fno-math-errno", "-fno-trapping-math"),  # lets sqrtf and selections vectorise; changes no value
    # Smallest and largest become single instructions. The search meets no NaN and no infinity, and the
    # sign of a zero, the one thing these may change, is never written (half_bits).
    *("-ffinite-math-only", "-fno-signed-zeros"),
)
"""Every flag but the processor's; none of them allows reassociation."""

_NO_PROGRAM = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOEXEC, errno.ENOTDIR})
_NO_SPACE = "No space left"
_COMPILER_SECONDS = 300.0

_NATIVE = (("-march=native",), ("-mcpu=native",), ())
_FUSED = ("__FMA__", "__FP_FAST_FMAF", "__aarch64__")  # without it fmaf is a slow call

SELF_TEST = "6e9f0dae9e4c9ce90d1ab66b96f14f3ef0bf58287c3b53ef58226aee7ae343ce"
"""SHA-256 of what `self_test` encodes; it changes together with ENCODER_VERSION and never otherwise."""

_TESTED_TYPES = (10, 11, 12, 13, 14, 8)
_TESTED_SHAPE = (40, 512)
_BYTES_PER_BLOCK = {8: 34, 10: 84, 11: 110, 12: 144, 13: 176, 14: 210}


class Unavailable(Exception):
    """Says in one line why this machine has no encoder of ours; never shown as an error by itself."""


@dataclass(frozen=True)
class _Compiler:
    """A C compiler with the flags it takes for this processor, and the digest of what they add up to."""

    path: str
    flags: tuple[str, ...]
    digest: str


def sources() -> tuple[Path, ...]:
    """Return the C files of the encoder: those to compile, and what they include."""
    return tuple(_FOLDER / name for name in _SOURCES)


def load() -> ctypes.CDLL:
    """Return the library, compiled now if this source, compiler and processor have none yet.

    Raises:
        Unavailable: there is no compiler, it fails, the processor has no fused multiply-add, or the
            library does not give the known bytes; the message is a line that says which.
    """
    found = attempt()
    if isinstance(found, Unavailable):
        raise found
    return found


@cache
def attempt() -> ctypes.CDLL | Unavailable:
    """Compile and check once for this process, and return the library or the reason why there is none."""
    try:
        compiler = _find_compiler()
        path = _cache_folder() / f"encoder-{compiler.digest[:24]}.so"
        if not path.exists():
            compile_library(compiler.path, compiler.flags, path)
        library = open_library(path)
    except Unavailable as reason:
        return reason
    found = self_test(library)
    if found != SELF_TEST:
        return Unavailable(f"{compiler.path} compiles the encoder to give other bytes ({found[:12]})")
    return library


def _find_compiler() -> _Compiler:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        path = shutil.which(name)
        if path is None:
            continue
        for native in _NATIVE:
            macros = _predefined(path, (*FLAGS, *native))
            if macros is None:
                continue
            if not any(f"#define {macro} " in macros for macro in _FUSED):
                raise Unavailable("this processor has no fused multiply-add, which the encoder needs")
            flags = (*FLAGS, *native)
            return _Compiler(path=path, flags=flags, digest=_digest(flags, macros))
    raise Unavailable("there is no C compiler (cc, gcc, clang, or the one that CC names)")


def _predefined(compiler: str, flags: Sequence[str]) -> str | None:
    """The macros that the compiler sets with these flags, or None where it refuses them."""
    command = [compiler, *flags, "-dM", "-E", "-x", "c", os.devnull]
    try:
        done = _run(command)
    except Unavailable:
        return None
    return done.stdout if done.returncode == 0 else None


def _digest(flags: Sequence[str], macros: str) -> str:
    digest = hashlib.sha256()
    for part in (*(path.read_bytes() for path in sources()), " ".join(flags).encode(), macros.encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _cache_folder() -> Path:
    """The user's cache, or a folder of this process alone where nothing can be kept there."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "cerebellum"
        files.DISK.make_folder(folder)
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="cerebellum-"))
    owned = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
    return folder if owned and os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="cerebellum-"))


def compile_library(compiler: str, flags: Sequence[str], out: Path) -> None:
    """Compile the encoder to `out`, whole or not at all, however many processes do so at once.

    Raises:
        Unavailable: the compiler fails; the message has its first line of complaint.
        BadInput: it cannot be started just now, or its result cannot be kept.
    """
    beside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    compiled = [str(path) for path in sources() if path.suffix == ".c"]
    command = [compiler, *flags, *compiled, "-o", str(beside), "-lm"]
    try:
        done = _run(command)
        complaint = next(iter(done.stderr.splitlines()), "it gave no reason")
        if done.returncode != 0 and _NO_SPACE in done.stderr:
            raise BadInput(f"{out.parent}: {compiler} finds the disk full; free space, or set XDG_CACHE_HOME")
        if done.returncode != 0:
            raise Unavailable(f"{compiler} cannot compile the encoder: {complaint}")
        files.DISK.replace(beside, out)
    except OSError as error:
        raise files.write_refusal(out, error) from error
    finally:
        with suppress(OSError):
            files.DISK.unlink(beside)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a compiler to its end.

    Raises:
        Unavailable: there is no such program, or it does not run on this system.
        BadInput: it cannot be started just now. A run that goes on without our encoder makes other bytes than it
            began with, so what may be well in a minute is never taken for a machine without a compiler.
    """
    try:
        return files.DISK.spawn(
            lambda: subprocess.run(command, capture_output=True, text=True, timeout=_COMPILER_SECONDS)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if isinstance(error, OSError) and error.errno in _NO_PROGRAM:
            raise Unavailable(f"{command[0]} cannot be run: {error.strerror}") from error
        raise BadInput(
            f"{command[0]}: cannot be started to compile the encoder ({error}); run again, or give --encoder ggml"
        ) from error


def open_library(path: Path) -> ctypes.CDLL:
    """Open a compiled encoder and give its functions their signatures.

    Raises:
        Unavailable: the file cannot be loaded, as where a cache was carried to another system.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from error
    pointer = ctypes.c_void_p
    i64 = ctypes.c_int64
    real = ctypes.c_double
    library.encode_rows.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, pointer]
    library.encode_rows.restype = ctypes.c_int
    library.decode_blocks.argtypes = [ctypes.c_int, pointer, i64, pointer]
    library.decode_blocks.restype = ctypes.c_int
    library.feed_back.argtypes = [ctypes.c_int, pointer, pointer, *[i64] * 4, pointer]
    library.feed_back.restype = ctypes.c_int
    library.feed_back_iq.argtypes = [ctypes.c_int, pointer, pointer, pointer, *[i64] * 4, pointer]
    library.feed_back_iq.restype = ctypes.c_int
    library.project.argtypes = [pointer, pointer, pointer, i64, i64, i64, pointer]
    library.project.restype = None
    library.rescale.argtypes = [pointer, *[i64] * 4, pointer, i64, real, real, real]
    library.rescale.restype = None
    return library


def self_test(library: ctypes.CDLL) -> str:
    """Return the SHA-256 of a fixed set of rows in every type, with importance and without, and fed back.

    The rows come from integers alone, so that no generator of random numbers has a say: heavy tails,
    a row of zeros, tiny rows, huge rows, and columns of importances that lie 2^16 apart.
    """
    rows, columns = _TESTED_SHAPE
    mixed = np.arange(3 * rows * columns, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(1 << 32)
    parts = (mixed.astype(np.float64) / 2.0**32 - 0.5).reshape(3, rows, columns)
    values = (parts[0] + 8 * parts[1] ** 3 * parts[2]).astype(np.float32)
    values *= np.exp2(np.arange(rows) % 8 * 6.0 - 24.0).astype(np.float32)[:, None]
    values[5] = 0.0
    importance = np.exp2(np.floor(32 * parts[0, 0])).astype(np.float32)
    near = np.exp2(-np.abs(np.arange(256)[:, None] - np.arange(256))).astype(np.float32)
    moments = np.stack([near, 3 * near])
    sizes = (rows, columns, 256, 3)
    digest = hashlib.sha256()
    for kind in _TESTED_TYPES:
        for weights in (importance.ctypes.data, None):
            blocks = rows * columns // (32 if kind == 8 else 256)
            out = np.zeros(blocks * _BYTES_PER_BLOCK[kind], np.uint8)
            library.encode_rows(kind, values.ctypes.data, weights, rows, columns, out.ctypes.data)
            digest.update(out.tobytes())
            library.feed_back(kind, values.ctypes.data, moments.ctypes.data, *sizes, out.ctypes.data)
            digest.update(out.tobytes())
    for iq in sorted(TABLED):
        codes = _made_up_blocks(iq, rows, columns)
        given = (table(iq).ctypes.data, values.ctypes.data, moments.ctypes.data)
        library.feed_back_iq(int(iq), *given, *sizes, codes.ctypes.data)
        digest.update(codes.tobytes())
    return digest.hexdigest()


def _made_up_blocks(kind: GGMLQuantizationType, rows: int, columns: int) -> NDArray[np.uint8]:
    """Blocks of any codes and scales, whose fp16 factors, at their beginning, fit the rows of `self_test`."""
    per_row = columns // block_size(kind)
    n_bytes = row_bytes(kind, block_size(kind))
    mixed = np.arange(rows * per_row * n_bytes, dtype=np.uint64) * np.uint64(2246822519) % np.uint64(1 << 32)
    blocks = (mixed >> np.uint64(24)).astype(np.uint8).reshape(rows, per_row, n_bytes)
    factors = np.exp2(np.arange(rows) % 8 * 6.0 - 32.0).astype(np.float16)
    blocks[:, :, :2] = factors.view(np.uint8).reshape(rows, 1, 2)
    return blocks
