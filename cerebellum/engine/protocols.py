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

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """A text as tokens; ``bos`` replaces the first token of every chunk where the model wants one."""

    tokens: Tokens
    bos: int | None


class Model(Protocol):
    """An open model, good for chunks of one length."""

    @property
    def vocab_size(self) -> int: ...

    def logits(self, tokens_T: Tokens) -> Logits:
        """The logits that predict the scored half of a chunk.

        ``tokens_T`` is one chunk; the memory of earlier chunks is cleared first. Returns (S, V)
        float32 in fresh memory: row s predicts token T//2 + 1 + s, so S = T - T//2 - 1.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """One tensor to convert.

    ``raw`` holds its bytes at ``from_type``; ``shape`` is ggml's order (row length first);
    ``importance`` is (experts * row length,) float32 mean squared activations, or None.
    """

    name: str
    raw: Bytes
    shape: tuple[int, ...]
    from_type: GGMLQuantizationType
    to_type: GGMLQuantizationType
    importance: Floats | None = None


@dataclass
class ColumnSquares:
    """Sums for one weight: ``squares`` (experts, columns), and ``counts`` (experts,), the rows summed."""

    squares: NDArray[np.float64]
    counts: NDArray[np.int64]


class Engine(Protocol):
    """Opens lists of shards, and makes their bytes. Stateless but for its settings."""

    @property
    def identity(self) -> str:
        """Names everything that can change a measured number: build, devices, offload."""
        ...

    @property
    def build(self) -> str:
        """Names everything that can change a byte or a type: the library's version and commit."""
        ...

    def tokenize(self, path: Path, text: bytes) -> Tokenized:
        """Returns the text as tokens of the model at ``path``, exactly as llama-perplexity has them."""
        ...

    def vocab_size(self, path: Path) -> int:
        """Returns how many tokens the vocabulary of the model at ``path`` has, and loads nothing else."""
        ...

    def open(self, paths: Sequence[Path], ctx: int) -> AbstractContextManager[Model]:
        """Opens shards (first the one with the metadata) for chunks of ``ctx`` tokens."""
        ...

    def importance(
        self, paths: Sequence[Path], ctx: int, chunks: Iterable[Tokens], tick: Callable[[], None]
    ) -> Mapping[str, ColumnSquares]:
        """Sums the squared activations that every weight meets on some chunks, by the weight's name."""
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

    def asker(self, paths: Sequence[Path]) -> AbstractContextManager[Asker]:
        """Opens a model to be asked questions of any length."""
        ...


def scored_tokens(ctx: int) -> int:
    """Tokens scored in a chunk of ``ctx``: the second half but for its first, as llama-perplexity."""
    return ctx - ctx // 2 - 1
