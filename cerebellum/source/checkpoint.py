"""A checkpoint: a folder of safetensors with its configuration, looked at before anything is made of it.

Only headers are read here. Pickles and program code that lie beside the tensors are never looked at, because
loading either runs what a stranger wrote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import msgspec

from cerebellum.errors import BadInput
from cerebellum.files import is_plain_name, read_refusal

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "*.safetensors"
_BESIDE = ("*.json", "*.txt", "*.jinja", "*.tiktoken", "*.model", "README.md")
_ANOTHER_LAYOUT = "consolidated*"
"""Mistral's own layout of the same weights; it is left out where Hugging Face's is there."""

_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format
_PRECISIONS = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes of a value; types of other widths have parts of a byte, and are left to the converter."""

_DEFAULT_PRECISION = "bf16"  # what a converter makes of weights in eight bits and less

_REPAIR = "download the checkpoint again"


class _Tensor(msgspec.Struct, frozen=True):
    """One entry of a safetensors header: its offsets count from the end of the header, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    """What of an index is needed: the file that each tensor lies in."""

    weight_map: dict[str, str]


class _Quantization(msgspec.Struct, frozen=True):
    """How a checkpoint was quantized before it came here."""

    quant_method: str = "unknown"


class _Config(msgspec.Struct, frozen=True):
    """What of config.json is needed here; the rest is for the converter."""

    quantization_config: _Quantization | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Describes the files that a converter gets to see, in the order of their names, weights among them.

    ``precision`` (f32, f16 or bf16) is the one that most weights have, so that converting loses nothing of
    them; ``n_bytes`` is about what the model takes at that precision. ``quantization`` names the method that the
    checkpoint was quantized by before, or is None.
    """

    folder: Path
    name: str
    files: tuple[Path, ...]
    precision: str
    n_bytes: int
    quantization: str | None


def open_checkpoint(folder: Path, name: str = "") -> Checkpoint:
    """Looks at a folder of safetensors; ``name`` is the model's where it is not the folder's.

    Raises:
        BadInput: the folder holds no checkpoint that can be converted, or one that is not whole.
    """
    names = _names_in(folder)
    _refuse_what_is_none(folder, names)
    weights = weight_files(names, _read(folder / INDEX) if INDEX in names else None, str(folder))
    found = _tensors(folder, weights)
    if INDEX in names:
        _check_index(folder, found)
    tensors = list(found.values())
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    precision = _precision(matrices or tensors)
    return Checkpoint(
        folder=folder,
        name=name or folder.resolve().name,
        files=tuple(folder / one for one in sorted({*weights, *beside(names)})),
        precision=precision,
        n_bytes=sum(math.prod(tensor.shape) for tensor in tensors) * _BYTES[precision],
        quantization=_quantization(folder / CONFIG),
    )


def beside(names: Iterable[str]) -> list[str]:
    """Returns the names of the small files that a converter reads: configuration, tokenizer, model card."""
    return [name for name in names if any(fnmatch(name, pattern) for pattern in _BESIDE)]


def weight_files(names: Iterable[str], index: bytes | None, where: str) -> list[str]:
    """Returns the names of the files with weights: those that the index names, or all that there are.

    Raises BadInput where there is none, where one that is named is missing, or where the index leads elsewhere.
    """
    there = sorted(name for name in names if fnmatch(name, WEIGHTS))
    if index is not None:
        wanted = sorted(set(_weight_map(index, where).values()))
    else:
        usual = [name for name in there if not fnmatch(name, _ANOTHER_LAYOUT)]
        wanted = usual or there
    strange = [name for name in wanted if not (is_plain_name(name) and fnmatch(name, WEIGHTS))]
    if strange:
        raise BadInput(f"{where}: its {INDEX} names {strange[0]!a}, which is no file of it; do not trust it")
    missing = sorted(set(wanted) - set(there))
    if missing:
        raise BadInput(f"{where}: lacks {missing[0]} and has {len(there)} of {len(wanted)} files; {_REPAIR}")
    if not wanted:
        raise BadInput(f"{where}: has no safetensors; give a repository or a folder that has")
    return wanted


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({error.strerror}); check the path") from error


def _refuse_what_is_none(folder: Path, names: list[str]) -> None:
    """Raises BadInput that says what the folder holds instead, and what to give."""
    models = [name for name in names if name.endswith(".gguf")]
    if "adapter_config.json" in names:
        raise BadInput(f"{folder}: is an adapter; merge it into its model and give the merged checkpoint")
    if any(fnmatch(name, WEIGHTS) for name in names):
        if CONFIG not in names:
            raise BadInput(f"{folder}: has safetensors but no {CONFIG}; {_REPAIR}")
        return
    if models:
        raise BadInput(f"{folder}: is a folder of GGUF files; give one of them, such as {folder / models[0]}")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise BadInput(
            f"{folder}: has pickles and no safetensors; a pickle runs programs when it is loaded, so save the "
            "model as safetensors first"
        )
    raise BadInput(f"{folder}: is a folder without safetensors; give a GGUF, or a folder of a checkpoint")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise read_refusal(path, error) from error


def _weight_map(index: bytes, where: str) -> Mapping[str, str]:
    try:
        return msgspec.json.decode(index, type=_Index).weight_map
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadInput(f"{where}: its {INDEX} cannot be read ({error}); {_REPAIR}") from error


def _tensors(folder: Path, weights: Iterable[str]) -> dict[str, _Tensor]:
    """Returns what the files say they hold, by name; BadInput where two of them hold a tensor of one name."""
    found: dict[str, _Tensor] = {}
    for weight in weights:
        held = _header(folder / weight)
        twice = found.keys() & held.keys()
        if twice:
            raise BadInput(f"{folder / weight}: {min(twice)!a} is in another file, too; {_REPAIR}")
        found |= held
    return found


def _check_index(folder: Path, found: Mapping[str, _Tensor]) -> None:
    """Raises BadInput where the index names a tensor that no file holds: a model would be made without it."""
    missing = _weight_map(_read(folder / INDEX), str(folder)).keys() - found.keys()
    if missing:
        raise BadInput(f"{folder}: no file holds {min(missing)!a}, which its {INDEX} names; {_REPAIR}")


def _header(path: Path) -> dict[str, _Tensor]:
    """Returns what a safetensors file says it holds; BadInput where the file is not just as long as that.

    The layout is eight bytes with the header's length, the header as JSON, then the tensors' bytes, without holes
    (huggingface.co/docs/safetensors).
    """
    try:
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            n_file = path.stat().st_size
            if not 2 <= n_header <= min(_LARGEST_HEADER, n_file - 8):
                raise BadInput(f"{path}: is damaged or no safetensors file; {_REPAIR}")
            raw = file.read(n_header)
    except OSError as error:
        raise read_refusal(path, error) from error
    try:
        entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        tensors = {
            name: msgspec.json.decode(entry, type=_Tensor)
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadInput(f"{path}: its header cannot be read ({error}); {_REPAIR}") from error
    end = 8 + n_header + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if n_file != end:
        raise BadInput(f"{path}: has {n_file:,} of {end:,} bytes; {_REPAIR}")
    _check_places(path, tensors)
    return tensors


def _check_places(path: Path, tensors: Mapping[str, _Tensor]) -> None:
    """Raises BadInput where tensors overlap, leave holes, or have not as many bytes as their shapes take."""
    start = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        first, last = tensor.data_offsets
        width = _WIDTHS.get(tensor.dtype)
        wanted = last - first if width is None else math.prod(tensor.shape) * width
        if first != start or last < first or min(tensor.shape, default=0) < 0 or last - first != wanted:
            raise BadInput(
                f"{path}: {name!a} is said to be {tensor.dtype} of {list(tensor.shape)} at bytes {first} to {last}, "
                f"and {start} is where it must begin and {max(wanted, 0)} are its bytes; {_REPAIR}"
            )
        start = last


def _precision(tensors: Iterable[_Tensor]) -> str:
    """Returns the converter's name of the precision that most weights have."""
    counted: Counter[str] = Counter()
    for tensor in tensors:
        counted[_PRECISIONS.get(tensor.dtype, _DEFAULT_PRECISION)] += math.prod(tensor.shape)
    return counted.most_common(1)[0][0] if counted else _DEFAULT_PRECISION


def _quantization(path: Path) -> str | None:
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_Config)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OSError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); {_REPAIR}") from error
    return config.quantization_config.quant_method if config.quantization_config else None
