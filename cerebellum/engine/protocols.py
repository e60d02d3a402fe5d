"""What Cerebellum needs of an engine: four methods, so that a fake can stand in for llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]


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


class Engine(Protocol):
    """Opens lists of shards. ``identity`` names everything in it that can change a number."""

    @property
    def identity(self) -> str: ...

    def tokenize(self, path: Path, text: bytes) -> Tokenized: ...

    def open(self, paths: Sequence[Path], ctx: int) -> AbstractContextManager[Model]: ...


def scored_tokens(ctx: int) -> int:
    """Tokens scored in a chunk of ``ctx``: the second half but for its first, as llama-perplexity."""
    return ctx - ctx // 2 - 1
