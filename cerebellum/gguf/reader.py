"""Reads the header of a GGUF file that may be huge, damaged or hostile, and its tensors on demand.

gguf-py's GGUFReader turns every vocabulary entry into numpy parts, which takes seconds on a large vocabulary,
and trusts the counts it reads. This parser walks the header once over a memory map, keeps each key-value
record as the bytes it is, and believes no number before it has been compared with what the file holds.
Whatever is wrong is one `BadInput` of one line. Accepted is what llama.cpp accepts (ggml/src/gguf.cpp): GGUF
2 and 3, little-endian, no arrays of arrays, tensors one after the other at the file's alignment.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from cerebellum.errors import BadInput
from cerebellum.files import read_refusal
from cerebellum.gguf.types import block_size, fits, tensor_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

# Far above any model (a vocabulary of 250,000 with merges is 12 MB; the largest models have some
# 3,000 tensors), and low enough that a hostile file is refused in seconds and in little memory.
MAX_HEADER_BYTES = 128 << 20
MAX_RECORDS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_KEY_BYTES = 1 << 16
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the closing zero
MAX_DIMS = 4
MAX_INT64 = (1 << 63) - 1

MIN_RECORD_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

DAMAGED = "the file is damaged or incomplete: download or convert it again"

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")

SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
"""The numpy dtype of every value type of fixed width."""

_WIDTHS: dict[int, int] = {int(value_type): np.dtype(code).itemsize for value_type, code in SCALARS.items()}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Describes one tensor of the header.

    ``shape`` is in ggml's order, so the row length comes first; ``offset`` counts bytes from the file's start
    and ``n_bytes`` is the size without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int
    n_elements: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """Holds a GGUF file's header, and gives its tensors' bytes on demand.

    `kv_records` maps each key to its whole record as it lies in the file (key length, key, type, value),
    because what is not understood is copied as bytes and never rewritten. `data_start` and `n_bytes` are in
    bytes.
    """

    path: Path
    version: int
    alignment: int
    kv_records: dict[str, bytes]
    tensors: tuple[TensorInfo, ...]
    data_start: int
    n_bytes: int

    def value(self, key: str, default: Any = None) -> Any:
        """Returns a key's value, decoded: a Python scalar, a str, a list of str, or a numpy array.

        ``default`` is returned for a key that the file lacks. Bytes that are no UTF-8 come back with U+FFFD,
        because byte-level vocabularies have such tokens.
        """
        record = self.kv_records.get(key)
        return default if record is None else decode_record(record)

    def tensor(self, name: str) -> TensorInfo:
        """Returns the header's entry of the tensor called `name`.

        Raises:
            BadInput: there is no such tensor in this file.
        """
        found = self._by_name.get(name)
        if found is None:
            raise BadInput(f"{self.path}: has no tensor {_shown(name)}; see `cerebellum inspect`")
        return found

    def data(self, tensor: TensorInfo | str) -> npt.NDArray[np.uint8]:
        """Returns a tensor's bytes as a read-only view into the file, so nothing is copied or loaded yet.

        Raises:
            BadInput: the file is gone or has another size than when its header was read.
        """
        info = self.tensor(tensor) if isinstance(tensor, str) else tensor
        return np.frombuffer(self._map, dtype=np.uint8, count=info.n_bytes, offset=info.offset)

    @cached_property
    def header_sha256(self) -> str:
        """Returns the SHA-256, in hex, of everything before the first tensor's bytes."""
        return hashlib.sha256(memoryview(self._map)[: self.data_start]).hexdigest()

    @cached_property
    def _by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def _map(self) -> mmap.mmap:
        opened = _open_map(self.path)
        if len(opened) != self.n_bytes:
            raise BadInput(
                f"{self.path}: was {self.n_bytes:,} bytes and is now {len(opened):,}; "
                f"something is writing it: wait for that, then start again"
            )
        return opened


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Reads a GGUF file's header and checks that every tensor lies inside the file.

    Raises:
        BadInput: the file cannot be read, is no GGUF, or is damaged; one line says which and where.
    """
    where = Path(path)
    header = _Header(where, _open_map(where))
    version, n_tensors, n_records = _read_preamble(header)
    records = _read_records(header, n_records)
    alignment = _read_alignment(where, records)
    entries = _read_tensor_entries(header, n_tensors)
    n_file = len(header.buffer)
    data_start = -(-header.position // alignment) * alignment
    if not entries:
        data_start = min(data_start, n_file)
    return GgufFile(
        path=where,
        version=version,
        alignment=alignment,
        kv_records=records,
        tensors=_place_tensors(where, entries, data_start, alignment, n_file),
        data_start=data_start,
        n_bytes=n_file,
    )


def record_key(record: bytes) -> str:
    """Returns the key of a key-value record without decoding its value."""
    (n_key,) = U64.unpack_from(record, 0)
    return record[8 : 8 + n_key].decode("utf-8")


def decode_record(record: bytes) -> Any:
    """Returns the value of a record that `read_gguf` or `encode_kv` made, typed as by `GgufFile.value`."""
    (n_key,) = U64.unpack_from(record, 0)
    start = 8 + n_key
    value_type = GGUFValueType(U32.unpack_from(record, start)[0])
    start += 4
    if value_type == GGUFValueType.STRING:
        return record[start + 8 :].decode("utf-8", errors="replace")
    if value_type != GGUFValueType.ARRAY:
        scalar = np.frombuffer(record, dtype=SCALARS[value_type], count=1, offset=start)[0].item()
        return bool(scalar) if value_type == GGUFValueType.BOOL else scalar
    item = GGUFValueType(U32.unpack_from(record, start)[0])
    (n_items,) = U64.unpack_from(record, start + 4)
    start += 12
    if item == GGUFValueType.STRING:
        return _decode_strings(record, start, n_items)
    items = np.frombuffer(record, dtype=SCALARS[item], count=n_items, offset=start)
    return items.astype(np.bool_) if item == GGUFValueType.BOOL else items


def _decode_strings(record: bytes, start: int, n_items: int) -> list[str]:
    strings = []
    for _ in range(n_items):
        (n_string,) = U64.unpack_from(record, start)
        start += 8
        strings.append(record[start : start + n_string].decode("utf-8", errors="replace"))
        start += n_string
    return strings


class _Header:
    """Remembers where the walk through the header is and how far it may go, and refuses to go further."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.position = 0
        self.limit = min(len(buffer), MAX_HEADER_BYTES)

    def refuse(self, trouble: str, remedy: str = DAMAGED) -> NoReturn:
        """Raises BadInput with the one line that names this file, what is wrong with it and the remedy."""
        raise BadInput(f"{self.path}: {trouble}; {remedy}")

    def claim(self, n_bytes: int, what: str) -> int:
        """Steps over `n_bytes` and returns where they start, or refuses if they are not there."""
        start = self.position
        if n_bytes > self.limit - start:
            self.refuse_short(n_bytes, what)
        self.position = start + n_bytes
        return start

    def refuse_short(self, n_bytes: int, what: str) -> NoReturn:
        """Says that `n_bytes` from here run past the end, either of the file or of what a header may take."""
        if self.limit < len(self.buffer):
            self.refuse(
                f"the header goes past {MAX_HEADER_BYTES:,} bytes in {what} "
                f"({n_bytes:,} bytes from byte {self.position:,})"
            )
        self.refuse(
            f"the file is cut off in {what}: {n_bytes:,} bytes from byte {self.position:,} on, "
            f"and the file ends at {self.limit:,}"
        )

    def u32(self, what: str) -> int:
        value: int = U32.unpack_from(self.buffer, self.claim(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = U64.unpack_from(self.buffer, self.claim(8, what))[0]
        return value

    def name(self, what: str, max_bytes: int) -> str:
        """Reads a key or a tensor name, which must be short, valid UTF-8 and free of control characters."""
        n_bytes = self.u64(f"the length of {what}'s name")
        if n_bytes == 0:
            self.refuse(f"{what} has an empty name")
        if n_bytes > max_bytes:
            self.refuse(f"{what} has a name of {n_bytes:,} bytes (at most {max_bytes:,})")
        start = self.claim(n_bytes, f"the name of {what}")
        raw = self.buffer[start : self.position]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} has a name that is not UTF-8: {raw[:40]!a}")
        if any(ord(character) < 32 for character in text):
            self.refuse(f"{what} has control characters in its name {_shown(text)}")
        return text


def _open_map(path: Path) -> mmap.mmap:
    """Maps a regular, non-empty file for reading; a pipe or a device would hang or lie about its size."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            found = "a folder" if path.is_dir() else "not a regular file"
            raise BadInput(f"{path}: is {found}; name a GGUF file")
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise BadInput(f"{path}: is empty; {DAMAGED}")
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise read_refusal(path, error) from error
    except ValueError as error:  # a zero byte in the path; a file emptied between stat and map
        raise BadInput(f"{path}: cannot be read ({error}); check the path") from error


def _read_preamble(header: _Header) -> tuple[int, int, int]:
    """Returns the version, the number of tensors and the number of records, all of them plausible."""
    magic = header.buffer[:4]
    if magic != MAGIC:
        header.refuse(
            f"is not a GGUF file (it starts with {magic!a}, not b'GGUF')",
            "name a GGUF, or convert the model with convert_hf_to_gguf.py",
        )
    header.position = 4
    version = header.u32("the version")
    if version & 0xFFFF == 0 and version != 0:
        header.refuse("is a big-endian GGUF", "convert it with gguf-convert-endian FILE little")
    if version not in VERSIONS:
        header.refuse(
            f"is GGUF version {version}; versions 2 and 3 can be read",
            "convert the model again with a current llama.cpp",
        )
    n_tensors = header.u64("the number of tensors")
    n_records = header.u64("the number of metadata keys")
    n_left = header.limit - header.position
    if n_records > min(MAX_RECORDS, n_left // MIN_RECORD_BYTES):
        header.refuse(f"claims {n_records:,} metadata keys, more than it can hold")
    if n_tensors > min(MAX_TENSORS, n_left // MIN_TENSOR_BYTES):
        header.refuse(f"claims {n_tensors:,} tensors, more than it can hold")
    return version, n_tensors, n_records


def _read_records(header: _Header, n_records: int) -> dict[str, bytes]:
    """Walks the key-value records and keeps the bytes of each under its key."""
    records: dict[str, bytes] = {}
    for index in range(n_records):
        start = header.position
        key = header.name(f"metadata key {index}", MAX_KEY_BYTES)
        if key in records:
            header.refuse(f"has the metadata key {_shown(key)} twice")
        _skip_value(header, _shown(key))
        records[key] = header.buffer[start : header.position]
    return records


def _skip_value(header: _Header, key: str) -> None:
    """Steps over one value and checks that all of it is there."""
    value_type = header.u32(f"the type of {key}")
    if value_type == GGUFValueType.STRING:
        header.claim(header.u64(f"the length of {key}"), f"the text of {key}")
    elif value_type == GGUFValueType.ARRAY:
        _skip_array(header, key)
    elif value_type in _WIDTHS:
        header.claim(_WIDTHS[value_type], f"the value of {key}")
    else:
        header.refuse(f"the metadata key {key} has the unknown value type {value_type}")


def _skip_array(header: _Header, key: str) -> None:
    """Steps over an array: in one go where its items have one width, string by string where they do not."""
    item_type = header.u32(f"the item type of {key}")
    n_items = header.u64(f"the number of items of {key}")
    if item_type == GGUFValueType.ARRAY:
        header.refuse(
            f"the metadata key {key} is an array of arrays, which llama.cpp cannot read",
            "convert the model again without that key",
        )
    if item_type in _WIDTHS:
        header.claim(n_items * _WIDTHS[item_type], f"the {n_items:,} items of {key}")
    elif item_type == GGUFValueType.STRING:
        if n_items > (header.limit - header.position) // 8:
            header.refuse_short(n_items * 8, f"the {n_items:,} strings of {key}")
        _skip_strings(header, n_items, key)
    else:
        header.refuse(f"the metadata key {key} is an array of the unknown type {item_type}")


def _skip_strings(header: _Header, n_items: int, key: str) -> None:
    """Steps over `n_items` strings; this is the loop that large vocabularies make hot."""
    buffer = header.buffer
    position = header.position
    last = header.limit - 8
    unpack = U64.unpack_from
    for _ in range(n_items):
        if position > last:
            break
        position += 8 + unpack(buffer, position)[0]
    else:
        if position <= header.limit:
            header.position = position
            return
    header.refuse_short(position - header.position, f"the {n_items:,} strings of {key}")


def _read_alignment(path: Path, records: dict[str, bytes]) -> int:
    """Returns the alignment of tensor data in bytes: `general.alignment`, or 32 where it is not given."""
    record = records.get(ALIGNMENT_KEY)
    if record is None:
        return DEFAULT_ALIGNMENT
    (value_type,) = U32.unpack_from(record, 8 + len(ALIGNMENT_KEY))
    alignment = decode_record(record)
    if value_type != GGUFValueType.UINT32:
        raise BadInput(f"{path}: {ALIGNMENT_KEY} is not a uint32; {DAMAGED}")
    if alignment < 8 or alignment & (alignment - 1):
        raise BadInput(f"{path}: {ALIGNMENT_KEY} is {alignment}, not a power of two of at least 8; {DAMAGED}")
    return int(alignment)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Holds a tensor's line in the header before its place in the file has been checked."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    relative_offset: int


def _read_tensor_entries(header: _Header, n_tensors: int) -> list[_Entry]:
    """Walks the tensor entries and checks each one's name, shape and type."""
    entries: list[_Entry] = []
    names: set[str] = set()
    for index in range(n_tensors):
        name = header.name(f"tensor {index}", MAX_NAME_BYTES)
        if name in names:
            header.refuse(f"has the tensor {_shown(name)} twice")
        names.add(name)
        shape = _read_shape(header, name)
        entries.append(
            _Entry(
                name=name,
                shape=shape,
                type=_read_type(header, name, shape),
                relative_offset=header.u64(f"the offset of tensor {_shown(name)}"),
            )
        )
    return entries


def _read_shape(header: _Header, name: str) -> tuple[int, ...]:
    n_dims = header.u32(f"the shape of tensor {_shown(name)}")
    if not 1 <= n_dims <= MAX_DIMS:
        header.refuse(f"tensor {_shown(name)} has {n_dims:,} dimensions (1 to {MAX_DIMS} fit)")
    shape = tuple(header.u64(f"the shape of tensor {_shown(name)}") for _ in range(n_dims))
    if 0 in shape:
        header.refuse(f"tensor {_shown(name)} has a dimension of zero: {_shape_text(shape)}")
    if math.prod(shape) > MAX_INT64:
        header.refuse(f"tensor {_shown(name)} has too many elements to count: {_shape_text(shape)}")
    return shape


def _read_type(header: _Header, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    number = header.u32(f"the type of tensor {_shown(name)}")
    try:
        type_ = GGMLQuantizationType(number)
    except ValueError:
        header.refuse(
            f"tensor {_shown(name)} has the unknown type {number}",
            "it is damaged, or newer than the gguf package: upgrade that or convert again",
        )
    if not fits(type_, shape):
        header.refuse(
            f"tensor {_shown(name)} has rows of {shape[0]:,}, not a multiple of {type_.name}'s "
            f"block of {block_size(type_)}"
        )
    return type_


def _place_tensors(
    path: Path, entries: list[_Entry], data_start: int, alignment: int, n_file: int
) -> tuple[TensorInfo, ...]:
    """Gives every tensor its absolute place; tensors must follow one another, as llama.cpp requires."""
    placed: list[TensorInfo] = []
    expected = 0
    for entry in entries:
        offset = entry.relative_offset
        shown = _shown(entry.name)
        n_bytes = tensor_bytes(entry.type, entry.shape)
        if offset % alignment:
            trouble = f"tensor {shown} is misaligned: offset {offset:,}, alignment {alignment}"
            raise BadInput(f"{path}: {trouble}; {DAMAGED}")
        if offset < expected:
            trouble = f"tensor {shown} overlaps the one before it: offset {offset:,} < {expected:,}"
            raise BadInput(f"{path}: {trouble}; {DAMAGED}")
        if data_start + offset + n_bytes > n_file:
            trouble = (
                f"tensor {shown} goes past the end of the file: it ends at byte "
                f"{data_start + offset + n_bytes:,} and the file has {n_file:,}"
            )
            raise BadInput(f"{path}: {trouble}; {DAMAGED}")
        if offset > expected:
            trouble = f"there is a gap before tensor {shown}: offset {offset:,}, not {expected:,}"
            raise BadInput(f"{path}: {trouble}, which llama.cpp cannot read; {DAMAGED}")
        placed.append(
            TensorInfo(
                name=entry.name,
                shape=entry.shape,
                type=entry.type,
                offset=data_start + offset,
                n_bytes=n_bytes,
                n_elements=math.prod(entry.shape),
            )
        )
        expected = offset + -(-n_bytes // alignment) * alignment
    return tuple(placed)


def _shown(name: str) -> str:
    """Returns a name fit for a message: printable ASCII, quoted, and cut where it is long."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in shape)
