"""GGUF -> Source: the model everything is made from, one file or all of its splits.

Only a language model at full precision is a source: what is derived from one (an importance matrix,
an adapter, a vision projector, a vocabulary) is refused by name, an already quantized model unless
asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from cerebellum.errors import BadInput
from cerebellum.files import Progress, sha256_files
from cerebellum.gguf import GgufFile, TensorInfo, is_quantized, read_gguf

SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.DOTALL)
"""llama.cpp's names of split files, counted from 1 (`llama_split_path`)."""

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
    """The source model: metadata of its first file, tensors of all of its files, in file order."""

    path: Path
    files: tuple[GgufFile, ...]
    architecture: str
    name: str
    tensors: dict[str, TensorInfo]
    file_of: dict[str, GgufFile]

    def value(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, decoded as `GgufFile.value` does."""
        return self.files[0].value(key, default)

    def arch_value(self, suffix: str, default: Any = None) -> Any:
        """Return the architecture's own value: `block_count` is read from `<arch>.block_count`."""
        return self.value(f"{self.architecture}.{suffix}", default)

    def read(self, tensor_name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes as a read-only view; nothing is loaded before it is touched.

        Raises:
            BadInput: there is no such tensor, or the file changed since its header was read.
        """
        return self.file_of.get(tensor_name, self.files[0]).data(tensor_name)

    @property
    def kv_records(self) -> dict[str, bytes]:
        """The raw metadata records, `split.*` of a split source included."""
        return self.files[0].kv_records

    @property
    def n_bytes(self) -> int:
        """The size of all files together."""
        return sum(file.n_bytes for file in self.files)

    @cached_property
    def is_quantized(self) -> bool:
        """Whether any tensor is already in a block-quantized type."""
        return any(is_quantized(tensor.type) for tensor in self.tensors.values())

    @cached_property
    def header_sha256(self) -> str:
        """The SHA-256 of everything but the tensors' bytes: quick, and enough to know a file again
        by, not to prove it. Of a split model: of its files' header hashes, in order."""
        hashes = [file.header_sha256 for file in self.files]
        if len(hashes) == 1:
            return hashes[0]
        return hashlib.sha256("".join(hashes).encode("ascii")).hexdigest()

    def sha256(self, progress: Progress | None = None) -> str:
        """Return the SHA-256 of the content (splits one after the other), reading it once."""
        cached: str | None = self.__dict__.get("_sha256")
        if cached is None:
            cached = sha256_files([file.path for file in self.files], progress)
            self.__dict__["_sha256"] = cached
        return cached


def open_source(path: str | os.PathLike[str], allow_requantize: bool = False) -> Source:
    """Open a model, with all of its splits when the first one is given.

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


def _architecture(file: GgufFile) -> str:
    """Return the model's architecture, refusing what is no language model."""
    kind = _text(file, "general.type")
    architecture = _text(file, "general.architecture")
    for word in (kind, architecture):
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
    """Return a split counter; a value of another type is damage, not a number to guess at."""
    value = file.value(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadInput(f"{file.path}: {key} is no count; download or split the model again")
    return value


def _all_splits(first: GgufFile) -> tuple[GgufFile, ...]:
    """Return the file and, where it is the first of several, all that follow it."""
    count = _split_number(first, "split.count", 1)
    if count <= 1:
        return (first,)
    match = SPLIT_NAME.match(first.path.name)
    if match is None or int(match["count"]) != count:
        raise BadInput(
            f"{first.path}: is one of {count} split files and its name does not end in "
            f"-00001-of-{count:05d}.gguf; rename the files to llama.cpp's pattern"
        )
    paths = [
        first.path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    if first.path.name != paths[0].name:
        raise BadInput(f"{first.path}: is not the first of its {count} files; give {paths[0]}")
    return (first, *(_read_split(path, number, count) for number, path in enumerate(paths[1:], 1)))


def _read_split(path: Path, number: int, count: int) -> GgufFile:
    """Read split `number` (from 0) of `count`, and check that it is that one."""
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
    """Return all tensors by name and the file each lies in, checked against split.tensors.count."""
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
