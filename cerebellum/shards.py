"""One shard per group and type: a variant of the model is a list of paths and copies nothing.

Shard 0 carries the metadata and every protected tensor; shard i holds group i at one type. They are
GGUF splits, and llama.cpp loads any list that agrees on ``split.no`` and ``split.count``. A shard is
named after its recipe, so one that is there was finished and need not be made again. One that was removed since is
known by the hash that the ledger has, and is made again only where a model is opened with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from cerebellum import files
from cerebellum.encode.encoders import Encoder
from cerebellum.engine.ahead import Ahead
from cerebellum.engine.protocols import QuantizeJob
from cerebellum.engine.timings import timed
from cerebellum.errors import BadInput
from cerebellum.files import sha256_file
from cerebellum.gguf import TensorSource, encode_kv, read_gguf, row_bytes, write_gguf
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.layout import Layout
from cerebellum.ledger import Ledger
from cerebellum.source import Source
from cerebellum.verdicts import Changes

BASE_LABEL = "base"
"""How people are told of the variant without changes, and of a shard at its base types."""

_LABELLED = 12  # changes that a label still names


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A variant on disk. ``digest`` is over the contents of the shards, so it names the weights.

    Call ``ready`` before a file is opened: it makes those again that were removed since they were measured.
    """

    label: str
    paths: tuple[Path, ...]
    digest: str
    ready: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)

    @classmethod
    def of_source(cls, source: Source, label: str) -> Variant:
        """Returns a finished GGUF, with all of its splits, as a variant, to be measured like any other."""
        return cls(label=label, paths=source.paths, digest=source.sha256())

    def __reduce__(self) -> tuple[Callable[[], Variant], tuple[()]]:
        """Travels to a worker without ``ready``: whoever sends it has seen to it."""
        return partial(Variant, label=self.label, paths=self.paths, digest=self.digest), ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the shards are made from, and where they go.

    ``layout`` says which tensors each group has; all other tensors of the ``source`` are protected. The
    ``engine`` makes bytes: llama.cpp's encoders, or ours over them.
    """

    source: Source
    layout: Layout
    matrix: ImportanceMatrix | None
    engine: Encoder
    folder: Path
    threads: int


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """A shard to make: its split number, the type of each of its tensors in order, and its file.

    ``recipe`` is the hash of all that its bytes are made from, of which the file's name has the first digits;
    ``said`` tells people what it is.
    """

    number: int
    types: Mapping[str, GGMLQuantizationType]
    path: Path
    recipe: str
    said: str


class Shards:
    """Makes shards on demand, each (group, type) once ever, and lists them as variants.

    ``weights_made`` counts what was quantized since it was opened, also by others than the main thread.
    """

    def __init__(self, recipe: Recipe, ledger: Ledger, tick: Callable[[str], None] = lambda _: None) -> None:
        self._recipe = recipe
        self._ledger = ledger
        self._tick = tick
        self._number = {name: number for number, name in enumerate(recipe.layout.groups, start=1)}
        self._hashes: dict[Path, str] = {}
        self._written: dict[Path, ShardJob] = {}
        self._ahead: Ahead | None = None
        self._jobs: dict[tuple[str, str | None], ShardJob] = {}
        self._seen: set[Path] = set()
        self.weights_made = 0
        base = recipe.layout.base
        self._origin = [
            recipe.source.fingerprint,
            base.file.fingerprint if base.file else "",
            recipe.matrix.sha256 if recipe.matrix else "",
            recipe.engine.build,
        ]
        files.make_folder(recipe.folder)

    def variant(self, changes: Changes, label: str = "") -> Variant:
        """Returns the shard list of the base with ``changes``; makes those whose content nobody knows yet."""
        unknown = set(changes) - set(self._number)
        if unknown:
            raise BadInput(f"no group {sorted(unknown)[0]!r}; `cerebellum inspect` lists them")
        paths = [self.protected(), *(self.path(name, changes.get(name)) for name in self._number)]
        content = "".join(self._hashes[path] for path in paths)
        return Variant(
            label=label or _label(changes),
            paths=tuple(paths),
            digest=hashlib.sha256(content.encode()).hexdigest(),
            ready=partial(self._make_removed, tuple(paths)),
        )

    def weights_missing(self, wanted: Iterable[Changes]) -> int:
        """Returns how many weights are still to be quantized before these variants can be measured."""
        return sum(self._weights(job) for job in self._unmade(wanted))

    def _unmade(self, wanted: Iterable[Changes]) -> Iterator[ShardJob]:
        """Yields the shards of changes whose content nobody knows yet, each once, in the order given."""
        for name, qtype in dict.fromkeys(change for changes in wanted for change in changes.items()):
            job = self._job(name, qtype)
            if job.path not in self._hashes and not self._is_known(job):
                yield job

    def checked(self, changes: Changes, label: str = "") -> Variant:
        """Returns the variant once every one of its files has the content that was recorded when it was made.

        A shard that changed on the disk since is made again from the source. Raises BadInput where that gives
        other bytes: what was measured is then gone.
        """
        variant = self.variant(changes, label)
        variant.ready()
        with timed("hashing"), ThreadPoolExecutor(max_workers=self._recipe.threads) as pool:
            found = list(pool.map(sha256_file, variant.paths))
        for path, digest in zip(variant.paths, found, strict=True):
            if digest != self._hashes[path]:
                self._make_again(path)
        return variant

    def hashes(self, changes: Changes) -> dict[str, str]:
        """Returns the recorded SHA-256 of every file of a variant, by its name."""
        return {path.name: self._hashes[path] for path in self.variant(changes).paths}

    def rows(self, name: str, type_: GGMLQuantizationType, rows: range) -> NDArray[np.uint8]:
        """Returns the bytes of some neighbouring rows of a tensor at a type, made from the source just now."""
        return row_content(self._recipe, name, type_, rows)

    def remove_all_but(self, kept: Iterable[Changes]) -> int:
        """Removes every shard that none of these variants has, and returns the bytes that this frees."""
        wanted = {path for changes in kept for path in self.variant(changes).paths}
        freed = 0
        for path in sorted(self._recipe.folder.glob("*.gguf")):
            if path not in wanted:
                with suppress(OSError):  # one that cannot be removed does no harm where it is
                    n_bytes = path.stat().st_size
                    files.DISK.unlink(path)
                    freed += n_bytes
        return freed

    def _make_removed(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if not path.exists():
                self._tick(f"{path.name} again, for it was removed")
                self._write_as_known(path)

    def _make_again(self, path: Path) -> None:
        self._tick(f"{path.name} again, for its bytes changed on the disk")
        files.DISK.unlink(path)
        self._write_as_known(path)

    def _write_as_known(self, path: Path) -> None:
        """Makes a shard again; BadInput where it does not get the content that was measured."""
        if self._write(self._written[path]) != self._hashes[path]:
            raise _other_bytes(path)

    def missing(self, changes: Changes) -> list[ShardJob]:
        """Returns the shards of a variant whose content nobody knows yet, for workers to make."""
        jobs = [self._protected_job(), *(self._job(name, changes.get(name)) for name in self._number)]
        return [job for job in jobs if job.path not in self._hashes and not self._is_known(job)]

    def removed(self, variant: Variant) -> list[ShardJob]:
        """Returns the shards of a variant that were removed since they were measured, for workers to make again."""
        unseen = [path for path in variant.paths if path in self._written and path not in self._seen]
        gone = [path for path in unseen if not path.exists()]
        self._seen |= set(unseen) - set(gone)
        return [self._written[path] for path in gone]

    def adopt(self, job: ShardJob, sha256: str | None) -> None:
        """Takes in a shard that a worker made, with its hash; None where it was there already.

        Raises BadInput where it was measured before and had another content.
        """
        self._written[job.path] = job
        known = self._ledger.content_hash(job.path.name, job.recipe)
        if None not in (sha256, known) and sha256 != known:
            raise _other_bytes(job.path)
        self.weights_made += self._weights(job)
        self._hashes[job.path] = self._content_hash(job, sha256)

    def tensor(self, name: str, type_: GGMLQuantizationType) -> TensorSource:
        """Returns one tensor of the source at a type; it is quantized when it is written."""
        shape = self._recipe.source.tensors[name].shape
        return TensorSource(name=name, shape=shape, type=type_, chunks=lambda: self._bytes(name, type_))

    def protected(self) -> Path:
        """Returns the shard with the metadata and all tensors that nothing changes."""
        return self._made(self._protected_job())

    def path(self, name: str, qtype: str | None) -> Path:
        """Returns the shard of one group at one type, or at its base types; writes it if it is not there."""
        return self._made(self._job(name, qtype))

    def _protected_job(self) -> ShardJob:
        if ("", None) not in self._jobs:
            grouped = {tensor for group in self._recipe.layout.groups.values() for tensor in group.tensors}
            types = {name: t for name, t in self._recipe.layout.base.types.items() if name not in grouped}
            in_source_order = {name: types[name] for name in self._recipe.source.tensors if name in types}
            self._jobs["", None] = self._job_of(0, "protected", BASE_LABEL, in_source_order)
        return self._jobs["", None]

    def _job(self, name: str, qtype: str | None) -> ShardJob:
        """What makes a group at a type; it is asked often and worked out once."""
        if (name, qtype) not in self._jobs:
            types = self._recipe.layout.group_types(name, qtype)
            job = self._job_of(self._number[name], name, qtype or BASE_LABEL, types)
            self._jobs[name, qtype] = job
        return self._jobs[name, qtype]

    def _job_of(
        self, number: int, name: str, label: str, types: Mapping[str, GGMLQuantizationType]
    ) -> ShardJob:
        """Names the file of a shard after the hash of what it is made from."""
        names = {tensor: type_.name for tensor, type_ in types.items()}
        recipe = json.dumps([*self._origin, split_numbers(self._recipe, number), names])
        digest = hashlib.sha256(recipe.encode()).hexdigest()
        path = self._recipe.folder / f"{number:02d}-{name}.{label}.{digest[:12]}.gguf"
        return ShardJob(number=number, types=types, path=path, recipe=digest, said=f"{name} at {label}")

    def _made(self, job: ShardJob) -> Path:
        path = job.path
        if path not in self._hashes:
            self._written[path] = job
            made = self._ahead.take(path) if self._ahead else None
            if made is None and not self._is_known(job):
                self._tick(job.said)
                made = self._write(job)
            self._hashes[path] = self._content_hash(job, made)
        return path

    @contextmanager
    def made_ahead(self, wanted: Iterable[Changes]) -> Iterator[None]:
        """Makes the shards of these variants on a thread of its own while the block runs, in this order.

        It is worth it where a GPU measures and the processor would idle. A shard that is needed before
        its turn is made by who needs it.
        """
        self._ahead = Ahead()
        try:
            for job in self._unmade(wanted):
                self._ahead.begin(job.path, partial(self._write, job))
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def _is_known(self, job: ShardJob) -> bool:
        """Says whether a shard is there, or was once and its content is recorded."""
        return job.path.exists() or self._ledger.content_hash(job.path.name, job.recipe) is not None

    def _write(self, job: ShardJob) -> str:
        """Writes a shard and returns its hash."""
        self.weights_made += self._weights(job)
        return write_shard(self._recipe, job)

    def _weights(self, job: ShardJob) -> int:
        return sum(self._recipe.source.tensors[name].n_elements for name in job.types)

    def _content_hash(self, job: ShardJob, made: str | None) -> str:
        """Returns the hash of a shard that was ``made`` just now, or the one that was recorded when it was."""
        known = self._ledger.content_hash(job.path.name, job.recipe) if made is None else made
        if known is None:
            known = sha256_file(job.path)
        self._ledger.record_content_hash(job.path.name, job.recipe, known)
        return known

    def _bytes(self, name: str, type_: GGMLQuantizationType) -> Iterator[NDArray[np.uint8]]:
        return tensor_content(self._recipe, name, type_)


def _other_bytes(path: Path) -> BadInput:
    return BadInput(
        f"{path}: the source gives other bytes now than were measured; check the disk and the importance matrix, and "
        "run again in another folder"
    )


def write_shard(recipe: Recipe, job: ShardJob) -> str:
    """Writes a shard and returns its hash, worked out as the bytes went by.

    Only the shard with the metadata carries general.alignment; the others use the default.
    """
    base = recipe.layout.base
    records = () if job.number else base.records
    _, count, total = split_numbers(recipe, job.number)
    split = (
        encode_kv("split.no", job.number, GGUFValueType.UINT16),
        encode_kv("split.count", count, GGUFValueType.UINT16),
        encode_kv("split.tensors.count", total, GGUFValueType.INT32),
    )
    digest = hashlib.sha256()
    alignment = 32 if job.number else base.alignment
    with timed("quantizing"):
        write_gguf(job.path, (*records, *split), _one_ahead(recipe, job.types), alignment, digest.update)
    return digest.hexdigest()


def split_numbers(recipe: Recipe, number: int) -> tuple[int, int, int]:
    """Returns what a shard says of itself as a split: its number, how many there are, and tensors in all."""
    return (number, len(recipe.layout.groups) + 1, len(recipe.source.tensors))


def _one_ahead(recipe: Recipe, types: Mapping[str, GGMLQuantizationType]) -> list[TensorSource]:
    """Returns the tensors of a shard; as one is written the next is begun, so that no thread waits at a seam."""
    names = list(types)
    begun: dict[str, Iterator[NDArray[np.uint8]]] = {}

    def chunks(index: int) -> Iterator[NDArray[np.uint8]]:
        for name in names[index : index + 2]:
            if name not in begun:
                begun[name] = tensor_content(recipe, name, types[name])
        return begun.pop(names[index])

    shapes = recipe.source.tensors
    return [
        TensorSource(name=name, shape=shapes[name].shape, type=type_, chunks=partial(chunks, index))
        for index, (name, type_) in enumerate(types.items())
    ]


def tensor_content(recipe: Recipe, name: str, type_: GGMLQuantizationType) -> Iterator[NDArray[np.uint8]]:
    """Begins to make the bytes of a tensor at a type: a given base's own where it has that type, else the encoder's.

    This is the only place where bytes of a finished file come from, whether it is built or made again.
    """
    base = recipe.layout.base
    if base.file is not None and base.types[name] == type_:
        return iter([base.file.read(name)])
    tensor = recipe.source.tensors[name]
    job = QuantizeJob(
        name=name,
        raw=recipe.source.read(name),
        shape=tensor.shape,
        from_type=tensor.type,
        to_type=type_,
        importance=recipe.matrix.importance(name) if recipe.matrix else None,
    )
    return recipe.engine.quantize(job, recipe.threads)


def row_content(recipe: Recipe, name: str, type_: GGMLQuantizationType, rows: range) -> NDArray[np.uint8]:
    """Returns the bytes of neighbouring rows of a tensor, all of one expert, as ``tensor_content`` has them."""
    tensor = recipe.source.tensors[name]
    base = recipe.layout.base
    n_per_row = tensor.shape[0]
    if base.file is not None and base.types[name] == type_:
        size = row_bytes(type_, n_per_row)
        return base.file.read(name)[rows.start * size : rows.stop * size]
    size = row_bytes(tensor.type, n_per_row)
    importance = recipe.matrix.importance(name) if recipe.matrix else None
    expert = rows.start // tensor.shape[1] if len(tensor.shape) > 2 else 0
    job = QuantizeJob(
        name=name,
        raw=recipe.source.read(name)[rows.start * size : rows.stop * size],
        shape=(n_per_row, len(rows)),
        from_type=tensor.type,
        to_type=type_,
        importance=None if importance is None else importance[expert * n_per_row : (expert + 1) * n_per_row],
        first_expert=expert,
    )
    return np.concatenate(list(recipe.engine.quantize(job, recipe.threads)))


def _label(changes: Changes) -> str:
    """Names every change for people, or, of a whole plan, how many there are."""
    if len(changes) > _LABELLED:
        return f"a plan of {len(changes)} changes"
    return ", ".join(f"{name}:{qtype}" for name, qtype in sorted(changes.items())) or BASE_LABEL


def shard_tensors(path: Path) -> dict[str, NDArray[np.uint8]]:
    """Returns the tensors of one shard by name, as views of the mapped file."""
    file = read_gguf(path)
    return {tensor.name: file.data(tensor) for tensor in file.tensors}
