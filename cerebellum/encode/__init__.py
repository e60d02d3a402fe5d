"""Round float rows into ggml's K-quants and Q8_0 by an own, wider search than ggml's, and faster.

The format is ggml's to the byte; what differs is which of the allowed scales, minimums and codes are
chosen. Ours are searched from a grid of starts and re-chosen by their true error, many rows side by side
(kquants.c). The same rows give the same bytes on every machine. A tool: it knows no model and no stage.

    if available():
        raw = encode(values, GGMLQuantizationType.Q3_K, importance, threads=8)
        raw = feed_back(raw, values, moments, GGMLQuantizationType.Q3_K, threads=8)

Two steps work on finished blocks of any encoder, ggml's too: `feed_back` chooses codes anew so that errors
of one column are made up for by others, and `unshrink` scales blocks back up. Neither changes a size. Both take
IQ types as well, which `encode` does not make; iquants.c has their feedback.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from cerebellum.encode.grids import TABLED, table
from cerebellum.encode.library import Unavailable, load
from cerebellum.errors import BadInput
from cerebellum.gguf import block_size, row_bytes

__all__ = [
    "ENCODER_VERSION",
    "RECODABLE",
    "RESCALABLE",
    "SUPPORTED",
    "Share",
    "Unshrink",
    "available",
    "decode",
    "encode",
    "feed_back",
    "rows_together",
    "unavailable_because",
    "unshrink",
]

ENCODER_VERSION = "2"
"""Names the bytes that `encode` gives: part of recipes and digests, changed whenever any byte can change.

1: the first; starts, re-chosen codes and unshrinking as they are now.
2: errors are fed back in IQ types too; three times the damping, and as many sweeps as still move codes.
"""

_T = GGMLQuantizationType

SUPPORTED = frozenset({_T.Q2_K, _T.Q3_K, _T.Q4_K, _T.Q5_K, _T.Q6_K, _T.Q8_0})
"""The types that `encode` makes."""

RECODABLE = SUPPORTED | TABLED
"""The types whose codes `feed_back` can choose anew: IQ types beside those that `encode` makes."""

_SCALES = {_T.Q2_K: (80, 2), _T.Q3_K: (108, 1), _T.Q4_K: (0, 2), _T.Q5_K: (0, 2), _T.Q6_K: (208, 1)} | {
    kind: (0, 1)
    for kind in (_T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S, _T.IQ4_XS, _T.IQ4_NL, _T.Q8_0)
}
"""Where a block's fp16 scales lie, in bytes, and how many there are: d, and dmin where there is one."""

RESCALABLE = frozenset(_SCALES)
"""The types whose blocks `unshrink` can rescale."""

DAMPING = 0.3
"""Added to the diagonal of second moments, as a share of its mean: what does best on text that the moments are not of,
where they are of 100 to 400 chunks (docs/LOG.md, 2026-11-30)."""

SWEEPS = 16
"""Times that all codes of a row are looked at, at most: a row of which none moved any more is through."""

_ROWS_TOGETHER = 32  # LANES of blocks.h: rows searched side by side
_ELEMENTS_TOGETHER = 1 << 18  # of a task: 1 MiB of float32
_LEAST_FACTOR = 0.9
_MOST_FACTOR = 1.2  # beyond, a block is an oddity and not a shrunken one

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Share = Literal["block", "row", "tensor"]


@dataclass(frozen=True, kw_only=True)
class Unshrink:
    """Says how far blocks are scaled back up, and how many of them share one factor.

    Rounding by least squares shrinks weights, and in a sum over thousands of columns the shrinkage adds
    up while the noise does not. The factor sum q x^2 / sum q x y (q importance, x exact, y rounded) keeps
    the projection on the original; `strength` goes that share of the way from 1, between 0 and 1.
    """

    strength: float = 1.0
    share: Share = "block"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise BadInput(f"a strength of {self.strength} is not between 0 and 1")


def available() -> bool:
    """Say whether this machine can encode; the first call may compile, which takes some seconds."""
    return unavailable_because() is None


def unavailable_because() -> str | None:
    """Return the one line that says why this machine cannot encode, or None where it can."""
    try:
        load()
    except Unavailable as reason:
        return str(reason)
    return None


def encode(
    values: Floats,
    kind: GGMLQuantizationType,
    importance: Floats | None,
    *,
    threads: int,
    unshrink: Unshrink | None = None,
) -> Bytes:
    """Round rows of weights to a type, and return the bytes of its blocks, (rows, bytes of a row).

    `values` is (rows, columns) float32 and `importance` (columns,) mean squared activations, none below
    zero; without it all columns count alike. An error counts importance * sqrt(sigma + x^2) in Q2_K to
    Q5_K, with ggml's sigma, and importance alone in Q6_K and Q8_0. The bytes do not depend on `threads`.

    Raises:
        BadInput: the type is not supported, rows are no whole number of blocks, shapes do not match,
            or a value or importance is not finite.
        Unavailable: this machine cannot encode; ask `available` first.
    """
    rows = _checked(values, kind, importance)
    library = load()
    n_rows, columns = rows.shape
    out = np.empty((n_rows, row_bytes(kind, columns)), np.uint8)
    sums = None if unshrink is None else _no_sums(n_rows, columns, kind)

    def task(part: slice) -> None:
        exact = rows[part]
        raw = out[part]
        _refuse_infinite(exact)
        status = library.encode_rows(int(kind), _at(exact), _at(importance), len(exact), columns, _at(raw))
        assert status == 0
        if sums is not None:
            _project(exact, decode(raw, kind), importance, kind, sums[part])

    _spread(task, n_rows, columns, threads)
    if unshrink is not None and sums is not None:
        _rescale(out, sums, kind, unshrink)
    return out


def decode(raw: Bytes, kind: GGMLQuantizationType) -> Floats:
    """Read blocks of a supported type back to float32, (rows, columns), as ggml and gguf-py do.

    Raises:
        BadInput: the type is not supported.
        Unavailable: this machine has no library; gguf-py reads the same values.
    """
    if kind not in SUPPORTED:
        raise BadInput(f"{kind.name} is not read here: gguf-py does")
    data = np.ascontiguousarray(raw)
    n_blocks = data.size // row_bytes(kind, block_size(kind))
    per_row = data.shape[1] // row_bytes(kind, block_size(kind))
    out = np.empty((len(data), per_row * block_size(kind)), np.float32)
    status = load().decode_blocks(int(kind), _at(data), n_blocks, _at(out))
    assert status == 0
    return out


def unshrink(
    raw: Bytes,
    values: Floats,
    importance: Floats | None,
    kind: GGMLQuantizationType,
    how: Unshrink | None = None,
    *,
    threads: int = 1,
    rounded: Floats | None = None,
) -> Bytes:
    """Scale finished blocks of any encoder so that they keep the projection on the original; a new array.

    `raw` is (rows, bytes of a row) and `values` the original, (rows, columns) float32; `rounded` is what
    `raw` is read back as, worked out here where the caller has it not. Codes stay as they are: only the
    fp16 scales of each block change, by the factor that `Unshrink` describes.

    Raises:
        BadInput: the type has no such scale, or shapes do not match.
        Unavailable: this machine has no library.
    """
    if kind not in RESCALABLE:
        raise BadInput(f"blocks of {kind.name} have no scale of their own to change")
    rows = _checked(values, kind, importance, SUPPORTED | RESCALABLE)
    out = np.array(raw, np.uint8).reshape(len(rows), row_bytes(kind, rows.shape[1]))
    n_rows, columns = rows.shape
    sums = _no_sums(n_rows, columns, kind)

    def task(part: slice) -> None:
        back = _read_back(out[part], kind) if rounded is None else rounded.reshape(rows.shape)[part]
        _project(rows[part], np.ascontiguousarray(back, np.float32), importance, kind, sums[part])

    _spread(task, n_rows, columns, threads)
    _rescale(out, sums, kind, how or Unshrink())
    return out


def feed_back(
    raw: Bytes,
    values: Floats,
    moments: Floats,
    kind: GGMLQuantizationType,
    *,
    threads: int,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> Bytes:
    """Chooses the codes of finished blocks anew for what rows give, not weight by weight; returns a new array.

    Lowers (y - x)' M (y - x) of every row by moving one code after the other to its best value, so that
    what one column loses others make up for. M are the means of products of activations: (columns,
    columns), or (columns / span, span, span) where products across spans of columns are not known;
    `damping` of their mean diagonal is added to it. Scales stay as they are. `raw` is (rows, bytes of a
    row) of any encoder, `values` the original. The step is the coordinate descent of QuantEase
    (arXiv:2309.01885) over ggml's codes.

    Raises:
        BadInput: the type is not supported, or shapes do not match.
        Unavailable: this machine has no library.
    """
    rows = _checked(values, kind, None, RECODABLE)
    n_rows, columns = rows.shape
    out = np.array(raw, np.uint8).reshape(n_rows, row_bytes(kind, columns))
    damped = _damped(_in_spans(moments, columns, kind), damping)
    span = damped.shape[-1]

    def task(part: slice) -> None:
        given = (_at(rows[part]), _at(damped), len(rows[part]), columns, span, sweeps, _at(out[part]))
        if kind in TABLED:
            status = load().feed_back_iq(int(kind), _at(table(kind)), *given)
        else:
            status = load().feed_back(int(kind), *given)
        if status != 0:
            raise MemoryError(f"no memory for {span} columns")

    _spread(task, n_rows, columns, threads)
    return out


def _in_spans(moments: Floats, columns: int, kind: GGMLQuantizationType) -> Floats:
    """Moments as (spans, span, span), where spans are whole blocks and add up to the columns."""
    blocks = moments.reshape(-1, *moments.shape[-2:])
    span = blocks.shape[-1]
    if blocks.shape != (columns // span, span, span) or columns % span or span % block_size(kind):
        raise BadInput(f"moments are {moments.shape}, which does not fit rows of {columns}")
    return blocks


def _damped(blocks: Floats, damping: float) -> Floats:
    """Each block of moments in units of its mean diagonal, with the damping added; zeros become damping."""
    diagonal = np.einsum("sii->si", blocks).astype(np.float64)
    size = diagonal.mean(axis=1)
    size[size <= 0] = 1.0
    scaled = (blocks / size[:, None, None]).astype(np.float32)
    np.einsum("sii->si", scaled)[:] += np.float32(damping)
    return np.ascontiguousarray(scaled)


def _checked(
    values: Floats,
    kind: GGMLQuantizationType,
    importance: Floats | None,
    kinds: frozenset[GGMLQuantizationType] = SUPPORTED,
) -> Floats:
    if kind not in kinds:
        raise BadInput(f"{kind.name} is not encoded here; choose one of {_names(kinds)}")
    rows = np.ascontiguousarray(values, np.float32)
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.shape[1] % block_size(kind):
        raise BadInput(f"{rows.shape} is no table of rows that are whole blocks of {block_size(kind)}")
    if importance is not None:
        if importance.shape != (rows.shape[1],) or importance.dtype != np.float32:
            raise BadInput(
                f"importance is {importance.shape} {importance.dtype}, not ({rows.shape[1]},) float32"
            )
        if not np.isfinite(importance).all() or importance.min() < 0:
            raise BadInput("an importance is negative or not finite")
    return rows


def _names(kinds: frozenset[GGMLQuantizationType]) -> str:
    return ", ".join(sorted(kind.name for kind in kinds))


def _refuse_infinite(values: Floats) -> None:
    if not np.isfinite(values).all():
        raise BadInput("a value to encode is not finite")


def _at(array: NDArray[np.generic] | None) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def _spread(task: Callable[[slice], None], n_rows: int, columns: int, threads: int) -> None:
    """Runs the task over all rows, a few at a time; ctypes and NumPy let go of the interpreter's lock."""
    parts = list(_parts(n_rows, columns, threads))
    if threads == 1 or len(parts) == 1:
        for part in parts:
            task(part)
        return
    with ThreadPoolExecutor(max_workers=threads) as pool:
        list(pool.map(task, parts))


def rows_together(n_rows: int, columns: int, threads: int, most_elements: int) -> int:
    """Return how many rows of a table one thread takes at a time: whole searches, and some for every thread.

    They have `most_elements` at most, unless a single search has more.
    """
    wanted = min(most_elements // columns, -(-n_rows // threads))
    return max(_ROWS_TOGETHER, wanted // _ROWS_TOGETHER * _ROWS_TOGETHER)


def _parts(n_rows: int, columns: int, threads: int) -> Iterator[slice]:
    """As many rows as fit a task, fewer where there would be less than one for each thread."""
    step = rows_together(n_rows, columns, threads, _ELEMENTS_TOGETHER)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _read_back(raw: Bytes, kind: GGMLQuantizationType) -> Floats:
    return decode(raw, kind) if kind in SUPPORTED else np.asarray(quants.dequantize(raw, kind), np.float32)


def _no_sums(n_rows: int, columns: int, kind: GGMLQuantizationType) -> NDArray[np.float64]:
    """(rows, blocks of a row, 2): sum q x^2 and sum q x y of each block, to be filled in."""
    return np.zeros((n_rows, columns // block_size(kind), 2), np.float64)


def _project(
    exact: Floats,
    rounded: Floats,
    importance: Floats | None,
    kind: GGMLQuantizationType,
    sums: NDArray[np.float64],
) -> None:
    n_rows, columns = exact.shape
    weights = _at(importance)
    load().project(_at(exact), _at(rounded), weights, n_rows, columns, block_size(kind), _at(sums))


def _rescale(raw: Bytes, sums: NDArray[np.float64], kind: GGMLQuantizationType, how: Unshrink) -> None:
    n_rows, per_row, _ = sums.shape
    share = {"block": 1, "row": per_row, "tensor": n_rows * per_row}[how.share]
    offset, halves = _SCALES[kind]
    n_bytes = row_bytes(kind, block_size(kind))
    load().rescale(
        *(_at(raw), n_rows * per_row, n_bytes, offset, halves, _at(sums), share),
        *(how.strength, _LEAST_FACTOR, _MOST_FACTOR),
    )
