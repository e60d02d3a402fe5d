"""Makes the base: the uniform preset that everything is compared with, tensor by tensor."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput
from cerebellum.gguf import encode_kv, parse_preset, preset_label
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.settings import USUAL_BASE, Budget, Goal, Preset
from cerebellum.source import Source, open_source

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of llama.cpp
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


USUAL_PRESETS = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K"),
    *("IQ3_XXS", "IQ3_XS", "Q3_K_S", "IQ3_S", "IQ3_M", "Q3_K_M", "Q3_K_L"),
    *("IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
)
"""What sizes are named after, smallest first; all of them are among the labels that the Hub knows
(huggingface.js, packages/tasks/src/gguf.ts)."""


_SMALLER_BASES = ("Q2_K", "Q3_K_S", USUAL_BASE)


def base_for(goal: Goal) -> str:
    """Returns the base where nobody names one: the usual one, or for the size of one preset a smaller one that fits.

    Embeddings and output head stay at the base's types: those of a larger file would take bytes that a preset of this
    size spends on its layers. IQ presets are no bases, because their encoders take many times as long. Several sizes
    have one base, the usual one.
    """
    match goal:
        case Budget(sizes=(Preset(name=name),)) if name in USUAL_PRESETS:
            place = USUAL_PRESETS.index(name)
            fitting = [base for base in _SMALLER_BASES if USUAL_PRESETS.index(base) <= place]
            return fitting[-1] if fitting else _SMALLER_BASES[0]
        case _:
            return USUAL_BASE


@dataclass(frozen=True, kw_only=True)
class Base:
    """Describes the base: every tensor's base type, and the metadata of the file as raw records.

    ``label`` is the preset's name, such as Q3_K_M. ``alignment`` is the file's, in bytes. ``file`` holds the
    base's bytes where the user gave a finished one; without it they are quantized from the source.
    """

    label: str
    types: dict[str, GGMLQuantizationType]
    records: tuple[bytes, ...]
    alignment: int = 32
    file: Source | None = None


def preset_base(
    engine: Engine, source: Source, preset: str, matrix: ImportanceMatrix | None, *, has_imatrix: bool = True
) -> Base:
    """Returns the base that llama-quantize would make of ``source``: its types, fallbacks and metadata.

    Types depend on whether there is a matrix, not on what it holds, so that sizes can be asked for with
    ``has_imatrix`` and without a ``matrix``; the metadata then names none.
    """
    file_type = parse_preset(preset)
    types = engine.preset_types(
        source.path, file_type, has_imatrix=has_imatrix, allow_requantize=source.is_quantized
    )
    missing = set(source.tensors) - set(types)
    if missing:
        raise BadInput(
            f"{source.path}: llama.cpp gives no type for {sorted(missing)[0]}; is it of this model?"
        )
    records = preset_records(source, file_type, matrix)
    alignment = source.files[0].alignment
    return Base(label=preset_label(file_type), types=types, records=records, alignment=alignment)


def all_presets(engine: Engine, source: Source) -> dict[str, dict[str, GGMLQuantizationType]]:
    """Returns the types of every preset that llama.cpp can plan for this model, by its name; no weights are loaded."""
    found: dict[str, dict[str, GGMLQuantizationType]] = {}
    for name in (*USUAL_PRESETS, "IQ4_NL"):
        with suppress(BadInput):
            found[name] = preset_base(engine, source, name, None).types
    return found


def file_base(source: Source, path: Path) -> Base:
    """Returns a base that somebody made already; it must hold the tensors of ``source``, whatever their
    types.

    Raises BadInput where a tensor is missing, has another shape, or is not in the source.
    """
    file = open_source(path, allow_requantize=True)
    for name, tensor in source.tensors.items():
        other = file.tensors.get(name)
        if other is None or other.shape != tensor.shape:
            raise BadInput(f"{path}: its {name} is not the source's; give a base made from {source.path}")
    if file.value("general.quantization_version") is None:
        raise BadInput(
            f"{path}: is not quantized (it has no general.quantization_version); give a quantized base, or a "
            "preset with --base"
        )
    extra = set(file.tensors) - set(source.tensors)
    if extra:
        raise BadInput(f"{path}: {sorted(extra)[0]} is not in {source.path}; give a base made from it")
    records = tuple(record for key, record in file.files[0].kv_records.items() if key not in _SPLIT_KEYS)
    types = {name: tensor.type for name, tensor in file.tensors.items()}
    alignment = file.files[0].alignment
    return Base(label=_file_label(file), types=types, records=records, alignment=alignment, file=file)


def _file_label(file: Source) -> str:
    try:
        return preset_label(LlamaFileType(int(file.value("general.file_type", -1))))
    except ValueError:
        return "custom"


def preset_records(
    source: Source, file_type: LlamaFileType, matrix: ImportanceMatrix | None
) -> tuple[bytes, ...]:
    """Returns the source's metadata as raw records, with the keys that llama-quantize sets set as it sets
    them.
    """
    replaced = {
        "general.quantization_version": encode_kv(
            "general.quantization_version", _QUANTIZATION_VERSION, GGUFValueType.UINT32
        ),
        "general.file_type": encode_kv("general.file_type", int(file_type), GGUFValueType.UINT32),
        **(_imatrix_records(matrix) if matrix else {}),
    }
    kept = {
        key: record
        for key, record in source.files[0].kv_records.items()
        if key not in _SPLIT_KEYS and key not in replaced
    }
    return (*kept.values(), *replaced.values())


def _imatrix_records(matrix: ImportanceMatrix) -> dict[str, bytes]:
    """Returns llama-quantize's four keys that say where the importance matrix came from."""
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
