"""A text cut into chunks, exactly as llama-perplexity cuts it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cerebellum.engine.protocols import Engine, Tokens, scored_tokens
from cerebellum.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens of one text as (chunks, ctx); a remainder shorter than ``ctx`` is left out."""

    path: Path
    sha256: str
    tokens_NT: Tokens
    bos: int | None

    @property
    def n_chunks(self) -> int:
        return len(self.tokens_NT)

    @property
    def ctx(self) -> int:
        return int(self.tokens_NT.shape[1])

    @property
    def scored_per_chunk(self) -> int:
        return scored_tokens(self.ctx)

    def inputs(self, chunk: int) -> Tokens:
        """What the model is fed, (ctx,): the chunk with its first token replaced by BOS if wanted."""
        tokens_T: Tokens = self.tokens_NT[chunk].copy()
        if self.bos is not None:
            tokens_T[0] = self.bos
        return tokens_T

    def targets(self, chunk: int) -> Tokens:
        """The tokens that are scored, (ctx - ctx//2 - 1,)."""
        targets_S: Tokens = self.tokens_NT[chunk, self.ctx // 2 + 1 :]
        return targets_S


def read_text(path: Path) -> bytes:
    """The text's bytes; one final newline is dropped, as llama.cpp's tools do on ``-f``."""
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
    """Tokenizes ``path`` with the model's own vocabulary and cuts it into chunks of ``ctx`` tokens."""
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
