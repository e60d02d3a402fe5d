"""Opens the source: the model that everything is made from, one GGUF or all of its splits.

Only a language model at full precision is a source. What is derived from one (an importance matrix, an
adapter, a vision projector, a vocabulary) is refused by name, and an already quantized model unless it was
asked for.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from cerebellum.errors import BadInput
from cerebellum.files import Progress, fingerprint_files, sha256_files
from cerebellum.gguf import GgufFile, TensorInfo, is_quantized, read_gguf

SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.DOTALL)
"""llama.cpp's names of split files, counted from 1 (`llama_split_path`)."""

Scalar = str | int | float | bool
"""What JSON has for one fact of a header."""

Metadata = Mapping[str, Scalar | list[Scalar]]
"""A header's short facts, fit for JSON; ``plain_metadata`` reads them."""

_MAX_TEXT = 2000  # characters of a text that are kept
_MAX_ITEMS = 1024  # a longer list is left out: the vocabulary's scores and types
TEMPLATE_KEY = "tokenizer.chat_template"

KNOWN_ARCHITECTURES = frozenset(MODEL_ARCH_NAMES.values()) - {MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ]}

NOT_A_MODEL = {
    "imatrix": "an importance matrix; give it with --imatrix",
    "adapter": "an adapter; merge it into its model and convert that",
    "mmproj": "a vision or audio projector; give the language model beside it",
    "clip": "a vision or audio projector; give the language model beside it",
}
"""Values of general.type and general.architecture that are no language model, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Describes the source model: metadata of its first file, tensors of all of its files, in file order.

    ``file_of`` maps a tensor's name to the file that holds it.
    """

    path: Path
    files: tuple[GgufFile, ...]
    architecture: str
    name: str
    tensors: dict[str, TensorInfo]
    file_of: dict[str, GgufFile]

    _hashed: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """Holds the content's hash once it was computed, because that reads every byte of the files."""

    def value(self, key: str, default: Any = None) -> Any:
        """Returns a metadata value, decoded as `GgufFile.value` does, or ``default`` where it is missing."""
        return self.files[0].value(key, default)

    def arch_value(self, suffix: str, default: Any = None) -> Any:
        """Returns the architecture's own value: `block_count` is read from `<arch>.block_count`."""
        return self.value(f"{self.architecture}.{suffix}", default)

    def read(self, tensor_name: str) -> npt.NDArray[np.uint8]:
        """Returns a tensor's bytes as a read-only view; nothing is loaded before it is touched.

        Raises:
            BadInput: there is no such tensor, or the file changed since its header was read.
        """
        return self.file_of.get(tensor_name, self.files[0]).data(tensor_name)

    @property
    def kv_records(self) -> dict[str, bytes]:
        """Returns the raw metadata records of the first file, `split.*` of a split source included."""
        return self.files[0].kv_records

    @property
    def paths(self) -> tuple[Path, ...]:
        """Returns the files, the one with the metadata first."""
        return tuple(file.path for file in self.files)

    @property
    def n_bytes(self) -> int:
        """Returns the size of all files together in bytes, headers and padding included."""
        return sum(file.n_bytes for file in self.files)

    @cached_property
    def is_quantized(self) -> bool:
        """Says whether any tensor is already in a block-quantized type, so that quantizing loses twice."""
        return any(is_quantized(tensor.type) for tensor in self.tensors.values())

    @cached_property
    def header_sha256(self) -> str:
        """Returns the SHA-256 of everything but the tensors' bytes.

        It is quick, and enough to know a file again by but not to prove it. Of a split model it is over the
        header hashes of its files, in order.
        """
        hashes = [file.header_sha256 for file in self.files]
        if len(hashes) == 1:
            return hashes[0]
        return hashlib.sha256("".join(hashes).encode("ascii")).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Names the content, every byte of it, for whoever has to know it again: quicker than ``sha256``."""
        return fingerprint_files(self.paths)

    def sha256(self, progress: Progress | None = None) -> str:
        """Returns the SHA-256 of the content (splits one after the other), reading it only once.

        ``progress`` hears of the bytes read so far, because a large model takes minutes.
        """
        if not self._hashed:
            self._hashed.append(sha256_files(self.paths, progress))
        return self._hashed[0]


def open_source(path: str | os.PathLike[str], allow_requantize: bool = False) -> Source:
    """Opens a model, with all of its splits when the first one is given.

    Raises:
        BadInput: it cannot be read, is damaged, is no language model that llama.cpp knows, lacks a
            split, or is already quantized and `allow_requantize` is not set.
    """
    first = read_gguf(path)
    files = _all_splits(first)  # before the architecture: only the first split has one
    architecture = _architecture(first)
    tensors, file_of = _merge_tensors(files)
    if not tensors:
        raise BadInput(f"{first.path}: has no tensors, only a vocabulary; give the whole model")
    source = Source(
        path=first.path,
        files=files,
        architecture=architecture,
        name=_text(first, "general.name") or first.path.stem,
        tensors=tensors,
        file_of=file_of,
    )
    if source.is_quantized and not allow_requantize:
        quantized = next(tensor for tensor in tensors.values() if is_quantized(tensor.type))
        raise BadInput(
            f"{first.path}: is already quantized ({quantized.name} is {quantized.type.name}); "
            f"give the F16, BF16 or F32 model, or add --allow-requantize and lose quality"
        )
    return source


_PROJECTED = ("clip.vision.projection_dim", "clip.audio.projection_dim")


def projectors_beside(source: Source) -> tuple[Path, ...]:
    """Returns the files ``mmproj*.gguf`` in the source's folder that project into this model's embeddings.

    A folder may hold several models. A projector whose width is another than the model's embeddings is another
    model's; so may be one that does not say its width, and it is left out too.
    """
    width = source.arch_value("embedding_length")
    if not isinstance(width, int):
        return ()
    found = []
    for path in sorted(source.path.parent.glob("*mmproj*.gguf")):
        try:
            file = read_gguf(path)
        except BadInput:
            continue
        is_projector = {file.value("general.type"), file.value("general.architecture")} & {"mmproj", "clip"}
        if is_projector and width in [file.value(key) for key in _PROJECTED]:
            found.append(path)
    return tuple(found)


def _architecture(file: GgufFile) -> str:
    """Returns the model's architecture and refuses what is no language model."""
    stated = _text(file, "general.type")
    architecture = _text(file, "general.architecture")
    for word in (stated, architecture):
        if word in NOT_A_MODEL:
            raise BadInput(f"{file.path}: is not a model but {NOT_A_MODEL[word]}")
    if architecture is None:
        raise BadInput(f"{file.path}: has no general.architecture; give a model llama.cpp runs")
    if architecture not in KNOWN_ARCHITECTURES:
        raise BadInput(
            f"{file.path}: has the unknown architecture {architecture!a}; "
            f"give a model that llama.cpp runs, or upgrade the gguf package if the model is newer"
        )
    return architecture


def _text(file: GgufFile, key: str) -> str | None:
    value = file.value(key)
    return value if isinstance(value, str) else None


def _split_number(file: GgufFile, key: str, default: int) -> int:
    """Returns a split counter; a value of another type is damage, not a number to guess at."""
    value = file.value(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadInput(f"{file.path}: {key} is no count; download or split the model again")
    return value


def _all_splits(first: GgufFile) -> tuple[GgufFile, ...]:
    """Returns the file and, where it is the first of several, all the files that follow it."""
    count = _split_number(first, "split.count", 1)
    if count <= 1:
        return (first,)
    match = SPLIT_NAME.match(first.path.name)
    if match is None or int(match["count"]) != count:
        raise BadInput(
            f"{first.path}: is one of {count} split files and its name does not end in "
            f"-00001-of-{count:05d}.gguf; rename the files to llama.cpp's pattern"
        )
    paths = split_paths(first.path.with_name(match["stem"]), count)
    if first.path.name != paths[0].name:
        raise BadInput(f"{first.path}: is not the first of its {count} files; give {paths[0]}")
    return (first, *(_read_split(path, number, count) for number, path in enumerate(paths[1:], 1)))


def split_paths(stem: Path, count: int) -> tuple[Path, ...]:
    """Returns the names that llama.cpp gives to the ``count`` splits of a model, ``stem`` being without `.gguf`."""
    numbers = range(1, count + 1)
    return tuple(stem.with_name(f"{stem.name}-{number:05d}-of-{count:05d}.gguf") for number in numbers)


def _read_split(path: Path, number: int, count: int) -> GgufFile:
    """Reads split `number` (from 0) of `count`, and checks that it says it is that one."""
    if not os.path.exists(path):
        raise BadInput(f"{path}: split {number + 1} of {count} is missing; put it with the rest")
    file = read_gguf(path)
    found = (_split_number(file, "split.no", 0), _split_number(file, "split.count", 1))
    if found != (number, count):
        raise BadInput(
            f"{path}: says it is split {found[0] + 1} of {found[1]}, not {number + 1} of {count}; "
            f"download or split the model again"
        )
    return file


def _merge_tensors(
    files: tuple[GgufFile, ...],
) -> tuple[dict[str, TensorInfo], dict[str, GgufFile]]:
    """Returns all tensors by name and the file each lies in, checked against split.tensors.count."""
    tensors: dict[str, TensorInfo] = {}
    file_of: dict[str, GgufFile] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in tensors:
                raise BadInput(
                    f"{file.path}: has {tensor.name!a}, which {file_of[tensor.name].path} has too; "
                    f"download or split the model again"
                )
            tensors[tensor.name] = tensor
            file_of[tensor.name] = file
    n_expected = _split_number(files[0], "split.tensors.count", len(tensors))
    if len(files) > 1 and n_expected != len(tensors):
        raise BadInput(
            f"{files[0].path}: its splits hold {len(tensors):,} tensors of {n_expected:,}; "
            f"download or split the model again"
        )
    return tensors, file_of


def plain_metadata(file: GgufFile) -> Metadata:
    """Returns the header's short facts: general.* and the architecture's own keys, fit for JSON.

    Long texts are cut, and long lists and numbers that are not finite are left out. Two facts are added:
    ``vocabulary``, the number of tokens, and ``chat_template``, whether there is one. The template itself is
    a program, so it is not kept and nothing here runs it.
    """
    architecture = file.value("general.architecture", "")
    prefixes = ("general.", f"{architecture}.", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    facts: dict[str, Scalar | list[Scalar]] = {}
    for key in file.kv_records:
        if key.startswith(prefixes) and (value := _plain_value(file.value(key))) is not None:
            facts[key] = value
    tokens = file.value("tokenizer.ggml.tokens", [])
    facts["vocabulary"] = len(tokens) if isinstance(tokens, list | np.ndarray) else 0
    facts["chat_template"] = TEMPLATE_KEY in file.kv_records
    return facts


def _plain_value(value: object) -> Scalar | list[Scalar] | None:
    """Returns a decoded value as JSON has it, or None where it is too long, empty or not finite."""
    if isinstance(value, np.ndarray):
        value = value.tolist() if len(value) <= _MAX_ITEMS else []
    if not isinstance(value, list):
        return _plain_scalar(value)
    items = _plain_items(value) if len(value) <= _MAX_ITEMS else []
    return items or None


def _plain_items(values: Iterable[object]) -> list[Scalar]:
    """Returns all of the values as JSON has them, or none of them where one has no place in JSON."""
    plain = [_plain_scalar(value) for value in values]
    kept = [value for value in plain if value is not None]
    return kept if len(kept) == len(plain) else []


def _plain_scalar(value: object) -> Scalar | None:
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int) else None
