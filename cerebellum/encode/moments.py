"""Second moments: what the importance matrix is the diagonal of, for feeding rounding errors back.

moments.gguf has the means of products of activations for every input that a weight reads, within spans of
neighbouring columns: a whole row where it has up to 2,048, else 2,048 at a time. That is columns x span x 4 bytes an
input on the disk, and the same in memory while they are summed; every expert has its own. `watch` says what a model
takes before anything is decoded, and takes less of it where that would be more than a limit: of work, in a large model,
spans become 1,024 or 512; of bytes, experts that read the same rows share one, spans become 256, and at last the
largest inputs go without, whose weights are then rounded one by one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from cerebellum.engine.protocols import ColumnProducts, Engine, Watch
from cerebellum.errors import BadInput
from cerebellum.files import sha256_file
from cerebellum.gguf import GgufFile, TensorMeta, TensorSource, encode_kv, read_gguf, write_gguf
from cerebellum.progress import Reporter
from cerebellum.texts import Corpus

MOST_BYTES = 8 << 30
"""What moments.gguf may take of disk and memory: a dense model of 32 billion weights takes 6 GB."""

MOST_CHUNKS = 200
"""Chunks of text that moments are made from: 102,400 rows of 512-token chunks for spans of up to 2,048 columns."""

MOST_WORK = 1.7e13
"""Weights times the columns of their span that long spans may come to: some three minutes for a type on 16 cores, which
is what a dense model of 32 billion weights takes at spans of 512."""

LONG_BYTES = 4 << 30
"""What moments of long spans may take: of 8 billion weights those of 1,024 columns have 3.4 GB."""

_WHOLE_COLUMNS = 1024  # rows up to this are one span, whatever that takes
_LONG_SPANS = (2048, 1024)  # where there is the time
_SPANS = (512, 256)  # else; the second where the first takes too much memory
_BLOCK = 256  # elements of a block of most types: a span is a whole number of them

_RECIPE = "cerebellum.recipe"
_SHARED = "cerebellum.encode.moments.shared"
_PRODUCTS = ".products"
_REST = ".rest"
_COUNTS = ".counts"
_VERSION = "1"  # of what is summed; part of the recipe

# Names that read one input in every model of llama.cpp so far. Only what is said beforehand of the size
# rests on it: what is shared in fact is seen in the graph.
_SAME_INPUT = (
    ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "ssm_in"),
    ("ffn_gate", "ffn_up"),
    ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp"),
)
_READS = {role: roles[0] for roles in _SAME_INPUT for role in roles}
_FLOATS = ("norm", "gate_inp")  # in the role of what is never quantized, though it has rows
_POOLABLE = frozenset(_SAME_INPUT[2])
_WEIGHT = re.compile(r"blk\.(?P<layer>\d+)\.(?P<role>\w+)\.weight")

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What is watched of a model, by weight name, and what it takes; ``left_out`` weights had no room."""

    weights: Mapping[str, Watch]
    n_bytes: int
    left_out: tuple[str, ...]

    def said(self) -> str:
        """Returns the line that is said before anything starts."""
        line = (
            f"second moments for feeding errors back take {self.n_bytes / 1e6:,.0f} MB of disk and of memory"
        )
        if self.left_out:
            line += f"; {len(self.left_out)} tensors have no room there and are rounded weight by weight"
        return line


@dataclass(frozen=True, kw_only=True)
class Span:
    """Some neighbouring columns of a row: the first, and moments of one span after the other, (n, span, span)."""

    start: int
    moments: Floats

    @property
    def columns(self) -> slice:
        """Which columns of a row these are."""
        return slice(self.start, self.start + self.moments.shape[0] * self.moments.shape[1])

    def squared(self, errors: Floats) -> float:
        """Returns what errors of rows, (n, columns) float32, add to the mean square of what the rows give."""
        n_spans, span, _ = self.moments.shape
        parts = errors[:, self.columns].reshape(len(errors), n_spans, span).transpose(1, 0, 2)
        return float(((parts @ self.moments) * parts).sum(dtype=np.float64))


@dataclass(frozen=True, kw_only=True)
class Moments:
    """An opened moments.gguf; ``shared`` is weight -> the weight whose name its moments are stored under."""

    path: Path
    shared: Mapping[str, str]
    file: GgufFile

    @cached_property
    def sha256(self) -> str:
        """The file's, hashed once: it may have some gigabytes."""
        return sha256_file(self.path)

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.file.tensors)

    def of(self, name: str, expert: int) -> tuple[Span, ...]:
        """Returns the spans of a row of one expert; none where the text did not show enough of its input."""
        first = self.shared.get(name, name)
        if first + _COUNTS not in self._stored:
            return ()
        counts = self._floats(first + _COUNTS)
        kept = expert if counts.size > 1 else 0
        if counts[kept] == 0:
            return ()
        found = []
        start = 0
        for part in (_PRODUCTS, _REST):
            if first + part in self._stored:
                span = Span(start=start, moments=self._spans(first + part, kept))
                start = span.columns.stop
                found.append(span)
        return tuple(found)

    def _spans(self, name: str, expert: int) -> Floats:
        """One expert's, read from the disk and nothing else of the tensor."""
        span, _, n_spans, _ = (*self.file.tensor(name).shape, 1, 1)[:4]
        size = span * span * n_spans
        return self._floats(name)[expert * size : (expert + 1) * size].reshape(n_spans, span, span)

    def _floats(self, name: str) -> Floats:
        return np.frombuffer(self.file.data(self.file.tensor(name)), np.float32)


def watch(tensors: Mapping[str, TensorMeta], most_bytes: int = MOST_BYTES) -> Watched:
    """Says how much of a model's inputs is watched within a limit, from names and shapes alone.

    Weights whose rows are no whole number of 256 elements are never watched: of the types that errors
    are fed back in IQ4_NL alone takes them.
    """
    readers = {name: tensor for name, tensor in tensors.items() if _is_reader(tensor)}
    found: dict[str, Watch] = {}
    long = [(span, False, LONG_BYTES) for span in _LONG_SPANS if _work(readers, span) <= MOST_WORK]
    short = [
        (span, pooled, most_bytes) for span, pooled in ((_SPANS[0], False), *((s, True) for s in _SPANS))
    ]
    for span, pooled, most in (*long, *short):
        found = {
            name: Watch(span=_span(tensor, span), pooled=pooled and _role(name) in _POOLABLE)
            for name, tensor in readers.items()
        }
        if sum(_inputs(found, readers).values()) <= min(most, most_bytes):
            break
    left_out: list[str] = []
    while (sizes := _inputs(found, readers)) and sum(sizes.values()) > most_bytes:
        largest = max(sizes, key=lambda read: sizes[read])
        without = [name for name in found if _input(name) == largest]
        left_out += without
        found = {name: kept for name, kept in found.items() if name not in without}
    return Watched(weights=found, n_bytes=sum(sizes.values()), left_out=tuple(left_out))


def _is_reader(tensor: TensorMeta) -> bool:
    found = _WEIGHT.fullmatch(tensor.name)
    if found is None or any(part in found["role"] for part in _FLOATS):
        return False
    return len(tensor.shape) > 1 and tensor.shape[0] % _BLOCK == 0


def _span(tensor: TensorMeta, longest: int) -> int:
    columns = tensor.shape[0]
    return columns if columns <= max(_WHOLE_COLUMNS, longest) else longest


def _work(readers: Mapping[str, TensorMeta], longest: int) -> int:
    """Returns what moving every weight once comes to: for each as many products as its span has columns."""
    return sum(math.prod(tensor.shape) * _span(tensor, longest) for tensor in readers.values())


def _role(name: str) -> str:
    found = _WEIGHT.fullmatch(name)
    return found["role"] if found else name


def _input(name: str) -> str:
    """Names what a weight reads: weights of a layer with the same answer read the same rows."""
    role = _role(name)
    return name.replace(f".{role}.", f".{_READS.get(role, role)}.")


def _inputs(watched: Mapping[str, Watch], tensors: Mapping[str, TensorMeta]) -> dict[str, int]:
    """Returns the bytes of every input that is watched."""
    found: dict[str, int] = {}
    for name, kept in watched.items():
        columns, _, experts = (*tensors[name].shape, 1)[:3]
        rest = columns % kept.span
        values = (columns - rest) * kept.span + rest * rest
        found[_input(name)] = 4 * values * (1 if kept.pooled else experts)
    return found


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Second moments that somebody wants, at ``out``: of which inputs, and from how many chunks of which text.

    More than MOST_CHUNKS are never decoded: what feeding back has been shown to be worth was shown with so many.
    ``engine`` is the identity of what decodes.
    """

    watched: Watched
    fingerprint: Callable[[], str]
    corpus: Corpus
    chunks: int
    engine: str
    out: Path

    @property
    def n_chunks(self) -> int:
        """How many chunks they are made from."""
        return min(self.chunks, self.corpus.n_chunks, MOST_CHUNKS)

    def recipe(self) -> str:
        """Names everything that they are made from."""
        made_from = (
            f"{self.fingerprint()} {self.corpus.sha256} {self.corpus.ctx} {self.n_chunks} {self.engine}"
        )
        return f"{_VERSION} {made_from} {_digest(self.watched)}"

    def are_there(self) -> bool:
        """Says whether they were made already, from just this."""
        return self.out.exists() and recipe_of(self.out) == self.recipe()

    def keep(self, found: Mapping[str, ColumnProducts]) -> None:
        """Writes what was summed for them."""
        write(self.out, found, self.recipe())


def compute_or_reuse(asked: Asked, *, engine: Engine, shards: Sequence[Path], reporter: Reporter) -> Moments:
    """Returns the moments that are there already, made from just this; otherwise decodes the chunks now."""
    if not asked.are_there():
        inputs = (asked.corpus.inputs(chunk) for chunk in asked.corpus.first(asked.n_chunks))
        with reporter.task("second moments", asked.n_chunks) as tick:
            found = engine.moments(shards, asked.corpus.ctx, inputs, asked.watched.weights, tick)
        asked.keep(found)
    return read(asked.out)


def read_given(path: Path, watched: Watched) -> Moments:
    """Returns moments that were made before, of whatever text: a run's, say, of all its domains.

    Raises BadInput where the file holds none, or those of other weights than the ``watched`` ones.
    """
    refuse_foreign(path)
    if not (recipe_of(path) or "").endswith(f" {_digest(watched)}"):
        raise BadInput(
            f"{path}: holds second moments of other weights than this model's; name its own, or a file that is "
            "not there yet to have them made"
        )
    return read(path)


def _digest(watched: Watched) -> str:
    """Names the weights that are watched, and how, in what a file says that it was made from."""
    inputs = sorted(watched.weights.items())
    asked = json.dumps([[name, kept.span, kept.pooled] for name, kept in inputs])
    return hashlib.sha256(asked.encode()).hexdigest()


def refuse_foreign(out: Path) -> None:
    """Raises BadInput where a file is at ``out`` that this program did not write as second moments."""
    if out.exists() and recipe_of(out) is None:
        raise BadInput(f"{out}: is there already and holds no second moments made here; name another file")


def recipe_of(path: Path) -> str | None:
    """Returns what a file was made from, or None where it holds no moments that this program wrote."""
    try:
        file = read_gguf(path)
        found: str | None = file.value(_RECIPE) if file.value("general.type") == "moments" else None
    except BadInput:
        return None
    return found


def write(out: Path, products: Mapping[str, ColumnProducts], recipe: str) -> None:
    """Writes means of products, once for all weights that share them, an expert that met too few rows filled."""
    first: dict[int, str] = {}
    shared = [f"{name}={first.setdefault(id(found), name)}" for name, found in sorted(products.items())]
    records = [
        encode_kv("general.type", "moments", GGUFValueType.STRING),
        encode_kv(_SHARED, shared, GGUFValueType.ARRAY),
        encode_kv(_RECIPE, recipe, GGUFValueType.STRING),
    ]
    tensors = [part for name in first.values() for part in _as_tensors(name, products[name])]
    write_gguf(out, records, tensors)


def _as_tensors(name: str, found: ColumnProducts) -> Iterator[TensorSource]:
    n_experts, n_spans, span, _ = found.spans.shape
    rest = found.rest.shape[-1]
    counts = _trusted(found)
    if n_spans:
        shape = (span, span, n_spans, n_experts)
        yield _f32_tensor(name + _PRODUCTS, shape, lambda: _means(found.spans, found))
    if rest:
        yield _f32_tensor(name + _REST, (rest, rest, 1, n_experts), lambda: _means(found.rest, found))
    yield _f32_tensor(name + _COUNTS, (n_experts,), lambda: counts)


def _f32_tensor(name: str, shape: tuple[int, ...], values: Callable[[], Floats]) -> TensorSource:
    """Returns a tensor that is worked out when it is written, so that memory never holds all sums twice."""
    return TensorSource(
        name=name, shape=shape, type=GGMLQuantizationType.F32, chunks=lambda: iter([values()])
    )


def _few(found: ColumnProducts) -> NDArray[np.bool_]:
    """Says which experts met fewer rows than a span has columns: too few to tell columns apart by."""
    return found.counts < _least_rows(found)


def _least_rows(found: ColumnProducts) -> int:
    n_spans, span = found.spans.shape[1:3]
    return int(span if n_spans else found.rest.shape[-1])


def _stand_in(found: ColumnProducts) -> int:
    """Returns how many rows of all experts stand in for those of an expert that met too few; 0 where none can."""
    n_rows = int(found.counts.sum())
    return n_rows if found.same_rows and n_rows >= _least_rows(found) else 0


def _trusted(found: ColumnProducts) -> Floats:
    """Returns the rows behind each expert's moments as they are stored, 0 where nothing can be made of them."""
    return np.where(_few(found), _stand_in(found), found.counts).astype(np.float32)


def _means(sums: Floats, found: ColumnProducts) -> Floats:
    counts = np.maximum(found.counts, 1).reshape(-1, *[1] * (sums.ndim - 1))
    means = np.asarray(sums / counts.astype(np.float32), np.float32)
    few = _few(found)
    n_rows = _stand_in(found)
    if few.any():
        means[few] = sums.sum(axis=0) / np.float32(n_rows) if n_rows else 0.0
    return means


def read(path: Path) -> Moments:
    """Opens a file of second moments; BadInput where it is none, or one of its values is not finite."""
    file = read_gguf(path)
    shared = file.value(_SHARED)
    if file.value("general.type") != "moments" or shared is None:
        raise BadInput(f"{path}: a GGUF, but without second moments made here; remove it or name another")
    pairs = [str(pair).partition("=") for pair in shared]
    return Moments(path=path, shared={name: first for name, _, first in pairs}, file=file)
