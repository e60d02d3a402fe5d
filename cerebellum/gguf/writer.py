"""Records and tensors -> a GGUF v3 file, streamed, whole or not there, its size known beforehand.

Metadata is given as raw records, so what is copied from another file is copied as bytes. The layout
is llama.cpp's and gguf-py's: header, padding, then every tensor padded to the alignment, the last
one too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from cerebellum.errors import BadInput
from cerebellum.files import atomic_writer
from cerebellum.gguf.reader import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_NAME_BYTES,
    SCALARS,
    U32,
    U64,
    decode_record,
    record_key,
)
from cerebellum.gguf.types import tensor_bytes

WRITTEN_VERSION = 3

Chunk = bytes | bytearray | memoryview | np.ndarray[Any, Any]


class TensorMeta(Protocol):
    """What the header needs of a tensor: TensorInfo and TensorSource both have it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type(self) -> GGMLQuantizationType: ...


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A tensor to write: `chunks()` yields its bytes in order, in pieces of any size."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    chunks: Callable[[], Iterable[Chunk]]


def encode_kv(
    key: str, value: Any, value_type: GGUFValueType, item_type: GGUFValueType | None = None
) -> bytes:
    """Return the bytes of one key-value record.

    For an ARRAY, `item_type` says what its items are; without it a numpy array keeps its dtype, and
    a list takes gguf-py's choice: STRING, BOOL, INT32 or FLOAT32 after its first item.

    Raises:
        BadInput: the value cannot be stored as that type.
    """
    encoded_key = key.encode("utf-8")
    if not encoded_key:
        raise BadInput("a GGUF metadata key is empty; give it a name")
    try:
        if value_type == GGUFValueType.ARRAY:
            payload = _encode_array(value, item_type)
        else:
            payload = _encode_scalar(value, value_type)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise BadInput(
            f"metadata key {key!r}: cannot be stored as {value_type.name} ({error}); "
            f"give another value or type"
        ) from error
    return U64.pack(len(encoded_key)) + encoded_key + U32.pack(value_type) + payload


def gguf_size(
    kv_records: Sequence[bytes],
    tensors: Sequence[TensorMeta],
    alignment: int = DEFAULT_ALIGNMENT,
) -> int:
    """Return the exact size in bytes of the file `write_gguf` would write, without writing it."""
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
) -> int:
    """Write a GGUF v3 file and return its size in bytes; memory stays at one chunk.

    The file is written beside as `<name>.partial` and renamed when it is whole and on the disk. On
    any failure, an interrupt included, the partial file is removed and an older `path` stays as it
    was.

    Raises:
        BadInput: the disk is full or the folder cannot be written; a name or shape is impossible;
            records repeat a key or contradict `alignment`; a tensor gave too many or too few bytes.
    """
    _check_records(kv_records, alignment)
    header = encode_header(kv_records, tensors, alignment)
    n_bytes = gguf_size(kv_records, tensors, alignment)
    with atomic_writer(path, n_bytes) as stream:
        stream.write(header)
        for tensor in tensors:
            _write_tensor(stream, tensor, alignment)
    return n_bytes


def encode_header(
    kv_records: Sequence[bytes],
    tensors: Sequence[TensorMeta],
    alignment: int = DEFAULT_ALIGNMENT,
) -> bytes:
    """Return everything before the first tensor's bytes, padding included.

    Raises:
        BadInput: a tensor's name or shape is impossible in a GGUF, or a name is there twice.
    """
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


def _write_tensor(stream: BinaryIO, tensor: TensorSource, alignment: int) -> None:
    """Write one tensor and its padding, and hold it to its size."""
    n_expected = tensor_bytes(tensor.type, tensor.shape)
    n_written = 0
    for chunk in tensor.chunks():
        view = _byte_view(chunk)
        n_written += view.nbytes
        if n_written > n_expected:
            break
        stream.write(view)
    if n_written != n_expected:
        trouble = "more" if n_written > n_expected else f"only {n_written:,} bytes"
        raise BadInput(
            f"tensor {tensor.name!r} gave {trouble} where {tensor.type.name} {tensor.shape} takes "
            f"{n_expected:,} bytes; the file was not written"
        )
    stream.write(bytes(_padded(n_expected, alignment) - n_expected))


def _byte_view(chunk: Chunk) -> memoryview:
    """Return a chunk's bytes without copying where it is contiguous."""
    if isinstance(chunk, np.ndarray):
        return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
    return memoryview(chunk).cast("B")


def _check_records(kv_records: Sequence[bytes], alignment: int) -> None:
    """Refuse keys that repeat and an alignment that the metadata denies."""
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


def _encode_scalar(value: Any, value_type: GGUFValueType) -> bytes:
    if value_type == GGUFValueType.STRING:
        return _encode_string(value)
    if value_type == GGUFValueType.BOOL:
        return bytes([bool(value)])
    return _numbers([value], value_type).tobytes()


def _encode_string(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode("utf-8")
    return U64.pack(len(raw)) + raw


def _encode_array(value: Any, item_type: GGUFValueType | None) -> bytes:
    kind = _item_type(value) if item_type is None else item_type
    if kind == GGUFValueType.ARRAY:
        raise ValueError("llama.cpp reads no arrays of arrays")
    head = U32.pack(kind) + U64.pack(len(value))
    if kind == GGUFValueType.STRING:
        return head + b"".join(map(_encode_string, value))
    if kind == GGUFValueType.BOOL:
        return head + np.asarray(value, dtype=np.bool_).tobytes()
    return head + _numbers(value, kind).tobytes()


def _numbers(values: Any, kind: GGUFValueType) -> np.ndarray[Any, Any]:
    """Return `values` as the type's dtype, refusing what the type cannot hold."""
    dtype = np.dtype(SCALARS[kind])
    given = np.asarray(values)
    if given.size == 0:
        return np.zeros(0, dtype)
    if given.dtype.kind == "f" and all(isinstance(value, int) for value in values):
        given = np.asarray(values, dtype=object)  # on both sides of 2**63, numpy makes them floats
    if given.dtype.kind not in "biufO" or (dtype.kind != "f" and given.dtype.kind == "f"):
        raise ValueError(f"{given.dtype} values are not {kind.name}")
    if dtype.kind != "f":
        bounds = np.iinfo(dtype)
        if int(given.min()) < bounds.min or int(given.max()) > bounds.max:
            raise ValueError(f"outside {bounds.min} to {bounds.max}")
    with np.errstate(over="raise"):
        try:
            return given.astype(dtype)
        except FloatingPointError as error:
            raise ValueError(str(error)) from error


def _item_type(value: Any) -> GGUFValueType:
    """Return the item type of an array given without one."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "b":
            return GGUFValueType.BOOL
        code = value.dtype.newbyteorder("<").str.replace("|", "<")
        for kind, scalar in SCALARS.items():
            if scalar == code:
                return kind
        raise ValueError(f"no GGUF type for {value.dtype}")
    return GGUFValueType.get_type(value[0]) if len(value) else GGUFValueType.INT32


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
