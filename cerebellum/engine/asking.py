"""What question benchmarks need of an engine: score endings after shared prompts, and generate.

A benchmark knows questions, this knows tokens. The seam is one protocol, so that an official fake
can stand in for llama.cpp here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

TokenIds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Score every ending after the prompt. Neither the prompt nor an ending may be empty.

    The prompt is decoded once, however many endings follow it.
    """

    prompt: TokenIds
    endings: tuple[TokenIds, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.endings or not all(self.endings):
            raise ValueError("an ask needs a prompt of at least one token and endings of at least one")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One ending: the log-probability of each of its tokens (nats), and whether all were the top one."""

    log_probs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        return math.fsum(self.log_probs)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an ask is answered with; ``top_token`` is the likeliest token right after the prompt."""

    endings: tuple[Scored, ...]
    top_token: int


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Special tokens as ids and text, and the model's own chat template, where it has them."""

    bos: int | None
    eos: int | None
    bos_text: str
    eos_text: str
    adds_bos: bool
    chat_template: str | None


class Asker(Protocol):
    """An open model that answers asks. ``identity`` names everything in it that can change a number."""

    @property
    def identity(self) -> str: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def context_length(self) -> int: ...

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> TokenIds: ...

    def text(self, tokens: TokenIds) -> str: ...

    def score(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """(index of the ask, its reply), in the order that is fastest; every ask exactly once."""
        ...

    def generate(
        self, prompts: Sequence[TokenIds], max_tokens: int, stops: Sequence[str] = ()
    ) -> Iterator[tuple[int, str]]:
        """(index of the prompt, greedy continuation up to a stop or the end of the turn)."""
        ...


Opener = Callable[[Sequence[Path]], AbstractContextManager[Asker]]
"""Opens a model's files to be asked, and closes them when the block ends."""


class KeptAsker:
    """Keeps the model that was asked last open, for whoever asks it again."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._stack = ExitStack()
        self._paths: tuple[Path, ...] = ()
        self._open: Asker | None = None

    def of(self, paths: Sequence[Path]) -> Asker:
        """Returns the model of these files, open; another one that was open is closed first."""
        if self._open is None or tuple(paths) != self._paths:
            self.close()
            self._open = self._stack.enter_context(self._opener(paths))
            self._paths = tuple(paths)
        return self._open

    def close(self) -> None:
        """Closes the model. Another one can be opened afterwards."""
        self._open = None
        self._stack.close()


def shared_prefix(sequences: Sequence[TokenIds]) -> int:
    """How many first tokens all sequences have in common."""
    low = min(sequences)
    high = max(sequences)  # in dictionary order: these two differ the earliest
    for index, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return index
    return min(len(low), len(high))


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first stop in it, whether there was one)."""
    found = [text.find(stop) for stop in stops if stop and stop in text]
    return (text[: min(found)], True) if found else (text, False)
