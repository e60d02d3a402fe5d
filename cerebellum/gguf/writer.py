"""Writes a GGUF v3 file, streamed, whole or not there, with its size known beforehand.

Metadata is given as raw records, so what is copied from another file is copied as bytes. The layout is
llama.cpp's and gguf-py's: the header, padding, then every tensor padded to the alignment, the last one too.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from cerebellum.errors import BadInput
from cerebellum.files import atomic_writer
from cerebellum.gguf.reader import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_NAME_BYTES,
    U32,
    U64,
    decode_record,
    record_key,
)
from cerebellum.gguf.types import tensor_bytes

WRITTEN_VERSION = 3

_INTEGERS = {GGUFValueType.UINT16: "<H", GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i"}
"""How ``struct`` packs the integer types that Cerebellum writes."""

Chunk = bytes | bytearray | memoryview | npt.NDArray[np.generic]


class TensorMeta(Protocol):
    """Describes what the header needs of a tensor; TensorInfo and TensorSource both have it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type(self) -> GGMLQuantizationType: ...


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Describes a tensor to write: `chunks()` yields its bytes in order, in pieces of any size.

    ``shape`` is in ggml's order. The bytes are asked for once, while the file is written, so that memory
    holds one piece at a time.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    chunks: Callable[[], Iterable[Chunk]]


def encode_kv(key: str, value: str | int | Sequence[str], value_type: GGUFValueType) -> bytes:
    """Returns the bytes of one metadata record: a string, a whole number or a list of strings.

    These are all that Cerebellum writes of its own; every other record is copied from a file as bytes.
    Numbers are UINT16, UINT32 or INT32; an ARRAY holds strings.

    Raises:
        BadInput: the key is empty, or the value cannot be stored as that type.
    """
    if not key:
        raise BadInput("a GGUF metadata key is empty; give it a name")
    try:
        payload = _encode_value(value, value_type)
    except (TypeError, ValueError, struct.error) as error:
        raise BadInput(
            f"metadata key {key!r}: cannot be stored as {value_type.name} ({error}); "
            f"give another value or type"
        ) from error
    return _encode_string(key) + U32.pack(value_type) + payload


def gguf_size(
    kv_records: Sequence[bytes],
    tensors: Sequence[TensorMeta],
    alignment: int = DEFAULT_ALIGNMENT,
) -> int:
    """Returns the exact size in bytes of the file that `write_gguf` would write, without writing it."""
    n_header = 24 + sum(len(record) for record in kv_records)
    n_header += sum(8 + len(t.name.encode("utf-8")) + 4 + 8 * len(t.shape) + 4 + 8 for t in tensors)
    return _padded(n_header, alignment) + sum(
        _padded(tensor_bytes(t.type, t.shape), alignment) for t in tensors
    )


def write_gguf(
    path: str | os.PathLike[str],
    kv_records: Sequence[bytes],
    tensors: Sequence[TensorSource],
    alignment: int = DEFAULT_ALIGNMENT,
    tee: Callable[[bytes | memoryview], object] | None = None,
) -> int:
    """Writes a GGUF v3 file and returns its size in bytes; memory stays at one chunk.

    ``tee`` is given every byte in order as it is written, so that a hash needs no second reading.

    The file is written beside under a name that cannot be guessed, and renamed when it is whole and on the disk. On any
    failure, an interrupt included, the partial file is removed and an older `path` stays as it was.

    Raises:
        BadInput: the disk is full, the folder cannot be written, or a tensor gives more or fewer bytes than
            its type and shape take.
    """
    _check_records(kv_records, alignment)
    header = encode_header(kv_records, tensors, alignment)
    n_bytes = gguf_size(kv_records, tensors, alignment)
    with atomic_writer(path, n_bytes) as stream:

        def write(part: bytes | memoryview) -> None:
            stream.write(part)
            if tee is not None:
                tee(part)

        write(header)
        for tensor in tensors:
            _write_tensor(write, tensor, alignment)
    return n_bytes


def encode_header(
    kv_records: Sequence[bytes],
    tensors: Sequence[TensorMeta],
    alignment: int = DEFAULT_ALIGNMENT,
) -> bytes:
    """Returns everything before the first tensor's bytes, padded to the alignment."""
    parts = [MAGIC, U32.pack(WRITTEN_VERSION), U64.pack(len(tensors)), U64.pack(len(kv_records))]
    parts.extend(kv_records)
    offset = 0
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise BadInput(f"tensor {tensor.name!r} is given twice; give it once")
        names.add(tensor.name)
        parts.append(_encode_tensor_entry(tensor, offset))
        offset += _padded(tensor_bytes(tensor.type, tensor.shape), alignment)
    header = b"".join(parts)
    return header.ljust(_padded(len(header), alignment), b"\0")


def _encode_tensor_entry(tensor: TensorMeta, offset: int) -> bytes:
    name = tensor.name.encode("utf-8")
    if not 1 <= len(name) <= MAX_NAME_BYTES:
        raise BadInput(f"tensor name {tensor.name!a} has {len(name)} bytes; 1 to 63 fit")
    if not 1 <= len(tensor.shape) <= MAX_DIMS or min(tensor.shape) < 1:
        raise BadInput(f"tensor {tensor.name!a} has shape {tensor.shape}; 1 to 4 sizes above 0 fit")
    dims = b"".join(U64.pack(n) for n in tensor.shape)
    return b"".join(
        (
            U64.pack(len(name)),
            name,
            U32.pack(len(tensor.shape)),
            dims,
            U32.pack(tensor.type),
            U64.pack(offset),
        )
    )


def _write_tensor(write: Callable[[bytes | memoryview], None], tensor: TensorSource, alignment: int) -> None:
    """Writes one tensor and its padding, and refuses bytes that are not exactly its size."""
    n_expected = tensor_bytes(tensor.type, tensor.shape)
    n_written = 0
    for chunk in tensor.chunks():
        view = _byte_view(chunk)
        n_written += view.nbytes
        if n_written > n_expected:
            break
        write(view)
    if n_written != n_expected:
        trouble = "more" if n_written > n_expected else f"only {n_written:,} bytes"
        raise BadInput(
            f"tensor {tensor.name!r} gave {trouble} where {tensor.type.name} {tensor.shape} takes "
            f"{n_expected:,} bytes; the file was not written"
        )
    write(bytes(_padded(n_expected, alignment) - n_expected))


def _byte_view(chunk: Chunk) -> memoryview:
    """Returns a chunk's bytes, without copying them where the chunk is contiguous."""
    if isinstance(chunk, np.ndarray):
        return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
    return memoryview(chunk).cast("B")


def _check_records(kv_records: Sequence[bytes], alignment: int) -> None:
    """Refuses keys that are given twice and an alignment that the metadata denies."""
    if alignment < 8 or alignment & (alignment - 1):
        raise BadInput(f"alignment {alignment} is not a power of two of at least 8; use 32")
    recorded = DEFAULT_ALIGNMENT
    keys: set[str] = set()
    for record in kv_records:
        key = record_key(record)
        if key in keys:
            raise BadInput(f"metadata key {key!r} is given twice; give it once")
        keys.add(key)
        if key == ALIGNMENT_KEY:
            recorded = decode_record(record)
    if recorded != alignment:
        raise BadInput(
            f"the metadata says alignment {recorded} and {alignment} was asked for; make them agree"
        )


def _encode_value(value: str | int | Sequence[str], value_type: GGUFValueType) -> bytes:
    """Returns a value without its key and type; TypeError where the two do not go together."""
    if value_type == GGUFValueType.STRING and isinstance(value, str):
        return _encode_string(value)
    if value_type in _INTEGERS and isinstance(value, int):
        return struct.pack(_INTEGERS[value_type], value)
    if value_type == GGUFValueType.ARRAY and not isinstance(value, str | int):
        strings = b"".join(_encode_string(item) for item in value)
        return U32.pack(GGUFValueType.STRING) + U64.pack(len(value)) + strings
    raise TypeError(f"{type(value).__name__} values are not {value_type.name}")


def _encode_string(value: str) -> bytes:
    """Returns the length in bytes as a uint64, then the UTF-8; TypeError for what is no string."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} values are no strings")
    raw = value.encode("utf-8")
    return U64.pack(len(raw)) + raw


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
