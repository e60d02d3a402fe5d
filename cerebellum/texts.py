"""Cuts a text into chunks of tokens exactly as llama-perplexity does, so that both score the same tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cerebellum.engine.protocols import Engine, Tokens, scored_tokens
from cerebellum.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Holds the tokens of one text as (chunks, ctx); a remainder shorter than ``ctx`` is left out.

    ``sha256`` is of the text's bytes without one final newline. ``bos`` is the token that replaces the first
    one of each chunk when the model is fed, or None for a model that wants none.
    """

    path: Path
    sha256: str
    tokens_NT: Tokens
    bos: int | None

    @property
    def n_chunks(self) -> int:
        """Returns the number of whole chunks in the text."""
        return len(self.tokens_NT)

    @property
    def ctx(self) -> int:
        """Returns the number of tokens in a chunk."""
        return int(self.tokens_NT.shape[1])

    @property
    def scored_per_chunk(self) -> int:
        """Returns how many tokens of a chunk are scored: those that have half a chunk as context."""
        return scored_tokens(self.ctx)

    def inputs(self, chunk: int) -> Tokens:
        """Returns what the model is fed, (ctx,): the chunk, with BOS for its first token if wanted."""
        tokens_T: Tokens = self.tokens_NT[chunk].copy()
        if self.bos is not None:
            tokens_T[0] = self.bos
        return tokens_T

    def targets(self, chunk: int) -> Tokens:
        """Returns the tokens that are scored, (ctx - ctx//2 - 1,): each follows one of the second half."""
        targets_S: Tokens = self.tokens_NT[chunk, self.ctx // 2 + 1 :]
        return targets_S


def read_text(path: Path) -> bytes:
    """Returns the text's bytes; one final newline is dropped, as llama.cpp's tools do on ``-f``.

    Raises BadInput where the file cannot be read, is empty, or is not UTF-8, and then names the byte.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give a UTF-8 text file") from error
    text = text.removesuffix(b"\n")
    if not text.strip():
        raise BadInput(f"{path}: the text is empty; give a UTF-8 text of at least one chunk")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 at byte {error.start}; convert the text first") from error
    return text


def load_corpus(engine: Engine, model: Path, path: Path, ctx: int) -> Corpus:
    """Tokenizes ``path`` with the vocabulary of ``model`` and cuts it into chunks of ``ctx`` tokens.

    Raises BadInput where the text cannot be read or is shorter than one chunk, or the chunk under 8 tokens.
    """
    if ctx < 8:
        raise BadInput(f"--ctx {ctx}: a chunk needs at least 8 tokens")
    text = read_text(path)
    found = engine.tokenize(model, text)
    n_chunks = len(found.tokens) // ctx
    if n_chunks < 1:
        raise BadInput(
            f"{path}: {len(found.tokens)} tokens are less than one chunk of {ctx}; "
            "give a longer text or a smaller --ctx"
        )
    return Corpus(
        path=path,
        sha256=hashlib.sha256(text).hexdigest(),
        tokens_NT=found.tokens[: n_chunks * ctx].reshape(n_chunks, ctx),
        bos=found.bos,
    )
