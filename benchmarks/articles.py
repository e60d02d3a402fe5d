"""Texts cut into documents, and intervals of ratios that take a document, not a chunk, as the unit.

Neighbouring chunks are of one article or one module and are not independent of each other, so that an interval over
chunks is too narrow. ``ratio_by_document`` is the ratio estimator of cluster sampling (Cochran, Sampling Techniques,
1977, 6.8 and 9A.1): clusters of unequal size, the linearised variance of their residuals, Student's quantile for
as many degrees of freedom as there are documents less one.
"""

from __future__ import annotations

import math
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.protocols import Engine
from cerebellum.stats.paired import CONFIDENCE, Interval, student_quantile
from cerebellum.texts import Corpus, read_text

Vector = NDArray[np.float64]
Documents = NDArray[np.int64]

_TITLE = re.compile(rb"(?m)^ = [^=\n].* = ?\n")  # of an article in WikiText's layout, not of a section
_MODULE = re.compile(rb"(?m)^# module .*\n")

SELECT_MODULES = (
    *("ast", "base64", "calendar", "cmd", "codecs", "configparser", "copy", "csv", "dataclasses"),
    *("datetime", "dis", "enum", "ftplib", "gettext", "hashlib", "heapq", "inspect", "ipaddress"),
)
REPORT_MODULES = (
    *("argparse", "bdb", "cProfile", "code", "colorsys", "contextlib", "difflib", "doctest", "fileinput"),
    *("fractions", "functools", "getopt", "gzip", "imaplib", "linecache", "mailbox", "operator", "optparse"),
    *("pickletools", "plistlib", "pprint", "random", "sched", "shlex", "smtplib", "statistics", "tarfile"),
    *("tempfile", "tokenize", "traceback", "typing", "uuid", "weakref"),
)
_BYTES_OF_A_MODULE = 12_000


def code_text(path: Path, modules: Sequence[str]) -> Path:
    """Writes the beginnings of modules of this Python's standard library as one text; those that it lacks are left out.

    No module is in both lists, and none of the texts of the package is in the reports'. Python's version decides the
    bytes, so that whoever reports figures names the text's SHA-256.
    """
    library = Path(sysconfig.get_path("stdlib"))
    parts = []
    for name in modules:
        found = library / f"{name}.py"
        if found.exists():
            text = found.read_text(encoding="utf-8")[:_BYTES_OF_A_MODULE]
            parts.append(f"# module {name}\n{text[: text.rfind(chr(10)) + 1]}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts), encoding="utf-8")
    return path


def document_of(engine: Engine, model: Path, corpus: Corpus) -> Documents:
    """Returns the number of the document that each chunk's scored half begins in, (chunks,).

    Documents are tokenized one by one and their ends scaled to the whole text's tokens: a word over a border is a token
    more or less, which moves no chunk but one on the border.
    """
    text = read_text(corpus.path)
    starts = sorted({0, *(match.start() for mark in (_TITLE, _MODULE) for match in mark.finditer(text))})
    pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    counts = [len(engine.tokenize(model, piece).tokens) if piece.strip() else 0 for piece in pieces]
    ends = np.cumsum(counts) * (len(engine.tokenize(model, text).tokens) / max(sum(counts), 1))
    middles = np.arange(corpus.n_chunks) * corpus.ctx + corpus.ctx // 2
    return np.searchsorted(ends, middles, side="right").astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The ratio of two sums with its interval; ``documents`` stand behind it."""

    value: float
    low: float
    high: float
    documents: int

    def less_pct(self) -> list[float]:
        """Returns how many percent less the first is, with the interval, low end first."""
        return [100 * (1 - self.value), 100 * (1 - self.high), 100 * (1 - self.low)]


def ratio_by_document(values_N: Vector, reference_N: Vector, document_N: Documents) -> Ratio:
    """Returns the sum of values over the sum of the reference, with documents as the unit of chance."""
    names, place = np.unique(document_N, return_inverse=True)
    values = np.bincount(place, weights=values_N)
    reference = np.bincount(place, weights=reference_N)
    ratio = float(values.sum() / reference.sum())
    half = _half_width(values - ratio * reference) / abs(float(reference.sum()))
    return Ratio(value=ratio, low=ratio - half, high=ratio + half, documents=len(names))


def mean_by_document(values_N: Vector, document_N: Documents) -> Interval:
    """Returns the mean of a value a chunk, with documents as the unit of chance."""
    found = ratio_by_document(values_N, np.ones(len(values_N)), document_N)
    n = len(values_N)
    return Interval(mean=found.value, low=found.low, high=found.high, n=n, population=n)


def _half_width(residuals_D: Vector) -> float:
    """Returns the half-width of the interval of a sum over documents, by the residuals of each."""
    n = len(residuals_D)
    if n < 2:
        return math.inf
    return student_quantile(CONFIDENCE, n - 1) * math.sqrt(n) * float(residuals_D.std(ddof=1))
