"""What Cerebellum needs of an engine, so that a fake can stand in for llama.cpp through a whole run.

An engine opens shards and scores text, and it is also the only one who knows llama.cpp's presets and encoders:
which type a preset gives a tensor, and the bytes of a tensor at another type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from cerebellum.engine.asking import Asker
from cerebellum.engine.speed import Speed
from cerebellum.errors import CerebellumError

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """A text as tokens; ``bos`` replaces the first token of every chunk where the model wants one."""

    tokens: Tokens
    bos: int | None


class Kept(Protocol):
    """What a reference model predicts for one chunk, kept so that other models can be compared with it.

    It lies where its maker put it, on a GPU or in main memory, and outlives the model that made it.
    """

    @property
    def n_bytes(self) -> int: ...

    def close(self) -> None:
        """Frees the memory it takes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """One chunk to score. ``against`` asks for divergences from a reference, ``keep`` makes one of this, and
    ``entropy`` asks how unsure the predictions are."""

    tokens_T: Tokens
    against: Kept | None = None
    keep: bool = False
    entropy: bool = False

    @property
    def targets(self) -> Tokens:
        """The tokens that are scored: the second half but for its first."""
        return self.tokens_T[len(self.tokens_T) // 2 + 1 :]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model says of one chunk, by scored token: float64 nats (S,), and whether top tokens agree (S,).

    Divergence and agreement are there where the job had something to compare with, ``kept`` and the entropy of
    each prediction where it said so. A model whose entropy lies below its NLL on the whole is overconfident.
    """

    nll_S: NDArray[np.float64]
    entropy_S: NDArray[np.float64] | None = None
    kld_S: NDArray[np.float64] | None = None
    same_top_S: NDArray[np.bool_] | None = None
    kept: Kept | None = None


class Model(Protocol):
    """An open model, good for chunks of one length."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def chunks_at_once(self) -> int:
        """How many chunks one decode takes; fewer are as good, and more are cut."""
        ...

    def logits(self, tokens_T: Tokens) -> Logits:
        """The logits that predict the scored half of a chunk.

        ``tokens_T`` is one chunk; the memory of earlier chunks is cleared first. Returns (S, V)
        float32 in fresh memory: row s predicts token T//2 + 1 + s, so S = T - T//2 - 1.
        """
        ...

    def score(self, jobs: Sequence[Job]) -> list[Scores]:
        """Scores chunks of one length where the logits are: on the GPU, or on all threads of the host."""
        ...


class CannotSwap(CerebellumError):
    """A variant cannot be swapped into the open model; open it afresh. The message says why."""


class Resident(Model, Protocol):
    """An open model whose groups can be replaced without loading it again."""

    def swap(self, shards: Sequence[Path]) -> None:
        """Puts shards in place of those of the same groups; an empty list is the model as it was opened.

        Logits are those of a model opened afresh, bit for bit. CannotSwap, the weights as they were opened,
        where there is no room or no way.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """One tensor to convert.

    ``raw`` holds its bytes at ``from_type``; ``shape`` is ggml's order (row length first);
    ``importance`` is (experts * row length,) float32 mean squared activations, or None. ``first_expert`` is
    the one that the first rows belong to, where the job is a part of a tensor.
    """

    name: str
    raw: Bytes
    shape: tuple[int, ...]
    from_type: GGMLQuantizationType
    to_type: GGMLQuantizationType
    importance: Floats | None = None
    first_expert: int = 0


@dataclass
class ColumnSquares:
    """Sums for one weight: ``squares`` (experts, columns), and ``counts`` (experts,), the rows summed."""

    squares: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How the input of one weight is watched: products are summed within ``span`` columns, a whole number of
    blocks of 256; what is left of a row is a shorter span. ``pooled`` sums all experts into one."""

    span: int
    pooled: bool = False


@dataclass(kw_only=True)
class ColumnProducts:
    """Sums of products of the columns that one weight's input has, float32, where squares are the diagonal.

    ``spans`` is (experts, spans of a row, span, span), ``rest`` (experts, rest, rest) the columns after the
    last whole span, and ``counts`` (experts,) the rows summed. With ``same_rows`` every expert of a token
    reads the same row, so that experts can stand in for each other.
    """

    spans: Floats
    rest: Floats
    counts: NDArray[np.int64]
    same_rows: bool

    @classmethod
    def empty(cls, experts: int, columns: int, span: int, *, same_rows: bool) -> ColumnProducts:
        """Returns sums of nothing yet, for rows of ``columns``."""
        rest = columns % span
        return cls(
            spans=np.zeros((experts, columns // span, span, span), np.float32),
            rest=np.zeros((experts, rest, rest), np.float32),
            counts=np.zeros(experts, np.int64),
            same_rows=same_rows,
        )

    def add(self, expert: int, rows: Floats) -> None:
        """Adds the products of rows, (n, columns) float32, that one expert has read."""
        n_spans, span = self.spans.shape[1:3]
        whole = rows[:, : n_spans * span].reshape(len(rows), n_spans, span)
        self.spans[expert] += whole.transpose(1, 2, 0) @ whole.transpose(1, 0, 2)
        left = rows[:, n_spans * span :]
        self.rest[expert] += left.T @ left
        self.counts[expert] += len(rows)


class Engine(Protocol):
    """Opens lists of shards, and makes their bytes. Stateless but for its settings."""

    @property
    def identity(self) -> str:
        """Names everything that can change a measured number: build, devices, offload."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether models run on a GPU, so that the processor is free meanwhile."""
        ...

    @property
    def build(self) -> str:
        """Names everything that can change a byte or a type: the library's version and commit."""
        ...

    def chunks_together(self, ctx: int) -> int:
        """Returns how many chunks of ``ctx`` tokens one decode takes; fewer cost as much."""
        ...

    def tokenize(self, path: Path, text: bytes, *, special: bool = False) -> Tokenized:
        """Returns the text as tokens of the model at ``path``, exactly as llama-perplexity has them.

        With ``special`` what is written like a special token is one, as in a prompt that a chat template made.
        """
        ...

    def vocab_size(self, path: Path) -> int:
        """Returns how many tokens the vocabulary of the model at ``path`` has, and loads nothing else."""
        ...

    def open(self, paths: Sequence[Path], ctx: int) -> AbstractContextManager[Model]:
        """Opens shards (first the one with the metadata) for chunks of ``ctx`` tokens."""
        ...

    def can_swap(self, weights: int, staged: int) -> bool:
        """Whether groups are expected to be swapped in place on a model of ``weights`` bytes, ``staged`` bytes at once.

        Where not, every change of groups opens a model anew, which takes as long as many chunks.
        """
        ...

    def resident(self, paths: Sequence[Path], ctx: int) -> AbstractContextManager[Resident]:
        """Opens shards like ``open``, to be swapped one by one."""
        ...

    def importance(
        self, paths: Sequence[Path], ctx: int, chunks: Iterable[Tokens], tick: Callable[[], None]
    ) -> Mapping[str, ColumnSquares]:
        """Sums the squared activations that every weight meets on some chunks, by the weight's name."""
        ...

    def moments(
        self,
        paths: Sequence[Path],
        ctx: int,
        chunks: Iterable[Tokens],
        watched: Mapping[str, Watch],
        tick: Callable[[], None],
    ) -> Mapping[str, ColumnProducts]:
        """Sums products of the activations that watched weights meet, by name.

        Weights that read the same input share one object.
        """
        ...

    def importance_and_moments(
        self,
        paths: Sequence[Path],
        ctx: int,
        chunks: Iterable[Tokens],
        watched: Mapping[str, Watch],
        n_watched: int,
        tick: Callable[[], None],
    ) -> tuple[Mapping[str, ColumnSquares], Mapping[str, ColumnProducts]]:
        """Does both in one pass over the chunks: ``importance`` of all, ``moments`` of the first ``n_watched``."""
        ...

    def preset_types(
        self, source: Path, preset: LlamaFileType, *, has_imatrix: bool, allow_requantize: bool = False
    ) -> dict[str, GGMLQuantizationType]:
        """Returns the type that llama-quantize would give every tensor, fallbacks included."""
        ...

    def quantize(self, job: QuantizeJob, threads: int) -> Iterator[Bytes]:
        """Yields a tensor's bytes at its new type in order; BadInput where its rows cannot take it."""
        ...

    def to_float(self, raw: Bytes, type_: GGMLQuantizationType, n_per_row: int) -> Floats:
        """Returns rows of any type as float32, contiguous, (rows * n_per_row,)."""
        ...

    def encoded(self, job: QuantizeJob) -> Bytes:
        """Returns a small tensor's bytes at its new type in one piece, worked out on this thread alone."""
        ...

    def round_trip(self, job: QuantizeJob) -> Floats:
        """Returns a small tensor's values as they come back from its new type, worked out on this thread alone."""
        ...

    @property
    def machine(self) -> str:
        """Names for people what a speed was measured on."""
        ...

    def speed(self, paths: Sequence[Path]) -> Speed:
        """Times a prompt and generation on a model."""
        ...

    def asker(self, paths: Sequence[Path]) -> AbstractContextManager[Asker]:
        """Opens a model to be asked questions of any length."""
        ...


def scored_tokens(ctx: int) -> int:
    """Tokens scored in a chunk of ``ctx``: the second half but for its first, as llama-perplexity."""
    return ctx - ctx // 2 - 1
