"""The importance matrix: how much each input column of each weight is used.

Computed in process from a text, or read from a file of llama-imatrix (GGUF, or the older .dat).
An expert that the text never reached gets the average of its siblings, never zero: zeros make
quantizers divide by nothing and have produced NaN blocks in llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from cerebellum.encode.moments import Asked
from cerebellum.engine.protocols import ColumnProducts, ColumnSquares, Engine
from cerebellum.errors import BadInput
from cerebellum.files import sha256_file
from cerebellum.gguf import GgufFile, TensorSource, encode_kv, read_gguf, write_gguf
from cerebellum.progress import Reporter, Tick
from cerebellum.texts import Corpus

_RECIPE = "cerebellum.recipe"
_SUMS = ".in_sum2"
_COUNTS = ".counts"
_FLOOR = 1e-6  # of the row's mean: small enough to mean "unused", large enough not to be zero

_MOST_ROWS = float(1 << 53)

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """``sums`` (experts, columns): sums of squared activations; ``counts`` (experts,): rows summed."""

    sums: Floats
    counts: NDArray[np.int64]

    def importance(self) -> Floats:
        """Mean squares, (experts * columns,), strictly positive."""
        return filled(self).ravel()


@dataclass(frozen=True, kw_only=True)
class ImportanceMatrix:
    """Entries by weight name, with where they came from. ``sha256`` is that of the file."""

    path: Path
    entries: dict[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int

    @property
    def sha256(self) -> str:
        return sha256_file(self.path)

    def importance(self, name: str) -> Floats | None:
        """For one weight, or None where the matrix has no entry (embeddings, as a rule)."""
        entry = self.entries.get(name)
        return None if entry is None else entry.importance()


def filled(entry: Entry) -> Floats:
    """Mean squares (experts, columns) without zeros: unseen experts get the mean of the seen ones."""
    seen = entry.counts > 0
    if not seen.any():
        return np.ones_like(entry.sums, dtype=np.float32)
    means = np.empty(entry.sums.shape, np.float64)
    means[seen] = entry.sums[seen] / entry.counts[seen, None]
    means[~seen] = means[seen].mean(axis=0)
    floors = np.maximum(means.mean(axis=1, keepdims=True) * _FLOOR, np.finfo(np.float32).tiny)
    return np.asarray(np.maximum(means, floors), np.float32)


def recipe_of(path: Path) -> str | None:
    """Returns what a matrix was made from, or None where the file is none that this program wrote."""
    try:
        found = read_gguf(path).value(_RECIPE)
    except BadInput:
        return None
    return found if isinstance(found, str) else None


def refuse_foreign(out: Path) -> None:
    """Raises BadInput where a file is at ``out`` that this program did not write as an importance matrix."""
    if not out.exists():
        return
    if recipe_of(out) is None:
        raise BadInput(
            f"{out}: is there already and is no importance matrix made here; give another -o, or --force to replace it"
        )


def compute_or_reuse(
    *,
    engine: Engine,
    shards: Sequence[Path],
    fingerprint: Callable[[], str],
    corpus: Corpus,
    chunks: int,
    out: Path,
    reporter: Reporter,
    beside: Asked | None = None,
) -> ImportanceMatrix:
    """The matrix at ``out`` if it was made from just this; otherwise made now from ``chunks`` chunks.

    The source's hash is asked for when it is needed, so that it can be worked out while the model decodes. Second
    moments that are wanted of the same text and are not there either are made ``beside`` it, in the same pass.
    """
    count = min(chunks, corpus.n_chunks)

    def recipe() -> str:
        return f"{fingerprint()} {corpus.sha256} {corpus.ctx} {count} {engine.identity}"

    if out.exists() and recipe_of(out) == recipe():
        return read(out)
    wanted = beside if beside is not None and not beside.are_there() else None
    what = "importance matrix and second moments" if wanted else "importance matrix"
    with reporter.task(what, count) as tick:
        if wanted is None:
            entries = collect(engine, shards, corpus, count, tick)
        else:
            entries, products = collect_both(engine, shards, corpus, count, wanted, tick)
    write(out, entries, corpus.name, count, corpus.ctx, recipe())
    if wanted is not None:
        wanted.keep(products)
    return read(out)


def collect(
    engine: Engine, shards: Sequence[Path], corpus: Corpus, chunks: int, tick: Tick
) -> dict[str, Entry]:
    """Decodes the first ``chunks`` chunks, of all domains in turn, and sums the squares that each weight meets."""
    inputs = (corpus.inputs(chunk) for chunk in corpus.first(chunks))
    return _entries(engine.importance(shards, corpus.ctx, inputs, tick), shards)


def collect_both(
    engine: Engine, shards: Sequence[Path], corpus: Corpus, chunks: int, asked: Asked, tick: Tick
) -> tuple[dict[str, Entry], Mapping[str, ColumnProducts]]:
    """Does what `collect` does, and sums products for second moments of the first of the same chunks."""
    inputs = (corpus.inputs(chunk) for chunk in corpus.first(chunks))
    watched = asked.watched.weights
    squares, products = engine.importance_and_moments(
        shards, corpus.ctx, inputs, watched, asked.n_chunks, tick
    )
    return _entries(squares, shards), products


def _entries(found: Mapping[str, ColumnSquares], shards: Sequence[Path]) -> dict[str, Entry]:
    if not found:
        raise BadInput(f"{shards[0]}: no matrix product was seen; this build hides its graph nodes")
    return {
        name: Entry(sums=sums.squares.astype(np.float32), counts=sums.counts)
        for name, sums in sorted(found.items())
    }


def write(
    out: Path, entries: dict[str, Entry], dataset: str, chunks: int, ctx: int, recipe: str = ""
) -> None:
    """llama.cpp's GGUF imatrix format; entries of unseen experts are stored filled, count 1."""
    records = [
        encode_kv("general.type", "imatrix", GGUFValueType.STRING),
        encode_kv("imatrix.datasets", [dataset], GGUFValueType.ARRAY),
        encode_kv("imatrix.chunk_count", chunks, GGUFValueType.UINT32),
        encode_kv("imatrix.chunk_size", ctx, GGUFValueType.UINT32),
        encode_kv(_RECIPE, recipe, GGUFValueType.STRING),
    ]
    tensors = [part for name, entry in entries.items() for part in _as_tensors(name, entry)]
    write_gguf(out, records, tensors)


def _as_tensors(name: str, entry: Entry) -> tuple[TensorSource, TensorSource]:
    counts = np.maximum(entry.counts, 1)
    sums = filled(entry) * counts[:, None].astype(np.float32)
    return (
        _f32_tensor(name + _SUMS, (entry.sums.shape[1], entry.sums.shape[0]), sums),
        _f32_tensor(name + _COUNTS, (1, len(counts)), counts),
    )


def _f32_tensor(name: str, shape: tuple[int, ...], values: NDArray[np.generic]) -> TensorSource:
    data = np.ascontiguousarray(values, np.float32).tobytes()
    return TensorSource(name=name, shape=shape, type=GGMLQuantizationType.F32, chunks=lambda: iter([data]))


def read(path: Path) -> ImportanceMatrix:
    """A GGUF or legacy importance matrix; BadInput says what is wrong with anything else."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give an importance matrix") from error
    matrix = _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)
    for name, entry in matrix.entries.items():
        if not np.isfinite(entry.sums).all() or (entry.sums < 0).any():
            raise BadInput(f"{path}: {name} holds values that are not finite or are negative; make it anew")
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = read_gguf(path)
    names = {tensor.name for tensor in file.tensors}
    if not any(name.endswith(_SUMS) for name in names):
        raise BadInput(f"{path}: a GGUF, but not an importance matrix (no *{_SUMS} tensors)")
    entries = {}
    for tensor in file.tensors:
        if not tensor.name.endswith(_SUMS):
            continue
        name = tensor.name.removesuffix(_SUMS)
        if name + _COUNTS not in names:
            raise BadInput(f"{path}: {tensor.name} has no {_COUNTS} beside it; make the matrix anew")
        counts = _whole(_floats(file, name + _COUNTS).ravel(), path, name)
        sums = _floats(file, tensor.name)
        if not counts.size or sums.size % counts.size:
            raise BadInput(f"{path}: {name} has {sums.size} sums for {counts.size} counts; make it anew")
        entries[name] = Entry(sums=sums.reshape(counts.size, -1), counts=counts)
    return ImportanceMatrix(
        path=path,
        entries=entries,
        datasets=_datasets(file),
        chunk_count=_chunk_count(file),
    )


def _whole(counts: Floats, path: Path, name: str) -> NDArray[np.int64]:
    """Returns counts of rows as whole numbers; BadInput where one is none."""
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts > _MOST_ROWS).any():
        raise BadInput(f"{path}: {name} has a count of rows that is no number of rows; make the matrix anew")
    return np.rint(counts).astype(np.int64)


def _datasets(file: GgufFile) -> tuple[str, ...]:
    """Returns the names of the texts; they are for people only, so a value of another type is none."""
    found = file.value("imatrix.datasets", [])
    return tuple(str(name) for name in found) if isinstance(found, list) else ()


def _chunk_count(file: GgufFile) -> int:
    """Returns how many chunks the matrix was made from, 0 where the file does not tell a count."""
    found = file.value("imatrix.chunk_count", 0)
    return found if isinstance(found, int) and 0 <= found < 1 << 32 else 0


def _floats(file: GgufFile, name: str) -> Floats:
    tensor = file.tensor(name)
    if tensor.type != GGMLQuantizationType.F32:
        raise BadInput(f"{file.path}: {name} is {tensor.type.name}, an importance matrix is F32")
    return np.frombuffer(file.data(tensor), np.float32)


def _read_legacy(path: Path) -> ImportanceMatrix:
    """n entries of (name, calls, values): sums are (sum / count) * calls, so calls serve as counts."""
    raw = path.read_bytes()
    entries: dict[str, Entry] = {}
    try:
        n_entries = _int32(raw, 0)
        at = 4
        for _ in range(n_entries):
            length = _int32(raw, at)
            name = raw[at + 4 : at + 4 + length].decode("utf-8")
            at += 4 + length
            calls = _int32(raw, at)
            n_values = _int32(raw, at + 4)
            if n_values < 1 or length < 1 or not name.isprintable():
                raise ValueError
            values = np.frombuffer(raw, "<f4", n_values, at + 8)
            at += 8 + 4 * n_values
            entries[name] = Entry(sums=values[None], counts=np.array([max(calls, 1)]))
        chunks = _int32(raw, at) if len(raw) >= at + 4 else 0
    except (struct.error, ValueError) as error:
        raise BadInput(f"{path}: neither a GGUF nor a legacy importance matrix, or truncated") from error
    if not entries:
        raise BadInput(f"{path}: an importance matrix without entries; make it anew")
    return ImportanceMatrix(path=path, entries=entries, datasets=(), chunk_count=chunks)


def _int32(raw: bytes, at: int) -> int:
    value: int = struct.unpack_from("<i", raw, at)[0]
    return value
