"""Cuts a text into chunks of tokens exactly as llama-perplexity does, so that both score the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from cerebellum.engine.protocols import Engine, Tokens, scored_tokens
from cerebellum.errors import BadInput
from cerebellum.settings import Domain


@dataclass(frozen=True, kw_only=True)
class Part:
    """One text of a corpus: its domain, its file, and which of the corpus's chunks are its own."""

    domain: str
    path: Path
    sha256: str
    chunks: range


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Holds the tokens of a text as (chunks, ctx); a remainder shorter than ``ctx`` is left out.

    ``sha256`` is of the text's bytes without one final newline. ``bos`` is the token that replaces the first
    one of each chunk when the model is fed, or None for a model that wants none. A corpus of several domains
    has ``parts``, and its hash is that of theirs; no chunk has tokens of two of them. ``path`` is the first's.
    """

    path: Path
    sha256: str
    tokens_NT: Tokens
    bos: int | None
    parts: tuple[Part, ...] = ()

    @property
    def name(self) -> str:
        """Returns what people call the text: its file's name, or the domains that it is of."""
        return " + ".join(part.domain for part in self.parts) or self.path.name

    @property
    def texts(self) -> frozenset[str]:
        """Returns the hashes of all texts in it."""
        return frozenset(part.sha256 for part in self.parts) or frozenset((self.sha256,))

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

    def first(self, n: int) -> tuple[int, ...]:
        """Returns the first ``n`` chunks; of several domains the first of each in turn, until there are ``n``.

        So a part of a corpus is of all its domains, and any beginning of it too.
        """
        return tuple(_dealt([part.chunks for part in self.parts or (_whole(self),)])[:n])

    def sample(self, n: int, seed: int) -> tuple[int, ...]:
        """Returns ``n`` chunks drawn at random without replacement, in the order drawn.

        Of several domains each gives one in turn, as in ``first``, so that all count alike, whatever their lengths.
        Within one every chunk is as likely as any other: what is found speaks for all of it, whatever its articles
        are. A smaller sample from the same seed begins a larger one: whoever asks for more measures none twice.
        """
        drawn = [
            np.random.default_rng((seed, 2, place)).permutation(np.array(part.chunks)).tolist()
            for place, part in enumerate(self.parts or (_whole(self),))
        ]
        return tuple(_dealt(drawn)[:n])

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


def _dealt(hands: Sequence[Sequence[int]]) -> list[int]:
    """Returns one of each hand in turn, until all are empty."""
    return [chunk for turn in zip_longest(*hands) for chunk in turn if chunk is not None]


def _whole(corpus: Corpus) -> Part:
    return Part(domain="", path=corpus.path, sha256=corpus.sha256, chunks=range(corpus.n_chunks))


def load_corpora(engine: Engine, model: Path, texts: Sequence[Domain], ctx: int) -> Corpus:
    """Tokenizes texts of several domains one by one and puts their chunks together; of one text it is the corpus.

    Raises BadInput as ``load_corpus`` does, for a text of any domain.
    """
    loaded = [load_corpus(engine, model, text.path, ctx) for text in texts]
    if len(loaded) == 1:
        return loaded[0]
    parts = []
    start = 0
    for text, corpus in zip(texts, loaded, strict=True):
        chunks = range(start, start + corpus.n_chunks)
        parts.append(Part(domain=text.name, path=text.path, sha256=corpus.sha256, chunks=chunks))
        start = chunks.stop
    return Corpus(
        path=loaded[0].path,
        sha256=hashlib.sha256("\n".join(part.sha256 for part in parts).encode()).hexdigest(),
        tokens_NT=np.concatenate([corpus.tokens_NT for corpus in loaded]),
        bos=loaded[0].bos,
        parts=tuple(parts),
    )


def load_corpus(engine: Engine, model: Path, path: Path, ctx: int) -> Corpus:
    """Tokenizes ``path`` with the vocabulary of ``model`` and cuts it into chunks of ``ctx`` tokens.

    Raises BadInput where the text cannot be read or is shorter than one chunk, or the chunk under 8 tokens.
    """
    return cut(engine, model, path, read_text(path), ctx)


def cut(engine: Engine, model: Path, path: Path, text: bytes, ctx: int, *, special: bool = False) -> Corpus:
    """Cuts the ``text`` that ``path`` holds, or that was made of it; with ``special`` it has special tokens.

    Raises BadInput as ``load_corpus`` does.
    """
    if ctx < 8:
        raise BadInput(f"--ctx {ctx}: a chunk needs at least 8 tokens")
    found = engine.tokenize(model, text, special=special)
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
