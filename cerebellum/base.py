"""The base: the uniform preset that everything is compared with, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from cerebellum.errors import BadInput
from cerebellum.gguf import encode_kv, tensor_bytes
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.llama.presets import parse_preset, preset_types
from cerebellum.source import Source, open_source

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of llama.cpp
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_PRESET_PREFIXES = ("MOSTLY_", "ALL_")


@dataclass(frozen=True, kw_only=True)
class Base:
    """``types``: every tensor's base type. ``file``: where its bytes lie if they were given."""

    label: str
    types: dict[str, GGMLQuantizationType]
    records: tuple[bytes, ...]
    alignment: int = 32
    file: Source | None = None

    def tensor_bytes(self, source: Source) -> int:
        """Bytes of all tensors at their base types, without metadata or padding."""
        return sum(tensor_bytes(kind, source.tensors[name].shape) for name, kind in self.types.items())


def preset_base(
    source: Source, preset: str, matrix: ImportanceMatrix | None, *, has_imatrix: bool | None = None
) -> Base:
    """The base that llama-quantize would make of ``source``: its types, fallbacks and metadata.

    ``has_imatrix`` stands in for a matrix when only sizes are asked for.
    """
    kind = parse_preset(preset)
    present = matrix is not None if has_imatrix is None else has_imatrix
    types = preset_types(source.path, kind, has_imatrix=present, allow_requantize=source.is_quantized)
    missing = set(source.tensors) - set(types)
    if missing:
        raise BadInput(
            f"{source.path}: llama.cpp gives no type for {sorted(missing)[0]}; is it of this model?"
        )
    records = preset_records(source, kind, matrix)
    alignment = source.files[0].alignment
    return Base(label=preset_label(kind), types=types, records=records, alignment=alignment)


def file_base(source: Source, path: Path) -> Base:
    """A base that somebody made already; it must hold the tensors of ``source``, whatever their types."""
    file = open_source(path, allow_requantize=True)
    for name, tensor in source.tensors.items():
        other = file.tensors.get(name)
        if other is None or other.shape != tensor.shape:
            raise BadInput(f"{path}: its {name} is not the source's; give a base made from {source.path}")
    extra = set(file.tensors) - set(source.tensors)
    if extra:
        raise BadInput(f"{path}: {sorted(extra)[0]} is not in {source.path}; give a base made from it")
    records = tuple(record for key, record in file.files[0].kv_records.items() if key not in _SPLIT_KEYS)
    types = {name: tensor.type for name, tensor in file.tensors.items()}
    alignment = file.files[0].alignment
    return Base(label=_file_label(file), types=types, records=records, alignment=alignment, file=file)


def preset_label(kind: LlamaFileType) -> str:
    """``Q3_K_M``: the quant label people and the Hub use in file names."""
    return kind.name.split("_", 1)[1] if kind.name.startswith(_PRESET_PREFIXES) else kind.name


def _file_label(file: Source) -> str:
    try:
        return preset_label(LlamaFileType(int(file.value("general.file_type", -1))))
    except ValueError:
        return "custom"


def preset_records(source: Source, kind: LlamaFileType, matrix: ImportanceMatrix | None) -> tuple[bytes, ...]:
    """The source's metadata as bytes, with the keys that llama-quantize sets set."""
    replaced = {
        "general.quantization_version": encode_kv(
            "general.quantization_version", _QUANTIZATION_VERSION, GGUFValueType.UINT32
        ),
        "general.file_type": encode_kv("general.file_type", int(kind), GGUFValueType.UINT32),
        **(_imatrix_records(matrix) if matrix else {}),
    }
    kept = {
        key: record
        for key, record in source.files[0].kv_records.items()
        if key not in _SPLIT_KEYS and key not in replaced
    }
    return (*kept.values(), *replaced.values())


def _imatrix_records(matrix: ImportanceMatrix) -> dict[str, bytes]:
    """llama-quantize's four keys on where the importance matrix came from."""
    text = {"file": matrix.path.name, "dataset": ", ".join(matrix.datasets)}
    numbers = {"entries_count": len(matrix.entries), "chunks_count": matrix.chunk_count}
    records = {}
    for name, value in text.items():
        key = f"quantize.imatrix.{name}"
        records[key] = encode_kv(key, value, GGUFValueType.STRING)
    for name, number in numbers.items():
        key = f"quantize.imatrix.{name}"
        records[key] = encode_kv(key, number, GGUFValueType.UINT32)
    return records
