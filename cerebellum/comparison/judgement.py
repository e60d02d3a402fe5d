"""judge.json: any files of one model on several texts, with who survives. Types only; reading it loads no engine."""

from __future__ import annotations

from typing import Literal

from cerebellum.codec import Artifact, Record

Bounds = tuple[float, float]

Order = Literal["less", "more", "tie", "open"]
LESS: Order = "less"
MORE: Order = "more"
TIE: Order = "tie"
OPEN: Order = "open"
"""How a file's damage stands to another's: surely less, surely more, surely alike, or not known."""

Standing = Literal["survives", "beaten", "matched", "open", "collapsed"]
"""Whether a file is beaten, or matched, by one that is no larger and does less damage."""


class JudgedText(Record, frozen=True, kw_only=True):
    """A text that all files were read on: ``chunks`` at most of the ``of_chunks`` that it has."""

    name: str
    file: str
    sha256: str
    chunks: int
    of_chunks: int


class OnText(Record, frozen=True, kw_only=True):
    """One file on one text, against the source on the same tokens; None where it has collapsed.

    ``kld_mean`` and ``kld_p99`` are the mean and the 99th percentile over tokens of the KL divergence from the
    source, nats; ``top1`` is the share of tokens with the same likeliest token. ``ppl`` is the perplexity,
    ``source_ppl`` the source's on the same chunks, and ``delta_pct`` the paired change in percent. Intervals hold,
    each by itself, whenever the reading stopped; they are None where one chunk was read.
    """

    text: str
    chunks: int
    kld_mean: float | None
    kld_ci: Bounds | None
    kld_p99: float | None
    kld_p99_ci: Bounds | None
    top1: float | None
    top1_ci: Bounds | None
    ppl: float | None
    source_ppl: float | None
    delta_pct: float | None
    ci_pct: Bounds | None


class JudgedFile(Record, frozen=True, kw_only=True):
    """A file with its place among the others.

    ``kld_mean`` is the mean over texts, each counting alike, and ``kld_ci`` its interval. ``against`` names the file
    that beats or matches it, or those that it may yet be beaten by. ``confidence`` is that of its standing alone.
    """

    name: str
    file: str
    sha256: str
    bytes: int
    standing: Standing
    against: tuple[str, ...]
    confidence: float | None
    kld_mean: float | None
    kld_ci: Bounds | None
    texts: tuple[OnText, ...]


class JudgedPair(Record, frozen=True, kw_only=True):
    """How the damage of ``a`` stands to that of ``b``: less, more, tie, or open.

    ``kld_difference`` is a's mean divergence less b's over the texts, paired chunk by chunk, and ``ci`` what the
    order was settled by: all orders together hold with the confidence of the whole. ``reversed_on`` names texts on
    which, looked at alone, it is surely the other way round (95%, each by itself).
    """

    a: str
    b: str
    order: Order
    kld_difference: float
    ci: Bounds | None
    confidence: float
    reversed_on: tuple[str, ...]


class Judgement(Artifact, frozen=True, kw_only=True):
    """judge.json. ``sure`` says that every order was settled; else the texts, or --max-chunks, ended first.

    All orders and standings together are wrong with chance ``alpha``; damages that differ by less than ``tie_pct``
    percent of the smaller one count as alike.
    """

    format: Literal[1] = 1
    cerebellum: str
    llama_cpp: str
    source: str
    source_sha256: str
    source_bytes: int
    ctx: int
    seed: int
    alpha: float
    tie_pct: float
    sure: bool
    tokens_scored: int
    texts: tuple[JudgedText, ...]
    files: tuple[JudgedFile, ...]
    pairs: tuple[JudgedPair, ...]
